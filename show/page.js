// A demonstration's three models in the browser: model.py, data/tokenizer.py and sampler.py for a
// single row of T positions, in flat float32 arrays, and then what one sees of them.
"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent); // what show/page.py has stored
const { vocab_size: V, dim: D, n_layers, max_seq_len, norm_eps, rope_theta } = data.config;
const { n_heads: H, n_kv_heads: K, head_dim: E, ffn_dim: F } = data.config; // as in model.py
const add = (a, b) => a.map((value, i) => value + b[i]);

class LM {
  constructor(weights) {
    let at = 0; // the tensors stand one after another, in the order of a model file
    const take = (rows, columns = 1) => weights.subarray(at, (at += rows * columns));
    this.embed = take(V, D);
    this.layers = Array.from({ length: n_layers }, () => ({
      qkv: take((H + 2 * K) * E, D), out: take(D, H * E), q_norm: take(E), k_norm: take(E),
      gate_up: take(2 * F, D), down: take(D, F), attention_norm: take(D), ffn_norm: take(D),
    }));
    this.norm = take(D);
    this.head = take(V, D);
  }

  // One token goes behind those in the cache: its states (D,).
  hidden(token, cache) {
    let x = this.embed.slice(token * D, (token + 1) * D);
    this.layers.forEach((layer, i) => {
      x = add(x, attention(layer, rmsNorm(x, layer.attention_norm), cache, i));
      x = add(x, ffn(layer, rmsNorm(x, layer.ffn_norm)));
    });
    cache.length += 1;
    return rmsNorm(x, this.norm);
  }
}

// Keys and values of every layer, (T, K, E) each, of which `length` positions are filled.
class KVCache {
  length = 0;
  k = Array.from({ length: n_layers }, () => new Float32Array(max_seq_len * K * E));
  v = Array.from({ length: n_layers }, () => new Float32Array(max_seq_len * K * E));
}

// x (D,) -> (D,). Stores the key and the value of its position, then attends to all up to it.
function attention(layer, x, cache, i) {
  const [k, v, position] = [cache.k[i], cache.v[i], cache.length];
  const heads = linear(layer.qkv, x); // (H + 2K, E)
  const head = (i) => heads.subarray(i * E, (i + 1) * E);
  for (let h = 0; h < H + K; h++) {
    head(h).set(rotate(rmsNorm(head(h), h < H ? layer.q_norm : layer.k_norm), position));
  }
  k.set(heads.subarray(H * E, (H + K) * E), position * K * E);
  v.set(heads.subarray((H + K) * E), position * K * E);
  const y = new Float32Array(H * E);
  for (let h = 0; h < H; h++) {
    const shared = Math.floor((h * K) / H) * E; // H / K query heads share a key/value head
    const score = (_, t) => dot(head(h), k, t * K * E + shared) / Math.sqrt(E);
    softmax(new Float32Array(position + 1).map(score)).forEach((weight, t) => {
      for (let e = 0; e < E; e++) y[h * E + e] += weight * v[t * K * E + shared + e];
    });
  }
  return linear(layer.out, y);
}

// SwiGLU: (D,) -> (D,)
function ffn(layer, x) {
  const both = linear(layer.gate_up, x); // (2F,)
  const silu = both.subarray(0, F).map((gate) => gate / (1 + Math.exp(-gate)));
  return linear(layer.down, silu.map((gate, i) => gate * both[F + i]));
}

// Turn each pair (x[e], x[e + E/2]) by its position's angle.
function rotate(x, position) {
  const turned = new Float32Array(E);
  for (let e = 0, other = E / 2; other < E; e++, other++) {
    const angle = Math.fround(position * Math.fround(rope_theta ** ((-2 * e) / E)));
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    turned[e] = x[e] * cos - x[other] * sin;
    turned[other] = x[other] * cos + x[e] * sin;
  }
  return turned;
}

function rmsNorm(x, weight) {
  const scale = 1 / Math.sqrt(dot(x, x) / x.length + norm_eps);
  return x.map((value, i) => value * scale * weight[i]);
}

