// The queue of rows to label beside the row that the cursor rests on; put behind `acts.js`.

const PATIENCE = 30_000 // milliseconds
const SNIPPET = 140 // characters of a row that the queue shows
const FEW = 12 // rows left at hand, with which more are asked for
const LONG = 4000 // characters, beyond which the rest of a turn is folded away
const kept = actsOf("__conceptAuditLabels")
kept.items ??= [] // rows offered: {hash, row, why, turns}
kept.back ??= [] // rows whose label was undone, to be offered first
kept.cursor ??= null // hash of the row that was chosen; null for the first that is not done
kept.train ??= 0 // until when the wish to train is kept; 0 for no wish

const mine = () => kept.acts.filter((each) => each.probe === kept.name)
const lastOf = (hash) => mine().findLast((each) => each.hash === hash)
const isDone = (item) => ["label", "skip"].includes(lastOf(item.hash)?.kind)
const all = () => {
  const back = new Set(kept.back.map((item) => item.hash))
  return [...kept.back, ...kept.items.filter((item) => !back.has(item.hash))]
}

// The row that the keys are for: the one that was chosen, else the first that has no label yet.
function offered() {
  const open = all().filter((item) => !isDone(item))
  return open.find((item) => item.hash === kept.cursor) ?? open[0]
}

function lineOf(item) {
  const line = document.createElement("div")
  line.role = "option"
  line.dataset.hash = item.hash
  const words = document.createElement("span")
  const why = document.createElement("small")
  words.dir = "auto"
  words.textContent = item.turns.at(-1)[1].slice(0, SNIPPET).replace(/\s+/g, " ") // as text, whatever it holds
  why.textContent = item.kind
  line.append(words, why)
  line.onclick = () => choose(item.hash)
  return line
}

function drawQueue(item) {
  const list = kept.place.querySelector(".label-queue")
  const items = all()
  const shown = items.map((each) => each.hash + each.kind).join(" ")
  if (list.dataset.shown !== shown) {
    list.dataset.shown = shown
    list.replaceChildren(...items.map(lineOf))
  }
  for (const line of list.children) {
    const last = lastOf(line.dataset.hash)
    const state = last?.kind === "label" ? (last.label ? "shows it" : "does not") : last?.kind === "skip" ? "skipped" : ""
    if ((line.dataset.state ?? "") !== state) line.dataset.state = state
    const here = String(line.dataset.hash === item?.hash)
    if (line.ariaSelected === here) continue
    line.ariaSelected = here
    if (here === "true") {
      const end = line.offsetTop + line.offsetHeight - list.clientHeight
      list.scrollTop = Math.min(Math.max(list.scrollTop, end), line.offsetTop)
    }
  }
}

function choose(hash) {
  kept.cursor = hash
  draw()
}

function move(step) {
  const open = all().filter((item) => !isDone(item))
  const next = open[open.indexOf(offered()) + step]
  if (next) choose(next.hash)
}

function fold(text) {
  if (text.length <= LONG) return [text]
  const rest = document.createElement("details")
  const summary = document.createElement("summary")
  summary.textContent = `… ${(text.length - LONG).toLocaleString("en")} characters more`
  rest.append(summary, text.slice(LONG))
  return [text.slice(0, LONG), rest]
}

function drawRow(item) {
  const place = kept.place.querySelector(".label-row")
  const name = item ? item.hash : ""
  if (place.dataset.row === name) return
  place.dataset.row = name
  if (!item) return place.replaceChildren()
  const why = document.createElement("p")
  why.textContent = `Row ${item.row.toLocaleString("en")}, ${item.why}`
  const turns = item.turns.map(([role, text]) => {
    const turn = document.createElement("div")
    const who = document.createElement("span")
    const said = document.createElement("div")
    said.dir = "auto"
    who.textContent = role
    said.append(...fold(text)) // as text, whatever it holds
    turn.append(who, said)
    return turn
  })
  place.replaceChildren(why, ...turns)
}

function draw() {
  if (!kept.place) return
  const item = offered()
  drawRow(item)
  drawQueue(item)
  const change = { 1: 0, 0: 0 }
  for (const each of mine()) {
    if (each.kind === "label") change[each.label] += 1
    if (each.kind === "undo" && each.label !== undefined) change[each.label] -= 1
  }
  const words = `${kept.positive + change[1]} show it · ${kept.negative + change[0]} do not`
  const counts = kept.place.querySelector(".label-counts")
  if (counts.textContent !== words) counts.textContent = words
  for (const button of kept.place.querySelectorAll("button[value]")) {
    const off = button.value === "u" ? !kept.undoable.length : !item
    if (button.disabled !== off) button.disabled = off
  }
  if (!item && !kept.moved) {
    const row = kept.place.querySelector(".label-row")
    const said = kept.left ? "" : kept.nothing
    if (row.textContent !== said) row.textContent = said // only then: a change of the page asks for drawing
  }
  if (!item && kept.moved && !owed(kept)) kept.settle() // more rows are wanted
  else if (kept.moved && !owed(kept) && kept.filled !== kept.taken && all().filter((each) => !isDone(each)).length < FEW) {
    kept.filled = kept.taken
    kept.fill()
  }
  if (kept.train && !kept.moved) train()
}

function put(kind, label) {
  const item = offered()
  if (!item) return
  kept.back = kept.back.filter((each) => each !== item)
  const open = all().filter((each) => !isDone(each))
  kept.cursor = open[open.indexOf(item) + 1]?.hash ?? null // on to the next one below
  kept.undoable.push([item, label])
  act(kept, { kind, probe: kept.name, hash: item.hash, label })
  draw()
}

function undo() {
  const last = kept.undoable.pop()
  if (last === undefined) return
  const [item, label] = last
  kept.back = [item, ...kept.back]
  kept.cursor = item.hash
  act(kept, { kind: "undo", probe: kept.name, hash: item.hash, label })
  draw()
}

// The page's button is off until the labels have been counted: the wish is kept for a while.
function train() {
  kept.train ||= Date.now() + PATIENCE
  const button = document.querySelector(".st-key-train button")
  if (kept.moved) return owed(kept) ? undefined : kept.settle()
  if (button && !button.disabled) {
    kept.train = 0
    button.click()
  } else if (Date.now() > kept.train) {
    kept.train = 0
  }
}

// A name has just been typed: what is typed next is no part of it.
function leave(name) {
  const box = document.activeElement
  if (box?.closest?.(".st-key-probe") && box.value === name) box.blur()
}

const KEYS = { j: () => move(1), k: () => move(-1), y: () => put("label", 1), n: () => put("label", 0), s: () => put("skip"), u: undo, t: train }

export default function (component) {
  const { data, parentElement } = component
  if (kept.name !== data.name || kept.audit !== data.audit) {
    Object.assign(kept, { name: data.name, back: [], undoable: [], train: 0, cursor: null })
    for (const later of [0, 150, 400]) setTimeout(() => leave(data.name), later)
  }
  Object.assign(kept, { items: data.items, positive: data.positive, negative: data.negative, nothing: data.nothing })
  kept.left = data.items.length > 0
  kept.fill = () => component.setStateValue("filled", kept.taken)
  mount(kept, component, KEYS, draw)
  return () => {
    kept.unmount()
    kept.items = []
  }
}
