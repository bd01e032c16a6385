// What the Back button goes back by: one step for each page, and one for each act that changes its address.
//
// Streamlit makes a step of whatever a script writes into the address, also of what a page completes by itself when it
// opens, and none of what a widget writes.

const steps = (window.__conceptAuditSteps ??= { acted: false, push: null, replace: null })

if (!steps.push) {
  steps.push = history.pushState.bind(history)
  steps.replace = history.replaceState.bind(history)
  const there = (url) => new URL(url ?? location.href, location.href)
  const write = (wanted, state, title, url) => {
    const { pathname, search } = there(url)
    let how = wanted
    if (pathname === location.pathname) {
      if (search === location.search) return wanted === steps.replace ? wanted(state, title, url) : undefined
      how = steps.acted ? steps.push : steps.replace
    }
    steps.acted = false
    how(state, title, url)
  }
  history.pushState = (...how) => write(steps.push, ...how)
  history.replaceState = (...how) => write(steps.replace, ...how)
  for (const kind of ["pointerdown", "keydown"]) {
    window.addEventListener(kind, () => (steps.acted = true), true)
  }
  window.addEventListener("popstate", () => (steps.acted = false), true)
}

