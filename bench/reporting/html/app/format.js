// Formatting of numbers.

const MISSING = "–";
const MINUS = "−";

const signed = (text) => text.replace("-", MINUS);

function fixed(value, digits) {
  return value === null || value === undefined ? MISSING : signed(value.toFixed(digits));
}

// A score in its task's unit: 62.8, 12.33
function score(value, task) {
  if (value === null || value === undefined) return MISSING;
  if (task.percent) return fixed(value * 100, 1);
  return Math.abs(value) >= 1000 ? quantity(value) : fixed(value, 2);
}

// The number that a task stands for: average, english perplexity, arc easy acc_norm
const scoreName = (task) => (task.metric === "mean" ? words(task.task) : `${words(task.task)} ${task.metric}`);

const direction = (task) => (task.higher_is_better ? "higher is better" : "lower is better");

const unit = (task) => (task.percent ? "%" : "");

// 2.14 M
function quantity(value, digits = 2) {
  if (value === null || value === undefined) return MISSING;
  for (const [factor, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= factor) return `${(value / factor).toFixed(digits)} ${prefix}`;
  }
  return Number.isInteger(value) ? String(value) : value.toPrecision(3);
}

// A cost with its unit: 1.62 GFLOP, 8.28 MB, 18.2 ms
function cost(value, unitOf) {
  if (value === null || value === undefined) return MISSING;
  if (unitOf === "s") return seconds(value);
  return unitOf === "1" ? quantity(value) : `${quantity(value)}${value >= 1e3 ? "" : " "}${unitOf}`;
}

function seconds(value) {
  if (value === null || value === undefined) return MISSING;
  if (value >= 120) return `${(value / 60).toFixed(1)} min`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 1e-3 ? `${(value * 1e3).toFixed(1)} ms` : `${(value * 1e6).toFixed(0)} µs`;
}

const factor = (value) => (value === null || value === undefined ? MISSING : `${value.toFixed(2)}×`);

const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

const when = (started) => started.slice(0, 16).replace("T", " ");

const NAMES = {
  flops: "FLOPs", macs: "MACs", flops_causal: "FLOPs, causal attention", macs_causal: "MACs, causal attention",
  seconds: "time", method_seconds: "time in the method", warm_up: "warm-up rounds", cpu_mhz: "CPU MHz",
};
const words = (name) => NAMES[name] ?? name.replaceAll("_", " ");

// What a cost is of: "forward 1x512" is a forward pass of one row of 512 tokens.
const scopeWords = (scope) => scope.replace(/^token after /, "one token after ").replace(/(\d+)x(\d+)/, "$1 × $2 tokens");

// Parts that are of the cost's own unit; others, such as the number of rounds, say what they count.
const COUNTED_PARTS = new Set(["rounds", "warm_up", "threads", "cores", "cores_of_others", "cpu_mhz", "flops"]);
const part = (name, value, unitOf) => (COUNTED_PARTS.has(name) && unitOf === "s" ? `${words(name)} ${quantity(value)}` : `${words(name)} ${cost(value, unitOf)}`);

// A tick of an axis (200k, 1.6G, 18 ms); the unit stands in the axis label.
function tick(value, unitOf) {
  return unitOf === "s" ? seconds(value) : d3.format(".3~s")(value);
}

// Effects of methods on weights, in words.
const EFFECTS = {
  none: "unchanged",
  removed: "removed",
  zeroed: "zeroed: no gain in time or memory",
  masked: "masked: no gain in time or memory",
  quantized: "stored with fewer bits",
  skipped: "unchanged: computation is skipped",
  unconfirmed: "unconfirmed: the method claims a saving that the counts do not show",
};
const explained = (effect) => effect.split("+").map((kind) => EFFECTS[kind] ?? kind).join(" + ");
