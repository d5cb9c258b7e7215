// Papers' tables rebuilt: ours, theirs, and the difference where the two may be subtracted.

function Tables({ route }) {
  const table = INDEX.tables.find((one) => one.name === route.name) ?? INDEX.tables[0];
  if (!table) {
    return html`<main id="main" tabindex="-1"><h1>Paper tables</h1><p class="lead">No table could be built from these runs.
      <code>bench table NAME</code> runs what a table needs; then write the report again.</p></main>`;
  }
  return html`<main id="main" tabindex="-1" class="wide">
    <h1>Paper tables</h1>
    <nav class="tabs" aria-label="Tables">${INDEX.tables.map((one) => html`<a href=${address(`tables/${encodeURIComponent(one.name)}`)}
      aria-current=${one === table ? "page" : undefined}>${one.name}</a>`)}</nav>
    <h2>${table.title}</h2>
    <${Plain} caption=${table.title} rows=${table.rows} columns=${[
      { title: "", cell: (row) => row.name },
      ...table.columns.map((title, at) => ({ title, number: true, cell: (row) => html`<${Beside} cell=${row.cells[at]} />` })),
    ]} />
    <p class="quiet note">Above: ours. Below: the published number and ours minus theirs; in <b class="outside">bold</b> where that lies outside our interval.</p>
    ${table.notes.map((note) => html`<p class="quiet note">${note}</p>`)}
  </main>`;
}

function Beside({ cell }) {
  const { ours, published, difference, within, run, note } = cell;
  const own = ours === null ? MISSING : fixed(ours, 2);
  return html`<span class="beside" title=${note}>
    ${run ? html`<a href=${runAddress(run)}>${own}</a>` : own}
    <small>${published === null ? "" : fixed(published, 2)} ${difference !== null && html`<span class=${within === false ? "outside" : ""}>${difference > 0 ? "+" : ""}${fixed(difference, 2)}</span>`}${note && html`<span aria-label=${note}>*</span>`}</small></span>`;
}
