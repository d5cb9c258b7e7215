"""A page of results in Markdown, from the records of a table: numbers, paired tests, gaps.

A page is read without its records, so it states its basis: dates, commits, machine, weights, data,
and the lines that were not run. Its findings come first; they are only the differences that are
significant in a paired test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

from bench.errors import UserError
from bench.records.record import AVERAGE
from bench.reporting.record_numbers import benchmark_text, model_text
from bench.reporting.tables import cell_text
from bench.reporting.tables.builder import build_table
from bench.reporting.tables.table_config import TableConfig, TableSlot, table_slots
from bench.ui import format_quantity

if TYPE_CHECKING:
    import pandas as pd

    from bench.records import Record
    from bench.reporting.comparison import Contrast
    from bench.reporting.comparison.seeds import SeedContrast
    from bench.reporting.tables.table import ColumnHead, Table, TableLine

FoundRecords: TypeAlias = "Mapping[TableSlot, Sequence[Record]]"
ReadSamples: TypeAlias = "Callable[[str], pd.DataFrame]"
"""Returns the scored samples of a run by its id, one row per sample."""
UNKNOWN = "not recorded"
LIBRARIES = ("torch", "transformers", "lm-eval", "lmms-eval")


def results_page(
    config: TableConfig, slot_records: FoundRecords, samples: ReadSamples, command: str
) -> str:
    """Return the page of a table with the records of its lines.

    `command` is the command that writes the page again.

    Raises:
        UserError: no line has a record.
    """
    records = list(
        {record.id: record for kept in slot_records.values() for record in kept}.values()
    )
    if not records:
        raise UserError(
            f"table {config.name} has no record here, so there is nothing to write: run "
            f"`bench table {config.name}` first, or name its folder by results_dir=FOLDER"
        )
    table, families = (
        build_table(config, slot_records),
        list(_families(config, slot_records, samples)),
    )
    parts = [
        f"# {cell_text.heading_text(table)}",
        *_seed_findings(families),
        *_findings(families),
        *([config.about.strip()] if config.about else []),
        f"Written by `{command}` from {len(records)} records; manual edits will be lost.",
        _pipe_table(("", ""), _basis_rows(records)),
        *_numbers(table),
        *_caveats(config, records),
        *_seed_comparisons(families),
        *_comparisons(families),
        *_gaps(config, slot_records),
    ]
    return "\n\n".join(parts) + "\n"


def _pipe_table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """Return a table in Markdown whose last `numbers` columns are right-aligned."""
    rules = ["---"] * (len(heads) - numbers) + ["---:"] * numbers
    lines = [heads, rules, *([text.replace("|", r"\|") for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _basis_rows(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """Yield the basis of the numbers; if runs differ, every distinct value is listed."""

    def each(read: Callable[[Record], str]) -> str:
        return "; ".join(dict.fromkeys(map(read, records)))

    times = sorted(_minute(record.started) for record in records)
    yield "runs", f"{times[0]} to {times[-1]} UTC"
    yield "commit", each(lambda record: str(record.provenance.get("git_commit") or UNKNOWN))
    yield "machine", each(_machine_text)
    yield "model", each(lambda r: f"{model_text(r)}, {r.config['model'].get('dtype')}")
    yield "benchmark", each(benchmark_text)
    for name, settings in records[0].config["benchmark"].get("perplexity", {}).items():
        windows = {metric.n for r in records if (metric := r.metric(name)) is not None}
        counts = " or ".join(map(str, sorted(windows)))
        yield name, f"{counts} windows of {settings.get('window')} tokens"
    calibrated = [r for r in records if r.provenance.get("calibration") is not None]
    if calibrated:
        yield "calibration", "; ".join(dict.fromkeys(map(_calibration_text, calibrated)))
    yield "libraries", each(_libraries_text)


def _minute(moment: str) -> str:
    """Return the date and time of an ISO timestamp in UTC, to the minute."""
    return datetime.fromisoformat(moment).astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _machine_text(record: Record) -> str:
    about = record.environment
    device = ", ".join(about.get("gpus") or ()) or about.get("cpu") or UNKNOWN
    memory = about.get("memory_bytes")
    size = f", {format_quantity(memory)}B" if memory else ""
    return f"{device}, cores: {about.get('cores')}, threads: {about.get('threads')}{size}"


def _calibration_text(record: Record) -> str:
    about = record.config["calibration"]
    return f"{about.get('rows')} rows of {about.get('length')} tokens of {about.get('name')}"


def _libraries_text(record: Record) -> str:
    versions = record.environment.get("versions", {})
    return ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if versions.get(name))


def _numbers(table: Table) -> Iterator[str]:
    """Yield one table of numbers per section, and the meaning of the marks."""
    heads = ["", *(_head_text(head) for head in table.columns), "run"]
    sections = cell_text.lines_by_section(table)
    for section, lines in sections:
        yield f"## {section}" if len(sections) > 1 else "## Numbers"
        rows = [list(_line_texts(table.columns, line)) for line in lines if line.runs]
        yield _pipe_table(heads, rows, numbers=len(heads) - 1)
    seeds = any(len(line.runs) > 1 for line in table.lines)
    or_seeds = ", or of the mean over seeds in lines whose networks differ" if seeds else ""
    yield f"± is one standard error over the samples{or_seeds}; - marks a missing number."


def _caveats(config: TableConfig, records: Iterable[Record]) -> Iterator[str]:
    """Yield the caveats of the costs in the columns, each with its runs."""
    shown = {(c.quantity, c.scope) for c in config.columns.values() if c.quantity is not None}
    runs: dict[str, dict[str, None]] = {}
    for record in records:
        for cost in record.headline_costs:
            if cost.note and (cost.quantity, cost.scope.partition(" ")[0]) in shown:
                # A cost may have several caveats, some of them shared with other runs.
                for note in cost.note.split("; "):
                    runs.setdefault(note, {})[f"`{record.id[:8]}`"] = None
    if runs:
        yield "\n".join(f"- {', '.join(ids)}: {note}" for note, ids in runs.items())


def _head_text(head: ColumnHead) -> str:
    return f"{head.name} %" if head.unit == "%" else head.name


def _line_texts(columns: Sequence[ColumnHead], line: TableLine) -> Iterator[str]:
    yield cell_text.line_text(line)
    for head, cell in zip(columns, line.cells, strict=True):
        yield cell_text.our_text(cell.ours, head)
    yield ", ".join(f"`{run[:8]}`" for run in line.runs)


@dataclass(frozen=True)
class _Family:
    """The paired tests of some lines, named by their runs, against one line.

    `texts` are the tasks whose samples are windows of a text. `over_seeds` are the tests of the
    lines with several seeds.
    """

    base: str
    texts: frozenset[str]
    names: Mapping[str, str]
    contrasts: Sequence[Contrast]
    refused: Sequence[str]
    over_seeds: Sequence[SeedContrast]


def _families(
    config: TableConfig, slot_records: FoundRecords, samples: ReadSamples
) -> Iterator[_Family]:
    """Yield the tests of every line against the dense one, then those in the table's config."""
    slots = [slot for slot in table_slots(config) if slot_records.get(slot)]
    dense = [slot for slot in slots if slot_records[slot][0].is_dense]
    for base in dense:
        others = [slot for slot in slots if slot.section == base.section and slot != base]
        yield from _family(base, others, slot_records, samples)
    for row, rivals in config.against.items():
        for base in slots:
            place = (base.section, base.variant)
            others = [s for s in slots if (s.section, s.variant) == place and s.row in rivals]
            if base.row == row:
                yield from _family(base, others, slot_records, samples)


