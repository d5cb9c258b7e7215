"""The file as a file: whole, self-contained, from libraries whose origin is known."""

import base64
import gzip
import hashlib
import importlib.resources
import json
import re
from html.parser import HTMLParser

import pytest

from bench.cli import main
from bench.reporting.html import page, write_report
from bench.reporting.html.report import MAX_LIST_LENGTH, run_details, shorten_lists
from tests.reporting.html.synthetic_records import fill, paper_table, record

VENDOR = importlib.resources.files("bench.reporting.html") / "vendor"


class Elements(HTMLParser):
    """Collects scripts by id, and every attribute that would load something."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.plain, self.loads, self.policy = {}, [], [], None
        self._within = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "script":
            self._within = given
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        self.loads += [given[name] for name in ("src", "href") if name in given]

    def handle_data(self, data):
        if self._within is not None and "id" in self._within:
            self.scripts[self._within["id"]] = data
        elif self._within is not None:
            self.plain.append(data)

    def handle_endtag(self, tag):
        if tag == "script":
            self._within = None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    records = fill(root, 6, models=("tiny",))
    (root / "runs" / "broken").mkdir()
    (root / "runs" / "broken" / "record.json").write_text("{")
    return write_report(root), records


def test_the_file_has_every_record_and_says_what_it_could_not_read(written):
    report, records = written
    found = Elements(report.path.read_text())
    index = json.loads(found.scripts["index"])
    assert [run["id"] for run in index["runs"]] == [r.id for r in records[::-1]]
    assert list(index["unreadable"]) == ["broken"]
    details = json.loads(gzip.decompress(base64.b64decode(found.scripts["details-0"])))
    assert {one["id"]: one["command"] for one in details} == {r.id: r.command for r in records}
    assert (report.runs, report.runs_with_samples) == (6, 6)
    assert report.bytes == report.path.stat().st_size


def test_a_run_whose_samples_are_missing_is_not_counted_as_one_with_samples(tmp_path):
    (record,) = fill(tmp_path, 1, models=("tiny",))
    (tmp_path / "runs" / record.id / "samples.parquet").unlink()
    assert str(write_report(tmp_path)).startswith("1 run, 0 with samples, ")


def test_nothing_is_loaded_from_anywhere(written):
    found = Elements(written[0].path.read_text())
    assert found.loads == ["data:,"]
    style = re.search(r"<style>(.*?)</style>", written[0].path.read_text(), re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_names_exactly_the_scripts_of_the_page(written):
    found = Elements(written[0].path.read_text())
    digests = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.plain}
    assert set(re.findall(r"'sha256-([^']+)'", found.policy)) == digests
    assert len(digests) == len(page.vendored_scripts()) + 1


def test_libraries_are_as_released_with_their_licences():
    listed = json.loads((VENDOR / "vendor.json").read_text())
    shipped = {file.name for file in VENDOR.iterdir() if file.name.endswith(".js")}
    assert {entry["file"] for entry in listed} == shipped
    for entry in listed:
        content = (VENDOR / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry["file"]
        licence = (VENDOR / entry["licence_file"]).read_text()
        assert "permission" in licence.lower()
        assert re.fullmatch(r"\d+\.\d+\.\d+", entry["version"])


def test_no_script_can_end_its_own_element():
    for script in (*page.vendored_scripts(), page.app_script()):
        assert "</script" not in script.lower()


def test_the_command_writes_where_it_is_told(written, tmp_path, capsys):
    report, _ = written
    out = tmp_path / "deep" / "my.html"
    root = str(report.path.parent)
    assert main.main(["report", "--results-dir", root, "--out", str(out), "--samples", "0"]) == 0
    assert f"wrote {out} (6 runs, 0 with samples, " in capsys.readouterr().out
    assert json.loads(Elements(out.read_text()).scripts["index"])["runs"][0]["samples"] is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--results-dir", "no/such"], "results_dir=no/such: no such folder"),
        (["--out", "/proc/no/report.html"], "--out=/proc/no/report.html: cannot be written"),
        (["--samples", "-3"], "argument --samples"),
        (["--sample-runs", "many"], "'many' is not a whole number"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, capsys, given, said):
    where = [] if "--results-dir" in given else ["--results-dir", str(tmp_path)]
    assert main.main(["report", *where, *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_papers_table_lights_up(written, tmp_path):
    report, records = written
    table = paper_table(records[1].id)
    asked = []

    def tables(found):
        asked.extend(found)
        return [table]

    again = write_report(report.path.parent, tmp_path / "t.html", tables=tables)
    assert len(asked) == 6
    (shown,) = json.loads(Elements(again.path.read_text()).scripts["index"])["tables"]
    assert shown["lines"][0]["label"] == "CAMERA-P 40 %"
    assert shown["lines"][0]["cells"][0]["ours"] == [61.5, 0.8, records[1].id]


def test_metrics_outside_the_headlines_have_unit_and_identity():
    dense, pruned = record(0), record(1, method="naee")
    mc1 = dense.metrics[1].model_copy(update={"metric": "mc1", "headline": False})
    dense, pruned = (one.model_copy(update={"metrics": (mc1,)}) for one in (dense, pruned))
    (before,), (after,) = run_details(dense)["metrics"], run_details(pruned)["metrics"]
    assert before["percent"]
    assert before["identity"] == after["identity"]
    newer = pruned.model_copy(update={"environment": {"versions": {"lm-eval": "9"}}})
    assert run_details(newer)["metrics"][0]["identity"] != before["identity"]


def test_long_lists_of_a_report_are_cut_and_say_so():
    cut = shorten_lists({"a": list(range(MAX_LIST_LENGTH + 7)), "b": [1, 2]})
    assert cut["b"] == [1, 2]
    assert cut["a"][:MAX_LIST_LENGTH] == list(range(MAX_LIST_LENGTH))
    assert cut["a"][MAX_LIST_LENGTH:] == ["7 more in record.json"]
