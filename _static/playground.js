// The playground (playground.md): every rule of the book on small networks, live, offline.
//
// A classic script, since a module is refused where the book is opened as file://. It draws where
// the page has the figure that it replaces; elsewhere it only defines `playground`, which tests
// compare with bpfree. Letters are the book's: W[l], b[l], h[l], a[l] are of block l = 1..L, h[0]
// is x, a matrix is an array of rows, feedback has the library's names (B2, D1, F, E2, V1).
"use strict";
globalThis.playground = (() => {
// ---- the mathematics ----------------------------------------------------------------------------
const ACTIVATIONS = { // f, and f'(a) from f(a)
  tanh: [Math.tanh, z => 1 - z * z],
  relu: [a => Math.max(a, 0), z => +(z > 0)],
};
const range = (from, to) => Array.from({length: to - from + 1}, (_, i) => from + i);
const map = (A, f) => A.map((row, s) => row.map((v, i) => f(v, s, i)));
const minus = (A, B) => map(A, (v, s, i) => v - B[s][i]);
const transpose = A => A[0].map((_, i) => A.map(row => row[i]));
const dot = (u, v) => {
  let sum = 0;
  for (let i = 0; i < u.length; i++) sum += u[i] * v[i];
  return sum;
};
const affine = (X, W, b) => X.map(x => W.map((w, j) => dot(w, x) + b[j])); // X W^T + b
const product = (A, columns) => A.map(row => columns.map(column => dot(row, column)));
const times = (D, M) => product(D, transpose(M));
const outer = (D, R) => map(product(transpose(D), transpose(R)), v => v / D.length); // D^T R / B
const total = row => row.reduce((sum, v) => sum + v, 0);
const softmax = row => {
  const top = Math.max(...row), exp = row.map(v => Math.exp(v - top)), sum = total(exp);
  return exp.map(v => v / sum);
};
const oneHot = (y, classes) => y.map(c => range(0, classes - 1).map(k => +(k === c)));
const crossEntropy = (scores, c) => { // -ln softmax(scores)_c
  const top = Math.max(...scores);
  return top + Math.log(total(scores.map(v => Math.exp(v - top)))) - scores[c];
};

function forward({W, b, activation}, X) {
  const [f] = ACTIVATIONS[activation], L = W.length - 1, h = [X], a = [null];
  for (let l = 1; l <= L; l++) {
    a[l] = affine(h[l - 1], W[l], b[l]);
    h[l] = l < L ? map(a[l], f) : a[l];
  }
  return {a, h};
}

// What each rule says: delta[l], the teaching signal of block l; r[l], its presynaptic activity;
// own, the gradients of what the rule learns itself; and for the drawing M[l], by which the signal
// came to block l (of LFNN-l: what came).
function chain({L, e, slope, h}, matrix, {sent, descend = slope} = {}) {
  const delta = [], M = [];
  delta[L] = e;
  for (let l = L - 1; l > 0; l--) {
    M[l] = matrix(sent ? l : l + 1);
    delta[l] = descend(l, times(sent ?? delta[l + 1], M[l]));
  }
  return {delta, M, sent, r: [null, ...h]};
}
const SIGNALS = {
  bp: at => chain(at, l => at.W[l]),
  fa: at => chain(at, l => at.feedback["B" + l]),
  sign: (at, {scale = 1}) => chain(at, l => map(at.W[l], w => scale * Math.sign(w))),
  kp: at => ({...chain(at, l => at.feedback["B" + l]), beside: ["B", 1]}),
  dfa: at => chain(at, l => at.feedback["D" + l], {sent: at.e}),
  drtp: at => chain(at, l => at.feedback["D" + l], {sent: at.target}),
  pepita(at, {sign = 1, output_error = "second", presynaptic = "second"}) {
    const {L, x, e, h, target, feedback: {F}} = at;
    const sent = times(e, transpose(F)); // e F^T
    const err = forward(at, map(x, (v, s, i) => v + sign * sent[s][i])).h;
    const delta = range(0, L - 1).map(l => minus(h[l], err[l]));
    delta[L] = output_error === "second" ? minus(err[L].map(softmax), target) : e;
    return {delta, M: [F], err, r: [null, ...(presynaptic === "second" ? err : h)]};
  },
  ekdaa(at, {beta = 0.9, gamma = 0.1}) {
    const [f] = ACTIVATIONS[at.activation];
    const descend = (l, u) => map(u, (v, s, i) => at.h[l][s][i] - f(at.a[l][s][i] - beta * v));
    return {...chain(at, l => at.feedback["E" + l], {descend}), beside: ["E", gamma]};
  },
  lfnn(at, options) {
    const {L, e, h, slope, target, feedback} = at, delta = [], M = [], own = {};
    for (let l = 1; l < L; l++) {
      const V = feedback["V" + l];
      const scores = row => V.map(head => head.map(v => dot(v, row))); // (N, C)
      const q = h[l].map((row, s) => scoreErrors(scores(row), target[s], options));
      M[l] = times(q.map(each => each.flat()), V.flat()); // sum_w q_w V_w
      own["V" + l] = V.map((_, w) => outer(q.map(each => each[w]), h[l]));
      delta[l] = slope(l, M[l]);
    }
    delta[L] = e;
    return {delta, M, r: [null, ...h], own};
  },
  attention: (at, {p = 2}) =>
    chain(at, l => map(at.W[l], w => Math.sign(w) * Math.abs(w) ** (p - 1))),
  frozen: at => chain(at, l => map(at.W[l], () => 0)),
};

// q_w of one sample's scores (N, C): leaders learn the label, followers the best leader's scores
function scoreErrors(scores, y, {leaders = 0.7, lambda_leader = 1, lambda_follower = 1}) {
  const N = scores.length, m = Math.max(1, Math.ceil(leaders * N - 1e-9));
  const losses = scores.map(s => crossEntropy(s, y.indexOf(1)));
  const ranked = range(0, N - 1).sort((v, w) => losses[v] - losses[w]);
  const leads = new Set(ranked.slice(0, m)), best = scores[ranked[0]];
  return scores.map((s, w) => {
    if (leads.has(w)) return softmax(s).map((p, c) => lambda_leader * (p - y[c]) / m);
    return s.map((v, c) => lambda_follower * 2 / s.length * (v - best[c]) / (N - m));
  });
}

// One step's loss, signals and gradients; nothing is written. x: rows, y: classes.
function gradients({rule, options = {}, activation, W, b, feedback = {}, x, y}) {
  const L = W.length - 1, {a, h} = forward({W, b, activation}, x);
  const target = oneHot(y, W[L].length), e = minus(h[L].map(softmax), target);
  const [, derivative] = ACTIVATIONS[activation];
  const slope = (l, u) => map(u, (v, s, i) => v * derivative(h[l][s][i]));
  const at = {L, W, b, activation, feedback, x, a, h, e, target, slope};
  const {delta, r, own = {}, beside, ...way} = SIGNALS[rule](at, options);
  const gW = [null], gb = [null];
  for (let l = 1; l <= L; l++) {
    gW[l] = outer(delta[l], r[l]);
    gb[l] = transpose(delta[l]).map(d => total(d) / x.length);
  }
  if (beside) // the matrix that learns beside W_l gets a share of its gradient
    for (let l = 2; l <= L; l++) own[beside[0] + l] = map(gW[l], g => beside[1] * g);
  const loss = total(y.map((c, n) => crossEntropy(h[L][n], c))) / y.length;
  return {loss, W: gW, b: gb, own, delta, r, h, e, target, ...way};
}

// ---- networks, data, training -------------------------------------------------------------------
function random(seed) { // mulberry32: the same draws in every browser
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6D2B79F5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
const POINTS = 200, BATCH = 20, REACH = 2.4; // REACH: the plane is drawn from -REACH to REACH
const around = (r, angle) => [r * Math.cos(angle), r * Math.sin(angle)];
const DATA = { // name -> [label, classes, (class, part of it in 0..1, draw) => point, noise]
  moons: ["two moons", 2, (c, t) =>
    around(1.2, Math.PI * t).map((v, i) => (v - [0.6, 0.4][i]) * (c ? -1 : 1)), 0.15],
  circles: ["circles", 2, (c, t) => around(c ? 0.7 : 1.7, 2 * Math.PI * t), 0.15],
  clusters: ["four clusters", 4, c => around(1.4, Math.PI * (0.25 + c / 2)), 0.4],
  spirals: ["spirals", 2, (c, t) => around(0.25 + 1.75 * t, Math.PI * (c + 2.5 * t)), 0.06],
  board: ["chessboard", 2, (c, t, draw) => {
    const i = Math.floor(4 * draw()), j = 2 * Math.floor(2 * draw()) + (i + c) % 2;
    return [i, j].map(k => k - 1.92 + 0.84 * draw());
  }, 0],
};
function sample(name, seed) {
  const draw = random(1000 + seed), [, classes, place, noise] = DATA[name];
  const normal = () => Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
  const y = range(0, POINTS - 1).map(n => n % classes);
  return {y, x: y.map((c, n) => place(c, n / POINTS, draw).map(v => v + noise * normal()))};
}

// Starting weights and the rule's own matrices, from He's bound as in the library. Each has a seed
// of its own, so that two rules start from the same weights, and FA and Kolen-Pollack from one B.
function start({rule, scale = 1, workers = 4}, {sizes, activation, seed}) {
  const W = [null], b = [null], feedback = {}, L = sizes.length - 1, C = sizes[L];
  const make = (rows, columns, l, kind, by = 1) => {
    const draw = random(97 * seed + 13 * l + 7919 * kind), bound = by * Math.sqrt(6 / columns);
    return range(1, rows).map(() => range(1, columns).map(() => (2 * draw() - 1) * bound));
  };
  for (let l = 1; l <= L; l++) {
    W[l] = make(sizes[l], sizes[l - 1], l, 0);
    b[l] = Array(sizes[l]).fill(0);
    const own = (name, rules, make) => { if (rules.includes(rule)) feedback[name + l] = make(); };
    if (l > 1) own("B", ["fa", "kp"], () => make(sizes[l], sizes[l - 1], l, 1, scale));
    if (l > 1) own("E", ["ekdaa"], () => W[l]);
    if (l < L) own("D", ["dfa", "drtp"], () => make(C, sizes[l], l, 2, scale));
    if (l < L) own("V", ["lfnn"], () => range(4, 3 + workers).map(k => make(C, sizes[l], l, k)));
  }
  if (rule === "pepita") feedback.F = transpose(make(C, sizes[0], 1, 3, scale));
  return {activation, W, b, feedback};
}
const descend = (A, G, rate, decay) => A.map((v, i) => Array.isArray(v)
  ? descend(v, G[i], rate, decay) : v - rate * (G[i] + decay * v));

class Learner { // one rule on one network
  constructor(choice, settings) {
    Object.assign(this, {choice}, start(choice, settings));
  }
  gradients(x, y, rule = this.choice.rule) {
    return gradients({...this, rule, options: this.choice, x, y});
  }
  apply(g) { // plain SGD
    const {rate, decay = 0} = this.choice;
    for (let l = 1; l < this.W.length; l++) {
      this.W[l] = descend(this.W[l], g.W[l], rate, decay);
      this.b[l] = descend(this.b[l], g.b[l], rate, decay);
    }
    for (const [name, grad] of Object.entries(g.own))
      this.feedback[name] = descend(this.feedback[name], grad, rate, decay);
  }
  measure({x, y}) { // on all points; per block the angle to BP and the ratio of norms
    const g = this.gradients(x, y), bp = this.gradients(x, y, "bp"), L = this.W.length - 1;
    const right = y.filter((c, n) => g.h[L][n].every(v => v <= g.h[L][n][c])).length;
    const pairs = range(1, L).map(l => [g.W[l].flat(), bp.W[l].flat()]);
    return {
      loss: g.loss, accuracy: right / y.length, weight: this.W.slice(1).map(A => norm(A.flat())),
      angle: pairs.map(([u, v]) => angle(u, v)), norm: pairs.map(([u, v]) => norm(u) / norm(v)),
    };
  }
}
const norm = u => Math.sqrt(dot(u, u));
function angle(u, v) { // in degrees; Kahan's form, as in bpfree.measure
  const a = norm(u), b = norm(v);
  const [apart, along] = [-1, 1].map(sign => norm(u.map((w, i) => w / a + sign * v[i] / b)));
  return 360 / Math.PI * Math.atan2(apart, along);
}
function* batches({x, y}, seed) { // without end, shuffled anew in each epoch
  for (const draw = random(2000 + seed), order = range(0, y.length - 1);;) {
    for (let n = order.length - 1; n > 0; n--) {
      const k = Math.floor(draw() * (n + 1));
      [order[n], order[k]] = [order[k], order[n]];
    }
    for (let n = 0; n < order.length; n += BATCH)
      yield [x, y, range(0, y.length - 1)].map(all => order.slice(n, n + BATCH).map(k => all[k]));
  }
}

// ---- what the reader chooses, and the address that keeps it ----
const sub = l => "₀₁₂₃₄"[l];
const above = (l, M) => `Block ${l} received δ# times ${M}.`.replaceAll("#", sub(l + 1));
// label; its own knobs; the way of its signal; that matrix's letter; what it says of block l
const RULES = {
  bp: ["BP", [], "chain", "W", l => above(l, "W#, the weights themselves")],
  fa: ["FA", ["scale"], "chain", "B", l => above(l, "B#, random and fixed")],
  sign: ["sign symmetry", ["scale"], "chain", "±", l => above(l, "the signs of W#")],
  kp: ["Kolen-Pollack", ["scale", "decay"], "chain", "B", l => above(l, "B#, which learns as W#")],
  dfa: ["DFA", ["scale"], "direct", "D", l => `Block ${l} received the error times D${sub(l)}.`],
  drtp: ["DRTP", ["scale"], "direct", "D", l => `Block ${l} received the label times D${sub(l)}.`],
  pepita: ["PEPITA", ["scale"], "input", "F", l =>
    `Block ${l} received what its second answer lacks: h${sub(l)} − h${sub(l)}ᵉʳʳ.`],
  ekdaa: ["EKDAA", ["beta"], "chain", "E", l => above(l, "E#, which sets its target")],
  lfnn: ["LFNN-l", ["leaders"], "local", "V", l =>
    `Block ${l} was taught by its own heads V${sub(l)}, and by nothing above it.`],
  attention: ["attention", ["p"], "chain", "α′", l => above(l, "α′(W#)")],
  frozen: ["frozen", [], "none", "", l => `Block ${l} received nothing.`],
};
const names = entries => Object.fromEntries(Object.entries(entries).map(([k, v]) => [k, v[0]]));
// a list of choices, or [from, to, step] of a number
const FIELDS = {
  data: ["Data", names(DATA), "moons"],
  layers: ["Hidden layers", [1, 3, 1], 2],
  units: ["Units in each", [2, 8, 1], 6],
  activation: ["Activation", {tanh: "tanh", relu: "ReLU"}, "tanh"],
  seed: ["Seed", [0, 9999, 1], 1],
  speed: ["Speed", {slow: "slow, path by path", one: "1 step a frame", ten: "10 a frame"}, "one"],
  rule: ["Rule", names(RULES), "fa"],
  rate: ["Rate η", [0, 100, "any"], 0.1],
  scale: ["Feedback scale", [0.001, 1000, "any"], 1],
  decay: ["Weight decay", [0, 1, "any"], 0.001],
  beta: ["Target step β", [0.01, 10, "any"], 0.9],
  leaders: ["Share that leads", [0.25, 1, 0.25], 0.5],
  p: ["Exponent p", [1, 3, 0.1], 1.5],
};
const SHARED = Object.keys(FIELDS).slice(0, 6), OWN = Object.keys(FIELDS).slice(6);
const LIVE = ["speed", "rate", "decay", "beta", "leaders", "p"]; // changed without a new start

function legal(name, value) { // the value if the field can have it, or the field's own
  const [, allowed, usual] = FIELDS[name];
  if (!Array.isArray(allowed)) return Object.hasOwn({...allowed, none: 1}, value) ? value : usual;
  const [low, high, step] = allowed, number = step === 1 ? Math.round(value) : +value;
  return value && number >= low && number <= high ? number : usual;
}
const usual = rule => ({scale: rule === "pepita" ? 0.05 : 1}); // as the library has it
function fromHash(hash) { // data=...&rule=...&rule2=...: what is not named is as usual
  const query = new URLSearchParams(hash.replace(/^#/, "")), settings = {sides: [{}, {}]};
  for (const name of SHARED) settings[name] = legal(name, query.get(name));
  settings.sides.forEach((side, n) => {
    side.rule = legal("rule", query.get(n ? "rule2" : "rule") ?? (n ? "bp" : null));
    for (const name of OWN.slice(1))
      side[name] = legal(name, query.get(name + (n ? 2 : "")) ?? usual(side.rule)[name] ?? null);
  });
  return settings;
}
function toHash(settings) {
  const query = new URLSearchParams(SHARED.map(name => [name, settings[name]]));
  settings.sides.forEach((side, n) => {
    for (const name of ["rule", "rate", ...(RULES[side.rule]?.[1] ?? [])])
      query.set(name + (n ? "2" : ""), side[name]);
  });
  return "#" + query;
}

// ---- the path of a step -------------------------------------------------------------------------
// [{text, hops, shown}]: what happens after what in one step of a learner; a hop carries
// flow(k, i) from unit k of layer `from` to unit i of layer `to`, for the batch's first sample;
// `shown` are the layers whose signal is there afterwards.
function path({choice, W}, g) {
  const L = W.length - 1, [, , way, letter, says] = RULES[choice.rule];
  const up = (l, [v] = g.h[l - 1]) => ({from: l - 1, to: l, flow: (k, i) => W[l][i][k] * v[k]});
  const down = (from, to, flow, name) => ({from, to, flow, name});
  const hidden = range(1, L - 1);
  const phases = [{text: "The ringed point runs forward.", hops: range(1, L).map(l => up(l))},
    {text: "The output block received the error e = p − y.", hops: [], shown: [L]}];
  if (way === "chain" || way === "direct") for (const l of [...hidden].reverse()) {
    const from = way === "chain" ? l + 1 : L, [sent] = g.sent ?? g.delta[from];
    phases.push({text: says(l), shown: [l], hops: [down(from, l,
      (k, i) => sent[k] * g.M[l][k][i], letter + sub(way === "chain" ? l + 1 : l))]});
  }
  if (way === "input") {
    phases.push({text: "The error was added to the input, through F.", shown: [0],
      hops: [down(L, 0, (k, i) => g.e[0][k] * g.M[0][i][k], letter)]});
    for (const l of range(1, L)) phases.push({shown: [l],
      text: l < L ? says(l) : "The output block's signal is the error of the second pass.",
      hops: [{...up(l, minus(g.err[l - 1], g.h[l - 1])), name: l < L ? "2nd pass" : ""}]});
  }
  if (way === "local") phases.splice(0, 1, ...hidden.map(l => ({text: says(l), shown: [l],
    hops: [up(l), down("heads", l, (k, i) => g.M[l][0][i], letter + sub(l))]})),
  {text: "The output block ran forward.", hops: [up(L)]});
  if (way === "none") phases.push(...hidden.map(l => ({text: says(l), shown: [l], hops: []})));
  phases.push({text: "Each weight moved by its signal times its input.", hops: []});
  return phases;
}

// ---- drawing ------------------------------------------------------------------------------------
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]], GRID = 32;
class Sheet { // a canvas as wide as its box; lengths are pixels of the page
  constructor(canvas) { Object.assign(this, {canvas, g: canvas.getContext("2d")}); }
  fit() {
    const sharp = devicePixelRatio || 1;
    this.w = this.canvas.clientWidth;
    this.h = Math.round(this.w * this.canvas.dataset.ratio);
    [this.canvas.width, this.canvas.height] = [this.w * sharp, this.h * sharp].map(Math.round);
    this.g.scale(sharp, sharp);
  }
  clear(ink) {
    this.g.clearRect(0, 0, this.w, this.h);
    Object.assign(this.g, {font: "12px system-ui, sans-serif", textBaseline: "middle",
      lineJoin: "round", fillStyle: ink.text, strokeStyle: ink.text, lineWidth: 1, globalAlpha: 1});
    return this.g;
  }
  text(string, x, y, textAlign = "center") {
    Object.assign(this.g, {textAlign}).fillText(string, x, y);
  }
}
function line(c, style, ...points) {
  c.beginPath();
  for (const point of points) c.lineTo(...point);
  Object.assign(c, style).stroke();
}
function disc(c, x, y, r, style, how = "fill") {
  c.beginPath();
  c.arc(x, y, r, 0, 2 * Math.PI);
  Object.assign(c, style)[how]();
}
const rgb = colour => colour.match(/\w\w/g).map(c => parseInt(c, 16));
function mark(g, kind, x, y, r) { // a class has a shape beside its colour
  for (let k = 0, n = [16, 4, 3, 4][kind], turn = kind === 1 ? 0.5 : 0; k < n; k++) {
    const [dx, dy] = around(n > 4 ? r : 1.25 * r, 2 * Math.PI * (k + turn) / n - Math.PI / 2);
    g[k ? "lineTo" : "moveTo"](x + dx, y + dy);
  }
  g.closePath();
}
const PLANE = range(0, GRID * GRID - 1).map(n => [n % GRID, GRID - 1 - Math.floor(n / GRID)]
  .map(k => REACH * (2 * (k + 0.5) / GRID - 1)));
function drawField(sheet, ink, learner, {x, y}, chosen, small) {
  const g = sheet.clear(ink), w = sheet.w, ground = rgb(ink.ground);
  const channels = transpose(ink.classes.map(rgb)), image = small.createImageData(GRID, GRID);
  forward(learner, PLANE).h.at(-1).map(softmax).forEach((p, n) => image.data.set(
    [...channels.map((colours, c) => (ground[c] + dot(p, colours)) / 2), 255], 4 * n));
  small.putImageData(image, 0, 0);
  g.drawImage(small.canvas, 0, 0, w, w);
  const px = v => (v / REACH + 1) * w / 2, py = v => (1 - v / REACH) * w / 2;
  ink.classes.forEach((colour, c) => {
    g.beginPath();
    x.forEach(([u, v], n) => y[n] === c && mark(g, c, px(u), py(v), Math.max(2, w / 80)));
    Object.assign(g, {fillStyle: colour, strokeStyle: ink.ground, lineWidth: 1.4}).stroke();
    g.fill();
  });
  const ring = {strokeStyle: ink.text, lineWidth: 2.5};
  if (chosen !== undefined) disc(g, px(x[chosen][0]), py(x[chosen][1]), 8, ring, "stroke");
}

// The network: activities in the units, weights between them, and as rings the signals that have
// arrived. Below it runs the path; `now` is the phase and `t` in 0..1 how far it is.
function drawNetwork(sheet, ink, learner, g, phases, now, t) {
  const c = sheet.clear(ink), {w, h} = sheet, L = learner.W.length - 1, floor = h - 62;
  const sizes = [learner.W[1][0].length, ...learner.W.slice(1).map(W => W.length)];
  const x = l => 26 + l * (w - 52) / L, radius = Math.max(1, Math.min(10, floor / 22));
  const y = (l, i) => 22 + (floor - 22) * (i + 0.5) / sizes[l];
  const sign = v => v < 0 ? ink.minus : ink.plus;
  for (let l = 1; l <= L; l++) {
    const most = Math.max(...learner.W[l].flat().map(Math.abs), 1);
    learner.W[l].forEach((row, j) => row.forEach((v, i) => line(c,
      {strokeStyle: sign(v), lineWidth: 0.3 + 3.5 * Math.abs(v) / most, globalAlpha: 0.55},
      [x(l - 1), y(l - 1, i)], [x(l), y(l, j)])));
  }
  c.globalAlpha = 1;
  const arrived = new Set(phases?.flatMap((phase, n) => n < now ? phase.shown ?? [] : []));
  const ran = phases && now < phases.length ? phases[now] : null;
  for (let l = 0; l <= L; l++) {
    const signal = l ? g?.delta[l][0] : g?.err && minus(g.err[0], g.h[0])[0];
    const most = signal && (Math.max(...signal.map(Math.abs)) || 1);
    const shown = l < L || !g ? g?.h[l][0] : softmax(g.h[L][0]);
    for (let i = 0; i < sizes[l]; i++) {
      const activity = shown ? Math.tanh(shown[i]) : 0;
      const unit = (r, style, how) => disc(c, x(l), y(l, i), r, style, how);
      unit(radius, {fillStyle: ink.ground});
      unit(radius, {globalAlpha: Math.abs(activity), fillStyle: sign(activity)});
      unit(radius, {globalAlpha: 1, strokeStyle: ink.text, lineWidth: 1}, "stroke");
      if (signal?.[i] && arrived.has(l)) unit(radius + 3.5,
        {strokeStyle: sign(signal[i]), lineWidth: 1 + 4 * Math.abs(signal[i]) / most}, "stroke");
    }
    c.fillStyle = ink.text;
    sheet.text(l === 0 ? "x" : l === L ? "p" : "h" + sub(l), x(l), 9);
  }
  const ways = phases?.flatMap((phase, n) => phase.hops.map(hop => [hop, 1 + Math.sign(now - n)]));
  for (const [hop, state] of (ways ?? []).reverse()) // under the network
    if (hop.name !== undefined) drawWay(sheet, ink, hop, x, floor + 12, state);
  if (!ran || t >= 1 || !ran.hops.length) return;
  const k = Math.min(ran.hops.length - 1, Math.floor(t * ran.hops.length)), hop = ran.hops[k];
  const part = t * ran.hops.length - k, heads = hop.from === "heads";
  const rows = heads ? [0] : range(0, sizes[hop.from] - 1), columns = range(0, sizes[hop.to] - 1);
  const flows = rows.flatMap(j => columns.map(i => [j, i, hop.flow(j, i)]));
  const most = Math.max(...flows.map(([, , v]) => Math.abs(v))) || 1;
  for (const [j, i, v] of flows) {
    const [x0, y0] = heads ? [x(hop.to), floor + 22] : [x(hop.from), y(hop.from, j)];
    disc(c, x0 + part * (x(hop.to) - x0), y0 + part * (y(hop.to, i) - y0),
      1 + 4 * Math.abs(v) / most, {fillStyle: sign(v), strokeStyle: ink.ground, lineWidth: 1});
    c.stroke();
  }
}
function drawWay(sheet, ink, {from, to, name}, x, top, state) { // state: 0 to come, 1 now, 2 done
  const c = sheet.g, colour = state === 1 ? ink.accent : ink.text, heads = from === "heads";
  const x1 = x(to), x0 = heads ? x1 : x(from), deep = heads ? 0 : 12 + 7 * Math.abs(from - to);
  Object.assign(c, {strokeStyle: colour, fillStyle: colour, lineWidth: state === 1 ? 3 : 1.5});
  c.setLineDash(state ? [] : [3, 3]);
  c.beginPath();
  c.moveTo(x0, heads ? top + 22 : top);
  c.quadraticCurveTo((x0 + x1) / 2, top + 2 * deep - 8, x1 - 6 * Math.sign(x1 - x0), top + 4);
  c.stroke();
  c.setLineDash([]);
  c.beginPath();
  for (const [dx, dy] of [[0, -3], [-4, 5], [4, 5]]) c.lineTo(x1 + dx, top + dy);
  c.fill();
  const half = c.measureText(name).width / 2 + 3;
  const [mx, my] = heads ? [x1, top + 31] : [x1 + (x0 - x1) * 0.3, top + deep * 0.84 + 2];
  c.fillStyle = ink.ground;
  if (name) c.fillRect(mx - half, my - 6, 2 * half, 13);
  if (heads) c.strokeRect(mx - half, my - 8, 2 * half, 16);
  c.fillStyle = colour;
  sheet.text(name, mx, my);
}

// title; [[value, its text]], lowest first; scale
const CHARTS = {
  angle: ["angle to BP, by block", [[0, "0°"], [90, "90°"], [180, "180°"]], v => v],
  norm: ["size, in BP's", [[1e-4, "10⁻⁴"], [1, "1"], [1e4, "10⁴"]], Math.log10],
  loss: ["loss, nats", [[0, "0"], [1, "1"], [2, "2"]], v => v],
  accuracy: ["accuracy", [[0, "0"], [0.5, "0.5"], [1, "1"]], v => v],
};
function drawChart(sheet, ink, kind, steps, series) { // series [{name, values, colour, dash}]
  const [title, ticks, at] = CHARTS[kind], last = v => Number.isNaN(v) ? "none" : v?.toPrecision(2);
  sheet.canvas.ariaLabel = `${title}: ${series.map(each => last(each.values.at(-1))).join(", ")}`;
  const c = sheet.clear(ink), {w, h} = sheet, box = [34, 24, w - 58, h - 40];
  const low = at(ticks[0][0]), high = at(ticks.at(-1)[0]);
  const x = n => box[0] + box[2] * steps[n] / Math.max(steps.at(-1) ?? 1, 1);
  const y = v => box[1] + box[3] * (1 - Math.min(1, Math.max(0, (at(v) - low) / (high - low))));
  sheet.text(title, 2, 7, "left");
  for (const [v, text] of ticks) {
    sheet.text(text, box[0] - 3, y(v), "right");
    line(c, {globalAlpha: 0.25}, [box[0], y(v)], [box[0] + box[2], y(v)]);
    c.globalAlpha = 1;
  }
  sheet.text(`${steps.at(-1) ?? 0} steps`, w - 24, h - 7, "right");
  const ends = [];
  for (const {name, values, colour, dash} of series) {
    const points = values.map((v, n) => [x(n), y(v)]).filter(([, v]) => !Number.isNaN(v));
    c.setLineDash(DASHES[dash]);
    line(c, {strokeStyle: colour, lineWidth: 1.8}, ...points);
    c.setLineDash([]);
    if (points.length) ends.push({name, colour, y: points.at(-1)[1]});
  }
  ends.sort((a, b) => a.y - b.y).forEach((end, n) => {
    const lowest = h - 6 - 11 * (ends.length - 1 - n); // names do not cover one another
    end.y = Math.min(lowest, Math.max(end.y, n ? ends[n - 1].y + 11 : 0));
    c.fillStyle = end.colour;
    sheet.text(end.name, w - 22, end.y, "left");
  });
}

// ---- the page -----------------------------------------------------------------------------------
function control(name, suffix = "") {
  const [label, allowed] = FIELDS[name], id = `pg-${name}${suffix}`, slider = name === "p";
  const choices = {...allowed, ...(name === "rule" && suffix && {none: "no second rule"})};
  const options = Object.entries(choices).map(([key, text]) => `<option value="${key}">${text}`);
  const box = !Array.isArray(allowed) ? `<select id="${id}">${options.join("")}</select>`
    : `<input id="${id}" type="${slider ? "range" : "number"}" min="${allowed[0]}"
      max="${allowed[1]}" step="${allowed[2]}">${slider ? `<output for="${id}"></output>` : ""}`;
  return `<div><label for="${id}">${label}</label> ${box}</div>`;
}
const canvas = (name, ratio) =>
  `<canvas data-name="${name}" data-ratio="${ratio}" role="img"></canvas>`;
const PAGE = `
<div class="pg-bar"><button type="button" class="pg-run">Run</button>
<button type="button" class="pg-step">Step</button>
<button type="button" class="pg-reset">Reset</button><p class="pg-says" role="status"></p></div>
<fieldset class="pg-fields"><legend>Network and data</legend>${
  SHARED.map(name => control(name)).join("")}</fieldset>
<div class="pg-sides">${["", "2"].map(n => `<div class="pg-side"><fieldset class="pg-fields">
<legend>${n ? "Second" : "First"} rule</legend>${OWN.map(k => control(k, n)).join("")}</fieldset>
<div class="pg-work"><p class="pg-numbers"></p>${canvas("net" + n, 0.72)}<p class="pg-story"></p>
<div class="pg-pair">${canvas("field" + n, 1)}<div>${canvas("angle" + n, 0.52)}${
  canvas("norm" + n, 0.52)}</div></div></div></div>`).join("")}</div>
<div class="pg-pair">${canvas("loss", 0.4)}${canvas("accuracy", 0.4)}</div>`;

function mount(place) {
  const root = document.createElement("section");
  root.id = root.className = "playground";
  Object.assign(root, {ariaLabel: "Playground", innerHTML: PAGE});
  place.replaceWith(root);
  const find = selector => root.querySelector(selector), all = s => [...root.querySelectorAll(s)];
  const sheets = Object.fromEntries(all("canvas").map(c => [c.dataset.name, new Sheet(c)]));
  const small = Object.assign(document.createElement("canvas"), {width: GRID, height: GRID})
    .getContext("2d");
  const boxes = all(".pg-side"), calm = matchMedia("(prefers-reduced-motion: reduce)");
  let settings, data, source, sides, history, ink, running, acts;
  let waiting = 0, last = 0, drawnAt = 0, turn = 0; // of frames
  // acts: {phase, time} of a slow step, whose gradients wait in side.g; null between two steps
  const say = text => { find(".pg-says").textContent = text; };
  const learning = () => sides.filter(side => side && !side.lost);
  function colours() {
    const css = getComputedStyle(root), get = name => css.getPropertyValue("--pg-" + name).trim();
    ink = Object.fromEntries(["text", "ground", "plus", "minus", "accent"].map(n => [n, get(n)]));
    ink.classes = range(1, 4).map(k => get("class" + k));
    ink.lines = range(1, 4).map(k => get("line" + k));
  }
  function reset() {
    const {data: name, seed, layers, units, activation} = settings;
    data = sample(name, seed);
    source = batches(data, seed);
    const sizes = [2, ...Array(layers).fill(units), DATA[name][1]];
    sides = settings.sides.map(choice => choice.rule === "none" ? null
      : {learner: new Learner(choice, {sizes, activation, seed})});
    history = {steps: [], every: 1, count: 0, sides: sides.map(() => [])};
    acts = null;
    run(false);
    record();
    say("Both rules start from the same weights. Press Run or Step.");
    draw();
  }
  function record() {
    for (const side of learning()) side.now = side.learner.measure(data);
    if (history.count % history.every || history.steps.at(-1) === history.count) return;
    history.steps.push(history.count);
    sides.forEach((side, n) => history.sides[n].push(side?.now));
    if (history.steps.length < 300) return; // the curves stay short
    for (const list of [history.steps, ...history.sides])
      list.splice(0, list.length, ...list.filter((_, n) => n % 2 === 0));
    history.every *= 2;
  }
  function begin() { // the next batch and what each rule makes of it; no weight has moved
    const [x, y, [chosen]] = source.next().value;
    for (const side of learning()) {
      const g = side.learner.gradients(x, y);
      Object.assign(side, {g, chosen, path: path(side.learner, g)});
    }
    acts = {phase: 0, time: 0};
  }
  function finish() {
    for (const side of learning()) {
      side.learner.apply(side.g);
      side.lost = !side.learner.W.slice(1).flat(2).every(Number.isFinite);
    }
    if (!learning().length) run(false);
    history.count++;
    acts = null;
  }
  function next() { // one phase of a slow step further
    if (!acts) begin();
    else if (sides.some(side => acts.phase + 1 < side?.path.length))
      acts = {phase: acts.phase + 1, time: 0};
    else {
      finish();
      record();
      if (running === "once") run(false);
    }
  }
  function run(state) { // false, true, or "once" for a slow step that plays to its end
    if (!state !== !running) say(state ? "Running." : "Paused.");
    running = state;
    find(".pg-run").textContent = state === true ? "Pause" : "Run";
    const ariaLive = state && settings.speed !== "slow" ? "off" : "polite";
    for (const p of all(".pg-story")) Object.assign(p, {ariaLive});
    if (state) waiting ||= requestAnimationFrame(frame);
  }
  function frame(time) {
    waiting = running && requestAnimationFrame(frame);
    if (!running) return record(), draw();
    const passed = Math.min(time - last, 100);
    last = time;
    turn = 1 - turn;
    if (settings.speed === "slow") {
      const long = acts && Math.max(...sides.map(s => s?.path[acts.phase]?.hops.length ?? 0), 1);
      if (!acts || (acts.time += passed / 1100 / long) >= 1) next();
    } else {
      if (calm.matches && time - drawnAt < 500) return; // steps in the place of motion
      advance();
    }
    drawnAt = time;
    draw();
  }
  function advance() {
    if (acts) finish(); // one that was begun slowly
    else for (let n = settings.speed === "ten" ? 10 : 1; n > 0; n--) {
      begin();
      finish();
    }
    if (!running || calm.matches || turn) record();
  }
  function story({lost, path, now: {angle}}) { // what just happened, in words
    if (lost) return "The weights have exploded: they are no numbers any more.";
    if (acts) return path[Math.min(acts.phase, path.length - 1)].text;
    return (path ?? []).filter(({shown}) => shown).map(({text, shown: [l], hops}) => hops.length
      && angle[l - 1] > 0.5 ? text.replace(".", ` (${angle[l - 1].toFixed(0)}° from BP).`) : text
    ).join(" ");
  }
  function draw() {
    const {count, steps} = history, all = !running || acts || calm.matches; // else in turn
    sides.forEach((side, n) => {
      const box = boxes[n], sheet = name => sheets[name + (n ? "2" : "")];
      box.classList.toggle("pg-none", !side);
      if (!side) return;
      const {learner, now, g, path} = side, words = story(side);
      drawNetwork(sheet("net"), ink, learner, g, path, acts ? acts.phase : path?.length,
        acts && !calm.matches ? acts.time : 1);
      if (all || !turn) drawField(sheet("field"), ink, learner, data, side.chosen, small);
      if (all || turn) for (const key of ["angle", "norm"])
        drawChart(sheet(key), ink, key, steps, now[key].map((_, l) => ({name: `${l + 1}`, dash: l,
          colour: ink.lines[l], values: history.sides[n].map(m => m[key][l])})));
      const numbers = `accuracy ${Math.round(100 * now.accuracy)} %, loss ${now.loss.toFixed(3)}`;
      box.querySelector(".pg-numbers").textContent =
        `${RULES[learner.choice.rule][0]}, step ${count}: ${numbers}`;
      if (acts || !running || count % 30 === 0) box.querySelector(".pg-story").textContent = words;
      sheet("net").canvas.ariaLabel = `Network. ${words}`;
      sheet("field").canvas.ariaLabel = `Decision field: ${numbers}`;
    });
    if (all || turn) for (const key of ["loss", "accuracy"])
      drawChart(sheets[key], ink, key, steps, sides.map((side, n) => ({name: ["1st", "2nd"][n],
        dash: n, colour: ink.lines[n], values: history.sides[n].map(m => m?.[key] ?? NaN)})));
  }
  const fields = () => [...SHARED.map(name => [settings, name, ""]),
    ...settings.sides.flatMap((side, n) => OWN.map(name => [side, name, n ? "2" : ""]))];
  function show() { // the settings, in the controls
    for (const [owner, name, suffix] of fields()) {
      const input = find(`#pg-${name}${suffix}`), knobs = RULES[owner.rule]?.[1] ?? [];
      input.value = owner[name];
      if (input.nextElementSibling) input.nextElementSibling.value = owner[name];
      if (suffix || OWN.includes(name)) input.parentElement.hidden = owner.rule === "none"
        ? name !== "rule" : !["rule", "rate", ...knobs].includes(name);
    }
  }
  const follow = () => { settings = fromHash(location.hash), show(), reset(); };
  root.addEventListener("change", ({target}) => {
    const [owner, name] = fields().find(([, name, suffix]) => target.id === `pg-${name}${suffix}`);
    owner[name] = legal(name, target.value);
    if (name === "rule") Object.assign(owner, usual(owner.rule));
    show();
    window.history.replaceState(null, "", toHash(settings));
    LIVE.includes(name) ? (record(), draw()) : reset();
  });
  root.addEventListener("input", ({target: {nextElementSibling: output, value}}) => {
    if (output) output.value = value;
  });
  find(".pg-run").onclick = () => run(running !== true);
  find(".pg-reset").onclick = reset;
  find(".pg-step").onclick = () => {
    const slow = settings.speed === "slow";
    if (slow && !calm.matches) return run("once");
    run(false);
    slow ? next() : advance();
    say(`Step ${history.count}.`);
    draw();
  };
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return; // another place of the page
    follow();
    root.scrollIntoView();
    say("The settings of the link are in place. Press Run.");
  });
  const fit = () => Object.values(sheets).forEach(sheet => sheet.fit());
  colours(), fit(), follow();
  new ResizeObserver(() => {
    if (!Object.values(sheets).every(({canvas, w}) => canvas.clientWidth === w)) fit(), draw();
  }).observe(root);
  new MutationObserver(() => { colours(); draw(); })
    .observe(document.documentElement, {attributeFilter: ["data-theme"]});
}

globalThis.document?.addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("fig-playground");
  if (place) mount(place);
});
return {gradients, forward, Learner, sample, batches, fromHash, toHash, DATA, RULES, mount};
})();
