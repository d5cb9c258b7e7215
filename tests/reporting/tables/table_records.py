"""Records as they fill a paper's table, and a small table of them."""

from bench.config.composition import compose_run_config
from bench.records import AppliedMethod, DenseModel, Metric, Record
from bench.reporting.tables import build_table, load_table_config, table_slots

MODEL = DenseModel(
    name="m", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)


def metric(task, value, name="acc", stderr=0.01, split="test", n=400, shots=0):
    return Metric(
        benchmark="b", task=task, metric=name, filter="none", shots=shots, split=split,
        value=value, stderr=stderr, n=n, higher_is_better=True, headline=True,
    )  # fmt: skip


def mean_of_nine(value, **changes):
    return metric("average", value, **{"name": "mean", "split": "mixed", "n": 9, **changes})


def recorded(number, *metrics, run=(), limit=None, seconds=1.0, harness="lm_eval", started="1"):
    """A record of the run with these overrides, as `bench run` would leave it."""
    if run:
        composed = compose_run_config(list(run))
        config = composed.model_dump(mode="json", exclude={"method"})
        config["method"] = {k: m.model_dump(mode="json") for k, m in composed.method.items()}
        calibrated = composed.uses_calibration
    else:
        config = {"benchmark": {"name": "b", "limit": limit, "harness": harness}}
        calibrated = False
    method = AppliedMethod(name="x", config={}, effect="removed", report={}, seconds=seconds)
    return Record(
        id=f"{number:012x}", started=started, finished="", sweep=None, command="", config=config,
        environment={}, model=MODEL, methods=(method,), metrics=metrics, costs=(),
        provenance={"calibration": "0" if calibrated else None, "prompts": None},
    )  # fmt: skip


def lines_of(table):
    return {(line.section, line.name, line.variant): line for line in table.lines}


DEEPSEEK = "DeepSeek-MoE-16B"


def camera(**found):
    """`camera_main`'s DeepSeek section with some lines recorded, as if all rows were alike."""
    config = load_table_config("camera_main", chosen={"sections": [DEEPSEEK]})
    alike = {name: row.model_copy(update={"differs": None}) for name, row in config.rows.items()}
    config = config.model_copy(update={"rows": alike})
    by_place = {(s.row, s.variant): s for s in table_slots(config)}
    places = {"dense": ("dense", ""), "pruned": ("Camera-P", "40%"), "naee": ("NAEE", "40%")}
    return build_table(config, {by_place[places[name]]: [r] for name, r in found.items()})
