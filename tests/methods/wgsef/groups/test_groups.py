"""Groups: a zeroed group has no effect on the outputs, and norms are those of its weights."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bench.errors import UserError
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from methods.wgsef.groups import convolution, residual, transformer
from methods.wgsef.groups.costs import GroupCosts
from methods.wgsef.groups.partition import GroupPartition, inner_axes

KINDS = ["filters", "channels", "filter_shapes", "weights", "depth"]
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def convnet(name="micro_resnet"):
    torch.manual_seed(0)
    network = build_classifier(VisionConfig(architecture=name, channels=1, size=8)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0, 0.3)
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
    return network


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)).eval()


def moe():
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    return Qwen2MoeForCausalLM(config).eval()


def vectors(partition):
    """All groups as flat vectors, collected one unit after the other."""
    found = []
    for family in partition.families:
        parts = [[] for _ in range(family.groups)]
        for owned in family.owned_slices:
            weight = partition.parameters[owned.tensor].detach()
            order = (*owned.axes, *inner_axes(weight.shape, owned.axes))
            count = int(torch.tensor([weight.shape[a] for a in owned.axes]).prod())
            units = weight.permute(order).reshape(count, -1)
            for unit, group in zip(owned.units.tolist(), owned.groups.tolist(), strict=True):
                parts[group].append(units[unit])
        found += [torch.cat([part.flatten() for part in group]) for group in parts]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_groups_weights(kind):
    network = convnet()
    module = residual if kind == "depth" else convolution
    families = getattr(module, kind)(network, torch.zeros(1, 1, 8, 8))
    partition = GroupPartition(network, families)
    expected = vectors(partition)
    norms = torch.stack([vector.double().norm() for vector in expected])
    torch.testing.assert_close(partition.norms(), norms, rtol=1e-5, atol=1e-6)
    sizes = torch.tensor([float(len(vector)) for vector in expected]).double()
    torch.testing.assert_close(partition.elements_M, sizes)


@pytest.mark.parametrize("make", [transformer.neurons, transformer.heads])
def test_norms_of_transformer_groups(make):
    partition = GroupPartition(network := llama(), make(network))
    norms = torch.stack([vector.double().norm() for vector in vectors(partition)])
    torch.testing.assert_close(partition.norms(), norms, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [transformer.experts, transformer.micro_experts])
def test_norms_of_expert_groups(make):
    partition = GroupPartition(network := moe(), make(network))
    norms = torch.stack([vector.double().norm() for vector in vectors(partition)])
    torch.testing.assert_close(partition.norms(), norms, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["micro_lenet", "micro_vgg", "micro_mobilenet", "micro_densenet"])
def test_a_zero_filter_is_invisible_whatever_its_readers_do(name):
    network = convnet(name)
    images = torch.randn(3, 1, 8, 8)
    families = convolution.filters(network, images[:1])
    partition = GroupPartition(network, families)
    dead_M = torch.rand(partition.groups) < 0.5
    partition.scale_((~dead_M).double())
    before = network(images)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for family, gone_M in zip(families, partition.split(dead_M), strict=True):
            for reader in family.reader_slices:
                if reader.tensor in parameters:
                    weight = parameters[reader.tensor].movedim(reader.axes[0], 0)
                    weight[reader.units_of(gone_M)] += 5
    torch.testing.assert_close(network(images), before, atol=1e-4, rtol=1e-4)


def observed(network, name, tokens):
    """Run a language model and return the output of one of its modules."""
    seen = []
    handle = network.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    network(tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("make", "network", "inner"),
    [
        (transformer.neurons, llama, "model.layers.0.mlp"),
        (transformer.micro_experts, moe, "model.layers.0.mlp.experts"),
        (transformer.experts, moe, "model.layers.0.mlp.experts"),
    ],
)
def test_zeroing_all_groups_of_a_layer_silences_it(make, network, inner):
    network = network()
    partition = GroupPartition(network, make(network))
    tokens = torch.randint(0, 50, (2, 7))
    assert observed(network, inner, tokens).abs().max() > 0
    partition.scale_(torch.zeros(partition.groups))
    assert observed(network, inner, tokens).abs().max() == 0


def test_a_head_group_holds_a_kv_head_with_its_query_heads():
    network = llama()
    family = transformer.heads(network)[0]
    partition = GroupPartition(network, [family])
    partition.scale_(torch.tensor([0.0, 1.0]).double())
    attention = network.model.layers[0].self_attn
    assert family.groups == 2
    assert attention.q_proj.weight[:16].abs().max() == 0 < attention.q_proj.weight[16:].abs().min()
    assert attention.k_proj.bias[:8].abs().max() == 0
    assert attention.o_proj.weight[:, :16].abs().max() == 0


@pytest.mark.parametrize("make", [transformer.experts, transformer.micro_experts])
def test_a_network_without_experts_is_one_sentence(make):
    with pytest.raises(UserError, match="LlamaForCausalLM has no fused experts"):
        make(llama())


def test_a_network_without_branches_is_one_sentence():
    with pytest.raises(UserError, match="no residual branches"):
        residual.depth(convnet("micro_vgg"), torch.zeros(1, 1, 8, 8))


def test_spreading_and_adding_reach_the_weights_of_each_group():
    network = convnet("micro_densenet")
    partition = GroupPartition(network, convolution.filters(network, torch.zeros(1, 1, 8, 8)))
    before = {name: weight.detach().clone() for name, weight in partition.parameters.items()}
    value_M = torch.arange(1.0, partition.groups + 1).double()
    spread = partition.expand_to_weights(value_M)
    partition.add_(value_M, {name: torch.ones_like(w) for name, w in before.items()})
    for name, weight in partition.owned_parameters().items():
        torch.testing.assert_close(weight.detach(), before[name] + spread[name])
    torch.testing.assert_close(
        partition.sum_named(spread.__getitem__), value_M * partition.elements_M
    )


def test_rows_are_padded_families_and_flat_undoes_them():
    network = convnet()
    partition = GroupPartition(network, convolution.filters(network, torch.zeros(1, 1, 8, 8)))
    value_M = torch.rand(partition.groups)
    rows = partition.pad_by_family(value_M)
    assert rows.shape == (len(partition.sizes), max(partition.sizes))
    for row, part in zip(rows, partition.split(value_M), strict=True):
        assert torch.equal(row[: len(part)], part) and not row[len(part) :].any()
    assert torch.equal(partition.unpad(rows), value_M)


@pytest.mark.parametrize("name", ["micro_vgg", "micro_resnet", "micro_mobilenet", "micro_densenet"])
def test_costs_are_those_of_the_network_that_is_left(name):
    from methods.wgsef.removal import smaller_classifier

    network = convnet(name)
    image = torch.zeros(1, 1, 8, 8)
    families = convolution.filters(network, image)
    partition = GroupPartition(network, families)
    dead_M = torch.rand(partition.groups) < 0.5
    partition.scale_((~dead_M).double())
    dead = partition.split(dead_M)
    smaller = smaller_classifier(network, families, dead)
    kept_1F = torch.tensor([[int((~gone).sum()) for gone in dead]])
    for quantity in ("macs", "bytes"):
        predicted = float(GroupCosts(network, families, image, quantity).total(kept_1F))
        left = GroupCosts(smaller, convolution.filters(smaller, image), image, quantity).dense()
        assert predicted == pytest.approx(left, rel=1e-9)


def test_a_cost_budget_over_single_weights_is_one_sentence():
    network = convnet()
    image = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UserError, match=r"unit=macs needs groups .*got weights"):
        GroupCosts(network, convolution.weights(network, image), image, "macs")


class Reversed(torch.nn.Module):
    """Registers the layer that computes the logits first."""

    def __init__(self):
        super().__init__()
        self.head, self.body = torch.nn.Linear(4, 3), torch.nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_the_layer_without_groups_is_the_one_that_runs_last():
    families = convolution.weights(Reversed(), torch.zeros(1, 1, 8, 8))
    assert [family.name for family in families] == ["body"]


def test_looking_at_a_network_leaves_it_as_it_was():
    network = convnet().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for measure in (convolution.last_layer, convolution.weights):
        measure(network, torch.ones(1, 1, 8, 8))
    with pytest.raises(RuntimeError):
        convolution.last_layer(network, torch.ones(1, 5, 8, 8))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.broad
def test_torch_pruning_imports_neither_timm_nor_wandb_and_timm_stays_importable():
    code = (
        "import sys; from methods.wgsef.groups.convolution import torch_pruning;"
        "print(torch_pruning().__name__, {'timm', 'wandb'} & set(sys.modules));"
        "import timm; print(timm.__name__)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["torch_pruning", "set()", "timm"]
