"""D2-MoE's parts against slow transcriptions, and the whole in the form in which it runs."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from bench.errors import UserError
from bench.measurement.costs import count_costs
from bench.measurement.model_size import count_size
from bench.models import replaced_modules
from bench.models.structure.model_structure import inspect_model
from bench.schema import CostsConfig
from bench.ui import SILENT
from methods.baselines.d2_moe.factorization import InputMoments, assemble_experts, low_rank_factors
from methods.baselines.d2_moe.method import D2Moe, solve_ranks
from methods.baselines.d2_moe.shared_base_experts import SharedBaseExperts
from tests.methods.method_application import (
    applied,
    block_inputs,
    context,
    model_of,
    network_of,
    numel,
)
from tests.models.tiny_networks import ARCHITECTURES, Expert, build, llama, tokens, unfuse


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 30), st.integers(0, 9000))
def test_ranks_use_the_budget_but_for_less_than_one_rank(experts, d_model, width, kept):
    found = solve_ranks(experts, d_model, width, kept)
    left = kept - 3 * d_model * width
    assert (found is None) == (left < 0)
    if found is not None:
        assert len(found) == 3 * experts
        assert 0 <= left - sum(found) * (d_model + width) < d_model + width
        assert max(found) - min(found) <= 1
        assert found == sorted(found, reverse=True)


def test_factors_are_the_best_of_their_rank_for_the_inputs():
    torch.manual_seed(0)
    delta, x = torch.randn(7, 5).double(), torch.randn(40, 5).double() @ torch.randn(5, 5).double()
    left, right = low_rank_factors(delta, x.T @ x, 2, damping=1e-12)
    error = ((delta - left @ right) @ x.T).square().sum()
    # The other way: by the symmetric root of the Gram matrix, from its eigenvectors.
    values, vectors = torch.linalg.eigh(x.T @ x)
    root = vectors @ values.sqrt().diag() @ vectors.T
    u, s, v = torch.linalg.svd(delta @ root)
    best = u[:, :2] @ s[:2].diag() @ v[:2] @ root.inverse()
    torch.testing.assert_close(left @ right, best, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(error, s[2:].square().sum(), rtol=1e-6, atol=0)
    plain_u, plain_s, plain_v = torch.linalg.svd(delta)
    plain = plain_u[:, :2] @ plain_s[:2].diag() @ plain_v[:2]
    assert error < ((delta - plain) @ x.T).square().sum()


def test_an_expert_without_tokens_gets_the_plain_svd_and_rank_zero_nothing():
    delta = torch.randn(4, 6)
    left, right = low_rank_factors(delta, torch.zeros(6, 6), 4, damping=1e-4)
    torch.testing.assert_close((left @ right).float(), delta, rtol=1e-5, atol=1e-5)
    left, right = low_rank_factors(delta, torch.eye(6), 0, damping=1e-4)
    assert (left.shape, right.shape) == ((4, 0), (0, 6))


def slow_bases(network, frequencies):
    """Σ f F W / Σ f F of every block by torch.autograd, one row and one expert at a time."""
    bases = []
    for block, often in zip(inspect_model(network).moe, frequencies, strict=True):
        held = list(block.experts.parameters())
        network.requires_grad_(False)
        for weight in held:
            weight.requires_grad_(True)
        fisher = [torch.zeros_like(w).double() for w in held]
        for row in tokens():
            logits = network(row[None]).logits[0, :-1]
            loss = cross_entropy(logits, row[1:], reduction="sum")
            gradients = torch.autograd.grad(loss, held)
            fisher = [f + g.double().square() for f, g in zip(fisher, gradients, strict=True)]
        network.requires_grad_(False)
        numbers = {id(w): f for w, f in zip(held, fisher, strict=True)}
        bases.append(_merge(block, numbers, often))
    return bases


def _merge(block, fisher, often):
    """Put together, matrix by matrix, what belongs to the same expert."""
    merged = []
    for name in ("gate", "up", "down"):
        top = bottom = 0
        for expert in range(6):
            weight, importance = _matrix(block, name, expert, fisher)
            top = top + often[expert] * importance * weight.double()
            bottom = bottom + often[expert] * importance
        everyone = [_matrix(block, name, e, fisher)[0].double() for e in range(6)]
        merged.append(torch.where(bottom > 0, top / bottom, sum(everyone) / 6))
    return merged


def _matrix(block, name, expert, fisher):
    if block.layout == "list":
        weight = getattr(block.experts[expert], f"{name}_proj").weight
        return weight, fisher[id(weight)]
    parent = block.experts.down_proj if name == "down" else block.experts.gate_up_proj
    rows = {"gate": slice(0, 12), "up": slice(12, 24), "down": slice(None)}[name]
    return parent[expert, rows], fisher[id(parent)][expert, rows]


@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_base_is_the_fisher_weighted_mean(name, layout):
    network = network_of(name, layout)
    wanted = [weight.requires_grad for weight in network.parameters()]
    frequencies = []
    for block, x_BLD in zip(
        inspect_model(network).moe, block_inputs(network, tokens()), strict=True
    ):
        _, _, index = block.router(x_BLD.flatten(0, 1))
        frequencies.append([int((index == expert).sum()) for expert in range(6)])
    found = D2Moe(ratio=0.3)._bases(model_of(network), tokens(), SILENT)
    assert [weight.requires_grad for weight in network.parameters()] == wanted
    assert all(weight.grad is None for weight in network.parameters())
    for mine, slow in zip(found.values(), slow_bases(network, frequencies), strict=True):
        for base, expected in zip(mine, slow, strict=True):
            torch.testing.assert_close(base, expected, rtol=1e-4, atol=1e-6)


def _multiplied_out(network, plain):
    """`plain` with every expert replaced by what `network` has for it: base + left right."""
    parts = zip(network.model.layers, inspect_model(plain).layers, strict=True)
    by_layer = {block.layer: block for block in inspect_model(plain).moe}
    for number, (compressed, _) in enumerate(parts):
        if number not in by_layer:
            continue
        experts = compressed.mlp.experts
        for expert in range(6):
            view = by_layer[number].expert(expert)
            view.gate.copy_(experts.matrix("gate").weight(expert))
            view.up.copy_(experts.matrix("up").weight(expert))
            view.down.copy_(experts.matrix("down").weight(expert))
    return plain


@pytest.mark.sample(10)
@pytest.mark.parametrize("ratio", [0.2, 0.55])
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_runs_as_its_experts_multiplied_out_with_fewer_weights(name, layout, ratio):
    network, rows = network_of(name, layout), tokens()
    blocks, before = inspect_model(network).moe, numel(network)
    report = applied(D2Moe(ratio=ratio), network)
    assert report.effect == "removed"
    removed = before - numel(network)
    asked = [3 * 16 * int(ratio * block.micro_experts) for block in blocks]
    assert report.details["removed_parameters"] == removed
    assert 0 <= removed - sum(asked) < len(blocks) * (16 + 12)
    plain = _multiplied_out(network, network_of(name, layout))
    torch.testing.assert_close(network(rows).logits, plain(rows).logits, rtol=1e-5, atol=1e-5)
    json.dumps(report.details, allow_nan=False)


@pytest.mark.parametrize("layout", ["fused", "list"])
def test_is_built_again_from_its_description(layout):
    network, rows = network_of("qwen2_moe", layout), tokens()
    applied(D2Moe(ratio=0.4), network)
    again = network_of("qwen2_moe", layout)
    replaced_modules.install_described_modules(
        again, json.loads(json.dumps(replaced_modules.describe_network(network)))
    )
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(rows).logits, network(rows).logits)


def test_full_ranks_give_the_network_back():
    network, rows = build("deepseek_v2"), tokens()
    before = network(rows).logits
    method, model = D2Moe(ratio=0.3), model_of(network)
    bases = method._bases(model, rows, SILENT)
    for block in model.structure.moe:
        base = bases[block]
        block.block.experts = assemble_experts(
            block, base, InputMoments(block), [12] * 18, damping=1e-4
        )
    torch.testing.assert_close(network(rows).logits, before, rtol=1e-5, atol=1e-5)


def test_inputs_are_what_the_matrices_are_given():
    network = build("mixtral")
    block = inspect_model(network).moe[0]
    x_TD = block_inputs(network, tokens())[0].flatten(0, 1)
    _, _, index = block.router(x_TD)
    inputs = InputMoments(block)
    from bench.models.expert_hooks import observe_experts

    with observe_experts({block: inputs}, chunk=7):
        network(tokens())
    for expert in range(6):
        x_SD = x_TD[(index == expert).any(1)]
        hidden = block.expert(expert).hidden(x_SD)
        torch.testing.assert_close(inputs.input_gram_EDD[expert].float(), x_SD.T @ x_SD)
        torch.testing.assert_close(inputs.hidden_gram_EFF[expert].float(), hidden.T @ hidden)


@pytest.mark.broad
def test_costs_are_counted_on_the_shared_form():
    config = CostsConfig(name="tiny", batch=2, length=9)
    network = build("qwen2_moe")
    before = {
        c.quantity: c.value for c in count_costs(model_of(copy.deepcopy(network)), config).costs
    }
    model = model_of(network)
    report = D2Moe(ratio=0.55).apply(model, context())
    after = {c.quantity: c.value for c in count_costs(model, config).costs}
    assert after["parameters"] == before["parameters"] - report.details["removed_parameters"]
    assert after["flops"] < before["flops"]


def test_compresses_better_than_without_differences():
    rows = tokens(rows=8, length=24)
    dense = build("qwen3_moe")(rows).logits

    def error(ratio):
        network = build("qwen3_moe")
        applied(D2Moe(ratio=ratio), network, rows=rows)
        return float((network(rows).logits - dense).square().mean())

    assert error(0.1) < error(0.4) < error(0.83)


def test_ratio_zero_is_the_identity():
    network, rows = build("deepseek"), tokens()
    before = network(rows).logits
    assert applied(D2Moe(ratio=0), network).effect == "none"
    assert torch.equal(network(rows).logits, before)


def test_refuses_what_it_cannot_merge():
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*has none"):
        D2Moe(ratio=0.2).check(inspect_model(llama()))
    with pytest.raises(UserError, match="needs one as its base"):
        D2Moe(ratio=0.9).check(inspect_model(build("mixtral")))
    network = unfuse(build("mixtral"))
    experts = inspect_model(network).moe[0].experts
    experts[0] = Expert(torch.ones(5, 16), torch.ones(5, 16), torch.ones(16, 5), experts[0].act_fn)
    with pytest.raises(UserError, match="different widths"):
        D2Moe(ratio=0.2).check(inspect_model(network))


def test_active_parameters_are_bases_and_the_factors_of_a_tokens_experts():
    network = network_of("qwen2_moe")
    config, before = network.config, count_size(network, inspect_model(network))
    applied(D2Moe(ratio=0.3), network)
    after = count_size(network, inspect_model(network))
    experts = [m for m in network.modules() if isinstance(m, SharedBaseExperts)]
    factors = sum(p.numel() for m in experts for n, p in m.named_parameters() if "base" not in n)
    idle = factors * (1 - config.num_experts_per_tok / config.num_experts)
    assert 0 < idle < factors
    assert after.active == round(after.parameters - idle)
    assert after.parameters < before.parameters
