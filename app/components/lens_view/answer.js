// A finished answer as plain text, with the word marked at which it parts from the other one. Text reaches the page as
// text nodes alone.

export default function ({ parentElement, data }) {
  let node = parentElement.querySelector(".text");
  if (!node) {
    node = document.createElement("div");
    node.className = "text";
    parentElement.appendChild(node);
  }
  const { text, at } = data;
  if (at === null) {
    node.replaceChildren(text);
    return;
  }
  const rest = text.slice(at);
  const word = rest.match(/^\s*\S+/)?.[0] ?? "";
  const mark = document.createElement("mark");
  mark.title = "Here the answers part";
  mark.textContent = word || "∎";
  node.replaceChildren(text.slice(0, at), mark, rest.slice(word.length));
}
