"""WGSEF while fine-tuning: the budget is met, only experts change, removed equals zeroed."""

import pytest
import torch

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context
from bench.models.expert_hooks import observe_experts
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.moe.calibration import Activations
from methods.moe.micro_experts import expert_spans, expert_view
from methods.wgsef.fine_tuning import WgsefFinetune
from tests.models.tiny_networks import ARCHITECTURES, build, llama, tokens

SHORT = {"steps": 6, "rows": 4, "ratio": 0.4, "align": 4}


def applied(network, seed=0, **knobs):
    config = ModelConfig(name="tiny", source="tests")
    model = Model(config, network, None, "", None, torch.device("cpu"))
    method = WgsefFinetune(**(SHORT | knobs))
    method.check(model.structure)
    return model, method.apply(model, Context(seed, Calibration(tokens(), "calibration")))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_budget_goes_and_removed_equals_zeroed(name):
    zeroed, report = applied(build(name), state="zeroed")
    removed, again = applied(build(name), state="removed")
    budgets = [int(0.4 * block.micro_experts) for block in inspect_model(build(name)).moe]
    for found in (report, again):
        assert [layer.removed for layer in found.layers] == budgets
        assert found.details["alive_before_selection"] == sum(
            sum(block.widths) - budget
            for block, budget in zip(inspect_model(build(name)).moe, budgets, strict=True)
        )
    ids = tokens()[:2]
    torch.testing.assert_close(
        removed.network(ids).logits, zeroed.network(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_nothing_but_routed_experts_changes_and_no_gradient_is_left():
    name = "qwen2_moe" if "qwen2_moe" in ARCHITECTURES else next(iter(ARCHITECTURES))
    before = build(name).state_dict()
    model, _ = applied(build(name), state="zeroed")
    changed = {
        key for key, tensor in model.network.state_dict().items()
        if not torch.equal(tensor, before[key])
    }  # fmt: skip
    assert changed and all(".experts." in key for key in changed)
    weights = list(model.network.parameters())
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)


def test_training_lowers_the_loss_of_what_is_left():
    name = next(iter(ARCHITECTURES))
    losses = {}
    for rate in (1e-9, 5e-3):
        _, report = applied(build(name), rate=rate, steps=30, state="zeroed")
        losses[rate] = report.details["history"][-1]["loss"]
    assert losses[5e-3] < losses[1e-9]


def test_at_a_rate_of_almost_nothing_it_keeps_what_has_most_energy():
    name = next(iter(ARCHITECTURES))
    network = build(name)
    model, _ = applied(build(name), rate=1e-12, state="zeroed")
    ids = tokens()
    blocks = inspect_model(network).moe
    seen = {block: Activations(block) for block in blocks}
    with observe_experts(seen, 4096), torch.no_grad():
        network(ids)
    for block, after in zip(blocks, model.structure.moe, strict=True):
        energy, alive = [], []
        power_N = seen[block].square_sum()
        for expert, place in expert_spans(block):
            if expert < 0:
                continue
            norm = expert_view(block, expert).down.double().square().sum(0)
            energy.append(power_N[place] * norm)
            alive.append(expert_view(after, expert).down.any(0))
        energy_M, alive_M = torch.cat(energy), torch.cat(alive)
        assert energy_M[alive_M].min() >= energy_M[~alive_M].max() * (1 - 1e-4)


@pytest.mark.parametrize(("make", "ratio", "said"), [(llama, 0.4, "has none")])
def test_models_without_experts_are_one_sentence(make, ratio, said):
    with pytest.raises(UserError, match=said):
        applied(make(), ratio=ratio)
