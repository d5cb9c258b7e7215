"""Data of the hub: fetched once, found again without a network, and missed all at once.

The hub is a server on localhost that speaks enough of the protocol to download from; the real
libraries talk to it from a process of their own, because they read its address at import.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pytest
from pyarrow import parquet

from bench.data import hub
from bench.errors import MissingData
from bench.evaluation import BenchmarkConfig, PerplexityConfig, plan

NOWHERE = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(root: Path):
    """Serve `root/OWNER/NAME/**` as data sets at one commit; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, with_body):
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            match parts:
                case [""]:
                    self._send(200, b"a hub", with_body)
                case ["api", "datasets", owner, name, *_] if not (root / owner / name).is_dir():
                    self._send(404, b"", with_body, error="RepoNotFound")
                case ["api", "datasets", owner, name] | [
                    "api",
                    "datasets",
                    owner,
                    name,
                    "revision",
                    _,
                ]:
                    self._send(200, _info(root / owner / name), with_body)
                case ["api", "datasets", owner, name, "tree", _, *below]:
                    self._send(200, _tree(root / owner / name, below), with_body)
                case ["datasets", owner, name, "resolve", _, *path]:
                    file = root.joinpath(owner, name, *path)
                    if file.is_file():
                        self._send(200, file.read_bytes(), with_body)
                    else:
                        self._send(404, b"", with_body, error="EntryNotFound")
                case _:
                    self._send(404, b"", with_body, error="RepoNotFound")

        def _send(self, status, body, with_body, error=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _entry(folder: Path, path: Path):
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    name = path.relative_to(folder).as_posix()
    return {
        "type": kind,
        "oid": hashlib.sha1(name.encode()).hexdigest(),
        "size": size,
        "path": name,
    }


def _tree(folder: Path, below):
    return json.dumps(
        [_entry(folder, p) for p in sorted(folder.joinpath(*below).rglob("*"))]
    ).encode()


def _info(folder: Path):
    files = [{"rfilename": p.relative_to(folder).as_posix()} for p in folder.rglob("*.*")]
    name = f"{folder.parent.name}/{folder.name}"
    return json.dumps({"id": name, "sha": COMMIT, "siblings": files, "private": False}).encode()


PIQA = {"goal": "to see", "sol1": "look", "sol2": "sleep", "label": 0}
WIKITEXT = "wikitext-2-raw-v1"
CARD = f"""---
configs:
- config_name: {WIKITEXT}
  data_files:
  - split: test
    path: {WIKITEXT}/test.parquet
---
"""
SCRIPT = """
import json, sys
from bench.evaluation import BenchmarkConfig, PerplexityConfig, plan, prefetch_benchmark as prefetch

texts = {
    "wikitext2": PerplexityConfig(text="wikitext2"),
    "c4": PerplexityConfig(text="c4", protocol="gptq_c4"),
}
benchmark = BenchmarkConfig(name="all", tasks=("piqa",), perplexity=texts)
if sys.argv[1] == "prefetch":
    print(json.dumps(prefetch(benchmark)))
else:
    found = plan(benchmark, offline=sys.argv[1] == "offline")
    texts = {t.name: list(t.documents) for t in found.harness.texts}
    print(json.dumps([found.fingerprints, texts]))
"""


@pytest.fixture
def published(tmp_path):
    root = tmp_path / "published"
    for split in ("train", "validation"):
        _table(root / "baber" / "piqa" / f"{split}.parquet", [PIQA] * 3)
    wikitext = root / "Salesforce" / "wikitext"
    _table(wikitext / WIKITEXT / "test.parquet", [{"text": "a line"}, {"text": "another"}])
    (wikitext / "README.md").write_text(CARD)
    shard = root / "allenai" / "c4" / "en" / "c4-validation.00000-of-00008.json.gz"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    return root


def _table(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), file)


def _run(how, home, address):
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", SCRIPT, how]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _ask(how, home, address):
    done = _run(how, home, address)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.broad
def test_what_was_fetched_is_found_again_without_a_network(published, tmp_path):
    home = tmp_path / "home"
    with serving(published) as address:
        fetched = _ask("prefetch", home, address)
    assert fetched == [
        f"Salesforce/wikitext/{WIKITEXT}@{COMMIT}",
        f"allenai/c4/en/c4-validation.00000-of-00008.json.gz@{COMMIT}",
        f"baber/piqa@{COMMIT}",
    ]
    fingerprints, texts = _ask("offline", home, NOWHERE)
    assert set(fingerprints.values()) == set(fetched)
    assert texts == {"wikitext2": ["a line", "another"], "c4": ["one", "two"]}


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("offline", [True, False])
def test_everything_that_is_missing_is_named_at_once_and_soon(empty_caches, monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    benchmark = BenchmarkConfig(
        name="nine",
        tasks=("arc_easy", "boolq", "hellaswag"),
        perplexity={
            "wikitext2": PerplexityConfig(text="wikitext2"),
            "c4": PerplexityConfig(text="c4", protocol="gptq_c4"),
            "english": PerplexityConfig(text="english"),
        },
    )
    began = time.perf_counter()
    with pytest.raises(MissingData) as refused:
        plan(benchmark, offline=offline)
    assert time.perf_counter() - began < 5
    message = str(refused.value)
    for name in ("allenai/ai2_arc/ARC-Easy", "super_glue", "hellaswag", "wikitext", "allenai/c4"):
        assert name in message
    assert "english" not in message
    assert "bench prefetch benchmark=nine" in message
    assert "benchmark.data.TASK=PATH" in message


def test_one_switch_turns_the_libraries_off():
    import datasets.config
    import huggingface_hub

    assert not hub.is_offline()
    hub.go_offline()
    assert hub.is_offline()
    assert huggingface_hub.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not hub.is_reachable()


@pytest.mark.broad
def test_why_a_hub_that_answers_has_nothing_is_told(tmp_path):
    with serving(tmp_path) as address:
        message = _run("online", tmp_path / "home", address).stderr
    assert "baber/piqa: " in message
    assert "NotFound" in message
