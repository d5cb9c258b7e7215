"""Print a comparison: one table per candidate, then power, refusals and flips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.records import Record
from bench.records.record import AVERAGE
from bench.reporting.comparison.comparison import Comparison
from bench.reporting.comparison.contrast import Contrast
from bench.reporting.comparison.flips import Flip
from bench.reporting.record_numbers import (
    PERCENT_METRICS,
    benchmark_text,
    distinct_labels,
    metric_scale,
    model_text,
)
from bench.ui import console, terminal_table, widest_fitting

COLUMNS = ("difference [95 %]", "gained / lost", "p (Holm)", "detectable", "retained %")
MAX_PROMPT_CHARS = 700
"""Maximum number of characters of a prompt, counted from its end, where the question is."""
SIGNIFICANCE_LEVEL = 0.05


def print_comparison(
    comparison: Comparison,
    flips: Sequence[Flip] = (),
    # Immutable, because a default value is shared by all calls.
    pictures: Mapping[str, Sequence[Path]] = MappingProxyType({}),
) -> None:
    """Print every candidate's table, the power, refused numbers, and flips.

    `pictures` maps image hashes to the files of the flips' images.
    """
    out = console()
    labels = distinct_labels((comparison.baseline, *comparison.candidates))
    for record in comparison.candidates:
        rows = [c for c in comparison.contrasts if c.run == record.id]
        if rows:
            for table in _tables(comparison.baseline, record, rows, labels, out):
                out.print(table)
    for sentence in power_sentences(comparison):
        out.print(sentence)
    for note in dict.fromkeys(c.note for c in comparison.contrasts if c.note):
        tasks = dict.fromkeys(c.task for c in comparison.contrasts if c.note == note)
        out.print(f"{', '.join(tasks)}: {note}")
    for sentence in comparison.refused:
        out.print(sentence)
    for flip in flips:
        _print_flip(out, flip, pictures.get(flip.image or "", ()))


def power_sentences(comparison: Comparison) -> list[str]:
    """Return a sentence per candidate on the smallest difference that could have been detected.

    Only contrasts without a significant difference are used; among tasks with the same unit, the
    one with the least power is reported.
    """
    sentences = []
    for record in comparison.candidates:
        worst: dict[tuple[bool, str], Contrast] = {}
        for row in comparison.contrasts:
            if row.run == record.id and row.detectable and (row.p or 0.0) > SIGNIFICANCE_LEVEL:
                # Points and perplexities cannot be compared with each other, and an average usually
                # has more power than its tasks.
                kind = (row.task == AVERAGE, _unit(row))
                worst[kind] = max(worst.get(kind, row), row, key=lambda c: c.detectable or 0.0)
        sentences += [_power_sentence(record, row) for row in worst.values()]
    return sentences


def _power_sentence(record: Record, row: Contrast) -> str:
    assert row.detectable is not None
    return (
        f"{record.label} ({record.id[:8]}), {row.task}: a difference below "
        f"{_number(row, row.detectable)}{_unit(row)} cannot be detected with {row.n} samples "
        "(power below 80 % at the 5 % level)"
    )


def _tables(
    baseline: Record,
    candidate: Record,
    rows: Sequence[Contrast],
    labels: Mapping[str, str],
    out: Console,
) -> Iterator[Table]:
    """Yield a candidate's table, split by columns if the console is too narrow."""
    own, other = labels[candidate.id], labels[baseline.id]
    models = " against ".join(dict.fromkeys((model_text(candidate), model_text(baseline))))
    title = f"{own} against {other}: {models} on {benchmark_text(candidate)}"
    # Knobs on separate lines keep the columns narrow.
    names = [f"{labels[r.id]}\n{r.id[:8]}".replace(", ", "\n") for r in (baseline, candidate)]
    columns = (*names, *COLUMNS)

    def part(first: int, count: int) -> Table:
        table = terminal_table(columns[first : first + count], None if first else title)
        for row in rows:
            label, *cells = _cells(row)
            shown = cells[first : first + count]
            table.add_row(label, *shown, end_section=row.task == AVERAGE)
        return table

    first = 0
    while first < len(columns):
        table, count = widest_fitting(partial(part, first), len(columns) - first, out)
        yield table
        first += count


def _cells(row: Contrast) -> list[str | Text]:
    percent = " %" if row.metric in PERCENT_METRICS else ""
    return [
        f"{row.task} {row.metric}{percent}",
        _number(row, row.baseline),
        _number(row, row.candidate),
        _colour_difference(row, difference_text(row)),
        "-" if row.gained is None else f"+{row.gained} / -{row.lost}",
        p_text(row.p_holm),
        least_text(row),
        _retention_text(row),
    ]


def _retention_text(row: Contrast) -> str:
    if row.retention is None:
        return "-"
    return f"{row.retention:.1f} [{row.retention_low:.1f}, {row.retention_high:.1f}]"


def _colour_difference(row: Contrast, text: str) -> Text:
    """Colour a significant difference green if it is better, red if it is worse."""
    if row.p_holm is None or row.p_holm > SIGNIFICANCE_LEVEL:
        return Text(text)
    return Text(text, style="green" if row.better else "red")


def difference_text(row: Contrast) -> str:
    """Return candidate minus baseline with its 95 % interval, as `-3.1 [-5.0, -1.2]`."""
    text = signed_text(row, row.difference)
    if row.low is None or row.high is None:
        return text
    return f"{text} [{signed_text(row, row.low)}, {signed_text(row, row.high)}]"


def least_text(row: Contrast) -> str:
    """Return the difference that the samples detect with 80 % power."""
    return "-" if row.detectable is None else _number(row, row.detectable)


def p_text(value: float | None) -> str:
    """Return a p-value with three decimals."""
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _number(row: Contrast, value: float) -> str:
    factor, digits = metric_scale(row.metric)
    return f"{value * factor:.{digits}f}"


def signed_text(row: Contrast, value: float) -> str:
    """Return a difference of a metric with its sign, in points if the metric is a fraction."""
    factor, digits = metric_scale(row.metric)
    return f"{value * factor:+.{digits}f}"


def _unit(row: Contrast) -> str:
    return " points" if row.metric in PERCENT_METRICS else ""


def _print_flip(out: Console, flip: Flip, pictures: Sequence[Path]) -> None:
    verdict = "lost" if flip.lost else "gained"
    where = f" of {flip.source}" if flip.source else ""
    out.rule(f"{verdict}: {flip.task} document {flip.document}{where}, run {flip.run[:8]}")
    for path in pictures:
        out.print(f"image  {path}", soft_wrap=True)
    if flip.image and not pictures:
        out.print(f"image  SHA-256 {flip.image}")
    if flip.prompt:
        cut = "… " if len(flip.prompt) > MAX_PROMPT_CHARS else ""
        out.print(cut + flip.prompt[-MAX_PROMPT_CHARS:])
    scores = (flip.baseline_score, flip.candidate_score)
    out.print(f"target        {flip.target}")
    out.print(f"baseline      {flip.baseline_answer}  ({scores[0]:g})")
    out.print(f"candidate     {flip.candidate_answer}  ({scores[1]:g})")
