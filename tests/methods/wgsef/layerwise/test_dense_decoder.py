"""Neurons and heads of dense decoders: the geometry of wide atoms, and removed = zeroed."""

import gc
import weakref
from itertools import combinations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bench.data.calibration import Calibration
from bench.data.prompts import ProcessedPrompts
from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.wgsef.layerwise import observation
from methods.wgsef.layerwise.dense_decoder import OnPrompts, OnText
from methods.wgsef.layerwise.reconstruction import Reconstruction
from tests.methods.visual_engine import tiny_mllms
from tests.methods.wgsef.layerwise.oracles import by_elimination, by_energy, by_homotopy
from tests.models import tiny_networks

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
BOTH = pytest.mark.parametrize("atoms", ["neurons", "heads"])


def decoder(kind=LlamaForCausalLM, **changes):
    configs = {
        LlamaForCausalLM: LlamaConfig,
        Qwen2ForCausalLM: Qwen2Config,
        OPTForCausalLM: OPTConfig,
    }
    if kind is OPTForCausalLM:
        changes |= {"ffn_dim": 40, "word_embed_proj_dim": 32}
    config = configs[kind](**(SIZES | changes))
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


def test_a_number_of_heads_that_transformers_refuses_is_known_before_weights_load():
    structure = inspect_model(decoder(num_attention_heads=8, num_key_value_heads=4, head_dim=4))
    said = r"could not reload 3 heads per layer: .*multiple.*; choose a different ratio"
    with pytest.raises(UserError, match=said):
        OnText(atoms="heads", ratio=0.25).check(structure)
    for knobs in ({"ratio": 0.5}, {"ratio": 0.25, "state": "zeroed"}):
        OnText(atoms="heads", **knobs).check(structure)


def tokens():
    return torch.randint(0, 64, (6, 20), generator=torch.Generator().manual_seed(1))


def applied(network, method, prompts=None):
    config = ModelConfig(name="tiny", source="tests")
    model = Model(config, network, None, "", None, torch.device("cpu"))
    method.check(model.structure)
    return model, method.apply(model, Context(0, Calibration(tokens(), "text"), prompts))


def wide(atoms=5, width=3, outputs=4, count=300):
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(8, atoms * width, generator=generator, dtype=torch.float64)
    phi_TM = torch.relu(torch.randn(count, 8, generator=generator, dtype=torch.float64) @ mix)
    weight_MD = torch.randn(atoms * width, outputs, generator=generator, dtype=torch.float64)
    return phi_TM, weight_MD, Reconstruction.from_gram(phi_TM.T @ phi_TM / count, weight_MD, width)


def test_the_norm_of_a_wide_atom_is_the_size_of_what_it_puts_out_alone():
    phi_TM, weight_MD, problem = wide()
    alone = [phi_TM[:, s : s + 3] @ weight_MD[s : s + 3] for s in range(0, 15, 3)]
    expected = torch.stack([y_TD.square().sum(1).mean().sqrt() for y_TD in alone])
    torch.testing.assert_close(problem.norms(problem.readout)[0], expected)
    torch.testing.assert_close(problem.weights(problem.readout), weight_MD)


def test_wide_atoms_that_were_never_active_have_no_energy():
    phi_TM, weight_MD, _ = wide()
    phi_TM[:, 6:9] = 0
    phi_TM[:, 10] = 0
    problem = Reconstruction.from_gram(phi_TM.T @ phi_TM / 300, weight_MD, 3)
    norm_A = problem.norms(problem.readout)[0]
    assert norm_A[2] == 0
    assert (norm_A[[0, 1, 3, 4]] > 0).all()
    assert problem.gram.isfinite().all()


def test_elimination_of_wide_atoms_drops_what_brute_force_would():
    phi_TM, weight_MD, problem = wide()
    output_TD = phi_TM @ weight_MD
    left = list(range(5))
    for k in (4, 3, 2):
        errors = {}
        for kept in combinations(left, k):
            columns = [3 * atom + i for atom in kept for i in range(3)]
            solved = torch.linalg.lstsq(phi_TM[:, columns], output_TD).solution
            errors[kept] = float((phi_TM[:, columns] @ solved - output_TD).square().sum())
        left = list(min(errors, key=errors.get))
        v_MD = by_elimination(problem, k, damping=1e-12)
        assert (problem.norms(v_MD)[0] > 0).nonzero()[:, 0].tolist() == left


