// Score against a cost, for the runs of one setting.

function Pareto({ route }) {
  const query = Object.fromEntries(route.query);
  const sizes = useMemo(() => d3.rollup(INDEX.runs, (runs) => runs.length, (run) => run.setting), []);
  const largest = d3.greatest([...sizes], ([, size]) => size)?.[0] ?? 0;
  const index = INDEX.settings[query.setting] ? Number(query.setting) : largest;
  const setting = INDEX.settings[index];
  if (!setting || !setting.tasks.length || !setting.costs.length) {
    return html`<main id="main" tabindex="-1"><h1>Pareto plot</h1><p class="lead">No run has both a score and a cost yet.</p></main>`;
  }
  const found = setting.tasks.findIndex((one) => one.task === query.task);
  const taskAt = Math.max(0, found);
  const costFound = setting.costs.findIndex((one) => `${one.scope} ${one.quantity}` === query.cost);
  const costAt = costFound < 0 ? setting.first_cost : costFound;
  const task = setting.tasks[taskAt], quantityOf = setting.costs[costAt];
  const hidden = new Set((query.hide ?? "").split(",").filter(Boolean));
  const runs = INDEX.runs.filter((run) => run.setting === index);
  const families = FAMILIES.filter((family) => runs.some((run) => run.family === family));
  const points = pointsOf(runs.filter((run) => !hidden.has(run.family)), setting, taskAt, costAt);
  const front = frontOf(points, task.higher_is_better);
  const flip = (family) => {
    hidden.has(family) ? hidden.delete(family) : hidden.add(family);
    adjust(route, { hide: [...hidden].join(",") });
  };
  const logarithmic = query.log ? query.log === "1" : spread(points);
  const left = runs.filter((run) => !hidden.has(run.family)).length - points.length;
  return html`<main id="main" tabindex="-1" class="wide">
    <h1>Pareto plot</h1>
    <div class="filters">
      <${Choice} label="Model and benchmark" value=${String(index)} onChange=${(value) => adjust(route, { setting: value, task: "", cost: "", hide: "", log: "" })}
        options=${INDEX.settings.map((one, at) => [String(at), one.name])} />
      <${Choice} label="Score (up)" value=${task.task} onChange=${(value) => adjust(route, { task: value })}
        options=${setting.tasks.map((one) => [one.task, `${words(one.task)}${one.task === "average" ? "" : `, ${one.metric}`}`])} />
      <${Choice} label="Cost (across)" value=${`${quantityOf.scope} ${quantityOf.quantity}`} onChange=${(value) => adjust(route, { cost: value })}
        options=${setting.costs.map((one) => [`${one.scope} ${one.quantity}`, `${words(one.quantity)}, ${scopeWords(one.scope)}`])} />
      <label class="tick"><input type="checkbox" checked=${logarithmic} disabled=${!points.every((point) => point.x > 0)}
        onChange=${(event) => adjust(route, { log: event.target.checked ? "1" : "0" })} /> logarithmic</label>
    </div>
    <ul class="legend" aria-label="Methods shown">${families.map((family) => html`<li><button aria-pressed=${!hidden.has(family)} onClick=${() => flip(family)}>
      <${Mark} family=${family} /> ${family}</button></li>`)}</ul>
    ${points.length ? html`<${Figure} label="${words(task.task)} against ${quantityOf.quantity}; the points of the front are in the table below"
      draw=${(width) => drawPareto(points, front, task, quantityOf, width, { logarithmic })} inputs=${[index, taskAt, costAt, query.hide, logarithmic]}
      onPick=${(point) => { location.hash = runAddress(point.run.id); }} />` : html`<p class="empty">None of these runs has both numbers.</p>`}
    <p class="quiet note">Filled marks are real savings. Hollow marks are runs whose weights are only zeroed or masked, or whose saving is not confirmed; they are never on the front.${" "}
      ${points.length > 150 ? "Intervals are left out above 150 points; hover for them. " : "Bars are 95 % intervals. "}${task.higher_is_better ? "" : "Lower is better. "}${
      left > 0 ? `${count(left, "run")} without ${quantityOf.unit === "s" ? "a score or a time that could be a gain" : "one of the two numbers"} left out.` : ""}</p>
    <h2>On the front</h2>
    <${Plain} caption="Runs on the Pareto front, cheapest first" rows=${front} columns=${[
      { title: "Method", cell: ({ run }) => html`<${RunLink} run=${run} />` },
      { title: `${words(task.task)} ${unit(task)}`, number: true, cell: ({ run }) => html`<${Scored} pair=${run.values[taskAt]} answered=${run.answered[taskAt]} task=${task} />` },
      { title: words(quantityOf.quantity), number: true, cell: ({ x }) => cost(x, quantityOf.unit) },
      { title: "of dense", number: true, cell: ({ run }) => factor(shareOf(run, costAt)) },
      { title: "Weights", cell: ({ run }) => html`<${Effect} effect=${run.effect} />` },
    ]} />
  </main>`;
}