def _family(
    base: TableSlot, others: Sequence[TableSlot], slot_records: FoundRecords, samples: ReadSamples
) -> Iterator[_Family]:
    """Yield the tests of some lines against one line, on the average and on perplexities.

    A single task has no average and stands for itself.
    """
    from bench.reporting.comparison import ComparedRun, compare
    from bench.reporting.comparison.seeds import comparable, contrasts_over_seeds

    def with_samples(slot: TableSlot) -> ComparedRun:
        # The first seed represents a line of several seeds, because samples are paired, not means.
        record = slot_records[slot][0]
        return ComparedRun(record, samples(record.id))

    if not others:
        return
    compared = compare(with_samples(base), [with_samples(slot) for slot in others])
    names = {slot_records[slot][0].id: _slot_text(slot) for slot in others}
    texts = frozenset(compared.baseline.config["benchmark"].get("perplexity", {}))
    averaged = any(c.task == AVERAGE for c in compared.contrasts)
    kept = [c for c in compared.contrasts if c.task in {AVERAGE, *texts} or not averaged]
    series = {
        _slot_text(slot): [r for r in slot_records[slot] if comparable(r, compared.baseline)]
        for slot in (base, *others)
    }
    over_seeds = contrasts_over_seeds(series, _slot_text(base))
    yield _Family(_slot_text(base), texts, names, kept, compared.refused, over_seeds)


def _findings(families: Sequence[_Family]) -> Iterator[str]:
    """Yield the number of samples, and who is significantly better or worse than whom."""
    from bench.reporting.comparison.printer import SIGNIFICANCE_LEVEL, signed_text

    contrasts = [(family, c) for family in families for c in family.contrasts]
    if not contrasts:
        return
    samples: dict[str, set[int]] = {}
    for family, each in contrasts:
        unit = "windows" if each.task in family.texts else "samples"
        kind = "documents" if each.task == AVERAGE else f"{unit} of {each.task}"
        samples.setdefault(kind, set()).add(each.n)
    basis = " and ".join(
        f"{' or '.join(map(str, sorted(counts)))} {kind}" for kind, counts in samples.items()
    )
    significant = [
        (family, c)
        for family, c in contrasts
        if c.p_holm is not None and c.p_holm < SIGNIFICANCE_LEVEL
    ]
    scope = (
        f"Over the samples ({basis}) of the first seed alone: of"
        if any(family.over_seeds for family in families)
        else f"This page is based on {basis}. Of"
    )
    verdict = _verdict(len(significant))
    yield f"{scope} {len(contrasts)} paired differences, {verdict}{':' if significant else '.'}"
    grouped: dict[tuple[str, str], dict[str, list[str]]] = {}
    for family, c in significant:
        group = grouped.setdefault((_number_name(c), family.base), {"better": [], "worse": []})
        group["better" if c.better else "worse"].append(
            f"{family.names[c.run]} ({signed_text(c, c.difference)})"
        )
    lines = [
        f"- {number} against {base}: "
        + "; ".join(f"{side}: {', '.join(names)}" for side, names in group.items() if names)
        for (number, base), group in grouped.items()
    ]
    if lines:
        yield "\n".join(lines)


