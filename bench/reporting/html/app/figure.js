// Plots. Every family of methods has a colour and a shape, so that plots are readable in greyscale.

// A triangle pointing down. The star is reserved for the dense model.
const symbolDown = {
  draw(context, size) {
    const y = Math.sqrt(size / (Math.sqrt(3) * 3));
    context.moveTo(0, -y * -2);
    context.lineTo(Math.sqrt(3) * y, -y);
    context.lineTo(-Math.sqrt(3) * y, -y);
    context.closePath();
  },
};
const SHAPES = [d3.symbolCircle, d3.symbolSquare, d3.symbolTriangle, d3.symbolDiamond, symbolDown, d3.symbolCross, d3.symbolWye];
const COLOURS = 8;
const THUMBNAIL_POINTS = 300;

// Families in alphabetical order, the dense model first, so that a family looks the same everywhere.
const FAMILIES = [...new Set(INDEX.runs.map((run) => run.family))].sort(
  (a, b) => (b === "dense") - (a === "dense") || a.localeCompare(b),
);
const LOOKS = looks();

// Families that share a setting get different colours and shapes as long as any are left: the
// least used one among the families that can appear in the same plot.
function looks() {
  const meets = d3.rollups(INDEX.runs, (runs) => new Set(runs.map((run) => run.family)), (run) => run.setting);
  const given = new Map([["dense", { colour: "var(--ink)", shape: d3.symbolStar }]]);
  for (const family of FAMILIES.filter((one) => one !== "dense")) {
    const near = meets.filter(([, families]) => families.has(family)).flatMap(([, families]) => [...families]);
    const taken = [...new Set(near)].map((one) => given.get(one)).filter(Boolean);
    const free = (options, key) => d3.least(options, (option) => taken.filter((one) => one[key] === option).length);
    const colours = d3.range(COLOURS).map((place) => `var(--family-${place})`);
    given.set(family, { colour: free(colours, "colour"), shape: free(SHAPES, "shape") });
  }
  return given;
}

const look = (family) => LOOKS.get(family);

function Mark({ family, size = 60 }) {
  const { colour, shape } = look(family);
  const path = d3.symbol(shape, size)();
  return html`<svg class="mark" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">
    <path d=${path} fill=${colour} /></svg>`;
}

// A figure by Observable Plot as wide as its container, redrawn when the width changes.
function Figure({ draw, label, inputs, onPick }) {
  const place = useRef(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watch = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    watch.observe(place.current);
    return () => watch.disconnect();
  }, []);
  useEffect(() => {
    if (!width) return undefined;
    const drawn = draw(width);
    drawn.setAttribute("role", "img");
    drawn.setAttribute("aria-label", label);
    if (onPick) drawn.addEventListener("click", () => drawn.value && onPick(drawn.value));
    place.current.replaceChildren(drawn);
    return () => drawn.remove();
  }, [width, label, ...inputs]);
  return html`<div class="figure" ref=${place}></div>`;
}

// Points of one setting: x is a cost, y a task. Runs that lack one of them are left out, and so are
// times of runs whose weights are only zeroed or masked: these gain no time.
function pointsOf(runs, setting, task, costAt) {
  const quantityOf = setting.costs[costAt];
  const timed = quantityOf && quantityOf.unit === "s";
  return runs
    .filter((run) => run.values[task] && run.costs[costAt] !== null && (run.real || !timed))
    .map((run) => {
      const [value, error] = run.values[task];
      const scale = setting.tasks[task].percent ? 100 : 1;
      const spread = error === null ? 0 : 1.96 * error * scale;
      return { run, x: run.costs[costAt], y: value * scale, low: value * scale - spread, high: value * scale + spread };
    });
}

// The Pareto-optimal points, cheapest first: each is better than all cheaper ones. Runs whose
// weights are only zeroed or masked cannot be on the front, since their costs are not real.
function frontOf(points, higherIsBetter) {
  const sign = higherIsBetter ? 1 : -1;
  const ordered = points
    .filter((point) => point.run.real)
    .sort((a, b) => a.x - b.x || sign * (b.y - a.y));
  const front = [];
  for (const point of ordered) {
    if (!front.length || sign * (point.y - front[front.length - 1].y) > 0) front.push(point);
  }
  return front;
}

