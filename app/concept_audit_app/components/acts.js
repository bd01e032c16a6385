// What people do by keys, one act after another.
//
// An act says which row it is of and what is to be, not "the other way round". It is shown at once and kept here until
// the server has said that it is done, so that none is lost while Streamlit is busy, and none meets another row.

const QUIET = 1200 // milliseconds without an act, after which the page is drawn anew
// Whatever the server answers has Streamlit draw for a tenth of a second, and the next keys wait for it: acts that
// follow each other quickly go to the server together.
const PAUSE = 300 // milliseconds without an act, after which those that wait are sent
const LATEST = 3000 // milliseconds that an act waits at most
const WORDS = "input, textarea, select, [contenteditable], [role=combobox], [role=slider], [role=spinbutton]"
const OPEN = '[data-testid="stPopoverBody"], [role="dialog"]'

// One for the tab: the page may mount a component anew at any time.
function actsOf(place) {
  return (window[place] ??= {
    client: Date.now().toString(36) + Math.random().toString(36).slice(2),
    count: 0, // acts so far
    acts: [], // those that the server has not yet said to be done
    undoable: [], // what may be undone from here, latest last
    moved: false, // something has changed since the page was drawn
  })
}

// To be called whenever Streamlit calls: takes what the server says, and listens.
function mount(kept, component, KEYS, draw) {
  const { data, parentElement, setStateValue, setTriggerValue } = component
  kept.place = parentElement
  kept.send = () => {
    clearTimeout(kept.sending)
    kept.sending = null
    setStateValue("acts", { client: kept.client, acts: kept.acts })
  }
  kept.settle = () => {
    if (kept.sending) kept.send()
    kept.moved = false
    setTriggerValue("settled", kept.count)
  }
  if (kept.audit !== data.audit) Object.assign(kept, { audit: data.audit, undoable: [] })
  if (data.client === kept.client) kept.acts = kept.acts.filter((act) => act.n > data.done)
  if (kept.moved && !kept.acts.length) wait(kept)
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
  const onLeave = (event) => {
    if (kept.sending) kept.send()
    if (kept.acts.length) event.preventDefault() // the browser asks whether to leave
  }
  const onHide = () => {
    if (document.hidden && kept.sending) kept.send()
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
  document.addEventListener("keydown", onKey, true)
  window.addEventListener("beforeunload", onLeave)
  document.addEventListener("visibilitychange", onHide)
  observer.observe(document.body, { childList: true, subtree: true, attributeFilter: ["disabled"] })
  kept.unmount = () => {
    document.removeEventListener("keydown", onKey, true)
    window.removeEventListener("beforeunload", onLeave)
    document.removeEventListener("visibilitychange", onHide)
    observer.disconnect()
  }
  draw()
}

function act(kept, what) {
  kept.acts.push({ n: ++kept.count, audit: kept.audit, ...what })
  kept.moved = true
  if (!kept.sending) kept.since = Date.now()
  clearTimeout(kept.sending)
  kept.sending = setTimeout(() => kept.send(), Math.min(PAUSE, Math.max(0, kept.since + LATEST - Date.now())))
  wait(kept)
}

// Counts, orders and buttons hang on what was done: the page is drawn anew when the keys have been quiet.
function wait(kept) {
  clearTimeout(kept.timer)
  kept.timer = setTimeout(() => {
    if (kept.moved && !kept.acts.length) kept.settle()
  }, QUIET)
}

function say(kept, text) {
  kept.place?.querySelector("[role=status]")?.replaceChildren(text)
}
