// A node with a class and a text, and a row for a token that a model expects: its text, its bar, its probability. All
// text is added as text nodes.

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Make spaces and line ends visible.
const shown = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(part of a character)";
const percent = (p) => (p >= 0.1 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "<0.1 %");

function tokenRow(text, probability, taken) {
  const row = element("div", taken ? "row taken" : "row");
  const bar = element("div", "bar");
  bar.style.width = `${Math.max(1, 100 * probability)}%`;
  const track = element("div", "track");
  track.append(bar);
  row.append(element("div", "name", shown(text)), track, element("div", "number", percent(probability)));
  return row;
}

