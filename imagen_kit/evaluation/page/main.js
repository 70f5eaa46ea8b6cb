// Controls, the sentence that answers, and drawing everything again when something is chosen.

function fill(id, pairs, chosen) {
  byId(id).replaceChildren(...pairs.map(([value, text]) => element("option", { value, selected: value === chosen }, text)));
}

function wire(id, key, read = (node) => node.value) {
  byId(id).addEventListener("change", (event) => change({ [key]: read(event.target) }));
}

function answer() {
  const wanted = quality(state.q);
  byId("answer").textContent = "";
  delete byId("answer").dataset.key;
  if (!wanted) return;
  const lower = wanted.better === "lower";
  byId("target-sign").textContent = lower ? "≤" : "≥";
  const bound = Number(state.t);
  if (state.t === "" || !Number.isFinite(bound)) {
    byId("answer").textContent = "Give a value to learn what is cheapest.";
    return;
  }
  const shown = visible().filter((p) => p[state.q] != null);
  const good = shown.filter((p) => (lower ? p[state.q] <= bound : p[state.q] >= bound));
  good.sort((a, b) => a[paid] - b[paid] || (lower ? 1 : -1) * (a[state.q] - b[state.q]));
  const start = `For ${wanted.label} ${lower ? "≤" : "≥"} ${write(state.q, bound)} `;
  if (!good.length) {
    const values = shown.map((p) => p[state.q]);
    const best = values.length ? `; the best is ${write(state.q, Math[lower ? "min" : "max"](...values))}` : "";
    byId("answer").textContent = `${start}nothing shown is good enough${best}.`;
    return;
  }
  const best = good[0];
  const next = good.find((p) => p.sampler !== best.sampler);
  byId("answer").dataset.key = keyOf(best);
  const work = (p) => `${write("nfe", p.nfe)} evaluations` +
    (paid === "work" && p.work !== p.nfe ? ` with the work of ${write("work", p.work)}` : "");
  byId("answer").textContent = `${start}the cheapest is ${name(best)}: ${work(best)}, ` +
    `${write("seconds_per_picture", best.seconds_per_picture)} s a picture ` +
    `(${state.q} ${write(state.q, best[state.q])})` +
    (next ? `; then ${name(next)}, ${work(next)}.` : ".");
}

function drawFacts() {
  const s = results.settings;
  const seeds = new Set(results.cells.map((cell) => cell.seed)).size;
  const what = s.language ? `${s.split} captions (${s.language})` : s.prompts ? "prompts" : "samples";
  byId("facts").textContent = `${s.n} ${what}, ${seeds} seed${seeds === 1 ? "" : "s"}, converged: ${s.reference}; ` +
    `${s.device}, ${results.provenance.date.slice(0, 10)}`;
}

function render() {
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("log-x").checked = state.lx === "1";
  byId("log-y").checked = logY();
  byId("y").value = state.y;
  drawLegend();
  drawChart();
  drawTable();
  drawThumbnails();
  answer();
}

function start() {
  drawFacts();
  const names = qualities.map((q) => [q.key, q.label]);
  fill("y", names, state.y);
  fill("x", Object.entries(costs), state.x);
  fill("guidance", [["all", "all"], ...scales.map((s) => [scaleName(s), scaleName(s)])], state.g);
  byId("guidance-label").hidden = scales.length < 2;
  fill("target-quality", names, state.q);
  byId("target").value = state.t;
  const most = Math.max(0, ...withShots.map((cell) => cell.thumbnails.count));
  fill("picture", [...Array(most).keys()].map((i) => [String(i), String(i + 1)]), state.pic);
  byId("picture-label").hidden = most < 2;
  fill("seed", shotSeeds.map((s) => [String(s), String(s)]), state.seed);
  byId("seed-label").hidden = shotSeeds.length < 2;
  wire("y", "y");
  byId("y").addEventListener("change", () => change({ ly: "" })); // each quality has its own kind of axis
  wire("x", "x");
  wire("guidance", "g");
  wire("picture", "pic");
  wire("seed", "seed");
  wire("log-x", "lx", (node) => (node.checked ? "1" : "0"));
  wire("log-y", "ly", (node) => (node.checked ? "1" : "0"));
  wire("target-quality", "q");
  byId("target").addEventListener("input", (event) => change({ t: event.target.value }));
  byId("ask").addEventListener("submit", (event) => event.preventDefault());
  byId("theme").addEventListener("click", () =>
    change({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" }));
  byId("answers").replaceChildren(...results.answers.slice(1).map((a) => element("li", {}, a.text)));
  drawFailed();
  drawSettings();
  render();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  let width = byId("chart").clientWidth;
  new ResizeObserver(() => {
    if (byId("chart").clientWidth === width) return;
    width = byId("chart").clientWidth;
    requestAnimationFrame(drawChart); // not inside the observer: drawing changes what it observes
  }).observe(byId("chart"));
  document.documentElement.dataset.ready = "true";
}

window.addEventListener("error", (event) => {
  byId("fault").hidden = false;
  byId("fault").textContent = `This page could not be drawn: ${event.message}`;
});
start();
