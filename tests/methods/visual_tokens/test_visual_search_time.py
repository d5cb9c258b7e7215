"""A budget of measured time: what is timed, in which order, and what is said when it is too small.

The clock is replaced where an answer must not depend on the machine.
"""

import pytest
import torch

from bench.errors import UserError
from methods.visual_engine.cost.flops import layer_costs
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_tokens import search as budgets
from methods.visual_tokens.search import PrefillTimer
from methods.visual_tokens.yopo import Yopo
from tests.methods.visual_tokens.test_visual_strategies import SHARES, context, loaded


class Arithmetic(PrefillTimer):
    """Says that a prefill takes time for its layers alone, whatever heads and neurons cost."""

    def share(self) -> float:
        self.readings += 1
        work = layer_costs(self._engine)
        return 0.2 + 0.8 * sum(layer.heads > 0 for layer in work) / len(work)


@pytest.fixture
def arithmetic(monkeypatch):
    monkeypatch.setattr(budgets, "PrefillTimer", Arithmetic)


def fitted(budget):
    model = loaded("llava_llama")
    preset = Yopo(shares=SHARES, budget=budget, budget_of="seconds", whole_layers=1)
    return model, preset.apply(model, context("llava_llama")).details


@pytest.mark.parametrize("budget", [0.45, 0.7, 0.85])
def test_the_measured_time_meets_the_budget(arithmetic, budget):
    model, details = fitted(budget)
    engine = visual_engine_of(model.network)
    assert details["seconds_share"] <= budget
    assert details["seconds_share"] == Arithmetic.share(Arithmetic(engine, context_samples()))
    assert details["layers"] <= int((budget - 0.2) / 0.8 * 4)


def context_samples():
    return context("llava_llama").prompts


def test_nothing_is_cut_where_nothing_need_be(arithmetic):
    _, details = fitted(1.0)
    assert details["layers"] == 4 and details["neurons"] == 1.0
    assert details["expected_kl"] == 0


def test_a_time_that_no_setting_takes_is_one_sentence(arithmetic):
    with pytest.raises(UserError, match=r"budget=0\.05 of the dense prefill's time cannot be met"):
        fitted(0.05)


def test_a_reading_is_a_ratio_and_leaves_the_plan_as_it_was():
    model = loaded("llava_llama")
    Yopo(shares=SHARES, whole_layers=1, heads="first", neurons="first").apply(
        model, context("llava_llama")
    )
    engine, samples = visual_engine_of(model.network), context_samples()
    call = dict(samples.inputs[0])
    before, revision = model.network(**call).logits, engine.plan.revision
    watch = PrefillTimer(engine, samples)
    assert 0 < watch.share() < 50
    assert watch.readings == 1 and engine.plan.revision == revision
    assert torch.equal(model.network(**call).logits, before)
