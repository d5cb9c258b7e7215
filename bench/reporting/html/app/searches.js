// Searches: the best value after each trial, the front of the trials, and what is on it.

function Searches({ route }) {
  const at = Math.max(0, INDEX.searches.findIndex((one) => one.name === route.name));
  const named = INDEX.searches[at];
  const search = useLater(() => (named ? unpack(`search-${at}`) : Promise.resolve(null)), [at]);
  if (!named) {
    return html`<main id="main" tabindex="-1"><h1>Searches</h1><p class="lead">There are no trials of a search yet.${" "}
      Run one with <code>bench run sweep=camera_p_pareto</code>, then write the report again.</p></main>`;
  }
  return html`<main id="main" tabindex="-1">
    <h1>Searches</h1>
    <nav class="tabs" aria-label="Searches">${INDEX.searches.map((one) => html`<a href=${searchAddress(one)}
      aria-current=${one === named ? "page" : undefined}>${one.name}</a>`)}</nav>
    ${search ? html`<${Search} key=${at} search=${search} />` : html`<p class="quiet">Loading…</p>`}
  </main>`;
}

function Search({ search }) {
  const { trials } = search;
  const complete = trials.filter((trial) => trial.state === "complete");
  const objectives = search.objectives.map((one, place) => ({ ...one, place, ...meaning(one.name, complete) }));
  const states = [["pruned", "stopped early"], ["fail", "failed"], ["running", "interrupted"]]
    .map(([state, text]) => [trials.filter((trial) => trial.state === state).length, text])
    .filter(([number]) => number).map(([number, text]) => `, ${number} ${text}`);
  const front = best(complete.filter((trial) => trial.front), objectives[0]);
  return html`
    <p class="lead">${count(trials.length, "trial")}, ${complete.length} complete${states.join("")}; objectives:${" "}
      ${objectives.map((one) => `${one.maximize ? "maximize" : "minimize"} ${words(one.name)}`).join(", ")}.</p>
    ${complete.length === 0 && html`<p class="empty">No trial is complete yet.</p>`}
    ${complete.length > 0 && html`
      <h2>Best value against trial</h2>
      <div class="curves">${objectives.map((one) => html`<figure><figcaption>${words(one.name)}, ${one.maximize ? "higher" : "lower"} is better</figcaption>
        <${Figure} label="Best ${words(one.name)} after each of ${trials.length} trials; the trials on the front are in the table below"
          draw=${(width) => drawProgress(one, complete, width)} inputs=${[search, one.name]} /></figure>`)}</div>
      ${objectives.length > 1 && html`
        <h2>Front</h2>
        <${Figure} label="${words(objectives[0].name)} against ${words(objectives[1].name)} of ${complete.length} trials; those on the front are in the table below"
          draw=${(width) => drawTrials(objectives, complete, front, width)} inputs=${[search]} />
        <p class="quiet note">Filled marks are trials on the front: no other trial is as good in every objective and better in one.${
          objectives.length > 2 ? ` The front is that of all ${objectives.length} objectives; only the first two are drawn.` : ""}</p>`}
      <h2>${objectives.length > 1 ? "On the front" : "Best trial"}</h2>
      <${Plain} caption="Trials on the front, best ${words(objectives[0].name)} first" rows=${front} columns=${trialColumns(objectives, front)} />`}`;
}

// What an objective is: a task whose score may be a share, or a cost with a unit. The run of a trial
// tells; where no run is in this report, the number is shown as it is.
function meaning(name, trials) {
  const run = trials.map((trial) => RUNS.get(trial.run)).find(Boolean);
  const task = run && (run.where.tasks.find((one) => one.task === name) ?? (name === "average" ? run.where.tasks[0] : null));
  if (task) return { scale: task.percent ? 100 : 1, unit: unit(task), show: (value) => fixed(value, task.percent ? 1 : 2) };
  const quantityOf = run?.where.costs.find((one) => one.quantity === name);
  const unitOf = quantityOf ? quantityOf.unit : "1";
  return { scale: 1, unit: "", show: (value) => cost(value, unitOf), ticks: (value) => tick(value, unitOf) };
}

const titleOf = (objective) => `${words(objective.name)} ${objective.unit}`.trim();

const valueOf = (trial, objective) => trial.values[objective.place] * objective.scale;

const best = (trials, objective) => d3.sort(trials, (trial) => (objective.maximize ? -1 : 1) * valueOf(trial, objective));

