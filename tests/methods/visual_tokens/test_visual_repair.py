"""Least-squares repair: an optimum, never worse than none, for visual rows alone."""

import copy

import pytest
import torch

from bench.errors import UserError
from bench.models.vlm.visual_tokens import locate_visual_tokens
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.weight_slices import head_channels
from methods.visual_tokens.strategies import SparseFFN
from methods.visual_tokens.yopo import Yopo
from tests.methods.visual_engine.tiny_mllms import IMAGE, prompt
from tests.methods.visual_tokens.test_visual_strategies import SHARES, context, loaded

NAMES = ["llava_llama", "qwen2_vl", "internvl_phi3", "qwen3_vl_moe"]


def repaired(name, **knobs):
    model, lent = loaded(name), context(name)
    strategy = Yopo(shares=SHARES, whole_layers=1, repair=True, **knobs)
    return model, lent, strategy.apply(model, lent).details["repair"]


def activations(engine, lent, module):
    """What a projection is given by the visual rows of all calibration prompts, densely."""
    rows = []
    hook = module.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    found = []
    for call in lent.prompts.inputs:
        rows.clear()
        with engine.dense():
            engine.network(**call)
        found.append(rows[0][locate_visual_tokens(engine.network, call).mask])
    hook.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_no_layer_grows(name):
    _, _, told = repaired(name)
    pairs = [error for layer in told for key, error in layer.items() if key != "layer"]
    assert pairs and all(after <= before for before, after in pairs)
    assert min(after / before for before, after in pairs) < 0.9
    assert ("feed_forward" in told[0]) == (name != "qwen3_vl_moe")


@pytest.mark.parametrize("reorder", [True, False])
def test_columns_solve_the_damped_least_squares_problem(reorder):
    model, lent, told = repaired("llava_llama", reorder=reorder)
    engine = visual_engine_of(model.network)
    for layer in engine.decoder.layers[:2]:
        weights = engine.weight_cache.layer(layer.index)
        (unit,) = layer.units()
        places = engine.weight_cache.places(layer)[0]
        heads = head_channels(weights.heads.kept, weights.view.head_dim)
        cases = {
            "feed_forward": (layer.feed_forward.down_proj, unit.down, places),
            "attention": (layer.attention.o_proj, weights.view.o.weight, heads),
        }
        ours = {"feed_forward": weights.feed_forward.view.down, "attention": weights.o.weight}
        for part, (module, weight, kept) in cases.items():
            if part not in told[layer.index]:
                continue
            phi, whole = activations(engine, lent, module), weight.double()
            wide, few = phi @ whole.T, phi[:, kept]
            ridge = 0.01 * few.square().sum(0).mean()
            stacked = torch.cat([few, ridge.sqrt() * torch.eye(len(kept))])
            goal = torch.cat([wide, ridge.sqrt() * whole[:, kept].T])
            direct = torch.linalg.lstsq(stacked, goal).solution.T
            assert torch.allclose(ours[part].double(), direct, atol=1e-4)
            before = (wide - few @ whole[:, kept].T).square().sum() / wide.square().sum()
            after = (wide - few @ direct.T).square().sum() / wide.square().sum()
            assert told[layer.index][part] == pytest.approx([float(before), float(after)], rel=1e-3)


def test_text_goes_on_with_the_weights_as_they_are():
    model, _, _ = repaired("llava_llama")
    call = prompt("llava_llama", [9], [4])
    assert torch.allclose(
        model.network(**call).logits, loaded("llava_llama").network(**call).logits, atol=1e-5
    )
    call = prompt("llava_llama", [4, (5, 5), 5], seed=9)
    plain = loaded("llava_llama")
    Yopo(shares=SHARES, whole_layers=1).apply(plain, context("llava_llama"))
    where = call["input_ids"] != IMAGE
    moved = model.network(**call).logits - plain.network(**call).logits
    assert moved[where].abs().max() > 1e-3
    assert moved[:, :4].abs().max() < 1e-5


def test_a_repair_lasts_until_other_neurons_are_kept():
    model, lent, _ = repaired("llava_llama")
    engine = visual_engine_of(model.network)
    assert len(engine.plan.repairs) == 2
    twin = copy.deepcopy(model.network)
    call = prompt("llava_llama", [4, (5, 5), 5], seed=9)
    assert torch.equal(twin(**call).logits, model.network(**call).logits)
    SparseFFN(keep=0.5).apply(model, lent)
    assert engine.plan.repairs == {}


def test_what_was_moved_since_is_noticed():
    model, _, _ = repaired("llava_llama", reorder=False)
    engine = visual_engine_of(model.network)
    engine.weight_cache.reorder()
    with pytest.raises(UserError, match="list the method with repair=true last"):
        model.network(**prompt("llava_llama", [4, (5, 5), 5]))


def test_only_what_is_skipped_can_be_repaired():
    strategy = Yopo(shares=SHARES, whole_layers=1, repair=True, dropped_heads="text_only")
    with pytest.raises(UserError, match="repair=true requires execution=skip"):
        strategy.apply(loaded("llava_llama"), context("llava_llama"))
