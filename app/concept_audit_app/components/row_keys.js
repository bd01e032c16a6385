// Keys that act on the rows of a page; put behind `acts.js`.

const PATIENCE = 5000 // milliseconds for a box to appear
const STYLE = `
[data-cursor="true"] { box-shadow: inset .25rem 0 0 #2b8a94; border-radius: .5rem }
[class*="st-key-row-"][data-flag="remove"] { border-color: #c4452f; background: rgba(196, 69, 47, .05) }
[class*="st-key-row-"][data-flag="swap"] { border-color: #4a6fb5; background: rgba(74, 111, 181, .06) }
[class*="st-key-row-"][data-flag="review"] { border-color: #b7842b; background: rgba(183, 132, 43, .06) }
`
const kept = actsOf("__conceptAuditRows")
kept.rows ??= new Map() // of this page: number → {id, hash, flag}
kept.cursor ??= null
kept.note ??= null // the row whose note is asked for

function flagOf(id) {
  const last = kept.acts.findLast((each) => each.id === id)
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
      words.textContent = flag ? `flagged: ${flag}` : ""
    }
  }
  if (kept.note !== null) openNote()
}

function move(step) {
  const ids = [...kept.rows.keys()]
  const there = ids.indexOf(kept.cursor) + step
  if (there < 0 || there >= ids.length) return
  kept.cursor = ids[there]
  draw()
  cardOf(kept.cursor)?.scrollIntoView({ block: "nearest" })
}

function flag(name) {
  const row = kept.rows.get(kept.cursor)
  if (!row) return
  const before = flagOf(row.id)
  const after = before === name ? null : name
  kept.undoable.push([kept.count + 1, row, before])
  say(kept, after ? `Row ${row.id}: ${after}` : `Row ${row.id}: flag taken off`)
  act(kept, { id: row.id, hash: row.hash, flag: after })
  draw()
}

function undo() {
  const last = kept.undoable.pop()
  if (last === undefined) return act(kept, { undo: true })
  const [of, row, before] = last
  say(kept, `Row ${row.id}: undone`)
  act(kept, { undo: true, of, id: row.id, flag: before })
  draw()
}

function openNote() {
  const button = cardOf(kept.note)?.querySelector('[class*="st-key-note-of-"] button')
  if (!button) return
  kept.note = null
  button.click() // which gives the box the focus, see onClick
}

function note() {
  if (kept.cursor === null) return
  if (flagOf(kept.cursor) === null) return say(kept, "A note goes with a flag: X or V first, then N")
  kept.note = kept.cursor
  if (kept.moved) kept.settle() // the button comes with the flag, when the page is drawn anew
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
  w: () => kept.pairs && flag("swap"),
  u: undo,
  n: note,
}

function dress() {
  if (document.getElementById("row-keys-style")) return
  const style = document.createElement("style")
  style.id = "row-keys-style"
  style.textContent = STYLE
  document.head.append(style)
}

export default function (component) {
  const { data } = component
  kept.rows = new Map(data.rows.map((row) => [row.id, row]))
  kept.pairs = data.pairs
  component.parentElement.querySelector("[value=w]").hidden = !data.pairs
  if (!kept.rows.has(kept.cursor)) kept.cursor = data.rows[0]?.id ?? null
  dress()
  mount(kept, component, KEYS, draw)
  if (kept.onClick) document.removeEventListener("click", kept.onClick, true)
  kept.onClick = onClick
  document.addEventListener("click", onClick, true)
  return () => {
    kept.unmount()
    document.removeEventListener("click", kept.onClick, true)
    kept.rows = new Map()
  }
}
