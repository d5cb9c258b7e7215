// Frame of every page: header, navigation, footer.

const PAGES = [["overview", "Overview"], ["leaderboard", "Leaderboard"], ["pareto", "Pareto"], ["compare", "Compare"],
  ...(INDEX.searches.length ? [["searches", "Searches"]] : []), ...(INDEX.tables.length ? [["tables", "Tables"]] : [])];

function App() {
  const route = useRoute();
  const arrived = useRef(false);
  useEffect(() => {
    // A new page starts at its top with the focus on it, like a page load; a screen reader would
    // otherwise stay where the link was.
    if (arrived.current) {
      scrollTo(0, 0);
      document.getElementById("main")?.focus({ preventScroll: true });
    }
    arrived.current = true;
    const title = { run: RUNS.get(route.name)?.label, tables: route.name, searches: route.name }[route.page] || route.page;
    document.title = `${title} · slimbench report`;
  }, [route.page, route.name]);
  useEffect(() => {
    const search = (event) => {
      if (event.key !== "/" || /input|select|textarea/i.test(event.target.tagName)) return;
      event.preventDefault();
      if (currentRoute().page !== "leaderboard") location.hash = "#/leaderboard";
      setTimeout(() => document.getElementById("search")?.focus(), 60);
    };
    addEventListener("keydown", search);
    return () => removeEventListener("keydown", search);
  }, []);
  const page = {
    overview: () => html`<${Overview} />`,
    leaderboard: () => html`<${Leaderboard} route=${route} />`,
    pareto: () => html`<${Pareto} route=${route} />`,
    compare: () => html`<${Compare} route=${route} />`,
    searches: () => html`<${Searches} route=${route} />`,
    tables: () => html`<${Tables} route=${route} />`,
    run: () => html`<${RunPage} key=${route.name} id=${route.name} />`,
  }[route.page];
  const skip = (event) => {
    event.preventDefault();
    document.getElementById("main").focus();
  };
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header class="top"><div>
      <a class="brand" href="#/">slimbench</a>
      <nav aria-label="Pages">${PAGES.map(([key, title]) => html`<a href=${key === "overview" ? "#/" : address(key)}
        aria-current=${route.page === key ? "page" : undefined}>${title}</a>`)}</nav>
      <${ThemeSwitch} /></div></header>
    ${page ? page() : html`<main id="main" tabindex="-1"><h1>Page not found</h1><p><a href="#/">Overview</a></p></main>`}
    <footer><p>Written ${when(INDEX.generated)} UTC by slimbench ${INDEX.version} from <code>${INDEX.results}</code>.${" "}
      This file contains up to ${INDEX.share.per_run} samples per run for the newest ${count(INDEX.share.runs, "run")};${" "}<code>bench report --samples N --sample-runs N</code> changes that.${" "}
      It loads nothing from the network. Drawn with Observable Plot and D3 (ISC), Preact (MIT) and htm (Apache-2.0).</p></footer>`;
}

show(remembered());
document.getElementById("app").replaceChildren();
render(html`<${App} />`, document.getElementById("app"));
