// Draws the points of a map into the scatter plot beside it. Each step is fetched from the kernel once; a step that
// comes while another is drawn waits, and of several that wait only the newest is drawn.
const KEPT_BYTES = 2 ** 28;
const STILL = 60000; // more points than this jump to their places
const EVERY = 5000;

function bytes(view, Kind) {
  return new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function render({ model, el }) {
  const places = new Map(); // frame → { xy, index }
  const looks = new Map(); // frame|coloring → Uint8Array
  let plot, box, shown, drawnFrame, busy = false, asked, since = performance.now(), ended = false, version;

  const wanted = () => `${model.get("frame")}|${model.get("coloring")}`;

  const find = () => {
    if (ended) return;
    box = el.closest(".ibqlab-map-canvas");
    plot = box?.querySelector("canvas")?.parentElement?.parentElement?.api;
    if (plot) {
      tellTheme();
      paint();
    } else requestAnimationFrame(find);
  };

  const trim = () => {
    const size = [...places.values()].reduce((sum, one) => sum + 3 * one.xy.byteLength, 0);
    if (size > KEPT_BYTES) places.delete(places.keys().next().value);
    if (looks.size > 200) looks.delete(looks.keys().next().value);
  };

  const ask = (frame, coloring, next = false) => {
    model.send({ want: frame, coloring, places: !places.has(frame), next });
  };

  const draw = async (frame, key) => {
    const place = places.get(frame), look = looks.get(key), count = look.length, most = model.get("looks") - 1;
    const points = new Array(count);
    for (let i = 0; i < count; i++) points[i] = [place.xy[2 * i], place.xy[2 * i + 1], look[i] / most, 0];
    const moves = drawnFrame !== undefined && drawnFrame !== frame && count <= STILL;
    await plot.draw(points, {
      zDataType: "continuous",
      wDataType: "continuous",
      transition: moves,
      transitionDuration: 500,
      transitionEasing: "quadInOut",
      preventFilterReset: drawnFrame !== undefined && plot.get("points").length === count,
      spatialIndex: place.index,
    });
    place.index = plot.get("spatialIndex");
  };

  const paint = async () => {
    if (busy || !plot || ended) return;
    busy = true;
    try {
      if (version !== model.get("version")) {
        version = model.get("version");
        places.clear();
        looks.clear();
        shown = drawnFrame = asked = undefined;
      }
      while (!ended && shown !== wanted()) {
        const key = wanted(), frame = model.get("frame");
        if (!looks.has(key) || !places.has(frame)) {
          if (asked !== key) ask(frame, model.get("coloring"));
          asked = key;
          return;
        }
        try {
          await draw(frame, key);
        } catch (error) {
          // The plot is still busy with what it drew first.
          await new Promise((done) => setTimeout(done, 50));
          continue;
        }
        shown = key;
        drawnFrame = frame;
        asked = undefined;
        Object.assign(box.dataset, { drawn: frame, wait: performance.now() - since, coloring: model.get("coloring") });
        prefetch(frame);
      }
    } finally {
      busy = false;
    }
  };

  // The neighbours of a step come before they are asked for, one after another.
  const prefetch = (frame) => {
    for (const next of [frame + 1, frame - 1]) {
      if (next < 0 || next >= model.get("frames") || looks.has(`${next}|${model.get("coloring")}`)) continue;
      ask(next, model.get("coloring"), true);
      return;
    }
  };

  const hear = (message, buffers) => {
    if (message.version !== model.get("version")) return;
    if (message.places) places.set(message.frame, { xy: bytes(buffers[1], Float32Array) });
    looks.set(`${message.frame}|${message.coloring}`, bytes(buffers[0], Uint8Array));
    if (box) box.dataset.kernel = message.kernel_ms;
    trim();
    if (message.next) prefetch(drawnFrame ?? message.frame);
    paint();
  };

  const changed = () => {
    since = performance.now();
    paint();
  };

  const tellTheme = () => {
    let light = document.body.dataset.jpThemeLight;
    if (light === undefined) {
      const parts = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [];
      light = parts.length < 3 || parts[3] === 0 || parts[0] + parts[1] + parts[2] > 382 ? "true" : "false";
    }
    model.send({ dark: light === "false" });
  };

  const themes = new MutationObserver(tellTheme);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  const looking = setInterval(() => model.get("watching") && model.send({ look: true }), EVERY);
  for (const name of ["frame", "coloring", "version"]) model.on(`change:${name}`, changed);
  model.on("msg:custom", hear);
  find();
  return () => {
    ended = true;
    themes.disconnect();
    clearInterval(looking);
    for (const name of ["frame", "coloring", "version"]) model.off(`change:${name}`, changed);
    model.off("msg:custom", hear);
  };
}
export default { render };
