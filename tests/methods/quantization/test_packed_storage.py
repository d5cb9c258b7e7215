"""Packed networks in memory, on disk and on the meta device."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.errors import UserError
from bench.measurement.flops.cost_rows import count_text_flops
from bench.measurement.model_size import count_size
from bench.models.bitpacking.packed_modules import PackedExperts, describe_packed, install_packed
from bench.models.loading import load_model, open_folder
from bench.models.saving import save_model as export
from bench.models.source import resolve_model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.camera.joint import CameraPQ
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ
from methods.quantization.uniform import Gptq, Rtn
from tests.methods.quantization.quantized_networks import (
    METHODS,
    SMALL,
    applied,
    context,
    model_of,
    network_of,
)
from tests.models.tiny_networks import (
    ARCHITECTURES,
    SIZES,
    build,
    randomise,
    save,
    tokenizer,
    tokens,
)


@pytest.mark.sample(3)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_survives_a_copy_and_a_safetensors_file(architecture, tmp_path):
    network = build(architecture)
    applied(CameraPQ(budget_bits=6, block=4, head_bits=8, **SMALL), network)
    wanted = network(tokens()).logits
    assert torch.equal(copy.deepcopy(network)(tokens()).logits, wanted)

    save_file(network.state_dict(), tmp_path / "packed.safetensors")
    description = json.loads(json.dumps(describe_packed(network)))
    other = build(architecture, seed=1)
    install_packed(other, description)
    other.load_state_dict(load_file(tmp_path / "packed.safetensors"))
    assert torch.equal(other(tokens()).logits, wanted)


@pytest.mark.parametrize("layout", ["fused", "list"])
def test_description_of_another_network_is_refused(layout):
    network = build("qwen3_moe")
    applied(METHODS["gptq"], network)
    description = describe_packed(network)
    description["linears"].pop("model.layers.0.mlp.experts.0.gate_proj")
    with pytest.raises(UserError, match="do not match the network"):
        install_packed(network_of("qwen3_moe", layout), description)


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruned_and_packed_comes_back_from_a_folder(architecture, tmp_path):
    network = build(architecture)
    applied(CameraP(ratio=0.4, align=4), network)
    applied(CameraQ(shares=(1, 2, 1), block=2, head_bits=8, **SMALL), network)
    model = model_of(network)
    model.tokenizer = tokenizer()
    (tmp_path / "out").mkdir()
    assert export(model, tmp_path / "out") == "slimbench"
    again = open_folder(tmp_path / "out")
    assert torch.equal(again.network(tokens()).logits, network(tokens()).logits)
    assert count_size(again.network).bytes == count_size(network).bytes
    assert [b.widths for b in again.structure.moe] == [b.widths for b in inspect_model(network).moe]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["rtn", "camera_q", "camera_pq", "camera_pq_global"])
def test_packed_on_disk_is_packed_in_memory(name, tmp_path):
    folder = save(build("qwen2_moe"), tmp_path / "model")
    logits = []
    for place in ("offload_disk", None):
        config = ModelConfig(name="tiny", source="local", path=str(folder), device_map=place)
        model = load_model(resolve_model(config, offline=True))
        METHODS[name].apply(model, context())
        logits.append(model.network(tokens(seed=3)).logits)
    assert torch.equal(*logits)


@pytest.mark.sample(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_parameters_and_structure_stay(architecture):
    network = build(architecture)
    before = count_text_flops(network, 2, 16)[0].total, count_size(network, inspect_model(network))
    applied(Gptq(bits=8, head_bits=8, **SMALL), network)
    after = count_text_flops(network, 2, 16)[0].total, count_size(network, inspect_model(network))
    assert after[0] == before[0]
    for count in ("parameters", "active", "routed", "shared"):
        assert getattr(after[1], count) == getattr(before[1], count), count
    assert after[1].bytes < before[1].bytes


def test_bytes_are_those_of_the_arithmetic(tmp_path):
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 384, "num_local_experts": 4}
    wanted = 3 * 4 * 3 * 256 * 384 * 2.25 / 8
    for method in (Rtn(bits=2), CameraQ(block=128, rounding="rtn")):
        network = randomise(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)), 0)
        applied(method, network)
        experts = torch.nn.ModuleList(block.experts for block in inspect_model(network).moe)
        held = sum(b.numel() * b.element_size() for b in experts.buffers())
        save_file(experts.state_dict(), tmp_path / "experts.safetensors")
        assert held == pytest.approx(wanted, rel=0.03)
        assert (tmp_path / "experts.safetensors").stat().st_size == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("layout", ["fused", "list"])
def test_experts_of_a_block_are_replaced(layout):
    network = network_of("olmoe", layout)
    applied(METHODS["rtn"], network)
    assert all(isinstance(block.experts, PackedExperts) for block in inspect_model(network).moe)
