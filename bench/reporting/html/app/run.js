// Page of one run: command, scores, costs, methods, samples and config.

function RunPage({ id }) {
  const run = RUNS.get(id);
  const record = useLater(() => (run ? detailsOf(run) : Promise.resolve(null)), [id]);
  const denseRun = run && run.dense !== run.id ? RUNS.get(run.dense) : null;
  const dense = useLater(() => (denseRun ? detailsOf(denseRun) : Promise.resolve(null)), [id]);
  if (!run) {
    return html`<main id="main" tabindex="-1"><h1>No such run</h1><p class="lead">This report does not contain the run <code>${id}</code>. <a href="#/leaderboard">All runs</a></p></main>`;
  }
  const task = run.where.tasks[0];
  const search = INDEX.searches.find((one) => one.sweeps.includes(run.sweep));
  return html`<main id="main" tabindex="-1">
    <p class="crumbs"><a href=${address("leaderboard", { setting: run.setting })}>${run.where.name}</a></p>
    <h1><${Mark} family=${run.family} size=${60} /> ${run.label}</h1>
    <p class="quiet">run <code>${run.id}</code>, ${denseRun && html`<a href=${address("compare", { runs: `${run.dense},${run.id}` })}>compared with dense</a>, `}started ${when(run.started)} UTC${run.sweep && html`, sweep <a href=${address("leaderboard", { q: run.sweep })}>${run.sweep}</a>`}${search && html`, search <a href=${searchAddress(search)}>${search.name}</a>`}</p>
    <dl class="figures">
      ${task && run.values[0] && html`<div><dt>${words(task.task)}</dt><dd><${Scored} pair=${run.values[0]} answered=${run.answered[0]} task=${task} /> ${unit(task)}</dd></div>`}
      ${run.retention !== null && denseRun && html`<div><dt>kept of dense</dt><dd>${fixed(run.retention * 100, 1)} %</dd></div>`}
      ${denseRun && shareColumns([run]).filter((column) => column.value(run) !== null).map((column) => html`<div><dt>${column.title} of dense</dt><dd>${column.cell(run)}</dd></div>`)}
      <div><dt>weights</dt><dd class="words">${explained(run.effect)}</dd></div>
    </dl>
    ${record && dense !== undefined ? html`<${Record} run=${run} record=${record} dense=${dense} />` : html`<p class="quiet">Loading…</p>`}
  </main>`;
}

function Record({ run, record, dense }) {
  return html`
    <${Command} text=${record.command} />
    <h2>Scores</h2>
    <${Metrics} record=${record} dense=${dense} />
    <h2>Costs</h2>
    <${Costs} record=${record} dense=${dense} run=${run} />
    ${record.methods.map((method) => html`<${Method} method=${method} />`)}
    <h2>Samples</h2>
    <${Samples} key=${run.id} run=${run} record=${record} />
    <h2>Config and environment</h2>
    <details><summary>Config</summary><pre class="yaml">${yaml(record.config)}</pre></details>
    <details><summary>Environment</summary><pre class="yaml">${yaml(record.environment)}</pre></details>
    <details><summary>Model and provenance</summary><pre class="yaml">${yaml({ model: record.model, provenance: record.provenance })}</pre></details>`;
}

function Command({ text }) {
  const [label, setLabel] = useState("Copy");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setLabel("Copied");
    } catch {
      setLabel("Select and copy"); // browsers may deny clipboard access to a page opened from a file
    }
  };
  return html`<div class="command"><pre tabindex="0" aria-label="The command that repeats this run"><code>${text}</code></pre><button onClick=${copy}>${label}</button></div>`;
}

// What two metrics must share to be subtracted; Python states it, see `run_details`.
const identity = (metric) => `${metric.task} ${metric.identity}`;

