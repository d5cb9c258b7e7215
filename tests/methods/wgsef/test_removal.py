"""Zeroed equals removed: for every architecture and kind of group, in torch and in ONNX."""

import onnxruntime
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.errors import UserError
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.classifiers.serialization import (
    load_classifier_folder,
    save_classifier,
    save_onnx,
)
from methods.wgsef.groups import convolution, residual, transformer
from methods.wgsef.groups.partition import GroupFamily, GroupPartition, Slice
from methods.wgsef.removal import shrink_language_model, smaller_classifier

MICRO = ["micro_lenet", "micro_vgg", "micro_resnet", "micro_mobilenet", "micro_densenet"]


def network(name, size=8):
    """A network in evaluation mode whose BatchNorms have seen data: means and shifts are not 0."""
    torch.manual_seed(0)
    built = build_classifier(VisionConfig(architecture=name, channels=1, size=size))
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return built.eval()


def kill(built, families, share=0.6):
    """Zero a random share of all groups and return which, family by family."""
    partition = GroupPartition(built, families)
    dead_M = torch.rand(partition.groups) < share
    partition.scale_((~dead_M).double())
    return partition.split(dead_M)


def zeroed_and_removed(name, kind, multiple=1, size=8):
    built = network(name, size)
    images = torch.randn(4, 1, size, size)
    families = getattr(convolution, kind)(built, images[:1])
    dense = built(images)
    dead = kill(built, families)
    zeroed = built(images)
    assert not torch.allclose(dense, zeroed, atol=1e-3)
    return built, zeroed, smaller_classifier(built, families, dead, multiple), images


