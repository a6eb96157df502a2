// Runs when the showcase's page is loaded.
() => {
  // Whoever knows it can vote in this visitor's name: it is never shown, stored or sent back by the server.
  const bytes = crypto.getRandomValues(new Uint8Array(24));
  window.lbllmSecret = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

  const place = document.querySelector("#prompt textarea, #prompt input");
  if (place) place.dir = "auto";

  // Say what to do when the server does not answer; two times, because a busy one may be late.
  const banner = document.createElement("p");
  banner.id = "stopped";
  banner.setAttribute("role", "alert");
  let missed = 0;
  const look = async () => {
    let there = false;
    try {
      const answer = await fetch("gradio_api/app_id", { cache: "no-store", signal: AbortSignal.timeout(8000) });
      there = answer.ok;
    } catch {}
    missed = there ? 0 : missed + 1;
    if (missed >= 2) {
      banner.textContent =
        "The showcase has stopped. Whoever runs it starts it again with “lbllm showcase”; then reload this page.";
      document.body.append(banner);
    } else if (there) banner.remove();
  };
  setInterval(look, 5000);
}
