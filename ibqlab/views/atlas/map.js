// The map of codes and features, drawn point by point into one picture; a snapshot's places are loaded when it is shown.
"use strict";
const map = (() => {
  const { at, number, chosen, go, load, unpack } = atlas;
  const VIRIDIS = ["#443983", "#3a528b", "#31688e", "#287c8e", "#20908c", "#24a584", "#44bf70", "#7ad151", "#bddf26", "#fde725"];
  const DEAD = 255;
  const PLAY = 700;
  const self = { draw: () => {}, shownPlaces: () => [], shownFrame: () => -1, start };

  function start(facts) {
    return load("data/map").then((data) => open(facts, unpack(data.ids), data.aspect));
  }

  async function open(facts, ids, aspect) {
    const canvas = at("map");
    const frames = facts.map_words.length;
    const view = { x: 0, y: 0, zoom: 1 };
    const places = new Float32Array(2 * ids.length);
    const rowOf = new Map();
    ids.forEach((code, row) => rowOf.set(code, row));
    const state = { frame: null, place: -1, lasso: null, asked: false };
    const ratio = () => window.devicePixelRatio || 1;

    async function frameOf(place) {
      const data = await load(`data/map-${place}`);
      if (!data.levels) {
        Object.assign(data, { codes: unpack(data.codes), features: unpack(data.features), hits: unpack(data.hits) });
        const scale = 10 / Math.log(facts.most_hits + 1);
        data.levels = Uint8Array.from(data.hits, (hits) => (hits > 0 ? Math.min(9, Math.floor(Math.log(hits) * scale)) : DEAD));
      }
      return data;
    }

    async function showFrame() {
      const place = Number(at("step").value);
      at("step-words").textContent = facts.map_steps.length ? number(facts.map_steps[place]) : "";
      try {
        const frame = await frameOf(place);
        if (place !== Number(at("step").value)) return;
        state.frame = frame;
        state.place = place;
        at("map-words").textContent = [facts.map_note, facts.map_words[place]].filter(Boolean).join(" ");
        ask();
      } catch (error) {
        at("map-words").textContent = `The map of this step is not there: ${error.message}.`;
      }
    }

    // --- drawing ---

    const ask = () => {
      if (state.asked) return;
      state.asked = true;
      requestAnimationFrame(() => { state.asked = false; draw(); });
    };
    const ink = (hex) => {
      const [red, green, blue] = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
      return (255 << 24) | (blue << 16) | (green << 8) | red;
    };
    const named = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const scale = VIRIDIS.map(ink);

    function draw() {
      const frame = state.frame;
      if (!frame) return;
      const dots = ratio();
      const [width, height] = [Math.round(canvas.clientWidth * dots), Math.round(canvas.clientHeight * dots)];
      if (!width || !height) return;
      if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
      const pen = canvas.getContext("2d");
      const picture = pen.createImageData(width, height);
      const pixels = new Uint32Array(picture.data.buffer);
      const fit = 0.94 * Math.min(width / aspect, height);
      const [stepX, stepY] = [(aspect * fit * view.zoom) / 65535, (fit * view.zoom) / 65535];
      const left = width / 2 + (view.x * dots - 0.5 * aspect * fit) * view.zoom;
      const bottom = height / 2 + (view.y * dots + 0.5 * fit) * view.zoom;
      const stamp = (x, y, color, half) => {
        const [top, low] = [Math.max(0, Math.round(y) - half), Math.min(height - 1, Math.round(y) + half)];
        const [from, to] = [Math.max(0, Math.round(x) - half), Math.min(width - 1, Math.round(x) + half)];
        for (let row = top; row <= low; row++) for (let column = from; column <= to; column++) pixels[row * width + column] = color;
      };
      const feature = ink(named("--feature"));
      for (let i = 0; i < frame.features.length; i += 2) {
        stamp(left + frame.features[i] * stepX, bottom - frame.features[i + 1] * stepY, feature, Math.round(dots));
      }
      const half = Math.round((ids.length > 50000 ? 1 : 2) * dots);
      const [dead, mark] = [ink(named("--dead")), ink(named("--ring"))];
      for (let i = 0; i < ids.length; i++) {
        places[2 * i] = left + frame.codes[2 * i] * stepX;
        places[2 * i + 1] = bottom - frame.codes[2 * i + 1] * stepY;
      }
      const point = (i) => {
        const alive = frame.levels[i] !== DEAD;
        stamp(places[2 * i], places[2 * i + 1], alive ? scale[frame.levels[i]] : dead, alive ? half : Math.max(0, half - 1));
      };
      for (let i = 0; i < ids.length; i++) if (frame.levels[i] === DEAD) point(i);
      for (let i = 0; i < ids.length; i++) if (frame.levels[i] !== DEAD) point(i);
      // What the lasso holds, on top of all others and with a frame in the colour of what is chosen.
      const rows = Array.from(table.lassoed() ?? [], (code) => rowOf.get(code));
      rows.forEach((i) => stamp(places[2 * i], places[2 * i + 1], mark, half + Math.max(1, Math.round(dots))));
      rows.forEach(point);
      pen.putImageData(picture, 0, 0);
      pen.strokeStyle = named("--ring");
      const marked = rowOf.get(chosen());
      if (marked !== undefined) {
        pen.lineWidth = 2 * dots; pen.beginPath();
        pen.arc(places[2 * marked], places[2 * marked + 1], 9 * dots, 0, 7); pen.stroke();
      }
      if (state.lasso) {
        pen.lineWidth = 1.5 * dots; pen.beginPath();
        state.lasso.forEach(([x, y]) => pen.lineTo(x * dots, y * dots)); pen.stroke();
      }
    }

    // --- pointing ---

    const nearest = (event) => {
      const [x, y] = [event.offsetX * ratio(), event.offsetY * ratio()];
      let [best, least] = [-1, (12 * ratio()) ** 2];
      for (let i = 0; i < ids.length; i++) {
        const far = (places[2 * i] - x) ** 2 + (places[2 * i + 1] - y) ** 2;
        if (far < least) { best = i; least = far; }
      }
      return best;
    };

    const held = () => {
      const corners = state.lasso.map(([x, y]) => [x * ratio(), y * ratio()]);
      const found = [];
      for (let row = 0; row < ids.length; row++) {
        const [x, y] = [places[2 * row], places[2 * row + 1]];
        let odd = false;
        for (let i = 0, j = corners.length - 1; i < corners.length; j = i++) {
          const [[a, b], [c, d]] = [corners[i], corners[j]];
          if (b > y !== d > y && x < ((c - a) * (y - b)) / (d - b) + a) odd = !odd;
        }
        if (odd) found.push(ids[row]);
      }
      return Int32Array.from(found);
    };

    function hover(event) {
      const row = state.frame ? nearest(event) : -1;
      at("hover").hidden = row < 0;
      if (row < 0) return;
      at("hover").textContent = `code ${number(ids[row])}: ${number(state.frame.hits[row])} ${facts.is_moment ? "tokens" : facts.counted}`;
      const beyond = event.offsetX > canvas.clientWidth - 190;
      Object.assign(at("hover").style, { left: `${event.offsetX + (beyond ? -180 : 14)}px`, top: `${event.offsetY + 14}px` });
    }

    const zoom = (factor, x = 0, y = 0) => {
      const before = view.zoom;
      view.zoom = Math.min(400, Math.max(0.5, view.zoom * factor));
      view.x += x / view.zoom - x / before; view.y += y / view.zoom - y / before;
      ask();
    };

    let from = null;
    canvas.onpointerdown = (event) => {
      from = { x: event.clientX, y: event.clientY, moved: false };
      if (event.shiftKey || at("lasso").getAttribute("aria-pressed") === "true") state.lasso = [[event.offsetX, event.offsetY]];
      canvas.setPointerCapture(event.pointerId);
      at("hover").hidden = true;
    };
    canvas.onpointermove = (event) => {
      if (!from) { hover(event); return; }
      const [x, y] = [event.clientX - from.x, event.clientY - from.y];
      if (Math.abs(x) + Math.abs(y) > 3) from.moved = true;
      if (state.lasso) state.lasso.push([event.offsetX, event.offsetY]);
      else if (from.moved) {
        view.x += x / view.zoom; view.y += y / view.zoom;
        Object.assign(from, { x: event.clientX, y: event.clientY });
      }
      ask();
    };
    canvas.onpointerup = (event) => {
      if (state.lasso && from?.moved) table.showOnly(held());
      else if (from && !from.moved) {
        const row = nearest(event);
        if (row >= 0) go(ids[row]);
      }
      state.lasso = from = null;
      at("lasso").setAttribute("aria-pressed", "false");
      ask();
    };
    canvas.onpointercancel = () => { state.lasso = from = null; ask(); };
    canvas.onpointerleave = () => { at("hover").hidden = true; };
    canvas.onwheel = (event) => {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 400), event.offsetX - canvas.clientWidth / 2, event.offsetY - canvas.clientHeight / 2);
    };
    canvas.onkeydown = (event) => {
      const ways = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
      if (event.key in ways) {
        view.x += ways[event.key][0] / view.zoom; view.y += ways[event.key][1] / view.zoom;
        ask();
      } else if (event.key === "+" || event.key === "=") zoom(1.5);
      else if (event.key === "-") zoom(1 / 1.5);
      else return;
      event.preventDefault();
    };
    at("nearer").onclick = () => zoom(1.5);
    at("further").onclick = () => zoom(1 / 1.5);
    at("whole").onclick = () => { Object.assign(view, { x: 0, y: 0, zoom: 1 }); ask(); };
    at("lasso").onclick = () => at("lasso").setAttribute("aria-pressed", String(at("lasso").getAttribute("aria-pressed") !== "true"));

    // --- steps ---

    let playing = 0;
    const halt = () => { clearInterval(playing); playing = 0; at("play").textContent = "play"; };
    const advance = () => {
      at("step").value = Number(at("step").value) + 1;
      showFrame();
      if (Number(at("step").value) >= frames - 1) halt();
    };
    at("play").onclick = () => {
      if (playing) { halt(); return; }
      if (Number(at("step").value) >= frames - 1) { at("step").value = 0; showFrame(); }
      at("play").textContent = "stop";
      playing = setInterval(advance, PLAY);
    };
    at("step").oninput = () => { halt(); showFrame(); };

    at("steps").hidden = frames < 2;
    at("most").textContent = number(facts.most_hits);
    at("map-part").hidden = false;
    at("step").max = frames - 1;
    at("step").value = frames - 1;
    window.addEventListener("resize", ask);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ask);
    self.draw = ask;
    self.shownFrame = () => state.place;
    self.shownPlaces = () => Array.from(ids, (code, row) => ({ code, x: places[2 * row], y: places[2 * row + 1] }));
    await showFrame();
  }

  return self;
})();
