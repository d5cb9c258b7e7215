// Papers' tables: our number, the published one, and their difference where it is meaningful.

function Tables({ route }) {
  const table = INDEX.tables.find((one) => one.name === route.name) ?? INDEX.tables[0];
  if (!table) {
    return html`<main id="main" tabindex="-1"><h1>Paper tables</h1><p class="lead">None of these runs belongs to a paper's table.${" "}
      Run <code>bench table NAME</code>, then write the report again.</p></main>`;
  }
  const reasons = [...new Set(table.lines.flatMap((line) => line.cells.map((cell) => cell.refusal)).filter(Boolean))];
  return html`<main id="main" tabindex="-1" class="wide">
    <h1>Paper tables</h1>
    <nav class="tabs" aria-label="Tables">${INDEX.tables.map((one) => html`<a href=${address(`tables/${encodeURIComponent(one.name)}`)}
      aria-current=${one === table ? "page" : undefined}>${words(one.name)}</a>`)}</nav>
    <p class="lead">${table.title}</p>
    ${table.stand_in && html`<p class="notice">This table uses the embedded models instead of the paper's models and data. Only the order of methods is compared with the paper; nothing is subtracted.</p>`}
    ${d3.groups(table.lines, (line) => line.section).map(([section, lines]) => html`<h2>${section}</h2>
      <${Plain} caption="${table.title}: ${section}" rows=${lines} columns=${[
        { title: "", cell: (line) => line.label },
        ...table.columns.map((head, at) => ({
          title: `${head.name}${["count", head.name].includes(head.unit) ? "" : ` ${head.unit}`}`, number: true,
          cell: (line) => html`<${Beside} cell=${line.cells[at]} head=${head} reasons=${reasons} />`,
        })),
      ]} />`)}
    <p class="quiet note">Above: our number, ± one standard error. Below: the published number (unmarked: from the paper; ᶜ from its authors' repository; ˢ from a note about the paper; ᵗ from others; !: suspicious), then ours minus theirs, <b class="outside">bold</b> if theirs is outside our 95 % interval.</p>
    ${reasons.length > 0 && html`<ol class="quiet note">${reasons.map((reason) => html`<li>Not subtracted: ${reason}</li>`)}</ol>`}
    ${table.notes.map((note) => html`<p class="quiet note">${note}</p>`)}
  </main>`;
}

function Beside({ cell, head, reasons }) {
  const digits = head.digits ?? 2;
  const show = (value) => (head.digits === null ? quantity(value) : fixed(value, digits));
  const { ours, theirs, difference, inside, refusal } = cell;
  const [value, error, run] = ours ?? [null, null, null];
  const own = html`${head.signed && value > 0 ? "+" : ""}${show(value)}${error !== null && html`<span class="error"> ±${error.toFixed(digits)}</span>`}`;
  return html`<span class="beside">${run ? html`<a href=${runAddress(run)}>${own}</a>` : own}
    <small>${theirs && html`<span title=${theirs[3]}>${theirs[0]}${theirs[1] === head.unit ? "" : ` ${theirs[1]}`}${theirs[2]}${theirs[3] ? "!" : ""}</span>`}
      ${difference !== null && html` <span class=${inside === false ? "outside" : ""}>${difference > 0 ? "+" : ""}${show(difference)}</span>`}
      ${refusal && html` <sup title=${refusal}>${reasons.indexOf(refusal) + 1}</sup>`}</small></span>`;
}
