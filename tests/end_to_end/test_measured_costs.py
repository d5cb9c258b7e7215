"""`bench run costs=paper`: one table, all of it in the record; wrong shapes are one sentence."""

import json

import pytest

from bench.config.composition import compose_run_config
from bench.device.energy_counters import Unavailable
from bench.measurement import energy

TIMING = (
    "new_tokens=2",
    "rounds=5",
    "max_rounds=5",
    "max_warmup_rounds=1",
    "attempts=1",
)
MEASURED = ["costs=paper", *(f"costs.timing.{setting}" for setting in TIMING)]
SHORT = ["benchmark=perplexity_micro", "ratio=0.5"]


@pytest.fixture
def record(bench):
    def call(*arguments, lengths="[24]"):
        given = (*SHORT, *MEASURED, f"costs.timing.lengths={lengths}")
        code, out, err = bench("run", *given, *arguments)
        assert code == 0, err
        (folder,) = (bench.results / "runs").iterdir()
        return json.loads((folder / "record.json").read_text()), out

    return call


@pytest.mark.broad
def test_a_run_has_its_measured_costs_in_the_record_and_in_one_table(record):
    made, out = record("method=camera_p")
    costs = {(cost["scope"], cost["quantity"]): cost for cost in made["costs"]}
    speedup = costs["prefill 1x24", "speedup"]
    assert speedup["parts"]["theory"] > 1.05
    assert costs["phase applying camera_p", "peak_bytes"]["value"] > 0
    assert (
        made["methods"][0]["peak_bytes"] == costs["phase applying camera_p", "peak_bytes"]["value"]
    )
    assert costs["model", "disk_bytes"]["value"] < 1.01 * costs["model", "bytes"]["value"]
    assert "costs of camera_p 0.5: micro_moe" in out
    assert f"{speedup['value']:.3f}" in out


@pytest.mark.broad
def test_a_zeroed_run_says_so_where_its_gain_would_be(record):
    made, out = record("method=random_experts", "costs.measure=[latency]")
    assert not [
        cost
        for cost in made["costs"]
        if cost["quantity"] in ("speedup", "realised_speedup_fraction")
    ]
    reasons = {
        gap["scope"]: gap["reason"] for gap in made["missing"] if gap["quantity"] == "speedup"
    }
    assert reasons["prefill 1x24"] == reasons["decode 1x24"] == "zeroed"
    (line,) = [row for row in out.splitlines() if row.startswith(" prefill 1x24 speed-up")]
    assert "zeroed" in line


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("costs.timing.lengths=[5000]", "micro_moe supports 1024 positions"),
        ("costs.timing.batches=[0]", "greater than 0"),
        ("costs.timing.round=9", "did you mean 'costs.timing.rounds'"),
        ("costs.measure=[speed]", "'latency', 'memory', 'energy' or 'roofline'"),
        ("model.device=cuda:99", "CUDA devices"),
        ("model.device=tpu", "unknown model.device 'tpu'"),
        ("costs.timing.precision=0", "costs.timing.precision=0: input should be greater than 0"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_before_anything_is_loaded(bench, argument, said):
    code, out, err = bench("run", "costs=paper", argument)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.broad
def test_lengths_that_the_model_cannot_take_are_named_beside_the_others(record):
    made, out = record("costs.measure=[memory]", lengths="[24,5000]")
    reason = "micro_moe supports 1024 positions; a prompt of 5000 and 2 new tokens exceed them"
    assert {"scope": "1x5000", "quantity": "latency", "reason": reason, "how": None} in made[
        "missing"
    ]
    assert f"no latency for 1x5000: {reason}" in out


def test_a_length_that_cannot_be_counted_is_named_and_no_number_stands_for_it(record):
    made, out = record("costs.measure=[]", "costs.length=5000")
    reason = "micro_moe supports 1024 positions; costs.length=5000"
    assert f"no flops for forward 1x5000, token after 1x5000: {reason}" in out
    assert not [cost for cost in made["costs"] if "flops" in cost["quantity"]]


@pytest.mark.broad
def test_a_device_without_a_counter_has_no_energy_and_says_why(record, monkeypatch):
    def none(_):
        raise Unavailable("this GPU has no energy counter")

    monkeypatch.setattr(energy, "energy_meter", none)
    made, out = record("costs.measure=[energy]")
    assert "no energy for 1x24: this GPU has no energy counter" in out
    assert not [cost for cost in made["costs"] if cost["quantity"].startswith("energy")]


def test_how_often_to_measure_is_part_of_a_run_only_where_something_is_measured():
    def identity(*overrides):
        return compose_run_config(list(overrides)).identity()

    assert identity() == identity("costs.timing.rounds=99")
    assert identity("costs=paper") != identity("costs=paper", "costs.timing.rounds=99")
    assert identity() != identity("costs.measure=[memory]")
