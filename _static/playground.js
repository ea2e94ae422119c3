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
function dot(u, v) {
  let sum = 0;
  for (let i = 0; i < u.length; i++) sum += u[i] * v[i];
  return sum;
}
const affine = (X, W, b) => X.map(x => W.map((w, j) => dot(w, x) + b[j])); // X W^T + b
function times(D, M) { // D M
  const columns = transpose(M);
  return D.map(d => columns.map(column => dot(d, column)));
}
function outer(D, R) { // D^T R / B
  const columns = transpose(R);
  return transpose(D).map(d => columns.map(r => dot(d, r) / D.length));
}
function softmax(row) {
  const top = Math.max(...row), exp = row.map(v => Math.exp(v - top));
  const sum = exp.reduce((s, v) => s + v);
  return exp.map(v => v / sum);
}
const oneHot = (y, classes) => y.map(c => range(0, classes - 1).map(k => +(k === c)));
const crossEntropy = (scores, c) => { // -ln softmax(scores)_c
  const top = Math.max(...scores);
  return top + Math.log(scores.reduce((s, v) => s + Math.exp(v - top), 0)) - scores[c];
};

function forward({W, b, activation}, X) {
  const [f] = ACTIVATIONS[activation], L = W.length - 1, h = [X], a = [null];
  for (let l = 1; l <= L; l++) {
    a[l] = affine(h[l - 1], W[l], b[l]);
    h[l] = l < L ? map(a[l], f) : a[l];
  }
  return {a, h};
}

// What each rule says: delta[l], the teaching signal of block l, and r[l], its presynaptic activity;
// own, the gradients of what the rule learns itself; and for the drawing M[l], by which the signal
// came to block l (of LFNN-l: what came).
function chain({L, e, slope, h}, matrix, descend = slope) {
  const delta = [], M = [];
  delta[L] = e;
  for (let l = L - 1; l > 0; l--) {
    M[l] = matrix(l + 1);
    delta[l] = descend(l, times(delta[l + 1], M[l]));
  }
  return {delta, M, r: [null, ...h]};
}
function broadcast({L, e, slope, h, feedback}, sent) {
  const delta = [], M = [];
  delta[L] = e;
  for (let l = 1; l < L; l++) {
    M[l] = feedback["D" + l];
    delta[l] = slope(l, times(sent, M[l]));
  }
  return {delta, M, sent, r: [null, ...h]};
}
const power = (W, p) => map(W, w => Math.sign(w) * Math.abs(w) ** (p - 1));

const SIGNALS = {
  bp: at => chain(at, l => at.W[l]),
  fa: at => chain(at, l => at.feedback["B" + l]),
  sign: (at, {scale = 1}) => chain(at, l => map(at.W[l], w => scale * Math.sign(w))),
  kp: at => ({...chain(at, l => at.feedback["B" + l]), beside: ["B", 1]}),
  dfa: at => broadcast(at, at.e),
  drtp: at => broadcast(at, at.target),
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
    const differ = (l, u) => map(u, (v, s, i) => at.h[l][s][i] - f(at.a[l][s][i] - beta * v));
    return {...chain(at, l => at.feedback["E" + l], differ), beside: ["E", gamma]};
  },
  lfnn(at, options) {
    const {L, e, h, slope, target, feedback} = at, delta = [], M = [], own = {};
    for (let l = 1; l < L; l++) {
      const V = feedback["V" + l];
      const q = h[l].map((row, s) => scoreErrors(V.map(head => head.map(v => dot(v, row))),
        target[s], options)); // (B, N, C)
      M[l] = q.map(each => h[l][0].map((_, i) =>
        each.reduce((sum, score, w) => sum + score.reduce((t, v, c) => t + v * V[w][c][i], 0), 0)));
      own["V" + l] = V.map((_, w) => outer(q.map(each => each[w]), h[l]));
      delta[l] = slope(l, M[l]);
    }
    delta[L] = e;
    return {delta, M, r: [null, ...h], own};
  },
  attention: (at, {p = 2}) => chain(at, l => power(at.W[l], p)),
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
    gb[l] = transpose(delta[l]).map(d => d.reduce((s, v) => s + v) / x.length);
  }
  if (beside) // the matrix that learns beside W_l gets a share of its gradient
    for (let l = 2; l <= L; l++) own[beside[0] + l] = map(gW[l], g => beside[1] * g);
  const loss = y.reduce((s, c, n) => s + crossEntropy(h[L][n], c), 0) / y.length;
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
const uniform = (rows, columns, bound, draw) =>
  range(1, rows).map(() => range(1, columns).map(() => (2 * draw() - 1) * bound));

