"""Checkpoints of GPTQ and AWQ, packed value by value as their formats say, and read again."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from bench.errors import UserError
from bench.measurement.costs import count_costs
from bench.models.bitpacking.packed_checkpoints import unpack_words
from bench.models.loading import load_model, skeleton
from bench.models.saving import save_model
from bench.models.source import resolve_model
from bench.runner.execute import describe_dense_model
from bench.schema import CostsConfig, ModelConfig
from tests.models.tiny_networks import build_dense, save

GROUP = 8
SIZES = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8}


def source(path, **more):
    options = {"name": "tiny", "source": "local", "path": str(path), "device": "cpu"}
    return resolve_model(ModelConfig(**(options | more)), offline=True)


def word(values, bits):
    """One word of 32 bits, the first value in the lowest bits, as a signed number."""
    number = sum(int(value) << (bits * place) for place, value in enumerate(values))
    return number - 2**32 if number >= 2**31 else number


def packed_rows(values, bits, order=None):
    """Pack the last dimension of a table, 32 / bits values a word, in an order within each word."""
    each = 32 // bits
    order = order or range(each)
    rows = [
        [word([row[begin + k] for k in order], bits) for begin in range(0, len(row), each)]
        for row in values.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def gptq_tensors(codes_OI, zeros_OG, scales_OG, group_I, bits, layout):
    """What a layer of GPTQ stores, after `QuantLinear.pack` of AutoGPTQ."""
    qzeros = packed_rows(zeros_OG.T, bits)
    if layout == "gptq":
        # z - 1, as GPTQModel subtracts it: words of 32 bits, a value of 0 borrows from the next.
        less = qzeros.long() - word([1] * (32 // bits), bits)
        qzeros = ((less + 2**31) % 2**32 - 2**31).to(torch.int32)
    return {
        "qweight": packed_rows(codes_OI, bits).T.contiguous(),
        "qzeros": qzeros,
        "scales": scales_OG.T.contiguous(),
        "g_idx": group_I.to(torch.int32),
    }


def awq_tensors(codes_OI, zeros_OG, scales_OG):
    """What a layer of AWQ stores, after `WQLinear_GEMM.from_linear` of AutoAWQ."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": packed_rows(codes_OI.T, 4, order),
        "qzeros": packed_rows(zeros_OG.T, 4, order),
        "scales": scales_OG.T.contiguous(),
    }


def write_packed(folder, method, bits=4, layout="gptq", act_order=False, name="llama"):
    """Write a packed checkpoint; return the dense network that has its weights."""
    network, draw = build_dense(name, **SIZES), torch.Generator().manual_seed(1)
    tied = {"lm_head.weight"} if network.config.tie_word_embeddings else set()
    state = {k: v.half() for k, v in network.state_dict().items() if k not in tied}
    for label, module in network.named_modules():
        if not isinstance(module, nn.Linear) or label == "lm_head":
            continue
        outputs, inputs = module.weight.shape
        groups = inputs // GROUP
        group_I = torch.arange(inputs) // GROUP
        if act_order:
            group_I = group_I[torch.randperm(inputs, generator=draw)]
        codes = torch.randint(2**bits, (outputs, inputs), generator=draw)
        zeros = torch.randint(2**bits, (outputs, groups), generator=draw)
        scales = (torch.rand(outputs, groups, generator=draw) / 2**bits).to(torch.float16)
        module.weight.copy_(scales.float()[:, group_I] * (codes - zeros[:, group_I]))
        del state[f"{label}.weight"]
        tensors = (
            gptq_tensors(codes, zeros, scales, group_I, bits, layout)
            if method == "gptq"
            else awq_tensors(codes, zeros, scales)
        )
        if module.bias is None and method == "gptq":
            # AutoGPTQ writes one for every layer.
            tensors["bias"] = torch.zeros(outputs, dtype=torch.float16)
        state |= {f"{label}.{part}": tensor for part, tensor in tensors.items()}
    save(network, folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    stored = {"quant_method": method, "bits": bits, "group_size": GROUP}
    stored |= {"checkpoint_format": layout} if method == "gptq" else {"version": "gemm"}
    configure(folder, **stored)
    return network


def configure(folder, **stored):
    described = json.loads((folder / "config.json").read_text())
    found = described.get("quantization_config", {}) | stored
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": found}))


@given(st.sampled_from([2, 4, 8]), st.data())
def test_words_hold_their_values_lowest_bits_first(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=32, max_size=32))
    table = torch.tensor([values])
    assert unpack_words(packed_rows(table, bits), bits).tolist() == [values]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gptq", {}),
        ("gptq", {"bits": 2}),
        ("gptq", {"bits": 8, "act_order": True}),
        ("gptq", {"layout": "gptq_v2", "act_order": True}),
        ("gptq", {"name": "qwen2"}),  # with biases of its own in attention
        ("awq", {}),
    ],
)
def test_a_packed_checkpoint_computes_with_the_weights_it_states(method, settings, tmp_path):
    expected = write_packed(tmp_path, method, **settings)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    model = load_model(source(tmp_path, dtype="float32"))
    # Everything but the packed weights is stored in float16.
    for name, weight in expected.half().float().state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], weight, atol=1e-3, rtol=1e-3)
    assert type(model.network) is type(expected)
    assert model.network.generation_config.eos_token_id == [2, 5]


