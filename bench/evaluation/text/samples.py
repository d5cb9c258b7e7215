"""lm-eval's logged samples as sample rows."""

from __future__ import annotations

from typing import Any

from bench.evaluation.text.building import PlannedTask


def rows(planned: PlannedTask, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per scored document and filter."""
    return [
        _row(name, planned.tasks[name], sample)
        for name, samples in result["samples"].items()
        for sample in samples
    ]


def _row(name: str, task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    first = sample["arguments"][0]
    return {
        "task": name,
        "filter": sample["filter"],
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "target": str(sample["target"]),
        "prompt": first[0],
        "choices": _choices(task, sample),
        **_answers(task, sample),
        **{name: _number(sample[name]) for name in sample["metrics"]},
    }


def _choices(task: Any, sample: dict[str, Any]) -> list[str]:
    if task.OUTPUT_TYPE == "multiple_choice":
        return [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    if task.OUTPUT_TYPE == "loglikelihood":
        return [argument[1] for argument in sample["arguments"]]
    return []


def _answers(task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the model's raw responses, before any filter: scores of choices, or a text."""
    answers = [responses[0] for responses in sample["resps"]]
    if task.OUTPUT_TYPE == "generate_until":
        # The exception: a generated text is shown as its filter left it, since that is what was
        # scored.
        filtered = sample["filtered_resps"][0]
        return {"response": filtered if isinstance(filtered, str) else answers[0]}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"loglikelihoods": [float(answer) for answer in answers]}
    return {
        "loglikelihoods": [float(value) for value, _ in answers],
        "greedy": [bool(greedy) for _, greedy in answers],
    }


def _number(value: Any) -> float | None:
    """Return a sample's metric, or None if it is defined over many samples only."""
    # Corpus metrics (BLEU, F1 and the like) log a tuple of references and predictions per sample.
    return float(value) if isinstance(value, int | float) else None
