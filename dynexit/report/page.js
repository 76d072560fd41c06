"use strict";
const byId = (id) => document.getElementById(id);

function make(parent, name, attributes = {}, text = "") {
  const isDrawn = name === "svg" || parent instanceof SVGElement;
  const made = isDrawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== "") made.textContent = text;
  parent.append(made);
  return made;
}

function addCopyButton(command) {
  const button = make(command.previousElementSibling, "button", { type: "button" }, "copy");
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(command);
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "copied" : "selected";
    }
  });
}
document.querySelectorAll(".command").forEach(addCopyButton);

const data = byId("data") && JSON.parse(byId("data").textContent);
const percent = (share, digits = 2) => `${(100 * share).toFixed(digits)} %`;

/* Cards */
function costText(figures) {
  return data.costs.map((cost, index) => {
    const value = figures.costs[index], milliseconds = figures.milliseconds[index];
    if (value === null) return "";
    return milliseconds === null ? `${value.toFixed(3)} of the MACs` : `${value.toFixed(2)} of the ${cost.name} (${milliseconds} ms)`;
  }).filter(Boolean).join(", ");
}

const numSeeds = data && new Set(data.points.map((point) => point.seed).filter((seed) => seed !== null)).size;
const isBaseline = (point) => ["static", "cascade", "one_threshold"].includes(data.series[point.series].kind);
const origin = (point) => point.label + (isBaseline(point) && numSeeds > 1 ? `, seed ${point.seed}` : "");

function fillCard(card, title, point, commands = {}) {
  card.replaceChildren();
  make(card, "h3", {}, title);
  const series = data.series[point.series];
  const figures = make(card, "p");
  make(figures, "strong", {}, `${point.test.text} on test`);
  figures.append(point.difference ? `; against the backbone ${point.difference} points: ${point.verdict}.` : ".");
  make(card, "p", {}, `On test ${costText(point.test)}. On validation ${point.validation.text}, ${costText(point.validation)}.`);
  if (point.words) make(card, "p", {}, `${point.words}.`);
  const bar = make(card, "svg", { class: "shares", viewBox: "0 0 100 4", preserveAspectRatio: "none" });
  let start = 0;
  point.shares.forEach((share, exit) => {
    const isLast = exit === point.shares.length - 1;
    const look = isLast ? { class: "rest" } : { fill: shade(exit / point.shares.length) };
    make(bar, "rect", { x: start, width: 100 * share, height: 4, ...look });
    start += 100 * share;
  });
  const last = ["static", "cascade"].includes(series.kind) ? "a network each" : "the last at the backbone’s classifier";
  make(card, "p", {}, `Share leaving: ${point.shares.map((share) => (100 * share).toFixed(0)).join(" / ")} %, ${last}.`);
  const line = make(card, "p", {}, `${series.kind.replace("_", " ")} of ${origin(point)} `);
  make(line, "span", { class: "id" }, [point.id && `point ${point.id}`, point.search && `search ${point.search}`].filter(Boolean).join(", "));
  for (const [what, command] of Object.entries(commands)) {
    make(card, "div", { class: "what" }, what);
    addCopyButton(make(card, "code", { class: "command" }, command));
  }
  card.hidden = false;
}

const shade = (depth) => `hsl(${75 + 200 * depth} 48% ${70 - 38 * depth}%)`;

/* Choose your budget */
function setUpBudget() {
  const kinds = [], [byMacs] = data.offers;
  const within = (offers, most, cost) => Math.max(0, offers.filter((offer) => cost(offer) <= most).length - 1);
  const first = byMacs[within(byMacs, 0.5, (offer) => offer.cost)];  // the headline's
  data.offers.forEach((offers, index) => {
    if (!offers.length) return;
    const at = offers.findIndex((offer) => first && offer.point === first.point);
    const start = at < 0 ? within(offers, 0.5, (offer) => offer.cost) : at;
    kinds.push({ name: data.costs[index].name, offers, start, words: (offer) => offer.budget });
  });
  const kept = byMacs.filter((offer) => offer.loss !== null).reverse();
  if (kept.length) {
    const loss = (offer) => Number(offer.loss) ? `at most ${offer.loss} points of accuracy lost` : "no accuracy lost";
    kinds.push({
      name: "accuracy lost", offers: kept, start: within(kept, 1, (offer) => Number(offer.loss)),
      words: (offer) => `${loss(offer)} on validation: ${offer.budget}`,
    });
  }
  if (data.risks.length) {
    const risk = (one) => data.points[one.point].risk;
    const cost = (one) => data.points[one.point].validation.costs[0], right = (one) => data.points[one.point].validation.accuracy;
    const byCost = [...data.risks].sort((a, b) => cost(a) - cost(b) || right(b) - right(a));
    const offers = [...new Set(data.risks.map(risk))].sort((a, b) => a - b)
      .map((most) => ({ ...byCost.find((one) => risk(one) <= most), most }));
    kinds.push({ name: "certified risk", offers, start: offers.length - 1, words: (offer) => `risk certified to be at most ${offer.most}` });
  }
  if (!kinds.length) return;
  const form = byId("budget-form");
  const choice = make(make(form, "label", {}, "budget of "), "select", { id: "budget-kind" });
  kinds.forEach((kind, index) => make(choice, "option", { value: index }, kind.name));
  const range = make(form, "input", { type: "range", id: "budget", "aria-label": "budget", min: 0, step: 1 });
  const show = () => {
    const { offers, words } = kinds[choice.value], offer = offers[range.value];
    range.setAttribute("aria-valuetext", words(offer));
    fillCard(byId("chosen"), words(offer), data.points[offer.point], offer.commands);
  };
  choice.addEventListener("change", () => {
    const { offers, start } = kinds[choice.value];
    range.max = offers.length - 1;
    range.value = start;
    show();
  });
  range.addEventListener("input", show);
  choice.dispatchEvent(new Event("change"));
  byId("usual-budgets").open = false;
  addEventListener("beforeprint", () => { byId("usual-budgets").open = true; });
}

