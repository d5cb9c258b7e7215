"""Records with samples, made up so that every form of a number can be compared."""

from bench.records.record import AppliedMethod, DenseModel, Metric, Record

MODEL = DenseModel(
    name="tiny", source="x", revision=None, fingerprint="0", architecture="a", parameters=1, bytes=4
)
VERSIONS = {"lm-eval": "0.4.13", "lmms-eval": "0.7.3", "slimbench": "0.1.0"}


def metric(task, value, n, name="acc", **more):
    fields = {
        "benchmark": "exam", "task": task, "metric": name, "filter": "none", "shots": 0,
        "split": "test", "value": value, "stderr": None, "n": n, "higher_is_better": True,
        "headline": True,
    }  # fmt: skip
    return Metric(**{**fields, **more})


def record(identifier, metrics, method=None, harness="lm_eval", **more):
    methods = ()
    if method is not None:
        methods = (AppliedMethod(name=method, config={}, effect="removed", report={}, seconds=1.0),)
    benchmark = {"name": "exam", "harness": harness, "perplexity": {}}
    data = {row.task: {"fingerprint": f"data of {row.task}", "location": "here"} for row in metrics}
    fields = {
        "id": identifier.ljust(12, "0"), "started": identifier, "finished": "", "sweep": None,
        "command": "", "config": {"benchmark": benchmark}, "environment": {"versions": VERSIONS},
        "model": MODEL, "methods": methods, "metrics": tuple(metrics), "costs": (),
        "provenance": {"data": data},
    }  # fmt: skip
    return Record(**{**fields, **more})


def rows(task, scores, column="acc", **more):
    """Return a sample row for each score; a value of `more` that is a list has one for each."""
    made = []
    for number, score in enumerate(scores):
        row = {
            "task": task, "filter": "none", "doc_id": number, "doc_hash": f"{task} {number}",
            "prompt_hash": f"asked {task} {number}", "target": "0", "prompt": f"{task}? {number}",
            "choices": ["yes", "not so"], "loglikelihoods": [-1.0 - score, -2.0 + score],
            "response": None, "n_tokens": None, column: score,
        }  # fmt: skip
        own = {key: v[number] if isinstance(v, list) else v for key, v in more.items()}
        made.append({**row, **own})
    return made
