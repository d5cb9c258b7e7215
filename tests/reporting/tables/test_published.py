"""The published numbers: whole, as shipped, each with a source, and in the package."""

import csv
import tomllib
from decimal import Decimal
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.reporting.tables import published
from bench.reporting.tables.numbers import UNITS

ROOT = Path(__file__).parents[3]
ALL = [
    (name, cell) for name in published.published_names() for cell in published.read_published(name)
]


def test_every_file_is_as_it_was_shipped():
    files = {path.name for path in (ROOT / "results" / "published").glob("*.csv")}
    assert set(published.released_checksums()) == files
    for name in files:
        assert published._verified_text(name)


def test_an_edited_or_unlisted_file_is_refused(tmp_path, monkeypatch):
    for path in (ROOT / "results" / "published").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "yopo.csv").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(published, "PUBLISHED_DIR", tmp_path)
    with pytest.raises(UserError, match=r"yopo\.csv was modified"):
        published._verified_text("yopo.csv")
    (tmp_path / "added.csv").write_text("paper,")
    with pytest.raises(UserError, match=r"added\.csv is not listed in SHA256SUMS"):
        published._verified_text("added.csv")
    assert published._verified_text("camera.csv").startswith("paper,")


def test_every_cell_has_a_place_a_source_and_a_number():
    rows = csv.DictReader(published._verified_text(published.SOURCES).splitlines())
    known = {row["source"] for row in rows if row["about"]}
    assert len(ALL) > 1500
    for _, cell in ALL:
        assert cell.paper
        assert cell.table
        assert cell.row
        assert cell.column
        assert cell.source in known
        assert cell.value.is_finite()
    assert {cell.source for _, cell in ALL} == known


def test_no_source_gives_a_cell_twice():
    places = [(name, cell.paper, cell.table, *cell.position, cell.source) for name, cell in ALL]
    assert len(places) == len(set(places))


def test_accuracies_are_in_their_range():
    accuracies = [c for _, c in ALL if c.metric in ("acc", "acc_norm", "mean", "exact_match")]
    assert len(accuracies) > 300
    for cell in accuracies:
        if cell.unit == "%":
            assert 1 < cell.value <= 100
        elif cell.unit == "share":
            assert 0 < cell.value <= 1


def test_a_missing_number_is_a_missing_cell():
    main = published.published_cells("camera", ["main"])
    assert ("Qwen3-30B-A3B", "Camera-P", "20%", "avg") in main
    assert ("Qwen3-30B-A3B", "Camera-P", "40%", "avg") not in main
    assert ("DeepSeek-MoE-16B", "dense", "", "avg") not in main
    assert published.read_published("wgsef") == ()


@pytest.mark.parametrize(
    ("file", "table", "place", "printed"),
    [
        ("camera", "main", ("DeepSeek-MoE-16B", "Camera-P", "40%", "avg"), "58.58"),
        ("camera", "deepseek_20", ("DeepSeek-MoE-16B", "D2-MoE", "20%", "BoolQ"), "69.32"),
        ("camera", "quantization", ("DeepSeek-MoE-16B", "Camera-Q", "2.25 bits", "avg"), "56.56"),
        ("camera", "analysis_time", ("Qwen2-57B-A14B", "Camera-P", "", "time"), "< 5"),
        ("dartmoqp", "two_bits", ("OLMoE-1B-7B", "TQ+Camera", "2.25 bits", "avg"), "0.637"),
        ("yopo", "table2", ("LLaVA-1.5-7B", "YOPO 12%", "", "MME"), "1429.6"),
        ("yopo", "table2", ("LLaVA-1.5-13B", "YOPO 25%", "", "VQAv2"), "78.9"),
        ("yopo", "figure7", ("Qwen2-VL-7B", "pruned", "", "score"), "74.865"),
        ("community_tokens", "community", ("LLaVA-1.5-7B", "DART", "192", "GQA"), "60.0"),
        ("community_tokens", "one_roof", ("LLaVA-1.5-7B", "FastV", "64", "POPE"), "36.1"),
    ],
)
def test_digits_are_those_that_were_printed(file, table, place, printed):
    assert published.published_cells(file, [table])[place].text == printed


def test_suspicious_cells_are_flagged():
    flagged = {
        cell.position: cell.flag
        for cell in published.read_published("yopo")
        if cell.table == "table2"
    }
    odd = ("LLaVA-1.5-7B", "PyramidDrop", "", "MME")
    assert "repeats" in flagged[odd]
    assert flagged["LLaVA-1.5-7B", "FastV", "", "MME"] == ""


def test_the_most_trusted_source_stands():
    both = [
        cell for cell in published.read_published("camera")
        if cell.position == ("DeepSeek-MoE-16B", "Camera-P", "20%", "Wiki2")
    ]  # fmt: skip
    assert {cell.trust for cell in both} == {"secondary", "authors_code"}
    assert len({cell.value for cell in both}) == 1
    chosen = published.published_cells("camera", ["main", "deepseek_20"])[both[0].position]
    assert chosen.trust == "authors_code"


def test_the_dense_average_follows_from_its_row():
    row = published.published_cells("camera", ["openpangu"])
    tasks = ("BoolQ", "OBQA", "RTE", "Wino", "Hella", "PIQA", "MathQA", "ARC-e", "ARC-c")
    for name, setting in (("dense", ""), ("Camera-P", "20%"), ("Camera-P + Wanda", "36%")):
        place = ("openPangu-Embedded-7B-V1.1", name, setting)
        mean = sum((row[*place, task].value for task in tasks), Decimal(0)) / len(tasks)
        assert abs(mean - row[*place, "avg"].value) <= Decimal("0.0051")


def test_units_that_tables_convert_are_known():
    units = {cell.unit for name, cell in ALL if cell.table in ("main", "table2", "community")}
    assert {"%", "perplexity", "points", "T"} <= units
    assert {"%", "perplexity", "points", "T", "share", "s", "min", "h"} <= set(UNITS)


def test_an_unknown_file_is_named_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'camera'"):
        published.read_published("camra")


def test_the_numbers_ship_inside_the_wheel():
    from setuptools import find_namespace_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    include = settings["packages"]["find"]["include"]
    packages = set(find_namespace_packages(str(ROOT), include=include))
    assert {"results.published", "hydra_plugins", "conf.table", "conf.hydra.sweeper"} <= packages
    assert {name for name in packages if name.startswith("results")} == {"results.published"}
    assert settings["package-data"]["results.published"] == ["*.csv", "SHA256SUMS"]


def test_the_files_are_plain_tables():
    for path in (ROOT / "results" / "published").glob("*.csv"):
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        assert {len(row) for row in rows} == {len(rows[0])}