/* The figure */
const SHAPES = [
  "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0-1 0Z", "M-.9-.9H.9V.9H-.9Z", "M0-1.25L1.25 0L0 1.25L-1.25 0Z", "M0-1.2L1.15.9H-1.15Z",
  "M0 1.2L1.15-.9H-1.15Z", "M-1.2 0L.9-1.15V1.15Z", "M1.2 0L-.9-1.15V1.15Z", "M-.4-1.2H.4V-.4H1.2V.4H.4V1.2H-.4V.4H-1.2V-.4H-.4Z",
];

function setUpFigure() {
  const svg = byId("figure"), tip = byId("tip"), pinned = byId("pinned");
  const seeds = [...new Set(data.points.map((point) => point.seed))].filter((seed) => seed !== null).sort((a, b) => a - b);
  const state = { split: "test", cost: 0, box: null, off: new Set(), offSeeds: new Set(), near: null, pin: null };
  const edge = { left: 58, right: 14, top: 12, bottom: 48 };
  let width = 0, height = 0, x, y, drag = null;

  const isOn = (point) => !state.off.has(point.series) && !state.offSeeds.has(point.seed);
  const cost = (point) => point[state.split].costs[state.cost];
  const accuracy = (point) => point[state.split].accuracy;
  const shown = () => data.points.filter((point) => isOn(point) && cost(point) !== null);
  const isBySeed = (series) => seeds.length > 1 && (series.kind === "search" || series.kind === "gates");
  const look = (series) => `${series.kind} ${series.colour < 0 ? "c-1" : `c${series.colour % 8}`}`;
  const linesOf = (series) => (series.line && state.cost === 0 ? series.line : []);

  function wholeBox() {
    const lines = data.series.filter((_, index) => !state.off.has(index)).flatMap(linesOf);
    const xs = [...shown().map(cost), ...lines.map((place) => place[0])];
    const ys = [...shown().map(accuracy), ...lines.map((place) => place[1]), ...data.backbone[state.split]];
    const low = Math.min(...ys, 1), high = Math.max(...ys, 0), more = 0.04 * (high - low) || 0.01;
    return { x: [0.9 * Math.min(...xs, 1), Math.max(1.02, 1.02 * Math.max(...xs))], y: [low - more, Math.min(1.002, high + more)] };
  }

  const scale = ([from, to], start, end) => {
    const map = (value) => start + (value - from) / (to - from) * (end - start);
    map.inverse = (place) => from + (place - start) / (end - start) * (to - from);
    return map;
  };

  function ticks([from, to], most) {
    const raw = (to - from) / most, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return { digits, values: Array.from({ length: most + 2 }, (_, i) => (Math.ceil(from / step - 1e-9) + i) * step).filter((one) => one <= to) };
  }

  function draw() {
    width = Math.max(280, svg.clientWidth || 900);
    height = Math.round(Math.min(520, Math.max(300, 0.6 * width)));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const box = state.box || wholeBox();
    x = scale(box.x, edge.left, width - edge.right);
    y = scale(box.y, height - edge.bottom, edge.top);
    const across = ticks(box.x, width < 500 ? 5 : 9), up = ticks(box.y.map((one) => 100 * one), 8);
    for (const value of across.values) {
      make(svg, "line", { class: "grid", x1: x(value), x2: x(value), y1: edge.top, y2: height - edge.bottom });
      make(svg, "text", { class: "tick", x: x(value), y: height - edge.bottom + 18, "text-anchor": "middle" }, value.toFixed(across.digits));
    }
    for (const value of up.values) {
      make(svg, "line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(value / 100), y2: y(value / 100) });
      make(svg, "text", { class: "tick", x: edge.left - 8, y: y(value / 100) + 4, "text-anchor": "end" }, `${value.toFixed(up.digits)} %`);
    }
    make(svg, "text", { class: "axis", x: (edge.left + width - edge.right) / 2, y: height - 8, "text-anchor": "middle" }, data.costs[state.cost].axis);
    const inner = make(svg, "svg", { x: edge.left, y: edge.top, width: width - edge.left - edge.right, height: height - edge.top - edge.bottom,
      viewBox: `${edge.left} ${edge.top} ${width - edge.left - edge.right} ${height - edge.top - edge.bottom}` });
    drawBackbone(inner);
    data.series.forEach((series, index) => { if (!state.off.has(index)) drawLines(inner, series); });
    data.points.forEach((point, index) => { if (isOn(point) && cost(point) !== null) drawPoint(inner, point, index); });
    mark();
  }

  function drawBackbone(inner) {
    const values = data.backbone[state.split];
    if (!values.length) return;
    const low = y(Math.min(...values)), high = y(Math.max(...values)), middle = y(values.reduce((a, b) => a + b) / values.length);
    if (values.length > 1) make(inner, "rect", { class: "band ink", x: edge.left, width, y: high, height: low - high });
    make(inner, "line", { class: "backbone", x1: edge.left, x2: width, y1: middle, y2: middle });
  }

  function drawLines(inner, series) {
    const steps = (series.curves || {})[`${state.cost}${state.split}`] || [];
    const stairs = (value) => steps.map((step, index) => `${index ? `H${x(step[0])}V` : `M${x(step[0])} `}${y(step[value])}`).join("");
    if (steps.length) {
      const back = steps.map((step, index) => [step, index]).reverse()
        .map(([step, index]) => `L${x(index + 1 < steps.length ? steps[index + 1][0] : step[0])} ${y(step[2])}L${x(step[0])} ${y(step[2])}`).join("");
      make(inner, "path", { class: `band ${look(series)}`, d: `${stairs(3)}${back}Z` });
      make(inner, "path", { class: `curve ${look(series)}`, d: stairs(1), "stroke-dasharray": series.dash });
    }
    const line = linesOf(series);
    if (line.length) make(inner, "path", { class: `curve ${look(series)}`, d: `M${line.map(([a, b]) => `${x(a)} ${y(b)}`).join("L")}`, "stroke-dasharray": series.dash });
    for (const [a, b] of line.length <= 20 ? line : []) make(inner, "path", { class: "cross", d: `M${x(a) - 3} ${y(b) - 3}l6 6m0-6l-6 6` });
  }

  function drawPoint(inner, point, index) {
    const series = data.series[point.series], shape = isBySeed(series) ? seeds.indexOf(point.seed) % 7 : series.shape;
    const size = { gates: 5, static: 5, search: 3.2 }[series.kind] || 2.6;
    make(inner, "path", { class: `dot ${look(series)}`, d: SHAPES[shape], "data-point": index, "vector-effect": "non-scaling-stroke",
      transform: `translate(${x(cost(point))} ${y(accuracy(point))}) scale(${size})` });
  }

  function mark() {
    svg.querySelectorAll(".ring").forEach((ring) => ring.remove());
    for (const point of new Set([state.near, state.pin])) {
      if (!point || !isOn(point) || cost(point) === null) continue;
      make(svg, "circle", { class: "ring", cx: x(cost(point)), cy: y(accuracy(point)), r: 9 });
    }
    const point = state.near;
    tip.hidden = !point;
    if (!point) return;
    tip.replaceChildren();
    make(tip, "strong", {}, `${point[state.split].text} on ${state.split}`);
    make(tip, "div", {}, costText(point[state.split]));
    make(tip, "div", {}, `${data.series[point.series].name}; ${origin(point)}`);
    const left = x(cost(point)) / width * svg.clientWidth, top = y(accuracy(point)) / height * svg.clientHeight;
    tip.style.left = `${Math.min(Math.max(0, left - 90), svg.clientWidth - tip.offsetWidth)}px`;
    tip.style.top = `${top > tip.offsetHeight + 16 ? top - tip.offsetHeight - 14 : top + 16}px`;
  }

  function pin(point) {
    state.pin = point;
    pinned.hidden = !point;
    const offer = [...data.offers.flat(), ...data.risks].find((one) => data.points[one.point] === point);
    if (point) fillCard(pinned, "The pinned point", point, offer ? offer.commands : {});
    mark();
  }

  const place = (event) => {
    const around = svg.getBoundingClientRect();
    return [(event.clientX - around.left) * width / around.width, (event.clientY - around.top) * height / around.height];
  };

  function nearest([px, py]) {
    const far = (point) => Math.hypot(x(cost(point)) - px, y(accuracy(point)) - py);
    return shown().filter((point) => far(point) < 24).sort((a, b) => far(a) - far(b))[0] || null;
  }

  svg.addEventListener("pointermove", (event) => {
    if (drag) {
      const [px, py] = place(event), [sx, sy] = drag.start;
      drag.rect = drag.rect || make(svg, "rect", { class: "selection" });
      for (const [key, value] of Object.entries({ x: Math.min(px, sx), y: Math.min(py, sy), width: Math.abs(px - sx), height: Math.abs(py - sy) })) drag.rect.setAttribute(key, value);
      drag.end = [px, py];
    }
    state.near = drag && drag.end ? null : nearest(place(event));
    mark();
  });
  svg.addEventListener("pointerleave", () => { state.near = null; mark(); });
  svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse" && event.button === 0) drag = { start: place(event) }; });
  addEventListener("pointerup", () => {
    if (!drag) return;
    const { start, end } = drag;
    if (drag.rect) drag.rect.remove();
    drag = null;
    if (!end || Math.abs(end[0] - start[0]) < 8 || Math.abs(end[1] - start[1]) < 8) return;
    state.box = { x: [start[0], end[0]].map(x.inverse).sort((a, b) => a - b), y: [start[1], end[1]].map(y.inverse).sort((a, b) => a - b) };
    draw();
  });
  svg.addEventListener("click", (event) => { const near = nearest(place(event)); if (near) pin(near); });
  svg.addEventListener("dblclick", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter" && state.near) pin(state.near);
    if (event.key === "Escape") pin(null);
    if (!step) return;
    event.preventDefault();
    const order = shown().sort((a, b) => cost(a) - cost(b));
    const at = order.indexOf(state.near);
    state.near = order[at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + step))] || null;
    mark();
  });

  const show = (box) => { state.box = box; draw(); };
  function zoom(factor) {
    const box = state.box || wholeBox();
    const grow = ([a, b]) => [(a + b) / 2 - factor * (b - a) / 2, (a + b) / 2 + factor * (b - a) / 2];
    show({ x: grow(box.x), y: grow(box.y) });
  }

  function toggle(parent, set, value, text, classes, dash, shape) {
    const button = make(parent, "button", { type: "button", "aria-pressed": String(!set.has(value)), class: "key" });
    const swatch = make(button, "svg", { viewBox: "0 0 24 10", width: 24, height: 10 });
    if (dash !== null) make(swatch, "path", { class: `curve ${classes}`, d: "M0 5H24", "stroke-dasharray": dash });
    if (shape !== null) make(swatch, "path", { class: `dot ${classes}`, d: SHAPES[shape], transform: "translate(12 5) scale(3.6)", "vector-effect": "non-scaling-stroke" });
    button.append(text);
    button.addEventListener("click", () => {
      if (!set.delete(value)) set.add(value);
      button.setAttribute("aria-pressed", String(!set.has(value)));
      draw();
    });
  }

  const isCrowded = data.series.filter((series) => series.kind === "search").length > 2;
  data.series.forEach((series, index) => { if (isCrowded && ["fixed", "one_threshold"].includes(series.kind)) state.off.add(index); });
  const controls = byId("figure-controls"), legend = byId("legend");
  const splits = make(make(controls, "label", {}, "figures of "), "select", { id: "split" });
  for (const split of ["test", "validation"]) make(splits, "option", { value: split }, split);
  splits.addEventListener("change", () => { state.split = splits.value; draw(); });
  if (data.costs.length > 1) {
    const costs = make(make(controls, "label", {}, "against "), "select", { id: "cost" });
    data.costs.forEach((one, index) => make(costs, "option", { value: index }, one.name));
    costs.addEventListener("change", () => { state.cost = Number(costs.value); show(null); });
  }
  for (const [text, act] of [["zoom in", () => zoom(0.6)], ["zoom out", () => zoom(1 / 0.6)], ["show all", () => show(null)]]) {
    make(controls, "button", { type: "button" }, text).addEventListener("click", act);
  }
  data.series.forEach((series, index) => toggle(legend, state.off, index, series.name, look(series), series.dash,
    series.kind === "published" || (series.dash !== null && isBySeed(series)) ? null : isBySeed(series) ? 0 : series.shape));
  if (seeds.length > 1) seeds.forEach((seed, index) => toggle(legend, state.offSeeds, seed, `seed ${seed}`, "seed", null, index % 7));
  make(legend, "span", { class: "key" }, data.backbone.test.length ? `dashed line: backbone ${percent(data.backbone.test.reduce((a, b) => a + b) / data.backbone.test.length)}` : "");
  byId("interactive").hidden = false;
  new ResizeObserver(() => { if (svg.clientWidth && svg.clientWidth !== width) draw(); }).observe(svg);
  draw();
}

if (data) {
  setUpFigure();
  setUpBudget();
}
