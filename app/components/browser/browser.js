// Remembers that the tour was shown, and says what to do when the server does not answer.

const YEAR = 365 * 86400;
const PAUSE = 3000;
const WAIT = 8000;

function banner() {
  const node = document.createElement("div");
  node.id = "lbllm-stopped";
  node.setAttribute("role", "alert");
  node.style.cssText =
    "position:fixed;inset:0 0 auto;z-index:10000000;padding:.7rem 1rem;background:#8a2b06;color:#fff;" +
    "font:600 1rem/1.5 system-ui,sans-serif;text-align:center";
  node.textContent =
    "The workbench has stopped. Start it again with “make run” or “python -m lbllm ui”; this page then connects by " +
    "itself. Runs continue without it.";
  return node;
}

function watch() {
  let missed = 0;
  let shown = null;
  return setInterval(async () => {
    let there = false;
    try {
      const answer = await fetch("/_stcore/health", { cache: "no-store", signal: AbortSignal.timeout(WAIT) });
      there = answer.ok;
    } catch {
      // Not there.
    }
    // A busy server may be late once.
    missed = there ? 0 : missed + 1;
    if (missed >= 2 && !shown) document.body.append((shown = banner()));
    if (there && shown) {
      shown.remove();
      shown = null;
    }
  }, PAUSE);
}

export default function ({ data }) {
  if (data.tour) document.cookie = `${data.tour}=shown; Path=/; Max-Age=${YEAR}; SameSite=Lax`;
  window.lbllmWatch ??= watch();
}