function Metrics({ record, dense }) {
  const before = new Map((dense?.metrics ?? []).map((metric) => [identity(metric), metric]));
  const heads = record.metrics.filter((metric) => metric.headline);
  const others = record.metrics.filter((metric) => !metric.headline);
  const change = (metric) => {
    const then = before.get(identity(metric));
    if (!then || then.value === null || metric.value === null) return MISSING;
    const by = (metric.value - then.value) * (metric.percent ? 100 : 1);
    const better = by * (metric.higher_is_better ? 1 : -1);
    return html`<span class=${better > 0 ? "better" : better < 0 ? "worse" : ""}>${by > 0 ? "+" : ""}${fixed(by, metric.percent ? 1 : 2)}</span>`;
  };
  const columns = [
    { title: "Task", cell: (metric) => html`${words(metric.task)} <span class="quiet">${metric.metric === "mean" ? "" : metric.metric}${metric.percent ? " %" : ""}</span>` },
    { title: "Value", number: true, cell: (metric) => html`<${Scored} pair=${metric.value === null ? null : [metric.value, metric.stderr]} task=${metric} />` },
    ...(dense ? [
      { title: "Dense", number: true, cell: (metric) => score(before.get(identity(metric))?.value, metric) },
      { title: "Change", number: true, cell: change }] : []),
    { title: "n", number: true, hint: "number of samples, or of tasks for an average; rows without an answer are missing", cell: (metric) => html`${metric.n.toLocaleString("en")}${metric.missing ? html` <span class="quiet">${metric.missing.toLocaleString("en")} ${metric.task === "average" ? "rows " : ""}missing</span>` : ""}` },
    { title: "Setting", hint: "numbers with different settings are never subtracted", cell: (metric) => html`<span class="quiet identity">${metric.shots}-shot, ${metric.split}${
      metric.filter === "none" ? "" : `, filter ${metric.filter}`}${metric.task_version ? `, version ${metric.task_version}` : ""}</span>` },
  ];
  const rows = heads.map((metric) => ({ ...metric, emphasis: metric.task === "average" }))
    .sort((a, b) => b.emphasis - a.emphasis);
  return html`<${Plain} caption="Headline scores" columns=${columns} rows=${rows} />
    ${(record.missing ?? []).filter((gap) => heads.some((metric) => metric.task === gap.scope)).map((gap) => html`
      <p class="quiet">no ${words(gap.quantity)} for ${words(gap.scope)}: ${gap.reason}</p>`)}
    ${others.length > 0 && html`<details><summary>${count(others.length, "other metric")}</summary><${Plain} caption="Other metrics" columns=${columns} rows=${others} /></details>`}`;
}

function Costs({ record, dense, run }) {
  // Counted costs are compared with counted ones and analytic with analytic: the two may differ.
  const key = (one) => `${one.scope} ${one.quantity} ${one.how}`;
  const before = new Map((dense?.costs ?? []).map((one) => [key(one), one]));
  const phases = record.costs.filter((one) => one.scope.startsWith("phase "));
  const rows = record.costs.filter((one) => !one.scope.startsWith("phase "));
  const share = (one) => {
    const then = before.get(key(one));
    if (!then || !then.value) return MISSING;
    return one.unit === "s" && !run.real ? html`<span class="quiet">no gain: ${run.effect}</span>` : factor(one.value / then.value);
  };
  const parts = (one) => Object.entries(one.parts).filter(([, value]) => value).map(([name, value]) => part(name, value, one.unit)).join(", ");
  return html`<${Plain} caption="Costs" rows=${rows} columns=${[
      { title: "Quantity", cell: (one) => html`${words(one.quantity)} <span class="quiet">${one.scope === "model" ? "" : scopeWords(one.scope)}</span>` },
      { title: "Value", number: true, cell: (one) => cost(one.value, one.unit) },
      ...(dense ? [{ title: "of dense", number: true, cell: share }] : []),
      { title: "How", cell: (one) => one.how },
      { title: "Parts", cell: (one) => html`<span class="parts quiet">${parts(one)}</span>` },
    ]} />
    ${phases.length > 0 && html`<details><summary>Wall time by phase: ${seconds(d3.sum(phases, (one) => one.value))}</summary><${Phases} phases=${phases} /></details>`}`;
}