function tipOf(point, task, quantityOf) {
  const { run } = point;
  const error = point.high > point.low ? ` ± ${fixed((point.high - point.low) / 2, task.percent ? 1 : 2)}` : "";
  return [
    run.label,
    `${words(task.task)}  ${fixed(point.y, task.percent ? 1 : 2)}${unit(task)}${error}`,
    `${words(quantityOf.quantity)}  ${cost(point.x, quantityOf.unit)}`,
    `weights ${run.effect === "none" ? "unchanged" : run.effect}`,
    `run ${run.id}`,
  ].join("\n");
}

// Score against cost. Filled: the saving is real. Hollow: weights are only zeroed or masked.
function drawPareto(points, front, task, quantityOf, width, { small = false, logarithmic = false } = {}) {
  const dense = points.find((point) => point.run.family === "dense");
  const families = FAMILIES.filter((family) => points.some((point) => point.run.family === family));
  const crowded = points.length > 150;
  const radius = small ? (crowded ? 2 : 3) : crowded || width < 500 ? 3.5 : 5;
  const onFront = new Set(front);
  const strength = (point) => (!crowded || onFront.has(point) || point === dense ? 1 : small ? 0.3 : 0.45);
  const log = small ? spread(points) : logarithmic;
  // A thumbnail of thousands of runs shows every n-th point, and the whole front.
  const step = small ? Math.ceil(points.length / THUMBNAIL_POINTS) : 1;
  const shown = points.filter((point, at) => at % step === 0 || onFront.has(point) || point === dense);
  const dots = {
    x: "x", y: "y", r: radius, symbol: (point) => point.run.family, stroke: (point) => point.run.family,
    strokeWidth: 1.5, opacity: strength, sort: strength,
  };
  return Plot.plot({
    width,
    height: small ? Math.min(320, Math.round(width * 0.55)) : Math.max(300, Math.min(520, Math.round(width * 0.55))),
    marginLeft: small ? 34 : 48,
    marginRight: small ? 12 : 24,
    marginBottom: small ? 26 : 44,
    marginTop: small ? 10 : 28,
    style: { background: "transparent", fontFamily: "inherit", fontSize: small ? "11px" : "12px", overflow: "visible" },
    x: {
      label: small ? null : `${words(quantityOf.quantity)}${quantityOf.unit === "B" ? " in bytes" : ""}, ${scopeWords(quantityOf.scope)}, lower is cheaper →`,
      type: log ? "log" : "linear", nice: !log, inset: 10, line: true,
      tickFormat: (value) => tick(value, quantityOf.unit), ticks: Math.max(2, Math.floor(width / (log ? 200 : 110))),
    },
    y: {
      label: small ? null : `↑ ${scoreName(task)} ${unit(task)}, ${direction(task)}`,
      grid: true, ticks: small ? 3 : 6, nice: true, inset: 6, reverse: false,
    },
    color: { domain: families, range: families.map((family) => look(family).colour) },
    symbol: { domain: families, range: families.map((family) => look(family).shape) },
    marks: [
      dense && Plot.ruleY([dense.y], { stroke: "var(--ink)", strokeOpacity: 0.45, strokeDasharray: "2 4" }),
      Plot.line(front, { x: "x", y: "y", curve: "step-after", stroke: "var(--front)", strokeWidth: small ? 1.5 : 2 }),
      !small && !crowded && Plot.ruleX(points, {
        x: "x", y1: "low", y2: "high", stroke: (point) => point.run.family, strokeOpacity: 0.4, strokeWidth: 1.25,
      }),
      Plot.dot(shown.filter((point) => !point.run.real), { ...dots, fill: "none" }),
      Plot.dot(shown.filter((point) => point.run.real), { ...dots, fill: (point) => point.run.family }),
      dense && !small && Plot.text([dense], {
        y: "y", text: () => "dense", frameAnchor: "left", textAnchor: "start", dx: 4, dy: -7, fill: "var(--quiet)", stroke: "var(--paper)", strokeWidth: 5,
      }),
      !small && Plot.dot(front, {
        x: "x", y: "y", r: radius + 4, stroke: "none", fill: "transparent",
        href: (point) => runAddress(point.run.id), ariaLabel: (point) => `${point.run.label}, on the front`,
      }),
      !small && Plot.tip(points, Plot.pointer({
        x: "x", y: "y", title: (point) => tipOf(point, task, quantityOf), fill: "var(--surface)", stroke: "var(--line)",
        lineHeight: 1.4, textPadding: 10, lineWidth: 34, maxRadius: 30,
      })),
    ].filter(Boolean),
  });
}

// Whether the costs span more than a decade, so that a linear axis would crowd the small ones.
function spread(points) {
  const [least, most] = d3.extent(points, (point) => point.x);
  return least > 0 && most / least > 12;
}
