// The likeliest next tokens of several models, side by side.

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
        list.append(tokenRow(text, probability, text === data.expected));
      }
      return column;
    }),
  );
  box.dataset.place = data.place;
}
