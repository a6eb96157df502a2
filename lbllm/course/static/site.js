// The course as a site of files: data/course.js has defined COURSE, data/<lesson>.js calls lessonData. No server, no
// other site is asked: scripts, unlike data, may also be read from a page that was opened by a double click.
"use strict";

const site = {
  address: (key) => (key === null ? "#" : `#${key}`),
  opened(key) {
    if (this.here() !== key) location.hash = key ?? "";
  },
  here() {
    return decodeURIComponent(location.hash.slice(1)) || null;
  },
  ask(key) {
    const script = element("script", { src: `data/${key}.js`, charset: "utf-8" });
    script.onerror = () => {
      script.remove();
      course.bringError(key, null, `The file data/${key}.js can't be read. Keep all files of this course together, then try again.`);
    };
    document.head.append(script);
  },
};

const course = new Course(document.getElementById("course"), COURSE, site);

// Scenes name their pictures by numbers: many have the same ones.
function lessonData(lesson) {
  for (const scene of Object.values(lesson.scenes)) scene.pictures = scene.pictures.map((number) => lesson.pictures[number]);
  course.bringLesson(lesson);
}

window.addEventListener("hashchange", () => course.state.key === site.here() || course.show(site.here()));
course.show(site.here());
