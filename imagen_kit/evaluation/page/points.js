// The chart's points: what is told about each by pointer and keyboard, and the legend that chooses samplers.

let current = null; // the point that Tab reaches
const same = (a, b) => a && b && a.sampler === b.sampler && a.steps === b.steps && a.guidance === b.guidance;
const keyOf = (p) => [p.sampler, p.steps, scaleName(p.guidance)].join("|");

function drawPoints(lines, at, front) {
  const group = shape("g", {});
  const marks = lines.map((own) => own.map((p) => drawPoint(p, at(p), front.has(p))));
  const every = marks.flat();
  if (!every.some((m) => same(m.point, current))) current = every.length ? every[0].point : null;
  marks.forEach((own, i) => own.forEach((m, j) => {
    m.node.setAttribute("tabindex", same(m.point, current) ? "0" : "-1");
    m.node.addEventListener("keydown", (event) => move(event, marks, i, j));
    m.node.addEventListener("pointerenter", () => tell(m));
    m.node.addEventListener("pointerleave", quiet);
    m.node.addEventListener("focus", () => { setCurrent(every, m); tell(m); });
    m.node.addEventListener("blur", quiet);
    group.append(m.node);
  }));
  plot.append(group);
  const wanted = every.find((m) => keyOf(m.point) === state.focus);
  if (wanted) tell(wanted);
  else quiet();
}

function drawPoint(point, [px, py], onFront) {
  const spoken = `${name(point)}: ${label(state.x)} ${write(state.x, point[state.x])}, ` +
    `${label(state.y)} ${write(state.y, point[state.y])}${onFront ? ", on the Pareto front" : ""}`;
  const node = shape("g", {
    class: "point", role: "img", "aria-label": spoken, "data-key": keyOf(point), "data-front": onFront ? 1 : 0,
    transform: `translate(${px.toFixed(2)} ${py.toFixed(2)})`,
  });
  node.append(shape("circle", { class: "hit", r: 13 }), shape("circle", { class: "halo", r: 11 }));
  if (onFront) node.append(shape("circle", { class: "ring", r: 8 }));
  node.append(shape("path", { class: "mark", d: mark(point.sampler), style: `fill:${color(point.sampler)}` }));
  return { node, point, px, py };
}

function setCurrent(every, chosen) {
  current = chosen.point;
  for (const m of every) m.node.setAttribute("tabindex", m === chosen ? "0" : "-1");
}

// Left and right go along a line, up and down to the nearest point of the next line.
function move(event, marks, i, j) {
  const own = marks[i];
  const nearest = (line) => line.reduce((a, b) => (Math.abs(b.px - own[j].px) < Math.abs(a.px - own[j].px) ? b : a));
  const beside = (k) => nearest(marks[(k + marks.length) % marks.length]);
  const goals = {
    ArrowRight: () => own[j + 1], ArrowLeft: () => own[j - 1], Home: () => own[0], End: () => own[own.length - 1],
    ArrowDown: () => beside(i + 1), ArrowUp: () => beside(i - 1),
  };
  if (event.key === "Escape") quiet();
  if (!(event.key in goals)) return;
  event.preventDefault();
  const goal = goals[event.key]();
  if (goal) goal.node.focus();
}

function tell(m) {
  quiet();
  m.node.classList.add("on");
  const { point } = m;
  const tip = byId("tip");
  const rows = [...Object.keys(costs), ...qualities.map((q) => q.key)]
    .filter((key) => point[key] != null)
    .filter((key) => layout().width >= SMALL || key === state.x || key === state.y || key === "seconds_per_picture");
  const table = element("table", {}, ...rows.map((key) => element(
    "tr", { className: key === state.x || key === state.y ? "shown" : "" },
    element("td", {}, label(key).replace(/ \(calls.*/, "")), element("td", {}, write(key, point[key])),
  )));
  tip.replaceChildren(element("b", {}, name(point)), table);
  if (point.seeds > 1) tip.append(`mean of ${point.seeds} seeds`);
  tip.hidden = false;
  const scale = byId("chart").clientWidth / layout().width;
  const left = m.px * scale + (m.px * scale > byId("chart").clientWidth / 2 ? -tip.offsetWidth - 16 : 16);
  tip.style.left = `${Math.max(0, Math.min(left, byId("chart").clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${Math.max(0, m.py * scale - tip.offsetHeight / 2)}px`;
}

function quiet() {
  byId("tip").hidden = true;
  for (const node of plot.querySelectorAll(".on")) node.classList.remove("on");
}

function drawLegend() {
  const off = hidden();
  const buttons = samplers.map((sampler) => {
    const icon = shape("svg", { width: 30, height: 14, viewBox: "-15 -7 30 14", "aria-hidden": "true" });
    const style = `stroke:${color(sampler)};stroke-width:2;stroke-dasharray:${dash(sampler) || "none"}`;
    icon.append(shape("path", { d: "M-14 0H14", style }), shape("path", { d: mark(sampler), style: `fill:${color(sampler)}` }));
    const button = element("button", { type: "button" }, icon, sampler);
    button.setAttribute("aria-pressed", String(!off.has(sampler)));
    button.addEventListener("click", () => {
      const now = hidden();
      if (!now.delete(sampler)) now.add(sampler);
      change({ off: [...now].join("|") });
      byId("legend").children[samplers.indexOf(sampler)].focus();
    });
    const fade = (faint) => plot.querySelectorAll(".line").forEach((line) =>
      line.classList.toggle("faded", faint && line.dataset.sampler !== sampler));
    button.addEventListener("pointerenter", () => fade(true));
    button.addEventListener("pointerleave", () => fade(false));
    return button;
  });
  for (const [text, value] of [["all", ""], ["none", samplers.join("|")]]) {
    const button = element("button", { type: "button", className: "plain" }, text);
    button.addEventListener("click", () => change({ off: value }));
    buttons.push(button);
  }
  byId("legend").replaceChildren(...buttons);
}
