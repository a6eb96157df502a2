// The course: its state, what the reader does, and what the host brings. The host is a page that asks Python, or the
// files of a static site:
//   address(key)           the link to a lesson, or to the list for null
//   opened(key)            a lesson, or the list, is shown now
//   ask(key, positions)    a lesson (positions null) or one of its scenes is needed; the answer comes by bring...()
//   inspect(address)       the link to the page Inspect; absent where there is none
"use strict";

class Course {
  // facts: {title, checkpoint: {name, teacher, fingerprint}, date, outline: [[key, title]]}
  constructor(root, facts, host) {
    Object.assign(this, facts, { root, host });
    this.lessons = new Map();
    this.scenes = new Map();
    this.progress = new Map();
    this.errors = new Map();
    this.moved = new Map();
    this.last = new Map();
    this.memory = new Memory(`lbllm.course.${facts.checkpoint.fingerprint.slice(0, 16)}`);
    this.state = { key: null, projector: false, part: 0, notice: "" };
    this.stop = new AbortController();
    root.classList.add("course-root");
    const { signal } = this.stop;
    root.addEventListener("click", (event) => this.clicked(event), { signal });
    root.addEventListener("input", (event) => this.turned(event), { signal });
    root.addEventListener("toggle", () => this.draw(), { signal, capture: true });
    root.addEventListener("pointermove", (event) => this.point(event), { signal });
    root.addEventListener("pointerdown", (event) => this.point(event), { signal });
    root.addEventListener("pointerleave", () => this.point(null), { signal });
    document.addEventListener("keydown", (event) => this.pressed(event), { signal });
    this.width = 0;
    this.resize = new ResizeObserver(() => {
      if (root.clientWidth !== this.width) this.draw();
    });
    this.resize.observe(root);
  }

  close() {
    this.stop.abort();
    this.resize.disconnect();
  }

  // --- what is shown ---

  show(key) {
    const known = key === null || this.outline.some(([own]) => own === key);
    this.state.notice = known ? "" : `There is no lesson “${key}”. Choose one of these.`;
    const changed = this.state.key !== (known ? key : null);
    this.state.key = known ? key : null;
    if (changed) this.state.part = 0;
    if (this.state.key === null && this.state.projector) this.project(false);
    this.render();
    this.need();
    if (changed && this.rendered) {
      const heading = this.root.querySelector("h1");
      heading?.focus({ preventScroll: true });
      this.root.scrollIntoView({ block: "start" });
      this.root.querySelector(".course").scrollTop = 0;
    }
    this.rendered = true;
  }

  go(key) {
    this.host.opened(key);
    this.show(key);
  }

  render() {
    const fresh = courseView(this);
    const shown = this.root.querySelector(".course");
    if (shown) patch(shown, fresh);
    else this.root.append(fresh);
    this.draw();
  }

  // Draw all pictures, on a projector as large as they fit on the screen.
  draw() {
    this.width = this.root.clientWidth;
    if (!this.state.projector) return this.drawAll();
    const [course, stage] = [".course", ".stage"].map((name) => this.root.querySelector(name));
    for (const share of [1, 0.85, 0.7, 0.6, 0.5]) {
      stage?.style.setProperty("--fit", share);
      this.drawAll();
      const tables = [...this.root.querySelectorAll(".drawing .scroll")];
      if ([course, ...tables].every((node) => node.scrollHeight <= node.clientHeight && node.scrollWidth <= node.clientWidth)) break;
    }
  }

  // Draw the pictures for the width that they have, and the tables that are open.
  drawAll() {
    for (const frame of this.root.querySelectorAll("figure.picture")) {
      const one = this.pictureOf(frame);
      if (!one) continue;
      const place = frame.querySelector(".drawing");
      const width = place.clientWidth;
      const kind = KINDS[one.kind];
      if (!width || !kind) continue;
      const em = Number.parseFloat(getComputedStyle(place).fontSize);
      patchChildren(place, kind.draw(one.data, width, em, `${one.label}: ${kind.words(one.data)}`));
      const details = frame.querySelector("details");
      if (details?.open) patchChildren(details.querySelector("div"), [tableOf(kind.table(one.data))]);
    }
  }

  pictureOf(frame) {
    const { key } = this.state;
    const number = Number(frame.dataset.number);
    if (frame.dataset.place === "scene") return this.shown(this.lessons.get(key)).scene?.pictures[number];
    return (this.progress.get(key) ?? this.progress.get(this.sceneName(key)))?.pictures?.[number];
  }