const POINTS = 200, BATCH = 20, REACH = 2.4; // REACH: the plane is drawn from -REACH to REACH
const around = (r, angle) => [r * Math.cos(angle), r * Math.sin(angle)];
const DATA = { // name -> [label, classes, (class, part of it in 0..1, draw) => point, noise]
  moons: ["two moons", 2, (c, t) => c ? [1 - 1.2 * Math.cos(Math.PI * t) - 0.4,
    0.4 - 1.2 * Math.sin(Math.PI * t)] : [1.2 * Math.cos(Math.PI * t) - 0.6,
    1.2 * Math.sin(Math.PI * t) - 0.4], 0.15],
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
  const L = sizes.length - 1, bound = n => Math.sqrt(6 / n), feedback = {};
  const make = (rows, columns, l, kind, by = 1) =>
    uniform(rows, columns, by * bound(columns), random(97 * seed + 13 * l + 7919 * kind));
  const W = [null], b = [null], C = sizes[L];
  for (let l = 1; l <= L; l++) {
    W[l] = make(sizes[l], sizes[l - 1], l, 0);
    b[l] = Array(sizes[l]).fill(0);
    if (l > 1 && (rule === "fa" || rule === "kp"))
      feedback["B" + l] = make(sizes[l], sizes[l - 1], l, 1, scale);
    if (l > 1 && rule === "ekdaa") feedback["E" + l] = W[l].map(row => [...row]);
    if (l < L && (rule === "dfa" || rule === "drtp"))
      feedback["D" + l] = make(C, sizes[l], l, 2, scale);
    if (l < L && rule === "lfnn")
      feedback["V" + l] = range(1, workers).map(w => make(C, sizes[l], l, 3 + w));
  }
  if (rule === "pepita") feedback.F = transpose(make(C, sizes[0], 1, 3, scale));
  return {activation, W, b, feedback};
}

const descend = (A, G, rate, decay) => A.map((v, i) => Array.isArray(v)
  ? descend(v, G[i], rate, decay) : v - rate * (G[i] + decay * v));

