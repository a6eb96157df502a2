// One group of weights: above the axis the stored levels with the weights that use them, below it those before training;
// then the weights one by one, the parameters as they are stored, and the bytes of the file.

const AXIS = 104;
const BAND = 76;

// Two levels have the first and the last colour of four.
const shade = (level, count) => (count === 2 ? 3 * level : level % 4);

function bars(values, index, levels, low, high, wide, up) {
  const count = within(Math.ceil(2 * Math.sqrt(values.length)) + 4, 12, 60);
  const at = (value) => within(Math.floor(((value - low) / (high - low)) * count), 0, count - 1);
  const stacks = Array.from({ length: count }, () => []);
  values.forEach((value, number) => stacks[at(value)].push(number));
  const most = Math.max(...stacks.map((stack) => stack.length));
  const step = Math.min(14, BAND / most);
  const width = (wide - 40) / count;
  const nodes = [];
  stacks.forEach((stack, bin) => {
    stack.sort((a, b) => index[a] - index[b]);
    stack.forEach((number, floor) => {
      nodes.push(
        drawing("rect", {
          class: `weight level${shade(index[number], levels.length)}`,
          "data-number": number,
          x: 20 + bin * width + 0.5,
          y: up ? AXIS - (floor + 1) * step : AXIS + floor * step + 0.75,
          width: Math.max(1, width - 1),
          height: Math.max(0.75, step - 0.75),
        }),
      );
    });
  });
  return nodes;
}

function picture(data, wide) {
  const all = [...data.weights, ...data.levels, ...(data.before?.levels ?? []), ...(data.latent ?? [])];
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const margin = (most - least || 1) * 0.04;
  const [low, high] = [least - margin, most + margin];
  const x = (value) => 20 + ((value - low) / (high - low)) * (wide - 40);
  const svg = drawing("svg", { viewBox: `0 0 ${wide} ${2 * AXIS}`, role: "img", "aria-label": data.label });
  svg.append(...bars(data.weights, data.index, data.levels, low, high, wide, true));
  if (data.before) svg.append(...bars(data.weights, data.before.index, data.levels, low, high, wide, false));
  svg.append(drawing("line", { class: "axis", x1: 20, x2: wide - 20, y1: AXIS, y2: AXIS }));
  const marks = (levels, from, to, place, kind) => {
    let last = -Infinity;
    levels.forEach((level, number) => {
      svg.append(drawing("line", { class: `mark ${kind} level${shade(number, levels.length)}`, x1: x(level), x2: x(level), y1: from, y2: to }));
      // Two levels may lie too close to each other for two labels.
      if (x(level) - last < 56) return;
      last = x(level);
      svg.append(drawing("text", { class: "label", x: within(x(level), 42, wide - 42), y: place }, digits(level)));
    });
  };
  marks(data.levels, 18, AXIS, 13, "after");
  if (data.before) marks(data.before.levels, AXIS, 2 * AXIS - 18, 2 * AXIS - 5, "before");
  if (data.latent) {
    data.latent.forEach((value) => svg.append(drawing("circle", { class: "latent", cx: x(value), cy: AXIS, r: 3 })));
  }
  return svg;
}

function table(heads, rows, label) {
  const box = element("div", "scroll");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  const whole = element("table", "");
  const head = element("tr", "");
  for (const text of heads) {
    const cell = element("th", "", text);
    cell.scope = "col";
    head.append(cell);
  }
  const top = element("thead", "");
  top.append(head);
  const body = element("tbody", "");
  for (const row of rows) {
    const line = element("tr", "");
    line.append(...row.map((text, column) => element(column ? "td" : "th", "", text)));
    line.firstChild.scope = "row";
    body.append(line);
  }
  whole.append(top, body);
  box.append(whole);
  return box;
}

// The bytes of a plane: eight boxes each, those of this group with their bit.
function plane(state, { name, bytes }) {
  const box = element("div", "plane");
  box.append(element("div", "who", name));
  const list = element("div", "bytes");
  for (const { offset, hex, bits } of bytes) {
    const byte = element("div", "byte");
    byte.append(element("div", "hex", hex));
    byte.title = `byte ${offset.toLocaleString("en")} of ${state.data.file}`;
    const row = element("div", "bits");
    // As one reads a number: bit 7 first.
    for (const [bit, number] of bits) {
      const cell = element("span", `bit${number === null ? " other" : bit === "1" ? " one" : ""}`, bit);
      if (number !== null) cell.dataset.number = number;
      row.append(cell);
    }
    byte.append(row);
    list.append(byte);
  }
  box.append(list);
  return box;
}

function create(root) {
  const box = element("div", "group");
  const legend = element("div", "sides");
  const chart = element("div", "chart");
  const line = element("div", "line");
  line.setAttribute("role", "status");
  const rest = element("div", "rest");
  box.append(legend, chart, line, rest);
  root.append(box);
  const state = { box, legend, chart, line, rest, at: 0, data: null, wide: 0 };
  chart.tabIndex = 0;
  chart.setAttribute("role", "application");
  chart.setAttribute("aria-roledescription", "weights of a group");
  state.mark = (number) => {
    const { data } = state;
    state.at = within(number, 0, data.weights.length - 1);
    for (const node of box.querySelectorAll("[data-number]")) {
      node.classList.toggle("here", Number(node.dataset.number) === state.at);
    }
    line.replaceChildren(...data.lines[state.at].map((part) => element("span", "", part)));
  };
  // Drawn for the width that there is: text in it has the size of text beside it.
  state.draw = () => {
    state.wide = within(chart.clientWidth || 640, 280, 900);
    chart.replaceChildren(picture(state.data, state.wide));
    state.mark(state.at);
  };
  state.resize = new ResizeObserver(() => state.data && Math.abs(chart.clientWidth - state.wide) > 8 && state.draw());
  state.resize.observe(chart);
  box.addEventListener("mouseover", (event) => {
    const node = event.target.closest?.("[data-number]");
    if (node) state.mark(Number(node.dataset.number));
  });
  box.addEventListener("click", (event) => {
    const node = event.target.closest?.("[data-number]");
    if (node) state.mark(Number(node.dataset.number));
  });
  chart.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    state.mark(state.at + steps[event.key]);
  });
  return state;
}

export default function ({ parentElement, data }) {
  const state = (parentElement[STATE] ??= create(parentElement));
  const signature = JSON.stringify(data);
  if (signature === state.drawn) return;
  state.drawn = signature;
  state.data = data;
  state.legend.replaceChildren(
    ...data.legend.map(([kind, text]) => {
      const item = element("span", "item");
      item.append(element("span", `swatch ${kind}`), text);
      return item;
    }),
  );
  state.chart.setAttribute("aria-label", data.keys);
  const bits = element("div", "planes");
  bits.append(element("div", "title", data.bits_title), ...data.planes.map((one) => plane(state, one)));
  const params = element("div", "params");
  params.append(element("div", "title", data.params_title), table(data.params_head, data.params, data.params_title));
  state.rest.replaceChildren(bits, params);
  state.at = data.at;
  state.draw();
  state.box.dataset.place = data.place;
}
