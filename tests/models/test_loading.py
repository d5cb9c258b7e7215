""""""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

from bench.errors import MissingData, UserError
from bench.models import loading
from bench.models import source as sources
from bench.models.loading import load_model, skeleton
from bench.models.source import resolve_model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from tests.models.tiny_networks import ARCHITECTURES, build, build_dense, save, tokens


def config(path, **more):
    options = {"name": "tiny", "source": "local", "path": str(path), "device": "cpu"}
    return ModelConfig(**(options | more))


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return save(build("qwen2_moe"), tmp_path_factory.mktemp("qwen2_moe"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refusal(folder, match, kind=UserError, **more):
    with pytest.raises(kind, match=match) as raised:
        load_model(resolve_model(config(folder, **more), offline=True))
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loads_what_was_saved(name, tmp_path):
    network = build(name)
    model = load_model(resolve_model(config(save(network, tmp_path)), offline=True))
    rows = tokens()
    torch.testing.assert_close(model.network(rows).logits, network(rows).logits)
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert model.device == torch.device("cpu")
    assert model.structure.moe


def test_deepseek_moe_stores_its_experts_one_by_one(tmp_path):
    from safetensors import safe_open

    save(build("deepseek"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    expected = {
        f"model.layers.1.mlp.experts.{e}.{p}_proj.weight"
        for e in range(6)
        for p in ("gate", "up", "down")
    }
    assert expected <= keys
    assert {"model.layers.1.mlp.gate.weight", "model.layers.0.mlp.gate_proj.weight"} <= keys
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in keys
    assert not any("gate_up_proj" in key for key in keys)


def test_deepseek_moe_reads_the_published_config(tmp_path):
    published = {
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "model_type": "deepseek",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "rope_scaling": None,
        "rope_theta": 10000,
        "vocab_size": 102400,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    hollow = sources.ModelSource(config(tmp_path), tmp_path, "", None)
    structure = inspect_model(skeleton(hollow))
    # 27 layers of 92,928 micro-experts of 6,144 weights; 16.376 B weights (specification, 1.5).
    assert [b.micro_experts for b in structure.moe] == [92_928] * 27
    assert structure.moe_parameters == 27 * 92_928 * 6_144
    assert structure.parameters == pytest.approx(16.376e9, rel=1e-4)

    for key, value in {"norm_topk_prob": True, "scoring_func": "sigmoid"}.items():
        (tmp_path / "config.json").write_text(json.dumps(published | {key: value}))
        with pytest.raises(UserError, match=key):
            skeleton(hollow)


def test_skeleton_has_shapes_and_no_weights(saved):
    network = skeleton(resolve_model(config(saved), offline=True))
    assert all(p.is_meta for p in network.parameters())
    assert len(inspect_model(network).moe) == 2


def test_dtype_is_as_asked(saved):
    model = load_model(resolve_model(config(saved, dtype="bfloat16"), offline=True))
    assert model.network.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_refuses_weights_that_are_cut_off(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refusal(folder, "model.safetensors is cut off")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
    ],
)
def test_refuses_a_corrupt_header(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refusal(folder, "model.safetensors is (corrupt|cut off)")


def test_refuses_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refusal(folder, "only pickled weights")


def test_refuses_a_folder_without_weights_or_config(folder):
    (folder / "model.safetensors").unlink()
    refusal(folder, "no weights")
    (folder / "config.json").unlink()
    refusal(folder, "no config.json")


def test_refuses_a_link_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refusal(folder, "leads out")
    outside.unlink()
    refusal(folder, "does not exist")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_refuses_an_index_that_leads_out_of_the_folder(folder, name):
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors").unlink()  # otherwise the index is not read
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(folder, "outside its folder")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("{", "corrupt"),
        ('{"weight_map": []}', "corrupt"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks 1 of 1"),
        ('{"weight_map": {"a": "config.json"}}', "not safetensors"),
    ],
)
def test_refuses_a_bad_index(folder, index, match):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refusal(folder, match)


def test_links_of_the_hub_cache_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in saved.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert load_model(resolve_model(config(snapshot), offline=True)).structure.moe


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_refuses_missing_unexpected_and_misshapen_weights(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    refusal(folder, "1 missing weights, such as model.norm.weight")
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(16)}))
    rewrite(folder, lambda tensors: tensors.update({"model.odd": torch.ones(1)}))
    refusal(folder, "1 unexpected weights, such as model.odd")
    rewrite(folder, lambda tensors: tensors.pop("model.odd"))
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(15)}))
    refusal(folder, "model.norm.weight|mismatch")


def test_refuses_nan_in_weights(folder):
    rewrite(folder, lambda tensors: tensors["model.norm.weight"][3].fill_(float("nan")))
    refusal(folder, "NaN, for instance in model.norm.weight")


def test_refuses_an_unknown_architecture_and_a_missing_tokenizer(folder):
    known = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"model_type": "no_such"}')
    refusal(folder, "cannot be loaded")
    (folder / "config.json").write_text(known)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refusal(folder, "no tokenizer")


def test_a_path_that_is_not_there_is_missing_data(tmp_path):
    refusal(tmp_path / "gone", "not a folder", kind=MissingData)


def test_an_unknown_shipped_model_is_named(tmp_path):
    asked = ModelConfig(name="x", source="embedded:no_such")
    with pytest.raises(UserError, match="unknown embedded model 'no_such'"):
        resolve_model(asked, offline=True)


def test_a_hub_model_that_is_not_cached_says_the_cure(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = ModelConfig(name="qwen15_moe_a27b", source="Qwen/Qwen1.5-MoE-A2.7B")
    with pytest.raises(MissingData, match=r"bench prefetch model=qwen15_moe_a27b.*model\.path="):
        resolve_model(asked, offline=True)


def test_a_name_the_hub_cannot_have_is_refused():
    with pytest.raises(UserError, match="not a name on the hub"):
        resolve_model(ModelConfig(name="x", source="a/b/c"), offline=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"revision": "0" * 40}, "not on the list"),
        ({"allow_remote_code": True}, "explicit commit"),
        ({"allow_remote_code": True, "revision": "v1"}, "explicit commit"),
    ],
)
def test_remote_code_needs_permission_and_a_commit(saved, options, match):
    refusal(saved, match, trust_remote_code=True, **options)


def test_code_in_a_folder_does_not_run_unasked(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    refusal(folder, "cannot be loaded")
    assert not (Path.cwd() / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_of_another_repository_is_refused(folder, name):
    file = folder / name
    settings = json.loads(file.read_text()) if file.exists() else {}
    settings["auto_map"] = {"AutoConfig": "some/where--code.Mine"}
    file.write_text(json.dumps(settings))
    allowed = {"trust_remote_code": True, "allow_remote_code": True, "revision": "0" * 40}
    refusal(folder, r"code of another repository \(some/where--code\.Mine\)", **allowed)


def test_an_architecture_without_sdpa_is_given_eager_and_says_so_once(tmp_path, capsys):
    loading._say_eager.cache_clear()
    chosen = {}
    for name in ("gemma2", "llama"):
        folder = save(build_dense(name), tmp_path / name)
        for _ in range(2):
            network = load_model(resolve_model(config(folder), offline=True)).network
        chosen[name] = network.config._attn_implementation
    assert chosen == {"gemma2": "eager", "llama": "sdpa"}
    assert capsys.readouterr().err.count("Gemma2ForCausalLM has no SDPA in transformers") == 1


def test_flash_attention_without_its_package_is_refused_with_the_cure(saved, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.attention=flash_attention_2 needs .*sdpa"):
        skeleton(resolve_model(config(saved, attention="flash_attention_2"), offline=True))