def test_the_codes_are_exact_in_float32(tmp_path):
    expected = write_packed(tmp_path, "gptq")
    found = load_model(source(tmp_path, dtype="float32")).network
    for theirs, ours in zip(expected.model.layers, found.model.layers, strict=True):
        assert torch.equal(theirs.mlp.down_proj.weight, ours.mlp.down_proj.weight)


def test_bytes_are_those_of_the_files_and_flops_those_of_the_dense_network(tmp_path):
    dense = write_packed(tmp_path, "gptq")
    model = load_model(source(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors").values()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    numel = sum(weight.numel() for weight in dense.parameters())
    described = describe_dense_model(model)
    assert (described.parameters, described.bytes) == (numel, stored)
    settings = CostsConfig(name="x", length=16)
    costs = {(c.scope, c.quantity): c.value for c in count_costs(model, settings).costs}
    save(dense, tmp_path / "dense")
    plain = count_costs(load_model(source(tmp_path / "dense")), settings)
    wanted = {(c.scope, c.quantity): c.value for c in plain.costs}
    assert costs.pop(("model", "bytes")) == stored < wanted.pop(("model", "bytes")) / 2
    flops = {key: value for key, value in wanted.items() if key[1] == "flops"}
    assert flops and {key: costs[key] for key in flops} == flops
    with pytest.raises(UserError, match="already quantized by gptq"):
        save_model(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "stored", "match"),
    [
        ("gptq", {"bits": 3}, r"by gptq with bits=3, which is not supported: allowed: 2, 4, 8"),
        ("gptq", {"bits": None}, r"with bits=None, which is not supported"),
        ("gptq", {"checkpoint_format": "marlin"}, "format=marlin, which is not supported"),
        ("awq", {"version": "gemv"}, "version=gemv, which is not supported: allowed: gemm"),
        ("gptq", {"group_size": 0}, "config.json is corrupt: group_size=0"),
        ("gptq", {"group_size": "many"}, "config.json is corrupt: group_size='many'"),
    ],
)
def test_what_is_packed_otherwise_is_refused_before_loading(method, stored, match, tmp_path):
    save(build_dense("llama"), tmp_path)
    configure(tmp_path, quant_method=method, **({"bits": 4, "group_size": GROUP} | stored))
    with pytest.raises(UserError, match=match):
        skeleton(source(tmp_path))


def test_packed_weights_are_not_spread_over_devices(tmp_path):
    save(build_dense("llama"), tmp_path)
    configure(tmp_path, quant_method="awq", bits=4, group_size=GROUP)
    with pytest.raises(UserError, match="device_map=offload_disk requires dense weights"):
        source(tmp_path, device_map="offload_disk")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state, key: state.pop(f"{key}.scales"), "mlp.up_proj has no scales"),
        (lambda state, key: state[f"{key}.g_idx"].fill_(9), "mlp.up_proj do not fit: qweight"),
        (lambda state, key: state[f"{key}.g_idx"].fill_(-1), "mlp.up_proj do not fit: qweight"),
        (
            lambda state, key: state.update({f"{key}.qzeros": state[f"{key}.qzeros"][:1]}),
            "mlp.up_proj do not fit: qweight",
        ),
        (
            lambda state, key: state[f"{key}.bias"].fill_(1),
            "unexpected weights, such as model.layers.0.mlp.up_proj.bias",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(change, match, tmp_path):
    write_packed(tmp_path, "gptq")
    state = load_file(tmp_path / "model.safetensors")
    change(state, "model.layers.0.mlp.up_proj")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=match) as raised:
        load_model(source(tmp_path))
    assert "\n" not in str(raised.value)
