// What people do by keys, one act after another.
//
// An act says which row it is of and what is to be, not "the other way round". It is shown at once and kept here until
// the page has been drawn with it, so that none is lost while Streamlit is busy, and none meets another row. The courier
// (`courier.js`), which is on every page, brings acts to the server and tells what the server has done.

const QUIET = 1200 // milliseconds without an act, after which the page is drawn anew
const WORDS = "input, textarea, select, [contenteditable], [role=combobox], [role=slider], [role=spinbutton]"
const OPEN = '[data-testid="stPopoverBody"], [role="dialog"]'

// One for the tab: the page may mount a component anew at any time.
function actsOf(place) {
  return (window[place] ??= {
    client: Date.now().toString(36) + Math.random().toString(36).slice(2),
    count: 0, // acts so far
    acts: [], // those that the page may not show yet
    taken: 0, // up to which act the server has done them
    undoable: [], // what may be undone from here, latest last
    moved: false, // something has changed since the page was drawn
    soon: false, // the page is to be drawn anew as soon as the server has done all
  })
}

// Whether the server has still to do something.
function owed(kept) {
  return kept.acts.some((act) => act.n > kept.taken)
}

// To be called whenever Streamlit calls: takes what the server says, and listens.
function mount(kept, component, KEYS, draw) {
  const { data, parentElement, setTriggerValue } = component
  kept.place = parentElement
  kept.settle = () => {
    kept.soon = owed(kept)
    if (kept.soon) return window.__conceptAuditCourier?.send() // first what was asked for is done
    kept.moved = false
    setTriggerValue("settled", kept.count)
  }
  if (kept.audit !== data.audit) Object.assign(kept, { audit: data.audit, undoable: [] })
  if (data.client === kept.client) {
    kept.acts = kept.acts.filter((act) => act.n > data.done)
    kept.taken = Math.max(kept.taken, data.done)
  }
  for (const button of parentElement.querySelectorAll("button[value]")) {
    button.onclick = () => KEYS[button.value]()
  }
  const onKey = (event) => {
    const key = event.key.toLowerCase?.()
    if (!KEYS[key] || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return
    if (event.repeat && !"jk".includes(key)) return
    if (event.composedPath()[0].closest?.(WORDS) || document.querySelector(OPEN)) return
    if (key !== "?" && kept.place?.querySelector("dialog[open]")) return
    event.preventDefault()
    event.stopPropagation()
    KEYS[key]()
  }
  let drawing = false
  const observer = new MutationObserver(() => {
    if (drawing) return
    drawing = true
    requestAnimationFrame(() => {
      drawing = false
      draw()
    })
  })
  kept.unmount?.()
  // Called by the courier, too, when the server has done something.
  kept.go_on = () => {
    if (kept.moved && !owed(kept)) kept.soon ? kept.settle() : wait(kept)
    draw()
  }
  if (kept.moved && !owed(kept)) wait(kept)
  document.addEventListener("keydown", onKey, true)
  observer.observe(document.body, { childList: true, subtree: true, attributeFilter: ["disabled"] })
  kept.unmount = () => {
    document.removeEventListener("keydown", onKey, true)
    observer.disconnect()
    kept.go_on = null
  }
  draw()
}

function act(kept, what) {
  kept.acts.push({ n: ++kept.count, audit: kept.audit, ...what })
  kept.moved = true
  window.__conceptAuditCourier?.call()
  wait(kept)
}

// Counts, orders and buttons hang on what was done: the page is drawn anew when the keys have been quiet.
function wait(kept) {
  clearTimeout(kept.timer)
  kept.timer = setTimeout(() => {
    if (!kept.go_on || !kept.moved || owed(kept)) return
    if (window.__conceptAuditCourier?.leaving()) return wait(kept) // not in the name of a page that is left
    kept.settle()
  }, QUIET)
}

function say(kept, text) {
  kept.place?.querySelector("[role=status]")?.replaceChildren(text)
}