// weight (rows, n), x (n,) -> (rows,)
function linear(weight, x) {
  const y = new Float32Array(weight.length / x.length);
  for (let row = 0; row < y.length; row++) y[row] = dot(x, weight, row * x.length);
  return y;
}

// Of a, and of b from j on; four at a time, because an addition to `sum` waits for the one before.
function dot(a, b, j = 0) {
  let sum = 0;
  for (let i = 0; i < a.length; i += 4, j += 4) {
    sum += a[i] * b[j] + a[i + 1] * b[j + 1] + a[i + 2] * b[j + 2] + a[i + 3] * b[j + 3];
  }
  return sum;
}

function softmax(scores) {
  const top = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - top));
  const total = weights.reduce((a, b) => a + b);
  return weights.map((weight) => weight / total);
}

// The tokenizer. A piece is the bytes of a token, each as the character of that number.
const RANKS = new Map(data.pieces.slice(0, data.ranked).map((piece, rank) => [piece, rank]));
const PATTERN = new RegExp(data.pattern, "gu");
const encode = (text) => (text.match(PATTERN) ?? []).flatMap(merge);

// Byte-pair encoding: join the neighbours of lowest rank, leftmost first, until none are a token.
function merge(part) {
  const pieces = Array.from(new TextEncoder().encode(part), (byte) => String.fromCharCode(byte));
  if (RANKS.has(pieces.join(""))) return [RANKS.get(pieces.join(""))];
  for (;;) {
    const ranks = pieces.slice(1).map((piece, i) => RANKS.get(pieces[i] + piece) ?? Infinity);
    const lowest = Math.min(...ranks);
    if (lowest === Infinity) return pieces.map((piece) => RANKS.get(piece));
    pieces.splice(ranks.indexOf(lowest), 2, data.pieces[lowest]);
  }
}

const bytes = (text) => Uint8Array.from(text, (byte) => byte.charCodeAt(0));
const UTF8 = new TextDecoder("utf-8", { ignoreBOM: true });
const decode = (ids) => UTF8.decode(bytes(ids.map((id) => data.pieces[id]).join("")));

// The sampler. Yields the attempt's tokens, then what the model adds, up to its end token.
function* generate(model, question, attempt, temperature) {
  const prompt = [data.special.question, ...encode(question), data.special.student];
  const cache = new KVCache();
  let states;
  for (const token of prompt) states = model.hidden(token, cache);
  const room = Math.min(data.max_tokens, max_seq_len - prompt.length - attempt.length);
  for (let t = 0; t < attempt.length + room; t++) {
    const logits = linear(model.head, states); // (V,)
    const id = attempt[t] ?? sample(logits, temperature);
    yield { id, probabilities: softmax(logits) };
    if (id === data.special.end) return;
    states = model.hidden(id, cache);
  }
}

function sample(logits, temperature) {
  const likeliest = logits.indexOf(Math.max(...logits));
  if (temperature === 0) return likeliest;
  let left = Math.random();
  const weights = softmax(logits.map((logit) => logit / temperature));
  const drawn = weights.findIndex((weight) => (left -= weight) < 0);
  return drawn < 0 ? likeliest : drawn; // rounded, the weights may sum to less than 1
}

// The stored weights. A trained model is the base and, in steps of one size, what training changed.
const base = new Float32Array(bytes(atob(data.base)).buffer);
const models = { base: new LM(base) };
for (const [name, { step, steps }] of Object.entries(data.trained)) {
  const counts = new Int16Array(bytes(atob(steps)).buffer);
  models[name] = new LM(base.map((weight, i) => weight + step * counts[i]));
}

// What one sees. Texts become text nodes, never HTML.
const BOX = /\\boxed\{([^{}]+)\}/g;
const ATTEMPT = /^[^]*?\\boxed\{[^{}]+\}((?!\n\n)[^])*/; // a reflection begins with a blank line
const shown = (id) => (id === data.special.end ? "‹end›" : decode([id]).replace(/\n/g, "↵"));
const percent = (p) => (p < 0.0001 ? "< 0.01%" : `${(100 * p).toFixed(p < 0.01 ? 2 : 1)}%`);
const element = (tag, properties) => Object.assign(document.createElement(tag), properties);

