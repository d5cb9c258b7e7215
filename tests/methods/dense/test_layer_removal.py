"""ShortGPT: influence against a loop over tokens, and removal against a network built without."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.models.saving import save_model
from bench.schema import ModelConfig
from methods.dense.layer_removal import ShortGPT, block_influence
from tests.models import tiny_networks

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "head_dim": 4,
}  # fmt: skip


def tokens():
    return torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(1))


def model_of(network):
    config = ModelConfig(name="tiny", source="tests")
    return Model(config, network, tiny_networks.tokenizer(), "", None, torch.device("cpu"))


def llama():
    return tiny_networks.randomise(LlamaForCausalLM(LlamaConfig(**SIZES)), 0)


def short(network, **knobs):
    model, method = model_of(network), ShortGPT(**knobs)
    method.check(model.structure)
    return model, method.apply(model, Context(0, Calibration(tokens(), "text")))


def test_the_influence_of_a_layer_is_that_of_a_loop_over_tokens():
    network = llama()
    states = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: states.append(
                (args[0], output[0] if isinstance(output, tuple) else output)
            )
        )
        for layer in network.model.layers
    ]
    network(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    _, report = short(llama(), count=1)
    for entry, (before, after) in zip(report.layers, states, strict=True):
        total = 0.0
        for b, a in zip(before.flatten(0, 1).double(), after.flatten(0, 1).double(), strict=True):
            total += 1 - float(b @ a / (b.norm() * a.norm()))
        assert entry.model_extra["influence"] == pytest.approx(total, rel=1e-4)


def test_a_layer_that_changes_nothing_has_no_influence_and_goes_first():
    network = llama()
    for part in (network.model.layers[2].self_attn.o_proj, network.model.layers[2].mlp.down_proj):
        part.weight.zero_()
    dense = network(tokens(), use_cache=False).logits
    model, report = short(network, count=1)
    assert report.details["removed_layers"] == [2]
    assert report.layers[2].model_extra["influence"] == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(model.network(tokens(), use_cache=False).logits, dense)


def test_a_quarter_turn_is_an_influence_of_one_and_zeros_count_as_half():
    before = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    after = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])
    assert block_influence(before, after).tolist() == [[1.0, 0.5]]


@pytest.mark.parametrize("family", [LlamaForCausalLM, Qwen3ForCausalLM])
def test_what_is_left_generates_and_reloads_as_stock_transformers_does(family, tmp_path):
    config = {LlamaForCausalLM: LlamaConfig, Qwen3ForCausalLM: Qwen3Config}[family](**SIZES)
    network = tiny_networks.randomise(family(config), 0)
    model, report = short(network, ratio=0.5)
    assert len(model.structure.layers) == 2
    assert len(report.details["removed_layers"]) == 2
    # With a cache: the numbers by which attention finds its place in it must agree.
    prompt = tokens()[:1]
    cached = model.network.generate(prompt, max_new_tokens=4, do_sample=False)
    plain = prompt
    for _ in range(4):
        logits = model.network(plain, use_cache=False).logits
        plain = torch.cat([plain, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, plain)
    assert save_model(model, tmp_path / "out") == "stock"
    again = family.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        again(tokens(), use_cache=False).logits, model.network(tokens(), use_cache=False).logits
    )


def test_a_mixture_of_experts_loses_layers_too():
    model, _ = short(tiny_networks.build("qwen3_moe"), count=1)
    assert len(model.structure.layers) == 2
    assert model.network(tokens(), use_cache=False).logits.isfinite().all()


def test_no_layer_to_remove_changes_nothing():
    _, report = short(llama(), ratio=0.1)
    assert report.details["removed_layers"] == []


def test_removing_every_layer_is_one_sentence():
    with pytest.raises(UserError, match=r"count=4 would remove all 4 layers.*at most 3"):
        short(llama(), count=4)