  positions(lesson) {
    return this.moved.get(lesson.key) ?? lesson.dials.map((dial) => dial.start);
  }

  sceneName(key, positions = this.positions(this.lessons.get(key) ?? { key, dials: [] })) {
    return `${key}/${positions.join(",")}`;
  }

  // The scene at the dials' positions; as long as it is not there, the one before.
  shown(lesson) {
    const scene = this.scenes.get(this.sceneName(lesson.key));
    if (scene) this.last.set(lesson.key, scene);
    return { scene: scene ?? this.last.get(lesson.key), fresh: Boolean(scene) };
  }

  // Ask the host for what is shown and not there yet. A scene is asked for before the guess, so that it does not wait,
  // unless what is guessed happens after the guess: then the lesson has no check yet.
  need() {
    const { key } = this.state;
    if (key === null) return;
    const lesson = this.lessons.get(key);
    if (!lesson) {
      if (!this.errors.has(key)) this.host.ask(key, null);
    } else if (lesson.check || this.answer("guess", key)) {
      const name = this.sceneName(key);
      if (!this.scenes.has(name) && !this.errors.has(name)) this.host.ask(key, this.positions(lesson));
    }
  }

  // --- what the host brings ---

  // Keep a lesson; answers that were given before anybody could know are scored.
  know(lesson) {
    this.lessons.set(lesson.key, lesson);
    for (const kind of ["guess", "check"]) {
      const answer = this.answer(kind, lesson.key);
      const right = lesson[kind]?.right ?? null;
      if (answer?.right === null && right !== null) this.memory.set(kind, lesson.key, { choice: answer.choice, right: answer.choice === right });
    }
  }

  bringLesson(lesson) {
    this.know(lesson);
    this.progress.delete(lesson.key);
    for (const [positions, scene] of Object.entries(lesson.scenes ?? {})) this.scenes.set(`${lesson.key}/${positions}`, scene);
    this.render();
    this.need();
  }

  // With its lesson, which may be complete now.
  bringScene(key, positions, scene, lesson) {
    if (lesson) this.know(lesson);
    this.scenes.set(this.sceneName(key, positions), scene);
    this.progress.delete(this.sceneName(key, positions));
    this.render();
    this.need();
  }

  bringProgress(key, positions, progress) {
    this.progress.set(positions ? this.sceneName(key, positions) : key, progress);
    this.render();
  }

  bringError(key, positions, message) {
    this.errors.set(positions ? this.sceneName(key, positions) : key, message);
    this.render();
  }

  // --- what the reader does ---

  answer(kind, key) {
    return this.memory.get(kind, key);
  }

  // The question that a digit answers now.
  askedNow() {
    const { key, projector, part } = this.state;
    const lesson = this.lessons.get(key);
    if (!lesson) return null;
    const kind = this.answer("guess", key) ? "check" : "guess";
    if (!lesson[kind] || this.answer(kind, key)) return null;
    const parts = partsOf(this, key);
    return !projector || parts[Math.min(part, parts.length - 1)] === kind ? kind : null;
  }

  choose(kind, choice) {
    const lesson = this.lessons.get(this.state.key);
    if (!lesson || this.answer(kind, lesson.key) || choice >= lesson[kind].options.length) return;
    const { right } = lesson[kind];
    this.memory.set(kind, lesson.key, { choice, right: right === null ? null : choice === right });
    this.render();
    this.need();
    if (kind === "guess" && !this.state.projector) this.reveal();
  }

  // Scroll the scene into view, with the answer to the guess above it.
  reveal() {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.root.querySelector(".part.guess").scrollIntoView({ block: "start", behavior: still ? "auto" : "smooth" });
  }

  clicked(event) {
    const node = event.target.closest("[data-act]");
    if (!node || (node.href && (event.ctrlKey || event.metaKey || event.shiftKey || event.button))) return;
    const { act, value } = node.dataset;
    event.preventDefault();
    if (act === "guess" || act === "check") this.choose(act, Number(value));
    else if (act === "open") this.go(value);
    else if (act === "list") this.go(null);
    else if (act === "projector") this.project(!this.state.projector);
    else if (act === "forward") this.step(1);
    else if (act === "back") this.step(-1);
    else if (act === "forget") this.forget();
    else if (act === "retry") this.retry();
  }

