// Two or more runs of one setting: paired differences with intervals, costs, changed answers.

const MAX_CANDIDATES = 4;
const LISTED = 60;

// Right and wrong answers of a run's task, one bit per question; null where they are not embedded.
function outcomesOf(held, task) {
  const found = held?.outcomes?.[task];
  if (!found) return null;
  const [units, n, packed] = found;
  const bytes = atob(packed);
  return { units, n, right: (at) => (bytes.charCodeAt(at >> 3) >> (7 - (at & 7))) & 1 };
}

// Difference of two accuracies over the same questions. Only questions whose answer changed carry
// information: `gained` became right, `lost` became wrong.
function paired(before, after) {
  if (!before || !after || before.units !== after.units || before.n !== after.n) return null;
  let gained = 0, lost = 0;
  for (let at = 0; at < before.n; at += 1) {
    const then = before.right(at), now = after.right(at);
    if (now > then) gained += 1;
    if (now < then) lost += 1;
  }
  const n = before.n, by = (gained - lost) / n;
  const error = Math.sqrt(Math.max(0, gained + lost - (gained - lost) ** 2 / n)) / n;
  return { by, error, gained, lost, n, p: mcnemar(gained, lost) };
}

// The exact McNemar test: two-sided binomial with probability 1/2, in logarithms since 2^n overflows.
function mcnemar(gained, lost) {
  const n = gained + lost;
  let chosen = -n * Math.LN2, tail = Math.exp(chosen);
  for (let k = 1; k <= Math.min(gained, lost); k += 1) {
    chosen += Math.log((n - k + 1) / k);
    tail += Math.exp(chosen);
  }
  return Math.min(1, 2 * tail);
}

// Holm's step-down correction over all tests of the page.
function holm(tests) {
  let highest = 0;
  [...tests].sort((a, b) => a.p - b.p).forEach((test, rank) => {
    highest = Math.max(highest, Math.min(1, (tests.length - rank) * test.p));
    test.holm = highest;
  });
}

// One row per headline task: scores, and for each candidate the difference as far as it is paired.
function contrasts(setting, baseline, candidates) {
  const tests = [];
  const rows = setting.tasks.map((task, at) => ({
    task, at,
    before: baseline.run.values[at],
    cells: candidates.map((candidate) => {
      const now = candidate.run.values[at], then = baseline.run.values[at];
      if (!now || !then) return null;
      const same = sameIdentity(baseline.record, candidate.record, task);
      const pair = same ? paired(outcomesOf(baseline.held, task.task), outcomesOf(candidate.held, task.task)) : null;
      if (pair) tests.push(pair);
      return { candidate, task, now, by: same ? now[0] - then[0] : null, pair };
    }),
  }));
  // The tasks of an average have different questions, so that their errors add up as variances.
  const average = rows.find((row) => row.task.task === "average");
  average?.cells.forEach((cell, place) => {
    const parts = rows.filter((row) => row !== average && row.task.percent).map((row) => row.cells[place]?.pair);
    const mean = parts.length && parts.every(Boolean) ? d3.mean(parts, (part) => part.by) : null;
    // Only if it is the mean of exactly these tasks.
    if (cell && cell.by !== null && mean !== null && Math.abs(mean - cell.by) < 1e-6) {
      cell.pair = { by: cell.by, error: Math.sqrt(d3.sum(parts, (part) => part.error ** 2)) / parts.length };
    }
  });
  holm(tests);
  return rows;
}

function sameIdentity(one, other, task) {
  const of = (record) => record.metrics.find((metric) => metric.headline && metric.task === task.task)?.identity;
  return of(one) !== undefined && of(one) === of(other);
}

