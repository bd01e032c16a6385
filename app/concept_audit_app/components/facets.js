// Facets: the values of each field with how many rows of the view have them, and what is asked of them.
//
// What is chosen is shown at once and sent whole, so that quick clicks are not lost; what the server says is taken when
// it has heard of the latest click. Values are set as text, whatever they hold.

const kept = (window.__conceptAuditFacets ??= {
  client: Date.now().toString(36) + Math.random().toString(36).slice(2),
  count: 0, // changes so far
  chosen: {}, // field → {kept, left, span}
  searches: {}, // field → what is looked for among its values
  typed: {}, // field → the bounds of its range as they stand in the boxes, while they are not sent
})
const PAUSE = 350 // milliseconds after the latest letter of a search

function make(tag, name = "", text = "") {
  const made = document.createElement(tag)
  made.className = name
  made.textContent = text
  return made
}

const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 6 })
const share = (part, whole) => `${whole ? (100 * part) / whole : 0}%`

function send() {
  kept.count += 1
  kept.component.setStateValue("asked", {
    client: kept.client,
    n: kept.count,
    chosen: kept.chosen,
    searches: kept.searches,
  })
}

function choose(field, value, out) {
  const { kept: inside, left } = kept.chosen[field]
  const mine = out ? left : inside
  const there = mine.includes(value)
  const others = (values) => values.filter((each) => each !== value)
  kept.chosen[field].kept = others(inside)
  kept.chosen[field].left = others(left)
  if (!there) kept.chosen[field][out ? "left" : "kept"].push(value)
  send()
  draw()
}

function chooseSpan(field, low, high) {
  const span = kept.chosen[field].span
  const same = span && span[0] === low && span[1] === high
  kept.chosen[field].span = same || low === null ? null : [low, high]
  delete kept.typed[field]
  send()
  draw()
}

function valueOf(field, { value, rows, flagged }, most) {
  const { kept: inside, left } = kept.chosen[field.id]
  const line = make("div", "value")
  line.dataset.state = inside.includes(value) ? "in" : left.includes(value) ? "out" : ""
  const shown = value === "" ? "(empty)" : value
  const only = make("button")
  const name = make("span", "name", shown)
  name.dir = "auto"
  const bar = make("span", "bar")
  const whole = make("b")
  const part = make("i")
  whole.style.width = share(rows, most)
  part.style.width = share(flagged, most)
  bar.append(whole, part)
  only.append(name, bar)
  only.title = `${shown.slice(0, 300)}\nClick: keep rows with it. Shift-click: leave them out.`
  only.ariaPressed = String(inside.includes(value))
  only.onclick = (event) => choose(field.id, value, event.shiftKey)
  only.dataset.focus = `${field.id}\n${value}`
  const count = make("span", "count", number(rows))
  if (flagged) count.append(make("small", "", `${Math.max(1, Math.round((100 * flagged) / rows))}% flagged`))
  const not = make("button", "not", "≠")
  not.ariaLabel = `Leave out ${shown.slice(0, 80)}`
  not.title = "Leave rows with it out"
  not.ariaPressed = String(left.includes(value))
  not.onclick = () => choose(field.id, value, true)
  not.dataset.focus = `not ${field.id}\n${value}`
  line.append(only, count, not)
  return line
}

function searchOf(field) {
  const box = make("input")
  box.type = "search"
  box.value = kept.searches[field.id] ?? ""
  box.placeholder = `search ${number(field.values_in_all)} values`
  box.ariaLabel = `Search the values of ${field.name}`
  box.dataset.focus = `search ${field.id}`
  box.oninput = () => {
    kept.searches[field.id] = box.value
    clearTimeout(kept.timer)
    kept.timer = setTimeout(send, PAUSE)
  }
  return box
}

