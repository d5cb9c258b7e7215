""""""

import pytest
import torch
import transformers
from torch import nn

from bench.errors import UserError
from bench.models.structure.model_structure import inspect_model
from methods.baselines.expert_scores import Reap
from tests.models.tiny_networks import ARCHITECTURES, SIZES, build, llama, unfuse

D_SHARED = {"qwen2_moe": 20, "deepseek_v2": 24, "deepseek_v3": 24, "deepseek": 24}


@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_moe_blocks_and_skips_dense_layers(name, layout):
    network = build(name) if layout == "fused" else unfuse(build(name))
    structure = inspect_model(network)
    first = 1 if name in D_SHARED else 0

    assert structure.architecture == type(network).__name__
    assert structure.model_type == name
    assert len(structure.layers) == 3
    assert [block.layer for block in structure.moe] == list(range(first, 3))
    assert structure.parameters == sum(p.numel() for p in network.parameters())
    for block in structure.moe:
        assert network.get_submodule(block.name) is block.block
        assert block.layout == layout
        assert (block.num_experts, block.top_k, block.d_model) == (6, 2, 16)
        assert (block.d_ff, block.d_shared) == (12, D_SHARED.get(name, 0))
        assert block.widths == (12,) * 6
        assert (block.shared_gate is not None) == (name == "qwen2_moe")
        assert block.parameters == sum(
            p.numel()
            for part in (block.experts, block.shared)
            if part is not None
            for p in part.parameters()
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_works_without_weights(name):
    config = build(name).config
    with torch.device("meta"):
        hollow = transformers.AutoModelForCausalLM.from_config(config)
    assert [b.widths for b in inspect_model(hollow).moe] == [
        b.widths for b in inspect_model(build(name)).moe
    ]


@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_views_compute_what_the_experts_compute(name, layout):
    network = build(name)
    fused = inspect_model(network).moe[-1].experts
    if layout == "list":
        unfuse(network)
    x = torch.randn(7, 16)
    everything = torch.arange(6).repeat(7, 1)
    weight = torch.rand(7, 6)
    block = inspect_model(network).moe[-1]
    summed = sum(
        view.combine(view.hidden(x)) * weight[:, e, None]
        for e in range(6)
        for view in [block.expert(e)]
    )
    torch.testing.assert_close(fused(x, everything, weight), summed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["fused", "list"])
def test_zeroing_a_view_changes_the_network(layout):
    network = build("deepseek_v2") if layout == "fused" else unfuse(build("deepseek_v2"))
    block = inspect_model(network).moe[0]
    block.expert(3).zero(torch.tensor([0, 5]))
    block.shared_view().zero(torch.tensor([7]))

    again = inspect_model(network).moe[0]
    view, shared = again.expert(3), again.shared_view()
    assert not view.gate[[0, 5]].any()
    assert not view.up[[0, 5]].any()
    assert not view.down[:, [0, 5]].any()
    assert view.gate[[1, 4]].all()
    assert not shared.down[:, 7].any()
    assert again.expert(2).gate.all()


def test_dense_network_has_layers_but_no_moe_block():
    structure = inspect_model(llama())
    assert len(structure.layers) == 3
    assert structure.moe == ()


def test_a_network_that_is_no_decoder_has_neither():
    structure = inspect_model(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert (structure.layers, structure.moe, structure.architecture) == ((), (), "Sequential")


def llama4():
    sizes = SIZES | {"intermediate_size_mlp": 12, "num_local_experts": 4, "head_dim": 8}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))


def jet_moe():
    sizes = {k: v for k, v in SIZES.items() if k != "num_attention_heads"}
    config = transformers.JetMoeConfig(**sizes, num_local_experts=4, kv_channels=8)
    return transformers.JetMoeForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (llama4, "called without the router's weights"),
        (jet_moe, "no router"),
    ],
)
def test_refuses_experts_of_another_kind_by_name(make, reason):
    with torch.device("meta"):
        network = make()
    structure = inspect_model(network)
    with pytest.raises(UserError, match=reason) as refusal:
        _ = structure.moe
    assert type(network).__name__ in str(refusal.value)


def mix_channels(block):
    """Make the gating of a block's experts a softmax over all channels."""
    own = type(block.experts)
    block.experts.__class__ = type(
        own.__name__, (own,), {"_apply_gate": lambda _, both: both.chunk(2, -1)[0].softmax(-1)}
    )


class _List(nn.ModuleList):
    def forward(self, x, index, weight):
        return x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "extra", nn.Linear(2, 2)), "role of its submodule extra"),
        (lambda block: block.register_parameter("scale", nn.Parameter(torch.ones(1))), "scale"),
        (lambda block: delattr(block, "gate"), "no router"),
        (
            lambda block: setattr(block, "experts", nn.ModuleList([nn.Linear(2, 2)])),
            "is not called with",
        ),
        (lambda block: setattr(block, "experts", _List([nn.Linear(2, 2)])), "not a gated"),
        (lambda block: setattr(block.experts, "has_post_expert_norm", True), "norm"),
        (lambda block: delattr(block.experts, "is_transposed"), "do not declare their layout"),
        (mix_channels, "combine their channels"),
    ],
)
def test_refuses_a_block_with_parts_it_does_not_know(change, reason):
    network = build("qwen3_moe")
    change(network.model.layers[1].mlp)
    with pytest.raises(UserError, match=reason):
        _ = inspect_model(network).moe


class ParallelExperts(nn.Module):
    """Experts that are not a part named `experts` of their block."""


def test_refuses_experts_under_another_name():
    network = llama()
    network.model.layers[2].mlp.input_linear = ParallelExperts()
    with pytest.raises(UserError, match=r"mlp\.input_linear is a ParallelExperts"):
        _ = inspect_model(network).moe


class Router(nn.Linear):
    """A router that states how many experts there are, in a block without a known name."""

    num_experts = 4


def test_a_model_with_experts_is_never_said_to_have_none():
    network = llama()
    network.model.layers[1].mlp.chooser = Router(16, 4)
    structure = inspect_model(network)
    with pytest.raises(UserError, match=r"mlp\.chooser is a Router"):
        _ = structure.moe
    with pytest.raises(UserError, match="in an unsupported form"):
        Reap(ratio=0.2).check(structure)


class Stacks(nn.Module):
    """A decoder with lists of layers and of other modules side by side."""

    def __init__(self, **lists):
        super().__init__()
        for name, modules in lists.items():
            self.add_module(name, nn.ModuleList(modules))


def layer():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("lengths", [(2, 3), (3, 2), (2, 2), (1, 5)])
def test_neither_of_two_stacks_is_dropped_in_silence(lengths):
    first, second = ([layer() for _ in range(length)] for length in lengths)
    structure = inspect_model(Stacks(early=first, late=second))
    said = rf"early \({lengths[0]}\) and late \({lengths[1]}\)"
    for read in (lambda: structure.layers, lambda: structure.moe):
        with pytest.raises(UserError, match=said):
            read()
    assert structure.parameters == sum(lengths) * 40


def test_lists_of_matrices_beside_the_layers_and_inside_them_are_no_stacks():
    inner = Stacks(experts=[layer(), layer(), layer()])
    layers = [inner, layer()]
    network = Stacks(layers=layers, norms=[nn.LayerNorm(4) for _ in range(9)])
    assert inspect_model(network).layers == tuple(layers)
    assert inspect_model(nn.Linear(2, 2)).layers == ()
