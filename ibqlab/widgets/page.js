// A page whose marked elements answer: a click or Enter on [data-code] or [data-token] is told to the kernel. A token's
// title is shown without delay, arrow keys lead from token to token, and the focus survives a redraw.
const MARKED = "[data-code], [data-token]";
const PATIENCE = 15000; // milliseconds after which the page says that no answer has come

function render({ model, el }) {
  const page = document.createElement("div");
  page.className = "ibq-page";
  page.dataset.lmSuppressShortcuts = "true"; // arrow keys and Enter are this page's, not the notebook's
  const tip = document.createElement("div");
  tip.className = "ibq-tip";
  tip.hidden = true;
  el.style.position = "relative";

  const marked = (event) => event.target.closest(MARKED);
  const identity = ({ dataset }) => (dataset.token ? `[data-token="${dataset.token}"]` : `[data-code="${dataset.code}"]`);

  let waiting;
  const answered = () => {
    clearTimeout(waiting);
    page.classList.remove("ibq-busy", "ibq-silent");
  };

  const draw = () => {
    const active = el.getRootNode().activeElement;
    const focused = active && page.contains(active) && (active.closest(MARKED) ?? page.querySelector("h3"));
    const place = focused && (focused.matches(MARKED) ? identity(focused) : "h3");
    page.innerHTML = model.get("value");
    answered();
    tip.hidden = true;
    for (const title of page.querySelectorAll("[data-token] > title")) {
      title.parentElement.dataset.tip = title.textContent;
      title.parentElement.setAttribute("aria-label", title.textContent);
      title.remove();
    }
    // What was followed may be gone: the heading then, so that Tab goes on from the new card.
    if (place) (page.querySelector(place) ?? page.querySelector("h3"))?.focus({ preventScroll: true });
  };

  const tell = (event) => {
    const chosen = marked(event);
    if (!chosen) return;
    const { code = "", token = "" } = chosen.dataset;
    answered();
    page.classList.add("ibq-busy");
    waiting = setTimeout(() => page.classList.add("ibq-silent"), PATIENCE);
    model.send({ code, token, shift: event.shiftKey });
  };

  const show = (event) => {
    const pointed = event.target.closest("[data-tip]");
    tip.hidden = !pointed;
    if (!pointed) return;
    tip.textContent = pointed.dataset.tip;
    const [outer, inner] = [el.getBoundingClientRect(), pointed.getBoundingClientRect()];
    const room = Math.max(0, outer.width - tip.offsetWidth);
    tip.style.left = `${Math.min(Math.max(0, inner.left - outer.left), room)}px`;
    tip.style.top = `${inner.bottom - outer.top + 6}px`;
  };

  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  page.addEventListener("click", tell);
  page.addEventListener("pointerover", show);
  page.addEventListener("focusin", show);
  page.addEventListener("pointerleave", () => (tip.hidden = true));
  page.addEventListener("focusout", () => (tip.hidden = true));
  page.addEventListener("keydown", (event) => {
    const chosen = marked(event);
    if (!chosen) return;
    if ((event.key === "Enter" || event.key === " ") && chosen.dataset.token) {
      event.preventDefault();
      tell(event);
    } else if (event.key in step && chosen.dataset.token) {
      event.preventDefault();
      const [down, right] = step[event.key];
      const [row, column] = chosen.dataset.token.split(",").map(Number);
      page.querySelector(`[data-token="${row + down},${column + right}"]`)?.focus();
    }
  });
  model.on("change:value", draw);
  model.on("msg:custom", answered);
  el.append(page, tip);
  draw();
}
export default { render };
