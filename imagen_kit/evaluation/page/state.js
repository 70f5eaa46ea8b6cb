// What is shown, kept in the address after "#" so that a view can be sent on; and how numbers are written.

const { results, points, costs } = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const qualities = results.qualities.filter((q) => points.some((p) => p[q.key] != null));
const samplers = Object.keys(results.samplers).filter((label) => points.some((p) => p.sampler === label));
const scales = [...new Set(points.map((p) => p.guidance))];
const scaleName = (scale) => (scale === null ? "own" : String(scale));
const first = results.answers[0];
const paid = "work" in costs ? "work" : "nfe"; // what the cheapest is cheapest in

const defaults = {
  x: paid,
  y: qualities.length ? qualities[0].key : "",
  lx: "1",
  ly: "",
  off: "",
  g: "all",
  sort: "sampler",
  down: "",
  pic: "0",
  seed: "",
  theme: "",
  q: first ? first.quality : qualities.length ? qualities[0].key : "",
  t: first ? String(first.target) : "",
  focus: "",
};
const state = { ...defaults, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) };
if (!qualities.some((q) => q.key === state.y)) state.y = defaults.y;
if (!qualities.some((q) => q.key === state.q)) state.q = defaults.q;
if (!(state.x in costs)) state.x = Object.keys(costs)[0] || "nfe";

const quality = (key) => qualities.find((q) => q.key === key);
const logY = () => (state.ly === "" ? Boolean(quality(state.y) && quality(state.y).log) : state.ly === "1");
const hidden = () => new Set(state.off ? state.off.split("|") : []);
const visible = () => {
  const off = hidden();
  return points.filter((p) => !off.has(p.sampler) && (state.g === "all" || scaleName(p.guidance) === state.g));
};

function change(values) {
  Object.assign(state, values);
  const kept = Object.entries(state).filter(([key, value]) => key !== "focus" && value !== defaults[key]);
  const text = new URLSearchParams(kept).toString();
  history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  render();
}

const SHARES = new Set(["accuracy", "precision", "recall", "saved"]);

function write(key, value) {
  if (value == null) return "–";
  if (SHARES.has(key)) return (100 * value).toFixed(1).replace(/\.0$/, "") + " %";
  if (key === "memory") return (value / 2 ** 20).toFixed(0) + " MiB";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e5)) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

function label(key) {
  const found = quality(key);
  return found ? found.label : costs[key] || key;
}

const stepWord = (point) => `${point.steps} step${point.steps === 1 ? "" : "s"}`;
const name = (point) =>
  point.sampler + ", " + stepWord(point) +
  (scales.length > 1 ? ", guidance " + scaleName(point.guidance) : "");

// The settings that no other one beats in cost without being worse in quality, cheapest first.
function pareto(shown, cost, key) {
  const sign = quality(key) && quality(key).better === "higher" ? -1 : 1;
  const known = shown.filter((p) => p[cost] != null && p[key] != null);
  known.sort((a, b) => a[cost] - b[cost] || sign * (a[key] - b[key]));
  const front = [];
  for (const p of known)
    if (!front.length || sign * p[key] < sign * front[front.length - 1][key]) front.push(p);
  return front;
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties))
    if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  made.append(...children);
  return made;
}