def _verdict(count: int) -> str:
    from bench.reporting.comparison.printer import SIGNIFICANCE_LEVEL

    verb = "are" if count > 1 else "is"
    return (
        f"{count or 'none'} {verb} significant (p below {SIGNIFICANCE_LEVEL:g} after Holm's "
        "correction)"
    )


def _seed_findings(families: Sequence[_Family]) -> Iterator[str]:
    """Yield what holds over seeds, which samples of one seed cannot tell."""
    from bench.reporting.comparison.printer import SIGNIFICANCE_LEVEL

    contrasts = [c for family in families for c in family.over_seeds]
    if not contrasts:
        return
    significant = sum(c.p_holm < SIGNIFICANCE_LEVEL for c in contrasts)
    pairs = sorted({c.pairs for c in contrasts})
    lines = []
    for family in families:
        one_sided: dict[str, list[str]] = {"better": [], "worse": []}
        for c in family.over_seeds:
            if c.one_sided:
                mark = ", significant" if c.p_holm < SIGNIFICANCE_LEVEL else ""
                one_sided["better" if c.better else "worse"].append(
                    f"{c.series} ({c.difference_text}{mark})"
                )
        lines += [
            f"- {side} than {family.base}: {', '.join(names)}"
            for side, names in one_sided.items()
            if names
        ]
    yield (
        f"This page is based on {' or '.join(map(str, pairs))} seeds. Of {len(contrasts)} "
        f"differences in pairs of seeds, {_verdict(significant)}. With {pairs[-1]} pairs, p "
        f"is at least {2 / 2 ** pairs[-1]:.2g} before the correction. "
        f"{'These' if lines else 'None'} have the same sign with every seed{':' if lines else '.'}"
    )
    if lines:
        yield "\n".join(lines)


def _seed_comparisons(families: Sequence[_Family]) -> Iterator[str]:
    """Yield every test over seeds."""
    if not any(family.over_seeds for family in families):
        return
    yield "## Over seeds"
    yield (
        "Differences in pairs with the same seed: mean and standard deviation over the pairs, and "
        "p of the exact sign-flip test, corrected by Holm within a table."
    )
    for family in families:
        if family.over_seeds:
            yield f"### Over seeds, against {family.base}"
            yield _pipe_table(
                ("", "number", "pairs", "mean", "difference ± sd", "p"),
                (
                    (
                        c.series,
                        c.metric,
                        str(c.pairs),
                        c.number_text(c.mean),
                        c.difference_text,
                        f"{c.p_holm:.3f}",
                    )
                    for c in family.over_seeds
                ),
                numbers=4,
            )


def _comparisons(families: Sequence[_Family]) -> Iterator[str]:
    """Yield every paired test."""
    from bench.reporting.comparison.printer import difference_text, least_text, p_text

    yield "## Paired tests"
    yield (
        "Differences are paired by sample, with a 95 % bootstrap interval; p is corrected by Holm "
        "within a table. *detectable* is the difference that these samples detect with 80 % "
        "power: if p is above 0.05, smaller ones cannot be ruled out. With fewer than six samples, "
        "no difference is significant at the 5 % level."
    )
    for family in families:
        yield f"### Against {family.base}"
        yield _pipe_table(
            ("", "number", "samples", "difference [95 %]", "p", "detectable"),
            (
                (
                    family.names[c.run],
                    _number_name(c),
                    str(c.n),
                    difference_text(c),
                    p_text(c.p_holm),
                    least_text(c),
                )
                for c in family.contrasts
            ),
            numbers=4,
        )
        if family.refused:
            yield "\n".join(f"- {sentence}" for sentence in family.refused)


def _number_name(row: Contrast) -> str:
    return "mean of the tasks, %" if row.task == AVERAGE else f"{row.task} {row.metric}"


def _slot_text(slot: TableSlot) -> str:
    return f"{slot.row} {slot.variant}".rstrip()


def _gaps(config: TableConfig, slot_records: FoundRecords) -> Iterator[str]:
    """Yield the lines that have no record."""
    missing = [slot for slot in table_slots(config) if slot.runs and not slot_records.get(slot)]
    yield "## Not run"
    if missing:
        yield "\n".join(f"- {_slot_text(slot)}" for slot in missing)
    else:
        yield "Every line of the table was run."
