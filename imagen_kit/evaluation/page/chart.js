// The chart's frame: scales, axes, lines and bands. SVG elements take their namespace from the one in the page.

const plot = byId("plot");
const SMALL = 560; // pixels; narrower charts have fewer ticks

function shape(tag, attributes, ...children) {
  const made = document.createElementNS(plot.namespaceURI, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const MARKS = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0 ${-1.25 * r}L${1.2 * r} ${r}H${-1.2 * r}z`,
  (r) => `M0 ${-1.35 * r}L${1.35 * r} 0L0 ${1.35 * r}L${-1.35 * r} 0z`,
  (r) => `M0 ${1.25 * r}L${1.2 * r} ${-r}H${-1.2 * r}z`,
  (r) => `M${-r / 2} ${-1.2 * r}h${r}v${0.7 * r}h${0.7 * r}v${r}h${-0.7 * r}v${0.7 * r}h${-r}v${-0.7 * r}h${-0.7 * r}v${-r}h${0.7 * r}z`,
];
const color = (sampler) => `var(--c${samplers.indexOf(sampler) % 9})`;
const mark = (sampler, r = 4.5) => MARKS[samplers.indexOf(sampler) % MARKS.length](r);
const dash = (sampler) => (results.samplers[sampler].stochastic ? "2 4" : "");

// Positions of values from [low, high] on [from, to] pixels.
function axis(values, from, to, log) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (!values.length) [low, high] = [1, 10];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const f = log ? Math.log10 : (v) => v;
  const pad = 0.05 * (f(high) - f(low));
  const [a, b] = [f(low) - pad, f(high) + pad];
  const place = (v) => from + ((f(v) - a) / (b - a)) * (to - from);
  return { place, ticks: ticks(a, b, log, Math.abs(to - from) < SMALL / 2 ? 4 : 7), log };
}

function ticks(a, b, log, most) {
  if (log && b - a > 0.7) {
    const whole = Math.ceil((b - a) / most);
    const factors = b - a > 3 ? [1] : b - a > 1.6 && most < 5 ? [1, 3] : [1, 2, 5];
    const out = [];
    for (let p = Math.floor(a); p <= Math.ceil(b); p += whole)
      for (const m of whole > 1 ? [1] : factors) out.push(Number(`${m}e${p}`));
    return out.filter((v) => Math.log10(v) >= a && Math.log10(v) <= b);
  }
  const [low, high] = log ? [10 ** a, 10 ** b] : [a, b];
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9 * step; v += step) out.push(Number(v.toPrecision(12)));
  return out;
}

function layout() {
  const width = Math.max(280, byId("chart").clientWidth);
  const height = Math.round(Math.min(460, Math.max(270, 0.52 * width)));
  return { width, height, left: width < SMALL ? 60 : 68, right: width - 14, top: 12, bottom: height - 46 };
}

function drawChart() {
  const box = layout();
  const [x, y] = [state.x, state.y];
  const logs = { x: state.lx === "1", y: logY() };
  const shown = visible().filter((p) => p[x] != null && p[y] != null);
  const drawn = shown.filter((p) => (!logs.x || p[x] > 0) && (!logs.y || p[y] > 0));
  const missing = shown.length - drawn.length;
  byId("left-out").textContent = missing
    ? `${missing} setting${missing > 1 ? "s" : ""} of value 0 or less cannot be shown on a logarithmic axis.`
    : "";
  const spread = drawn.flatMap((p) => p.spread[y] || []).filter((v) => !logs.y || v > 0);
  const across = axis(drawn.map((p) => p[x]), box.left, box.right, logs.x);
  const up = axis([...drawn.map((p) => p[y]), ...spread], box.bottom, box.top, logs.y);
  const at = (p) => [across.place(p[x]), up.place(p[y])];
  const front = pareto(drawn, x, y);

  plot.setAttribute("viewBox", `0 0 ${box.width} ${box.height}`);
  plot.replaceChildren(drawAxes(box, across, up));
  plot.append(...levels(box, up, y));
  const corners = front.map((p, i) => (i ? `H${at(p)[0]}V${at(p)[1]}` : `M${at(p)}`));
  plot.append(shape("path", { class: "front-line", d: corners.join("") || "M0 0" }));
  const lines = [];
  for (const sampler of samplers)
    for (const scale of scales) {
      const own = drawn.filter((p) => p.sampler === sampler && p.guidance === scale);
      own.sort((a, b) => a[x] - b[x]);
      if (own.length) lines.push(own);
    }
  for (const own of lines) plot.append(...drawLine(own, at, up, logs.y));
  drawPoints(lines, at, new Set(front));
}

function drawAxes(box, across, up) {
  const group = shape("g", { class: "axis" });
  const text = (attributes, content) => group.append(shape("text", attributes, content));
  for (const v of across.ticks) {
    const px = across.place(v);
    group.append(shape("line", { x1: px, x2: px, y1: box.top, y2: box.bottom }));
    text({ x: px, y: box.bottom + 17, "text-anchor": "middle" }, write(state.x, v).replace(" MiB", ""));
  }
  for (const v of up.ticks) {
    const py = up.place(v);
    group.append(shape("line", { x1: box.left, x2: box.right, y1: py, y2: py }));
    text({ x: box.left - 7, y: py + 4, "text-anchor": "end" }, write(state.y, v));
  }
  group.append(shape("line", { class: "frame", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const middle = (box.left + box.right) / 2;
  const short = (key) => (box.width < SMALL ? label(key).replace(/ to the .*| \(.*/, "") : label(key)) + (key === "memory" ? " (MiB)" : "");
  text({ class: "name", x: middle, y: box.height - 8, "text-anchor": "middle" }, short(state.x));
  const turn = `rotate(-90 13 ${(box.top + box.bottom) / 2})`;
  text({ class: "name", x: 13, y: (box.top + box.bottom) / 2, "text-anchor": "middle", transform: turn }, short(state.y));
  return group;
}

// Where the converged results lie (for qualities that are no distance to them), and the value asked for.
function levels(box, up, key) {
  const out = [];
  const line = (v, name) => {
    const py = up.place(v);
    if (Number.isFinite(py) && py >= box.top && py <= box.bottom)
      out.push(shape("line", { class: name, x1: box.left, x2: box.right, y1: py, y2: py }));
  };
  const known = results.references.map((r) => (key === "accuracy" ? r.accuracy && r.accuracy.all : r[key]));
  const numbers = known.filter((v) => v != null);
  if (numbers.length && !quality(key).paired) line(numbers.reduce((a, b) => a + b) / numbers.length, "converged");
  if (state.q === key && state.t !== "") line(Number(state.t), "wanted");
  return out;
}

// The 95 % interval of a share. Drawn as a bar: those of all samplers overlap, and as bands they would hide it all.
function whisker(p, at, up) {
  const [px] = at(p);
  const [low, high] = p.spread.accuracy.map((v) => up.place(v));
  const style = `stroke:${color(p.sampler)};fill:none`;
  return shape("path", { class: "whisker", d: `M${px - 3} ${low}h6m-3 0V${high}m-3 0h6`, style });
}

function drawLine(own, at, up, log) {
  const sampler = own[0].sampler;
  const out = [];
  if (state.y === "accuracy") out.push(...own.filter((p) => p.spread[state.y]).map((p) => whisker(p, at, up)));
  const sides = state.y !== "accuracy" && own.map((p) => p.spread[state.y]).every((s) => s && s[0] !== s[1] && (!log || s[0] > 0));
  if (sides && own.length > 1) {
    const edge = (i) => own.map((p) => [at(p)[0], up.place(p.spread[state.y][i])]);
    const d = "M" + [...edge(1), ...edge(0).reverse()].map((c) => c.join(" ")).join("L") + "z";
    out.push(shape("path", { class: "band", d, style: `fill:${color(sampler)}` }));
  }
  const d = "M" + own.map((p) => at(p).join(" ")).join("L");
  const style = `stroke:${color(sampler)};stroke-dasharray:${dash(sampler) || "none"}`;
  out.push(shape("path", { class: "line", "data-sampler": sampler, d, style }));
  return out;
}
