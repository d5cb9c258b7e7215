"""Wanda, SparseGPT and magnitude on whole decoders: propagation, layouts, refusals."""

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.dense.sparsity import sparsegpt, wanda_mask
from methods.dense.weight_pruning import SparseGPT, Wanda, WeightMagnitude, linear_layers
from tests.models import tiny_networks

KINDS = pytest.mark.parametrize("kind", [Wanda, SparseGPT, WeightMagnitude])


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return tiny_networks.randomise(LlamaForCausalLM(config), 0)


def gpt2():
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return tiny_networks.randomise(GPT2LMHeadModel(config), 0)


def tokens():
    return torch.randint(0, 64, (6, 20), generator=torch.Generator().manual_seed(1))


def pruned(network, method):
    model = Model(
        ModelConfig(name="tiny", source="tests"), network, None, "", None, torch.device("cpu")
    )
    method.check(model.structure)
    return model, method.apply(model, Context(0, Calibration(tokens(), "text")))


@KINDS
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_projection_loses_the_ratio_and_nothing_else_changes(kind, make):
    dense = dict(make().named_parameters())
    model, report = pruned(make(), kind(ratio=0.5))
    inside = {
        linear.module.weight for layer in model.structure.layers for linear in linear_layers(layer)
    }
    for name, weight in model.network.named_parameters():
        if weight in inside:
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
        else:
            assert torch.equal(weight, dense[name]), name
    assert report.details["zeroed_weights"] == sum(int((w == 0).sum()) for w in inside)
    assert report.details["weights"] == sum(w.numel() for w in inside)


def inputs_of(network, layer):
    """The inputs of every projection of a layer, by hooks on a plain forward."""
    found = {}
    handles = [
        linear.module.register_forward_pre_hook(
            lambda module, args, name=linear.name: found.update({name: args[0].flatten(0, 1)})
        )
        for linear in linear_layers(layer)
    ]
    network(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", [Wanda, SparseGPT])
def test_each_layer_is_pruned_on_what_the_pruned_layers_before_it_produce(kind, make):
    """A transcription: prune layer by layer, each time with a forward of the network as it is."""
    expected = make()
    model, _ = pruned(make(), kind(ratio=0.4))
    layers = Model(
        ModelConfig(name="tiny", source="tests"), expected, None, "", None, torch.device("cpu")
    ).structure.layers
    for layer in layers:
        seen = inputs_of(expected, layer)
        for linear in linear_layers(layer):
            x_TC = seen[linear.name]
            if kind is Wanda:
                mask = wanda_mask(linear.weight, x_TC.norm(dim=0), 0.4, None)
                linear.weight[mask] = 0
            else:
                gram_CC = x_TC.T @ x_TC
                linear.weight.copy_(sparsegpt(linear.weight, gram_CC, 0.4, None))
    for (name, ours), theirs in zip(
        model.network.named_parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=name)


@KINDS
def test_ratio_zero_reports_that_nothing_was_done(kind):
    dense = llama()
    model, report = pruned(llama(), kind(ratio=0))
    assert report.effect == "none"
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.network.parameters(), dense.parameters(), strict=True)
    )


@KINDS
def test_a_pattern_holds_in_every_projection(kind):
    model, _ = pruned(llama(), kind(ratio=0.5, pattern="2:4"))
    for layer in model.structure.layers:
        for linear in linear_layers(layer):
            runs = (linear.weight == 0).unflatten(1, (-1, 4)).sum(2)
            assert (runs == 2).all()


def test_a_pattern_with_another_ratio_is_one_sentence():
    with pytest.raises(ValidationError, match=r"set ratio=0\.5"):
        Wanda(ratio=0.2, pattern="2:4")


def test_a_block_that_cuts_a_run_is_one_sentence():
    with pytest.raises(ValidationError, match="multiple of 4"):
        SparseGPT(ratio=0.5, pattern="2:4", block=6)


@KINDS
def test_a_mixture_of_experts_is_refused_by_name(kind):
    network = tiny_networks.build("mixtral")
    with pytest.raises(UserError, match=r"Mixtral.*routed experts"):
        pruned(network, kind(ratio=0.5))
