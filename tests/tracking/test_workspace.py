"""The workspace that W&B shows: charts of columns that runs have, described without a server."""

import json
import sys

import pytest

from bench.cli.main import main
from bench.schema import TrackerConfig
from bench.tracking.tracker import track_workspace
from bench.tracking.wandb_run import summary_columns
from bench.tracking.workspace import NAME, build_workspace, save_workspace, workspace_content
from tests.reporting.html.synthetic_records import fill, record
from tests.tracking.test_wandb_live import checked

ONLINE = TrackerConfig(kind="wandb", mode="online", project="p", entity="me")


@pytest.fixture
def library():
    return pytest.importorskip("wandb_workspaces.workspaces", reason="slimbench[workspace]")


@pytest.fixture(scope="module")
def records():
    return [record(0), checked(record(1, method="naee")), record(2, method="camera_p")]


def test_every_chart_and_column_is_one_that_a_run_sends(records):
    content = workspace_content(records)
    sent = {name for each in records for name in summary_columns(each)} | {"dense_ratio"}
    panels = [panel for panels in content.sections.values() for panel in panels]
    assert {name for panel in panels for name in (panel.x, panel.y)} <= sent
    assert {*content.tasks, *content.columns} <= sent
    assert [panel.x for panel in content.sections["Pareto"]] == [
        "flops", "parameters", "bytes", "seconds",
    ]  # fmt: skip
    assert [panel.x for panel in content.sections["Savings"]] == ["flops_saving", "bytes_saving"]


def test_numbers_that_no_run_has_get_no_chart(records):
    bare = records[0].model_copy(update={"costs": ()})
    assert workspace_content([bare]).sections == {}
    assert "score" in workspace_content([bare]).columns


def test_the_first_section_is_score_against_cost(library, records):
    made = build_workspace(workspace_content(records), "me", "p")
    view = json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    bank = view["section"]["panelBankConfig"]
    first = bank["sections"][0]
    assert (first["name"], first["isOpen"]) == ("Pareto", True)
    axes = [(panel["config"]["xAxis"], panel["config"]["yAxis"]) for panel in first["panels"]]
    assert axes[0] == ("summary:flops", "summary:score")
    assert first["panels"][0]["viewType"] == "Scatter Plot"
    (runs,) = view["section"]["runSets"]
    assert runs["sort"]["keys"] == [
        {"key": {"section": "summary", "name": "score"}, "ascending": False}
    ]
    assert "summary:score" in runs["runFeed"]["columnPinned"]
    assert "jobType" in json.dumps(runs["filters"])


def test_it_is_saved_again_over_itself(library, records, tmp_path, monkeypatch):
    kept = {}

    def save(workspace):
        workspace._internal_name = workspace._internal_name or f"view{len(kept)}"
        kept[workspace._internal_name] = workspace
        return workspace

    monkeypatch.setattr(library.Workspace, "save", save)
    monkeypatch.setattr(
        library.Workspace, "url", property(lambda one: f"https://w/me/p?nw={one._internal_name}")
    )
    monkeypatch.setattr(
        library.Workspace, "from_url", classmethod(lambda _, url: kept[url.partition("nw=")[2]])
    )
    first = save_workspace(records[:1], ONLINE, tmp_path)
    assert save_workspace(records, ONLINE, tmp_path) == first
    assert list(kept) == ["view0"]
    assert [section.name for section in kept["view0"].sections] == ["Pareto", "Savings", "Tasks"]
    # Somebody removed it in W&B.
    kept.clear()
    save_workspace(records, ONLINE, tmp_path)
    assert kept["view0"].name == NAME
    # A results folder from elsewhere names a view of another project, which stays as it is.
    foreign = kept["view0"] = build_workspace(workspace_content([]), "me", "theirs")
    foreign._internal_name = "view0"
    assert save_workspace(records, ONLINE, tmp_path).endswith("view1")
    assert foreign.sections == []


def test_offline_it_is_one_sentence(records, tmp_path):
    said = track_workspace(records, TrackerConfig(kind="wandb", mode="offline"), tmp_path)
    assert "only on W&B's server" in said
    assert list(tmp_path.iterdir()) == []


def test_it_is_asked_for_of_a_whole_project(tmp_path, capsys):
    (made,) = fill(tmp_path, 1, per_task=0, models=("tiny",))
    assert main(["track", made.id, "--workspace", "--results-dir", str(tmp_path)]) == 2
    assert "give no RUN" in capsys.readouterr().err
    assert not (tmp_path / "wandb_home").exists()


def test_a_missing_library_is_said_before_anything_is_sent(tmp_path, capsys, monkeypatch):
    fill(tmp_path, 1, per_task=0, models=("tiny",))
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["track", "--workspace", "--results-dir", str(tmp_path)]) == 2
    assert "slimbench[workspace]" in capsys.readouterr().err
    assert not (tmp_path / "wandb_home").exists()
