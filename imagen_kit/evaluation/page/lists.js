// The table that sorts, the thumbnails, and where the numbers come from.

const SHORT = {
  nfe: "evaluations", work: "work in evaluations", evaluations_per_picture: "passes a picture", seconds_per_picture: "s a picture",
  memory: "peak memory",
};

function columns() {
  const scale = scales.length > 1 ? [["guidance", "guidance"]] : [];
  const asked = Object.keys(costs).filter((key) => key !== "evaluations_per_picture" ||
    points.some((p) => p[key] !== p.nfe));
  const saved = paid === "work" ? [["saved", "blocks saved"]] : [];
  return [["sampler", "sampler"], ["steps", "steps"], ...scale, ...asked.map((key) => [key, SHORT[key] || key]), ...saved,
    ...qualities.map((q) => [q.key, q.label.replace(/ \((judge|.*@.*)\)$/, "")])];
}

function sorted(rows) {
  const sign = state.down === "1" ? -1 : 1;
  const key = state.sort;
  const rank = (p) => (key === "sampler" ? samplers.indexOf(p.sampler) : key === "guidance" ? p.guidance ?? -Infinity : p[key]);
  return [...rows].sort((a, b) => {
    const [u, v] = [rank(a), rank(b)];
    if (u == null || v == null) return (u == null) - (v == null); // what was not measured comes last
    return sign * (u - v) || a.nfe - b.nfe;
  });
}

function drawTable() {
  const shown = visible();
  const front = new Set(pareto(shown, state.x, state.y));
  const heads = columns().map(([key, text]) => {
    const on = state.sort === key;
    const arrow = on ? (state.down === "1" ? " ▼" : " ▲") : "";
    const button = element("button", { type: "button" }, text + arrow);
    button.addEventListener("click", () => {
      change({ sort: key, down: on && state.down !== "1" ? "1" : "" });
      byId("table").querySelector(`th[data-key="${key}"] button`).focus();
    });
    const head = element("th", { scope: "col", "data-key": key }, button);
    head.setAttribute("aria-sort", on ? (state.down === "1" ? "descending" : "ascending") : "none");
    return head;
  });
  const rows = sorted(shown).map((p) => {
    const row = element("tr", { className: front.has(p) ? "best" : "" });
    for (const [key] of columns()) {
      if (key === "sampler") row.append(element("th", { scope: "row" }, (front.has(p) ? "● " : "") + p.sampler));
      else row.append(element("td", {}, key === "guidance" ? scaleName(p.guidance) : write(key, p[key])));
    }
    return row;
  });
  const caption = element("caption", { className: "hint" }, `${rows.length} of ${points.length} settings`);
  byId("table").replaceChildren(caption, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
}

function drawFailed() {
  const failed = results.cells.filter((cell) => cell.failed);
  byId("failed").replaceChildren(...failed.map((cell) => element("li", {}, `${name(cell)}: ${cell.failed}`)));
}

const withShots = results.cells.filter((cell) => cell.thumbnails);
const shotSeeds = [...new Set(withShots.map((cell) => cell.seed))];

function drawThumbnails() {
  byId("thumbnails").hidden = !withShots.length;
  if (!withShots.length) return;
  const seed = shotSeeds.includes(Number(state.seed)) && state.seed !== "" ? Number(state.seed) : shotSeeds[0];
  const front = new Set(pareto(visible(), state.x, state.y).map(keyOf));
  const off = hidden();
  const of = (rows) => rows.filter((r) => r.thumbnails && r.seed === seed &&
    (state.g === "all" || scaleName(r.guidance) === state.g));
  const rows = [["converged: " + results.settings.reference, of(results.references)]];
  for (const sampler of samplers)
    if (!off.has(sampler)) rows.push([sampler, of(withShots).filter((cell) => cell.sampler === sampler)]);
  const captions = (of(results.references)[0] || {}).captions || [];
  byId("caption").textContent = captions[Number(state.pic)] || "";
  byId("grid").replaceChildren(...rows.filter(([, cells]) => cells.length).map(([title, cells]) => {
    cells.sort((a, b) => (a.guidance ?? 0) - (b.guidance ?? 0) || a.nfe - b.nfe);
    return element("div", { className: "row" }, element("h3", {}, title),
      element("div", { className: "shots", tabIndex: 0, role: "region", ariaLabel: title },
        ...cells.map((cell) => figure(cell, front))));
  }));
}

function figure(cell, front) {
  const { count, data } = cell.thumbnails;
  const place = Math.min(Number(state.pic), count - 1);
  const isReference = !("sampler" in cell);
  const scale = scales.length > 1 ? `guidance ${scaleName(cell.guidance)}` : "";
  const words = isReference ? [scale] : [stepWord(cell), `${cell.nfe} evaluations`, scale];
  const shown = qualities.length && !isReference ? results.qualities[0] : null;
  if (shown && cell[shown.key] != null) words.push(`${shown.key} ${write(shown.key, cell[shown.key])}`);
  const shot = element("div", { className: results.settings.subject.startsWith("analytic") && count === 1 ? "shot points" : "shot" });
  shot.setAttribute("role", "img");
  shot.setAttribute("aria-label", isReference ? "converged" : name(cell));
  shot.style.backgroundImage = `url(${data})`;
  shot.style.backgroundSize = `${100 * count}% 100%`;
  shot.style.backgroundPosition = `${count > 1 ? (100 * place) / (count - 1) : 0}% 0`;
  const caption = element("figcaption", {});
  words.filter(Boolean).forEach((word, i) => caption.append(...(i ? [element("br"), word] : [word])));
  return element("figure", { className: !isReference && front.has(keyOf(cell)) ? "front" : "" }, shot, caption);
}

function drawSettings() {
  const source = results.provenance;
  const options = Object.entries(results.samplers).map(([label, s]) =>
    `${label}: ${s.stochastic ? "stochastic, " : ""}order ${s.order}, ` +
    Object.entries(s.options).map(([k, v]) => `${k}=${v}`).join(" "));
  const rows = Object.entries(results.settings).filter(([, v]) => v !== null);
  rows.push(["command", source.command], ["date", source.date], ["threads", source.threads],
    ["versions", Object.entries(source.versions).map(([k, v]) => `${k} ${v}`).join(", ")],
    ...options.map((text) => ["sampler", text]),
    ...(results.skipped || []).map((s) => ["left out", s.why]));
  byId("settings").replaceChildren(element("tbody", {}, ...rows.map(([key, value]) => element(
    "tr", {}, element("th", { scope: "row" }, key), element("td", {}, String(value))))));
}