function trialColumns(objectives, trials) {
  const keys = [...new Set(trials.flatMap((trial) => Object.keys(trial.params)))];
  return [
    { title: "Trial", cell: (trial) => trial.number },
    ...objectives.map((one) => ({ title: titleOf(one), number: true, cell: (trial) => one.show(valueOf(trial, one)) })),
    ...keys.map((key) => ({ title: key.replace(/^method\./, ""), number: true, cell: (trial) => plain(parameter(trial.params[key])) })),
    { title: "Run", cell: (trial) => (RUNS.has(trial.run) ? html`<${RunLink} run=${RUNS.get(trial.run)} />` : html`<code>${trial.run ?? MISSING}</code>`) },
  ];
}

// Sampled numbers have sixteen digits, of which a reader needs four.
const parameter = (value) => (value === undefined ? MISSING : typeof value === "number" ? Number(value.toPrecision(4)) : value);

const tipOfTrial = (trial, objectives) => [
  `trial ${trial.number}`,
  ...objectives.map((one) => `${words(one.name)}  ${one.show(valueOf(trial, one))}${one.unit}`),
  ...Object.entries(trial.params).map(([key, value]) => `${key.replace(/^method\./, "")}  ${plain(parameter(value))}`),
].join("\n");

const tip = (title, place) => Plot.tip(place.data, Plot.pointer({ x: place.x, y: place.y, title, fill: "var(--surface)", stroke: "var(--line)", lineHeight: 1.4 }));

const trialStyle = { background: "transparent", fontFamily: "inherit", fontSize: "11px", overflow: "visible" };

// Values of the complete trials, and a step line of the best value so far.
function drawProgress(objective, trials, width) {
  const steps = objective.best.map((value, number) => ({ number, value: value === null ? NaN : value * objective.scale }));
  const y = (trial) => valueOf(trial, objective);
  return Plot.plot({
    width, height: 190, marginLeft: 48, marginBottom: 34, marginTop: 10, marginRight: 12, style: trialStyle,
    x: { label: "trial →", ticks: d3.ticks(0, steps.length - 1, Math.min(5, Math.max(1, steps.length - 1))).filter(Number.isInteger), tickFormat: "d", inset: 6 },
    y: { label: null, grid: true, nice: true, ticks: 4, tickFormat: objective.ticks },
    marks: [
      Plot.line(steps, { x: "number", y: "value", curve: "step-after", stroke: "var(--accent)", strokeWidth: 2 }),
      Plot.dot(trials, { x: "number", y, r: 2.5, fill: "var(--quiet)", fillOpacity: 0.6 }),
      tip((trial) => tipOfTrial(trial, [objective]), { data: trials, x: "number", y }),
    ],
  });
}

// The first objective against the second. With two objectives the front is a staircase: between two
// of its trials the one that is better in the second objective is the best known.
function drawTrials(objectives, trials, front, width) {
  const [above, across] = objectives;
  const x = (trial) => valueOf(trial, across), y = (trial) => valueOf(trial, above);
  const axis = (one) => `${titleOf(one)}, ${one.maximize ? "higher" : "lower"} is better`;
  return Plot.plot({
    width, height: Math.max(260, Math.min(420, Math.round(width * 0.5))), marginLeft: 52, marginBottom: 44, marginTop: 28, marginRight: 20,
    style: { ...trialStyle, fontSize: "12px" },
    x: { label: `${axis(across)} →`, nice: true, inset: 8, line: true, ticks: Math.max(2, Math.floor(width / 120)), tickFormat: across.ticks },
    y: { label: `↑ ${axis(above)}`, grid: true, nice: true, inset: 6, tickFormat: above.ticks },
    marks: [
      objectives.length === 2 && Plot.line(best(front, across), { x, y, curve: "step-after", stroke: "var(--front)", strokeWidth: 2 }),
      Plot.dot(trials.filter((trial) => !trial.front), { x, y, r: 4, stroke: "var(--quiet)", strokeWidth: 1.5 }),
      Plot.dot(front, { x, y, r: 5, fill: "var(--accent)" }),
      Plot.dot(front.filter((trial) => RUNS.has(trial.run)), {
        x, y, r: 9, stroke: "none", fill: "transparent",
        href: (trial) => runAddress(trial.run), ariaLabel: (trial) => `trial ${trial.number}, on the front`,
      }),
      tip((trial) => tipOfTrial(trial, objectives), { data: trials, x, y }),
    ].filter(Boolean),
  });
}