class Learner { // one rule on one network
  constructor(choice, settings) {
    this.choice = choice;
    this.options = {p: choice.p, beta: choice.beta, leaders: choice.leaders, scale: choice.scale};
    Object.assign(this, start(choice, settings));
  }
  gradients(x, y, rule = this.choice.rule) {
    return gradients({...this, rule, options: this.options, x, y});
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
  measure({x, y}) { // on all points: loss, accuracy; per block the angle to BP and the ratio of norms
    const g = this.gradients(x, y), bp = this.gradients(x, y, "bp"), L = this.W.length - 1;
    const right = y.filter((c, n) => g.h[L][n].every(v => v <= g.h[L][n][c])).length;
    const pairs = range(1, L).map(l => [g.W[l].flat(), bp.W[l].flat()]);
    return {
      loss: g.loss, accuracy: right / y.length, angle: pairs.map(([u, v]) => angle(u, v)),
      norm: pairs.map(([u, v]) => norm(u) / norm(v)), weight: this.W.slice(1).map(A => norm(A.flat())),
    };
  }
}
const norm = u => Math.hypot(...u);
function angle(u, v) { // in degrees; Kahan's form, as in bpfree.measure
  const a = norm(u), b = norm(v), [p, q] = [u.map(w => w / a), v.map(w => w / b)];
  return 360 / Math.PI * Math.atan2(norm(p.map((w, i) => w - q[i])), norm(p.map((w, i) => w + q[i])));
}
function* batches({x, y}, seed) { // without end, shuffled anew in each epoch
  for (const draw = random(2000 + seed), order = range(0, y.length - 1);;) {
    for (let n = order.length - 1; n > 0; n--) {
      const k = Math.floor(draw() * (n + 1));
      [order[n], order[k]] = [order[k], order[n]];
    }
    for (let n = 0; n < order.length; n += BATCH) {
      const rows = order.slice(n, n + BATCH);
      yield {rows, x: rows.map(k => x[k]), y: rows.map(k => y[k])};
    }
  }
}

// ---- what the reader chooses, and the address that keeps it -------------------------------------

const sub = l => "₀₁₂₃₄"[l];
const above = (l, M, more) => `Block ${l} received δ${sub(l + 1)} times ${M}${sub(l + 1)}${more}.`;
// label; its own knobs; the way of its signal; that matrix's letter; what it says of block l
const RULES = {
  bp: ["BP", [], "chain", "W", l => above(l, "W", ", the weights themselves")],
  fa: ["FA", ["scale"], "chain", "B", l => above(l, "B", ", random and fixed")],
  sign: ["sign symmetry", ["scale"], "chain", "±", l => above(l, "the signs of W", "")],
  kp: ["Kolen-Pollack", ["scale", "decay"], "chain", "B", l => above(l, "B", ", which learns with W")],
  dfa: ["DFA", ["scale"], "direct", "D", l => `Block ${l} received the error times D${sub(l)}.`],
  drtp: ["DRTP", ["scale"], "direct", "D", l => `Block ${l} received the label times D${sub(l)}.`],
  pepita: ["PEPITA", ["scale"], "input", "F", l =>
    `Block ${l} answered a second time: its signal is the difference of its two answers.`],
  ekdaa: ["EKDAA", ["beta"], "chain", "E", l =>
    `δ${sub(l + 1)} times E${sub(l + 1)} set block ${l} a target: what it said less that is its signal.`],
  lfnn: ["LFNN-l", ["leaders"], "local", "V", l =>
    `Block ${l} was taught by its own four heads: leaders learn the label, the others follow.`],
  attention: ["attention", ["p"], "chain", "α′", l => above(l, "α′(W)", "")],
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
  speed: ["Speed", {slow: "slow, path by path", one: "1 step a frame", ten: "10 steps a frame"}, "one"],
  rule: ["Rule", names(RULES), "fa"],
  rate: ["Rate η", [0, 100, "any"], 0.1],
  scale: ["Feedback scale", [0.001, 1000, "any"], 1],
  decay: ["Weight decay", [0, 1, "any"], 0.001],
  beta: ["Target step β", [0.01, 10, "any"], 0.9],
  leaders: ["Share that leads", [0.25, 1, 0.25], 0.5],
  p: ["Exponent p", [1, 3, 0.1], 1.5],
};
const SHARED = ["data", "layers", "units", "activation", "seed", "speed"];
const OWN = Object.keys(FIELDS).slice(SHARED.length);
const LIVE = ["speed", "rate", "decay", "beta", "leaders", "p"]; // changed without a new start

function legal(name, value) { // the value if the field can have it, or the field's own
  const [, allowed, usual] = FIELDS[name];
  if (!Array.isArray(allowed)) return value in allowed || value === "none" ? value : usual;
  const number = value === null || value === "" ? NaN : +value;
  return number >= allowed[0] && number <= allowed[1] ? number : usual;
}
function fromHash(hash) { // data=...&rule=...&rule2=...: what is not named is as usual
  const query = new URLSearchParams(hash.replace(/^#/, ""));
  const read = (name, key, usual) => legal(name, query.has(key) ? query.get(key) : usual);
  const settings = Object.fromEntries(SHARED.map(name => [name, read(name, name, FIELDS[name][2])]));
  settings.sides = ["", "2"].map((suffix, second) => Object.fromEntries(OWN.map(name => {
    const usual = name === "rule" && second ? "bp" : FIELDS[name][2];
    return [name, read(name, name + suffix, name === "rate" && second ? query.get("rate") : usual)];
  })));
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
  const h = l => g.h[l][0], up = (l, v = h(l - 1)) =>
    ({from: l - 1, to: l, flow: (k, i) => W[l][i][k] * v[k]});
  const down = (from, to, flow, name) => ({from, to, flow, name});
  const error = {text: "The error e = p − y stands at the output.", hops: [], shown: [L]};
  const hidden = range(1, L - 1), back = [...hidden].reverse();
  const phases = [{text: "The ringed point runs forward.", hops: range(1, L).map(l => up(l))}, error];
  if (way === "chain") for (const l of back)
    phases.push({text: says(l), shown: [l], hops: [down(l + 1, l,
      (k, i) => g.delta[l + 1][0][k] * g.M[l][k][i], letter + sub(l + 1))]});
  if (way === "direct") for (const l of back)
    phases.push({text: says(l), shown: [l],
      hops: [down(L, l, (k, i) => g.sent[0][k] * g.M[l][k][i], letter + sub(l))]});
  if (way === "input") {
    phases.push({text: "The error was added to the input, through F.", shown: [0],
      hops: [down(L, 0, (k, i) => g.e[0][k] * g.M[0][i][k], letter)]});
    const change = l => g.err[l][0].map((v, i) => v - h(l)[i]);
    for (const l of range(1, L)) phases.push({shown: [l],
      text: l < L ? says(l) : "The output block's signal is the error of the second pass.",
      hops: [{...up(l, change(l - 1)), name: l < L ? "2nd" : ""}]});
  }
  if (way === "local") phases.splice(0, 1, ...hidden.map(l => ({text: says(l), shown: [l],
    hops: [up(l), down("heads", l, (k, i) => g.M[l][0][i], letter + sub(l))]})),
  {text: "The output block ran forward.", hops: [up(L)]});
  if (way === "none") phases.push({text: "Nothing is sent to the hidden blocks.", hops: [],
    shown: hidden});
  phases.push({text: "Each weight moved by its signal times its input.", hops: [], shown: [], ends: true});
  return phases;
}

// ---- drawing ------------------------------------------------------------------------------------

const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]], GRID = 40;

class Sheet { // a canvas as wide as its box; lengths are pixels of the page
  constructor(canvas, ratio) {
    Object.assign(this, {canvas, ratio, g: canvas.getContext("2d")});
  }
  fit() {
    const sharp = devicePixelRatio || 1;
    this.w = this.canvas.clientWidth;
    this.h = Math.round(this.w * this.ratio);
    [this.canvas.width, this.canvas.height] = [this.w * sharp, this.h * sharp].map(Math.round);
    this.g.scale(sharp, sharp);
  }
  clear(ink) {
    this.g.clearRect(0, 0, this.w, this.h);
    Object.assign(this.g, {font: "12px system-ui, sans-serif", textBaseline: "middle", lineJoin: "round",
      fillStyle: ink.text, strokeStyle: ink.text, lineWidth: 1, globalAlpha: 1});
    return this.g;
  }
  text(string, x, y, align = "center") {
    this.g.textAlign = align;
    this.g.fillText(string, x, y);
  }
}
const rgb = colour => colour.match(/\w\w/g).map(c => parseInt(c, 16));
function mark(g, kind, x, y, r) { // a class has a shape beside its colour
  g.moveTo(x + r, y);
  if (kind === 0) g.arc(x, y, r, 0, 2 * Math.PI);
  else for (let k = 1, n = [0, 4, 3, 4][kind], turn = kind === 1 ? 0.5 : 0; k <= n; k++) {
    const [dx, dy] = around(1.25 * r, 2 * Math.PI * (k + turn) / n - Math.PI / 2);
    k === 1 ? g.moveTo(x + dx, y + dy) : g.lineTo(x + dx, y + dy);
  }
  g.closePath();
}

const PLANE = range(0, GRID * GRID - 1).map(n => [n % GRID, GRID - 1 - Math.floor(n / GRID)]
  .map(k => REACH * (2 * (k + 0.5) / GRID - 1)));
function drawField(sheet, ink, learner, {x, y}, chosen, small) {
  const g = sheet.clear(ink), {w} = sheet, classes = ink.classes.map(rgb), ground = rgb(ink.ground);
  const logits = forward(learner, PLANE).h.at(-1), image = small.createImageData(GRID, GRID);
  logits.forEach((row, n) => {
    const p = softmax(row);
    for (let c = 0; c < 3; c++) {
      const full = p.reduce((sum, v, k) => sum + v * classes[k][c], 0);
      image.data[4 * n + c] = 0.5 * ground[c] + 0.5 * full;
    }
    image.data[4 * n + 3] = 255;
  });
  small.putImageData(image, 0, 0);
  g.drawImage(small.canvas, 0, 0, w, sheet.h);
  const [px, py] = [v => (v / REACH + 1) * w / 2, v => (1 - v / REACH) * sheet.h / 2];
  ink.classes.forEach((colour, c) => {
    g.beginPath();
    x.forEach((point, n) => y[n] === c && mark(g, c, px(point[0]), py(point[1]), Math.max(2, w / 80)));
    Object.assign(g, {fillStyle: colour, strokeStyle: ink.ground, lineWidth: 1.4});
    g.stroke();
    g.fill();
  });
  if (chosen === undefined) return;
  g.beginPath();
  g.arc(px(x[chosen][0]), py(x[chosen][1]), 8, 0, 2 * Math.PI);
  Object.assign(g, {strokeStyle: ink.text, lineWidth: 2.5});
  g.stroke();
}

// The network: activities in the units, weights between them, and as rings the teaching signals that
// have arrived. Below it runs the path; `now` is the phase and `t` in 0..1 how far it is.
function drawNetwork(sheet, ink, learner, g, phases, now, t) {
  const c = sheet.clear(ink), {w, h} = sheet, L = learner.W.length - 1, floor = h - 62;
  const sizes = [learner.W[1][0].length, ...learner.W.slice(1).map(W => W.length)];
  const x = l => 26 + l * (w - 52) / L, radius = Math.min(10, floor / 22);
  const y = (l, i) => 22 + (floor - 22) * (i + 0.5) / sizes[l];
  const sign = v => v < 0 ? ink.minus : ink.plus;
  for (let l = 1; l <= L; l++) {
    const most = Math.max(...learner.W[l].flat().map(Math.abs), 1);
    learner.W[l].forEach((row, j) => row.forEach((v, i) => {
      c.beginPath();
      c.moveTo(x(l - 1), y(l - 1, i));
      c.lineTo(x(l), y(l, j));
      Object.assign(c, {strokeStyle: sign(v), lineWidth: 0.3 + 3.5 * Math.abs(v) / most, globalAlpha: 0.55});
      c.stroke();
    }));
  }
  c.globalAlpha = 1;
  const arrived = new Set(phases?.flatMap((phase, n) => n < now ? phase.shown ?? [] : []));
  const ran = phases && now < phases.length ? phases[now] : null;
  for (let l = 0; l <= L; l++) {
    const signal = l ? g?.delta[l][0] : g?.err && g.r[1][0].map((v, i) => v - g.h[0][0][i]);
    const most = signal && (Math.max(...signal.map(Math.abs)) || 1);
    const shown = l < L || !g ? g?.h[l][0] : softmax(g.h[L][0]);
    for (let i = 0; i < sizes[l]; i++) {
      const activity = shown ? Math.tanh(shown[i]) : 0;
      c.beginPath();
      c.arc(x(l), y(l, i), radius, 0, 2 * Math.PI);
      c.fillStyle = ink.ground;
      c.fill();
      Object.assign(c, {globalAlpha: Math.abs(activity), fillStyle: sign(activity)});
      c.fill();
      Object.assign(c, {globalAlpha: 1, strokeStyle: ink.text, lineWidth: 1});
      c.stroke();
      if (!signal || !arrived.has(l) || !signal[i]) continue;
      c.beginPath();
      c.arc(x(l), y(l, i), radius + 3.5, 0, 2 * Math.PI);
      Object.assign(c, {strokeStyle: sign(signal[i]), lineWidth: 1 + 4 * Math.abs(signal[i]) / most});
      c.stroke();
    }
    c.fillStyle = ink.text;
    sheet.text(l === 0 ? "x" : l === L ? "p" : "h" + sub(l), x(l), 9);
  }
  phases?.forEach((phase, n) => phase.hops.forEach(hop => // the way, under the network
    hop.name !== undefined && drawWay(sheet, ink, hop, x, floor + 12, n < now ? 1 : n === now ? 2 : 0)));
  if (!ran || t >= 1 || !ran.hops.length) return;
  const k = Math.min(ran.hops.length - 1, Math.floor(t * ran.hops.length)), hop = ran.hops[k];
  const part = t * ran.hops.length - k, heads = hop.from === "heads";
  const rows = heads ? [0] : range(0, sizes[hop.from] - 1), columns = range(0, sizes[hop.to] - 1);
  const flows = rows.flatMap(j => columns.map(i => [j, i, hop.flow(j, i)]));
  const most = Math.max(...flows.map(([, , v]) => Math.abs(v))) || 1;
  for (const [j, i, v] of flows) {
    const [x0, y0] = heads ? [x(hop.to), floor + 22] : [x(hop.from), y(hop.from, j)];
    c.beginPath();
    c.arc(x0 + part * (x(hop.to) - x0), y0 + part * (y(hop.to, i) - y0),
      1 + 4 * Math.abs(v) / most, 0, 2 * Math.PI);
    Object.assign(c, {fillStyle: sign(v), strokeStyle: ink.ground, lineWidth: 1});
    c.fill();
    c.stroke();
  }
}
function drawWay(sheet, ink, {from, to, name}, x, top, state) { // state: 0 to come, 1 done, 2 now
  const c = sheet.g, colour = state === 2 ? ink.accent : ink.text;
  Object.assign(c, {strokeStyle: colour, fillStyle: colour, lineWidth: state === 2 ? 3 : 1.5,
    globalAlpha: state ? 1 : 0.6});
  c.setLineDash(state ? [] : [3, 3]);
  const heads = from === "heads", x1 = x(to), deep = heads ? 0 : 16 + 9 * Math.abs(from - to);
  const x0 = heads ? x1 : x(from), side = heads ? 0 : 6 * Math.sign(x1 - x0);
  c.beginPath();
  c.moveTo(x0, heads ? top + 22 : top);
  c.quadraticCurveTo((x0 + x1) / 2, heads ? top + 10 : top + 2 * deep - 8, x1 - side, top + 4);
  c.stroke();
  c.setLineDash([]);
  c.beginPath();
  c.moveTo(x1, top - 3);
  c.lineTo(x1 - 4, top + 5);
  c.lineTo(x1 + 4, top + 5);
  c.fill();
  if (heads) c.strokeRect(x1 - 16, top + 22, 32, 18);
  const mid = heads ? [x1, top + 31] : [x1 + (x0 - x1) * 0.3, top + deep * 0.84 + 3];
  if (!heads && name) {
    const half = c.measureText(name).width / 2 + 2;
    c.globalAlpha = 1;
    c.fillStyle = ink.ground;
    c.fillRect(mid[0] - half, mid[1] - 7, 2 * half, 14);
  }
  Object.assign(c, {globalAlpha: 1, fillStyle: colour});
  sheet.text(name, ...mid);
}

// Lines over steps: series [{name, values, colour, dash}] between [low, high], perhaps logarithmic.
function drawChart(sheet, ink, title, steps, series, [low, high], unit = "", log = false) {
  const c = sheet.clear(ink), {w, h} = sheet, box = [34, 18, w - 58, h - 34], at = log ? Math.log10 : v => v;
  const x = n => box[0] + box[2] * steps[n] / Math.max(steps.at(-1) ?? 1, 1);
  const y = v => box[1] + box[3] * (1 - Math.min(1, Math.max(0, (at(v) - at(low)) / (at(high) - at(low)))));
  sheet.text(title, 2, 7, "left");
  for (const v of [low, log ? Math.sqrt(low * high) : (low + high) / 2, high]) {
    sheet.text((log ? "10" + [...String(at(v))].map(d => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(d)]).join("")
      : +v.toPrecision(3)) + unit, box[0] - 3, y(v), "right");
    c.globalAlpha = 0.25;
    c.beginPath();
    c.moveTo(box[0], y(v));
    c.lineTo(box[0] + box[2], y(v));
    c.stroke();
    c.globalAlpha = 1;
  }
  sheet.text(`${steps.at(-1) ?? 0} steps`, w - 24, h - 7, "right");
  const ends = [];
  for (const {name, values, colour, dash} of series) {
    Object.assign(c, {strokeStyle: colour, fillStyle: colour, lineWidth: 1.8});
    c.setLineDash(DASHES[dash]);
    c.beginPath();
    let drawn = null;
    values.forEach((v, n) => {
      if (Number.isNaN(v)) drawn = null;
      else drawn = (drawn === null ? c.moveTo(x(n), y(v)) : c.lineTo(x(n), y(v)), y(v));
    });
    c.stroke();
    c.setLineDash([]);
    if (drawn !== null) ends.push({name, colour, y: drawn});
  }
  ends.sort((a, b) => a.y - b.y).forEach((end, n) => {
    if (n) end.y = Math.max(end.y, ends[n - 1].y + 11);
    c.fillStyle = end.colour;
    sheet.text(end.name, w - 22, end.y, "left");
  });
}

