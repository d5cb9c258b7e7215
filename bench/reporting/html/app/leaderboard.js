// All runs, sorted and filtered; the URL holds the choices, so that a view can be shared.

const WEIGHED = [
  ["flops", "FLOPs", "FLOPs of one forward pass or prefill, relative to the dense run"],
  ["seconds", "Time", "measured time relative to the dense run; empty if weights are only zeroed or masked"],
  ["bytes", "Bytes", "memory of the weights, relative to the dense run"],
];

function shareColumns(runs) {
  const places = new Map();
  const place = (setting, name) => {
    const key = `${setting.name} ${name}`;
    if (!places.has(key)) places.set(key, setting.costs.findIndex((one) => one.quantity === name));
    return places.get(key);
  };
  const share = (run, name) => {
    const at = place(run.where, name);
    return at < 0 ? null : shareOf(run, at);
  };
  return WEIGHED.filter(([name]) => runs.some((run) => place(run.where, name) >= 0)).map(([name, title, hint]) => ({
    key: name, title, hint, number: true, first: "up",
    value: (run) => share(run, name),
    cell: (run) => factor(share(run, name)),
  }));
}

function taskColumns(setting) {
  return setting.tasks.slice(1).map((task, at) => ({
    key: `task:${task.task}`,
    title: `${words(task.task)}`,
    hint: `${task.metric}${task.percent ? " in %" : ""}`,
    number: true,
    first: task.higher_is_better ? "down" : "up",
    value: (run) => (run.values[at + 1] ? run.values[at + 1][0] : null),
    cell: (run) => html`<${Scored} pair=${run.values[at + 1]} answered=${run.answered[at + 1]} task=${task} />`,
  }));
}

function Scored({ pair, answered, task }) {
  const note = answered && html`<span class="quiet">${answered}</span>`;
  if (!pair) return html`${MISSING}${note}`;
  const scale = task.percent ? 100 : 1;
  return html`${score(pair[0], task)}${pair[1] !== null && html`<span class="error"> ±${(pair[1] * scale).toFixed(task.percent ? 1 : 2)}</span>`}${note}`;
}

// A cost of choice: its value, and how it compares with the dense run's.
function costColumn(name) {
  const at = (run) => run.where.costs.findIndex((one) => nameOf(one) === name);
  const value = (run) => run.costs[at(run)] ?? null;
  return {
    key: "cost", title: words(name.split("|")[0]), hint: `${costWords(name)}; below it, relative to the dense run`, number: true, first: "up",
    value,
    cell: (run) => html`<span class="beside">${cost(value(run), run.where.costs[at(run)]?.unit)}<small>${value(run) === null ? "" : factor(shareOf(run, at(run)))}</small></span>`,
  };
}

const costWords = (name) => {
  const [quantityOf, scope] = name.split("|");
  return scope === "model" ? words(quantityOf) : `${words(quantityOf)}, ${scopeWords(scope)}`;
};

const nameOf = (one) => `${one.quantity}|${one.scope}`;

// Every cost that any of the settings has, the commonest first.
function costNames(settings) {
  const names = d3.rollups(settings.flatMap((setting) => setting.costs), (all) => all.length, nameOf);
  return names.sort((a, b) => b[1] - a[1]).map(([name]) => name);
}

const METHOD = {
  key: "method", title: "Method", hint: "methods with their ratios", first: "up",
  value: (run) => run.label,
  cell: (run) => html`<${RunLink} run=${run} />`,
};
const WHERE = {
  key: "setting", title: "Model and benchmark", first: "up",
  value: (run) => run.where.name, cell: (run) => run.where.name,
};
const SCORE = {
  key: "score", title: "Score", hint: "average of the headline metrics, or the only one", number: true, first: "down",
  value: (run) => run.score,
  cell: (run) => html`<${Scored} pair=${run.values[0]} answered=${run.answered[0]} task=${run.where.tasks[0]} />`,
};
// Bars share one scale, which also holds what scores above the dense model.
const MOST_KEPT = Math.max(1, d3.max(INDEX.runs, (run) => run.retention) ?? 1);
const RETENTION = {
  key: "retention", title: "Kept", hint: "score, relative to the dense run", number: true, first: "down",
  value: (run) => run.retention,
  cell: (run) => run.retention === null ? MISSING : html`<span class="retention"><span class="bar" aria-hidden="true"><i style=${{ width: `${Math.max(0, run.retention / MOST_KEPT) * 100}%` }}></i></span><span class="share">${fixed(run.retention * 100, 1)} %</span></span>`,
};
const SAVED = {
  key: "effect", title: "Weights", hint: "effect on weights or computation", first: "up",
  value: (run) => run.effect, cell: (run) => html`<${Effect} effect=${run.effect} />`,
};
const STARTED = {
  key: "started", title: "Started", hint: "UTC", number: true, first: "down",
  value: (run) => run.started, cell: (run) => html`<time class="quiet">${when(run.started)}</time>`,
};

