// One window of a layer's matrix as linked tiles. One weight is marked in all of them, by the pointer or by the arrow
// keys; Enter or a click opens its group. The first tile is the whole matrix with the place of the window.

const PLANES = ["original", "sign", "bitmap", "second", "rebuilt", "error"];

function colours(box) {
  return Object.fromEntries(
    ["plus", "minus", "zero", "one", "none"].map((name) => {
      const probe = element("span", `probe ${name}`);
      box.append(probe);
      const parts = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
      probe.remove();
      return [name, parts];
    }),
  );
}

function paint(canvas, height, width, colour) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let place = 0; place < width * height; place++) {
    const [r, g, b] = colour(place);
    image.data.set([r, g, b, 255], 4 * place);
  }
  context.putImageData(image, 0, 0);
}

const mixed = (from, to, share) => from.slice(0, 3).map((part, index) => part + (to[index] - part) * share);
// Small values stay visible: the share of a colour is the root of the value's share.
const diverging = (palette, value, most) =>
  mixed(palette.zero, value < 0 ? palette.minus : palette.plus, Math.sqrt(Math.min(1, Math.abs(value) / (most || 1))));

function create(root) {
  const box = element("div", "tiles");
  const line = element("div", "line");
  line.setAttribute("role", "status");
  root.append(box, line);
  const state = { box, line, tiles: {}, data: null, at: [0, 0], send: null };
  for (const name of ["whole", ...PLANES]) {
    const tile = element("figure", `tile ${name}`);
    const caption = element("figcaption", "");
    const field = element("div", "field");
    const canvas = element("canvas", "");
    const chosen = element("div", "chosen");
    const mark = element("div", "mark");
    field.append(canvas, chosen, mark);
    tile.append(caption, field);
    box.append(tile);
    state.tiles[name] = { tile, caption, field, canvas, chosen, mark };
  }
  box.tabIndex = 0;
  box.setAttribute("role", "application");
  box.setAttribute("aria-roledescription", "grid of weights");

  state.put = (node, row, column, rows, columns) => {
    const [height, width] = state.data.window;
    node.style.left = `${(100 * column) / width}%`;
    node.style.top = `${(100 * row) / height}%`;
    node.style.width = `${(100 * columns) / width}%`;
    node.style.height = `${(100 * rows) / height}%`;
    node.style.display = "block";
  };
  state.mark = (row, column) => {
    const { window: size, first, planes, group } = state.data;
    state.at = [within(row, 0, size[0] - 1), within(column, 0, size[1] - 1)];
    const place = state.at[0] * size[1] + state.at[1];
    for (const name of PLANES) {
      if (planes[name]) state.put(state.tiles[name].mark, ...state.at, 1, 1);
    }
    const [y, x] = [first[0] + state.at[0], first[1] + state.at[1]];
    const parts = [
      `row ${y}, column ${x}, group ${Math.floor(x / group)}`,
      `teacher ${digits(planes.original[place])}`,
      `sign bit ${planes.sign[place]}`,
      ...(planes.bitmap ? [`bitmap bit ${planes.bitmap[place]}`] : []),
      ...(planes.second ? [`second bitmap bit ${planes.second[place]}`] : []),
      `level ${Number(state.data.index[place]) + 1} = ${digits(planes.rebuilt[place])}`,
      `error ${digits(planes.error[place])}`,
    ];
    line.replaceChildren(...parts.map((part) => element("span", "", part)));
  };
  const place = (event) => {
    for (const name of PLANES) {
      const { field } = state.tiles[name];
      if (!field.contains(event.target)) continue;
      const inside = field.getBoundingClientRect();
      const [height, width] = state.data.window;
      return [
        within(Math.floor(((event.clientY - inside.top) / inside.height) * height), 0, height - 1),
        within(Math.floor(((event.clientX - inside.left) / inside.width) * width), 0, width - 1),
      ];
    }
    return null;
  };
  const go = (row, column) => {
    const [height, width] = state.data.shape;
    state.send("go", [within(row, 0, height - 1), within(column, 0, width - 1)]);
  };
  const open = () => go(state.data.first[0] + state.at[0], state.data.first[1] + state.at[1]);
  box.addEventListener("mousemove", (event) => {
    const found = place(event);
    if (found) state.mark(...found);
  });
  box.addEventListener("click", (event) => {
    const found = place(event);
    if (found) {
      state.mark(...found);
      open();
      return;
    }
    const inside = state.tiles.whole.canvas.getBoundingClientRect();
    const [y, x] = [(event.clientY - inside.top) / inside.height, (event.clientX - inside.left) / inside.width];
    if (state.tiles.whole.field.contains(event.target) && y >= 0 && y < 1 && x >= 0 && x < 1) {
      go(Math.floor(y * state.data.shape[0]), Math.floor(x * state.data.shape[1]));
    }
  });
  box.addEventListener("keydown", (event) => {
    const { window: size, first } = state.data;
    const pages = { PageUp: [-size[0], 0], PageDown: [size[0], 0], Home: [0, -size[1]], End: [0, size[1]] };
    if (event.key === "Enter" || event.key === " ") open();
    else if (event.key in pages) {
      const [rows, columns] = pages[event.key];
      go(first[0] + state.at[0] + rows, first[1] + state.at[1] + columns);
    } else if (event.key in ARROWS) {
      const [row, column] = ARROWS[event.key].map((step, axis) => state.at[axis] + step);
      if (row >= 0 && row < size[0] && column >= 0 && column < size[1]) state.mark(row, column);
      else go(first[0] + row, first[1] + column);
    } else return;
    event.preventDefault();
  });
  state.draw = () => {
    const { window: size, planes, whole, most, shape, names } = state.data;
    const palette = colours(box);
    for (const name of PLANES) {
      const { tile, caption, canvas, field, chosen } = state.tiles[name];
      tile.hidden = !planes[name];
      if (tile.hidden) continue;
      caption.textContent = names[name];
      field.style.aspectRatio = `${size[1]} / ${size[0]}`;
      const values = planes[name];
      const bits = name === "sign" || name === "bitmap" || name === "second";
      const ends = name === "sign" ? ["minus", "plus"] : ["none", "one"];
      paint(canvas, ...size, (at) =>
        bits ? mixed(palette.zero, palette[ends[Number(values[at])]], 0.75) : diverging(palette, values[at], most[name]),
      );
      chosen.style.display = "none";
      if (state.data.chosen) state.put(chosen, ...state.data.chosen);
    }
    const { tile, caption, field, canvas, chosen } = state.tiles.whole;
    tile.hidden = false;
    caption.textContent = names.whole;
    field.style.aspectRatio = `${size[1]} / ${size[0]}`;
    const [height, width] = whole.size;
    paint(canvas, height, width, (at) => mixed(palette.zero, palette.one, within(whole.values[at] / (whole.most || 1), 0, 1)));
    // The canvas is as large as fits into its field, in the shape of the matrix.
    const wide = shape[1] / shape[0] > size[1] / size[0];
    canvas.style.width = wide ? "100%" : `${(100 * (shape[1] / shape[0])) / (size[1] / size[0])}%`;
    canvas.style.height = wide ? `${(100 * (size[1] / size[0])) / (shape[1] / shape[0])}%` : "100%";
    const [across, down] = [parseFloat(canvas.style.width), parseFloat(canvas.style.height)];
    chosen.style.display = "block";
    chosen.style.left = `${(state.data.first[1] / shape[1]) * across}%`;
    chosen.style.top = `${(state.data.first[0] / shape[0]) * down}%`;
    chosen.style.width = `${(size[1] / shape[1]) * across}%`;
    chosen.style.height = `${(size[0] / shape[0]) * down}%`;
  };
  state.scheme = matchMedia("(prefers-color-scheme: dark)");
  state.repaint = () => state.data && requestAnimationFrame(state.draw);
  state.scheme.addEventListener("change", state.repaint);
  return state;
}

export default function ({ parentElement, data, setTriggerValue }) {
  const state = (parentElement[STATE] ??= create(parentElement));
  state.send = setTriggerValue;
  const signature = JSON.stringify(data);
  if (signature !== state.drawn) {
    state.drawn = signature;
    state.data = data;
    state.box.setAttribute("aria-label", data.label);
    state.draw();
    state.mark(...data.at);
    state.box.dataset.place = data.place;
  }
  return () => state.scheme.removeEventListener("change", state.repaint);
}
