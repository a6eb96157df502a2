// A finished answer as plain text, with the word marked at which it parts from the other one. Text reaches the page as
// text nodes alone.

export default function ({ parentElement, data }) {
  let node = parentElement.querySelector(".text");
  if (!node) {
    node = document.createElement("div");
    node.className = "text";
    parentElement.appendChild(node);
  }
  const { text, at, label } = data;
  node.replaceChildren();
  if (!text) {
    const empty = document.createElement("span");
    empty.className = "empty";
    empty.textContent = data.empty;
    node.append(empty);
    return;
  }
  if (at === null) {
    node.append(text);
    return;
  }
  const rest = text.slice(at);
  const word = rest.match(/^\s*\S+/)?.[0] ?? "";
  const mark = document.createElement("mark");
  mark.title = label;
  mark.textContent = word || "∎";
  node.append(text.slice(0, at), mark, rest.slice(word.length));
}
