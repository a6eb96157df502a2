// What a course looks like at one moment, built anew from its state; course.js puts it in place with patch. Clicks are
// found by data-act, so that nothing here holds listeners. Pictures are drawn later, when their width is known.
"use strict";

const PARTS = ["idea", "guess", "scene", "figures", "check"];

// The parts that can be shown: the scene comes after the guess, and its figures and the check when it is there.
function partsOf(course, key) {
  const lesson = course.lessons.get(key);
  if (!lesson || !course.answer("guess", key)) return PARTS.slice(0, 2);
  return lesson.check ? PARTS : PARTS.slice(0, 3);
}

function courseView(course) {
  const { key, projector } = course.state;
  return element(
    "div",
    { class: projector ? "course projector" : "course", popover: projector ? "manual" : null },
    header(course),
    key === null ? listView(course) : lessonView(course, key),
    colophon(course),
    element("div", { class: "tip", "aria-hidden": "true", "data-own": true }),
  );
}

function header(course) {
  const { key, projector } = course.state;
  const steps = course.outline.map(([own, title], number) => {
    const words = [`Lesson ${number + 1}: ${title}`, ...["guess", "check"].map((kind) => verdict(course, kind, own))];
    const link = { href: course.host.address(own), "data-act": "open", "data-value": own, class: `step ${stateOf(course, own)}` };
    const label = words.filter(Boolean).join(", ");
    return element("li", {}, element("a", { ...link, "aria-label": label, title: title, "aria-current": own === key ? "page" : null }, String(number + 1)));
  });
  return element(
    "header",
    { class: "top" },
    key === null
      ? null
      : element("a", { class: "plain", href: course.host.address(null), "data-act": "list" }, "All lessons"),
    key === null ? null : element("nav", { "aria-label": "Lessons" }, element("ol", { class: "steps" }, steps)),
    key === null
      ? null
      : element("button", { type: "button", class: "plain", "data-act": "projector", "aria-pressed": String(projector) }, projector ? "Leave projector" : "Projector"),
  );
}

function stateOf(course, key) {
  const done = ["guess", "check"].filter((kind) => course.answer(kind, key));
  return done.length === 2 ? "done" : done.length ? "begun" : "open";
}

function verdict(course, kind, key) {
  const answer = course.answer(kind, key);
  return answer ? `${kind} ${answer.right === null ? "made" : answer.right ? "right" : "wrong"}` : "";
}

function listView(course) {
  const { outline, state } = course;
  const next = outline.find(([key]) => stateOf(course, key) !== "done");
  const begun = outline.some(([key]) => stateOf(course, key) !== "open");
  const cards = outline.map(([key, title], number) => {
    const marks = ["guess", "check"].map((kind) => {
      const answer = course.answer(kind, key);
      const look = answer && answer.right !== null ? (answer.right ? "right" : "wrong") : "none";
      return element("span", { class: `mark-${look}` }, `${{ right: "✓", wrong: "✗", none: "○" }[look]} ${kind}`);
    });
    return element(
      "li",
      {},
      element(
        "a",
        { class: `card ${stateOf(course, key)}`, href: course.host.address(key), "data-act": "open", "data-value": key },
        element("span", { class: "count" }, String(number + 1)),
        element("span", { class: "name" }, title),
        element("span", { class: "marks" }, marks),
      ),
    );
  });
  return element(
    "article",
    { class: "list", "data-key": "list" },
    element("h1", { tabindex: -1 }, course.title),
    element(
      "p",
      { class: "lead" },
      `How a language model can be stored in very few bits for each of its numbers: from one weight to a whole answer, in ` +
        `${outline.length} short lessons. In each you guess first, then look at the real numbers of a model ` +
        `(${course.checkpoint.teacher}), move something, and check what you understood.`,
    ),
    state.notice ? element("p", { class: "notice", role: "alert" }, state.notice) : null,
    begun ? score(course) : null,
    next
      ? element(
          "p",
          {},
          element(
            "a",
            { class: "go", href: course.host.address(next[0]), "data-act": "open", "data-value": next[0] },
            begun ? `Continue: ${next[1]}` : "Begin",
          ),
        )
      : null,
    element("ol", { class: "cards" }, cards),
    element("p", { class: "faint" }, course.memory.kept ? "Your progress is kept in this browser." : "This browser keeps no progress: it ends with this page."),
  );
}

// How many guesses and checks were right.
function score(course) {
  const rows = ["guess", "check"].map((kind) => {
    const given = course.outline.map(([key]) => course.answer(kind, key)).filter((answer) => answer && answer.right !== null);
    const right = given.filter((answer) => answer.right).length;
    const words = `${right} of ${given.length} ${{ guess: "guesses", check: "checks" }[kind]} right`;
    return element(
      "div",
      { class: "tally" },
      element("span", { class: "value" }, `${right} / ${course.outline.length}`),
      element("span", {}, words),
    );
  });
  return element(
    "div",
    { class: "score", role: "status" },
    rows,
    element("button", { type: "button", class: "plain", "data-act": "forget" }, "Start anew"),
  );
}