// What a response answers and, if the right answer is known ("" if not), whether its last one is.
function verdict(ids, right) {
  const answers = Array.from(decode(ids).matchAll(BOX), (box) => box[1]);
  const isRight = ids.at(-1) === data.special.end && answers.at(-1) === right;
  const judged = right && (isRight ? ": right ✓" : ": wrong ✗");
  return `Answers ${answers.join(", then ") || "nothing"}${judged}`;
}

class Column {
  constructor(name) {
    [this.model, this.text] = [models[name], ""];
    for (const part of ["tokens", "verdict", "likeliest"]) this[part] = $(`${name}-${part}`);
    $(`${name}-edit`).onclick = () => {
      pose({ attempt: ATTEMPT.exec(this.text)?.[0] ?? this.text });
      $("attempt").focus();
    };
    const show = ({ target }) => target.step && this.show(target.step);
    for (const kind of ["pointerover", "focusin"]) this.tokens.addEventListener(kind, show);
    this.tokens.onkeydown = ({ key, target: { previousSibling, nextSibling } }) =>
      ({ ArrowLeft: previousSibling, ArrowRight: nextSibling })[key]?.focus();
  }

  begin(question, attempt) {
    this.steps = generate(this.model, question, attempt, Number($("temperature").value));
    Object.assign(this, { ids: [], text: "", given: attempt.length });
  }

  // Shows one token more, or at the end the verdict. Returns whether there was a token.
  next() {
    const { value: step, done } = this.steps.next();
    if (done) return void (this.verdict.textContent = verdict(this.ids, $("right").value.trim()));
    this.ids.push(step.id);
    this.text = decode(this.ids.filter((id) => id !== data.special.end));
    const reflects = ATTEMPT.exec(this.text)?.[0].length < this.text.length;
    const className = this.ids.length <= this.given ? "given" : reflects ? "reflection" : "";
    const textContent = shown(step.id).replace(/↵+/, "$&\n\n");
    const place = { role: "option", tabIndex: this.ids.length > 1 ? -1 : 0 }; // then arrow keys
    this.tokens.append(element("span", { className, textContent, step, ...place }));
    return true;
  }

  // The five likeliest tokens in a token's place, and that token itself.
  show({ id, probabilities: p }) {
    const top = [...p.keys()].sort((a, b) => p[b] - p[a]).filter((i, rank) => rank < 5 || i === id);
    const token = (i) => element(i === id ? "mark" : "code", { textContent: shown(i) });
    const bar = (i) => element("span", { textContent: percent(p[i]), style: `--p: ${p[i]}` });
    this.likeliest.replaceChildren(...top.flatMap((i) => [token(i), bar(i)]));
  }
}

let newest = 0;
const clear = () => {
  document.querySelectorAll(".tokens, .verdict, .likeliest").forEach((e) => e.replaceChildren());
  return (newest += 1); // an older run ends where a newer one begins
};
async function run() {
  const question = $("question").value.trim().replace(/\s+/g, " ");
  const attempt = encode($("attempt").value);
  const length = encode(question).length + attempt.length + 3; // with two tags and an end token
  $("status").value = length > max_seq_len ? `${length} tokens: ${max_seq_len} is the most.` : "";
  let working = length > max_seq_len ? [] : columns;
  const turn = clear();
  working.forEach((column) => column.begin(question, attempt));
  while (working.length && turn === newest) {
    working = working.filter((column) => column.next());
    await new Promise(requestAnimationFrame);
  }
}

const pose = (to) => Object.entries({ note: "", ...to }).forEach(([id, x]) => ($(id).value = x));
const pick = (list) => list[Math.floor(Math.random() * list.length)];
const columns = Object.keys(models).map((name) => new Column(name));
const fresh = (values) => [clear(), pose(values)]; // old answers do not stand under a new problem
$("first").onclick = () => fresh(data.first);
$("draw").onclick = () => fresh({ ...pick(data.problems), attempt: "" });
$("plant").onclick = () => fresh(pick(data.planted[$("kind").value]));
$("run").onclick = run;
$("question").oninput = () => ($("right").value = ""); // of another problem nobody knows it
$("temperature").oninput = ({ target }) => ($("degrees").value = target.value);
pose(data.first);
