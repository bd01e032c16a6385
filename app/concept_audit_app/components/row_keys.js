// Keys that act on the rows of a page.
//
// An act carries its row's number and what is to be, not "the other way round". It is shown at once and kept here
// until the server has said that it is done, so that none is lost while Streamlit is busy, and none meets another row.

const QUIET = 1200 // milliseconds without a key, after which the page is drawn anew
const PATIENCE = 5000 // milliseconds for a box to appear
const WORDS = "input, textarea, select, [contenteditable], [role=combobox], [role=slider], [role=spinbutton]"
const OPEN = '[data-testid="stPopoverBody"], [role="dialog"]'
const STYLE = `
[data-cursor="true"] { box-shadow: inset .25rem 0 0 #2b8a94; border-radius: .5rem }
[data-flag="remove"] { border-color: #c4452f; background: rgba(196, 69, 47, .05) }
[data-flag="review"] { border-color: #b7842b; background: rgba(183, 132, 43, .06) }
`

// One for the tab: the page may mount the component anew at any time.
const kept = (window.__conceptAuditRows ??= {
  client: Date.now().toString(36) + Math.random().toString(36).slice(2),
  count: 0, // acts so far
  acts: [], // those that the server has not yet said to be done
  undoable: [], // [number, row, flag before] of acts that may be undone from here
  rows: new Map(), // of this page: number → {id, hash, flag}
  cursor: null,
  note: null, // the row whose note is asked for
  moved: false, // something has changed since the page was drawn
})

function flagOf(id) {
  const last = kept.acts.findLast((act) => act.id === id)
  return last ? last.flag : kept.rows.get(id)?.flag ?? null
}

function cardOf(id) {
  return document.querySelector(`.st-key-row-${id}`)
}

function draw() {
  for (const id of kept.rows.keys()) {
    const card = cardOf(id)
    if (!card) continue
    const flag = flagOf(id) ?? ""
    if (card.dataset.flag !== flag) card.dataset.flag = flag
    const here = String(id === kept.cursor)
    if (card.dataset.cursor !== here) card.dataset.cursor = here
    const words = card.querySelector(".flag-words")
    if (words && words.dataset.flag !== flag) {
      words.dataset.flag = flag
      words.textContent = flag ? ` · flagged: ${flag}` : ""
    }
  }
  if (kept.note !== null) openNote()
}

function say(text) {
  kept.place?.querySelector("[role=status]")?.replaceChildren(text)
}

function move(step) {
  const ids = [...kept.rows.keys()]
  const there = ids.indexOf(kept.cursor) + step
  if (there < 0 || there >= ids.length) return
  kept.cursor = ids[there]
  draw()
  cardOf(kept.cursor)?.scrollIntoView({ block: "nearest" })
}

function send(act) {
  kept.acts.push({ n: ++kept.count, ...act })
  kept.moved = true
  kept.send()
  wait()
  draw()
}

function flag(name) {
  const row = kept.rows.get(kept.cursor)
  if (!row) return
  const before = flagOf(row.id)
  const after = before === name ? null : name
  kept.undoable.push([kept.count + 1, row.id, before])
  say(after ? `Row ${row.id}: ${after}` : `Row ${row.id}: flag taken off`)
  send({ id: row.id, hash: row.hash, flag: after })
}

function undo() {
  const last = kept.undoable.pop()
  if (last === undefined) {
    kept.acts.push({ n: ++kept.count, undo: true })
    kept.moved = true
    kept.send()
    wait()
    return
  }
  const [of, id, before] = last
  const row = kept.rows.get(id)
  say(`Row ${id}: undone`)
  send({ undo: true, of, id, hash: row?.hash, flag: before })
}

// The page shows counts, orders and buttons that hang on flags: drawn anew when the keys have been quiet.
function wait() {
  clearTimeout(kept.timer)
  kept.timer = setTimeout(() => {
    if (!kept.moved || kept.acts.length) return
    kept.moved = false
    kept.settle(kept.count)
  }, QUIET)
}

function openNote() {
  const button = cardOf(kept.note)?.querySelector('[class*="st-key-note-of-"] button')
  if (!button) return
  kept.note = null
  button.click() // which gives the box the focus, see onClick
}

function note() {
  if (kept.cursor === null) return
  if (flagOf(kept.cursor) === null) return say("A note goes with a flag: X or V first, then N")
  kept.note = kept.cursor
  if (kept.moved) {
    // The button comes with the flag, when the page is drawn anew.
    kept.moved = false
    kept.settle(kept.count)
  }
  openNote()
}

function focusBox(until) {
  const box = document.querySelector('input[aria-label^="Why row"]')
  if (box) return box.focus()
  if (Date.now() < until) setTimeout(() => focusBox(until), 50)
}

function onClick(event) {
  const button = event.target.closest?.("button")
  if (!button) return
  kept.undoable = [] // what was done by a click is undone before what was done by keys
  if (button.closest('[class*="st-key-note-of-"]')) focusBox(Date.now() + PATIENCE)
}

const KEYS = {
  j: () => move(1),
  k: () => move(-1),
  x: () => flag("remove"),
  v: () => flag("review"),
  u: undo,
  n: note,
}

function onKey(event) {
  const act = KEYS[event.key.toLowerCase?.()]
  if (!act || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return
  if (event.repeat && !"jk".includes(event.key.toLowerCase())) return
  if (event.composedPath()[0].closest?.(WORDS) || document.querySelector(OPEN)) return
  event.preventDefault()
  event.stopPropagation()
  act()
}

function onLeave(event) {
  if (kept.acts.length) event.preventDefault() // the browser asks whether to leave
}

function listen(on) {
  const how = on ? "addEventListener" : "removeEventListener"
  document[how]("keydown", kept.onKey, true)
  document[how]("click", kept.onClick, true)
  window[how]("beforeunload", kept.onLeave)
}

function dress() {
  if (document.getElementById("row-keys-style")) return
  const style = document.createElement("style")
  style.id = "row-keys-style"
  style.textContent = STYLE
  document.head.append(style)
}

export default function ({ data, parentElement, setStateValue, setTriggerValue }) {
  kept.place = parentElement
  kept.send = () => setStateValue("acts", { client: kept.client, acts: kept.acts })
  kept.settle = (n) => setTriggerValue("settled", n)
  kept.rows = new Map(data.rows.map((row) => [row.id, row]))
  if (data.client === kept.client) kept.acts = kept.acts.filter((act) => act.n > data.done)
  if (!kept.rows.has(kept.cursor)) kept.cursor = data.rows[0]?.id ?? null
  if (kept.moved && !kept.acts.length) wait()

  for (const button of parentElement.querySelectorAll("button")) {
    button.onclick = () => KEYS[button.value]()
  }
  dress()
  if (kept.onKey) listen(false)
  Object.assign(kept, { onKey, onClick, onLeave })
  listen(true)
  kept.observer?.disconnect()
  let drawing = false
  kept.observer = new MutationObserver(() => {
    if (drawing) return
    drawing = true
    requestAnimationFrame(() => {
      drawing = false
      draw()
    })
  })
  kept.observer.observe(document.body, { childList: true, subtree: true })
  draw()
  return () => {
    listen(false)
    kept.observer.disconnect()
    kept.rows = new Map()
  }
}