// ---- the page -----------------------------------------------------------------------------------

function control(name, suffix = "") {
  const [label, allowed] = FIELDS[name], id = `pg-${name}${suffix}`, listed = !Array.isArray(allowed);
  const choices = {...allowed, ...(name === "rule" && suffix && {none: "no second rule"})};
  const [low, high, step] = listed ? [] : allowed;
  const box = listed
    ? `<select id="${id}">${Object.entries(choices).map(([value, text]) =>
      `<option value="${value}">${text}</option>`).join("")}</select>`
    : `<input id="${id}" min="${low}" max="${high}" step="${step}" type="${name === "p"
      ? "range" : "number"}">${name === "p" ? `<output for="${id}"></output>` : ""}`;
  return `<div data-field="${name}"><label for="${id}">${label}</label> ${box}</div>`;
}
const canvas = (name, ratio) => `<canvas data-sheet="${name}" data-ratio="${ratio}" role="img"></canvas>`;
const PAGE = `
<div class="pg-bar"><button type="button" class="pg-run">Run</button>
<button type="button" class="pg-step">Step</button>
<button type="button" class="pg-reset">Reset</button><p class="pg-says" role="status"></p></div>
<fieldset class="pg-fields"><legend>Network and data</legend>${SHARED.map(n => control(n)).join("")}</fieldset>
<div class="pg-sides">${["", "2"].map(n => `<div class="pg-side"><fieldset class="pg-fields">
<legend>${n ? "Second" : "First"} rule</legend>${OWN.map(name => control(name, n)).join("")}</fieldset>
<div class="pg-work"><p class="pg-numbers"></p>${canvas("net" + n, 0.72)}<p class="pg-story"></p>
<div class="pg-pair">${canvas("field" + n, 1)}<div>${canvas("angle" + n, 0.52)}${
  canvas("norm" + n, 0.52)}</div></div></div></div>`).join("")}</div>
<div class="pg-pair">${canvas("loss", 0.4)}${canvas("accuracy", 0.4)}</div>`;