function Leaderboard({ route }) {
  const query = Object.fromEntries(route.query);
  const setting = query.setting !== undefined && INDEX.settings[query.setting];
  const hasTasks = setting && setting.tasks.length > 1;
  const sort = query.sort ?? (setting ? (setting.tasks[0]?.higher_is_better === false ? "score" : "-score") : "-retention");
  const rows = useMemo(() => filtered(query), [route]);
  const columns = useMemo(() => [
    METHOD, ...(setting ? [] : [WHERE]),
    SCORE, RETENTION, ...(query.cost ? [costColumn(query.cost)] : []), ...shareColumns(INDEX.runs), SAVED,
    ...(hasTasks && query.tasks ? taskColumns(setting) : []), STARTED,
  ], [query.setting, query.tasks, query.cost]);
  const change = (changes) => adjust(route, { page: "", ...changes });
  return html`<main id="main" tabindex="-1" class="wide">
    <h1>Leaderboard</h1>
    <form class="filters" role="search" onSubmit=${(event) => event.preventDefault()}>
      <label class="choice grow"><span>Search</span><input type="search" id="search" placeholder="method, model, sweep or run id" value=${query.q ?? ""}
        onInput=${(event) => change({ q: event.target.value })} /></label>
      <${Choice} label="Model and benchmark" value=${query.setting ?? ""} onChange=${(value) => change({ setting: value, sort: "", tasks: "" })}
        options=${[["", "all"], ...INDEX.settings.map((one, at) => [String(at), one.name])]} />
      <${Choice} label="Method" value=${query.family ?? ""} onChange=${(value) => change({ family: value })}
        options=${[["", "all"], ...FAMILIES.map((family) => [family, family])]} />
      <${Choice} label="Weights" value=${query.effect ?? ""} onChange=${(value) => change({ effect: value })}
        options=${[["", "all"], ...[...new Set(INDEX.runs.map((run) => run.effect))].sort().map((kind) => [kind, kind === "none" ? "unchanged" : kind])]} />
      <${Choice} label="Cost column" value=${query.cost ?? ""} onChange=${(value) => change({ cost: value })}
        options=${[["", "none"], ...costNames(setting ? [setting] : INDEX.settings).map((name) => [name, costWords(name)])]} />
    </form>
    <p class="counted"><span role="status">${count(rows.length, "run")}${rows.length < INDEX.runs.length ? ` of ${INDEX.runs.length.toLocaleString("en")}` : ""}</span>
      ${hasTasks && html`<label class="tick"><input type="checkbox" checked=${!!query.tasks} onChange=${(event) => adjust(route, { tasks: event.target.checked ? "1" : "" })} /> every task</label>`}
      ${setting && html`<a href=${address("pareto", { setting: query.setting })}>Pareto plot</a> <a href=${address("compare", { setting: query.setting })}>Compare</a>`}
      ${Object.keys(query).some((key) => query[key] && key !== "sort") && html`<a href="#/leaderboard">Clear filters</a>`}</p>
    <${Grid} rows=${rows} columns=${columns} sort=${sort} page=${Number(query.page ?? 0)} caption="Runs"
      onSort=${(value) => change({ sort: value })} onPage=${(value) => adjust(route, { page: value || "" })} />
  </main>`;
}

function filtered({ q = "", setting, family, effect }) {
  const parts = q.toLowerCase().split(/\s+/).filter(Boolean);
  return INDEX.runs.filter((run) => {
    if (setting && run.setting !== Number(setting)) return false;
    if (family && run.family !== family) return false;
    if (effect && run.effect !== effect) return false;
    const text = `${run.label} ${run.where.name} ${run.sweep ?? ""} ${run.id}`.toLowerCase();
    return parts.every((part) => text.includes(part));
  });
}