function Compare({ route }) {
  const asked = (route.query.get("runs") ?? "").split(",").map((id) => RUNS.get(id)).filter(Boolean);
  const index = asked.length ? asked[0].setting : Number(route.query.get("setting") ?? busiest());
  const setting = INDEX.settings[index];
  const group = INDEX.runs.filter((run) => run.setting === index);
  const [baseline, ...picked] = asked.length ? asked : proposed(group);
  const candidates = picked.filter((run) => run.setting === index).slice(0, MAX_CANDIDATES);
  const ids = [baseline, ...candidates].filter(Boolean).map((run) => run.id);
  const loaded = useLater(() => Promise.all(ids.map(async (id) => {
    const run = RUNS.get(id);
    const [record, held] = await Promise.all([detailsOf(run), heldOf(run)]);
    return { run, record, held };
  })), [ids.join()]);
  const choose = (runs) => adjust(route, { setting: "", runs: runs.map((run) => run.id).join(",") });
  const flip = (run) => choose([baseline, ...(candidates.includes(run) ? candidates.filter((one) => one !== run) : [...candidates, run].slice(-MAX_CANDIDATES))]);
  if (!setting || !baseline) {
    return html`<main id="main" tabindex="-1"><h1>Compare</h1><p class="lead">There are no runs to compare.</p></main>`;
  }
  const byScore = [...group].sort(better(setting.tasks[0]));
  return html`<main id="main" tabindex="-1" class="wide">
    <h1>Compare</h1>
    <div class="filters">
      <${Choice} label="Model and benchmark" value=${String(index)} onChange=${(value) => adjust(route, { runs: "", setting: value })}
        options=${INDEX.settings.map((one, at) => [String(at), one.name])} />
      <${Choice} label="Baseline" value=${baseline.id} onChange=${(value) => choose([RUNS.get(value), ...candidates.filter((run) => run.id !== value)])}
        options=${byScore.slice(0, LISTED).map((run) => [run.id, `${run.label}, ${run.id.slice(0, 8)}`])} />
    </div>
    <ul class="legend" aria-label="Runs compared with the baseline">${byScore.filter((run) => run !== baseline).slice(0, LISTED).map((run) => html`
      <li><button aria-pressed=${candidates.includes(run)} onClick=${() => flip(run)}><${Mark} family=${run.family} /> ${run.label}</button></li>`)}</ul>
    ${!candidates.length && html`<p class="empty">Choose up to ${MAX_CANDIDATES} runs above.</p>`}
    ${candidates.length > 0 && (loaded === undefined || loaded.length !== ids.length ? html`<p class="quiet">Loading…</p>` : html`<${Compared} setting=${setting} runs=${loaded} />`)}
  </main>`;
}

function Compared({ setting, runs: [baseline, ...candidates] }) {
  const rows = useMemo(() => contrasts(setting, baseline, candidates), [baseline, ...candidates]);
  const drawn = rows.flatMap((row) => row.cells.filter((cell) => cell?.pair && row.task.percent));
  return html`
    ${drawn.length > 0 && html`<${Figure} label="Differences to ${baseline.run.label} with 95 % intervals; the numbers are in the table below"
      draw=${(width) => drawDifferences(drawn, width)} inputs=${[drawn]} />
    <p class="quiet note">Points are differences to <b>${baseline.run.label}</b> in percentage points; further right is better. Bars are 95 % intervals over the same questions.</p>`}
    <${Plain} caption="Differences to ${baseline.run.label}" rows=${rows.map((row) => ({ ...row, emphasis: row.task.task === "average" }))} columns=${[
      { title: "Task", cell: ({ task }) => html`${words(task.task)} <span class="quiet">${task.metric === "mean" ? "" : task.metric}${task.percent ? " %" : ""}${task.higher_is_better ? "" : ", lower is better"}</span>` },
      { title: baseline.run.label, number: true, cell: ({ before, task }) => html`<${Scored} pair=${before} task=${task} />` },
      ...candidates.map((candidate, at) => ({
        title: candidate.run.label, number: true, cell: ({ cells, task }) => html`<${Difference} cell=${cells[at]} task=${task} />`,
      })),
    ]} />
    <p class="quiet note">Below each score are the difference, its 95 % interval, and the numbers of questions won and lost. A difference is <b>bold</b> if the exact McNemar test, with Holm correction over this table, gives a p-value below 0.05.${" "}
      Differences without an interval are not paired here; <code>bench compare</code> gives intervals for every metric.</p>
    <h2>Costs</h2>
    <${Plain} caption="Costs side by side" rows=${setting.costs.map((one, at) => ({ ...one, at }))} columns=${[
      { title: "Cost", cell: ({ quantity: name, scope }) => html`${words(name)} <span class="quiet">${scope === "model" ? "" : scopeWords(scope)}</span>` },
      { title: baseline.run.label, number: true, cell: ({ at, unit: unitOf }) => cost(baseline.run.costs[at], unitOf) },
      ...candidates.map(({ run }) => ({
        title: run.label, number: true,
        cell: ({ at, unit: unitOf }) => html`<span class="beside">${cost(run.costs[at], unitOf)}<small>${factor(ratioTo(run, baseline.run, at))}</small></span>`,
      })),
    ]} />
    ${candidates.map((candidate) => html`<${Flips} key=${candidate.run.id} baseline=${baseline} candidate=${candidate} />`)}`;
}

function Difference({ cell, task }) {
  if (!cell) return MISSING;
  const { now, by, pair } = cell;
  const scale = task.percent ? 100 : 1, digits = task.percent ? 1 : 2;
  const sign = (value) => `${value > 0 ? "+" : ""}${fixed(value * scale, digits)}`;
  const sure = pair?.holm !== undefined && pair.holm < 0.05;
  const kind = by === null || by === 0 ? "" : (by > 0) === task.higher_is_better ? "better" : "worse";
  return html`<span class="beside">${score(now[0], task)}<small>${by === null ? "not comparable" : html`
    <span class="${kind} ${sure ? "outside" : ""}" title=${pair?.p === undefined ? "" : `p ${pair.p.toPrecision(2)}, corrected ${pair.holm.toPrecision(2)}`}>${sign(by)}</span>${
    pair ? ` [${sign(by - 1.96 * pair.error)}, ${sign(by + 1.96 * pair.error)}]` : ""}${
    pair?.gained === undefined ? "" : ` +${pair.gained} −${pair.lost}`}`}</small></span>`;
}

