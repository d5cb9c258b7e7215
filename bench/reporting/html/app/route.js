// The URL holds the whole view (#/leaderboard?setting=0&sort=score), so that it can be shared.

function currentRoute() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/").map(decodeURIComponent);
  return { page: page || "overview", name: rest.join("/"), query: new URLSearchParams(query) };
}

function useRoute() {
  const [route, setRoute] = useState(currentRoute);
  useEffect(() => {
    const follow = () => setRoute(currentRoute());
    addEventListener("hashchange", follow);
    addEventListener("popstate", follow);
    return () => {
      removeEventListener("hashchange", follow);
      removeEventListener("popstate", follow);
    };
  }, []);
  return route;
}

function address(page, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  const text = new URLSearchParams(kept).toString();
  return `#/${page}${text ? `?${text}` : ""}`;
}

const runAddress = (id) => address(`run/${encodeURIComponent(id)}`);

const searchAddress = (search) => address(`searches/${encodeURIComponent(search.name)}`);

// Change the query without a new entry in the browser's history: typing in the search field would
// otherwise bury the back button. `replaceState` fires no event, so one is dispatched here.
function adjust(route, changes) {
  const query = { ...Object.fromEntries(route.query), ...changes };
  history.replaceState(null, "", address(route.page, query));
  dispatchEvent(new PopStateEvent("popstate"));
}
