// A finished answer as plain text; the first word that differs from the other answer is marked. All text is added as
// text nodes.

export default function ({ parentElement, data }) {
  let node = parentElement.querySelector(".text");
  if (!node) {
    node = document.createElement("div");
    node.className = "text";
    node.dir = "auto";
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
  mark.title = "The answers begin to differ here";
  mark.textContent = word || "∎";
  node.replaceChildren(text.slice(0, at), mark, rest.slice(word.length));
}
