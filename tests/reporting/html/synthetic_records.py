"""Records that look like real ones, as many as a test wants, without running anything."""

import json
import random

from bench.records import AppliedMethod, Cost, DenseModel, Metric, Record, Store, run_id
from bench.records.record_file import serialize_record
from bench.reporting.tables import ColumnHead, OurValue, Table, TableCell, TableLine
from bench.reporting.tables.published import PublishedCell

METHODS = {
    "camera_p": "removed", "random_experts": "zeroed", "rtn": "quantized", "naee": "removed",
    "fastv": "skipped", "wgsef": "removed", "slimming": "removed", "magnitude": "zeroed",
}  # fmt: skip
TASKS = ("boolq", "openbookqa", "rte", "arc_easy", "winogrande", "hellaswag", "piqa", "mathqa")
VERSIONS = {"slimbench": "0.1.0", "torch": "2.14.1", "transformers": "5.23.0"}


def metric(task, value, metric="acc", n=400):
    return Metric(
        benchmark="nine", task=task, metric=metric, filter="none", shots=0, split="test",
        value=value, stderr=0.02, n=n, higher_is_better=True, headline=True, task_version="1.0",
    )  # fmt: skip


def record(number, *, model="tiny", method=None, ratio=0.4, rng=None, command=None):
    """One run; `number` makes its id and its place in time."""
    rng = rng or random.Random(number)
    effect = METHODS.get(method, "removed")
    left = 1.0 if method is None or effect == "zeroed" else 1 - ratio * rng.uniform(0.4, 0.9)
    drop = 0.0 if method is None else ratio**2 * rng.uniform(0.1, 0.9)
    values = {task: max(0.2, 0.75 - drop + rng.gauss(0, 0.01)) for task in TASKS}
    methods = ()
    if method is not None:
        methods = (
            AppliedMethod(
                name=method, config={"ratio": ratio, "align": 8}, effect=effect, seconds=1.5,
                report={}, layers=[{"layer": i, "removed": 460 + i} for i in range(24)],
            ),
        )  # fmt: skip

    def cost(scope, quantity, unit, value, how="counted", **parts):
        return Cost(scope=scope, quantity=quantity, unit=unit, value=value, how=how, parts=parts)

    phases = (cost(f"phase {model} on {task}", "wall", "s", 2.5, "measured") for task in TASKS)
    minute = f"{number // 1440 % 28 + 1:02}T{number // 60 % 24:02}:{number % 60:02}"
    return Record(
        id=run_id({"number": number}),
        started=f"2026-01-{minute}:00.000+00:00",
        finished=f"2026-01-{minute}:30.000+00:00",
        sweep=f"sweep-{number // 50}",
        command=command or f"bench run model={model} method={method or 'dense'} ratio={ratio}",
        config={
            "model": {"name": model, "dtype": "auto", "seed": None},
            "benchmark": {
                "name": "nine", "harness": "lm_eval", "tasks": list(TASKS), "limit": None,
            },
            "method": {m.name: m.config for m in methods}, "ratio": ratio, "seed": 1234,
        },
        environment={"platform": "Linux", "cpu": "x86_64", "gpus": [], "versions": VERSIONS},
        model=DenseModel(
            name=model, source=f"embedded:{model}", revision=None, fingerprint=f"{model}{'f' * 40}",
            architecture="Qwen2MoeForCausalLM", parameters=2305152, bytes=9220736,
        ),
        methods=methods,
        metrics=(
            metric("average", sum(values.values()) / len(values), "mean", len(values)),
            *(metric(task, value) for task, value in values.items()),
        ),
        costs=(
            cost("model", "parameters", "1", 2.3e6 * left, routed=1.6e6 * left, other=7e5),
            cost("model", "bytes", "B", 9.2e6 * left),
            cost("forward 1x512", "flops", "FLOP", 1.7e9 * left, attention=8e8),
            cost("forward 1x512", "seconds", "s", 0.02 * (left + 0.1), "measured"),
            *phases,
        ),
        provenance={"data": {task: {"fingerprint": "d" * 64} for task in TASKS}},
    )  # fmt: skip


