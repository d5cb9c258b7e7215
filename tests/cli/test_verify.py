"""Verification compares rows without an answer as well."""

import math

from bench.cli.commands.verify import _compare
from tests.reporting.comparison.synthetic_runs import metric, record


def row(document, value, missing=None):
    return {
        "task": "t", "filter": "none", "doc_id": document, "loglikelihoods": [value, -1.0],
        "missing": missing,
    }  # fmt: skip


def faults(before, now):
    run = record("a", [metric("t", None, 0)])
    return _compare(run, before, now, 1e-4).faults


def test_what_is_not_finite_again_agrees_and_what_has_become_finite_does_not():
    why = "a log-likelihood is not finite"
    recorded = [row(0, math.nan, why), row(1, -math.inf, why), row(2, -2.0)]
    assert faults(recorded, recorded) == ()
    (fault,) = faults(recorded, [row(0, -2.0)])
    assert "t sample 0: loglikelihoods[0] was nan and is -2" in fault
    (fault,) = faults(recorded, [row(2, math.nan)])
    assert "is nan" in fault
    (fault,) = faults(recorded, [row(1, math.inf, why)])
    assert "was -inf and is inf" in fault
    (fault,) = faults(recorded, [row(0, math.nan, "another reason")])
    assert fault == "t sample 0: different missing"
