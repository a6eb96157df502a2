// The likeliest next tokens of several models, side by side.

const shown = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(part of a character)";
const percent = (p) => (p >= 0.1 ? `${(100 * p).toFixed(0)} %` : p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "<0.1 %");

export default function ({ parentElement, data }) {
  const box = parentElement.querySelector(".words") ?? parentElement.appendChild(element("div", "words"));
  box.replaceChildren(
    ...data.models.map(({ kind, name, note, tokens }) => {
      const column = element("section", kind);
      column.setAttribute("aria-label", name);
      const head = element("div", "who", name);
      head.append(element("span", "", note));
      const list = element("div", "list");
      column.append(head, list);
      for (const [text, probability] of tokens) {
        const row = element("div", text === data.expected ? "row taken" : "row");
        const bar = element("div", "bar");
        bar.style.width = `${Math.max(1, 100 * probability)}%`;
        const track = element("div", "track");
        track.append(bar);
        row.append(element("div", "name", shown(text)), track, element("div", "number", percent(probability)));
        list.append(row);
      }
      return column;
    }),
  );
  box.dataset.place = data.place;
}
