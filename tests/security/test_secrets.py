"""A planted W&B key and hub token appear in nothing that a run leaves or prints."""

import os
import sys
import time
from unittest.mock import patch
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.config.overrides import Overrides
from bench.config.sweep_checks import admit
from bench.errors import UserError
from bench.records import Store
from bench.reporting.html import WrittenReport
from bench.reporting.wandb_sync import tracker_of
from bench.schema import TrackerConfig
from bench.security import REDACTED, redact
from bench.tracking.tracker import track
from methods.baselines.micro_expert_controls import RandomExperts
from tests.records.test_store import make
from tests.tracking.offline import entries

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


@pytest.mark.sample(1)
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


RANDOM = "Zq7Lr2Xw9Kd4Tb6Vn1Mc8Ys3"
FORMS = {
    "MYSQL_PWD": "hunter2hunter2", "GITHUB_PAT": "some-pat-value-1", "PGPASSWORD": "correct-horse",
    "MY_SERVICE": RANDOM, "OPENAI_API_KEY": "local-key-77",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("place", [
    "tracker.project={}", "tracker.entity={}", "results_dir=/tmp/{}/x", "model.path=/tmp/{}",
    "+hydra.launcher.name='{}'", "+hydra.sweeper.params={{seed: '{}'}}", "+x.y=[{{a: '{}'}}]",
])  # fmt: skip
def test_the_value_of_a_credential_is_refused_wherever_it_is_typed(monkeypatch, name, place):
    monkeypatch.setenv(name, FORMS[name])
    text = place.format(FORMS[name])
    with pytest.raises(UserError, match="passwords or tokens") as refused:
        admit(Overrides.parse([text]))
    assert FORMS[name] not in str(refused.value)


@pytest.mark.parametrize("text", [
    "postgresql://me:s3cret@host/db", "sqlite://x:longer-password@h/db", "hf_" + "aB3" * 9,
    "sk-proj-" + "aB3_" * 8, "ghp_" + "a1B2" * 9, "AKIA" + "Z7" * 8, "glpat-" + "x1Y2" * 5,
    "github_pat_" + "a1B2" * 6, "AIza" + "x1Y2-" * 7,
    "gsk_" + "aB1" * 16, "xai-" + "aB1" * 25, "nvapi-" + "aB1_" * 15, "r8_" + "aB1" * 12,
    "dop_v1_" + "a1" * 32, "SG." + "aB1-" * 5 + "." + "xY2_" * 10, "ya29.a0AfB_" + "x1Y2" * 5,
])  # fmt: skip
def test_a_token_or_password_is_known_by_its_form(text):
    secret = text.partition("://")[2].partition(":")[2].partition("@")[0] or text
    assert secret not in redact(f"value {text}, and more")
    with pytest.raises(UserError, match=r"tracker\.project contains"):
        compose_run_config([f"tracker.project='{text}'"])


def test_the_password_in_a_variables_url_is_a_secret_of_its_own(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:s3cr%2Ft-word@host/db")
    assert redact("/data/s3cr/t-word and s3cr%2Ft-word") == f"/data/{REDACTED} and {REDACTED}"


def test_a_wandb_key_is_known_by_its_place():
    commit = "0123456789abcdef" * 2 + "0badcafe"
    for place in ("tracker.project", "tracker.entity"):
        with pytest.raises(UserError, match="a W&B key and no name"):
            compose_run_config([f"{place}='{commit}'"])
    assert compose_run_config([f"model.revision='{commit}'"]).model.revision == commit


@pytest.mark.parametrize(("name", "value"), [
    ("HOME", "/root"), ("USER", "micro_moe"), ("PWD", "/work/results"), ("MY_MODEL", "micro_moe"),
    ("POSTGRES_PASSWORD", "slimbench"), ("DB_PASSWORD", "micro_moe"), ("GIT_COMMIT", "ab12" * 10),
    ("CHECKPOINT", "Qwen3VLMoeForConditionalGeneration30B"), ("MONKEY", "camera_p_and_more"),
    ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/passwd"), ("TOKENIZERS_PARALLELISM", "false"),
    ("MODEL", "DeepSeek-V2-Lite-Chat-Int4-AWQ"), ("JOB", "slurm_CameraP_Ratio04_Seed1234"),
    ("SORT_KEY", "benchmark"), ("SORT_KEY", "benchmark.results_dir"), ("API_KEY", "camera_micro"),
    ("CACHE_KEY", "results/runs"), ("PGPASS", "/nowhere/pgpass"), ("SSH_AUTH_SOCK", "agent-socket"),
    ("LOGIN_KEY", "12345678"), ("DAY_KEY", "2026-11-29"), ("COMPASS", "northeast"),
    ("DB_PASS", "monday"), ("BYPASS", "experiments"), ("HOMEPAGE", "https://someone@example.org/"),
    ("KEYBOARD", "us-international"), ("UUID", "0f8fad5b-d9cb-469f-a165-70867728950e"),
])  # fmt: skip
def test_a_path_or_a_plain_word_is_no_secret(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"model={value} and /data/{value}/x") == f"model={value} and /data/{value}/x"


NAMED = "lowercaseonlysecretvalue"


@pytest.mark.parametrize("name", [
    "SSHPASS", "DBPASS", "MYSQLPWD", "API_TOKEN_V2", "SECRET_KEY_BASE", "DEPLOY_KEY_PROD",
    "HEXSECRET_VALUE", "API_KEY2",
])  # fmt: skip
def test_a_credential_is_known_by_a_word_anywhere_in_its_name(monkeypatch, name):
    monkeypatch.setenv(name, NAMED)
    assert redact(f"x={NAMED}, and {NAMED}s") == f"x={REDACTED}, and {REDACTED}s"


@pytest.mark.parametrize(("value", "secret"), [
    ("DefaultEndpointsProtocol=https;AccountName=a;AccountKey=Zm9vYmFyZm9v/mFyMTI==;X=y",
     "Zm9vYmFyZm9v/mFyMTI=="),
    ("Server=h;User Id=me;Password=correct-horse", "correct-horse"),
    ('{"auths": {"x": {"auth": "dXNlcjpwYXNzd29yZDEyMw=="}}}', "dXNlcjpwYXNzd29yZDEyMw=="),
    ("https://h/x?user=me&api-key=correct-horse", "correct-horse"),
    ("https://0123456789abcdef0123456789abcdef@o1.ingest.sentry.io/1",
     "0123456789abcdef0123456789abcdef"),
    ("postgres://me:pass/word-1@h/db", "pass/word-1"),
])  # fmt: skip
def test_a_credential_inside_a_value_is_a_secret_of_its_own(monkeypatch, value, secret):
    monkeypatch.setenv("MY_SERVICE", value)
    assert redact(f"x={secret} y={value}").count(secret) == 0


@pytest.mark.parametrize(("text", "said"), [
    ("https://0123456789abcdef0123@github.com/x", f"https://{REDACTED}@github.com/x"),
    ("https://abcdefghijklmnopqrst:x-oauth@h/x", f"https://{REDACTED}:{REDACTED}@h/x"),
    ("https://me:pass/word@h/x", f"https://me:{REDACTED}@h/x"),
    ("https://me:pa@ss@h/x", f"https://me:{REDACTED}@h/x"),
    ("AccountKey=Zm9vYmFyZm9vYmFyMTIzNDU2==;X=y", f"AccountKey={REDACTED};X=y"),
])  # fmt: skip
def test_a_login_in_any_text_is_hidden(text, said):
    assert redact(text) == said
    assert redact(said) == said


@pytest.mark.parametrize("text", [
    "https://host:8080/path@v1", "http://h/x:y@z", "https://[::1]:80/x@y", "ssh://git@github.com/x",
    "hf://datasets/x@main", "https://first.last-name@host/x", "s3://bucket/a, b@c",
])  # fmt: skip
def test_an_address_without_a_password_is_unchanged(text):
    assert redact(text) == text


@pytest.mark.parametrize("end", ["\n", "\r\n", "\\n"])
def test_each_line_of_a_secret_is_hidden(monkeypatch, end):
    lines = ["-----BEGIN PRIVATE KEY-----", "first-secret-line", "other-secret-line"]
    monkeypatch.setenv("DEPLOY_KEY", end.join(lines))
    said = redact("\n  ".join(lines))
    assert said == f"{lines[0]}\n  {REDACTED}\n  {REDACTED}"


@pytest.mark.parametrize("encoded", [
    "wJalr%2FK7MDENG%2BbPx", "wJalr%2fK7MDENG%2bbPx", "wJalr/K7MDENG%2BbPx",
])  # fmt: skip
def test_the_percent_encoded_form_is_hidden(monkeypatch, encoded):
    monkeypatch.setenv("MY_SECRET", "wJalr/K7MDENG+bPx")
    assert redact(f"key={encoded}&x=1") == f"key={REDACTED}&x=1"


def test_a_number_hides_itself_and_no_longer_number(monkeypatch):
    monkeypatch.setenv("LOGIN_KEY", "1234567890")
    assert redact("x=1234567890, y=91234567890") == f"x={REDACTED}, y=91234567890"


PRINTABLE = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="[]")
relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(st.text(PRINTABLE, min_size=4, max_size=60), st.sampled_from(["A_TOKEN", "X_KEY_PROD"]))
def test_a_secret_never_survives(text, name):
    secret = f"Zq7!{text}"
    with patch.dict(os.environ, {name: secret}):
        said = redact(f"a {secret} b={quote(secret, safe='')}&c {secret}{secret}")
    assert secret not in said
    assert quote(secret, safe="") not in said


@relaxed
@given(st.text("abcxyzKT0189 ./:=,-_\n", max_size=200))
def test_a_text_without_a_secret_is_unchanged(text):
    assert redact(text) == text


@pytest.mark.parametrize("piece", [
    "a", "sk-", "a1-", "://a:", "://", "@", "a://u:p@", "eyJaaaaaaaa.", "AccountKey=", "key=",
    "%2F", "0", "/", "SG.aaaaaaaaaaaaaaaa.",
])  # fmt: skip
def test_time_grows_with_the_length_only(monkeypatch, piece):
    text = piece * (100_000 // len(piece))
    monkeypatch.setenv("MY_SERVICE", text)
    start = time.process_time()
    redact(f"https://u:{text}")
    redact(f"sk-{text}!")
    assert time.process_time() - start < 2


def test_a_password_that_is_a_word_leaves_longer_words(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "swordfish")
    assert redact("swordfish, swordfishes") == f"{REDACTED}, swordfishes"


def test_wandb_gets_no_secret_argument_no_samples_and_no_links(tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    folder = store.write(make(), [{"task": "arc_easy", "doc_id": 0, "prompt": "my prompt"}], "")
    (folder / "id_rsa").symlink_to(tmp_path / "home" / "token")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--key={KEY}", "hydra.x=" + TOKEN])
    assert track(make(), store, TrackerConfig(mode="offline", samples=False)) is None
    assert sys.argv[1] == f"--key={KEY}"
    (file,) = store.root.rglob("*.wandb")
    sent = str(entries(file))
    (folder / "id_rsa").unlink()
    assert leaked(tmp_path) == []
    assert "record.json" in sent
    assert "samples.parquet" not in sent
    assert "id_rsa" not in sent


def test_a_record_names_no_entity_to_send_to(monkeypatch):
    record = make().model_copy(update={"config": {"tracker": {"entity": "them"}}})
    with pytest.raises(UserError, match=r"add tracker\.entity=them"):
        tracker_of(record)
    assert tracker_of(record, ["them"]).entity == "them"
    monkeypatch.setenv("WANDB_ENTITY", "them")
    assert tracker_of(record).entity == "them"


def test_the_page_sent_to_wandb_holds_no_samples_that_stay_at_home(tmp_path, monkeypatch):
    store = Store(tmp_path / "results")
    config = {**make().config, "tracker": {"samples": False, "mode": "offline"}}
    record = make().model_copy(update={"config": config})
    store.write(record, [{"task": "arc_easy", "doc_id": 0, "prompt": "my prompt"}], "")
    shares = []
    monkeypatch.setattr(
        "bench.reporting.html.write_report",
        lambda root, out, share: shares.append((out, share)) or WrittenReport(out, 1, 0, 0),
    )
    monkeypatch.setattr("bench.reporting.wandb_sync.sync_all", lambda *_, **__: [])
    assert main(["track", "--results-dir", str(store.root)]) == 0
    ((out, share),) = shares
    assert share.runs == 0
    assert not out.is_relative_to(store.root)
