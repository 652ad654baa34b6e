// The page's behavior: embeds the charts, moves all views together, plays the film, and switches sentence and theme.
"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement, byId = (id) => document.getElementById(id);
const wantsDark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => root.dataset.theme || (wantsDark.matches ? "dark" : "light");
let views = {};

async function embed(element, spec) {
  const options = { config: page.themes[theme()], renderer: "canvas", actions: false };
  const { view } = await vegaEmbed(element, spec, options);
  views[element.dataset.view] = view;
  return view;
}

async function draw() {
  Object.values(views).forEach((view) => view.finalize());
  views = {};
  if (page.traces) setSizes();
  for (const element of document.querySelectorAll("[data-view]")) {
    const spec = page.specs[element.dataset.view];
    if (!page.traces) { await embed(element, spec); continue; }
    const datasets = { ...spec.datasets, heads: trace().heads, candidates: trace().candidates };
    const params = Object.entries(state).map(([name, value]) => ({ name, value }));
    listen(element.dataset.view, await embed(element, { ...spec, datasets, params }));
  }
}

byId("theme").onclick = () => { root.dataset.theme = theme() === "dark" ? "light" : "dark"; draw(); };
wantsDark.addEventListener("change", draw);

// ---------------------------------------------------------------- the attention page: one state, shared by all views

let sentence = 0, state = {}, row = 0, key = -1, playing = false, frame = 0, picks = {};
const trace = () => page.traces[sentence];
const rows = () => state.rows[state.kind], keys = () => (state.kind === "decoder" ? state.tgt : state.src);

function set(changes) {
  Object.assign(state, changes);
  for (const [name, view] of Object.entries(views)) {
    if (name === "gallery" && !("kind" in changes || "picked" in changes)) continue; // it does not show the row
    for (const change in changes) view.signal(change, state[change]);
    view.runAsync();
  }
  describe();
}

function setSizes() { // the views fill their elements
  const layers = state.layers[state.kind], card = byId("ribbons").parentElement, natural = state.place[state.kind].width;
  byId("ribbons").style.width = `${Math.max(natural, Math.min(card.clientWidth, 1.7 * natural))}px`;
  const gallery = byId("gallery"), inner = gallery.parentElement.clientWidth - 50;
  gallery.style.minWidth = `${state.heads.length * 44}px`;
  gallery.style.height = `${(Math.max(inner, gallery.clientWidth - 50) * layers) / state.heads.length + 24}px`;
  byId("heat_map").style.height = `${rows().length * 26 + 80}px`;
  byId("heat_map").style.minWidth = `${keys().length * 20 + 120}px`;
  byId("bars").style.height = `${keys().length * 24 + 10}px`;
  byId("top_keys").style.height = `${layers * (state.heads.length - 2) * 28 + 10}px`;
  byId("top_keys").style.minWidth = "520px";
  root.dataset.kind = state.kind;
}

function describe() { // the texts that name the row, the heads and the sum
  const now = Math.round(state.t), picked = state.picked.map((name) => name.split("."));
  const chosen = trace().heads.filter((h) => h.kind === state.kind && state.picked.includes(`${h.layer}.${h.head}`));
  const sum = chosen.reduce((total, head) => total + Number(head.sums.split(",")[now]), 0) / chosen.length;
  const heads = picked.map(([layer, head]) => `layer ${layer}, ${/^\d/.test(head) ? "head " : ""}${head}`).join(" + ");
  byId("step").max = rows().length - 1;
  byId("step").value = now;
  byId("where").textContent = `row ${now}: ${rows()[now]}`;
  byId("row").textContent = `Row ${now}: ${rows()[now]} · sum ${sum.toFixed(4)}`;
  byId("head").textContent = `${page.kinds[state.kind]}, ${heads}${picked.length > 1 ? " (mean)" : ""}`;
  document.querySelectorAll("#kind button").forEach((b) => b.setAttribute("aria-pressed", b.value === state.kind));
  byId("play").textContent = playing ? "Pause" : "Play";
}

function moveTo(target, milliseconds, then = () => {}) { // the row in focus, without a jump
  cancelAnimationFrame(frame);
  const from = state.t, start = performance.now();
  const tick = (time) => {
    const part = Math.min(1, Math.max(0, time - start) / milliseconds);
    set({ t: part < 1 ? from + (target - from) * part * part * (3 - 2 * part) : target });
    frame = part < 1 ? requestAnimationFrame(tick) : 0;
    if (part === 1) then();
  };
  frame = requestAnimationFrame(tick);
}

