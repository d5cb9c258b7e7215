"""What the counter says equals what the formulas say, on random small configs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bench.errors import UserError
from bench.measurement.flops import counter
from bench.measurement.flops.cost_rows import (
    count_image_flops,
    count_text_flops,
    image_parts,
    language_parts,
)
from bench.measurement.model_size import count_size
from bench.models.classifiers import architectures, classifier
from bench.models.structure.model_structure import inspect_model
from tests.models import moe_zoo
from tests.models.tiny_networks import DENSE_ARCHITECTURES, build_dense


@st.composite
def moe_shapes(draw):
    experts = draw(st.sampled_from([4, 8]))
    return {
        "hidden_size": draw(st.sampled_from([32, 64])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "moe_intermediate_size": draw(st.sampled_from([16, 48])),
        "shared_expert_intermediate_size": draw(st.sampled_from([32, 80])),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
    }


def moe(shapes):
    config = Qwen2MoeConfig(
        vocab_size=97, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        decoder_sparse_step=1, **shapes,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


def expected(shapes, batch, length):
    """FLOPs of a Qwen2Moe forward from its shapes: 2 per multiply-add."""
    tokens, d = batch * length, shapes["hidden_size"]
    layers, experts, k = (
        shapes["num_hidden_layers"], shapes["num_experts"], shapes["num_experts_per_tok"],
    )  # fmt: skip
    projections = 2 * tokens * d * (d + d // 2 + d // 2 + d)
    quadratic = 2 * 2 * batch * length * length * d
    routed = 2 * tokens * k * 3 * d * shapes["moe_intermediate_size"]
    shared = 2 * tokens * 3 * d * shapes["shared_expert_intermediate_size"]
    gates = 2 * tokens * d * (experts + 1)
    return {
        "attention": layers * (projections + quadratic),
        "feed_forward": layers * (routed + shared + gates),
        "head": 2 * tokens * d * 97,
    }


@pytest.mark.broad
@settings(max_examples=10, deadline=None)
@given(moe_shapes(), st.integers(1, 3), st.sampled_from([8, 33]))
def test_counted_equals_the_formula_for_a_moe(shapes, batch, length):
    counted = count_text_flops(moe(shapes), batch, length)[0]
    wanted = expected(shapes, batch, length)
    parts = language_parts(counted)
    assert counted.total == pytest.approx(sum(wanted.values()), rel=0.01)
    for part, flops in wanted.items():
        assert parts[part] == pytest.approx(flops, rel=0.01)
    assert counted.total == sum(parts.values())


def test_counting_leaves_the_network_as_it_was():
    network = moe({"hidden_size": 32, "num_hidden_layers": 1, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 32, "num_experts": 4,
                   "num_experts_per_tok": 2})  # fmt: skip
    ids_BL = torch.arange(6).view(1, 6)
    before, implementation = network(ids_BL).logits, network.config._experts_implementation
    count_text_flops(network, 1, 16)
    assert torch.equal(network(ids_BL).logits, before)
    assert network.config._experts_implementation == implementation


def test_size_counts_zeros_tied_tensors_and_active_experts():
    network = moe({"hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 32, "num_experts": 4,
                   "num_experts_per_tok": 1})  # fmt: skip
    counted = count_size(network, inspect_model(network))
    routed = 2 * 4 * 3 * 32 * 16
    assert counted.routed == routed
    assert counted.shared == 2 * 3 * 32 * 32
    assert counted.active == counted.parameters - routed * 3 // 4
    with torch.no_grad():
        experts = network.model.layers[0].mlp.experts
        experts.down_proj.fill_(1.0)
        filled = count_size(network).nonzero
        experts.down_proj[0].zero_()
    assert filled - count_size(network).nonzero == 32 * 16


def test_a_tied_head_is_counted_once():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    tied = count_size(LlamaForCausalLM(config)).parameters
    config.tie_word_embeddings = False
    assert count_size(LlamaForCausalLM(config)).parameters - tied == 50 * 32


def test_lenet5_on_mnist_costs_what_its_layers_say():
    with torch.device("meta"):
        network = architectures.build_classifier(
            classifier.VisionConfig(architecture="lenet5", channels=1, size=28)
        )
    convolutions = 28 * 28 * 6 * 25 + 10 * 10 * 16 * 6 * 25
    dense = 400 * 120 + 120 * 84 + 84 * 10
    counted = count_image_flops(network.eval(), batch=3)
    assert counted.total == 2 * 3 * (convolutions + dense)
    assert image_parts(counted) == {
        "convolution": 2 * 3 * convolutions,
        "dense": 2 * 3 * dense,
        "other": 0,
    }


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", [*moe_zoo.SUPPORTED, *DENSE_ARCHITECTURES])
def test_plain_and_fake_tensors_are_counted_alike(name, monkeypatch):
    network = moe_zoo.build(name) if name in moe_zoo.SUPPORTED else build_dense(name)
    whole = counter.meta_forward
    kinds, found = [], []

    def noted(network, *, fake=True):
        kinds.append(fake)
        return whole(network, fake=fake)

    monkeypatch.setattr(counter, "meta_forward", noted)
    try:
        found.append(count_text_flops(network, 2, 9))
    except UserError:  # neither can be counted
        assert kinds == [False, True]
        return
    # GPT-2 looks at its mask.
    assert kinds == ([False, True] if name == "gpt2" else [False])
    monkeypatch.setattr(counter, "meta_forward", lambda network, **_: whole(network))
    found.append(count_text_flops(network, 2, 9))
    for plain, faked in zip(*found, strict=True):
        # Fake tensors ask for their device by an operator of their own.
        assert plain.operators <= faked.operators
        assert replace(plain, operators=faked.operators) == faked
