"""A W&B server that is away, slow, broken or refuses the key costs a warning and bounded time."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench.records import Store
from bench.schema import TrackerConfig
from bench.tracking import tracker
from bench.tracking.tracker import track
from tests.records.test_store import make

KEY = "0123456789abcdef" * 2 + "deadbeef"
RUN = {
    "id": "cnVu", "name": "abc", "displayName": "d", "description": "", "sweepName": "",
    "project": {"id": "cA==", "name": "slimbench", "entity": {"id": "ZQ==", "name": "me"}},
}  # fmt: skip


class Server(ThreadingHTTPServer):
    """Answers as W&B does up to `fails_after` requests, then as `fault` says."""

    daemon_threads = True

    def __init__(self, fault, fails_after=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.left, self.asked = fault, fails_after, []
        self.done = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request: a plausible answer, or the fault."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = json.loads(body).get("operationName", "") if body[:1] == b"{" else self.path
        self.server.asked.append(name)
        if "UpsertBucket" in name and self.server.left > 0:
            self.server.left -= 1
            self.reply(200, {"data": {"upsertBucket": {"bucket": RUN, "inserted": True}}})
        elif self.server.left > 0:
            self.reply(200, {"data": {"serverInfo": {"features": []}}})
        elif self.server.fault == "silent":
            self.server.done.wait(60)
        elif self.server.fault == "wrong key":
            self.reply(401, {"errors": [{"message": "user is not logged in"}]})
        else:
            self.reply(500, {"errors": [{"message": "out of order"}]})

    do_GET = do_PUT = do_POST

    def reply(self, code, content):
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextmanager
def serving(fault, fails_after=0):
    server = Server(fault, fails_after)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.done.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Send a record to a server; return what was said and how long it took."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracker, "_unanswered_runs", [])
    store = Store(tmp_path / "results")
    store.write(make(), [{"task": "arc_easy", "doc_id": 0}], "seed: 3\n")

    def send(url, timeout):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        began = time.monotonic()
        said = track(make(), store, TrackerConfig(mode="online", timeout=timeout))
        return said, time.monotonic() - began

    yield send
    assert store.find("a" * 12) == make()
    written = [path for path in store.root.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


@pytest.mark.broad
def test_a_server_that_is_away_costs_the_time_limit_once(online):
    with serving("silent") as server:
        url = server.url
    said, took = online(url, timeout=3)
    assert "to W&B failed" in said and "no answer within 3 s" in said
    assert took < 10
    said, took = online(url, timeout=3)
    assert "the server did not answer for run" in said
    assert took < 1


@pytest.mark.broad
def test_a_server_that_never_answers_costs_the_time_limit(online):
    with serving("silent") as server:
        said, took = online(server.url, timeout=3)
    assert "bench track aaaaaaaaaaaa" in said
    assert took < 15


@pytest.mark.slow
def test_a_server_that_fails_in_the_middle_costs_the_time_limit(online):
    with serving("broken", fails_after=1) as server:
        said, took = online(server.url, timeout=40)
        assert any("UpsertBucket" in name for name in server.asked)
    assert "to W&B failed" in said
    assert took < 60


@pytest.mark.broad
def test_a_wrong_key_is_said_at_once_and_never_shown(online):
    with serving("wrong key") as server:
        said, took = online(server.url, timeout=60)
    assert "401" in said and KEY not in said
    assert took < 45