function follow() { // keeps the token of the row visible in a long sentence
  const scroll = byId("ribbons").parentElement, scale = byId("ribbons").clientWidth / state.place[state.kind].width;
  scroll.scrollTo({ left: state.place[state.kind].below[row] * scale - scroll.clientWidth / 2, behavior: "smooth" });
}

function focusRow(next, milliseconds = 350, then) {
  row = Math.max(0, Math.min(rows().length - 1, next));
  if (key >= 0) set({ key: (key = -1) });
  follow();
  moveTo(row, milliseconds, then);
}

let timer = 0;
function pause() { playing = false; clearTimeout(timer); }
function play() {
  playing = true;
  if (row === rows().length - 1) { row = 0; set({ t: 0 }); }
  set({ film: true });
  const next = () => {
    if (row === rows().length - 1) { pause(); set({ film: false }); return; }
    focusRow(row + 1, 500, () => { timer = setTimeout(next, 550); });
  };
  timer = setTimeout(next, 550);
}
function step(by) { pause(); set({ film: true }); focusRow(row + by); }

function choose(index) {
  pause();
  sentence = index;
  byId("sentence").value = index;
  state = { ...trace().state, kind: state.kind || trace().state.kind };
  picks = Object.fromEntries(Object.keys(state.layers).map((kind) => [kind, [`${state.layers[kind] - 1}.mean`]]));
  state.picked = picks[state.kind];
  [row, key] = [0, -1];
  byId("title").replaceChildren(...trace().title.map((text, i) => {
    const part = document.createElement("span");
    part.textContent = text;
    part.className = ["read", "arrow", "written"][i];
    return part;
  }));
  draw().then(describe);
}

function chooseKind(kind) {
  pause();
  picks[state.kind] = state.picked;
  [row, key] = [Math.min(row, state.rows[kind].length - 1), -1];
  state = { ...state, kind, picked: picks[kind], t: row, key, film: false };
  draw().then(describe);
}

function listen(name, view) {
  const target = (item) => { // what a mark stands for: a head, a row or a key
    const d = (item && item.datum) || {};
    if (name === "gallery" || name === "top_keys") return d.head === undefined ? {} : { head: `${d.layer}.${d.head}` };
    if (name === "heat_map") return { row: d.row };
    if (name === "ribbons" && d.side) return d.side === "below" ? { row: d.i } : { key: d.i };
    return {};
  };
  view.addEventListener("click", (event, item) => {
    const { head, row: clicked, key: token } = target(item);
    if (head !== undefined) {
      const others = event.shiftKey || event.ctrlKey || event.metaKey ? state.picked : [];
      const rest = others.filter((name) => name !== head);
      set({ picked: rest.length && rest.length < others.length ? rest : [...rest, head] });
    }
    if (clicked !== undefined) { pause(); set({ film: false }); focusRow(clicked, 150); }
    if (token !== undefined) { key = key === token ? -1 : token; set({ key, film: false }); }
  });
  view.addEventListener("pointerover", (event, item) => {
    if (playing) return;
    const over = target(item);
    if (over.row !== undefined && over.row !== state.t) moveTo(over.row, 120);
    if (over.key !== undefined) set({ key: over.key });
  });
  view.addEventListener("pointerout", (event, item) => {
    if (playing) return;
    const out = target(item);
    if (out.row !== undefined) moveTo(row, 120);
    if (out.key !== undefined) set({ key });
  });
}

if (page.traces) {
  byId("sentence").onchange = (event) => choose(Number(event.target.value));
  document.querySelectorAll("#kind button").forEach((b) => { b.onclick = () => chooseKind(b.value); });
  byId("play").onclick = () => { if (playing) { pause(); describe(); } else play(); };
  byId("back").onclick = () => step(-1);
  byId("next").onclick = () => step(1);
  byId("step").oninput = (event) => { pause(); focusRow(Number(event.target.value)); };
  addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT|BUTTON)$/.test(event.target.tagName)) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowLeft" ? -1 : 1);
    if (event.key === " ") { event.preventDefault(); byId("play").click(); }
  });
  addEventListener("resize", setSizes);
  choose(0);
} else draw();
