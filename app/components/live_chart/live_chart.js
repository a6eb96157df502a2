// One Plotly figure that exists as long as its place on the page: Plotly.react puts new data into the same node, so
// zoom, pan and hidden traces are kept until layout.uirevision changes.

const STATE = Symbol("live chart");
let library;

function loadPlotly(source) {
  if (!library) {
    library = new Promise((resolve, reject) => {
      if (window.Plotly?.react) return resolve(window.Plotly);
      const script = document.createElement("script");
      // Page addresses have one level, so a relative address leads to the server's root, also behind a base path.
      script.src = new URL(source, document.location.href).href;
      script.onload = () => resolve(window.Plotly ?? window.moduleName);
      script.onerror = () => {
        library = undefined;
        reject(new Error("The chart library could not be loaded; reload the page."));
      };
      document.head.appendChild(script);
    });
  }
  return library;
}

// Replace the names of the theme's CSS properties by their values.
function painted(value, style) {
  if (typeof value === "string") return value.startsWith("--st-") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return typeof value.at(-1) === "number" ? value : value.map((item) => painted(item, style));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
  return value;
}

function create(parentElement) {
  const node = document.createElement("div");
  node.className = "live-chart";
  parentElement.appendChild(node);
  const state = { node, wanted: null, shown: null, busy: false, send: null };
  state.show = async () => {
    // Draw one figure at a time, with the newest data; a hidden tab draws when it becomes visible.
    if (state.busy || document.hidden || !state.wanted) return;
    const wanted = state.wanted;
    const style = getComputedStyle(node);
    const look = ["--st-text-color", "--st-background-color", "--st-font"].map((name) => style.getPropertyValue(name));
    const signature = wanted.text + look.join();
    if (signature === state.shown) return;
    state.busy = true;
    try {
      const { source, figure, stamp, label } = JSON.parse(wanted.text);
      node.setAttribute("aria-label", label);
      node.style.minHeight = `${figure.layout.height}px`;
      const Plotly = await loadPlotly(source);
      const first = state.shown === null;
      const { data, layout } = painted(figure, style);
      await Plotly.react(node, data, layout, figure.config);
      if (first) {
        node.on("plotly_click", ({ points: [point] }) =>
          state.send("click", { x: point.x, y: point.y, trace: point.data.uid }),
        );
        state.resize = new ResizeObserver(() => node.clientWidth && Plotly.Plots.resize(node));
        state.resize.observe(node);
      }
      // What is inside an image can't be reached by screen readers: only a chart without buttons is one.
      node.setAttribute("role", node.querySelector("a, button, [tabindex]") ? "group" : "img");
      state.shown = signature;
      node.dataset.stamp = stamp;
      node.dataset.updates = Number(node.dataset.updates ?? 0) + 1;
    } catch (error) {
      node.textContent = error.message;
    } finally {
      state.busy = false;
    }
    if (state.wanted !== wanted) state.show();
  };
  document.addEventListener("visibilitychange", state.show);
  return state;
}

export default function ({ parentElement, data, setTriggerValue }) {
  const state = (parentElement[STATE] ??= create(parentElement));
  state.send = setTriggerValue;
  state.wanted = { text: new TextDecoder().decode(data) };
  state.show();
  return () => {
    document.removeEventListener("visibilitychange", state.show);
    state.resize?.disconnect();
    window.Plotly?.purge(state.node);
  };
}
