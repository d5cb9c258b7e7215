// First page: an overview of the runs, and the best trade-off per setting.

function Overview() {
  const { runs, settings } = INDEX;
  const models = new Set(settings.map((setting) => setting.model));
  const benchmarks = new Set(settings.map((setting) => setting.benchmark));
  const methods = new Set(FAMILIES.filter((family) => family !== "dense"));
  const bySetting = useMemo(() => d3.group(runs, (run) => run.setting), []);
  const order = [...bySetting.keys()].sort((a, b) => bySetting.get(b).length - bySetting.get(a).length);
  const [all, setAll] = useState(false);
  const shown = all ? order : order.slice(0, 12);
  if (!runs.length) {
    return html`<main id="main" tabindex="-1"><h1>No runs yet</h1>
      <p class="lead"><code>${INDEX.results}</code> has no records. Start with a first run: <code>bench run model=micro_moe method=camera_p ratio=0.4</code></p><${Unreadable} /></main>`;
  }
  return html`<main id="main" tabindex="-1">
    <h1>Quality and cost of compression</h1>
    <p class="lead">${count(runs.length, "run")} of ${count(methods.size, "method")} on ${count(models.size, "model")} and ${count(benchmarks.size, "benchmark")},${" "}
      ${days(runs)}.${" "}
      Each run is compared with the dense model of its own setting: same weights, same questions.</p>
    <${Legend} />
    <div class="cards">${shown.map((index) => html`<${SettingCard} key=${index} index=${index} runs=${bySetting.get(index)} />`)}</div>
    ${order.length > shown.length && html`<p><button class="plain-button" onClick=${() => setAll(true)}>Show all ${order.length} settings</button></p>`}
    <${About} />
    <${Reading} />
    <${Unreadable} />
  </main>`;
}

// The day of the runs, or the first and the last of them; runs are sorted by time, newest first.
function days(runs) {
  const [last, first] = [runs[0], runs[runs.length - 1]].map((run) => when(run.started).slice(0, 10));
  return first === last ? first : `${first} to ${last}`;
}

// The sentence in the config of a method, model or benchmark; a record may bear any name.
const sentence = (group, name) => (Object.hasOwn(INDEX.about[group], name) ? INDEX.about[group][name] : "");

// Colours and shapes of the families.
function Legend() {
  const items = FAMILIES.map((family) => html`<li><${Mark} family=${family} size=${70} /> <a href=${address("leaderboard", { family })}>${family}</a></li>`);
  const hollow = INDEX.runs.some((run) => !run.real);
  return html`<section class="key" aria-label="Legend"><ul>${items}</ul>
    <p class="quiet">Filled marks are real savings.${hollow ? " Hollow marks are runs whose weights are only zeroed or masked, or whose saving is not confirmed." : ""} The line is the Pareto front.</p></section>`;
}

// What each method is, by the sentence of its config.
function About() {
  const names = [...new Set(FAMILIES.flatMap((family) => family.split(" + ")))].map((name) => [name, sentence("method", name)]).filter(([, text]) => text);
  if (!names.length) return null;
  return html`<section class="about"><h2>Methods</h2><dl>${names.map(([name, text]) => html`<div><dt>${name}</dt><dd>${text}</dd></div>`)}</dl></section>`;
}

// What a setting's name says besides model and benchmark: data, shots, limit.
const conditions = (setting) => setting.name.replace(setting.model, "").replace(` on ${setting.benchmark}`, "").trim()
  .replace(") (", "; ").replace(/^\(|\)$/g, "");