function lessonView(course, key) {
  const number = course.outline.findIndex(([own]) => own === key);
  const lesson = course.lessons.get(key);
  const { projector } = course.state;
  const parts = partsOf(course, key);
  const current = projector ? parts[Math.min(course.state.part, parts.length - 1)] : null;
  const part = (name, ...content) =>
    element("section", { class: `part ${name}${name === current ? " current" : ""}`, "data-part": name }, ...content);
  const guessed = lesson && course.answer("guess", key);
  return element(
    "article",
    { class: "lesson", "data-key": key },
    element(
      "div",
      { class: "heading" },
      element("p", { class: "count" }, `Lesson ${number + 1} of ${course.outline.length}`),
      element("h1", { tabindex: -1 }, course.outline[number][1]),
    ),
    lesson ? part("idea", element("p", { class: "lead" }, lesson.idea)) : waiting(course, key),
    lesson ? part("guess", question(course, "guess", lesson)) : null,
    guessed ? sceneView(course, lesson, part) : null,
    guessed && lesson.check ? part("check", question(course, "check", lesson), number === course.outline.length - 1 && course.answer("check", key) ? end(course) : null) : null,
    pager(course, number, parts),
  );
}

const end = (course) => element("div", { class: "end" }, element("h2", {}, "Your result"), score(course));

// What is shown while a lesson or its scene is computed, or where it can't be. ``lesson``: that of a scene.
function waiting(course, key, lesson) {
  const error = course.errors.get(key);
  if (error)
    return element(
      "div",
      { class: "notice", role: "alert" },
      element("p", {}, error),
      element("button", { type: "button", "data-act": "retry" }, "Try again"),
    );
  const { say, share = null, pictures = [] } = course.progress.get(key) ?? { say: "Computing this lesson from the model" };
  return element(
    "div",
    { class: "waiting" },
    element("p", { role: "status" }, say),
    element("progress", { max: 1, value: share, "aria-label": say }),
    lesson ? null : element("p", { class: "faint" }, "The first time, this is computed from the model; that can take a minute or longer."),
    element("div", { class: "pictures" }, pictureFrames(pictures, "progress")),
  );
}

const QUESTIONS = { guess: "Guess first", check: "Check" };

function question(course, kind, lesson) {
  const { text: words, options, right, because } = lesson[kind];
  const answer = course.answer(kind, lesson.key);
  const asked = kind === course.askedNow();
  const open = answer && right === null;
  const buttons = options.map((option, number) => {
    const mine = number === answer?.choice;
    const look = !answer ? "" : number === right ? " right" : mine ? (open ? " mine" : " wrong") : " other";
    const note = !answer ? "" : number === right ? "✓ right" : mine ? (open ? "your guess" : "✗ your answer") : "";
    return element(
      "button",
      {
        type: "button",
        class: `option${look}`,
        "data-act": kind,
        "data-value": number,
        "aria-disabled": answer ? "true" : null,
        "aria-pressed": answer ? String(number === answer.choice) : null,
      },
      element("kbd", { "aria-hidden": "true" }, asked ? String(number + 1) : ""),
      element("span", { dir: "auto" }, option),
      note ? element("span", { class: "note" }, note) : null,
    );
  });
  const label = `${kind}-text`;
  const result = open
    ? element("p", { class: "result" }, "Nobody knows yet: it is computed now. Watch it below.")
    : answer
    ? element(
        "p",
        { class: answer.right ? "result right" : "result wrong" },
        element("strong", {}, answer.right ? "Right. " : `Not quite: ${options[right]}. `),
        because,
      )
    : null;
  return element(
    "div",
    { class: "question" },
    element("h2", {}, QUESTIONS[kind]),
    element("p", { class: "asked", id: label }, words),
    element("div", { class: "options", role: "group", "aria-labelledby": label }, buttons),
    element("div", { "aria-live": "polite" }, result),
  );
}

