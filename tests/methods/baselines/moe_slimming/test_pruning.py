"""What MoE-Slimming removes: the wanted number, in widths as asked, and nothing that is shared."""

import copy

import pytest
import torch

from bench.errors import UserError
from bench.models.structure.model_structure import inspect_model
from methods.baselines.moe_slimming import MoESlimming
from tests.methods.method_application import applied, zeroed
from tests.models import moe_zoo
from tests.models.tiny_networks import ARCHITECTURES, build, build_dense, tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zeroed_equals_removed_and_shared_experts_stay(name):
    networks = [build(name) for _ in range(2)]
    reports = [
        applied(MoESlimming(ratio=0.3, state=state), network)
        for state, network in zip(("zeroed", "removed"), networks, strict=True)
    ]
    rows = tokens()
    torch.testing.assert_close(
        networks[0](rows).logits, networks[1](rows).logits, rtol=1e-4, atol=1e-4
    )
    blocks = inspect_model(networks[0]).moe
    gone = [zeroed(block) for block in blocks]
    assert sum(map(len, gone)) == len(blocks) * int(0.3 * blocks[0].micro_experts)
    assert all(place >= blocks[0].d_shared for places in gone for place in places)
    assert reports[0].details["removed_parameters"] == reports[1].details["removed_parameters"]


@pytest.mark.parametrize("order", ["first", "second"])
def test_aligned_widths(order):
    network = build("mixtral")
    before = inspect_model(network).moe
    total = sum(sum(block.widths) for block in before)
    report = applied(MoESlimming(ratio=0.5, multiple=4, least=8, order=order), network)
    widths = [width for block in inspect_model(network).moe for width in block.widths]
    assert all(width == 0 or (width >= 8 and width % 4 == 0) for width in widths)
    assert abs(sum(widths) - total // 2) <= 4
    assert report.details["removed_micro_experts"] == total - sum(widths)


def test_the_least_active_channels_of_an_expert_go():
    network = build("mixtral")
    block = inspect_model(network).moe[0]
    weak = [1, 5, 7]
    for expert in range(block.num_experts):
        view = block.expert(expert)
        for part in (view.gate, view.up):
            part[weak] *= 1e-3
    applied(MoESlimming(ratio=0.25, state="zeroed", least=0), network)
    width = block.d_ff
    lost = {}
    for place in zeroed(block):
        lost.setdefault(place // width, []).append(place % width)
    assert lost
    for channels in lost.values():
        assert set(weak) <= set(channels) or set(channels) <= set(weak)


def test_ratio_zero_changes_nothing_and_dense_layers_are_narrowed():
    network = build("mixtral")
    same = copy.deepcopy(network)
    assert applied(MoESlimming(ratio=0.0), network).effect == "none"
    assert torch.equal(network(tokens()).logits, same(tokens()).logits)
    report = applied(MoESlimming(ratio=0.4), build_dense("llama"))
    # A budget over both layers; the more a layer adds to its output, the more of it stays.
    assert sum(layer.removed for layer in report.layers) == 2 * 16


def test_a_ratio_beyond_the_routed_experts_is_refused():
    with pytest.raises(UserError, match="routed experts have 72"):
        MoESlimming(ratio=0.9).check(inspect_model(build("qwen2_moe")))


def test_layers_with_several_hidden_states_per_token_are_refused():
    network = moe_zoo.build("deepseek_v4")
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    with pytest.raises(UserError, match=r"layer of model\.layers\.0\.mlp returns several"):
        applied(MoESlimming(ratio=0.3), network)
    assert all(torch.equal(weight, before[name]) for name, weight in network.named_parameters())