@pytest.mark.parametrize("kind", ["filters", "channels"])
@pytest.mark.parametrize("name", MICRO)
def test_the_smaller_network_computes_what_the_zeroed_one_does(name, kind):
    built, zeroed, smaller, images = zeroed_and_removed(name, kind)
    assert sum(p.numel() for p in smaller.parameters()) < 0.7 * sum(
        p.numel() for p in built.parameters()
    )
    torch.testing.assert_close(smaller(images), zeroed, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50", "mobilenet_v1", "densenet40"])
def test_the_networks_of_the_paper_too(name):
    _, zeroed, smaller, images = zeroed_and_removed(name, "filters", size=32)
    torch.testing.assert_close(smaller(images), zeroed, atol=1e-5, rtol=1e-5)


def test_lenet_of_the_paper_too():
    _, zeroed, smaller, images = zeroed_and_removed("lenet5", "filters", size=28)
    torch.testing.assert_close(smaller(images), zeroed, atol=1e-5, rtol=1e-5)


def test_a_dead_residual_branch_is_left_out():
    built = network("micro_resnet")
    images = torch.randn(4, 1, 8, 8)
    families = residual.depth(built, images[:1])
    GroupPartition(built, families).scale_(torch.tensor([1.0, 0.0, 1.0]).double())
    smaller = smaller_classifier(built, families, [torch.tensor([False, True, False])])
    assert [left.block for left in smaller.config.removed] == ["features.2"]
    torch.testing.assert_close(smaller(images), built(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("multiple", [8, 64])
def test_kept_counts_are_rounded_up_as_far_as_there_are_groups(multiple):
    built, zeroed, smaller, images = zeroed_and_removed("micro_resnet", "filters", multiple)
    torch.testing.assert_close(smaller(images), zeroed, atol=1e-5, rtol=1e-5)
    for before, after in zip(built.modules(), smaller.modules(), strict=True):
        if isinstance(after, torch.nn.Conv2d):
            assert after.out_channels % multiple == 0 or after.out_channels == before.out_channels


def test_a_layer_that_lost_all_groups_keeps_one():
    built = network("micro_vgg")
    images = torch.randn(2, 1, 8, 8)
    families = convolution.filters(built, images[:1])
    dead = kill(built, families, share=2.0)
    smaller = smaller_classifier(built, families, dead)
    assert min(p.shape[0] for p in smaller.parameters()) == 1
    torch.testing.assert_close(smaller(images), built(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["micro_mobilenet", "micro_densenet"])
def test_a_pruned_network_comes_back_from_its_folder(name, tmp_path):
    _, _, smaller, images = zeroed_and_removed(name, "filters")
    save_classifier(smaller, tmp_path)
    torch.testing.assert_close(
        load_classifier_folder(tmp_path)(images), smaller(images), rtol=0, atol=0
    )


def test_a_network_pruned_twice_comes_back_too(tmp_path):
    _, _, smaller, images = zeroed_and_removed("micro_resnet", "filters")
    families = residual.depth(smaller, images[:1])
    GroupPartition(smaller, families).scale_(torch.tensor([0.0, 1.0, 1.0]).double())
    twice = smaller_classifier(smaller, families, [torch.tensor([True, False, False])])
    save_classifier(twice, tmp_path)
    torch.testing.assert_close(
        load_classifier_folder(tmp_path)(images), smaller(images), atol=1e-5, rtol=1e-5
    )


@pytest.mark.broad
@pytest.mark.parametrize(
    "name",
    [
        "micro_resnet",
        *(pytest.param(name, marks=pytest.mark.slow) for name in MICRO if name != "micro_resnet"),
    ],
)
def test_onnx_computes_the_same(name, tmp_path):
    _, _, smaller, images = zeroed_and_removed(name, "filters")
    session = onnxruntime.InferenceSession(save_onnx(smaller, tmp_path))
    (logits,) = session.run(None, {"image": images.numpy()})
    expected = smaller(images).detach()
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["filter_shapes", "weights"])
def test_groups_that_cannot_be_removed_are_one_sentence(kind):
    built = network("micro_vgg")
    families = getattr(convolution, kind)(built, torch.zeros(1, 1, 8, 8))
    dead = kill(built, families)
    with pytest.raises(UserError, match=rf"the {kind} of .* stay zeroed: .* a dense kernel"):
        smaller_classifier(built, families, dead)


def test_a_group_that_is_not_zero_is_not_removed():
    built = network("micro_vgg")
    families = convolution.filters(built, torch.zeros(1, 1, 8, 8))
    dead = [torch.ones(family.groups, dtype=torch.bool) for family in families]
    with pytest.raises(UserError, match="whose weights are not zero"):
        smaller_classifier(built, families, dead)


def test_overlapping_groups_are_one_sentence():
    built = network("micro_resnet")
    images = torch.zeros(1, 1, 8, 8)
    both = [*convolution.filters(built, images), *residual.depth(built, images)]
    with pytest.raises(UserError, match=r"groups overlap in .* choose one kind of group per layer"):
        GroupPartition(built, both)


def test_an_element_twice_in_one_family_overlaps_too():
    built = network("micro_vgg")
    twice = Slice("head.2.weight", (0,), torch.tensor([0, 0]), torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"groups overlap in head\.2\.weight"):
        GroupPartition(built, [GroupFamily("head", "filters", 2, (twice,))])


def language_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "kept"), [(transformer.neurons, (20, 20)), (transformer.heads, (2, 2))]
)
def test_a_language_model_without_its_dead_groups_is_loaded_again(make, kept, tmp_path):
    network, tokens = language_model(), torch.arange(14).reshape(2, 7)
    families = make(network)
    partition = GroupPartition(network, families)
    dead = [torch.randperm(f.groups) >= k for f, k in zip(families, kept, strict=True)]
    partition.scale_((~torch.cat(dead)).double())
    zeroed = network(tokens).logits
    shrink_language_model(network, families, dead)
    torch.testing.assert_close(network(tokens).logits, zeroed, atol=1e-5, rtol=1e-5)
    network.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens).logits, zeroed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "kept"), [(transformer.neurons, (20, 24)), (transformer.heads, (3, 1))]
)
def test_layers_of_different_sizes_run_and_their_config_says_nothing_wrong(make, kept):
    network, tokens = language_model(), torch.arange(14).reshape(2, 7)
    families, before = make(network), network.config.to_dict()
    dead = [torch.arange(f.groups) >= k for f, k in zip(families, kept, strict=True)]
    GroupPartition(network, families).scale_((~torch.cat(dead)).double())
    zeroed = network(tokens).logits
    shrink_language_model(network, families, dead)
    torch.testing.assert_close(network(tokens).logits, zeroed, atol=1e-5, rtol=1e-5)
    assert network.config.to_dict() == before


def test_a_number_of_heads_that_transformers_refuses_is_one_sentence():
    network = language_model()
    families = transformer.heads(network)
    dead = [torch.arange(4) == 2, torch.arange(4) == 1]
    GroupPartition(network, families).scale_((~torch.cat(dead)).double())
    with pytest.raises(UserError, match=r"could not reload 3 heads per layer: .*multiple") as said:
        shrink_language_model(network, families, dead)
    assert "\n" not in str(said.value)


def test_two_kinds_of_groups_at_once_are_one_sentence():
    network = language_model()
    families = [*transformer.neurons(network), *transformer.heads(network)]
    dead = [torch.zeros(family.groups, dtype=torch.bool) for family in families]
    with pytest.raises(UserError, match="got heads and neurons"):
        shrink_language_model(network, families, dead)
