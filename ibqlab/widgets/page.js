// A page whose marked elements answer: a click or Enter on [data-code] or [data-token] is told to the kernel.
function render({ model, el }) {
  const page = document.createElement("div");
  page.className = "ibq-page";
  const draw = () => {
    page.innerHTML = model.get("value");
  };
  const marked = (event) => event.target.closest("[data-code], [data-token]");
  const tell = (event) => {
    const chosen = marked(event);
    if (!chosen) return;
    const { code = "", token = "" } = chosen.dataset;
    model.send({ code, token, shift: event.shiftKey });
  };
  page.addEventListener("click", tell);
  page.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && marked(event) && event.target.tagName !== "BUTTON") tell(event);
  });
  model.on("change:value", draw);
  draw();
  el.append(page);
}
export default { render };