function sceneView(course, lesson, part) {
  const error = course.errors.get(course.sceneName(lesson.key));
  const { scene, fresh } = course.shown(lesson);
  const link = lesson.inspect && course.host.inspect?.(lesson.inspect);
  const dials = lesson.dials.map((dial, number) => dialView(course, lesson, dial, number));
  if (!scene) return part("scene", element("h2", {}, lesson.check ? "Look" : "Watch"), waiting(course, course.sceneName(lesson.key), lesson));
  return element(
    "div",
    { class: fresh ? "look" : "look late", "aria-busy": String(!fresh) },
    part(
      "scene",
      element("h2", {}, lesson.dials.length ? "Look, and move" : "Look"),
      element(
        "div",
        { class: "stage" },
        element(
          "div",
          { class: "side" },
          dials,
          element("p", { class: "say", "aria-live": "polite" }, scene.say),
          error ? element("p", { class: "notice", role: "alert" }, error) : null,
          element(
            "dl",
            { class: "values" },
            scene.figures.map(({ label, text: value }) => element("div", {}, element("dt", {}, label), element("dd", {}, value))),
          ),
        ),
        element("div", { class: "pictures" }, pictureFrames(scene.pictures, "scene")),
      ),
    ),
    part(
      "figures",
      element("h2", {}, "How each figure is computed"),
      element(
        "div",
        { class: "formulas" },
        scene.figures.map((figure) =>
          element(
            "div",
            { class: "figure" },
            element("p", { class: "label" }, figure.label, element("strong", {}, figure.text)),
            figure.formula ? element("div", { class: "formula", tabindex: 0, role: "group", "aria-label": `Formula: ${figure.label}` }, formula(figure.formula)) : null,
            element("p", { class: "function" }, "computed by ", element("code", {}, figure.function)),
          ),
        ),
      ),
      link ? element("p", {}, element("a", { href: link, target: "_top" }, "See the same in Inspect")) : null,
    ),
  );
}

function pictureFrames(pictures, place) {
  return pictures.map((one, number) =>
    element(
      "figure",
      { class: `picture ${one.kind}`, "data-place": place, "data-number": number },
      element("figcaption", {}, one.label),
      element("div", { class: "drawing", "data-own": true }),
      KINDS[one.kind]?.table
        ? element("details", {}, element("summary", {}, "As a table"), element("div", { class: "scroll", "data-own": true, tabindex: 0, role: "group", "aria-label": `${one.label}, as a table` }))
        : null,
    ),
  );
}

// A few values are buttons of which one is chosen; many are a slider.
function dialView(course, lesson, dial, number) {
  const at = course.positions(lesson)[number];
  const name = `${lesson.key}-${dial.name}`;
  if (dial.values.length <= 5)
    return element(
      "fieldset",
      { class: "dial" },
      element("legend", {}, dial.label),
      element(
        "div",
        { class: "segments" },
        dial.values.map((value, position) =>
          element(
            "label",
            {},
            element("input", { type: "radio", name, value: position, checked: position === at, "data-dial": number }),
            element("span", { dir: "auto" }, value),
          ),
        ),
      ),
    );
  return element(
    "div",
    { class: "dial" },
    element("label", { for: name }, dial.label),
    element("output", { for: name }, dial.values[at]),
    element("input", { type: "range", id: name, min: 0, max: dial.values.length - 1, step: 1, value: at, "data-dial": number, "aria-valuetext": dial.values[at] }),
    element("span", { class: "ends", "aria-hidden": "true" }, element("span", {}, dial.values[0]), element("span", {}, dial.values.at(-1))),
  );
}

function pager(course, number, parts) {
  const { projector, part } = course.state;
  const [before, after] = [course.outline[number - 1], course.outline[number + 1]];
  const link = (one, words, side) =>
    element("a", { class: `turn ${side}`, href: course.host.address(one ? one[0] : null), "data-act": one ? "open" : "list", "data-value": one?.[0] }, element("span", { class: "faint" }, words), element("span", {}, one ? one[1] : "All lessons"));
  if (projector) {
    const at = Math.min(part, parts.length - 1);
    return element(
      "nav",
      { class: "pager", "aria-label": "Parts of the lesson" },
      element("button", { type: "button", class: "plain", "data-act": "back" }, "← Back"),
      element("span", { class: "faint" }, `${at + 1} / ${PARTS.length}`),
      element("button", { type: "button", class: "plain", "data-act": "forward" }, "Forward →"),
    );
  }
  return element(
    "nav",
    { class: "pager", "aria-label": "Previous and next lesson" },
    link(before, "← Previous", "before"),
    link(after, "Next →", "after"),
  );
}

function colophon(course) {
  const { checkpoint, date } = course;
  const hash = checkpoint.fingerprint;
  return element(
    "footer",
    { class: "colophon" },
    element(
      "p",
      {},
      `Computed from ${checkpoint.name}, and its full model ${checkpoint.teacher}.`,
      hash ? [" Hash of the binarized weights: ", element("code", { title: hash }, hash.slice(0, 16))] : null,
      date ? `. Made on ${date}.` : ".",
    ),
    course.state.key === null
      ? null
      : element("p", { class: "keys" }, "Keys: ", element("kbd", {}, "1"), ", ", element("kbd", {}, "2"), ", ", element("kbd", {}, "3"), " answer, ", element("kbd", {}, "n"), " and ", element("kbd", {}, "p"), " next and previous lesson, ", element("kbd", {}, "f"), " projector."),
  );
}
