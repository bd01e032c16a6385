// The list of a page's rows, and the keys that act on them; put behind `acts.js`.
//
// Each row of the page is a card that Streamlit has drawn already. The one that the cursor rests on shows, so that
// nobody is asked when the cursor moves. What the list shows of a row is set as text, whatever it holds.

const PATIENCE = 5000 // milliseconds for a box to appear
const BEFORE = 40 // characters of a phrase before its strongest token
const NARROW = 480 // pixels of a list in which there is room for fewer
const AFTER = 110
const EDGE = 16 // pixels below list and row, down to the window's end
const MOST_FOUND = 500 // places of a search that are marked in a row
const STYLE = `
.st-key-desk-row [class*="st-key-row-"] { display: none }
.st-key-desk-row [class*="st-key-row-"][data-cursor="true"] { display: flex }
::highlight(found) { background-color: #f5d547; color: #10171a }
.st-key-desk-row [class*="st-key-row-"][data-flag="remove"] { border-color: #c4452f }
.st-key-desk-row [class*="st-key-row-"][data-flag="swap"] { border-color: #4a6fb5 }
.st-key-desk-row [class*="st-key-row-"][data-flag="review"] { border-color: #b7842b }
`
const kept = actsOf("__conceptAuditRows")
kept.rows ??= new Map() // of this page: number → what the list shows of it
kept.drawn ??= new Map() // number → its line in the list
kept.cursor ??= null
kept.words ??= [] // that are searched for
kept.note ??= null // the row whose note is asked for
kept.advance ??= false // whether the cursor goes on after a flag

function flagOf(id) {
  const last = kept.acts.findLast((each) => each.id === id)
  return last ? last.flag : kept.rows.get(id)?.flag ?? null
}

function cardOf(id) {
  return document.querySelector(`.st-key-row-${id}`)
}

function make(name, tag = "div") {
  const made = document.createElement(tag)
  made.className = name
  return made
}

function lineOf(row) {
  const line = make("row")
  line.role = "option"
  line.id = `row-${row.id}`
  const rank = make("rank")
  rank.textContent = row.rank
  const score = make("score")
  const bar = make(row.value < 0 ? "away" : "", "b")
  bar.style.width = `${Math.min(100, (100 * Math.abs(row.value)) / (kept.furthest || 1))}%`
  const track = make("", "i")
  track.append(bar)
  score.append(row.score, track)
  score.title = row.raw
  const words = make("words")
  const phrase = make("phrase")
  phrase.dir = "auto"
  phrase.textContent = row.text
  if (row.found) {
    const hit = make("found", "mark")
    hit.textContent = row.found.hit
    phrase.replaceChildren(`${row.found.where}: ${row.found.before}`, hit, row.found.after)
  }
  const about = make("about")
  about.dir = "auto"
  about.textContent = row.about
  words.append(phrase, about)
  line.append(rank, score, words, make("flag", "span"))
  line.onclick = () => put(row.id)
  return line
}

function drawList() {
  const list = kept.place.querySelector(".list")
  const shown = JSON.stringify([kept.furthest, [...kept.rows.values()].map(({ flag, ...row }) => row)])
  if (list.shown === shown) return
  list.shown = shown
  kept.drawn = new Map([...kept.rows.values()].map((row) => [row.id, lineOf(row)]))
  list.replaceChildren(...kept.drawn.values())
  list.scrollTop = 0
}

// What stands about the strongest token of a row's heatmap, once its card has one.
function drawPhrase(line, card) {
  if (line.querySelector(".found")) return
  const tokens = card.querySelectorAll(".hm i")
  if (!tokens.length || line.tokens === tokens[0]) return
  line.tokens = tokens[0]
  let best = null
  let strength = 0
  for (const token of tokens) {
    const level = Number(token.className.slice(1))
    if (level > strength && token.textContent.trim()) [best, strength] = [token, level]
  }
  if (!best) return
  const turn = best.closest(".hm")
  const range = document.createRange()
  const plain = (text) => text.replace(/[↵\s]+/g, " ")
  range.setStart(turn, 0)
  range.setEndBefore(best)
  const before = plain(range.toString())
  range.setStartAfter(best)
  range.setEnd(turn, turn.childNodes.length)
  const strongest = make(best.className.startsWith("a") ? "away" : "", "mark")
  strongest.textContent = plain(best.textContent)
  const most = line.clientWidth < NARROW ? BEFORE / 2 : BEFORE
  const start = before.length > most ? `…${before.slice(-most)}` : before
  line.querySelector(".phrase").replaceChildren(start, strongest, plain(range.toString()).slice(0, AFTER))
}