function SettingCard({ index, runs }) {
  const setting = INDEX.settings[index];
  const task = setting.tasks[0];
  const costAt = setting.first_cost;
  const points = task && costAt !== null ? pointsOf(runs, setting, 0, costAt) : [];
  const front = task ? frontOf(points, task.higher_is_better) : [];
  const dense = runs.find((run) => run.family === "dense");
  const trade = bestTrade(runs, costAt);
  return html`<article class="card">
    <h2><a href=${address("leaderboard", { setting: index })}>${setting.model} on ${setting.benchmark}</a></h2>
    <p class="quiet">${[sentence("model", setting.model), sentence("benchmark", setting.benchmark)].filter(Boolean).join(" ")}</p>
    <p class="quiet">${count(runs.length, "run")}${dense && dense.values[0] && html`, dense ${scoreName(task)} <b>${score(dense.score, task)}${unit(task)}</b>`}; ${conditions(setting)}</p>
    ${points.length > 1 && html`<a class="thumbnail" href=${address("pareto", { setting: index })} aria-label="Pareto plot of ${setting.name}">
      <${Figure} label="${words(task.task)} against ${setting.costs[costAt].quantity} of ${points.length} runs"
        draw=${(width) => drawPareto(points, front, task, setting.costs[costAt], width, { small: true })} inputs=${[index]} /></a>
      <p class="axes quiet">↑ ${scoreName(task)} ${unit(task)}, ${direction(task)}. → ${words(setting.costs[costAt].quantity)} of ${scopeWords(setting.costs[costAt].scope)}${spread(points) ? ", logarithmic" : ""}, lower is cheaper.</p>`}
    ${trade && html`<p>Cheapest run that keeps 95 % of the dense score: <${RunLink} run=${trade.run} /> keeps ${fixed(trade.run.retention * 100, 1)} % at ${factor(trade.share)} the ${words(setting.costs[costAt].quantity)}.</p>`}
    ${!trade && dense && runs.length > 1 && html`<p class="quiet">No run keeps 95 % of the dense score at a lower cost.</p>`}
    ${!dense && html`<p class="quiet">There is no dense run to compare with.</p>`}
  </article>`;
}

// The cheapest run with a real saving that retains at least 95 % of the dense score.
function bestTrade(runs, costAt) {
  const found = runs
    .filter((run) => run.real && run.retention !== null && run.retention >= 0.95 && run.family !== "dense")
    .map((run) => ({ run, share: shareOf(run, costAt) }))
    .filter(({ share }) => share !== null && share < 1);
  return found.sort((a, b) => a.share - b.share)[0];
}

// A cost relative to the dense run's; null if either is missing, or if it is the time of a run
// whose weights are only zeroed or masked.
function shareOf(run, costAt) {
  const dense = RUNS.get(run.dense);
  const now = run.costs[costAt], before = dense && dense.costs[costAt];
  if (now === null || now === undefined || !before) return null;
  const timed = run.where.costs[costAt].unit === "s";
  return timed && !run.real ? null : now / before;
}

function Reading() {
  return html`<section class="reading"><h2>How to read this</h2><ul>
    <li><b>±</b> is one standard error; bars in plots are 95 % intervals (1.96 standard errors).</li>
    <li><b>Kept</b> is the score as a share of the score of the dense run with the same weights and questions. Numbers are compared only if task, metric, filter, shots, split and version are the same.</li>
    <li><b>Removed</b> weights are no longer stored. <b>Zeroed</b> or <b>masked</b> weights still cost time and memory, so no gain in time is shown for them, and their marks are hollow. Marks are also hollow for <b>unconfirmed</b> savings, which a method claims but the counts do not show.</li>
    <li>FLOPs are counted; times are measured on the machine that each run's page names.</li>
    <li>Keys: <kbd>Tab</kbd> to move, <kbd>Enter</kbd> to open or sort, <kbd>↑</kbd> <kbd>↓</kbd> to move between runs in the leaderboard, <kbd>/</kbd> to search.</li></ul></section>`;
}

function Unreadable() {
  const bad = Object.entries(INDEX.unreadable);
  if (!bad.length) return null;
  return html`<section class="notice" role="note"><h2>${count(bad.length, "record")} could not be read</h2>
    <ul>${bad.map(([id, reason]) => html`<li><code>${id}</code> ${reason}</li>`)}</ul></section>`;
}
