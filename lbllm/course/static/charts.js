// Pictures with an axis: a number line, a histogram, bars, curves. Each kind has draw (nodes for a width in pixels and
// a letter size), words (for readers who can't see it) and table (all values).
"use strict";

// Okabe and Ito's colours, which colour-blind people can distinguish. Levels run from warm (low) to cold (high).
const SERIES = ["blue", "orange", "green", "purple", "red", "sky", "grey"];
const DASHES = [null, "7 3", "2 3", "9 3 2 3", "4 4", "1 4", "12 4"];
const LEVELS = { 1: ["blue"], 2: ["red", "blue"], 3: ["red", "grey", "blue"], 4: ["red", "orange", "sky", "blue"] };
const SHAPES = [
  (r) => `M${-r} 0A${r} ${r} 0 1 0 ${r} 0A${r} ${r} 0 1 0 ${-r} 0Z`,
  (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
  (r) => `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}Z`,
];

// Many levels can't have a colour each: two in turn tell neighbours apart.
const levelColour = (level, count) => LEVELS[count]?.[level] ?? (level % 2 ? "sky" : "blue");

const moved = (x, y) => `transform:translate(${x.toFixed(2)}px,${y.toFixed(2)}px)`;

function picture(width, height, label, ...children) {
  const size = { width: Math.round(width), height: Math.round(height) };
  return svg("svg", { ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": label }, ...children);
}

// A horizontal axis with its ticks below y.
function axisX(low, high, x, y, em, { text = short, zero = true } = {}) {
  const [left, right] = [x(low), x(high)];
  const marks = ticks(low, high, Math.max(2, Math.floor((right - left) / (6 * em))));
  return svg(
    "g",
    { class: "axis" },
    svg("line", { x1: left, x2: right, y1: y, y2: y }),
    marks.map((value) => [
      svg("line", { x1: x(value), x2: x(value), y1: y, y2: y + 0.35 * em, class: zero && value === 0 ? "zero" : null }),
      svg("text", { x: x(value), y: y + 1.4 * em, "text-anchor": "middle" }, text(value)),
    ]),
  );
}

function legend(items) {
  if (!items.length) return [];
  return [
    element(
      "div",
      { class: "legend" },
      items.map(({ name, colour, dash, shape }) =>
        element("span", {}, swatch(colour, dash, shape), element("span", {}, name)),
      ),
    ),
  ];
}

function swatch(colour, dash, shape) {
  const line = svg("line", { x1: 1, x2: 21, y1: 7, y2: 7, class: `stroke-${colour}`, "stroke-dasharray": dash });
  const mark = svg("path", { d: (shape ?? SHAPES[1])(5), class: `fill-${colour}`, style: moved(11, 7) });
  return svg("svg", { width: 22, height: 14, "aria-hidden": "true" }, dash === undefined ? mark : line);
}

const line = {
  words: ({ points, levels }) =>
    `${plural(points.length, "value")} on a line${levels.length ? `, ${plural(levels.length, "level")}` : ""}`,
  table: ({ points, levels }) => ({
    head: levels.length ? ["value", "level", "note"] : ["value", "note"],
    rows: points.map(({ x, level, note }) => {
      const name = level === null || level === undefined ? "" : `${levels[level]?.label || level} = ${short(levels[level]?.x)}`;
      return levels.length ? [short(x), name, note ?? ""] : [short(x), note ?? ""];
    }),
  }),
  draw({ points, levels, low, high }, width, em, label) {
    const [left, right] = [1.2 * em, width - 1.2 * em];
    const x = scale(low, high, left, right);
    const names = levels.map((level) => ({ at: x(level.x), text: level.label || short(level.x) }));
    // Numbers without a name of their own may be left out where they are crowded: the axis has some.
    const labels = rowsOf(names, em, 0, width, levels.every((level) => !level.label) ? 2 : Infinity);
    const top = levels.length ? (labels.rows + 0.6) * 1.35 * em : 0.5 * em;
    // Each point lies in the lowest row where it touches no other; crowds get smaller points.
    let radius = 0.6 * em;
    let rows = 1;
    let heights = [];
    for (; radius > 1.2; radius *= 0.85) {
      const ends = [];
      heights = new Array(points.length).fill(0);
      const order = points.map((_, number) => number).sort((a, b) => points[a].x - points[b].x);
      for (const number of order) {
        const at = x(points[number].x);
        let row = ends.findIndex((end) => end <= at - 2.2 * radius);
        if (row < 0) row = ends.push(0) - 1;
        ends[row] = at;
        heights[number] = row;
      }
      rows = Math.max(1, ends.length);
      if (rows * 2.4 * radius <= 13 * em) break;
    }
    const base = top + Math.max(5 * em, (rows + 0.5) * 2.4 * radius) + 0.3 * em;
    const y = (row) => base - 0.4 * em - radius - row * 2.4 * radius;
    const used = points.some((point) => levels[point.level]);
    const colour = (level) => (used ? levelColour(level, levels.length) : "grey");
    const known = (point) => levels[point.level];
    return [
      picture(
        width,
        base + 2 * em,
        label,
        axisX(low, high, x, base, em),
        levels.map((level, number) =>
          svg(
            "g",
            { class: "level", "data-tip": `${level.label ? `${level.label} = ` : ""}${short(level.x)}` },
            svg(
              "g",
              { style: moved(x(level.x), 0), class: "moving" },
              svg("line", { y1: top - 0.4 * em, y2: base, x1: 0, x2: 0, class: `stem stroke-${colour(number)}` }),
              svg("path", { d: SHAPES[used ? number % 4 : 0](0.42 * em), class: `fill-${colour(number)}`, transform: `translate(0 ${base})` }),
            ),
            labels.places[number] &&
              svg(
                "text",
                { class: "moving strong", "text-anchor": "middle", y: 0, x: 0, style: moved(labels.places[number].at, (labels.places[number].row + 1) * 1.35 * em) },
                names[number].text,
              ),
          ),
        ),
        points.map((point, number) => {
          const own = known(point);
          const at = x(point.x);
          const tone = own ? colour(point.level) : used ? "grey" : "blue";
          const tip = `${short(point.x)}${own ? ` → ${short(own.x)}` : ""}${point.note ? ` · ${point.note}` : ""}`;
          return svg(
            "g",
            { class: "point moving", "data-tip": tip, style: moved(at, y(heights[number])) },
            own ? svg("line", { x1: 0, x2: x(own.x) - at, y1: 0, y2: 0, class: `miss stroke-${tone}` }) : null,
            svg("path", { d: SHAPES[own ? point.level % 4 : 0](radius), class: `dot fill-${tone}` }),
          );
        }),
      ),
    ];
  },
};

const histogram = {
  words: ({ edges, series, marks }) =>
    `${series.map(({ name }) => name).join(", ")} in ${plural(edges.length - 1, "bin")} from ${short(edges[0])} to ${short(edges.at(-1))}` +
    (marks?.length ? `; marked: ${marks.map((mark) => `${mark.label} ${short(mark.x)}`).join(", ")}` : ""),
  table: ({ edges, series }) => ({
    head: ["from", "to", ...series.map(({ name }) => name)],
    rows: edges.slice(1).map((end, bin) => [short(edges[bin]), short(end), ...series.map(({ counts }) => short(counts[bin]))]),
  }),
  draw({ edges, series, marks = [] }, width, em, label) {
    const most = Math.max(1e-12, ...series.flatMap(({ counts }) => counts));
    const yTicks = ticks(0, most, 3);
    const left = Math.max(...yTicks.map((value) => textWidth(short(value), em))) + 1.1 * em;
    const x = scale(edges[0], edges.at(-1), left, width - em);
    const places = marks.map((mark) => ({ at: x(mark.x), text: mark.label || short(mark.x) }));
    const labels = rowsOf(places, em, left, width);
    const top = (labels.rows ? labels.rows + 0.4 : 0.4) * 1.35 * em;
    const base = top + Math.min(13 * em, Math.max(9 * em, 0.32 * width));
    const y = scale(0, most, base, top);
    const bars = series.map(({ counts }, number) => {
      const d = counts.map((count, bin) => `V${y(count).toFixed(1)}H${x(edges[bin + 1]).toFixed(1)}`).join("");
      const tone = SERIES[number % SERIES.length];
      return svg("path", { d: `M${x(edges[0]).toFixed(1)} ${base}${d}V${base}Z`, class: `area${number ? " over" : ""} fill-${tone} stroke-${tone}` });
    });
    const bins = edges.slice(1).map((end, bin) =>
      svg("rect", {
        x: x(edges[bin]).toFixed(1),
        width: Math.max(0.5, x(end) - x(edges[bin])).toFixed(1),
        y: top.toFixed(1),
        height: (base - top).toFixed(1),
        class: "target",
        "data-tip": `${short(edges[bin])} to ${short(end)}: ${series.map(({ name, counts }) => (series.length > 1 ? `${name} ` : "") + short(counts[bin])).join(", ")}`,
      }),
    );
    return [
      ...(series.length > 1 ? legend(series.map(({ name }, number) => ({ name, colour: SERIES[number % SERIES.length] }))) : []),
      picture(
        width,
        base + 2 * em,
        label,
        yTicks.map((value) => [
          svg("line", { class: "rule", x1: left, x2: width - em, y1: y(value), y2: y(value) }),
          svg("text", { class: "faint", x: left - 0.5 * em, y: y(value) + 0.35 * em, "text-anchor": "end" }, short(value)),
        ]),
        bars,
        bins,
        axisX(edges[0], edges.at(-1), x, base, em),
        marks.map((mark, number) => [
          svg("line", { class: "mark moving", x1: 0, x2: 0, y1: top - 0.3 * em, y2: base, style: moved(x(mark.x), 0) }),
          svg(
            "text",
            { class: "strong moving", x: 0, y: 0, "text-anchor": "middle", style: moved(labels.places[number].at, (labels.places[number].row + 1) * 1.35 * em) },
            places[number].text,
          ),
        ]),
      ),
    ];
  },
};

const bars = {
  words: ({ labels, series, ...kind }) =>
    series.length === 1
      ? labels.map((name, number) => `${name} ${amount(series[0].values[number], kind)}`).join(", ")
      : `${series.map(({ name }) => name).join(" and ")} for ${labels.join(", ")}`,
  table: ({ labels, series, ...kind }) => ({
    head: ["", ...series.map(({ name }) => name || "value")],
    rows: labels.map((name, number) => [name, ...series.map(({ values }) => amount(values[number], kind))]),
  }),
  draw({ labels, series, ...kind }, width, em, label) {
    const values = series.flatMap((one) => one.values);
    const [least, most] = extent([...values, 0]);
    const wide = Math.max(...labels.map((text) => textWidth(text, em)));
    const above = wide > 0.32 * width;
    const left = above ? 0 : wide + 1.2 * em;
    const room = Math.max(...values.map((value) => textWidth(amount(value, kind), em))) + em;
    const x = scale(least, most, left + (least < 0 ? room : 1), width - (most > 0 ? room : 2));
    // Series that share no label need one lane only; many labels get thinner bars.
    const has = (number) => series.filter((one) => typeof one.values[number] === "number").length;
    const lanes = labels.every((_, number) => has(number) <= 1) ? 1 : series.length;
    const thick = lanes > 1 || labels.length > 10 ? 1.05 * em : 1.5 * em;
    const group = (above ? 1.6 * em : 0) + lanes * (thick + 0.2 * em) + (labels.length > 10 ? 0.15 : 0.75) * em;
    const rows = labels.map((name, number) => {
      const top = number * group;
      const first = top + (above ? 1.6 * em : 0);
      const bottom = top + group - (above ? 0.75 * em : 0);
      const middle = first + (lanes * (thick + 0.2 * em) - 0.2 * em) / 2;
      return svg(
        "g",
        {},
        svg("line", { class: "base", x1: x(0), x2: x(0), y1: above ? first - 0.2 * em : top, y2: bottom }),
        above
          ? svg("text", { x: 0, y: top + 1.1 * em }, name)
          : svg("text", { x: left - 0.9 * em, y: middle + 0.35 * em, "text-anchor": "end" }, name),
        series.map((one, place) => {
          const value = one.values[number];
          const y = first + (lanes > 1 ? place : 0) * (thick + 0.2 * em);
          if (typeof value !== "number")
            return has(number) && lanes === 1 ? null : svg("text", { class: "faint", x: x(0) + 0.5 * em, y: y + 0.5 * thick + 0.35 * em }, "–");
          const ends = [x(0), x(value)].sort((a, b) => a - b);
          const negative = value < 0;
          return [
            svg("rect", {
              class: `bar fill-${SERIES[place % SERIES.length]}`,
              "data-tip": `${name}${one.name ? `, ${one.name}` : ""}: ${amount(value, kind)}`,
              x: ends[0].toFixed(1),
              y: y.toFixed(1),
              width: Math.max(1, ends[1] - ends[0]).toFixed(1),
              height: thick.toFixed(1),
              rx: 2,
            }),
            svg(
              "text",
              { class: "number moving", x: 0, y: 0, "text-anchor": negative ? "end" : "start", style: moved(negative ? ends[0] - 0.4 * em : ends[1] + 0.4 * em, y + 0.5 * thick + 0.35 * em) },
              amount(value, kind),
            ),
          ];
        }),
      );
    });
    const height = labels.length * group - 0.4 * em;
    return [
      ...(series.length > 1 ? legend(series.map(({ name }, number) => ({ name, colour: SERIES[number % SERIES.length] }))) : []),
      picture(width, height, label, rows),
    ];
  },
};

const curve = {
  words: ({ x, series, x_label, y_label, mark }) =>
    `${y_label} over ${x_label}, from ${short(x[0])} to ${short(x.at(-1))}` +
    (typeof mark === "number" ? `; at ${short(x[mark])}: ${series.map(({ name, y }) => `${name} ${short(y[mark])}`).join(", ")}` : ""),
  table: ({ x, series, x_label }) => ({
    head: [x_label || "x", ...series.map(({ name }) => name)],
    rows: x.map((value, number) => [short(value), ...series.map(({ y }) => short(y[number]))]),
  }),
  draw({ x: at, series, x_label, y_label, log, mark }, width, em, label) {
    const usable = (value) => typeof value === "number" && Number.isFinite(value) && (!log || value > 0);
    const known = series.flatMap(({ y }) => y).filter(usable);
    let [least, most] = extent(known);
    if (!log && least > 0 && least < 0.6 * most) least = 0;
    if (most === least) [least, most] = log ? [least / 2, most * 2] : [Math.min(1.2 * least, 0), Math.max(1.2 * most, 0) || 1];
    const sized = log ? Math.log10 : (value) => value;
    let yTicks = log ? powers(least, most) : ticks(least, most, 4);
    if (!log && yTicks.length > 1) {
      const step = yTicks[1] - yTicks[0];
      if (most > yTicks.at(-1) + 1e-9 * step) yTicks = [...yTicks, Number((yTicks.at(-1) + step).toPrecision(12))];
      most = Math.max(most, yTicks.at(-1));
    }
    const left = Math.max(...yTicks.map((value) => textWidth(short(value), em))) + 1.1 * em;
    const top = 1.9 * em;
    const base = top + Math.min(15 * em, Math.max(10 * em, 0.42 * width));
    const [low, high] = extent(at);
    const x = scale(low, high, left, width - 1.2 * em);
    const y = scale(sized(least), sized(most), base, top);
    const place = (one, number) => [x(at[number]), y(sized(one.y[number]))];
    const marked = typeof mark === "number" && mark >= 0 && mark < at.length;
    const lines = series.map((one, number) => {
      const tone = SERIES[number % SERIES.length];
      let pen = "M";
      const d = one.y
        .map((value, index) => {
          if (!usable(value)) return "";
          const [px, py] = place(one, index);
          const part = `${pen}${px.toFixed(1)} ${py.toFixed(1)}`;
          pen = "L";
          return part;
        })
        .join("");
      const count = one.y.filter(usable).length;
      const few = count <= 32 && width / count > 1.2 * em;
      return svg(
        "g",
        {},
        svg("path", { d, class: `curve stroke-${tone}`, "stroke-dasharray": DASHES[number % DASHES.length] }),
        one.y.map((value, index) => {
          if (!usable(value) || !(few || (marked && index === mark))) return null;
          const [px, py] = place(one, index);
          const big = marked && index === mark;
          return svg("path", { d: SHAPES[number % 4]((big ? 0.45 : 0.26) * em), class: `${big ? "dot" : ""} fill-${tone}`, style: moved(px, py), "data-tip": `${one.name}: ${short(value)} at ${short(at[index])}` });
        }),
      );
    });
    const named = ({ name, y: values }) => (marked && usable(values[mark]) ? `${name}: ${short(values[mark])}` : name);
    return [
      ...(series.length > 1 || marked
        ? legend(series.map((one, number) => ({ name: named(one), colour: SERIES[number % SERIES.length], dash: DASHES[number % DASHES.length] })))
        : []),
      picture(
        width,
        base + 3.4 * em,
        label,
        svg("text", { class: "faint", x: 0, y: em }, log ? `${y_label} (logarithmic)` : y_label),
        yTicks.map((value) => [
          svg("line", { class: "rule", x1: left, x2: width - 1.2 * em, y1: y(sized(value)), y2: y(sized(value)) }),
          svg("text", { class: "faint", x: left - 0.5 * em, y: y(sized(value)) + 0.35 * em, "text-anchor": "end" }, short(value)),
        ]),
        axisX(low, high, x, base, em, { zero: false }),
        svg("text", { class: "faint", x: width - 1.2 * em, y: base + 2.9 * em, "text-anchor": "end" }, x_label),
        marked ? svg("line", { class: "mark moving", x1: 0, x2: 0, y1: top, y2: base, style: moved(x(at[mark]), 0) }) : null,
        lines,
      ),
    ];
  },
};

// Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them where there are few.
function powers(low, high) {
  const found = [];
  const few = Math.log10(high / low) < 3;
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const factor of few ? [1, 2, 5] : [1]) {
      const value = Number(`${factor}e${power}`);
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  return found.length > 1 ? found : [low, high];
}
