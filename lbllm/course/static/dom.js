// What all parts of the course draw with: elements, formulas, numbers as text, scales, and an update in place.
// The files of this folder are plain scripts that share their top-level names; lbllm/course/export.py has their order.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const MATHML = "http://www.w3.org/1998/Math/MathML";

// An element with attributes and children; null and false are left out, a function listens to the event of its name.
function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Make a shown node like a fresh one, and change only what differs: focus, transitions and open details stay. Nodes with
// another data-key are replaced; what is inside data-own belongs to somebody else.
function patch(shown, fresh) {
  if (shown.nodeName !== fresh.nodeName || shown.dataset?.key !== fresh.dataset?.key) return void shown.replaceWith(fresh);
  if (shown.nodeType === Node.TEXT_NODE) {
    if (shown.data !== fresh.data) shown.data = fresh.data;
    return;
  }
  const kept = (name) => name === "open" || (name !== "class" && "own" in (shown.dataset ?? {}));
  for (const { name } of [...shown.attributes])
    if (!fresh.hasAttribute(name) && !kept(name)) shown.removeAttribute(name);
  for (const { name, value } of fresh.attributes)
    if (shown.getAttribute(name) !== value) shown.setAttribute(name, value);
  if (shown.nodeName === "INPUT") Object.assign(shown, { checked: fresh.checked, value: fresh.value });
  if (!("own" in (fresh.dataset ?? {}))) patchChildren(shown, [...fresh.childNodes]);
}

function patchChildren(shown, fresh) {
  const old = [...shown.childNodes];
  old.slice(fresh.length).forEach((node) => node.remove());
  fresh.forEach((node, number) => (number < old.length ? patch(old[number], node) : shown.append(node)));
}

// Formulas come from the engine, but nothing else than these elements of MathML is built from them.
const MATH_ELEMENTS = new Set(
  ("math mrow mi mn mo mtext mspace msub msup msubsup munder mover munderover mfrac msqrt mroot mtable mtr mtd " +
    "mpadded mstyle").split(" "),
);
const MATH_ATTRIBUTES = new Set("display displaystyle mathvariant stretchy fence separator lspace rspace width".split(" "));

function formula(text) {
  const parsed = new DOMParser().parseFromString(text, "text/html").querySelector("math");
  return parsed ? mathNode(parsed) : element("span", {}, text);
}

function mathNode(source) {
  const node = document.createElementNS(MATHML, source.localName);
  for (const { name, value } of source.attributes) if (MATH_ATTRIBUTES.has(name)) node.setAttribute(name, value);
  for (const child of source.childNodes) {
    // Browsers leave out the spaces at the ends of a text in a formula.
    if (child.nodeType === Node.TEXT_NODE) node.append(child.data.replace(/^ | $/g, "\u00a0"));
    else if (MATH_ELEMENTS.has(child.localName)) node.append(mathNode(child));
  }
  return node;
}

// Three significant digits, without a needless exponent.
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size >= 1e6 || size < 1e-4) text = value.toExponential(1).replace("e+", "e");
  else if (size >= 1000) text = Math.round(value).toLocaleString("en-US");
  else text = String(Number(value.toPrecision(3)));
  return text.replaceAll("-", "−");
}

// With a unit, or as a percentage where the data say so.
function amount(value, { percent = false, unit = "" } = {}) {
  if (value === null || value === undefined) return "–";
  if (percent) {
    const size = Math.abs(100 * value);
    if (size > 0 && size < 0.01) return "<0.01%";
    return `${size > 0 && size < 0.995 ? short(Number((100 * value).toPrecision(2))) : (100 * value).toFixed(1).replace("-", "−")}%`;
  }
  if (!unit) return short(value);
  return `${short(value)} ${value === 1 && /^(bits|nats|times)$/.test(unit) ? unit.slice(0, -1) : unit}`;
}

const shownToken = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "·";
const plural = (count, word) => `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;

function extent(values) {
  const known = values.filter((value) => typeof value === "number" && Number.isFinite(value));
  return known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

// Round values within low..high, about so many.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, number) => Number(((first + number) * step).toPrecision(12)));
}

// The width of a text, nearly: no layout is needed for it.
const textWidth = (text, em) => 0.56 * em * [...String(text)].length;

// A row for each label such that no two of one row overlap. places: [{at, text}] in any order. What finds no room in
// ``most`` rows is left out: null.
function rowsOf(places, em, left, right, most = Infinity) {
  const ends = [];
  const found = new Array(places.length).fill(null);
  const order = places.map((_, number) => number).sort((a, b) => places[a].at - places[b].at);
  for (const number of order) {
    const half = textWidth(places[number].text, em) / 2;
    const at = Math.min(Math.max(places[number].at, left + half), Math.max(left + half, right - half));
    let row = ends.findIndex((end) => end < at - half - 0.5 * em);
    if (row < 0 && ends.length >= most) continue;
    if (row < 0) row = ends.push(0) - 1;
    ends[row] = at + half;
    found[number] = { row, at };
  }
  return { rows: ends.length, places: found };
}
