""""""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from bench.errors import MissingData, UserError
from bench.measurement.costs import count_costs
from bench.models import checkpoints
from bench.models.loading import load_model, skeleton
from bench.models.source import resolve_model
from bench.runner.execute import describe_dense_model
from bench.schema import CostsConfig, ModelConfig
from tests.models.quantized_folder import write_quantized
from tests.models.tiny_networks import SIZES, llama, randomise, save, tokens


def source(path, **more):
    options = {"name": "tiny", "source": "local", "path": str(path), "device": "cpu"}
    return resolve_model(ModelConfig(**(options | more)), offline=True)


def refusal(path, match, kind=UserError, **more):
    """Return the message of a model that is refused before its weights are loaded."""
    with pytest.raises(kind, match=match) as raised:
        skeleton(source(path, **more))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"], n_embd=16, n_layer=2, n_head=2, n_positions=64
    )
    return randomise(transformers.GPT2LMHeadModel(config), 0)


BASES = {"llama": llama, "gpt2": gpt2}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def write_adapter(folder, base="llama", seed=1, **settings):
    """Write an adapter with random weights, and return the logits of the adapted network."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS[base]} | settings
    adapted = peft.get_peft_model(BASES[base](), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(tokens()).logits


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save(llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder)
    return folder


@pytest.fixture
def adapter(written, tmp_path):
    return shutil.copytree(written, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("base_name", "settings"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"use_dora": True}),
        ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        ("llama", {"layers_to_transform": [1], "target_modules": ["gate_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("gpt2", {"fan_in_fan_out": True}),
    ],
)
def test_a_merged_adapter_computes_what_peft_computes(base_name, settings, tmp_path):
    folder = save(BASES[base_name](), tmp_path / "base")
    expected = write_adapter(tmp_path / "adapter", base_name, **settings)
    model = load_model(source(folder, adapter=str(tmp_path / "adapter")))
    assert type(model.network) is type(BASES[base_name]())
    assert not any("lora" in name for name, _ in model.network.named_parameters())
    torch.testing.assert_close(model.network(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapted_model_is_another_model(base, adapter, tmp_path):
    write_adapter(tmp_path / "second", seed=2)
    plain, first = source(base), source(base, adapter=str(adapter))
    second = source(base, adapter=str(tmp_path / "second"))
    assert len({plain.fingerprint, first.fingerprint, second.fingerprint}) == 3

    before = source(base, adapter=str(adapter)).files
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 13}))
    assert before != source(base, adapter=str(adapter)).files


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 24}, r"for another base: its .*lora_[AB].weight is .* x .*, and .*24"),
        ({"intermediate_size": 40}, "for another base: its .*mlp.down_proj.lora_A.weight"),
        ({"num_hidden_layers": 1}, "for another base: it changes model.layers.1.*lacks"),
    ],
)
def test_an_adapter_of_another_base_is_refused_before_loading(changes, match, adapter, tmp_path):
    sizes = {key: size for key, size in SIZES.items() if key != "num_experts_per_tok"}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes)))
    refusal(save(other, tmp_path / "other"), match, adapter=str(adapter))


def test_a_library_user_hears_of_another_base_before_what_else_the_folder_lacks(adapter, tmp_path):
    folder = save(gpt2(), tmp_path / "gpt2")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="for another base"):
        load_model(source(folder, adapter=str(adapter)))


def test_an_adapter_of_another_architecture_is_refused(adapter, tmp_path):
    refusal(save(gpt2(), tmp_path / "gpt2"), "it changes model.layers.*lacks", adapter=str(adapter))


def test_an_adapter_of_tied_weights_is_refused(tmp_path):
    # GPT-2 ties head and embedding, and a merge would change both.
    write_adapter(tmp_path / "adapter", "gpt2", target_modules=["wte"])
    folder = save(gpt2(), tmp_path / "gpt2")
    refusal(folder, "ties its head and embedding", adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3: only LORA"),
        ({"megatron_config": {"a": 1}}, "sets megatron_config"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"target_parameters": ["experts"]}, "sets target_parameters"),
        ({"peft_type": None}, "only LORA"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(change, match, base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    refusal(base, match, adapter=str(adapter))


def test_a_pickled_adapter_is_refused(base, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refusal(base, "only adapters in safetensors", adapter=str(adapter))


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_a_corrupt_adapter_config_is_refused(text, base, adapter):
    (adapter / "adapter_config.json").write_text(text)
    refusal(base, "corrupt", adapter=str(adapter))


def test_a_truncated_adapter_is_refused(base, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refusal(base, "cut off", adapter=str(adapter))


@pytest.mark.parametrize("given", ["./nowhere", "nowhere", "a/b/c", "/nowhere/at/all"])
def test_an_adapter_that_is_not_there_is_refused(given, base):
    refusal(base, "neither a folder nor ORG/NAME", MissingData, adapter=given)


def test_an_adapter_needs_a_language_model_in_one_place(base, adapter):
    refusal(base, "device_map=null", adapter=str(adapter), device_map="auto")


def quantized_llama(folder):
    """Write a quantized network, and return what it computes."""
    save(llama(), folder)
    return write_quantized(llama(), folder)(tokens()).logits


def test_compressed_tensors_are_scored_as_they_are_stored(tmp_path):
    expected = quantized_llama(tmp_path)
    model = load_model(source(tmp_path))
    torch.testing.assert_close(model.network(tokens()).logits, expected)

    dense = sum(weight.numel() for weight in llama().parameters())
    tensors = load_file(tmp_path / "model.safetensors").values()
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert stored < 4 * dense / 2
    described = describe_dense_model(model)
    assert (described.parameters, described.bytes) == (dense, stored)
    settings = CostsConfig(name="x", length=16)
    costs = {(c.scope, c.quantity): c.value for c in count_costs(model, settings).costs}
    assert costs["model", "bytes"] == stored
    # Dequantized before each product, so that the products are those of the dense network.
    save(llama(), tmp_path / "dense")
    plain = count_costs(load_model(source(tmp_path / "dense")), settings).costs
    flops = {(c.scope, c.quantity): c.value for c in plain if c.quantity == "flops"}
    assert flops and {key: costs[key] for key in flops} == flops


def test_activations_are_rounded_where_the_checkpoint_says_so(tmp_path):
    save(llama(), tmp_path)
    reference = write_quantized(llama(), tmp_path, bits=8, activations=True)
    expected = reference(tokens()).logits
    model = load_model(source(tmp_path))
    # The base model of a sweep is copied before its first forward.
    for network in (model.copy().network, model.network, model.network):
        torch.testing.assert_close(network(tokens()).logits, expected)
    assert model.quantization.quantizes_activations

    report = count_costs(model, CostsConfig(name="x"))
    costs = {cost.quantity: cost.value for cost in report.costs}
    dense = sum(weight.numel() for weight in llama().parameters())
    assert (costs["parameters"], costs["bytes"]) == (dense, model.quantization.bytes)
    assert [m.reason for m in report.missing if m.quantity == "nonzero_parameters"]


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        ({"quant_method": "compressed-tensors"}, r"pip install 'slimbench\[quantized\]'"),
        ({"quant_method": "bitsandbytes"}, "by bitsandbytes: pip install bitsandbytes"),
        ({"quant_method": "aqlm"}, "by aqlm, which is not supported: allowed: compressed"),
        ({"bits": 4}, "by None, which is not supported"),
        ([4], "by None, which is not supported"),
    ],
)
def test_a_checkpoint_of_another_quantizer_is_refused(stored, match, base, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "find_spec", lambda package: None)
    folder = shutil.copytree(base, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    refusal(folder, match)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_of_bitsandbytes_computes_what_transformers_does(bits, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, device_map="cpu"
    )
    folder = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("*.safeten*"))
    theirs.save_pretrained(folder)
    ours = load_model(source(folder, dtype="float32")).network
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits)


def test_a_quantized_checkpoint_takes_no_adapter(adapter, tmp_path):
    quantized_llama(tmp_path / "model")
    refusal(tmp_path / "model", "quantized by compressed-tensors", adapter=str(adapter))


def test_methods_that_change_weights_refuse_a_quantized_checkpoint(tmp_path):
    from bench.config.composition import compose_run_config
    from bench.runner.inputs import resolve_run
    from bench.runner.session import Session

    quantized_llama(tmp_path / "model")
    chosen = [f"model={tmp_path / 'model'}", "benchmark=perplexity_micro"]
    for method in ("magnitude", "wanda", "rtn"):
        config = compose_run_config([*chosen, f"method={method}"])
        with pytest.raises(UserError, match=f"method={method} cannot .* quantized in the checkp"):
            resolve_run(config, Session())


def test_what_is_no_gguf_file_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    refusal(file, "is not a file", MissingData)
    for content in (b"", b"PK\x03\x04 not this", b"GGU"):
        file.write_bytes(content)
        refusal(file, "does not begin with GGUF")


def test_a_gguf_file_that_cannot_be_converted_is_refused(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "nosuchthing")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(file, "cannot be loaded: .*nosuchthing")
    assert str(file) in message
    file.write_bytes(file.read_bytes()[:30])
    refusal(file, "cannot be loaded")
    # Nothing half-converted is left for the next run to find.
    assert not [*checkpoints_cache(tmp_path).iterdir()]


def checkpoints_cache(tmp_path):
    return tmp_path / "cache" / "slimbench" / "gguf"


def test_a_gguf_file_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    def absent(name, extra):
        raise UserError(f"{name} is not installed: pip install 'slimbench[{extra}]'")

    monkeypatch.setattr(checkpoints, "optional_module", absent)
    refusal(tmp_path / "model.gguf", r"gguf is not installed: pip install 'slimbench\[gguf\]'")


def test_a_quantized_checkpoint_is_not_written_again(tmp_path):
    from bench.models.saving import save_model

    quantized_llama(tmp_path / "model")
    model = load_model(source(tmp_path / "model"))
    with pytest.raises(UserError, match="already quantized by compressed-tensors"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"source": "no/body", "name": "no/body"}, "bench prefetch model=no/body` .*model.path="),
        (
            {"source": "no/body", "name": "no/body", "revision": "v1"},
            "bench prefetch model=no/body model.revision=v1`",
        ),
        ({"source": "no/body", "name": "short", "revision": "v1"}, "bench prefetch model=short`"),
        (
            {"source": "no/body", "name": "no/body", "adapter": "me/lora"},
            "bench prefetch model=no/body`",
        ),
    ],
)
def test_a_model_that_is_not_in_the_cache_says_how_to_fetch_it(given, match):
    with pytest.raises(MissingData, match=match) as raised:
        resolve_model(ModelConfig(device="cpu", **given), offline=True)
    assert "\n" not in str(raised.value)


def test_an_adapter_that_is_not_in_the_cache_says_how_to_fetch_it(base):
    match = "bench prefetch model=tiny model.adapter=me/lora@v1` .*model.adapter=FOLDER"
    refusal(base, match, MissingData, adapter="me/lora@v1")