@pytest.mark.parametrize("select", [by_energy, by_homotopy, by_elimination])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_every_selector_keeps_k_wide_atoms(select, k):
    _, _, problem = wide()
    v_MD = select(problem, k)
    kept_A = problem.norms(v_MD)[0] > 0
    assert int(kept_A.sum()) == k
    assert problem.error(problem.refit(kept_A)) <= problem.error(v_MD) + 1e-9


@BOTH
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_removed_equals_zeroed_and_every_layer_keeps_its_share(atoms, kind):
    ids, stock = tokens()[:2], decoder(kind)
    zeroed, _ = applied(decoder(kind), OnText(atoms=atoms, ratio=0.5, state="zeroed"))
    removed, report = applied(decoder(kind), OnText(atoms=atoms, ratio=0.5))
    expected = zeroed.network(ids).logits
    torch.testing.assert_close(removed.network(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(stock(ids).logits, expected, atol=1e-3)
    all_of_them = 40 if atoms == "neurons" else 4
    for layer in report.layers:
        assert len(layer.kept) == all_of_them // 2
        assert layer.refit["error_after"] <= layer.refit["error_before"]
    assert report.effect == "removed"
    assert removed.network.num_parameters() < stock.num_parameters()


@BOTH
def test_what_is_removed_can_be_saved_and_loaded(atoms, tmp_path):
    removed, _ = applied(decoder(), OnText(atoms=atoms, ratio=0.5))
    removed.network.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, removed.network(tokens()).logits)


@BOTH
def test_nothing_asked_changes_nothing(atoms):
    network, report = applied(decoder(), OnText(atoms=atoms, ratio=0.0))
    assert report.effect == "none"
    assert torch.equal(network.network(tokens()).logits, decoder()(tokens()).logits)


def test_layers_see_what_the_pruned_ones_before_them_produce():
    _, sequential = applied(decoder(), OnText(atoms="neurons", ratio=0.5))
    _, at_once = applied(decoder(), OnText(atoms="neurons", ratio=0.5, sequential=False))
    first, last = sequential.layers, at_once.layers
    assert first[0].kept == last[0].kept
    assert first[0].refit == pytest.approx(last[0].refit)
    assert first[1].refit != pytest.approx(last[1].refit, rel=1e-3)


@BOTH
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen2ForCausalLM, OPTForCausalLM])
def test_a_replayed_layer_is_a_layer_that_ran_again(atoms, kind, monkeypatch):
    ratio = {"atoms": atoms, "ratio": 0.5, "state": "zeroed"}
    replayed, one = applied(decoder(kind), OnText(**ratio))
    monkeypatch.setattr(observation, "REPLAY_BYTES", 0)
    again, other = applied(decoder(kind), OnText(**ratio))
    assert one.layers == other.layers
    for name, weight in replayed.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name]), name


def test_one_pass_of_text_is_what_calls_of_the_whole_network_measure():
    network = decoder()
    model = Model(
        ModelConfig(name="tiny", source="tests"), network, None, "", None, torch.device("cpu")
    )
    readouts = [layer.mlp.down_proj for layer in model.structure.layers]
    calls = [{"input_ids": tokens()[:4]}, {"input_ids": tokens()[4:]}]
    by_text = list(observation.observe_text(model, readouts, tokens(), 4, sequential=True))
    by_call = list(observation.observe_calls(model, readouts, calls, sequential=True))
    for one, other in zip(by_text, by_call, strict=True):
        assert one.tokens == other.tokens == 120
        torch.testing.assert_close(one.mean(), other.mean(), atol=1e-7, rtol=1e-5)


def test_a_gram_matrix_in_bands_is_the_sum_of_all_products():
    gram = observation.LayerGram(torch.nn.Linear(21, 3))
    x_TM = torch.randn(50, 21, generator=torch.Generator().manual_seed(3))
    gram.add(x_TM[:30])
    gram.add(x_TM[30:])
    expected = x_TM.double().T @ x_TM.double() / 50
    torch.testing.assert_close(gram.mean(), expected, atol=1e-6, rtol=1e-5)


