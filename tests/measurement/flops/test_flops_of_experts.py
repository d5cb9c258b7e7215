"""Counted and arithmetic FLOPs agree for every mixture of experts, dense and really pruned."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bench.data.calibration import Calibration
from bench.measurement.flops import analytic
from bench.measurement.flops.cost_rows import count_text_flops, language_parts
from bench.measurement.flops.counter import count_flops
from bench.method import Context
from bench.models.embedded.micro_moe import FOLDER
from bench.models.macs import macs_by_part
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.baselines.d2_moe.method import D2Moe
from methods.camera.pruning import CameraP
from methods.quantization.spectral import BitsMoeStyle
from methods.quantization.uniform import Gptq
from tests.measurement.flops.agreement import agree
from tests.models.tiny_networks import ARCHITECTURES, build, llama, tokens

EXPERTS = {
    "mixtral": "num_local_experts",
    "phimoe": "num_local_experts",
    "deepseek": "n_routed_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}

# Four a token and 32 tokens a sequence: experts that are dealt out evenly are so to 1 %.
BATCH, LENGTH = 4, 48


@st.composite
def configs(draw):
    """A random small config of any of the architectures."""
    name = draw(st.sampled_from(sorted(ARCHITECTURES)))
    heads, width = draw(st.sampled_from([2, 4])), draw(st.sampled_from([8, 12]))
    changes = {
        "num_hidden_layers": draw(st.integers(2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": heads * width,
        # Phi's sparse mixer takes two experts, whatever its config says.
        "num_experts_per_tok": 2 if name == "phimoe" else draw(st.sampled_from([1, 2, 3])),
        EXPERTS.get(name, "num_experts"): draw(st.sampled_from([4, 6])),
    }
    if name in ("mixtral", "phimoe", "olmoe"):
        changes["intermediate_size"] = draw(st.sampled_from([8, 20]))
    else:
        changes["moe_intermediate_size"] = draw(st.sampled_from([8, 20]))
    if name == "qwen3_moe":
        changes["head_dim"] = width
    return name, changes


def loaded(network):
    return Model(
        ModelConfig(name="tiny", source="tests"), network, None, "", None, torch.device("cpu")
    )


def pruned(network, ratio):
    """CAMERA-P with its micro-experts really gone, none left of some experts."""
    model = loaded(network)
    text = Calibration(tokens(rows=3), "calibration")
    assert CameraP(ratio=ratio, align=4).apply(model, Context(0, text)).effect == "removed"
    return model.network


def both_agree(network, length=LENGTH):
    structure, (text, token) = inspect_model(network), count_text_flops(network, BATCH, length)
    agree(text, analytic.text_forward_macs(network, structure, BATCH, length))
    return structure, token


@pytest.mark.broad
@settings(max_examples=6, deadline=None)
@given(configs(), st.integers(2, 20))
def test_a_forward_and_a_token(config, length):
    name, changes = config
    network = build(name, **changes)
    structure, token = both_agree(network, length)
    agree(token, analytic.text_token_macs(network, structure, BATCH, length))


@settings(max_examples=3, deadline=None)
@given(configs(), st.sampled_from([0.2, 0.5, 0.8]))
def test_pruned_by_camera(config, ratio):
    name, changes = config
    both_agree(pruned(build(name, **changes), ratio))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_pruned(name):
    both_agree(pruned(build(name), 0.4))


def test_every_part_is_where_it_belongs():
    network = build("qwen2_moe")
    counted = language_parts(count_text_flops(network, BATCH, LENGTH)[0])
    products = analytic.text_forward_macs(network, inspect_model(network), BATCH, LENGTH)
    parts = {name: 2 * macs for name, macs in macs_by_part(products).items()}
    rows = BATCH * LENGTH
    assert parts["head"] == counted["head"] == 2 * rows * 16 * 64
    assert parts["attention"] == 3 * 4 * BATCH * LENGTH**2 * 16
    assert parts["routed"] == 2 * 2 * rows * 2 * 3 * 16 * 12
    assert parts["shared"] == 2 * 2 * rows * 3 * 16 * 20
    assert parts["router"] == 2 * 2 * rows * 16 * (6 + 1)
    assert sum(parts.values()) == sum(counted.values())


def test_a_sliding_window():
    """Seen in a real call: on the meta device its mask has no values, and the count says so."""
    network, ids = build("mixtral", sliding_window=5), tokens(rows=2, length=16)
    structure = inspect_model(network)
    with torch.no_grad():
        with count_flops() as text:
            cache = network(ids[:, :15], use_cache=True).past_key_values
        with count_flops() as token:
            network(ids[:, 15:], past_key_values=cache, use_cache=True)
    products = analytic.text_forward_macs(network, structure, 2, 15)
    agree(text, products)
    agree(token, analytic.text_token_macs(network, structure, 2, 15))
    seen = sum(p.macs - p.masked for p in products if p.part == "attention")
    assert seen == 3 * 2 * 2 * 16 * (1 + 2 + 3 + 4 + 11 * 5)
    assert count_text_flops(network, 2, 15)[0].causal is None


def test_a_dense_decoder():
    network = llama()
    structure, _ = both_agree(network)
    assert set(macs_by_part(analytic.text_token_macs(network, structure, 1, 9))) == {
        "text",
        "attention",
        "head",
    }


@pytest.mark.broad
def test_packed_weights_and_shared_bases():
    context = Context(0, Calibration(tokens(rows=3), "calibration"))
    spectral = BitsMoeStyle(mean_bits=8, group=4)
    for method in (D2Moe(ratio=0.5), Gptq(bits=4, group=8, min_tokens=4), spectral):
        model = loaded(build("qwen2_moe"))
        method.apply(model, context)
        both_agree(model.network)


@pytest.fixture(scope="module")
def micro_moe():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.sample(1)
@pytest.mark.parametrize("ratio", [None, 0.2, 0.4, 0.6])
def test_counts_of_micro_moe_agree_dense_and_after_camera_p(micro_moe, ratio):
    """A forward and one token: it meets 4 of 16 experts, which pruning leaves of unlike widths."""
    network = copy.deepcopy(micro_moe).requires_grad_(False)
    if ratio is not None:
        CameraP(ratio=ratio).apply(loaded(network), Context(0, Calibration(tokens(3), "text")))
    structure, (text, token) = inspect_model(network), count_text_flops(network, 1, 512)
    agree(text, analytic.text_forward_macs(network, structure, 1, 512))
    agree(token, analytic.text_token_macs(network, structure, 1, 512))


@pytest.mark.broad
def test_a_token_after_any_method_that_leaves_unlike_experts():
    context = Context(0, Calibration(tokens(rows=3), "calibration"))
    pruned, packed = CameraP(ratio=0.6, align=2), Gptq(bits=4, group=4, min_tokens=4)
    for methods in ([pruned], [D2Moe(ratio=0.5)], [pruned, packed]):
        model = loaded(build("qwen2_moe"))
        for method in methods:
            method.apply(model, context)
            model.invalidate_structure()
        _, token = both_agree(model.network)
        agree(token, analytic.text_token_macs(model.network, model.structure, BATCH, LENGTH))
