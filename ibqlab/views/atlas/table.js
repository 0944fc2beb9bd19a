// The table of codes: only the rows that are seen exist.
"use strict";
const table = (() => {
  const { at, make, number, short, chosen, go, pass, unpack } = atlas;
  const ROW = 22;
  const TITLES = { idle: "steps since hit", norm: "norm" };
  const EXPLAINED = {};
  const self = { columns: {}, order: new Int32Array(0), start, sort, draw, showOnly, showChosen, lassoed: () => state.only };
  const state = { by: "hits", down: true, only: null, names: [], total: 0, finding: false };

  const used = () => self.columns.hits ?? self.columns.validation;

  function start(facts, columns) {
    for (const [name, column] of Object.entries(columns)) self.columns[name] = unpack(column);
    state.total = facts.codes;
    TITLES.hits = "tokens of all images";
    EXPLAINED.hits = `of the ${number(facts.tokens ?? 0)} tokens of the atlas's ${number(facts.images ?? 0)} images those that take the code`;
    const [last, tokens] = [number(facts.steps?.at(-1) ?? 0), number(facts.step_tokens?.at(-1) ?? 0)];
    TITLES.validation = `${facts.counted}, step ${last}`;
    EXPLAINED.validation = `of the ${tokens} ${facts.counted} at step ${last} those that take the code`;
    if (!self.columns.hits) state.by = self.columns.validation ? "validation" : "code";
    state.down = state.by !== "code";
    state.names = ["code", ...Object.keys(self.columns)];
    at("table").style.setProperty("--columns", state.names.length);
    for (const name of state.names) {
      const button = make("button", { text: TITLES[name] ?? name, type: "button" });
      button.setAttribute("role", "columnheader");
      button.onclick = () => {
        state.down = state.by === name ? !state.down : name !== "code";
        state.by = name;
        sort();
      };
      button.dataset.by = name;
      button.title = EXPLAINED[name] ?? "";
      at("head").append(button);
    }
    at("scroll").onscroll = draw;
    at("used").disabled = !used();
    at("used").checked = Boolean(used());
    at("used").onchange = () => sort();
    at("clear").onclick = () => showOnly(null);
    at("find").oninput = find;
    at("find").onchange = () => { state.finding = false; };
    at("table").onkeydown = step;
    window.addEventListener("resize", draw);
    sort();
  }

  // Codes on the way to a longer number are no steps of their own in the history.
  function find() {
    const text = at("find").value.replace(/[,\s]/g, "");
    const code = /^\d+$/.test(text) ? Number(text) : -1;
    at("find").setCustomValidity(text === "" || (code >= 0 && code < state.total) ? "" : `codes are 0 to ${number(state.total - 1)}`);
    at("find").reportValidity();
    if (code < 0 || code >= state.total) return;
    if (state.finding) pass(code);
    else go(code);
    showChosen();
    state.finding = true;
  }

  function step(event) {
    const page = Math.floor(at("scroll").clientHeight / ROW);
    const ways = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in ways) || !self.order.length || event.target.closest("button")) return;
    event.preventDefault();
    const now = self.order.indexOf(chosen());
    const next = now < 0 ? 0 : Math.max(0, Math.min(self.order.length - 1, now + ways[event.key]));
    pass(self.order[next]);
    showChosen();
  }

  function showChosen() {
    const place = self.order.indexOf(chosen());
    if (place < 0) return;
    const [top, height] = [at("scroll").scrollTop, at("scroll").clientHeight];
    if (place * ROW < top) at("scroll").scrollTop = place * ROW;
    else if ((place + 1) * ROW > top + height) at("scroll").scrollTop = (place + 1) * ROW - height;
  }

  function showOnly(codes) {
    state.only = codes;
    sort();
    if (codes && !codes.length) {
      state.only = null;
      sort();
      at("count").textContent += "; the lasso held none";
    }
    at("lassoed").hidden = !state.only;
    map.draw();
  }

  function sort() {
    const hits = used();
    const all = state.only ?? Int32Array.from({ length: state.total }, (_, code) => code);
    const order = at("used").checked && hits ? all.filter((code) => hits[code] > 0) : all.slice();
    const values = self.columns[state.by];
    if (values) order.sort((a, b) => values[a] - values[b] || a - b);
    else order.sort();
    if (state.down) order.reverse();
    self.order = order;
    at("clear").hidden = !state.only;
    const of = state.only ? `${number(order.length)} of the lasso's ${number(state.only.length)} codes` : `${number(order.length)} of ${number(state.total)} codes`;
    at("count").textContent = of;
    for (const button of at("head").children) {
      const here = button.dataset.by === state.by;
      button.textContent = (TITLES[button.dataset.by] ?? button.dataset.by) + (here ? (state.down ? " ▼" : " ▲") : "");
      button.setAttribute("aria-sort", here ? (state.down ? "descending" : "ascending") : "none");
    }
    at("fill").style.height = `${order.length * ROW}px`;
    at("scroll").scrollTop = 0;
    draw();
  }

  function draw() {
    const first = Math.floor(at("scroll").scrollTop / ROW);
    const last = Math.min(self.order.length, first + Math.ceil(at("scroll").clientHeight / ROW) + 1);
    const lines = [];
    for (let place = first; place < last; place++) {
      const code = self.order[place];
      const cells = state.names.map((name) => make("span", { text: name === "code" ? number(code) : cell(name, self.columns[name][code]) }));
      const line = make("div", { name: code === chosen() ? "line chosen" : "line" }, ...cells);
      line.setAttribute("role", "row");
      line.dataset.code = code;
      line.style.top = `${place * ROW}px`;
      line.onclick = () => go(code);
      lines.push(line);
    }
    at("fill").replaceChildren(...lines);
  }

  const cell = (name, value) => (name === "idle" && value < 0 ? "never" : short(value));

  return self;
})();
