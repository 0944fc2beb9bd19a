// The atlas of a codebook. Data come as scripts that call `atlas.take`, because a page from disk may load nothing else.
// Names from outside reach the page as text alone: nothing here writes HTML.
"use strict";
const atlas = (() => {
  const held = new Map();
  const waiting = new Map();
  const ROW = 22;
  const PATCH = 72;
  const VIRIDIS = ["#443983", "#3a528b", "#31688e", "#287c8e", "#20908c", "#24a584", "#44bf70", "#7ad151", "#bddf26", "#fde725"];
  const KINDS = { i4: Int32Array, f4: Float32Array, u2: Uint16Array };
  const at = (id) => document.getElementById(id);
  const number = (value) => Math.round(value).toLocaleString("en");
  const short = (value) => (Number.isInteger(value) ? number(value) : Number(value.toPrecision(3)).toString());

  function take(name, value) {
    held.set(name, value);
    (waiting.get(name) ?? []).forEach((done) => done(value));
    waiting.delete(name);
  }

  function load(name) {
    if (held.has(name)) return Promise.resolve(held.get(name));
    return new Promise((done, failed) => {
      if (waiting.has(name)) return waiting.get(name).push(done);
      waiting.set(name, [done]);
      const script = document.createElement("script");
      script.src = `${name}.js`;
      script.onerror = () => { waiting.delete(name); failed(new Error(`${name}.js is missing`)); };
      document.head.append(script);
    });
  }

  function unpack({ kind, base64 }) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    return new KINDS[kind](bytes.buffer);
  }

  function make(tag, { text = "", name = "", ...rest } = {}, ...children) {
    const element = document.createElement(tag);
    if (text !== "") element.textContent = text;
    if (name) element.className = name;
    Object.assign(element, rest);
    element.append(...children.filter(Boolean));
    return element;
  }

  // --- the table: only the rows that are seen exist ---

  const TITLES = { hits: "tokens here", validation: "validation tokens", idle: "steps since hit", norm: "norm" };
  const table = { columns: {}, order: null, by: "hits", down: true, only: null };

  function startTable(facts, columns) {
    for (const [name, column] of Object.entries(columns)) table.columns[name] = unpack(column);
    if (!table.columns.hits) table.by = table.columns.validation ? "validation" : "code";
    const names = ["code", ...Object.keys(table.columns)];
    at("table").style.setProperty("--columns", names.length);
    for (const name of names) {
      const button = make("button", { text: TITLES[name] ?? name, type: "button" });
      button.onclick = () => {
        table.down = table.by === name ? !table.down : name !== "code";
        table.by = name;
        sort(facts);
      };
      button.dataset.by = name;
      at("head").append(button);
    }
    at("scroll").onscroll = () => rows(names);
    at("used").onchange = () => sort(facts);
    at("used").disabled = !used();
    at("clear").onclick = () => { table.only = null; sort(facts); };
    at("find").oninput = () => {
      const code = Number(at("find").value.replace(/[,\s]/g, ""));
      if (at("find").value.trim() && Number.isInteger(code) && code >= 0 && code < facts.codes) go(code);
    };
    table.draw = () => rows(names);
    sort(facts);
  }

  const used = () => table.columns.hits ?? table.columns.validation;

  function sort(facts) {
    const hits = used();
    const kept = [];
    const codes = table.only ?? { length: facts.codes };
    for (let i = 0; i < codes.length; i++) {
      const code = table.only ? codes[i] : i;
      if (!at("used").checked || !hits || hits[code] > 0) kept.push(code);
    }
    const values = table.columns[table.by];
    const order = Int32Array.from(kept);
    if (values) order.sort((a, b) => values[a] - values[b] || a - b);
    if (table.down) order.reverse();
    table.order = order;
    at("clear").hidden = !table.only;
    at("count").textContent = `${number(order.length)} of ${number(facts.codes)} codes${table.only ? ", those of the lasso" : ""}`;
    for (const button of at("head").children) {
      const arrow = button.dataset.by === table.by ? (table.down ? " ▼" : " ▲") : "";
      button.textContent = (TITLES[button.dataset.by] ?? button.dataset.by) + arrow;
    }
    at("fill").style.height = `${order.length * ROW}px`;
    table.draw();
  }

  function rows(names) {
    const first = Math.floor(at("scroll").scrollTop / ROW);
    const last = Math.min(table.order.length, first + Math.ceil(at("scroll").clientHeight / ROW) + 1);
    const lines = [];
    for (let place = first; place < last; place++) {
      const code = table.order[place];
      const cells = names.map((name) => make("span", { text: name === "code" ? number(code) : short(table.columns[name][code]) }));
      const line = make("div", { name: code === chosen() ? "line chosen" : "line" }, ...cells);
      line.setAttribute("role", "row");
      line.style.top = `${place * ROW}px`;
      line.onclick = () => go(code);
      lines.push(line);
    }
    at("fill").replaceChildren(...lines);
  }

  // --- the card ---

  const chosen = () => { const found = /code=(\d+)/.exec(location.hash); return found ? Number(found[1]) : -1; };
  const go = (code) => { location.hash = `code=${code}`; };

  function patch(facts, place, side = PATCH, around = 1) {
    const [image, row, column] = place;
    const [height, width] = facts.size;
    const [tall, wide] = [height / facts.grid[0], width / facts.grid[1]];
    const scale = side / ((2 * around + 1) * tall);
    const element = make("div", { name: "patch", title: `image ${image}, row ${row}, column ${column}` });
    Object.assign(element.style, {
      width: `${(2 * around + 1) * wide * scale}px`, height: `${side}px`, backgroundImage: `url(images/${image}.jpg)`,
      backgroundSize: `${width * scale}px ${height * scale}px`,
      backgroundPosition: `${-(column - around) * wide * scale}px ${-(row - around) * tall * scale}px`,
    });
    if (around) {
      const frame = make("i");
      Object.assign(frame.style, {
        left: `${around * wide * scale}px`, top: `${around * tall * scale}px`, width: `${wide * scale}px`, height: `${tall * scale}px`,
      });
      element.append(frame);
    }
    return element;
  }

  function chip(code, words = "", ...inside) {
    const button = make("button", { name: "chip", type: "button" }, ...inside, make("div", { text: number(code) + words }));
    button.onclick = () => go(code);
    return button;
  }

  async function neighbour(facts, code, words) {
    const shard = await load(`cards/${Math.floor(code / facts.shard)}`);
    const typical = shard[code % facts.shard].typical;
    return chip(code, words, typical && facts.size ? patch(facts, typical[0], 44) : null);
  }

  async function show(facts) {
    const code = chosen();
    if (code < 0 || code >= facts.codes) return;
    const shardNumber = Math.floor(code / facts.shard);
    let card;
    try {
      card = (await load(`cards/${shardNumber}`))[code % facts.shard];
    } catch (error) {
      at("card").replaceChildren(make("p", { name: "lack", text: `The card is not there: ${error.message}.` }));
      return;
    }
    const parts = [make("h2", { text: `Code ${number(code)} of ${number(facts.codes)}` })];
    const { hits, norm, idle } = table.columns;
    const words = [];
    if (hits) words.push(`${number(hits[code])} of ${number(facts.tokens)} tokens of ${number(facts.images)} images`);
    if (norm) words.push(`norm ${short(norm[code])}`);
    if (idle) words.push(idle[code] < 0 ? "never hit in training" : `last hit ${number(idle[code])} steps before the last snapshot`);
    parts.push(make("p", { text: words.join("; ") }));
    if (card.typical) {
      parts.push(make("h3", { text: "Nearest to it" }), make("div", { name: "row" }, ...card.typical.map((place) => patch(facts, place))));
      const nearly = (card.margin ?? []).filter((place) => place[3] >= 0);
      if (nearly.length) {
        const patches = nearly.map((place) => make("div", {}, patch(facts, place), chip(place[3])));
        parts.push(make("h3", { text: "At the margin: nearly another code's" }), make("div", { name: "row" }, ...patches));
      }
    } else if (hits) parts.push(make("p", { name: "lack", text: "No token of these images takes it." }));
    if (facts.decoded && card.typical) {
      const [tall, wide] = [facts.size[0] / facts.grid[0], facts.size[1] / facts.grid[1]];
      const place = code % facts.shard;
      const scale = PATCH / tall;
      const element = make("div", { name: "patch" });
      Object.assign(element.style, {
        width: `${wide * scale}px`, height: `${PATCH}px`, backgroundImage: `url(decoded/${shardNumber}.png)`,
        backgroundSize: `${facts.decoded * wide * scale}px ${facts.decoded * tall * scale}px`,
        backgroundPosition: `${-(place % facts.decoded) * wide * scale}px ${-Math.floor(place / facts.decoded) * tall * scale}px`,
      });
      parts.push(make("h3", { text: "Decodes to, where every token is this code" }), element);
    }
    if (card.life) parts.push(make("h3", { text: "Through training: validation tokens at each snapshot" }), life(facts.steps, card.life));
    if (card.classes) {
      const most = card.classes[0][1];
      const cells = card.classes.flatMap(([label, count]) => {
        const bar = make("b");
        bar.style.width = `${Math.max(1, (140 * count) / most)}px`;
        return [make("span", { text: facts.classes[label] }), bar, make("span", { text: number(count) })];
      });
      parts.push(make("h3", { text: "Classes of its images, tokens" }), make("div", { name: "classes" }, ...cells));
    }
    for (const [title, found, unit] of [
      ["Nearest codes, by distance", card.near, ""], ["Codes beside it more often than by chance", card.beside, " ×"],
    ]) {
      if (!found) continue;
      const chips = await Promise.all(found.map(([other, value]) => neighbour(facts, other, ` · ${short(value)}${unit}`)));
      parts.push(make("h3", { text: title }), make("div", { name: "row" }, ...chips));
    }
    if (code !== chosen()) return;  // another was chosen while this one was loaded
    at("card").replaceChildren(...parts, ...facts.lacks.map((text) => make("p", { name: "lack", text })));
    table.draw();
    map.draw?.();
  }

  function life(steps, hits) {
    const canvas = make("canvas", { name: "life", width: 860, height: 150 });
    Object.assign(canvas.style, { width: "430px", height: "75px", border: "0" });
    const pen = canvas.getContext("2d");
    const most = Math.max(...hits);
    const x = (step) => 70 + (770 * (step - steps[0])) / Math.max(1, steps.at(-1) - steps[0]);
    const y = (value) => 118 - (105 * value) / most;
    pen.strokeStyle = "#0072b2"; pen.lineWidth = 3; pen.beginPath();
    hits.forEach((value, place) => pen.lineTo(x(steps[place]), y(value)));
    pen.stroke();
    pen.fillStyle = getComputedStyle(document.body).color; pen.font = "20px system-ui";
    pen.textAlign = "right"; pen.fillText(number(most), 62, 22); pen.fillText("0", 62, 124);
    pen.textAlign = "left"; pen.fillText(`step ${number(steps[0])}`, 70, 146);
    pen.textAlign = "right"; pen.fillText(number(steps.at(-1)), 840, 146);
    return canvas;
  }

  // --- the map ---

  const map = {};

  async function startMap(facts) {
    const data = await load("data/map");
    const canvas = at("map");
    const ids = unpack(data.ids);
    const frames = data.codes.map((column, place) => ({
      codes: unpack(column), features: unpack(data.features[place]), hits: unpack(data.hits[place]),
    }));
    let most = 1;
    for (const frame of frames) for (const count of frame.hits) if (count > most) most = count;
    const view = { x: 0, y: 0, zoom: 1 };
    at("map-part").hidden = false;
    at("step").max = frames.length - 1;
    at("step").value = frames.length - 1;
    let places = null;
    let lasso = null;

    const colors = VIRIDIS.map((hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16)));
    const rgb = (name) => {
      const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
      return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
    };

    map.draw = () => {
      const ratio = window.devicePixelRatio || 1;
      const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
      if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
      const pen = canvas.getContext("2d");
      const picture = pen.createImageData(width, height);
      const fit = 0.94 * Math.min(width / data.aspect, height);
      const spot = (column, row) => [
        width / 2 + ((column / 65535 - 0.5) * data.aspect * fit + view.x * ratio) * view.zoom,
        height / 2 - ((row / 65535 - 0.5) * fit - view.y * ratio) * view.zoom,
      ];
      const stamp = (x, y, [red, green, blue], half) => {
        for (let row = Math.round(y) - half; row <= Math.round(y) + half; row++) {
          if (row < 0 || row >= height) continue;
          for (let column = Math.round(x) - half; column <= Math.round(x) + half; column++) {
            if (column < 0 || column >= width) continue;
            const start = 4 * (row * width + column);
            picture.data[start] = red; picture.data[start + 1] = green; picture.data[start + 2] = blue; picture.data[start + 3] = 255;
          }
        }
      };
      const frame = frames[at("step").value];
      const [feature, dead] = [rgb("--feature"), rgb("--dead")];
      for (let i = 0; i < frame.features.length; i += 2) stamp(...spot(frame.features[i], frame.features[i + 1]), feature, Math.round(ratio) - 1);
      places = new Float32Array(frame.codes.length);
      const half = Math.round((ids.length > 50000 ? 1 : 2) * ratio);
      for (const living of [false, true]) {
        for (let i = 0; i < ids.length; i++) {
          if (frame.hits[i] > 0 !== living) continue;
          const [x, y] = spot(frame.codes[2 * i], frame.codes[2 * i + 1]);
          places[2 * i] = x; places[2 * i + 1] = y;
          const level = Math.min(9, Math.floor((10 * Math.log(frame.hits[i])) / Math.log(most + 1)));
          stamp(x, y, living ? colors[level] : dead, living ? half : Math.max(0, half - 1));
        }
      }
      pen.putImageData(picture, 0, 0);
      const marked = ids.indexOf(chosen());
      if (marked >= 0) {
        pen.strokeStyle = "#d55e00"; pen.lineWidth = 2 * ratio; pen.beginPath();
        pen.arc(places[2 * marked], places[2 * marked + 1], 9 * ratio, 0, 7); pen.stroke();
      }
      if (lasso) {
        pen.strokeStyle = "#d55e00"; pen.lineWidth = 1.5 * ratio; pen.beginPath();
        lasso.forEach(([x, y]) => pen.lineTo(x * ratio, y * ratio)); pen.stroke();
      }
      at("step-words").textContent = number(facts.steps[at("step").value]);
      at("map-words").textContent = facts.map_words[at("step").value];
    };

    const nearest = (event) => {
      const ratio = window.devicePixelRatio || 1;
      const [x, y] = [event.offsetX * ratio, event.offsetY * ratio];
      let best = -1;
      let least = (12 * ratio) ** 2;
      for (let i = 0; i < ids.length; i++) {
        const far = (places[2 * i] - x) ** 2 + (places[2 * i + 1] - y) ** 2;
        if (far < least) [best, least] = [i, far];
      }
      return best;
    };
    const inside = (x, y) => {
      let odd = false;
      for (let i = 0, j = lasso.length - 1; i < lasso.length; j = i++) {
        const [[a, b], [c, d]] = [lasso[i], lasso[j]];
        if (b > y !== d > y && x < ((c - a) * (y - b)) / (d - b) + a) odd = !odd;
      }
      return odd;
    };

    let from = null;
    canvas.onpointerdown = (event) => {
      from = { x: event.clientX, y: event.clientY, moved: false };
      if (event.shiftKey) lasso = [[event.offsetX, event.offsetY]];
      canvas.setPointerCapture(event.pointerId);
    };
    canvas.onpointermove = (event) => {
      if (!from) {
        const place = nearest(event);
        const frame = frames[at("step").value];
        canvas.title = place < 0 ? "" : `code ${number(ids[place])}: ${number(frame.hits[place])} validation tokens`;
        return;
      }
      const [x, y] = [event.clientX - from.x, event.clientY - from.y];
      if (Math.abs(x) + Math.abs(y) > 3) from.moved = true;
      if (lasso) lasso.push([event.offsetX, event.offsetY]);
      else if (from.moved) {
        view.x += x / view.zoom; view.y += y / view.zoom;
        Object.assign(from, { x: event.clientX, y: event.clientY });
      }
      requestAnimationFrame(map.draw);
    };
    canvas.onpointerup = (event) => {
      if (lasso) {
        const ratio = window.devicePixelRatio || 1;
        const found = [];
        for (let i = 0; i < ids.length; i++) if (inside(places[2 * i] / ratio, places[2 * i + 1] / ratio)) found.push(ids[i]);
        lasso = null;
        table.only = found.length ? Int32Array.from(found) : null;
        sort(facts);
        if (!found.length) at("count").textContent += "; the lasso held none";
      } else if (from && !from.moved) {
        const place = nearest(event);
        if (place >= 0) go(ids[place]);
      }
      from = null;
      map.draw();
    };
    canvas.onwheel = (event) => {
      event.preventDefault();
      const before = view.zoom;
      view.zoom = Math.min(400, Math.max(0.5, view.zoom * Math.exp(-event.deltaY / 400)));
      const [x, y] = [event.offsetX - canvas.clientWidth / 2, event.offsetY - canvas.clientHeight / 2];
      view.x += x / view.zoom - x / before; view.y += y / view.zoom - y / before;
      requestAnimationFrame(map.draw);
    };
    at("step").oninput = () => requestAnimationFrame(map.draw);
    window.addEventListener("resize", map.draw);
    map.draw();
  }

  async function start() {
    const facts = held.get("facts");
    if (!facts || !held.get("columns")) {
      at("summary").textContent = "The data are not there: index.html needs the folder beside it, whole.";
      return;
    }
    document.title = `Codebook of ${facts.name}`;
    at("title").textContent = `Codebook of ${facts.name}`;
    const words = [`${number(facts.codes)} codes`];
    if (facts.images) words.push(`${number(facts.in_use)} in use in ${number(facts.tokens)} tokens of ${number(facts.images)} images`);
    at("summary").textContent = [words.join(", "), ...facts.lacks].join(". ");
    window.addEventListener("hashchange", () => show(facts));
    startTable(facts, held.get("columns"));
    if (facts.has_map) await startMap(facts);
    if (chosen() < 0 && table.order.length) history.replaceState(null, "", `#code=${table.order[0]}`);
    show(facts);
  }

  return { take, start };
})();
