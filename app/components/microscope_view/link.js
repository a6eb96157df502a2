// A button that copies the address of what the page shows.

export default function ({ parentElement }) {
  if (parentElement.querySelector("button")) return;
  const button = element("button", "link", "Copy link");
  button.type = "button";
  const field = element("input", "address");
  field.readOnly = true;
  field.hidden = true;
  field.setAttribute("aria-label", "Address of this view");
  const said = element("span", "said");
  said.setAttribute("role", "status");
  let timer;
  button.addEventListener("click", async () => {
    const address = document.location.href;
    try {
      await navigator.clipboard.writeText(address);
      button.textContent = said.textContent = "Copied";
    } catch {
      // Browsers give scripts the clipboard only on https and on this machine itself.
      field.value = address;
      field.hidden = false;
      field.focus();
      field.select();
      said.textContent = "Copy the selected address";
    }
    clearTimeout(timer);
    timer = setTimeout(() => {
      button.textContent = "Copy link";
      said.textContent = "";
    }, 2500);
  });
  field.addEventListener("blur", () => (field.hidden = true));
  parentElement.append(button, field, said);
}
