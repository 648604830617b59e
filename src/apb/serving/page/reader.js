// The text with what was passed on marked in it.

const number = new Intl.NumberFormat("en");
const PIECE = 20000; // characters in one element: the browser lays out only those that are near

/** Offsets in characters as the API counts them, to those of JavaScript's strings; ascending in, ascending out. */
function units(text, places) {
  if (!/[\ud800-\udbff]/.test(text)) return places;
  const found = [];
  let unit = 0, point = 0;
  for (const place of places) {
    while (point < place && unit < text.length) {
      unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
      point += 1;
    }
    found.push(unit);
  }
  return found;
}

/** Where pieces begin: at beginnings of lines, else after a space. */
function beginnings(text) {
  const found = new Set([0]);
  for (let at = PIECE; at < text.length; at += PIECE) {
    const line = text.indexOf("\n", at);
    const cut = line >= 0 && line < at + PIECE ? line : text.indexOf(" ", at);
    if (cut < 0) break;
    found.add((at = cut + 1));
  }
  return found;
}

/** Cut at all borders: [start, stop, the passage there, what went on there]. */
function segments(text, passages, wentOn, begins) {
  const borders = new Set([...begins, text.length]);
  for (const { start, stop } of [...passages, ...wentOn]) borders.add(start).add(stop);
  const sorted = [...borders].sort((a, b) => a - b);
  const cover = (spans) => {
    let next = 0;
    return (start) => {
      while (next < spans.length && spans[next].stop <= start) next += 1;
      return next < spans.length && spans[next].start <= start ? spans[next] : null;
    };
  };
  const passed = cover(passages), on = cover(wentOn);
  return sorted.slice(0, -1).map((start, n) => [start, sorted[n + 1], passed(start), on(start)]);
}

/** A span without the white space around it; null if there is nothing else. */
function trimmed(text, span, start, stop) {
  const part = text.slice(start, stop), inside = part.trim();
  const first = start + part.length - part.trimStart().length;
  return inside && { ...span, start: first, stop: first + inside.length };
}

function convert(text, spans) {
  const places = [...new Set(spans.flatMap(({ start, stop }) => [start, stop]))].sort((a, b) => a - b);
  const to = new Map(units(text, places).map((unit, n) => [places[n], unit]));
  return spans.map((span) => trimmed(text, span, to.get(span.start), to.get(span.stop))).filter(Boolean);
}

/** Fill an element with a text; returns the first element of every passage. */
export function show(element, text, { data = [], went_on = [] }) {
  const passages = convert(text, data).sort((a, b) => a.start - b.start), wentOn = convert(text, went_on);
  const starts = new Map(), pieces = [], begins = beginnings(text);
  let piece = null;
  for (const [start, stop, passed, on] of segments(text, passages, wentOn, begins)) {
    if (begins.has(start)) pieces.push((piece = document.createElement("div")));
    let node = document.createTextNode(text.slice(start, stop));
    for (const [wanted, name] of [[on, "b"], [passed, "mark"]]) {
      if (!wanted) continue;
      const around = document.createElement(name);
      around.append(node);
      node = around;
    }
    if (passed) {
      node.style.setProperty("--share", passed.share);
      node.title = `passed on by up to ${number.format(Math.round(100 * passed.share))} % of layers and heads`;
      if (!starts.has(passed)) starts.set(passed, node);
    }
    piece.append(node);
  }
  element.replaceChildren(...pieces);
  return [...starts.values()];
}