  forget() {
    this.memory.clear();
    this.moved.clear();
    this.render();
  }

  retry() {
    this.errors.clear();
    this.render();
    this.need();
  }

  turned(event) {
    const number = Number(event.target.dataset.dial);
    const lesson = this.lessons.get(this.state.key);
    if (!lesson || !(number >= 0)) return;
    const positions = [...this.positions(lesson)];
    positions[number] = Number(event.target.value);
    this.moved.set(lesson.key, positions);
    this.render();
    this.need();
  }

  neighbour(by) {
    const at = this.outline.findIndex(([key]) => key === this.state.key);
    return this.outline[at + by]?.[0];
  }

  // One part further or back; past the ends, the next or the previous lesson.
  step(by) {
    const parts = partsOf(this, this.state.key);
    const at = Math.min(this.state.part, parts.length - 1) + by;
    if (at >= 0 && at < parts.length) {
      this.state.part = at;
      this.render();
    } else if (this.neighbour(by) && (at < 0 || parts.length === PARTS.length)) {
      this.go(this.neighbour(by));
      if (by < 0) this.state.part = partsOf(this, this.state.key).length - 1;
      this.render();
    }
  }

  // Large type over the whole window; the top layer, so that nothing of the page around it shows.
  project(on) {
    this.state.projector = on;
    this.state.part = 0;
    this.render();
    if (on) this.root.querySelector(".course").showPopover?.();
    this.draw();
    this.root.querySelector("h1").focus({ preventScroll: true });
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || !this.root.isConnected) return;
    const target = event.composedPath()[0];
    const typed = target.closest?.("textarea, select, [contenteditable], input:not([type=radio], [type=range])");
    if (typed || this.state.key === null) return;
    const { projector } = this.state;
    const onDial = target.matches?.("input") ?? false;
    const turn = { PageDown: 1, PageUp: -1, ...(onDial ? {} : { ArrowRight: 1, ArrowLeft: -1 }) }[event.key];
    const lesson = { n: 1, p: -1 }[event.key] ?? (projector ? undefined : event.key.startsWith("Arrow") && turn);
    const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
    if (digit && this.askedNow()) this.choose(this.askedNow(), digit - 1);
    else if (event.key === "f") this.project(!projector);
    else if (event.key === "Escape" && projector) this.project(false);
    else if (projector && turn) this.step(turn);
    else if (lesson && this.neighbour(lesson)) this.go(this.neighbour(lesson));
    else return;
    event.preventDefault();
  }

  // The value under the pointer, beside it.
  point(event) {
    const tip = this.root.querySelector(".tip");
    if (!tip) return;
    const target = event?.target.closest?.("[data-tip], [data-grid]");
    let words = target?.dataset.tip;
    if (target?.dataset.grid) {
      const one = this.pictureOf(target.closest("figure"));
      const box = target.closest("svg").getBoundingClientRect();
      words = KINDS[one.kind].at(one.data, target, event.clientX - box.left, event.clientY - box.top);
    }
    tip.classList.toggle("shown", Boolean(words));
    if (!words) return;
    tip.textContent = words;
    const box = tip.parentElement.getBoundingClientRect();
    const x = Math.min(Math.max(event.clientX - box.left, tip.offsetWidth / 2), box.width - tip.offsetWidth / 2);
    tip.style.transform = `translate(${x}px,${event.clientY - box.top + tip.parentElement.scrollTop}px) translate(-50%,calc(-100% - 0.8em))`;
  }
}

// The reader's answers, in the browser's storage; where it is refused, as long as the page is open. ``right`` is null
// until it is known.
class Memory {
  constructor(name) {
    this.name = name;
    this.answers = {};
    this.kept = true;
    try {
      const found = JSON.parse(localStorage.getItem(name) ?? "{}");
      if (found && typeof found === "object") this.answers = found;
    } catch (error) {
      this.kept = error instanceof SyntaxError;
    }
  }

  get(kind, key) {
    const answer = this.answers[kind]?.[key];
    return typeof answer?.right === "boolean" || answer?.right === null ? answer : null;
  }

  set(kind, key, answer) {
    (this.answers[kind] ??= {})[key] = answer;
    this.keep(JSON.stringify(this.answers));
  }

  clear() {
    this.answers = {};
    this.keep("{}");
  }

  keep(text) {
    try {
      localStorage.setItem(this.name, text);
    } catch {
      this.kept = false;
    }
  }
}
