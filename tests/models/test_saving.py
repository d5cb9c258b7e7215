"""A pruned network written to a folder comes back with the same logits."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.errors import UserError
from bench.models import replaced_modules
from bench.models.loading import load_model, open_folder, skeleton
from bench.models.model import Model
from bench.models.saving import plan_export, save_model, write_model
from bench.models.serving.engines import find_engine
from bench.models.source import resolve_model
from bench.models.structure.model_structure import inspect_model
from bench.models.structure.ragged_experts import GatedExpert
from bench.schema import ModelConfig
from methods.baselines.expert_removal import drop_experts
from methods.moe.micro_experts import delete_micro_experts, zero_micro_experts
from tests.models.structure.test_ragged_experts import ALIGN, shrunk, some
from tests.models.tiny_networks import ARCHITECTURES, build, llama, tokenizer, tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(network):
    config = ModelConfig(name="tiny", source="tests")
    return Model(config, network, tokenizer(), "", None, torch.device("cpu"))


def written(network, folder, engine=None):
    folder.mkdir()
    return save_model(model_of(network), folder, engine and find_engine(engine))


def loaded(folder):
    """What stock transformers loads from a folder, and its report of what it did not find."""
    network, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return network.eval(), report


def refuse_by_transformers(folder, kind):
    """Check that stock transformers raises instead of loading a part, whichever way it is asked."""
    for loader in (AutoModelForCausalLM, kind):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            loader.from_pretrained(folder, output_loading_info=True)
    # vLLM and SGLang look up a class of their own by this name.
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    assert not hasattr(transformers, name)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ragged_comes_back_through_slimbench(name, tmp_path):
    small, _ = shrunk(name)
    assert written(small, tmp_path / "out") == "slimbench"
    again = open_folder(tmp_path / "out")
    rows = tokens()
    torch.testing.assert_close(again.network(rows).logits, small(rows).logits, **CLOSE)
    assert type(again.network).__name__ == type(small).__name__
    wanted = [block.widths for block in inspect_model(small).moe]
    assert [block.widths for block in again.structure.moe] == wanted
    assert again.copy().network(rows).logits.equal(again.network(rows).logits)
    assert not [file for file in (tmp_path / "out").iterdir() if file.suffix in (".bin", ".pt")]
    refuse_by_transformers(tmp_path / "out", type(small))


def halved(name, **changes):
    """A network whose experts lost micro-experts at random, and one with the same ones zeroed."""
    width = {"moe_intermediate_size": 24, "intermediate_size": 24}
    small, dark = (build(name, **(width | changes)) for _ in range(2))
    for block, same in zip(inspect_model(small).moe, inspect_model(dark).moe, strict=True):
        gone = some(block, share=0.6, seed=block.layer)
        delete_micro_experts(block, gone, ALIGN)
        zero_micro_experts(same, gone)
    return small, dark


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"deepseek"}))
def test_padded_comes_back_through_transformers(name, tmp_path):
    small, dark = halved(name)
    assert written(small, tmp_path / "out", "transformers") == "padded"
    again, report = loaded(tmp_path / "out")
    rows = tokens()
    torch.testing.assert_close(again(rows).logits, dark(rows).logits, **CLOSE)
    assert not any(report.values())
    assert not (tmp_path / "out" / replaced_modules.DESCRIPTION_FILE).exists()


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_width_needs_no_padding(name, tmp_path):
    network = build(name)
    for block in inspect_model(network).moe:
        shared = block.d_shared * 8 // 12 if block.d_shared else 0
        start = block.d_shared
        gone = list(range(shared, start))
        gone += [start + 12 * e + c for e in range(6) for c in range(8, 12)]
        delete_micro_experts(block, torch.tensor(gone), ALIGN)
    rows = tokens()
    logits = network(rows).logits
    assert written(network, tmp_path / "out") == "stock"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(rows).logits, logits, **CLOSE)
    assert set(inspect_model(again).moe[0].widths) == {8}
    assert not (tmp_path / "out" / replaced_modules.DESCRIPTION_FILE).exists()


def test_zeroed_is_an_ordinary_folder(tmp_path):
    network = build("phimoe")
    for block in inspect_model(network).moe:
        zero_micro_experts(block, some(block))
    assert written(network, tmp_path / "out") == "stock"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(tokens()).logits, network(tokens()).logits, **CLOSE)


def test_the_skeleton_of_a_ragged_folder_has_its_shapes(tmp_path):
    small, _ = shrunk("deepseek")
    written(small, tmp_path / "out")
    config = ModelConfig(name="tiny", source="local", path=str(tmp_path / "out"))
    bones = skeleton(resolve_model(config, offline=True))
    assert all(weight.is_meta for weight in bones.parameters())
    shapes = {key: weight.shape for key, weight in small.state_dict().items()}
    assert {key: weight.shape for key, weight in bones.state_dict().items()} == shapes


def test_a_ragged_folder_loads_in_half_precision_and_from_disk(tmp_path):
    small, _ = shrunk("qwen2_moe")
    written(small, tmp_path / "out")
    half = open_folder(tmp_path / "out", dtype="bfloat16").network
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    on_disk = open_folder(tmp_path / "out", device_map="offload_disk").network
    torch.testing.assert_close(on_disk(tokens()).logits, small(tokens()).logits, **CLOSE)


def test_a_pruned_folder_can_be_pruned_again(tmp_path):
    small, _ = shrunk("mixtral")
    written(small, tmp_path / "first")
    again = open_folder(tmp_path / "first")
    for block in again.structure.moe:
        delete_micro_experts(block, torch.arange(0, block.micro_experts, 2), ALIGN)
    again.invalidate_structure()
    (tmp_path / "second").mkdir()
    save_model(again, tmp_path / "second")
    logits = again.network(tokens()).logits
    found = open_folder(tmp_path / "second").network(tokens()).logits
    torch.testing.assert_close(found, logits, **CLOSE)


def test_refuses_parts_that_no_folder_can_hold(tmp_path):
    network = build("mixtral")

    class Strange(torch.nn.Linear):
        pass

    network.model.layers[1].mlp.gate = Strange(16, 6)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate is a Strange"):
        written(network, tmp_path / "out")
    other = build("mixtral")
    other.lm_head = torch.nn.Linear(16, 65, bias=False)
    with pytest.raises(UserError, match=r"lm_head.weight has a shape"):
        written(other, tmp_path / "other")
    hooked = build("mixtral")
    hooked.model.layers[0].register_forward_hook(lambda module, given, found: found)
    with pytest.raises(UserError, match=r"model\.layers\.0 is changed only while it runs"):
        written(hooked, tmp_path / "hooked")
    # The network was built with the number of experts that its router remembers.
    narrowed = build("mixtral")
    narrowed.config.num_experts_per_tok = 1
    with pytest.raises(UserError, match=r"is 2 and would be loaded as 1: the method changed one"):
        written(narrowed, tmp_path / "narrowed")


def test_refuses_to_write_what_is_not_in_memory(tmp_path):
    written(build("mixtral"), tmp_path / "out")
    on_disk = open_folder(tmp_path / "out", device_map="offload_disk")
    with pytest.raises(UserError, match="only a model in memory"):
        save_model(on_disk, tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: "{", "is corrupt"),
        (lambda d: json.dumps({**d, "format": 9}), "format 9, this program reads 1"),
        (lambda d: json.dumps(_with_class(d, "os.path.join")), "not one of the replaced"),
        (lambda d: json.dumps(_with_class(d, "bench.models.nowhere.X")), "not one of the replaced"),
        (lambda d: json.dumps(_with_class(d, "bench.models.model.Model")), "cannot be built"),
        (lambda d: json.dumps({"format": 1, "packed": d["packed"]}), "no object 'modules'"),
        (lambda d: json.dumps({"format": 1, "modules": d["modules"]}), "no object 'packed'"),
        (lambda d: json.dumps({**d, "modules": {"model.nothing": {}}}), "model.nothing"),
    ],
)
def test_a_bad_description_is_one_sentence(damage, said, tmp_path):
    small, _ = shrunk("mixtral")
    written(small, tmp_path / "out")
    file = tmp_path / "out" / replaced_modules.DESCRIPTION_FILE
    file.write_text(damage(json.loads(file.read_text())))
    config = ModelConfig(name="tiny", source="local", path=str(tmp_path / "out"))
    for read in (load_model, skeleton):
        with pytest.raises(UserError, match=said) as caught:
            read(resolve_model(config, offline=True))
        assert "\n" not in str(caught.value)


def _with_class(description, path):
    name, entry = next(iter(description["modules"].items()))
    return {**description, "modules": {name: {**entry, "class": path}}}


def test_weights_that_do_not_fit_their_description_are_refused(tmp_path):
    small, _ = shrunk("mixtral")
    written(small, tmp_path / "out")
    file = tmp_path / "out" / replaced_modules.DESCRIPTION_FILE
    description = json.loads(file.read_text())
    entry = next(iter(description["modules"].values()))
    entry["widths"][0] = 0
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"(missing|unexpected|mismatched|cannot be loaded)"):
        open_folder(tmp_path / "out")


@pytest.mark.parametrize("name", ["replaced", "packed"])
def test_a_folder_written_before_the_modules_moved_still_loads(name):
    # Written at commit 477bb5a, where a folder stated the path of a class. `replaced` holds ragged
    # experts, a gated expert, a masked router and experts with a shared base.
    home = Path(__file__).parent / "folders_477bb5a"
    wanted = load_file(home / f"{name}_logits.safetensors")
    network = open_folder(home / name).network
    torch.testing.assert_close(network(wanted["tokens"]).logits, wanted["logits"], **CLOSE)


def test_a_new_folder_names_classes_and_no_paths(tmp_path):
    small, _ = shrunk("qwen2_moe")
    written(small, tmp_path / "out")
    description = replaced_modules.read_description(tmp_path / "out")
    named = {spec["class"] for spec in description["modules"].values()}
    assert named == {"RaggedExperts", "GatedExpert"}


def test_refuses_a_replaced_module_that_no_folder_can_name():
    class Unlisted(replaced_modules.ReplacedModule):
        def spec(self):
            return {}

        @classmethod
        def from_spec(cls, spec, original):
            return cls()

    network = build("mixtral")
    network.model.layers[1].mlp.gate = Unlisted()
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate is a .*Unlisted"):
        replaced_modules.describe_network(network)


def test_experts_of_any_form_are_exported(tmp_path):
    # Ragged experts, a masked router and experts with a shared base in one network: the structure
    # cannot describe the last, which must not stop a format that needs no description of widths.
    mixed = open_folder(Path(__file__).parent / "folders_477bb5a" / "replaced")
    assert mixed.structure.refusal is not None
    assert save_model(mixed, tmp_path) == "slimbench"
    again = open_folder(tmp_path).network
    torch.testing.assert_close(again(tokens()).logits, mixed.network(tokens()).logits, **CLOSE)
    with pytest.raises(UserError, match=r"transformers has no .*SharedBaseExperts.* without --for"):
        save_model(mixed, tmp_path, find_engine("transformers"))


def test_a_masked_router_is_not_mistaken_for_a_published_one(tmp_path):
    network = build("olmoe", num_experts=12, intermediate_size=8)
    for block in inspect_model(network).moe:
        drop_experts(block, [0, 5], "masked")
    # All experts have one width, which the config could state, but not the names that are gone.
    assert written(network, tmp_path / "out") == "slimbench"
    again = open_folder(tmp_path / "out").network
    torch.testing.assert_close(again(tokens()).logits, network(tokens()).logits, **CLOSE)


def test_a_dense_network_with_a_replaced_module_is_exported(tmp_path):
    network = llama()
    mlp = network.model.layers[1].mlp
    gated = GatedExpert(4, 16, mlp.act_fn)
    gated.load_state_dict(
        {
            name: weight[:4] if weight.shape[0] == 12 else weight[:, :4]
            for name, weight in mlp.state_dict().items()
        }
    )
    network.model.layers[1].mlp = gated
    assert written(network, tmp_path / "out") == "slimbench"
    again = open_folder(tmp_path / "out").network
    torch.testing.assert_close(again(tokens()).logits, network(tokens()).logits, **CLOSE)


def test_for_an_engine_the_widths_are_whole_tiles_and_the_saving_is_said(tmp_path):
    small, dark = halved("qwen2_moe", moe_intermediate_size=192, shared_expert_intermediate_size=80)
    model = model_of(small)
    widest = max(width for block in model.structure.moe for width in block.widths)
    plan = plan_export(model, find_engine("vllm"))
    assert (plan.widths.routed, plan.widths.shared) == (64 * -(-widest // 64), 64)
    left = sum(b.micro_experts for b in model.structure.moe) / (2 * (6 * 192 + 80))
    kept = (6 * plan.widths.routed + 64) / (6 * 192 + 80)
    assert plan.removal.by_run == pytest.approx(1 - left)
    assert plan.removal.in_folder == pytest.approx(1 - kept)
    assert f"{1 - kept:.1%} of the expert weights, the run removed {1 - left:.1%}" in str(
        plan.removal
    )
    write_model(model, tmp_path, plan)
    again, report = loaded(tmp_path)
    torch.testing.assert_close(again(tokens()).logits, dark(tokens()).logits, **CLOSE)
    assert not any(report.values())


def test_experts_below_the_alignment_are_refused(tmp_path):
    small, _ = shrunk("mixtral")
    with pytest.raises(UserError, match=r"12 wide, less than the 128 .*--for transformers"):
        save_model(model_of(small), tmp_path, find_engine("sglang", 128))
    assert not list(tmp_path.iterdir())


def test_an_architecture_that_needs_code_is_refused(tmp_path):
    small, _ = shrunk("deepseek")
    with pytest.raises(UserError, match="not in transformers, so vllm would need custom code"):
        save_model(model_of(small), tmp_path, find_engine("vllm"))


def test_a_width_that_other_layers_share_is_refused(tmp_path):
    config = transformers.JambaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_experts=4,
        num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, attn_layer_period=2,
        attn_layer_offset=0, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4,
        mamba_dt_rank=4,
    )  # fmt: skip
    network = transformers.JambaForCausalLM(config).eval().requires_grad_(False)
    for block in inspect_model(network).moe:
        delete_micro_experts(block, torch.arange(0, block.micro_experts, 2), ALIGN)
    with pytest.raises(UserError, match=r"its experts and of .*feed_forward.* in one field"):
        save_model(model_of(network), tmp_path, find_engine("transformers"))
    assert not list(tmp_path.iterdir())
