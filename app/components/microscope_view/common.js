// What the parts of the microscope share. All text is added as text nodes.

const STATE = Symbol("microscope");

function drawing(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Four digits, with a real minus sign.
const digits = (value) =>
  (value === 0 ? "0" : Math.abs(value) < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)))).replace(
    /-/g,
    "−",
  );

const within = (value, low, high) => Math.min(Math.max(value, low), high);

// The place of the keys that move a mark over a grid: [rows, columns].
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
