// Pictures made of cells: a grid of values, bits as a file holds them, tokens of a text, a table.
"use strict";

const STEPS = 12;
const BIT_KINDS = { sign: "blue", bitmap: "sky", params: "orange", other: "grey" };
const BIT_NAMES = { sign: "sign bits", bitmap: "bitmap bits", params: "numbers that give the levels", other: "other bits" };

// How strongly a cell is coloured, -STEPS..STEPS. Sequential scales begin at the smallest value, or at 0.
function stepOf(value, { scale: kind, most, least }) {
  if (typeof value !== "number" || !Number.isFinite(value)) return null;
  if (kind === "binary") return value ? STEPS : 0;
  const span = kind === "diverging" ? most : most - least;
  const share = span > 0 ? (kind === "diverging" ? value : value - least) / span : 0;
  return Math.max(-STEPS, Math.min(STEPS, Math.round(share * STEPS)));
}

function rangeOf(values, kind) {
  const [low, high] = extent(values);
  if (kind === "diverging") return { scale: kind, most: Math.max(Math.abs(low), Math.abs(high)), least: 0 };
  return { scale: kind, most: high, least: Math.min(low, low > 0.5 * high ? low : 0) };
}

const paint = (step) =>
  step === null
    ? "fill:none"
    : `fill:color-mix(in oklab, var(${step < 0 ? "--red" : "--blue"}) ${Math.round((100 * Math.abs(step)) / STEPS)}%, var(--cell))`;

// The class of a text on a painted cell.
const inkOn = (step) => (Math.abs(step) <= 0.85 * STEPS ? "cell" : step < 0 ? "cell on-red" : "cell on-blue");