function mount(place) {
  const root = document.createElement("section");
  root.id = root.className = "playground";
  root.setAttribute("aria-label", "Playground");
  root.innerHTML = PAGE;
  place.replaceWith(root);
  const find = selector => root.querySelector(selector), all = s => [...root.querySelectorAll(s)];
  const sheets = Object.fromEntries(all("canvas").map(c =>
    [c.dataset.sheet, new Sheet(c, +c.dataset.ratio)]));
  const small = Object.assign(document.createElement("canvas"), {width: GRID, height: GRID})
    .getContext("2d");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let settings, data, source, sides, history, ink, running, acts, drawnAt;
  // acts: what a slow step shows, {phase, time}; the sides' gradients wait in side.g meanwhile

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
      : {learner: new Learner(choice, {sizes, activation, seed}), story: "", now: {}});
    history = {steps: [], every: 1, count: 0, sides: sides.map(() => [])};
    acts = null;
    run(false);
    record();
    say("Both rules start from the same weights. Press Run or Step.");
  }
  function record() {
    sides.forEach((side, n) => side && !side.lost && (side.now = side.learner.measure(data)));
    if (history.count % history.every) return;
    history.steps.push(history.count);
    sides.forEach((side, n) => history.sides[n].push(side?.now));
    if (history.steps.length < 400) return;
    const keep = (_, n) => n % 2 === 0; // the curves stay short
    history.steps = history.steps.filter(keep);
    history.sides = history.sides.map(each => each.filter(keep));
    history.every *= 2;
  }
  function begin() { // the next batch and what each rule makes of it; no weight has moved
    const batch = source.next().value;
    for (const side of sides.filter(side => side && !side.lost)) {
      side.g = side.learner.gradients(batch.x, batch.y);
      side.path = path(side.learner, side.g);
      side.chosen = batch.rows[0];
    }
    acts = {phase: 0, time: 0};
  }
  function finish() {
    for (const side of sides.filter(side => side && !side.lost)) {
      side.learner.apply(side.g);
      side.story = side.path.filter(phase => phase.shown).map(phase => phase.text).join(" ");
      side.lost = !side.learner.W.flat(3).every(Number.isFinite);
      if (!side.lost) continue;
      side.story = "The weights have exploded: they are no numbers any more.";
      run(running && sides.some(other => other && !other.lost));
    }
    history.count++;
    acts = null;
  }
  const phases = () => Math.max(...sides.map(side => side?.path?.length ?? 0));
  function next() { // one phase of a slow step further
    if (!acts) begin();
    else if (++acts.phase < phases()) acts.time = 0;
    else {
      finish();
      record();
      if (running === "once") run(false);
    }
  }
  function run(state) { // false, true, or "once" for a slow step that plays to its end
    const before = running;
    running = state;
    find(".pg-run").textContent = state === true ? "Pause" : "Run";
    for (const p of all(".pg-story")) p.ariaLive = state && settings.speed !== "slow" ? "off" : "polite";
    if (!state && before) say("Paused.");
    if (state && !before) requestAnimationFrame(frame);
  }
  let last = 0;
  function frame(time) {
    if (!running) return draw();
    const passed = Math.min(time - last, 100);
    last = time;
    requestAnimationFrame(frame);
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
    record();
  }
  const say = text => { find(".pg-says").textContent = text; };
  const percent = v => `${(100 * v).toFixed(0)} %`;

  function draw() {
    const {count, steps} = history, slow = acts !== null;
    sides.forEach((side, n) => {
      const suffix = n ? "2" : "", box = all(".pg-side")[n];
      box.classList.toggle("pg-none", !side);
      if (!side) return;
      const {learner, now, g, path: phases = null} = side, L = learner.W.length - 1;
      const phase = slow ? acts.phase : phases?.length;
      const t = calm.matches || !slow ? 1 : acts.time;
      drawNetwork(sheets["net" + suffix], ink, learner, g, phases, phase, t);
      drawField(sheets["field" + suffix], ink, learner, data, side.chosen, small);
      const lines = key => range(1, L).map(l => ({name: String(l), colour: ink.lines[l - 1],
        dash: l - 1, values: history.sides[n].map(m => m[key][l - 1])}));
      drawChart(sheets["angle" + suffix], ink, "angle to BP, by block", steps, lines("angle"), [0, 180], "°");
      drawChart(sheets["norm" + suffix], ink, "size, in BP's", steps, lines("norm"), [1e-4, 1e4], "", true);
      const story = slow ? phases[Math.min(phase, phases.length - 1)].text : side.story;
      const line = box.querySelector(".pg-story");
      if (line.textContent !== story && (slow || !running || count % 30 === 0)) line.textContent = story;
      const numbers = `step ${count}: accuracy ${percent(now.accuracy)}, loss ${now.loss.toPrecision(3)}`;
      box.querySelector(".pg-numbers").textContent = `${RULES[learner.choice.rule][0]}, ${numbers}`;
      if (running) return;
      const angles = now.angle.map(a => Number.isNaN(a) ? "none" : `${a.toFixed(0)}°`).join(", ");
      const label = {net: `Network of ${L} blocks. ${story}`, field: `Decision field: ${numbers}`,
        angle: `Angle to BP per block: ${angles}`,
        norm: `Norm of the gradient per block, in BP's: ${now.norm.map(v => v.toPrecision(2)).join(", ")}`};
      for (const [key, text] of Object.entries(label))
        sheets[key + suffix].canvas.setAttribute("aria-label", text);
    });
    for (const [key, title, limits] of [["loss", "loss, nats", [0, 2]], ["accuracy", "accuracy", [0, 1]]]) {
      const series = sides.map((side, n) => side && {name: "1st 2nd".split(" ")[n], dash: n,
        colour: ink.lines[n], values: history.sides[n].map(m => m[key])}).filter(Boolean);
      drawChart(sheets[key], ink, title, steps, series, limits);
      if (!running) sheets[key].canvas.setAttribute("aria-label",
        `${title}: ${sides.map(side => side?.now[key].toPrecision(2)).filter(Boolean).join(" and ")}`);
    }
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
  function follow() { // the address
    settings = fromHash(location.hash);
    show();
    reset();
    draw();
  }
  root.addEventListener("change", ({target}) => {
    const [owner, name] = fields().find(([, name, suffix]) => target.id === `pg-${name}${suffix}`);
    owner[name] = legal(name, target.value);
    show();
    window.history.replaceState(null, "", toHash(settings));
    if (!LIVE.includes(name)) reset();
    draw();
  });
  root.addEventListener("input", ({target}) => {
    if (target.nextElementSibling) target.nextElementSibling.value = target.value;
  });
  find(".pg-run").onclick = () => run(running !== true);
  find(".pg-reset").onclick = () => { reset(); draw(); };
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
    root.scrollIntoView({block: "nearest"});
    say("The settings of the link are in place. Press Run.");
  });
  const fit = () => { Object.values(sheets).forEach(sheet => sheet.fit()); draw(); };
  colours();
  follow();
  new ResizeObserver(fit).observe(root);
  new MutationObserver(() => { colours(); draw(); })
    .observe(document.documentElement, {attributeFilter: ["data-theme"]});
}

if (globalThis.document) addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("fig-playground");
  if (place) mount(place);
});
return {gradients, forward, Learner, sample, batches, fromHash, toHash, DATA, RULES, mount};
})();
