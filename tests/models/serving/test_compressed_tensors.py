"""Quantized runs as compressed-tensors: stock transformers computes the same logits."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.errors import UserError
from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.loading import open_folder
from bench.models.saving import save_model
from bench.models.serving.compressed_tensors import name_patterns
from bench.models.serving.engines import find_engine
from bench.models.structure.model_structure import inspect_model
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ
from methods.quantization.mixture import Mc
from methods.quantization.uniform import Awq, Gptq, Rtn
from tests.methods.quantization.quantized_networks import applied, model_of
from tests.models.tiny_networks import build, build_dense, tokenizer, tokens

CLOSE = {"rtol": 0, "atol": 1e-4}
SMALL = {"group": 4, "min_tokens": 4, "grid": "symmetric"}
ONE_LEVEL = CameraQ(bits=(4,), shares=(1,), **SMALL)


def exported(network, folder, engine="transformers"):
    model = model_of(network)
    model.tokenizer = tokenizer()
    folder.mkdir()
    return save_model(model, folder, find_engine(engine))


def check(network, folder):
    """Export a quantized network; stock transformers and this program load what it computes."""
    wanted = network(tokens()).logits
    assert exported(network, folder) == "compressed-tensors"
    stock, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(stock.eval()(tokens()).logits, wanted, **CLOSE)
    again = open_folder(folder)
    torch.testing.assert_close(again.network(tokens()).logits, wanted, **CLOSE)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("method", "grid"),
    [
        (Rtn, "symmetric"),
        (Gptq, "zero_point"),
        (Awq, "symmetric"),
        (Awq, "zero_point"),
        (CameraQ, "symmetric"),
    ],
)
def test_dense_networks_come_back_through_transformers(method, grid, tmp_path):
    network = build_dense("llama")
    bits = {"bits": (4,), "shares": (1,)} if method is CameraQ else {"bits": 4}
    # transformers supports zero points only if all layers have the same scheme.
    bits["attention_bits"] = 8 if grid == "symmetric" else 4
    applied(method(**bits, group=8, grid=grid), network)
    config = check(network, tmp_path / "out")
    # A group of the config for each number of bits.
    found = [group["weights"]["num_bits"] for group in config["config_groups"].values()]
    assert sorted(found) == sorted({4, bits["attention_bits"]})
    assert "re:lm_head$" in config["ignore"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qwen2_moe", Gptq(bits=4, **SMALL)),
        ("mixtral", Rtn(bits=4, group=4, grid="symmetric")),
        ("deepseek_v3", Rtn(bits=8, group=4, grid="symmetric")),
        ("qwen3_moe", ONE_LEVEL),
    ],
)
def test_experts_come_back_through_transformers(name, method, tmp_path):
    network = build(name)
    applied(method, network)
    check(network, tmp_path / "out")


def test_pruned_and_quantized_experts_come_back_with_their_width(tmp_path):
    widths = ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size")
    network = build("qwen2_moe", **dict.fromkeys(widths, 24))
    applied(CameraP(ratio=0.4, scope="expert", aligned=True, align=8), network)
    applied(Gptq(bits=4, group=8, min_tokens=4, grid="symmetric"), network)
    check(network, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["moe_intermediate_size"] == 16
    assert {w for block in inspect_model(network).moe for w in block.widths} == {16}


def test_weights_in_half_precision_are_the_same_numbers(tmp_path):
    network = build_dense("llama").bfloat16()
    applied(Rtn(bits=4, group=8, grid="symmetric"), network)
    exported(network, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    stock(tokens())  # which decompresses the weights
    for name, linear in packed_linears(network):
        assert torch.equal(stock.get_submodule(name).weight, linear.weight)


@pytest.mark.parametrize(
    ("name", "method", "engine", "said"),
    [
        ("qwen2_moe", CameraQ(shares=(1, 2, 1), block=2, group=4, min_tokens=4), "transformers",
         r"layers\.\d\.mlp\.experts\.\d+\.\w+_proj has 3 and 2 .*one bit width per matrix"),
        ("qwen2_moe", Mc(bits=(4, 2), mean_bits=3, **SMALL), "transformers",
         r"experts\.\d+\.gate_proj has . bits.* but .*experts\.\d+\.gate_proj . bits"),
        ("qwen2_moe", Rtn(bits=4, group=4), "vllm", "grids with any offset.*grid=symmetric"),
        ("qwen2_moe", Rtn(bits=4, group=4, grid="zero_point"), "transformers", "has zero points"),
        ("qwen2_moe", Rtn(bits=4, group=4, grid="symmetric"), "vllm",
         "has groups of 4, which vllm does not support: allowed: 32, 64, 128"),
        ("llama", Rtn(bits=4, group=8, grid="zero_point"), "transformers",
         r"has 8 bits.* but .* 4 bits.*zero points only if all layers have the same scheme"),
        ("qwen2_moe", Rtn(bits=3, group=4, grid="symmetric"), "vllm", "has 3 bits.*allowed: 4, 8"),
        ("qwen2_moe", Rtn(bits=4, group=8, grid="symmetric"), "transformers",
         "12 columns, which is not a multiple of the group size 8"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_said_by_name_and_nothing_is_written(
    name, method, engine, said, tmp_path
):
    network = build_dense(name) if name == "llama" else build(name)
    applied(method, network)
    with pytest.raises(UserError, match=said):
        exported(network, tmp_path / "out", engine)
    assert not list((tmp_path / "out").iterdir())


def test_conv1d_is_refused_by_name(tmp_path):
    network = build_dense("gpt2")
    applied(Rtn(bits=4, group=8, grid="symmetric", attention_bits=16), network)
    with pytest.raises(UserError, match=r"mlp\.c_fc is a Conv1D"):
        exported(network, tmp_path / "out")


def test_patterns_match_their_names_and_no_others():
    experts = {f"m.layers.{n}.mlp.experts.{e}.{p}_proj"
               for n in (1, 2) for e in (0, 1) for p in ("gate", "up", "down")}  # fmt: skip
    dense = {f"m.layers.{n}.mlp.{p}_proj" for n in (0,) for p in ("gate", "up", "down")}
    some, rest = {"m.layers.1.attn.q", "lm_head"}, {"m.layers.2.attn.q"}
    everything = experts | dense | some | rest
    for names in (experts, dense, some, rest):
        patterns = name_patterns(names, everything)
        found = {n for n in everything for p in patterns if re.match(p.removeprefix("re:"), n)}
        assert found == names
    assert name_patterns(experts, everything) == [r"re:m\.layers\.\d+\.mlp\.experts\.\d+\.\w+$"]
