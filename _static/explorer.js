// The explorer (explorer.md): recorded learning curves of the rules that a reader chooses.
//
// A classic script that draws what another one, explorer-data.js, has set as `explorerData`, since
// neither a module nor a fetch is allowed where the book is opened as file://. It draws where the
// page has its place; elsewhere it does nothing. An arm is a rule with its options.
"use strict";
(() => {
const last = list => list[list.length - 1];
const spread = ({mean, sd}, n) => mean[n].toFixed(2) + (sd ? ` ± ${sd[n].toFixed(2)}` : "");
const epochs = n => `${n} epoch${n > 1 ? "s" : ""}`;
const final = arm => arm.seeds ? spread(arm, arm.mean.length - 1)
  : `no number after ${epochs(arm.mean.length)}`;
const ink = ({colour}) => `--ex-own: ${colour === "#000000" ? "var(--ex-text)" : colour}`;
const dashes = ({dash}) => dash.map(length => 2 * length).join(" ");

// ---- what is chosen, and its address ------------------------------------------------------------
const usual = arms => arms.filter(arm => arm.first).map(arm => arm.id);

function fromHash(hash) {
  const said = new Map(hash.slice(1).split("&").map(part => part.split("=")));
  const wanted = explorerData.find(each => each.id === said.get("experiment"));
  const experiment = wanted ?? explorerData[0];
  const ids = said.get("rules")?.split(",") ?? usual(experiment.arms);
  const shown = new Set(experiment.arms.map(arm => arm.id).filter(id => ids.includes(id)));
  return {experiment, shown, close: said.get("close") === "1"};
}

const toHash = ({experiment, shown, close}) =>
  `#experiment=${experiment.id}&rules=${[...shown].join(",")}${close ? "&close=1" : ""}`;

// ---- the chart ----------------------------------------------------------------------------------
// Round numbers from low to high, about `count` of them, and a step beyond at most.
function ticks(low, high, count) {
  const rough = Math.max(high - low, 0.1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(n => n * power >= rough);
  const from = Math.floor(low / step + 1e-9);
  const to = Math.max(Math.ceil(high / step - 1e-9), from + 1);
  return Array.from({length: to - from + 1}, (_, n) => +((from + n) * step).toFixed(6));
}

// Heights of labels that do not lie on each other, each as near to its wish as the order allows.
function apart(wishes, gap, bottom) {
  const order = wishes.map((_, n) => n).sort((m, n) => wishes[m] - wishes[n]), y = [];
  order.forEach((n, k) => { y[n] = k ? Math.max(wishes[n], y[order[k - 1]] + gap) : wishes[n]; });
  order.reverse().forEach((n, k) => { y[n] = Math.min(y[n], k ? y[order[k - 1]] - gap : bottom); });
  return y;
}

function chart({experiment, shown, close}, width) {
  const arms = experiment.arms.filter(arm => shown.has(arm.id)), height = width < 500 ? 280 : 360;
  const [left, top, right, bottom] = [36, 24, width - 24, height - 38];
  const count = Math.max(...experiment.arms.map(arm => arm.mean.length));
  const edge = sign => arms.flatMap(({mean, sd}) => mean.map((m, n) => m + sign * (sd ? sd[n] : 0))
    .slice(close ? Math.floor(count / 2) : 0));
  const marks = edge(1).length
    ? ticks(Math.max(0, Math.min(...edge(-1))), Math.min(100, Math.max(...edge(1))), 6)
    : ticks(0, 100, 5);
  const x = n => left + (right - left) * (count > 1 ? n / (count - 1) : 0);
  const y = v => bottom - (bottom - top) * (v - marks[0]) / (last(marks) - marks[0]);
  const path = values => values.map((v, n) => `${x(n).toFixed(2)},${y(v).toFixed(2)}`);
  const text = (words, x, y, anchor = "start") =>
    `<text x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`;
  const grid = marks.map(v => `<line class="ex-grid" data-value="${v}" x1="${left}" x2="${right}"
    y1="${y(v)}" y2="${y(v)}"/>${text(v, left - 6, y(v) + 4, "end")}`);
  const whole = n => n > 1 && n <= count && n % 1 === 0;
  const along = [1, ...ticks(1, count, width < 500 ? 4 : 8).filter(whole)];
  const feet = along.map(n => `<line class="ex-axis" x1="${x(n - 1)}" x2="${x(n - 1)}"
    y1="${bottom}" y2="${bottom + 5}"/>${text(n, x(n - 1), bottom + 18, "middle")}`);
  const heights = apart(arms.map(arm => y(last(arm.mean)) + 4), 12, bottom + 4);
  const lines = arms.map((arm, k) => {
    const points = path(arm.mean), side = s => path(arm.mean.map((m, n) => m + s * arm.sd[n]));
    const band = arm.sd ? `<polygon class="ex-band"
      points="${[...side(1), ...side(-1).reverse()].join(" ")}"/>` : "";
    const [endX, endY] = last(points).split(",");
    return `<g style="${ink(arm)}">${band}<polyline class="ex-line" data-arm="${arm.id}"
      stroke-dasharray="${dashes(arm)}" points="${points.join(" ")}"/>
      ${arm.seeds ? "" : `<circle class="ex-end" cx="${endX}" cy="${endY}" r="4"/>`}
      <text class="ex-name" x="${+endX + 5}" y="${heights[k]}">${
        last(arm.mean) < marks[0] ? "" : experiment.arms.indexOf(arm) + 1}</text></g>`;
  });
  return {count, left, right, x, svg: `<clipPath id="ex-clip">
    <rect x="${left - 5}" y="${top - 2}" width="${width}" height="${bottom - top + 6}"/></clipPath>
    ${grid.join("")}${feet.join("")}
    <line class="ex-axis" x1="${left}" x2="${right}" y1="${bottom}" y2="${bottom}"/>
    ${text("test accuracy, %", 0, 12)}${text("epoch", right, height - 4, "end")}
    <line class="ex-cursor" y1="${top}" y2="${bottom}"/>
    <g clip-path="url(#ex-clip)">${lines.join("")}</g>`, height};
}

// ---- the page -----------------------------------------------------------------------------------
const PAGE = `
<p class="ex-choice"><label for="ex-experiment">Experiment</label>
<select id="ex-experiment"></select></p>
<svg class="ex-chart" role="img"></svg>
<p><label><input type="checkbox" id="ex-close"> Close up: the scale is that of the second
half</label></p>
<p class="ex-choice"><label for="ex-epoch">Epoch</label> <input type="range" id="ex-epoch" min="1">
<output for="ex-epoch" aria-live="off"></output></p>
<fieldset class="ex-rules"><legend>Rules and final accuracies, %</legend>
<p class="ex-buttons"><button type="button" id="ex-all">All</button>
<button type="button" id="ex-none">None</button></p><div class="ex-arms"></div></fieldset>
<p class="ex-says" role="status"></p>`;

function row(arm, n) {
  const seeds = arm.seeds ? `${arm.seeds} seed${arm.seeds > 1 ? "s" : ""}` : "";
  const lost = arm.lost ? `${seeds && " + "}${arm.lost} diverged` : "";
  return `<label class="ex-arm" style="${ink(arm)}"><input type="checkbox" value="${arm.id}">
    <svg class="ex-swatch" aria-hidden="true" width="56" height="12">
    <line class="ex-line" x2="56" y1="6" y2="6" stroke-dasharray="${dashes(arm)}"/></svg>
    <span><span class="ex-name">${n + 1}</span> ${arm.label}<br><b>${final(arm)}</b>
    <span class="ex-more">(${seeds}${lost}${
      arm.paper ? `; <span>paper ${arm.paper}</span>` : ""})</span></span></label>`;
}

function mount(place) {
  const root = document.createElement("section");
  Object.assign(root, {id: place.id, className: "explorer", innerHTML: PAGE});
  root.ariaLabel = "Explorer";
  place.replaceWith(root);
  const [select, svg, slider, close, readout, says] =
    ["#ex-experiment", ".ex-chart", "#ex-epoch", "#ex-close", "output", ".ex-says"]
      .map(selector => root.querySelector(selector));
  const boxes = () => [...root.querySelectorAll(".ex-arms input")];
  const chapters = new Set(explorerData.map(each => each.chapter));
  const options = chapter => explorerData.filter(each => each.chapter === chapter)
    .map(each => `<option value="${each.id}">${each.title}</option>`).join("");
  select.innerHTML = [...chapters]
    .map(chapter => `<optgroup label="${chapter}">${options(chapter)}</optgroup>`).join("");
  let state, drawn;
  const chosen = () => state.experiment.arms.filter(arm => state.shown.has(arm.id));

  function read() { // the accuracies at the slider's epoch
    const n = slider.value - 1, there = chosen().filter(arm => n < arm.mean.length);
    const words = there.map(arm => `${arm.label} ${spread(arm, n)}`).join("; ");
    readout.value = slider.ariaValueText = `${slider.value}: ${words || "nothing is shown"}.`;
    const cursor = svg.querySelector(".ex-cursor");
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, drawn.x(n));
  }
  function draw() {
    const width = Math.max(svg.parentElement.clientWidth, 200);
    drawn = chart(state, width);
    svg.innerHTML = drawn.svg;
    svg.setAttribute("width", width);
    svg.setAttribute("height", drawn.height);
    const ends = chosen().map(arm => `${arm.label} ${arm.seeds ? "ends at " : ""}${final(arm)}`);
    says.textContent = `${state.experiment.title}: ${ends.join("; ") || "no rule is shown"}.`;
    svg.setAttribute("aria-label", `Test accuracy in % against epochs. ${says.textContent}`);
    read();
  }
  function show() { // the state, in the controls
    select.value = state.experiment.id;
    close.checked = state.close;
    root.querySelector(".ex-arms").innerHTML = state.experiment.arms.map(row).join("");
    for (const box of boxes()) box.checked = state.shown.has(box.value);
    slider.max = Math.max(...state.experiment.arms.map(arm => arm.mean.length));
    slider.value = slider.max; // to the end
    draw();
  }
  const keep = () => history.replaceState(null, "", toHash(state));
  function pick(test) {
    for (const box of boxes()) box.checked = test(box);
    state.shown = new Set(boxes().filter(box => box.checked).map(box => box.value));
    keep(), draw();
  }
  select.addEventListener("change", () => {
    state = {...fromHash(`#experiment=${select.value}`), close: close.checked};
    keep(), show();
  });
  close.addEventListener("change", () => {
    state.close = close.checked;
    keep(), draw();
  });
  root.querySelector(".ex-arms").addEventListener("change", () => pick(box => box.checked));
  root.querySelector("#ex-all").onclick = () => pick(() => true);
  root.querySelector("#ex-none").onclick = () => pick(() => false);
  slider.addEventListener("input", read);
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, event => {
    const part = (event.offsetX - drawn.left) / (drawn.right - drawn.left);
    slider.value = 1 + Math.round(part * (drawn.count - 1)); // the slider keeps it within its range
    read();
  });
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return; // another place of the page
    state = fromHash(location.hash);
    show();
    root.scrollIntoView({block: "nearest"});
  });
  state = fromHash(location.hash);
  show();
  new ResizeObserver(() => {
    if (+svg.getAttribute("width") !== svg.parentElement.clientWidth) draw();
  }).observe(root);
}

addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("explorer-place");
  if (place) mount(place);
});
})();
