"""The table of measured costs: every number in its place, every gap with its reason."""

import pytest

from bench.records.record import AppliedMethod, Cost, DenseModel, MissingMeasurement, Record
from bench.reporting.cost_table import format_duration, print_costs
from bench.reporting.summary import print_summary

PREFILL, DECODE = "prefill 1x512", "decode 1x512"
MODEL = DenseModel(
    name="tiny", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)


def cost(scope, quantity, value, unit="s", note=None, **parts):
    return Cost(
        scope=scope, quantity=quantity, unit=unit, value=value, how="measured", parts=parts,
        note=note,
    )  # fmt: skip


def latency(scope, value, note=None):
    spread = {"p10": 0.9 * value, "p50": value, "p90": 1.1 * value}
    dense = {f"dense_{name}": 2 * taken for name, taken in spread.items()}
    return cost(scope, "latency", value, note=note, **spread, **dense)


def recorded(*costs, missing=(), effect="removed"):
    method = AppliedMethod(name="cut", config={}, effect=effect, report={}, seconds=1)
    return Record(
        id="abcdef012345", started="", finished="", sweep=None, command="",
        config={"benchmark": {"name": "exam"}}, environment={"threads": 1}, model=MODEL,
        methods=(method,), metrics=(), costs=costs, missing=missing, provenance={},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def line(out, start):
    (found,) = [row for row in out.splitlines() if row.strip().startswith(start)]
    return found


def test_a_gain_stands_beside_what_theory_promised(capsys):
    record = recorded(
        latency(PREFILL, 0.02),
        cost(PREFILL, "speedup", 1.5, "1", low=1.45, high=1.55, theory=2.0),
        cost(PREFILL, "realised_speedup_fraction", 2 / 3, "1", low=0.6, high=0.7),
        cost(PREFILL, "roofline_efficiency", 0.41, "1"),
        cost(PREFILL, "peak_bytes", 2e7, "B"),
        cost("model", "disk_bytes", 5e6, "B"),
        cost(DECODE, "cache_bytes_per_token", 4096, "B"),
        cost("device", "matrix_rate", 1e11, "FLOP/s"),
        latency(DECODE, 0.001),
    )
    print_costs(record)
    out = capsys.readouterr().out
    row = line(out, PREFILL)
    for part in (
        "20 (18 to 22) ms", "40 (36 to 44) ms", "1.500 (1.450 to 1.550)", "2.000",
        "67 %", "41 %", "20.00 MB",
    ):  # fmt: skip
        assert part in row
    assert "energy" not in out
    assert "on disk 5.00 MB; cache per generated token 4.10 kB" in out
    assert "matrix product 100.00 GFLOP/s" in out
    print_summary([record])
    assert "1.50 (67 %)" in line(capsys.readouterr().out, f"{PREFILL} speed-up (of theory)")


def test_gaps_have_their_reasons_and_a_loaded_machine_a_mark(capsys):
    missing = (
        MissingMeasurement(scope=PREFILL, quantity="speedup", reason="masked"),
        MissingMeasurement(
            scope="1x512", quantity="energy", reason="this GPU has no energy counter"
        ),
        MissingMeasurement(
            scope="8x512", quantity="energy", reason="this GPU has no energy counter"
        ),
    )
    note = "the machine was loaded: others kept 0.7 of 1 cores"
    record = recorded(latency(PREFILL, 0.02, note), missing=missing, effect="masked")
    print_costs(record)
    out = capsys.readouterr().out
    assert "masked" in line(out, PREFILL)
    assert "22) ms *" in line(out, PREFILL)
    assert f"* {note}" in out
    assert "no energy for 1x512, 8x512: this GPU has no energy counter" in out
    print_summary([record])
    assert "masked" in line(capsys.readouterr().out, f"{PREFILL} speed-up (of theory)")


def test_a_record_without_measurements_prints_nothing_more(capsys):
    print_costs(recorded(cost("forward 1x512", "flops", 1e9, "FLOP")))
    assert capsys.readouterr().out == ""


def test_what_could_not_be_counted_is_said_also_where_nothing_was_measured(capsys):
    gap = MissingMeasurement(
        scope="forward 1x9", quantity="flops", reason="no formula for aten.addr", how="counted"
    )
    print_costs(recorded(missing=(gap,)))
    assert capsys.readouterr().out == "no counted flops for forward 1x9: no formula for aten.addr\n"


def test_a_wide_interval_has_its_own_mark(capsys):
    wide = "the interval of the speed-up is still wider than 3 % to one side"
    speedup = cost(PREFILL, "speedup", 1.5, "1", note=wide, low=1.44, high=1.55, theory=2.0)
    print_costs(recorded(latency(PREFILL, 0.02), speedup))
    out = capsys.readouterr().out
    assert "1.500 (1.440 to 1.550) *" in line(out, PREFILL)
    assert "22) ms *" not in out
    assert f"* {wide}" in out


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0312, "31.2 ms"), (4.2e-5, "42 us")]
)
def test_a_time_has_three_digits(seconds, text):
    assert format_duration(seconds) == text
