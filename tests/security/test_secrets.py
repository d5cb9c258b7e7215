"""A planted W&B key and hub token appear in nothing that a run leaves or prints."""

import pytest

from bench.cli.main import main
from bench.security import REDACTED, redact
from methods.baselines.micro_expert_controls import RandomExperts

KEY, TOKEN, PASSWORD = (
    "0123456789abcdef" * 2 + "deadbeef",
    "hf_planted0token0value",
    "netrc-pass-word",
)
SECRETS = (KEY, TOKEN, PASSWORD)
TINY = [
    "benchmark.tasks=[arc_easy]", "~benchmark.perplexity", "benchmark.limit=2", "costs.length=32",
    "threads=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN + "\n")
    (tmp_path / "home" / "netrc").write_text(
        f"machine api.wandb.ai login user password {PASSWORD}\n"
    )
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()


def test_texts_lose_every_kind_of_secret():
    said = redact(f"a {KEY} b {TOKEN} c {PASSWORD} d")
    assert said == f"a {REDACTED} b {REDACTED} c {REDACTED} d"
    assert redact("nothing to hide") == "nothing to hide"


def leaked(folder, *texts):
    """Return the files below a folder, and the texts, that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "home"]
    contents = {str(path): path.read_bytes() for path in files}
    contents |= {f"text {place}": text.encode() for place, text in enumerate(texts)}
    return [name for name, content in contents.items()
            if any(secret.encode() in content for secret in SECRETS)]  # fmt: skip


def test_a_run_with_wandb_leaves_no_secret(tmp_path, capsys):
    results = tmp_path / "results"
    assert main(["run", *TINY, "tracker=wandb", f"results_dir={results}"]) == 0
    said = capsys.readouterr()
    assert list(results.rglob("*.wandb"))
    assert leaked(tmp_path, said.out, said.err) == []


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_crash_tells_no_secret(tmp_path, capsys, monkeypatch, mode):
    def refused(self, model, context):
        raise RuntimeError(f"401: key {KEY}, token {TOKEN}, password {PASSWORD} refused")

    monkeypatch.setattr(RandomExperts, "apply", refused)
    given = ["run", *mode, *TINY, "method=random_experts", "tracker=none"]
    assert main([*given, f"results_dir={tmp_path / 'results'}"]) == 1
    said = capsys.readouterr()
    assert f"401: key {REDACTED}, token {REDACTED}, password {REDACTED} refused" in said.err
    assert "Traceback" not in said.err
    assert any("Traceback" in path.read_text() for path in tmp_path.rglob("*.log"))
    assert leaked(tmp_path, said.out, said.err) == []


@pytest.mark.parametrize("value", [KEY, "${oc.env:WANDB_API_KEY}"])
def test_a_secret_in_the_config_is_refused(tmp_path, capsys, value):
    given = ["run", *TINY, f"tracker.project={value}", f"results_dir={tmp_path / 'results'}"]
    assert main(given) == 2
    said = capsys.readouterr()
    assert "tracker.project contains one of your passwords or tokens" in said.err
    assert leaked(tmp_path, said.out, said.err) == []
