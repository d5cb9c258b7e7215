// Questions with the answers of this run and of the dense model.

// 1 if right, 0 if wrong, between for partial credit, null if the sample has no headline score.
function rightness(sample, metrics) {
  const headline = metrics.find((metric) => metric.task === sample.task && metric.headline);
  if (!headline) return null;
  return sample.scores[headline.metric] ?? null;
}

const keyOf = (sample) => `${sample.task}|${sample.filter}|${sample.doc}`;

// The target; if it is the index of a choice, that choice.
function targetText(sample) {
  const at = Number(sample.target);
  const named = /^\d+$/.test(sample.target ?? "") && sample.choices[at] !== undefined;
  return named && !sample.choices.includes(sample.target) ? sample.choices[at] : sample.target;
}

const OUTCOMES = [["", "all"], ["wrong", "wrong"], ["right", "right"], ["flipped", "differs from dense"]];

function Samples({ run, record }) {
  const own = useLater(() => samplesOf(run), [run.id]);
  const dense = useLater(() => samplesOf(run.dense === run.id ? null : RUNS.get(run.dense)), [run.id]);
  const [task, setTask] = useState("");
  const [outcome, setOutcome] = useState("");
  const [limit, setLimit] = useState(10);
  const folder = `${INDEX.results}/runs/${run.id}/samples.parquet`;
  if (own === undefined || dense === undefined) return html`<p class="quiet">Loading…</p>`;
  if (own === null || !own.samples.length) {
    return html`<p class="quiet">This file contains no samples of this run. They are in <code>${folder}</code></p>`;
  }
  const before = new Map((dense?.samples ?? []).map((sample) => [keyOf(sample), rightness(sample, record.metrics)]));
  const rows = own.samples.map((sample) => ({ sample, now: rightness(sample, record.metrics), before: before.get(keyOf(sample)) ?? null }));
  const fits = ({ sample, now, before: then }) => (!task || sample.task === task) && {
    "": true, wrong: now === 0, right: now === 1, flipped: now !== null && then !== null && now !== then,
  }[outcome];
  const shown = rows.filter(fits);
  const tasks = [...new Set(own.samples.map((sample) => sample.task))];
  return html`
    <p class="quiet">${own.samples.length} of ${count(own.total, "sample")}, evenly spaced within each task and chosen regardless of the answers. All samples are in <code>${folder}</code></p>
    ${own.noImages && html`<p class="quiet">Images are not shown: ${own.noImages}</p>`}
    <div class="filters">
      <${Choice} label="Task" value=${task} onChange=${setTask} options=${[["", "all"], ...tasks.map((one) => [one, one])]} />
      <${Choice} label="Outcome" value=${outcome} onChange=${setOutcome} options=${OUTCOMES} />
    </div>
    <ol class="samples">${shown.slice(0, limit).map((row) => html`<${Sample} key=${keyOf(row.sample)} ...${row} />`)}</ol>
    ${!shown.length && html`<p class="empty">No matching samples.</p>`}
    ${shown.length > limit && html`<p><button class="plain-button" onClick=${() => setLimit(limit + 20)}>Show more, ${shown.length - limit} left</button></p>`}`;
}

function Verdict({ value }) {
  if (value === null) return null;
  if (value === 1) return html`<span class="verdict right">✓ right</span>`;
  if (value === 0) return html`<span class="verdict wrong">✗ wrong</span>`;
  return html`<span class="verdict">${value.toFixed(2)}</span>`;
}

// An image of few pixels is enlarged to its pixels, which a browser would blur.
const showPixels = ({ target }) => target.classList.toggle("pixels", target.naturalWidth < 64);

function Sample({ sample, now, before, against = "dense" }) {
  const best = sample.logs.length ? d3.maxIndex(sample.logs) : -1;
  const target = targetText(sample);
  return html`<li class="sample">
    <header><span>${sample.task} <span class="quiet">#${sample.doc}</span></span><span><${Verdict} value=${now} />
      ${before !== null && before !== now && html`<span class="quiet">${against}: ${before === 1 ? "right" : before === 0 ? "wrong" : before.toFixed(2)}</span>`}</span></header>
    ${sample.cut > 0 && html`<p class="quiet">${count(sample.cut, "token")} cut on the left; the model saw only the following</p>`}
    ${sample.images.length > 0 && html`<div class="seen">${sample.images.map((image, at) => html`
      <img src=${image} alt="image ${at + 1} of ${sample.task} #${sample.doc}" loading="lazy" onLoad=${showPixels} />`)}</div>`}
    ${sample.prompt !== null && html`<pre class="prompt">${sample.prompt}</pre>`}
    ${sample.choices.length > 0 && html`<ul class="choices">${sample.choices.map((choice, at) => html`
      <li class=${at === best ? "picked" : ""}><span>${choice}${choice === target && html` <span class="badge">target</span>`}</span>
        <span class="number">${sample.logs[at] === undefined ? "" : fixed(sample.logs[at], 2)}</span></li>`)}</ul>`}
    ${sample.tied > 1 && html`<p class="quiet">${sample.tied} choices are equally likely; the first of them counts</p>`}
    ${sample.answer !== null && html`<dl class="pairs"><dt>answer</dt><dd class="answer">${sample.answer}</dd>
      ${sample.raw !== null && html`<dt>as written</dt><dd class="answer">${sample.raw}</dd>`}
      ${sample.sure !== null && sample.sure !== undefined && html`<dt>probability</dt><dd>${sample.sure.toFixed(3)}</dd>`}</dl>`}
    ${target !== null && !sample.choices.includes(target) && html`<dl class="pairs"><dt>target</dt><dd>${target}</dd></dl>`}
    ${now === null && Object.keys(sample.scores).length > 0 && html`<p class="quiet">${Object.entries(sample.scores).map(([name, value]) => `${name} ${value}`).join(", ")}</p>`}
  </li>`;
}
