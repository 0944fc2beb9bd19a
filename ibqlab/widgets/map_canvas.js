// Draws the points of a map into the scatter plot beside it. Each step is fetched from the kernel once; a step that
// comes while another is drawn waits, and of several that wait only the newest is drawn. Where a drawing takes long, as
// without a graphics card, a sample answers at once and all points follow when the hand rests.
const KEPT_BYTES = 2 ** 28;
const STILL = 60000; // more points than this jump to their places
const SAMPLE = 20000;
const LONG = 150; // milliseconds
const REST = 900;
const EVERY = 5000;

function bytes(view, Kind) {
  return new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function render({ model, el }) {
  const places = new Map(); // frame → { xy, index }
  const looks = new Map(); // frame|coloring → Uint8Array
  let distance = 1, plot, box, shown, drawnFrame, busy = false, asked, since = performance.now(), ended = false, version;
  let isSlow = false, isThin = false, resting, lasted = 0;

  const wanted = () => `${model.get("frame")}|${model.get("coloring")}`;

  const find = () => {
    if (ended) return;
    box = el.closest(".ibqlab-map-canvas");
    plot = box?.querySelector("canvas")?.parentElement?.parentElement?.api;
    if (plot) {
      box.querySelector("canvas").addEventListener("click", () => thin(plot.get("points").length));
      tellTheme();
      widths.observe(box);
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

  const pointsOf = (frame, key) => {
    const { xy } = places.get(frame), look = looks.get(key), most = model.get("looks") - 1;
    const points = new Array(look.length);
    for (let i = 0; i < look.length; i++) points[i] = [xy[2 * i], xy[2 * i + 1], look[i] / most, 0];
    return points;
  };

  const draw = async (frame, key, whole = false) => {
    const place = places.get(frame), points = pointsOf(frame, key), isFirst = drawnFrame === undefined;
    const isSample = !whole && !isFirst && thin(points.length);
    const began = performance.now();
    await plot.draw(points, {
      zDataType: "continuous",
      wDataType: "continuous",
      transition: !whole && !isFirst && drawnFrame !== frame && points.length <= STILL,
      transitionDuration: 500,
      transitionEasing: "quadInOut",
      preventFilterReset: isSample,
      // Of other places it finds fewer points under the mouse, never wrong ones; the whole drawing brings its own.
      spatialIndex: place.index ?? (isSample ? plot.get("spatialIndex") : undefined),
    });
    if (!isSample) {
      place.index = plot.get("spatialIndex");
      isThin = false;
      lasted = performance.now() - began;
      isSlow = points.length > STILL && lasted > LONG;
    }
  };

  // Leave all but a sample and what is selected undrawn for a while; false where that helps nothing.
  const thin = (count) => {
    if (!isSlow || count <= STILL) return false;
    clearTimeout(resting);
    resting = setTimeout(rest, Math.max(REST, 2 * lasted));
    if (isThin) return true;
    const shownPoints = new Set(plot.get("selectedPoints"));
    if (shownPoints.size > SAMPLE) return false;
    for (let i = 0; i < count; i += Math.ceil(count / SAMPLE)) shownPoints.add(i);
    plot.filter([...shownPoints].sort((a, b) => a - b), { preventEvent: true });
    return (isThin = true);
  };

  const rest = async () => {
    if (ended || !isThin) return;
    if (busy || shown !== wanted()) {
      resting = setTimeout(rest, REST);
      return;
    }
    busy = true;
    try {
      await draw(drawnFrame, shown, true);
      box.dataset.whole = drawnFrame;
    } catch (error) {
      resting = setTimeout(rest, REST);
    } finally {
      busy = false;
    }
    paint();
  };

  const paint = async () => {
    if (busy || !plot || ended) return;
    busy = true;
    let tries = 0;
    try {
      if (version !== model.get("version")) {
        version = model.get("version");
        places.clear();
        looks.clear();
        shown = drawnFrame = asked = undefined;
        isThin = isSlow = false;
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
          if (++tries > 1000) throw error;
          await new Promise((done) => setTimeout(done, 50));
          continue;
        }
        shown = key;
        drawnFrame = frame;
        asked = undefined;
        Object.assign(box.dataset, { drawn: frame, wait: performance.now() - since, coloring: model.get("coloring") });
        if (!isThin) box.dataset.whole = frame;
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

  // The plot's own buttons follow its background, but not where that changed before they were there.
  const turnButtons = (dark) => {
    const bar = box?.querySelector("canvas")?.parentElement?.parentElement?.parentElement?.parentElement?.firstElementChild;
    for (const part of bar?.querySelectorAll("*") ?? []) {
      const [red, green, blue, alpha = 1] = getComputedStyle(part).backgroundColor.match(/[\d.]+/g).map(Number);
      if (!alpha) continue;
      bar.style.filter = red + green + blue > 382 === dark ? "invert(0.93) hue-rotate(180deg)" : "";
      return;
    }
  };

  const tellTheme = () => {
    let light = document.body.dataset.jpThemeLight;
    if (light === undefined) {
      const parts = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g)?.map(Number) ?? [];
      light = parts.length < 3 || parts[3] === 0 || parts[0] + parts[1] + parts[2] > 382 ? "true" : "false";
    }
    for (const wait of [0, 300, 1500]) setTimeout(() => turnButtons(light === "false"), wait);
    model.send({ dark: light === "false" });
  };

  // A canvas that is taller than wide shows less than −1 to 1 across: the camera steps back.
  const widths = new ResizeObserver(() => {
    const { clientWidth, clientHeight } = box.querySelector("canvas");
    const needed = clientWidth ? Math.max(1, clientHeight / clientWidth) : distance;
    if (needed !== distance) plot.set({ cameraDistance: (distance = needed) });
  });
  const themes = new MutationObserver(tellTheme);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  // While there is no map the plot is hidden, and the kernel still wants to know when there is one.
  const looking = setInterval(() => model.get("watching") && model.send({ look: true }), EVERY);
  for (const name of ["frame", "coloring", "version"]) model.on(`change:${name}`, changed);
  model.on("msg:custom", hear);
  find();
  return () => {
    ended = true;
    themes.disconnect();
    widths.disconnect();
    clearInterval(looking);
    clearTimeout(resting);
    for (const name of ["frame", "coloring", "version"]) model.off(`change:${name}`, changed);
    model.off("msg:custom", hear);
  };
}
export default { render };
