"""Every method on every dense architecture: it runs and tells the truth, or refuses."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.errors import UserError
from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.expert_hooks import observe_experts
from bench.models.loading import load_model
from bench.models.saving import save_model
from bench.models.source import resolve_model
from bench.models.structure.dense_layer import feed_forwards, weight_of
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.camera.joint import CameraPQ
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ, CameraQDagger
from methods.moe.calibration import NullObserver
from methods.quantization.uniform import Awq, Rtn
from tests.methods.dense.architectures import (
    DOCUMENT,
    END,
    METHODS,
    START,
    applied,
    context,
    refusal,
    table,
)
from tests.models.tiny_networks import DENSE_ARCHITECTURES, build, build_dense, save, tokens

EVERY = pytest.mark.parametrize("name", DENSE_ARCHITECTURES)


def numel(network):
    return sum(weight.numel() for weight in network.parameters())


def zeros(network):
    return sum(int((weight == 0).sum()) for weight in network.parameters())


@pytest.mark.sample(2)
@EVERY
def test_each_method_runs_and_counts_what_it_did(name):
    dense = build_dense(name)
    wanted, before = dense(tokens()).logits, numel(dense)
    for label, method in METHODS.items():
        if refusal(method, dense) is not None:
            continue
        network = copy.deepcopy(dense)
        model, report = applied(method, network)
        got, details = model.network(tokens()).logits, report.details
        assert got.isfinite().all() and not torch.equal(got, wanted), label
        if report.effect == "removed":
            gone = details.get("removed_parameters", details.get("removed_weights"))
            if label.startswith("flap"):
                # What goes leaves its mean as a bias where there was none.
                assert numel(model.network) < before
            elif gone is not None:
                assert before - numel(model.network) == gone > 0, label
            else:
                assert numel(model.network) < before, label
        elif report.effect == "zeroed":
            assert zeros(model.network) - zeros(dense) == details["zeroed_weights"], label
        else:
            assert report.effect == "quantized", label
            bits = {key: found["weights"] for key, found in details["bits"].items()}
            packed = sum(linear.numel for _, linear in packed_linears(model.network))
            removed = sum(layer.removed or 0 for layer in report.layers)
            block = inspect_model(dense).micro_expert_blocks[0]
            each = block.matrices * block.d_model
            assert sum(bits.values()) == packed + removed * each, label


@EVERY
def test_a_block_equals_its_decomposition(name):
    class Outputs(NullObserver):
        def __init__(self, block):
            self.view, self.apart = block.expert(0), []

        def routed(self, expert, x_SD, hidden_SF, weight_S):
            assert expert == 0 and bool((weight_S == 1).all())
            self.sum = sum(hidden_SF[:, [c]] * self.view.down[:, c] for c in range(self.view.width))
            torch.testing.assert_close(self.view.hidden(x_SD), hidden_SF, rtol=1e-6, atol=1e-6)

        def output(self, y_TD):
            bias = 0 if self.view.down_bias is None else self.view.down_bias
            self.apart.append(float((self.sum + bias - y_TD).norm() / y_TD.norm()))

    network = build_dense(name)
    blocks = inspect_model(network).micro_expert_blocks
    assert len(blocks) == 2
    observers = {block: Outputs(block) for block in blocks}
    with observe_experts(observers):
        network(tokens())
    assert all(max(found.apart) < 1e-6 for found in observers.values())


@pytest.mark.sample(6)
@EVERY
def test_zeroed_equals_removed_and_the_stock_class_reloads_it(name, tmp_path):
    zeroed, _ = applied(CameraP(ratio=0.4, state="zeroed"), build_dense(name))
    model, report = applied(CameraP(ratio=0.4), build_dense(name))
    wanted = zeroed.network(tokens()).logits
    torch.testing.assert_close(model.network(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert report.details["padding_micro_experts"] == 0
    assert {block.widths for block in model.structure.micro_expert_blocks} == {(24,)}
    assert save_model(model, tmp_path) == "stock"
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    prompt = tokens(rows=1)
    assert torch.equal(
        again.generate(prompt, max_new_tokens=3, do_sample=False),
        zeroed.network.generate(prompt, max_new_tokens=3, do_sample=False),
    )


@EVERY
def test_layers_of_different_widths_run_and_have_no_config(name, tmp_path):
    knobs = {"ratio": 0.4, "scope": "global", "sequential": False}
    zeroed, _ = applied(CameraP(state="zeroed", **knobs), build_dense(name))
    model, _ = applied(CameraP(**knobs), build_dense(name))
    first, second = (block.d_ff for block in model.structure.micro_expert_blocks)
    assert first != second
    wanted = zeroed.network(tokens()).logits
    torch.testing.assert_close(model.network(tokens()).logits, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="shape that differs from the network's config"):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.sample(12)
@pytest.mark.parametrize("label", ["camera_q", "camera_q_dagger", "rtn", "awq"])
@EVERY
def test_many_bits_change_next_to_nothing(name, label):
    """Permuted rows, fused matrices and biases end up where they belong."""
    full = {"group": 8, "attention_bits": 8}
    method = {
        "camera_q": CameraQ(bits=(8, 7), shares=(1, 1), block=4, rounding="rtn", **full),
        "camera_q_dagger": CameraQDagger(bits=(8, 7), shares=(1, 1), rounding="rtn", **full),
        "rtn": Rtn(bits=8, **full),
        "awq": Awq(bits=8, **full),
    }[label]
    network = build_dense(name)
    wanted = network(tokens()).logits
    model, _ = applied(method, network)
    apart = (model.network(tokens()).logits - wanted).norm() / wanted.norm()
    assert 0 < apart < 0.05


@pytest.mark.sample(4)
@EVERY
def test_a_packed_decoder_is_loaded_from_its_folder(name, tmp_path):
    # With neurons of 0 bits, which are removed, their biases with them.
    method = CameraPQ(bits=(4, 0), budget_bits=5, block=4, group=8, rounding="rtn")
    model, report = applied(method, build_dense(name))
    assert sum(layer.removed for layer in report.layers) > 0
    assert save_model(model, tmp_path) == "slimbench"
    config = ModelConfig(name="t", source="local", path=str(tmp_path))
    again = load_model(resolve_model(config, offline=True))
    assert torch.equal(again.network(tokens()).logits, model.network(tokens()).logits)


STREAMED = ["camera_p", "camera_q", "camera_pq", "gptq", "awq", "wanda", "sparsegpt", "shortgpt"]


@pytest.mark.broad
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_a_decoder_on_disk_is_changed_like_one_in_memory(name, tmp_path):
    folder = save(build_dense(name), tmp_path / "model")

    def loaded(device_map):
        config = ModelConfig(name="t", source="local", path=str(folder), device_map=device_map)
        return load_model(resolve_model(config, offline=True))

    for label in STREAMED:
        logits = []
        for device_map in ("offload_disk", None):
            model = loaded(device_map)
            METHODS[label].apply(model, context())
            logits.append(model.network(tokens()).logits)
        assert torch.equal(*logits), label
    with pytest.raises(UserError, match=r"set model\.device_map=null"):
        METHODS["wgsef_neurons"].apply(loaded("offload_disk"), context())


@pytest.mark.broad
@pytest.mark.parametrize("name", ["llama_biased", "gemma2", "phi3", "gpt2", "opt", "falcon"])
def test_each_method_runs_in_bfloat16(name):
    dense = build_dense(name).to(torch.bfloat16)
    for label, method in METHODS.items():
        if refusal(method, dense) is None:
            model, report = applied(method, copy.deepcopy(dense))
            logits = model.network(tokens()).logits
            assert logits.dtype == torch.bfloat16 and logits.isfinite().all(), label
            if label == "awq":
                assert any(entry["folded"] for layer in report.layers for entry in layer.scaled)


def test_a_class_that_does_more_with_its_neurons_is_refused():
    network = build_dense("llama")
    mlp = network.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).relu() * mlp.up_proj(x))
    with pytest.raises(UserError, match=r"layers\.0\.mlp is a LlamaMLP, .* unknown way"):
        applied(CameraP(ratio=0.4), network)


def test_a_layer_without_a_known_feed_forward_is_refused():
    network = build_dense("llama")
    del network.model.layers[1].mlp.act_fn
    with pytest.raises(UserError, match=r"LlamaForCausalLM has .* model\.layers\.1 has 0 feed"):
        CameraP(ratio=0.4).check(inspect_model(network))


def test_a_mixture_keeps_its_blocks():
    structure = inspect_model(build("deepseek"))
    assert structure.micro_expert_blocks == structure.moe
    assert structure.dense_blocks == ()
    assert "has experts: use gptq" in refusal(METHODS["awq"], build("mixtral"))


def test_a_view_of_a_feed_forward_shares_its_memory():
    for name in ("gpt2", "phi3", "opt"):
        network = build_dense(name)
        (found,) = feed_forwards(inspect_model(network).layers[0])
        found.view().zero(torch.tensor([1]))
        view = found.view()
        assert not view.up[1].any() and not view.down[:, 1].any() and view.up[0].any()
        assert not weight_of(found.down)[:, 1].any()


@pytest.mark.broad
def test_the_document_states_what_is_refused():
    text = DOCUMENT.read_text(encoding="utf-8")
    written = text.partition(START)[2].partition(END)[0]
    assert written == table(), "run python -m tests.methods.dense.architectures"
