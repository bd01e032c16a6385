// Brings what people do by keys to the server, from whatever page they are on by then.
//
// The desks (`acts.js`) are gone when their page is left, and what they would send with them. This is on every page.
//
// Between a click on a link and the server's word that the page has changed, Streamlit asks for pieces of the page in
// the name of the one that is left; the answer leaves an empty page. So nothing is sent in that time, and links wait
// until what was done is known to be done. What goes wrong all the same is seen and set right.

// Whatever the server answers has Streamlit draw for a tenth of a second, and the next keys wait for it: acts that
// follow each other quickly go to the server together.
const PAUSE = 300 // milliseconds without an act, after which those that wait are sent
const LATEST = 3000 // milliseconds that an act waits at most
const LONGEST = 3000 // milliseconds that a link waits, or that a page may take to change
const LOOK = 100 // milliseconds between two looks
const ODD = 6 // looks one after the other that find something wrong, after which it is set right
const QUEUES = { rows: "__conceptAuditRows", labels: "__conceptAuditLabels" }
const courier = (window.__conceptAuditCourier ??= { timer: null, since: 0, sent: {}, leaves: 0, passes: null, here: false, odd: 0 })

const queues = () => Object.entries(QUEUES).filter(([, place]) => window[place])
const owes = () => queues().some(([, place]) => window[place].acts.some((act) => act.n > window[place].taken))
const waits = () => queues().some(([name, place]) => window[place].count > (courier.sent[name] ?? 0))
const leaves = () => Date.now() - courier.leaves < LONGEST

function send() {
  clearTimeout(courier.timer)
  courier.timer = null
  if (!waits()) return
  if (leaves() || !courier.here) return call()
  put()
}

function put() {
  const acts = { turn: Date.now() } // whatever is sent once more is something new
  for (const [name, place] of queues()) {
    const { client, acts: mine, count } = window[place]
    acts[name] = { client, acts: mine }
    courier.sent[name] = count
  }
  courier.set("acts", acts)
}

// To be called when an act has been put into a queue.
function call() {
  if (!courier.timer) courier.since = Date.now()
  clearTimeout(courier.timer)
  courier.timer = setTimeout(send, Math.min(PAUSE, Math.max(0, courier.since + LATEST - Date.now())))
}

// A link goes on when all is done that was asked for.
function follow(link, until) {
  if (owes() && Date.now() < until) return setTimeout(() => follow(link, until), LOOK)
  courier.passes = link
  link.click()
}

function onClick(event) {
  const link = event.target.closest?.("a[href]")
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || link.target === "_blank") return
  if (courier.passes !== link && owes()) {
    event.preventDefault()
    event.stopImmediatePropagation()
    send()
    return follow(link, Date.now() + LONGEST)
  }
  courier.passes = null
  courier.leaves = Date.now()
}

const onPress = () => send() // what is clicked next may show numbers that hang on the acts
const onBack = () => {
  courier.leaves = Date.now()
}
const onLeave = (event) => {
  send()
  if (owes()) event.preventDefault() // the browser asks whether to leave
}
const onHide = () => {
  if (document.hidden) send()
}

// Where nothing runs, what was asked for should be done, and something drawn: every page has a heading.
function look() {
  const state = document.querySelector('[data-testid="stApp"]')?.dataset.testScriptState
  const drawn = document.querySelector('[data-testid="stMain"] h1') !== null
  const fine = state !== "notRunning" || (drawn && (!owes() || courier.timer))
  courier.odd = fine ? 0 : courier.odd + 1
  if (courier.odd < ODD) return
  courier.odd = 0
  if (drawn) return put()
  const page = [...document.querySelectorAll('a[data-testid*="NavLink"]')].find((link) => link.ariaCurrent === "page")
  if (page) page.click()
  else location.reload()
}

export default function (component) {
  const { data, setStateValue } = component
  Object.assign(courier, { set: setStateValue, send, call, leaving: leaves, leaves: 0, here: true })
  courier.unmount?.()
  document.addEventListener("click", onClick, true)
  document.addEventListener("pointerdown", onPress, true)
  document.addEventListener("visibilitychange", onHide)
  window.addEventListener("popstate", onBack, true)
  window.addEventListener("beforeunload", onLeave)
  courier.unmount = () => {
    document.removeEventListener("click", onClick, true)
    document.removeEventListener("pointerdown", onPress, true)
    document.removeEventListener("visibilitychange", onHide)
    window.removeEventListener("popstate", onBack, true)
    window.removeEventListener("beforeunload", onLeave)
  }
  for (const [name, place] of queues()) {
    const kept = window[place]
    const said = data.done[name]
    if (said.client !== kept.client || said.done <= kept.taken) continue
    kept.taken = said.done
    kept.go_on?.()
  }
  if (waits() && !courier.timer) call()
  courier.watch ??= setInterval(look, LOOK)
  return () => {
    courier.unmount?.()
    courier.unmount = null
    courier.here = false
  }
}
