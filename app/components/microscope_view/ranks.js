// A short list of places with bars; each is a button.

export default function ({ parentElement, data, setTriggerValue }) {
  const list = parentElement.querySelector("ol") ?? parentElement.appendChild(element("ol", "ranks"));
  list.setAttribute("aria-label", data.label);
  list.dataset.place = data.place;
  list.replaceChildren(
    ...data.rows.map(([name, text, share], number) => {
      const item = element("li", "");
      const button = element("button", share === null ? "rank none" : "rank");
      button.type = "button";
      const track = element("span", "track");
      const bar = element("span", "bar");
      bar.style.width = `${100 * (share ?? 0)}%`;
      track.append(bar);
      button.append(element("span", "name", name), track, element("span", "number", text));
      button.addEventListener("click", () => setTriggerValue("go", number));
      item.append(button);
      return item;
    }),
  );
}
