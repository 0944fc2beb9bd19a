// The atlas of a codebook. Data come as scripts that call `atlas.take`, because a page from disk may load nothing else.
// Names from outside reach the page as text alone: nothing here writes HTML.
"use strict";
const atlas = (() => {
  const held = new Map();
  const waiting = new Map();
  const PATCH = 72;
  const KINDS = { i4: Int32Array, f4: Float32Array, u2: Uint16Array };
  const at = (id) => document.getElementById(id);
  const number = (value) => Math.round(value).toLocaleString("en");
  const short = (value) => (Number.isInteger(value) ? number(value) : Number(value.toPrecision(3)).toString());

  // --- data ---

  function take(name, value) {
    held.set(name, value);
    (waiting.get(name) ?? []).forEach(([done]) => done(value));
    waiting.delete(name);
  }

  function load(name) {
    if (held.has(name)) return Promise.resolve(held.get(name));
    return new Promise((done, failed) => {
      if (waiting.has(name)) { waiting.get(name).push([done, failed]); return; }
      waiting.set(name, [[done, failed]]);
      const script = document.createElement("script");
      const fail = () => {
        (waiting.get(name) ?? []).forEach(([, refuse]) => refuse(new Error(`${name}.js is missing or damaged`)));
        waiting.delete(name);
        script.remove();
      };
      script.src = `${name}.js`;
      script.onerror = fail;
      script.onload = () => (held.has(name) ? script.remove() : fail());
      document.head.append(script);
    });
  }

  function unpack({ kind, base64 }) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
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

  // --- which code is shown: the address says it, so that back, forward and a link work ---

  const chosen = () => { const found = /^#code=(\d+)$/.exec(location.hash); return found ? Number(found[1]) : -1; };
  const go = (code) => { if (code !== chosen()) location.hash = `code=${code}`; else show(); };
  // Without a step of its own in the history: for codes on the way to another.
  const pass = (code) => { history.replaceState(null, "", `#code=${code}`); show(); };

  // --- the card ---

  let facts;

  function patch(place, side = PATCH, around = facts.has_grid ? 1 : 0) {
    const [image] = place;
    const [row, column] = facts.has_grid ? place.slice(1) : [0, 0]; // without a grid the patch is the whole image
    const words = facts.has_grid ? `row ${row}, column ${column}` : `token ${place[2]}`;
    const [height, width] = facts.size;
    const [tall, wide] = [height / facts.grid[0], width / facts.grid[1]];
    const scale = side / ((2 * around + 1) * tall);
    const element = make("div", { name: "patch", title: `${facts.names[image]}, ${words}` });
    Object.assign(element.style, {
      width: `${(2 * around + 1) * wide * scale}px`, height: `${side}px`, backgroundImage: `url(images/${image}.jpg)`,
      backgroundSize: `${width * scale}px ${height * scale}px`,
      backgroundPosition: `${-(column - around) * wide * scale}px ${-(row - around) * tall * scale}px`,
    });
    if (!facts.has_grid) return element;
    const frame = make("i");
    Object.assign(frame.style, {
      left: `${around * wide * scale}px`, top: `${around * tall * scale}px`, width: `${wide * scale}px`, height: `${tall * scale}px`,
    });
    element.append(frame);
    return element;
  }

  function chip(code, words = "", ...inside) {
    const button = make("button", { name: "chip", type: "button" }, ...inside, make("div", { text: number(code) + words }));
    button.onclick = () => go(code);
    button.dataset.code = code;
    return button;
  }

  async function cardOf(code) {
    return (await load(`cards/${Math.floor(code / facts.shard)}`))[code % facts.shard];
  }

  // A neighbour is there at once; its patch comes when its file of cards has been read, and may be missing.
  function neighbour(code, words) {
    const button = chip(code, words);
    if (facts.size) {
      cardOf(code).then(({ typical }) => { if (typical) button.prepend(patch(typical[0], 44)); }, () => {});
    }
    return button;
  }

  function decodedPatch(code) {
    const [tall, wide] = [facts.size[0] / facts.grid[0], facts.size[1] / facts.grid[1]];
    const [place, scale] = [code % facts.shard, PATCH / tall];
    const element = make("div", { name: "patch" });
    Object.assign(element.style, {
      width: `${wide * scale}px`, height: `${PATCH}px`, backgroundImage: `url(decoded/${Math.floor(code / facts.shard)}.png)`,
      backgroundSize: `${facts.decoded * wide * scale}px ${facts.decoded * tall * scale}px`,
      backgroundPosition: `${-(place % facts.decoded) * wide * scale}px ${-Math.floor(place / facts.decoded) * tall * scale}px`,
    });
    return element;
  }

  function factWords(code) {
    const { hits, norm, idle } = table.columns;
    const words = [];
    if (hits) {
      const share = Number(((100 * hits[code]) / facts.tokens).toPrecision(2));
      words.push(`${number(hits[code])} of ${number(facts.tokens)} tokens (${share} %) of ${number(facts.images)} images`);
    }
    if (norm) words.push(`norm ${short(norm[code])}`);
    if (idle) words.push(idle[code] < 0 ? "never hit in training" : `last hit in training at step ${number(facts.steps.at(-1) - idle[code])}`);
    return words.join("; ");
  }

  function patchParts(card) {
    if (!card.typical) return table.columns.hits ? [make("p", { name: "lack", text: "No token of these images takes it." })] : [];
    const parts = [make("h3", { text: facts.ruler ? "Nearest to it" : "Tokens of it" })];
    parts.push(make("div", { name: "row" }, ...card.typical.map((place) => patch(place))));
    const nearly = (card.margin ?? []).filter((place) => place[3] >= 0);
    if (nearly.length) {
      const patches = nearly.map((place) => make("div", {}, patch(place), chip(place[3])));
      parts.push(make("h3", { text: "At the margin: nearly another code's" }), make("div", { name: "row" }, ...patches));
    } else if (!facts.ruler) {
      parts.push(make("p", { name: "lack", text: "No distance chooses this method's codes, so none is nearest or second." }));
    }
    return parts;
  }

  function classParts(card) {
    if (!card.classes) return [];
    const most = card.classes[0][1];
    const cells = card.classes.flatMap(([label, count]) => {
      const bar = make("b");
      bar.style.width = `${Math.max(1, (120 * count) / most)}px`;
      return [make("span", { text: facts.classes[label] }), bar, make("span", { text: number(count) })];
    });
    return [make("h3", { text: "Classes of its images, tokens" }), make("div", { name: "classes" }, ...cells)];
  }

  function draw(code, card) {
    const parts = [make("h2", { text: `Code ${number(code)} of ${number(facts.codes)}` }), make("p", { text: factWords(code) })];
    parts.push(...patchParts(card));
    if (facts.decoded && card.typical && (facts.decoded_codes ?? [code]).includes(code)) {
      parts.push(make("h3", { text: "Decodes to, where every token is this code" }), decodedPatch(code));
    }
    if (facts.steps) {
      parts.push(make("h3", { text: `Through training: share of ${facts.counted}` }));
      if (card.life) parts.push(...life(facts.steps, facts.step_tokens, card.life));
      else parts.push(make("p", { name: "lack", text: "In no snapshot: it took none of their tokens." }));
    }
    parts.push(...classParts(card));
    for (const [title, found, unit] of [
      ["Nearest codes, by distance", card.near, ""], ["Codes beside it more often than by chance", card.beside, " ×"],
    ]) {
      if (!found) continue;
      const chips = found.map(([other, value]) => neighbour(other, ` · ${short(value)}${unit}`));
      parts.push(make("h3", { text: title }), make("div", { name: "row" }, ...chips));
    }
    at("card").replaceChildren(...parts);
    at("card").scrollTop = 0;
  }

  async function show() {
    const code = chosen();
    table.draw();
    map.draw();
    if (code < 0 || code >= facts.codes) {
      const text = location.hash.length > 1 ? `Codes are 0 to ${number(facts.codes - 1)}; the address names none: ${location.hash}` : "Click a code in the map or in the table.";
      at("card").replaceChildren(make("p", { name: "lack", text }));
      return;
    }
    try {
      const card = await cardOf(code);
      if (code === chosen()) draw(code, card);  // else another was chosen while this one was loaded
    } catch (error) {
      if (code === chosen()) at("card").replaceChildren(make("p", { name: "lack", text: `The card of code ${number(code)} is not there: ${error.message}.` }));
    }
  }

  // On a narrow page the card lies below the fold; who clicks a code wants to see it.
  function showWhereSeen() {
    if (matchMedia("(max-width: 899px)").matches) at("card").scrollIntoView({ block: "start" });
  }

  function life(steps, tokens, hits) {
    const shape = (tag, attributes, text) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      if (text) element.textContent = text;
      return element;
    };
    const shares = hits.map((value, place) => (100 * value) / Math.max(1, tokens[place]));
    const most = Math.max(...shares);
    const x = (step) => 58 + (364 * (step - steps[0])) / Math.max(1, steps.at(-1) - steps[0]);
    const y = (share) => 72 - (62 * share) / most;
    const points = shares.map((share, place) => [x(steps[place]), y(share)]);
    const chart = shape("svg", { class: "life", viewBox: "0 0 430 92", role: "img", "aria-label": "share of tokens against training step" });
    chart.append(
      shape("line", { x1: 58, y1: 72, x2: 422, y2: 72 }),
      shape("polyline", { points: points.map((point) => point.join(",")).join(" ") }),
      ...points.map(([cx, cy]) => shape("circle", { cx, cy, r: 2 })),
      shape("text", { x: 54, y: 14, "text-anchor": "end" }, `${Number(most.toPrecision(2))} %`),
      shape("text", { x: 54, y: 75, "text-anchor": "end" }, "0"),
      shape("text", { x: 58, y: 88 }, number(steps[0])),
      shape("text", { x: 240, y: 88, "text-anchor": "middle" }, "training step"),
      shape("text", { x: 422, y: 88, "text-anchor": "end" }, number(steps.at(-1))),
    );
    const turns = steps.filter((step, place) => hits[place] > 0 !== (place > 0 && hits[place - 1] > 0));
    const words = (turn) => (turn % 2 ? "without a hit" : turn ? "in use again" : "in use");
    const events = turns.map((step, turn) => `${words(turn)} by step ${number(step)}`);
    return [chart, make("p", { text: events.slice(0, 8).join("; ") + (events.length > 8 ? " …" : "") })];
  }

  async function start() {
    facts = held.get("facts");
    if (!facts || !held.get("columns")) {
      at("summary").textContent = "The data are not there: index.html needs the folder beside it, whole.";
      return;
    }
    document.title = `Codebook of ${facts.name}`;
    at("title").textContent = `Codebook of ${facts.name}`;
    const words = [`${number(facts.codes)} codes`];
    if (facts.images) words.push(`${number(facts.in_use)} in use in ${number(facts.tokens)} tokens of ${number(facts.images)} images`);
    at("summary").textContent = [`${words.join(", ")}.`, ...facts.lacks].join(" ");
    table.start(facts, held.get("columns"));
    if (chosen() < 0 && location.hash.length < 2 && table.order.length) history.replaceState(null, "", `#code=${table.order[0]}`);
    window.addEventListener("hashchange", () => { show(); showWhereSeen(); });
    table.showChosen();
    show();
    if (!facts.has_map) return;
    try {
      await map.start(facts);
    } catch (error) {
      at("summary").textContent += ` The map is not there: ${error.message}.`;
    }
  }

  return { take, start, load, unpack, make, at, number, short, chosen, go, pass };
})();
