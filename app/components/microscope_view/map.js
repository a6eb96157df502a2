// The map: blocks x layers, a colour for each layer. Arrow keys move, Enter or a click chooses; a row's name is its block.

function create(root) {
  const box = element("div", "map");
  const grid = element("div", "grid");
  grid.setAttribute("role", "grid");
  const tip = element("div", "tip");
  tip.setAttribute("aria-hidden", "true");
  const legend = element("div", "legend");
  const progress = element("div", "progress");
  progress.setAttribute("role", "status");
  box.append(grid, legend, progress, tip);
  root.append(box);
  const state = { grid, tip, legend, progress, shape: null, cells: [], at: [0, 1], send: null };

  const place = (event) => event.target.closest?.("[data-row]");
  const where = (node) => [Number(node.dataset.row), Number(node.dataset.column)];
  state.show = (node) => {
    tip.textContent = node.getAttribute("aria-label");
    tip.classList.add("shown");
    const [outer, inner] = [box.getBoundingClientRect(), node.getBoundingClientRect()];
    tip.style.left = `${within(inner.left - outer.left + inner.width / 2 - tip.offsetWidth / 2, 0, outer.width - tip.offsetWidth)}px`;
    const above = inner.top - outer.top - tip.offsetHeight - 4;
    tip.style.top = `${above < 0 ? inner.bottom - outer.top + 4 : above}px`;
  };
  const hide = () => tip.classList.remove("shown");
  state.mark = (row, column) => {
    const old = state.cells[state.at[0]]?.[state.at[1]];
    if (old) old.tabIndex = -1;
    state.at = [within(row, 0, state.cells.length - 1), within(column, 0, state.cells[0].length - 1)];
    const node = state.cells[state.at[0]][state.at[1]];
    node.tabIndex = 0;
    return node;
  };
  const choose = (node) => {
    const [row, column] = where(node);
    state.mark(row, column);
    state.send("go", [row, column - 1]);
    // On a phone what is chosen stands below the map.
    if (innerWidth <= 640) document.querySelector(".st-key-inspect_crumbs")?.scrollIntoView({ behavior: "smooth" });
  };
  grid.addEventListener("mouseover", (event) => place(event) && state.show(place(event)));
  grid.addEventListener("mouseleave", hide);
  grid.addEventListener("focusin", (event) => place(event)?.matches(":focus-visible") && state.show(place(event)));
  grid.addEventListener("focusout", hide);
  grid.addEventListener("click", (event) => place(event) && choose(place(event)));
  grid.addEventListener("keydown", (event) => {
    const node = place(event);
    if (!node) return;
    if (event.key === "Enter" || event.key === " ") choose(node);
    else if (event.key === "Escape") hide();
    else if (event.key === "Home") state.mark(0, state.at[1]).focus();
    else if (event.key === "End") state.mark(Infinity, state.at[1]).focus();
    else if (event.key in ARROWS) state.mark(state.at[0] + ARROWS[event.key][0], state.at[1] + ARROWS[event.key][1]).focus();
    else return;
    event.preventDefault();
  });
  return state;
}

function build(state, { rows, columns }) {
  const upright = columns.some((column) => column.short.length > 5);
  const head = element("div", upright ? "row head upright" : "row head");
  head.setAttribute("role", "row");
  const corner = element("span", "name", "");
  corner.setAttribute("role", "columnheader");
  corner.setAttribute("aria-label", "Block");
  head.append(corner);
  for (const column of columns) {
    const name = element("span", "name", column.short);
    name.setAttribute("role", "columnheader");
    name.title = column.name;
    head.append(name);
  }
  state.cells = rows.map((row, number) => {
    const line = element("div", "row");
    line.setAttribute("role", "row");
    const cells = [element("span", "name", row), ...columns.map(() => element("span", "cell"))];
    cells.forEach((cell, column) => {
      cell.setAttribute("role", column ? "gridcell" : "rowheader");
      cell.dataset.row = number;
      cell.dataset.column = column;
      cell.tabIndex = -1;
    });
    cells[0].setAttribute("aria-label", `Block ${row}`);
    line.append(...cells);
    return cells;
  });
  state.grid.replaceChildren(head, ...state.cells.map((cells) => cells[0].parentElement));
  state.grid.style.setProperty("--columns", columns.length);
  state.grid.style.setProperty("--rows", rows.length);
  state.mark(0, 1);
}

export default function ({ parentElement, data, setTriggerValue }) {
  const state = (parentElement[STATE] ??= create(parentElement));
  state.send = setTriggerValue;
  const shape = JSON.stringify([data.rows, data.columns]);
  if (shape !== state.shape) build(state, data);
  state.shape = shape;
  state.grid.setAttribute("aria-label", data.label);
  const span = data.high - data.low || 1;
  let waiting = 0;
  let dense = 0;
  data.values.forEach((values, row) => {
    state.cells[row][0].classList.toggle("chosen", data.chosen[0] === row);
    values.forEach(([value, text], column) => {
      const cell = state.cells[row][column + 1];
      const kind = value !== null ? "known" : text === null ? "waiting" : "dense";
      waiting += kind === "waiting";
      dense += kind === "dense";
      const chosen = data.chosen[0] === row && data.chosen[1] === column;
      cell.className = `cell ${kind}${chosen ? " chosen" : ""}`;
      cell.setAttribute("aria-selected", String(chosen));
      cell.setAttribute("aria-label", `Block ${data.rows[row]}, ${data.columns[column].name}: ${text ?? "not known yet"}`);
      if (value !== null) cell.style.setProperty("--share", `${(100 * within((value - data.low) / span, 0, 1)).toFixed(1)}%`);
    });
  });
  if (data.chosen[0] !== null && JSON.stringify(data.chosen) !== state.chosen) {
    const node = state.mark(data.chosen[0], (data.chosen[1] ?? -1) + 1);
    // Sideways only: a map of many experts is wider than its place.
    const [outer, inner] = [state.grid.getBoundingClientRect(), node.getBoundingClientRect()];
    if (inner.right > outer.right) state.grid.scrollLeft += inner.right - outer.right + outer.width / 3;
  }
  state.chosen = JSON.stringify(data.chosen);
  const known = data.low_text !== null;
  const parts = known
    ? [element("span", "", data.low_text), element("span", "ramp"), element("span", "", data.high_text)]
    : [element("span", "", "")];
  if (dense) {
    const item = element("span", "item");
    item.append(element("span", "cell dense"), "dense");
    parts.push(item);
  }
  state.legend.replaceChildren(...parts);
  state.progress.textContent = data.progress;
  state.grid.dataset.waiting = waiting;
}
