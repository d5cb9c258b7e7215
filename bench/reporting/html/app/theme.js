// Light or dark: the system's preference, unless the reader chooses; the browser keeps the choice.

const THEMES = ["system", "light", "dark"];

function remembered() {
  try {
    return localStorage.getItem("slimbench-theme") ?? "system";
  } catch {
    return "system"; // browsers may deny storage to a page opened from a file
  }
}

function remember(theme) {
  try {
    localStorage.setItem("slimbench-theme", theme);
  } catch {
    return; // the choice then lasts until the page is closed
  }
}

function show(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function ThemeSwitch() {
  const [theme, setTheme] = useState(remembered);
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  const turn = () => {
    setTheme(next);
    show(next);
    remember(next);
  };
  const sign = { system: "◐", light: "☀", dark: "☾" }[theme];
  return html`<button class="theme" onClick=${turn} title="Colours: ${theme}. Next: ${next}"
    aria-label="Colours: ${theme}; change to ${next}"><span aria-hidden="true">${sign}</span> ${theme}</button>`;
}
