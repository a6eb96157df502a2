// The course on the page Learn: Course (lbllm/course/static) stands above this text. What it needs is asked of Python,
// one question at a time; a moved dial replaces a question that waits. The page's address has the lesson.

const STATE = Symbol("learn");
const POLL = 400; // ms between two questions for what is being computed
const PATIENCE = 20_000; // ms after which a question is asked again

function here() {
  return new URLSearchParams(location.search).get("lesson");
}

function address(key) {
  const place = new URL(location.href);
  if (key === null) place.searchParams.delete("lesson");
  else place.searchParams.set("lesson", key);
  return place.pathname + place.search;
}

function start(parentElement, facts) {
  const root = document.createElement("div");
  // What stays in sight while the page scrolls stays below its bar.
  root.style.setProperty("--sticky", "3.75rem");
  parentElement.append(root);
  const state = { root, send: null, wanted: null, asked: null, turn: 0, timer: 0, stop: new AbortController() };

  state.next = () => {
    clearTimeout(state.timer);
    if (state.asked || !state.wanted) return;
    state.turn += 1;
    state.asked = { ...state.wanted, turn: `${state.turn}/${Date.now()}` };
    state.send("asked", state.asked);
    state.timer = setTimeout(() => {
      state.asked = null;
      state.next();
    }, PATIENCE);
  };
  state.answered = ({ key, positions, turn, lesson, scene, progress, error }) => {
    if (turn !== state.asked?.turn) return;
    state.asked = null;
    clearTimeout(state.timer);
    const still = state.wanted?.key === key && String(state.wanted.positions) === String(positions);
    if (progress) {
      state.course.bringProgress(key, positions, progress);
      state.timer = setTimeout(state.next, still ? POLL : 0);
      return;
    }
    if (still) state.wanted = null;
    if (error) state.course.bringError(key, positions, error);
    else if (scene) state.course.bringScene(key, positions, scene, lesson);
    else state.course.bringLesson(lesson);
    state.next();
  };
  const host = {
    address,
    opened(key) {
      if (here() !== key) history.pushState(null, "", address(key));
      state.wanted = null;
    },
    ask(key, positions) {
      state.wanted = { key, positions };
      state.next();
    },
    inspect: (address) => `inspect?at=${encodeURIComponent(address).replaceAll("%2F", "/")}`,
  };
  state.course = new Course(root, facts, host);
  window.addEventListener("popstate", () => state.course.show(here()), { signal: state.stop.signal });
  return state;
}

export default function ({ parentElement, data, setTriggerValue }) {
  const { facts, answer } = JSON.parse(new TextDecoder().decode(data));
  const first = !parentElement[STATE];
  const state = (parentElement[STATE] ??= start(parentElement, facts));
  state.send = setTriggerValue;
  if (first) state.course.show(here());
  if (answer) state.answered(answer);
  return () => {
    state.stop.abort();
    clearTimeout(state.timer);
    state.course.close();
    delete parentElement[STATE];
  };
}