def samples(record, per_task=30, prompt="Question: which one is it?\nAnswer:"):
    """Scored samples whose share of right ones is what the record says."""
    rng = random.Random(record.id)
    rows = []
    for part in record.metrics[1:]:
        for doc in range(per_task):
            right = rng.random() < part.value
            rows.append({
                "task": part.task, "filter": "none", "doc_id": doc, "doc_hash": "h", "target": "1",
                "prompt": f"{part.task} {doc}. {prompt}", "choices": [" this", " that"],
                "loglikelihoods": [-2.0, -1.0] if right else [-1.0, -2.0],
                "response": None, "acc": float(right),
            })  # fmt: skip
    return rows


def fill(root, runs, *, per_task=30, models=("tiny", "small", "medium", "large")):
    """Write `runs` records with their samples: per model one dense run, then methods in turn."""
    store = Store(root)
    kept = []
    for number in range(runs):
        model = models[number * len(models) // runs]
        first = number == 0 or model != models[(number - 1) * len(models) // runs]
        name = list(METHODS)[number % len(METHODS)]
        ratio = (1 + number // len(METHODS) % 16) / 20
        one = record(number, model=model, method=None if first else name, ratio=ratio)
        if per_task:
            store.write(one, samples(one, per_task), "seed: 1234\n")
        else:  # thousands of them: without the store's waiting for the disk
            store.folder(one.id).mkdir(parents=True)
            (store.folder(one.id) / "record.json").write_text(serialize_record(one))
        kept.append(one)
    return kept


def paper_table(run):
    """A table of one line: a cell that is subtracted, and one that is refused."""
    published = PublishedCell(
        paper="p", table="main", model="tiny", row="CAMERA-P", setting="40 %", column="boolq",
        metric="acc", filter="none", shots=0, split="test", harness="lm_eval", unit="%",
        relation="=", value="60.9", source="s", trust="paper", flag="",
    )  # fmt: skip
    ours = OurValue(61.5, 0.8, 59.9, 63.1, (run,))
    cells = (
        TableCell(ours, published, difference=0.6, inside=True),
        TableCell(refusal="other metric"),
    )
    return Table(
        name="camera_main", title="Main table", stand_in=False,
        columns=(ColumnHead("boolq", "%", False), ColumnHead("rte", "%", False)),
        lines=(TableLine("tiny", "40 %", "CAMERA-P", (run,), cells),),
        notes=("n",), agreements=(),
    )  # fmt: skip


def write_search(root, name, records, *, sweep=None, failed=2):
    """A search over the records, its front by brute force, and some trials without values."""
    flops = [record.cost("flops", "forward 1x512").value for record in records]
    values = {r.id: [r.metric("average").value, n] for r, n in zip(records, flops, strict=True)}

    def beaten(own):
        return any(other != own and other[0] >= own[0] and other[1] <= own[1]
                   for other in values.values())  # fmt: skip

    trials = [
        {
            "trial": number, "state": "complete", "values": values[r.id], "run": r.id,
            "params": {"ratio": 0.1 + number / 30, "method.camera_p.level": "layer"},
            "reason": None, "front": not beaten(values[r.id]),
        } for number, r in enumerate(records)
    ]  # fmt: skip
    states = ("pruned", "fail")
    ended = [
        {"trial": len(trials) + at, "state": states[at % 2], "values": None, "run": None,
         "params": {"ratio": 0.6}, "reason": "hopeless", "front": False}
        for at in range(failed)
    ]  # fmt: skip
    objectives = {"average": "maximize", "flops": "minimize"}
    folder = root / "sweeps" / (sweep or records[-1].sweep)
    folder.mkdir(parents=True, exist_ok=True)
    study = {"study": name, "objectives": objectives, "trials": trials + ended}
    (folder / "study.json").write_text(json.dumps(study))
    return study