const grid = {
  words: ({ rows, scale: kind, unit }) => {
    const values = rows.flat();
    const size = `${rows.length} rows of ${plural(rows[0]?.length ?? 0, "cell")}`;
    if (kind === "binary") return `${size}; ${values.filter(Boolean).length} of ${values.length} are 1`;
    const [low, high] = extent(values);
    return `${size}, from ${amount(low, { unit })} to ${amount(high, { unit })}`;
  },
  table: ({ rows, row_labels, column_labels }) => ({
    head: ["", ...(rows[0] ?? []).map((_, column) => column_labels?.[column] ?? String(column))],
    rows: rows.map((row, number) => [row_labels?.[number] ?? String(number), ...row.map(short)]),
  }),
  draw({ rows, row_labels = [], column_labels = [], scale: kind, unit }, width, em, label) {
    const columns = Math.max(1, rows[0]?.length ?? 0);
    const range = rangeOf(rows.flat(), kind);
    const left = row_labels.length ? Math.max(...row_labels.map((text) => textWidth(text, em))) + 0.7 * em : 1;
    const side = (width - left - 1) / columns;
    const high = Math.max(2, Math.min(2.4 * em, Math.max(side, rows.length <= 8 ? 1.7 * em : 0), (24 * em) / rows.length));
    const named = Math.max(0, ...column_labels.map((text) => textWidth(text, em))) + 0.6 * em;
    const broad = rows.length > 12 && columns <= rows.length * 2 ? Math.min(side, high) : Math.min(side, Math.max(3.6 * em, named));
    const every = Math.ceil(named / broad);
    // The label of the dial's place is always there; those that would touch it are not.
    const marked = column_labels.findIndex((name) => name.startsWith("▸"));
    const hidden = (c) => c !== marked && (c % every > 0 || (marked >= 0 && Math.abs(c - marked) < every));
    const everyRow = Math.ceil((1.2 * em) / high);
    const top = column_labels.length ? 1.6 * em : 1;
    // One path for each colour: a grid may have thousands of cells.
    const paths = new Map();
    const gap = broad > 6 && high > 6 ? 1 : 0;
    rows.forEach((row, r) =>
      row.forEach((value, c) => {
        const step = stepOf(value, range);
        const d = `M${(left + c * broad).toFixed(1)} ${(top + r * high).toFixed(1)}h${(broad - gap).toFixed(1)}v${(high - gap).toFixed(1)}h${(gap - broad).toFixed(1)}z`;
        paths.set(step, (paths.get(step) ?? "") + d);
      }),
    );
    const text = (value) => (kind === "binary" ? String(value) : short(value));
    const longest = Math.max(...rows.flat().map((value) => textWidth(text(value), 0.85 * em)));
    const written = rows.length * columns <= 400 && longest + 0.3 * em < broad && high > 1.3 * em;
    const across = left + columns * broad;
    const tips = { "data-grid": JSON.stringify([left, top, broad, high].map((value) => Number(value.toFixed(2)))) };
    return [
      kind === "binary" || range.most === range.least ? null : gradient(range, unit),
      picture(
        Math.max(across + 1, 1),
        top + rows.length * high + 1,
        label,
        svg("rect", { class: "frame", x: left - 0.5, y: top - 0.5, width: columns * broad - gap + 1, height: rows.length * high - gap + 1 }),
        [...paths].sort(([a], [b]) => a - b).map(([step, d]) => svg("path", { d, style: paint(step) })),
        written
          ? rows.map((row, r) =>
              row.map((value, c) =>
                svg(
                  "text",
                  { class: inkOn(stepOf(value, range)), x: left + (c + 0.5) * broad - gap / 2, y: top + (r + 0.5) * high + 0.3 * em, "text-anchor": "middle" },
                  text(value),
                ),
              ),
            )
          : [],
        row_labels.map((name, r) =>
          r % everyRow ? null : svg("text", { class: "faint", x: left - 0.5 * em, y: top + (r + 0.5) * high + 0.35 * em, "text-anchor": "end" }, name),
        ),
        column_labels.map((name, c) =>
          hidden(c) || (c !== marked && left + (c + 0.5) * broad + textWidth(name, em) / 2 > Math.max(width, across))
            ? null
            : svg("text", { class: "faint", x: Math.min(left + (c + 0.5) * broad, Math.max(width, across) - textWidth(name, em) / 2), y: 1.1 * em, "text-anchor": "middle" }, name),
        ),
        svg("rect", { class: "target", x: left, y: top, width: columns * broad, height: rows.length * high, ...tips }),
      ),
    ].filter(Boolean);
  },
  // What is under the pointer, in the coordinates of the picture.
  at({ rows, row_labels = [], column_labels = [], unit }, target, px, py) {
    const [left, top, broad, high] = JSON.parse(target.dataset.grid);
    const [r, c] = [Math.floor((py - top) / high), Math.floor((px - left) / broad)];
    if (rows[r]?.[c] === undefined) return "";
    return `${row_labels[r] ?? `row ${r}`}, ${column_labels[c] ?? `column ${c}`}: ${amount(rows[r][c], { unit })}`;
  },
};

// The scale of colours with its ends.
function gradient({ scale: kind, most, least }, unit) {
  const ends = kind === "diverging" ? [-most, most] : [least, most];
  const strip = element("span", { class: `gradient ${kind}` });
  return element("div", { class: "legend scale" }, element("span", {}, short(ends[0])), strip, element("span", {}, amount(ends[1], { unit })));
}

