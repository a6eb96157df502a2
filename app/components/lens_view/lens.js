// The lens: a text with coloured tokens; the panel beside it shows details of the token under the pointer, or of the
// token chosen with the arrow keys. All strings of models are added as text nodes.

const STATE = Symbol("lens");

// With ``go``, called with a row's number, a row whose token is a text is a button.
function bars(kind, name, candidates, own, token, go) {
  const box = element("div", kind);
  const who = element("div", "who", name);
  who.append(element("span", "", `, this token ${percent(own)}`));
  box.append(who);
  candidates.forEach(([text, probability, special], rank) => {
    const row = tokenRow(text, probability, text === token);
    if (go && !special) {
      row.setAttribute("role", "button");
      row.setAttribute("tabindex", "0");
      row.setAttribute("aria-label", `Go on with ${shown(text)}, ${percent(probability)}`);
      row.title = "Both models go on from here with this token";
      row.addEventListener("click", () => go(rank));
      row.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        go(rank);
      });
    }
    box.append(row);
  });
  return box;
}

function create(parentElement) {
  const legend = element("div", "legend");
  const body = element("div", "lens");
  const text = element("div", "text");
  const panel = element("div", "panel");
  panel.setAttribute("aria-live", "polite");
  text.setAttribute("role", "group");
  text.dir = "auto";
  body.append(text, panel);
  parentElement.append(legend, body);
  const state = { legend, text, panel, at: 0, data: null, drawn: null, send: null };

  state.choose = (number, focus) => {
    const nodes = text.children;
    if (!nodes.length) return;
    nodes[state.at]?.classList.remove("here");
    nodes[state.at]?.setAttribute("tabindex", "-1");
    state.at = Math.min(Math.max(number, 0), nodes.length - 1);
    const node = nodes[state.at];
    node.classList.add("here");
    node.setAttribute("tabindex", "0");
    if (focus) node.focus({ preventScroll: false });
    const { tokens, names } = state.data;
    const token = tokens[state.at];
    panel.replaceChildren(element("div", "headline", shown(token.text)));
    if (token.kl === null) {
      panel.append(element("div", "small", "This is the first token. No text comes before it, so the models expected nothing."));
      return;
    }
    panel.append(element("div", "small", `Divergence ${token.kl.toFixed(token.kl < 0.1 ? 3 : 2)} nats`));
    const go = (side) => (state.data.go ? (rank) => state.send([state.at, side, rank]) : null);
    panel.append(bars("teacher", names[0], token.teacher, token.p, token.text, go(0)));
    panel.append(bars("student", names[1], token.student, token.q, token.text, go(1)));
    if (state.data.go) panel.append(element("div", "hint", "Click a token: both models go on from there."));
  };
  const number = (event) => {
    const node = event.target.closest?.(".token");
    return node ? Number(node.dataset.number) : -1;
  };
  text.addEventListener("mouseover", (event) => number(event) >= 0 && state.choose(number(event), false));
  text.addEventListener("click", (event) => number(event) >= 0 && state.choose(number(event), true));
  text.addEventListener("focusin", (event) => number(event) >= 0 && state.choose(number(event), false));
  text.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    state.choose(state.at + steps[event.key], true);
  });
  return state;
}

export default function ({ parentElement, data, setTriggerValue }) {
  const state = (parentElement[STATE] ??= create(parentElement));
  state.send = (value) => setTriggerValue("go", value);
  const signature = JSON.stringify(data);
  if (signature === state.drawn) return;
  state.drawn = signature;
  state.data = data;
  state.text.setAttribute("aria-label", data.label);
  state.legend.replaceChildren(
    ...data.legend.map(([className, text]) => {
      const item = element("span", "");
      item.append(element("span", `swatch ${className}`), text);
      return item;
    }),
    element("span", "line", data.parted),
  );
  state.text.replaceChildren(
    ...data.tokens.map((token, number) => {
      const bare = token.text ? "" : " bare";
      const node = element("span", `token k${token.step}${token.agreed ? "" : " parted"}${bare}`, token.text);
      node.dataset.number = number;
      node.setAttribute("tabindex", "-1");
      return node;
    }),
  );
  state.at = 0;
  state.choose(data.start, false);
}