// A time of a run whose weights are only zeroed or masked is no gain, so it has no ratio.
function ratioTo(run, baseline, at) {
  const timed = run.where.costs[at].unit === "s";
  const now = run.costs[at], before = baseline.costs[at];
  return now === null || !before || (timed && !run.real) ? null : now / before;
}

function Flips({ baseline, candidate }) {
  const [limit, setLimit] = useState(4);
  const samples = useLater(() => Promise.all([samplesOf(candidate.run), samplesOf(baseline.run)]), [candidate.run.id, baseline.run.id]);
  if (!samples || !samples[0] || !samples[1]) return null;
  const before = new Map(samples[1].samples.map((sample) => [keyOf(sample), rightness(sample, baseline.record.metrics)]));
  const changed = samples[0].samples
    .map((sample) => ({ sample, now: rightness(sample, candidate.record.metrics), before: before.get(keyOf(sample)) ?? null }))
    .filter(({ now, before: then }) => now !== null && then !== null && now !== then);
  if (!changed.length) return null;
  return html`<h2>Changed answers of ${candidate.run.label}</h2>
    <p class="quiet">${count(changed.length, "change")} among the ${samples[0].samples.length} questions of this run that this file contains.</p>
    <ol class="samples">${changed.slice(0, limit).map((row) => html`<${Sample} key=${keyOf(row.sample)} against=${baseline.run.label} ...${row} />`)}</ol>
    ${changed.length > limit && html`<p><button class="plain-button" onClick=${() => setLimit(limit + 10)}>Show more, ${changed.length - limit} left</button></p>`}`;
}

// Differences per task as points with intervals, one colour and shape per family.
function drawDifferences(cells, width) {
  const points = cells.map(({ candidate, task, by, pair }) => {
    const sign = task.higher_is_better ? 100 : -100;
    const spread = 196 * pair.error;
    return { task: words(task.task), family: candidate.run.family, label: candidate.run.label, run: candidate.run.id, x: by * sign, low: by * sign - spread, high: by * sign + spread };
  });
  const tasks = [...new Set(points.map((point) => point.task))];
  const runs = [...new Set(points.map((point) => point.run))];
  const families = [...new Set(points.map((point) => point.family))];
  // Runs of a task stand below one another, in the space of its row.
  const dy = (run) => (runs.indexOf(run) - (runs.length - 1) / 2) * 11;
  const common = (run) => ({ y: "task", dy: dy(run), stroke: (point) => point.family });
  return Plot.plot({
    width, height: 56 + tasks.length * (18 + 11 * runs.length), marginLeft: width < 500 ? 90 : 130, marginRight: 24, marginBottom: 40,
    style: { background: "transparent", fontFamily: "inherit", fontSize: "12px", overflow: "visible" },
    x: { label: "difference in percentage points, better →", grid: true, nice: true, ticks: Math.max(3, Math.floor(width / 120)) },
    y: { label: null, domain: tasks, tickSize: 0 },
    color: { domain: families, range: families.map((family) => look(family).colour) },
    symbol: { domain: families, range: families.map((family) => look(family).shape) },
    marks: [
      Plot.ruleX([0], { stroke: "var(--ink)", strokeOpacity: 0.5 }),
      ...runs.flatMap((run) => {
        const own = points.filter((point) => point.run === run);
        return [
          Plot.ruleY(own, { ...common(run), x1: "low", x2: "high", strokeWidth: 1.5, strokeOpacity: 0.6 }),
          Plot.dot(own, { ...common(run), x: "x", r: 4, symbol: (point) => point.family, fill: (point) => point.family }),
        ];
      }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "task", title: (point) => `${point.label}\n${point.task} ${fixed(point.x, 1)} [${fixed(point.low, 1)}, ${fixed(point.high, 1)}]`, fill: "var(--surface)", stroke: "var(--line)" })),
    ],
  });
}

// The setting with the most runs, and what to compare first: the best of each family with dense.
function busiest() {
  const sizes = d3.rollup(INDEX.runs, (runs) => runs.length, (run) => run.setting);
  return d3.greatest([...sizes], ([, size]) => size)?.[0] ?? 0;
}

function better(task) {
  const sign = task?.higher_is_better === false ? -1 : 1;
  return (a, b) => (b.score === null ? -1 : a.score === null ? 1 : sign * (b.score - a.score));
}

function proposed(group) {
  const dense = group.find((run) => run.family === "dense") ?? group[0];
  if (!dense) return [];
  const best = d3.rollups(group.filter((run) => run !== dense), (runs) => [...runs].sort(better(dense.where.tasks[0]))[0], (run) => run.family);
  return [dense, ...best.slice(0, 3).map(([, run]) => run)];
}