const bits = {
  words: ({ parts, total }) => [...parts.map((part) => `${part.label}: ${plural(part.bits.length, "bit")}`), total].join("; "),
  table: ({ parts, total }) => ({
    head: ["part", "bits", "content"],
    rows: [...parts.map((part) => [part.label, String(part.bits.length), part.bits]), ["total", "", total]],
  }),
  draw({ parts, total }, width, em, label) {
    const side = 1.5 * em;
    const pair = 8 * side + 0.7 * em;
    const bytes = Math.max(1, Math.floor((width + 0.7 * em) / pair));
    // Parts of at most one byte stand beside each other.
    const room = (part) =>
      part.bits.length > 8 ? Infinity : Math.max(part.bits.length * side, textWidth(`${part.label} ${plural(8, "bit")}`, em)) + 1.5 * em;
    let [x, y, end] = [0, 0, 0];
    const drawn = parts.map((part) => {
      const tone = BIT_KINDS[part.kind] ?? "grey";
      const beside = x > 0 && x + room(part) <= width + 1.5 * em;
      if (!beside) [x, y] = [0, end];
      const [left, top] = [x, y + 1.5 * em];
      const place = (bit) => {
        const byte = bit >> 3;
        return [left + (byte % bytes) * pair + (bit & 7) * side, top + Math.floor(byte / bytes) * (side + 0.35 * em)];
      };
      end = top + Math.ceil(part.bits.length / 8 / bytes) * (side + 0.35 * em) + 0.8 * em;
      x += room(part);
      return svg(
        "g",
        {},
        svg("text", { x: left, y: top - 0.55 * em }, svg("tspan", { class: "strong" }, part.label), svg("tspan", { class: "faint", dx: "0.6em" }, plural(part.bits.length, "bit"))),
        [...part.bits].map((bit, number) => {
          const [px, py] = place(number);
          return [
            svg("rect", { class: `bit ${bit === "1" ? `fill-${tone}` : "empty"} stroke-${tone}`, x: (px + 0.75).toFixed(1), y: (py + 0.75).toFixed(1), width: (side - 2.5).toFixed(1), height: (side - 2.5).toFixed(1), rx: 2, "data-tip": `${part.label}, bit ${number + 1}: ${bit}` }),
            svg("text", { class: `digit ${bit === "1" ? `on-${tone}` : "faint"}`, x: (px + side / 2 - 0.5).toFixed(1), y: (py + 0.68 * side).toFixed(1), "text-anchor": "middle" }, bit),
          ];
        }),
      );
    });
    const kinds = [...new Set(parts.map((part) => part.kind))];
    return [
      ...(kinds.length > 1 ? legend(kinds.map((kind) => ({ name: BIT_NAMES[kind] ?? kind, colour: BIT_KINDS[kind] ?? "grey" }))) : []),
      picture(width, Math.max(1, end), label, drawn),
      element("p", { class: "total" }, total),
    ];
  },
};

const text = {
  words: ({ tokens, unit }) => `${plural(tokens.length, "token")}, each with a value${unit ? ` in ${unit}` : ""}`,
  table: ({ tokens, unit }) => ({
    head: ["token", unit || "value", "note"],
    rows: tokens.map((token) => [shownToken(token.text), short(token.value), token.note ?? ""]),
  }),
  draw({ tokens, unit }, width, em, label) {
    const values = tokens.map((token) => token.value);
    const range = rangeOf(values, extent(values)[0] < 0 ? "diverging" : "sequential");
    return [
      gradient(range, unit),
      element(
        "div",
        { class: "tokens", role: "img", "aria-label": label, dir: "auto" },
        tokens.map((token) => {
          const step = stepOf(token.value, range);
          const share = step === null ? 0 : Math.round((60 * Math.abs(step)) / STEPS);
          const colour = `background:color-mix(in oklab, var(${step < 0 ? "--red" : "--blue"}) ${share}%, transparent)`;
          const tip = `${shownToken(token.text)}: ${amount(token.value, { unit })}${token.note ? ` · ${token.note}` : ""}`;
          return element("span", { class: token.text.trim() ? "token" : "token bare", style: colour, "data-tip": tip }, token.text);
        }),
      ),
    ];
  },
};

const table = {
  words: ({ head, rows }) => `${plural(rows.length, "row")}: ${head.filter(Boolean).join(", ")}`,
  table: null,
  draw: ({ head, rows }, _width, _em, label) => [element("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label }, tableOf({ head, rows }))],
};

const isNumber = (cell) => typeof cell === "number" || /^[+−-]?[\d.,]+ ?(%|[a-zA-Z]{0,3})?$/.test(String(cell));

function tableOf({ head, rows }) {
  const right = head.map((_, column) => column > 0 && rows.every((row) => row[column] === "" || row[column] === "–" || isNumber(row[column] ?? "")));
  const cell = (tag, value, column, more = {}) => element(tag, { class: right[column] ? "right" : null, ...more }, short(value));
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, head.map((value, column) => cell(value === "" ? "td" : "th", value, column, value === "" ? {} : { scope: "col" })))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((value, column) => (column ? cell("td", value, column) : cell("th", value, column, { scope: "row" })))))),
  );
}

const KINDS = { line, histogram, bars, curve, grid, bits, text, table };