// The words of a search in the row that shows: marked by the browser, so that the text's elements stay as they are.
function drawFound() {
  if (!window.Highlight) return
  const card = cardOf(kept.cursor)
  const ranges = []
  for (const turn of kept.words.length && card ? card.querySelectorAll(".turn") : []) {
    const answer = turn.dataset.part === "response"
    if (kept.where && (kept.where === "response") !== answer) continue
    const walker = document.createTreeWalker(turn.lastElementChild, NodeFilter.SHOW_TEXT)
    const nodes = []
    let text = ""
    while (walker.nextNode()) {
      nodes.push([text.length, walker.currentNode])
      text += walker.currentNode.data
    }
    const lower = text.toLowerCase()
    if (lower.length !== text.length) continue
    const place = (at) => nodes.findLast(([start]) => start <= at)
    for (const word of kept.words) {
      for (let at = lower.indexOf(word); at >= 0 && ranges.length < MOST_FOUND; at = lower.indexOf(word, at + word.length)) {
        const [first, last] = [place(at), place(at + word.length - 1)]
        const range = new Range()
        range.setStart(first[1], at - first[0])
        range.setEnd(last[1], at + word.length - last[0])
        ranges.push(range)
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges))
}

function drawRow(id) {
  const flag = flagOf(id) ?? ""
  const here = String(id === kept.cursor)
  const line = kept.drawn.get(id)
  const tag = line.querySelector(".flag")
  if (tag.dataset.flag !== flag) tag.textContent = tag.dataset.flag = flag
  if (line.ariaSelected !== here) line.ariaSelected = here
  const card = cardOf(id)
  if (!card) return
  drawPhrase(line, card)
  if (card.dataset.flag !== flag) card.dataset.flag = flag
  if (card.dataset.cursor !== here) card.dataset.cursor = here
  const words = card.querySelector(".flag-words")
  if (words && words.dataset.flag !== flag) {
    words.dataset.flag = flag
    words.textContent = flag === "keep" ? "kept" : flag && `flagged: ${flag}`
  }
}

function draw() {
  if (!kept.place) return
  drawList()
  for (const id of kept.rows.keys()) drawRow(id)
  drawFound()
  const list = kept.place.querySelector(".list")
  const active = `row-${kept.cursor}`
  if (list.getAttribute("aria-activedescendant") !== active) list.setAttribute("aria-activedescendant", active)
  const pressed = String(kept.advance)
  const advance = kept.place.querySelector("[value=a]")
  if (advance.ariaPressed !== pressed) advance.ariaPressed = pressed
  drawPages()
  measure()
  if (kept.note !== null) openNote()
}

// Which page shows; with one page alone there is nothing to choose.
function drawPages() {
  const place = kept.place.querySelector("nav")
  const shown = `${kept.page} of ${kept.pages}`
  if (place.shown === shown) return
  place.shown = shown
  place.hidden = kept.pages === 1
  const box = place.querySelector("input")
  box.value = kept.page
  box.style.width = `${String(kept.pages).length + 1}ch`
  place.querySelector("span").textContent = `of ${kept.pages.toLocaleString("en")}`
  for (const key of "{[") place.querySelector(`[value="${key}"]`).disabled = kept.page === 1
  for (const key of "]}") place.querySelector(`[value="${key}"]`).disabled = kept.page === kept.pages
}

// List and row fill the window down to its end, wherever the bars above them end.
function measure() {
  const list = kept.place.querySelector(".list")
  const end = kept.place.querySelector(".said").getBoundingClientRect().bottom
  const pane = document.querySelector(".st-key-desk-row")
  const scrolled = document.querySelector('[data-testid="stMain"]')?.scrollTop ?? 0
  const root = document.documentElement
  const set = (name, element, below) => {
    const height = `${Math.max(260, innerHeight - element.getBoundingClientRect().top - scrolled - below)}px`
    if (root.style.getPropertyValue(name) !== height) root.style.setProperty(name, height)
  }
  set("--desk-list", list, end - list.getBoundingClientRect().bottom + EDGE)
  if (pane) {
    set("--desk-row", pane, EDGE)
    pane.tabIndex = 0
  }
  const background = getComputedStyle(list).getPropertyValue("--st-background-color")
  if (root.style.getPropertyValue("--desk-background") !== background)
    root.style.setProperty("--desk-background", background)
}

function put(id) {
  kept.cursor = id
  draw()
  const line = kept.drawn.get(id)
  const list = line?.parentElement
  if (list) {
    list.scrollTop = Math.min(
      Math.max(list.scrollTop, line.offsetTop + line.offsetHeight - list.clientHeight),
      line.offsetTop,
    )
  }
  const pane = document.querySelector(".st-key-desk-row")
  if (pane) pane.scrollTop = 0
}

function move(step) {
  const ids = [...kept.rows.keys()]
  const there = ids.indexOf(kept.cursor) + step
  if (there >= 0 && there < ids.length) put(ids[there])
}

function flag(name) {
  const row = kept.rows.get(kept.cursor)
  if (!row) return
  const before = flagOf(row.id)
  const after = before === name ? null : name
  kept.undoable.push([kept.count + 1, row, before])
  say(kept, after ? `Row ${row.id}: ${after}` : `Row ${row.id}: flag taken off`)
  act(kept, { id: row.id, hash: row.hash, flag: after })
  if (kept.advance && after) move(1)
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

// The number shows at once, so that keys that follow quickly count from it.
function turn(page) {
  const there = Math.min(Math.max(page, 1), kept.pages)
  if (there === kept.page) return
  kept.page = there
  drawPages()
  kept.turn(there)
}

function typePage(event) {
  const box = event.target
  if (!["Enter", "Escape"].includes(event.key)) return
  event.preventDefault()
  const page = Number(box.value)
  if (event.key === "Enter" && Number.isInteger(page)) turn(page)
  box.value = kept.page
  kept.place.querySelector(".list").focus() // where keys act on rows again
}

function search() {
  document.querySelector(".st-key-find input")?.focus()
}

const MAP = [
  ["J, K", "row below, row above"],
  ["X", "flag to remove; once more takes the flag off"],
  ["V", "flag to review"],
  ["C", "keep: seen, and nothing wrong with it"],
  ["W", "flag to swap (of a preference pair)"],
  ["N", "write a note on the flag"],
  ["U", "undo"],
  ["A", "after a flag, go on to the next row"],
  ["[, ]", "page before, page after"],
  ["{, }", "first page, last page"],
  ["/", "search"],
  ["?", "this map"],
]

function map() {
  const dialog = kept.place.querySelector("dialog")
  if (dialog.open) return dialog.close()
  const shown = MAP.filter(([key]) => (kept.pairs || key !== "W") && (kept.writes || !"XVCWNUA".includes(key)))
  const lines = shown.flatMap(([key, words]) => {
    const term = make("", "dt")
    term.textContent = key
    const meaning = make("", "dd")
    meaning.textContent = words
    return [term, meaning]
  })
  dialog.querySelector("dl").replaceChildren(...lines)
  dialog.querySelector(".close").onclick = () => dialog.close()
  dialog.showModal()
}

const writing = (what) => () => kept.writes && what()
const KEYS = {
  j: () => move(1),
  k: () => move(-1),
  x: writing(() => flag("remove")),
  v: writing(() => flag("review")),
  c: writing(() => flag("keep")),
  w: writing(() => kept.pairs && flag("swap")),
  u: writing(undo),
  n: writing(note),
  a: writing(() => {
    kept.advance = !kept.advance
    say(kept, kept.advance ? "The cursor goes on after a flag" : "The cursor stays after a flag")
    draw()
  }),
  "[": () => turn(kept.page - 1),
  "]": () => turn(kept.page + 1),
  "{": () => turn(1),
  "}": () => turn(kept.pages),
  "/": search,
  "?": map,
}

function dress() {
  if (document.getElementById("desk-style")) return
  const style = document.createElement("style")
  style.id = "desk-style"
  style.textContent = STYLE
  document.head.append(style)
}

export default function (component) {
  const { data } = component
  kept.rows = new Map(data.rows.map((row) => [row.id, row]))
  Object.assign(kept, { pairs: data.pairs, writes: data.writes, furthest: data.furthest })
  Object.assign(kept, { words: data.words, where: data.place })
  Object.assign(kept, { page: data.page, pages: data.pages })
  kept.turn = (page) => component.setTriggerValue("turned", page)
  component.parentElement.querySelector("nav input").onkeydown = typePage
  component.parentElement.querySelector("[value=a]").hidden = !data.writes
  if (!kept.rows.has(kept.cursor)) kept.cursor = data.rows[0]?.id ?? null
  dress()
  mount(kept, component, KEYS, draw)
  if (kept.onClick) document.removeEventListener("click", kept.onClick, true)
  kept.onClick = onClick
  document.addEventListener("click", onClick, true)
  window.onresize = draw
  component.parentElement.querySelector(".list").onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key]
    if (!step) return
    event.preventDefault()
    move(step)
  }
  return () => {
    kept.unmount()
    document.removeEventListener("click", kept.onClick, true)
    window.onresize = null
    kept.rows = new Map()
    kept.drawn = new Map()
  }
}
