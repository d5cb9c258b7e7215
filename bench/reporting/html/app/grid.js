// A sortable table in pages: the browser lays out 50 rows at a time, however many there are.

const ROWS_A_PAGE = 50;

// Missing values come last in both directions.
function sorted(rows, column, descending) {
  if (!column) return rows;
  const values = new Map(rows.map((row) => [row, column.value(row)]));
  const direction = descending ? -1 : 1;
  return [...rows].sort((one, other) => {
    const a = values.get(one), b = values.get(other);
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * (a < b ? -1 : a > b ? 1 : 0);
  });
}

// Arrow keys move the focus between the rows' first links, which Enter opens.
function stepRows(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const links = [...event.currentTarget.querySelectorAll("tbody a")];
  const at = links.indexOf(document.activeElement);
  if (at < 0 || !links[at + step]) return;
  event.preventDefault();
  links[at + step].focus();
}

// columns: [{key, title, hint, number, value(row), cell(row), first}]; `first` is the direction of
// the first click on a heading, "down" if higher is better.
function Grid({ rows, columns, sort, page, onSort, onPage, caption }) {
  const descending = sort.startsWith("-");
  const key = sort.replace(/^-/, "");
  const column = columns.find((one) => one.key === key);
  const ordered = useMemo(() => sorted(rows, column, descending), [rows, columns, sort]);
  const pages = Math.max(1, Math.ceil(ordered.length / ROWS_A_PAGE));
  const at = Math.min(page, pages - 1);
  const shown = ordered.slice(at * ROWS_A_PAGE, (at + 1) * ROWS_A_PAGE);
  const turn = (one) => {
    const again = one.key === key;
    const down = again ? !descending : one.first === "down";
    onSort((down ? "-" : "") + one.key);
  };
  return html`
    <label class="sort-select">Sort by
      <select value=${sort} onChange=${(event) => onSort(event.target.value)}>
        ${columns.flatMap((one) => ["", "-"].map((sign) => html`<option value=${sign + one.key}>
          ${one.title} ${sign ? "↓" : "↑"}</option>`))}
      </select></label>
    <div class="scroll" tabindex="0" role="region" aria-label=${caption}>
    <table class="grid" onKeyDown=${stepRows}>
      <caption class="aside">${caption}</caption>
      <thead><tr>${columns.map((one) => html`
        <th scope="col" class=${one.number ? "number" : ""} title=${one.hint}
          aria-sort=${one.key === key ? (descending ? "descending" : "ascending") : "none"}>
          <button onClick=${() => turn(one)}>${one.title}<span class="arrow" aria-hidden="true">${
            one.key === key ? (descending ? "↓" : "↑") : ""}</span></button></th>`)}</tr></thead>
      <tbody>${shown.map((row) => html`<tr key=${row.id}>${columns.map((one, place) => place === 0
        ? html`<th scope="row">${one.cell(row)}</th>`
        : html`<td class=${one.number ? "number" : ""} data-title=${one.title}>${one.cell(row)}</td>`)}</tr>`)}</tbody>
    </table></div>
    ${!shown.length && html`<p class="empty">No matching runs. Remove a filter.</p>`}
    ${pages > 1 && html`<nav class="pages" aria-label="Pages">
      <button disabled=${at === 0} onClick=${() => onPage(at - 1)}>Previous</button>
      <span>page ${at + 1} of ${pages}</span>
      <button disabled=${at === pages - 1} onClick=${() => onPage(at + 1)}>Next</button></nav>`}`;
}

// A table without sorting and pages, for a few rows.
function Plain({ columns, rows, caption }) {
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${caption}><table class="plain">
    <caption class="aside">${caption}</caption>
    <thead><tr>${columns.map((one) => html`<th scope="col" class=${one.number ? "number" : ""} title=${one.hint}>${one.title}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr class=${row.emphasis ? "emphasis" : ""}>${columns.map((one, place) => place === 0
      ? html`<th scope="row">${one.cell(row)}</th>`
      : html`<td class=${one.number ? "number" : ""}>${one.cell(row)}</td>`)}</tr>`)}</tbody></table></div>`;
}

function Choice({ label, value, options, onChange }) {
  return html`<label class="choice"><span>${label}</span>
    <select value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${options.map(([key, text]) => html`<option value=${key}>${text}</option>`)}</select></label>`;
}

function RunLink({ run }) {
  return html`<a class="run" href=${runAddress(run.id)}><${Mark} family=${run.family} /><span>${run.label}</span></a>`;
}

function Effect({ effect }) {
  if (effect === "none") return html`<span class="quiet">${MISSING}</span>`;
  return html`<span class="badges">${effect.split("+").map((kind) => html`<span class="badge ${kind}" title="weights: ${explained(kind)}">${kind}</span>`)}</span>`;
}
