"""Tables as CSV, Markdown, LaTeX, HTML and on a terminal: cells, links, headings and marks."""

import csv
import io
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reporting.tables import (
    build_table,
    cell_text,
    load_table_config,
    table_slots,
    writers,
)
from bench.reporting.tables.cell_text import best_cells
from bench.reporting.tables.table import ColumnHead, OurValue, Table, TableCell, TableLine
from bench.reporting.tables.writers import print_table
from tests.reporting.tables.table_records import MODEL, camera, mean_of_nine, metric, recorded


def scored(location, origin, task, limit=None, **more):
    """A record of one task on the given data."""
    record = recorded(3, metric(task, 0.5, **more), limit=limit)
    data = {task: {"origin": origin, "location": location}}
    return record.model_copy(update={"provenance": {"data": data}})


@pytest.mark.parametrize("form", ["md", "tex", "html"])
def test_a_stand_in_column_is_not_called_by_the_real_datas_name(form):
    config = load_table_config("camera_main", "micro")
    slot = next(s for s in table_slots(config) if s.row == "dense")
    english = scored("english", "embedded", "english", name="perplexity")
    text = writers.TABLE_FORMATS[form](build_table(config, {slot: [english]}))
    assert "embedded english perplexity" in text
    assert "Wiki2" not in text
    empty = build_table(config, {})
    assert cell_text.column_text(empty.columns[1]) == "embedded english perplexity"
    rows = writers.table_rows(build_table(config, {slot: [english]}))
    assert {row["column"] for row in rows} == {"avg", "embedded english"}


@pytest.mark.parametrize(
    ("location", "origin", "limit", "head"),
    [
        ("Salesforce/wikitext", "hub", None, "Wiki2 perplexity"),
        ("Salesforce/wikitext", "hub", 10, "wikitext2, limit 10 perplexity"),
        ("/data/prose.txt", "file", None, "wikitext2 from prose.txt perplexity"),
        ("/data/wikitext2.parquet", "file", 5, "wikitext2.parquet, limit 5 perplexity"),
        ("english", "embedded", None, "wikitext2 from embedded english perplexity"),
    ],
)
def test_a_column_says_what_was_scored(location, origin, limit, head):
    config = load_table_config("camera_main")
    record = scored(location, origin, "wikitext2", limit, name="perplexity")
    table = build_table(config, {table_slots(config)[0]: [record]})
    assert cell_text.column_text(table.columns[1]) == head


def test_a_line_says_that_its_network_is_untrained():
    config = load_table_config("wgsef_grid", "micro")
    slot = next(s for s in table_slots(config) if s.row == "dense")
    fresh = MODEL.model_copy(update={"source": "fresh:lenet5"})
    run = recorded(4, metric("digits", 0.1)).model_copy(update={"model": fresh, "methods": ()})
    table = build_table(config, {slot: [run] * len(slot.runs)})
    for form in ("md", "tex", "html"):
        assert "dense (untrained)" in writers.TABLE_FORMATS[form](table)


def written(form):
    table = camera(
        dense=recorded(7, mean_of_nine(0.62)),
        pruned=recorded(0xABC, mean_of_nine(0.59, stderr=0.004)),
        naee=recorded(9, mean_of_nine(0.55), limit=4),
    )
    return table, writers.TABLE_FORMATS[form](table)


def test_csv_has_one_line_per_cell_with_source_and_runs():
    table, text = written("csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(table.lines) * len(table.columns)
    row = next(
        r for r in rows if (r["row"], r["variant"], r["column"]) == ("Camera-P", "40%", "avg")
    )
    assert (row["theirs"], row["source"], row["trust"]) == (
        "58.58",
        "camera_papernotes",
        "secondary",
    )
    assert float(row["ours"]) == pytest.approx(59)
    assert row["runs"] == "000000000abc"
    assert row["inside"] == "True"
    empty = next(r for r in rows if r["row"] == "D2-MoE" and r["variant"] == "40%")
    assert empty["ours"] == ""


def test_markdown_links_cells_to_their_runs():
    table, text = written("md")
    assert "[59.00 ±0.40](../runs/000000000abc/record.json)" in text
    assert "58.58ˢ" in text
    assert "+0.42 in" in text
    assert "not subtracted [1]" in text
    assert "[1] avg: ours covers only the first 4 samples" in text
    assert f"- {table.notes[0]}" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1


def test_latex_is_booktabs_and_escapes_what_latex_would_read():
    _, text = written("tex")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    assert not re.search(r"(?<!\\)[%_&#](?! )", text.replace(" & ", ""))
    assert r"58.58\textsuperscript{s}" in text
    rows = [line for line in text.splitlines() if " & " in line]
    assert {line.replace(r"\&", "").count("&") for line in rows} == {3}
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert r"\label{tab:camera-main}" in text


TEX = next(filter(shutil.which, ("tectonic", "pdflatex")), None)


@pytest.mark.skipif(TEX is None, reason="neither tectonic nor pdflatex is installed")
def test_latex_compiles(tmp_path):
    _, text = written("tex")
    preamble = r"\documentclass{article}\usepackage{booktabs}\usepackage[T1]{fontenc}"
    file = tmp_path / "table.tex"
    file.write_text(f"{preamble}\\begin{{document}}\n{text}\\end{{document}}\n")
    options = ["-interaction=nonstopmode", "-halt-on-error"] if TEX == "pdflatex" else []
    done = subprocess.run([TEX, *options, file], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert file.with_suffix(".pdf").stat().st_size > 1000


@pytest.mark.parametrize(("form", "bold", "plain"), [
    ("tex", r"\textbf{59.00 $\pm$0.40}", r"\textbf{62"),
    ("md", "**[59.00 ±0.40](../runs/000000000abc/record.json)**", "**[62"),
    ("html", '">59.00 ±0.40</a></b>', "<b><a>62"),
])  # fmt: skip
def test_our_best_of_a_variant_is_bold(form, bold, plain):
    # NAEE's number is over other samples, and still the other one that is compared with.
    _, text = written(form)
    assert bold in text
    assert plain not in text


def ours(value):
    return OurValue(float(value), None, None, None, ())


@given(st.lists(st.tuples(st.sampled_from(["", "20%", "40%"]), st.integers(0, 3)), max_size=8),
       st.booleans())  # fmt: skip
def test_the_best_are_those_that_none_of_the_same_variant_beats(lines, lower):
    made = [
        TableLine("s", variant, str(at), (), (TableCell(ours(value)),))
        for at, (variant, value) in enumerate(lines)
    ]
    table = Table("t", "T", False, (ColumnHead("c", "%", lower),), tuple(made), (), ())
    expected = {
        (at, 0)
        for at, (variant, value) in enumerate(lines)
        if variant
        and len(rivals := [v for name, v in lines if name == variant]) > 1
        and value == (min if lower else max)(rivals)
    }
    assert best_cells(table) == expected


def test_html_is_one_whole_page_that_links_to_records():
    from html.parser import HTMLParser

    _, text = written("html")
    stack, links = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "br"):
                stack.append(tag)
            links.extend(value for key, value in attributes if key == "href")

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Reader().feed(text)
    assert stack == []
    assert "../runs/000000000abc/record.json" in links
    assert "<script" not in text
    assert "http" not in text


@pytest.mark.parametrize("width", [70, 400])
def test_nothing_is_cut_on_a_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    config = load_table_config("camera_deepseek_20")
    print_table(build_table(config, {}))
    out = capsys.readouterr().out
    assert "…" not in out
    for value in ("72.45", "69.32ᶜ", "31.46", "12.62", "61.03ˢ"):
        assert value in out