function plotOf(field) {
  const plot = make("div", "plot")
  const span = kept.chosen[field.id].span
  const most = Math.max(...field.bins.map((bin) => bin.rows))
  let from = null
  const bars = field.bins.map((bin, place) => {
    const bar = make("button")
    const whole = make("b")
    const part = make("i")
    whole.style.height = share(bin.rows, most)
    part.style.height = share(bin.flagged, most)
    bar.append(whole, part)
    const words = bin.low === bin.high ? number(bin.low) : `${number(bin.low)} to ${number(bin.high)}`
    bar.ariaLabel = bar.title = `${words}: ${number(bin.rows)} rows, ${number(bin.flagged)} flagged`
    bar.ariaPressed = String(!!span && bin.rows > 0 && bin.low >= span[0] && bin.high <= span[1])
    bar.dataset.focus = `bin ${field.id} ${place}`
    if (!bin.rows) bar.disabled = true
    bar.onpointerdown = () => (from = place)
    bar.onpointerup = () => {
      if (from === null) return
      const within = field.bins.slice(Math.min(from, place), Math.max(from, place) + 1).filter((each) => each.rows)
      from = null
      if (within.length) chooseSpan(field.id, within[0].low, within[within.length - 1].high)
    }
    bar.onclick = (event) => event.detail === 0 && chooseSpan(field.id, bin.low, bin.high) // by keyboard
    return bar
  })
  plot.append(...bars)
  return plot
}

// An answer may come while a bound is being typed, and draws the boxes anew: what stands in them is kept, and is sent
// when the box is left or on Enter. (The browser's own change event does not see letters typed before the redraw.)
function spanOf(field) {
  const line = make("div", "span")
  const span = kept.chosen[field.id].span
  const boxes = ["from", "to"].map((word, place) => {
    const box = make("input")
    box.inputMode = "decimal"
    box.value = kept.typed[field.id]?.[place] ?? (span && Number.isFinite(span[place]) ? span[place] : "")
    box.placeholder = word
    box.ariaLabel = `${field.name} ${word}`
    box.dataset.focus = `${word} ${field.id}`
    box.oninput = () => (kept.typed[field.id] = boxes.map((each) => each.value))
    box.onblur = () => kept.drawing || take()
    box.onkeydown = (event) => {
      if (event.key === "Enter") take()
    }
    return box
  })
  const take = () => {
    if (!kept.typed[field.id]) return
    const [low, high] = kept.typed[field.id].map((text) => (text.trim() === "" ? null : Number(text)))
    if (Number.isNaN(low) || Number.isNaN(high)) return
    delete kept.typed[field.id]
    kept.chosen[field.id].span = low === null && high === null ? null : [low, high]
    send()
  }
  line.append(...boxes)
  return line
}

function fieldOf(field) {
  const place = make("fieldset")
  place.append(make("legend", "", field.name))
  if (field.bins) {
    place.append(plotOf(field), spanOf(field))
    return place
  }
  if (field.values_in_all > field.values.length || kept.searches[field.id]) place.append(searchOf(field))
  const most = Math.max(1, ...field.values.map((each) => each.rows))
  place.append(...field.values.map((each) => valueOf(field, each, most)))
  if (field.values_in_all > field.values.length)
    place.append(make("p", "more", `the ${field.values.length} most frequent of ${number(field.values_in_all)}`))
  return place
}

function draw() {
  const place = kept.component.parentElement
  const focused = place.activeElement?.dataset?.focus ?? place.getRootNode().activeElement?.dataset?.focus
  const caret = place.querySelector(".facets :focus")?.selectionStart
  kept.drawing = true // a box that is taken away is not left by the user
  place.querySelector(".facets").replaceChildren(...kept.fields.map(fieldOf))
  kept.drawing = false
  if (!focused) return
  const again = [...place.querySelectorAll("[data-focus]")].find((each) => each.dataset.focus === focused)
  again?.focus()
  if (caret != null && again?.setSelectionRange) again.setSelectionRange(caret, caret)
}

export default function (component) {
  const { data } = component
  if (kept.component?.parentElement !== component.parentElement) kept.typed = {} // left, and come back to
  kept.component = component
  kept.fields = data.fields
  if (data.client !== kept.client || data.n >= kept.count) {
    kept.chosen = Object.fromEntries(data.fields.map((each) => [each.id, structuredClone(each.chosen)]))
    if (data.client !== kept.client) kept.searches = {}
  }
  for (const each of data.fields) kept.chosen[each.id] ??= structuredClone(each.chosen)
  draw()
}
