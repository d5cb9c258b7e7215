"""Shipped tables: their rows, runs and published names, and wrong choices of them."""

import re

import pytest
from omegaconf import OmegaConf

from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.reporting.tables import (
    TableSlot,
    build_table,
    load_table_config,
    table_names,
    table_scales,
    table_slots,
)
from bench.reporting.tables.table_config import MICRO
from bench.security import CONFIG_DIR


@pytest.mark.parametrize("name", [n for n in table_names() if n.startswith(("camera", "dartmoqp"))])
def test_every_method_row_says_what_is_not_like_the_source(name):
    config = load_table_config(name)
    columns = [column.differs for column in config.columns.values()]
    _, *methods = config.rows
    published = {
        row for row in methods if row not in ("random experts", "round to nearest", "BitsMoE-style")
        and config.rows[row].run is not None
    }  # fmt: skip
    assert published
    assert all(config.rows[row].differs or all(columns) for row in published)


@pytest.mark.parametrize("name", ["camera_main", "camera_deepseek_20", "camera_analysis_time"])
def test_all_rows_remove_a_share_of_the_same_whole(name):
    """Also the controls: a share of the experts' weights is less than one of all weights."""
    config = load_table_config(name)
    for slot in table_slots(config):
        ratios = [part for part in slot.runs[0] if part.startswith("ratio=")]
        bases = [part for part in slot.runs[0] if ".base=" in part]
        assert len(bases) == len(ratios), slot


def test_the_dense_baseline_comes_first_in_every_section():
    for name in table_names():
        for scale in table_scales(name):
            config = load_table_config(name, scale)
            for section in config.sections:
                first = next(slot for slot in table_slots(config) if slot.section == section)
                assert first.variant == ""
                assert first.row in ("dense", "original", "vanilla")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", table_names())
def test_runs_of_every_table_compose(name):
    """Each row and each section once; variants differ in numbers only."""
    for scale in table_scales(name):
        ours = [slot for slot in table_slots(load_table_config(name, scale)) if slot.runs]
        rows = {slot.row: slot.runs[0] for slot in ours}
        sections = {slot.section: slot.runs[0] for slot in ours}
        assert rows
        for run in {*rows.values(), *sections.values()}:
            assert "$" not in " ".join(run)
            compose_run_config(list(run))


def test_every_published_name_of_a_table_exists():
    """A misspelt row or column would only be an empty cell."""
    for name in set(table_names()) - {"wgsef_grid"}:
        config = load_table_config(name)
        if config.published is None:
            continue
        table = build_table(config, {})
        ours_alone = {"random experts", "round to nearest", "downsample", "bytes", "dense"}
        if name == "community_tokens":
            ours_alone |= {"PruMerge", "PruMerge+", "PruMerge+ as released", "HiPrune", "VScan"}
            ours_alone |= {"FlowCut"}
            ours_alone |= {"PACT", "VTW", "DyCoke", "HoliTom", "random tokens"}
        if name == "heapr":
            ours_alone |= {"CAMERA-P"}
        elif name == "moe_slimming":
            ours_alone |= {"CAMERA-P", "HEAPr", "MoE-Slimming second order"}
        else:
            ours_alone |= {"HEAPr", "MoNE", "MoE-Slimming", "BitsMoE-style"}
        there = {line.name for line in table.lines}
        assert set(config.rows) - there <= ours_alone
        for place, head in enumerate(table.columns):
            shown = any(line.cells[place].published for line in table.lines)
            unknown = {"OBQA", "RTE", "PIQA", "ARC-c"} if name == "camera_deepseek_20" else set()
            unknown |= {"Wiki2", "bytes"} if name == "camera_q_225" else set()
            assert shown or head.name in unknown, (name, head.name)


def test_counted_costs_are_columns_on_request():
    asked = load_table_config("camera_main", "micro", {"columns": ["avg"], "costs": ["FLOPs"]})
    assert list(asked.columns) == ["avg", "FLOPs"]
    assert asked.columns["FLOPs"].lower_is_better
    assert "FLOPs" not in load_table_config("camera_main", "micro").columns
    with pytest.raises(UserError, match="parameters"):
        load_table_config("camera_main", "micro", {"costs": ["params"]})


@pytest.mark.parametrize(
    ("name", "scale", "chosen", "said"),
    [
        ("camera_man", None, {}, "did you mean 'camera_main'"),
        ("camera_main", "macro", {}, "scale=micro"),
        ("camera_main", None, {"rows": ["Camera"]}, "unknown name in rows 'Camera'"),
        ("camera_main", None, {"sections": ["micro_moe"]}, "unknown name in sections"),
        ("wgsef_cifar10", None, {"rows": ["envelope"]}, "'WGSEF, envelope', dense"),
    ],
)
def test_what_does_not_exist_is_named(name, scale, chosen, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_table_config(name, scale, chosen)


def test_a_line_knows_where_it_is_not_ours():
    community = table_slots(load_table_config("community_tokens"))
    assert TableSlot("LLaVA-1.5-7B, as copied by later papers", "SIEVE", "64", ()) in community
    micro = {
        (s.row, s.variant): s.runs
        for s in table_slots(load_table_config("community_tokens", "micro"))
    }
    assert micro["PyramidDrop", "64"] == ()
    assert micro["PyramidDrop", "192"] != ()


@pytest.mark.parametrize("scale", [None, MICRO])
def test_the_community_table_has_a_row_for_every_method_that_removes_tokens(scale):
    removing = {
        file.stem
        for file in (CONFIG_DIR / "method").glob("*.yaml")
        if str(OmegaConf.load(file).get("_target_")).startswith("methods.token_pruning.")
    }
    ours = [slot for slot in table_slots(load_table_config("community_tokens", scale)) if slot.runs]
    shown = {argument.removeprefix("method=") for slot in ours for argument in slot.runs[0]}
    assert len(removing) > 14 and removing <= shown


@pytest.mark.broad
def test_every_method_of_a_stand_in_fits_its_model():
    from bench.models import loading, source
    from bench.models.structure.model_structure import inspect_model

    anatomies = {}
    for name in table_names():
        if MICRO not in table_scales(name):
            continue
        ours = [slot for slot in table_slots(load_table_config(name, MICRO)) if slot.runs]
        for run in {slot.row: slot.runs[0] for slot in ours}.values():
            config = compose_run_config(list(run))
            if config.model.name not in anatomies:
                network = loading.skeleton(source.resolve_model(config.model, offline=True))
                anatomies[config.model.name] = inspect_model(network)
            for method in config.method.values():
                method.check(anatomies[config.model.name])
    assert set(anatomies) == {"micro_moe", "micro_llava", "micro_resnet"}