@BOTH
def test_a_budget_over_layers_spends_a_share_that_rounds_to_nothing_in_each(atoms):
    ids = tokens()[:2]
    sizes = {"intermediate_size": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    small = {**sizes, "hidden_size": 24}
    rounded = OnText(atoms=atoms, ratio=0.2)
    assert not any(rounded.planned_removals(inspect_model(decoder(**small))))
    zeroed, _ = applied(
        decoder(**small), OnText(atoms=atoms, ratio=0.2, scope="global", state="zeroed")
    )
    removed, report = applied(decoder(**small), OnText(atoms=atoms, ratio=0.2, scope="global"))
    assert report.details[f"removed_{atoms}"] == 3  # of 18: 3.6 rounded down
    assert min(len(layer.kept) for layer in report.layers) >= 1
    expected = zeroed.network(ids).logits
    torch.testing.assert_close(removed.network(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_budget_over_layers_leaves_one_head_in_each():
    _, report = applied(decoder(), OnText(atoms="heads", ratio=0.99, scope="global"))
    assert [len(layer.kept) for layer in report.layers] == [1] * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("scope", ["layer", "global"])
@BOTH
def test_no_memory_is_kept_after_apply(atoms, scope):
    network = decoder()
    before = [weakref.ref(weight) for weight in network.parameters()]
    model, report = applied(network, OnText(atoms=atoms, ratio=0.5, scope=scope))
    assert model.network is network
    report.layers.clear()
    # Without a garbage collection: a cycle would hold all weights until the next one.
    left = sum(weight.numel() for ref in before if (weight := ref()) is not None)
    mine = {id(weight) for weight in network.parameters()}
    assert all(ref() is None or id(ref()) in mine for ref in before)
    assert left < sum(weight.numel() for weight in network.parameters())
    held = [
        value
        for value in gc.get_objects()
        # By type: `isinstance` would ask lazy modules for their class, which warns.
        if issubclass(type(value), torch.Tensor) and value.dtype == torch.float64
    ]
    assert not [value.shape for value in held if 40 in value.shape or 32 in value.shape]


@BOTH
def test_a_vision_language_model_loses_heads_of_its_decoder_only(atoms):
    network, stock = tiny_mllms.build("llava_llama"), tiny_mllms.build("llava_llama")
    call = tiny_mllms.prompt("llava_llama", [4, (5, 5), 5], [7, (5, 5), 5])
    samples = ProcessedPrompts.of([call])
    zeroed, _ = applied(network, OnPrompts(atoms=atoms, ratio=0.5, state="zeroed"), samples)
    removed, report = applied(
        tiny_mllms.build("llava_llama"), OnPrompts(atoms=atoms, ratio=0.5), samples
    )
    expected = zeroed.network(**call).logits
    torch.testing.assert_close(removed.network(**call).logits, expected, atol=1e-5, rtol=1e-5)
    assert report.details["calibration"] == samples.fingerprint
    towers = [m.model.vision_tower.state_dict() for m in (removed.network, stock)]
    assert all(torch.equal(value, towers[1][name]) for name, value in towers[0].items())


@pytest.mark.parametrize(
    ("name", "atoms", "sentence"),
    [
        ("mixtral", "neurons", "use wgsef_layerwise"),
        ("qwen2_moe", "neurons", "use wgsef_layerwise"),
        ("deepseek_v2", "heads", "no heads to remove"),
    ],
)
def test_layers_without_such_atoms_are_refused(name, atoms, sentence):
    with pytest.raises(UserError, match=sentence):
        applied(tiny_networks.build(name), OnText(atoms=atoms, ratio=0.5))


def test_the_number_to_remove_is_that_of_the_decimal_ratio():
    method = OnText(atoms="neurons", ratio=0.29, selector="energy", state="zeroed")
    _, report = applied(decoder(intermediate_size=100), method)
    # In floating point 0.29 * 100 is 28.999...
    assert report.details["removed_neurons"] == 29 * SIZES["num_hidden_layers"]
