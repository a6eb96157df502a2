// Two tabs for two answers; the style sheet of the workbench hides the answer that is not chosen on a narrow screen.

export default function ({ parentElement, data }) {
  let list = parentElement.querySelector("[role=tablist]");
  if (!list) {
    list = document.createElement("div");
    list.className = "tabs";
    list.setAttribute("role", "tablist");
    list.setAttribute("aria-label", "Answers");
    for (const side of [0, 1]) {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.setAttribute("role", "tab");
      tab.addEventListener("click", () => choose(side));
      list.append(tab);
    }
    list.addEventListener("keydown", (event) => {
      const side = { ArrowLeft: 0, ArrowRight: 1 }[event.key];
      if (side === undefined) return;
      choose(side);
      list.children[side].focus();
    });
    parentElement.append(list);
  }
  function choose(side) {
    document.documentElement.dataset.answer = String(side);
    [...list.children].forEach((tab, number) => {
      tab.setAttribute("aria-selected", String(number === side));
      tab.tabIndex = number === side ? 0 : -1;
    });
  }
  data.names.forEach((name, side) => (list.children[side].textContent = name));
  choose(Number(document.documentElement.dataset.answer ?? 0));
}