function Phases({ phases }) {
  const longest = d3.max(phases, (one) => one.value);
  return html`<ul class="phases">${phases.map((one) => html`<li><span>${one.scope.replace("phase ", "")}</span>
    <span class="bar" aria-hidden="true"><i style=${{ width: `${(one.value / longest) * 100}%` }}></i></span><span class="number">${seconds(one.value)}</span></li>`)}</ul>`;
}

function Method({ method }) {
  const { history, ...details } = method.report;
  const report = method.layers.length > 0 ? { ...details, layers: method.layers } : details;
  return html`<h2>${method.name}</h2>
    <p>Weights ${explained(method.effect)}. Applied in ${seconds(method.seconds)}.</p>
    ${method.check?.refutation && html`<p><b>Unconfirmed:</b> it ${method.check.refutation}.</p>`}
    <dl class="knobs">${Object.entries(method.config).map(([key, value]) => html`<div><dt>${key}</dt><dd>${plain(value)}</dd></div>`)}</dl>
    ${Array.isArray(history) && history.length > 1 && html`<${History} lines=${history.filter((line) => typeof line === "object")} />`}
    ${Object.keys(report).length > 0 && html`<details><summary>Method report</summary><pre class="yaml">${yaml(report)}</pre></details>`}`;
}

// Training history of a method, one small plot per quantity.
function History({ lines }) {
  const names = Object.keys(lines[0]).filter((name) => name !== "epoch" && typeof lines[0][name] === "number");
  return html`<div class="curves">${names.map((name) => html`<figure><figcaption>${words(name)}</figcaption>
    <${Figure} label="${words(name)} by epoch" inputs=${[lines]} draw=${(width) => Plot.plot({
      width, height: 130, marginLeft: 44, marginBottom: 24, marginTop: 8, marginRight: 8,
      style: { background: "transparent", fontFamily: "inherit", fontSize: "11px" },
      x: { label: null, ticks: 4 }, y: { label: null, ticks: 3, grid: true, tickFormat: (value) => (Math.abs(value) >= 1000 ? d3.format("~s")(value) : String(Number(value.toPrecision(6)))) },
      marks: [Plot.line(lines, { x: "epoch", y: name, stroke: "var(--accent)", strokeWidth: 1.75 }),
        Plot.tip(lines, Plot.pointerX({ x: "epoch", y: name, fill: "var(--surface)", stroke: "var(--line)" }))],
    })} /></figure>`)}</div>`;
}

// A value on one line: 0.4, [1, 2], epochs: 30, batch: 64
function plain(value) {
  if (typeof value !== "object" || value === null) return String(value);
  if (Array.isArray(value)) return `[${value.map(plain).join(", ")}]`;
  return Object.entries(value).map(([key, item]) => `${key}: ${plain(item)}`).join(", ");
}

// Data as YAML for reading: nested by two spaces, lists of scalars on one line.
function yaml(value, indent = "") {
  if (Array.isArray(value)) {
    const flat = value.every((item) => typeof item !== "object" || item === null);
    if (flat) return `[${value.map(plain).join(", ")}]`;
    return value.map((item) => {
      const inner = yaml(item, `${indent}  `);
      return `\n${indent}- ${inner.trimStart()}`;
    }).join("");
  }
  if (typeof value !== "object" || value === null) return plain(value);
  const entries = Object.entries(value);
  if (!entries.length) return "{}";
  const text = entries.map(([key, item]) => {
    const nested = typeof item === "object" && item !== null && yaml(item, `${indent}  `);
    return `${indent}${key}:${nested ? (nested.startsWith("\n") || nested.startsWith("[") || nested === "{}" ? (nested.startsWith("\n") ? nested : ` ${nested}`) : `\n${nested}`) : ` ${plain(item)}`}`;
  }).join("\n");
  return text;
}
