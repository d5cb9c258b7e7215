"""FLAP and LLM-Pruner against slow transcriptions; removed units equal zeroed ones."""

import copy
import dataclasses

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.models.saving import save_model
from bench.models.structure.dense_layer import find_heads, weight_of
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from bench.ui import SILENT
from methods.dense.structured import (
    Flap,
    InputMoments,
    LLMPruner,
    globally_lowest,
    lowest,
    readout_moments,
    taylor_scores,
)
from methods.dense.units import find_units, remove_units
from methods.wgsef.layerwise.dense_decoder import OnText
from tests.models import tiny_networks

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def network(family=LlamaForCausalLM):
    config = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[family](**SIZES)
    made = family._from_config(config, attn_implementation="sdpa")
    return tiny_networks.randomise(made, 0)


def tokens():
    return torch.randint(0, 64, (6, 20), generator=torch.Generator().manual_seed(1))


def model_of(made):
    config = ModelConfig(name="tiny", source="tests")
    return Model(config, made, tiny_networks.tokenizer(), "", None, torch.device("cpu"))


def pruned(made, method):
    model = model_of(made)
    method.check(model.structure)
    return model, method.apply(model, Context(0, Calibration(tokens(), "text")))


@pytest.mark.parametrize("family", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_removed_units_equal_zeroed_ones(family):
    zeroed, removed = network(family), network(family)
    generator = torch.Generator().manual_seed(3)
    for unit, other in zip(
        find_units(model_of(zeroed).structure, "test"),
        find_units(model_of(removed).structure, "test"),
        strict=True,
    ):
        gone_U = torch.rand(unit.count, generator=generator) < 0.4
        gone_U[0] = False
        with torch.no_grad():
            unit.readout.weight[:, unit.columns(gone_U)] = 0
        remove_units(other, gone_U)
    torch.testing.assert_close(
        removed(tokens(), use_cache=False).logits, zeroed(tokens(), use_cache=False).logits
    )
    cached = removed.generate(tokens()[:1], max_new_tokens=3, do_sample=False)
    assert cached.shape == (1, 23)


MULTI_HEAD_FALCON = {"new_decoder_architecture": False, "multi_query": False}
HEADS = [
    ("llama_biased", {}), ("qwen3", {}), ("gemma2", {}), ("opt", {}), ("phi3", {}),
    ("gpt2", {}), ("gpt_neox", {}), ("falcon_new", {}), ("falcon", MULTI_HEAD_FALCON),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), HEADS)
def test_removed_heads_equal_zeroed_ones_whatever_the_layout(name, changes):
    zeroed, removed = (tiny_networks.build_dense(name, **changes) for _ in range(2))
    for unit, other in zip(
        find_units(model_of(zeroed).structure, "test", ["heads"]),
        find_units(model_of(removed).structure, "test", ["heads"]),
        strict=True,
    ):
        # Different numbers per layer, although all layers share a config.
        gone_U = torch.zeros(unit.count, dtype=torch.bool)
        gone_U[[0] if unit.layer else list(range(1, unit.count))] = True
        weight_of(unit.readout)[:, unit.columns(gone_U)] = 0
        before = sum(weight.numel() for weight in removed.parameters())
        remove_units(other, gone_U)
        left = sum(weight.numel() for weight in removed.parameters())
        assert before - left == int(gone_U.sum()) * unit.weights_per_unit
        assert find_heads(other.owner)[0].groups == int((~gone_U).sum())
    torch.testing.assert_close(
        removed(tiny_networks.tokens()).logits, zeroed(tiny_networks.tokens()).logits
    )
    prompt = tiny_networks.tokens(rows=1)
    assert torch.equal(
        removed.generate(prompt, max_new_tokens=3, do_sample=False),
        zeroed.generate(prompt, max_new_tokens=3, do_sample=False),
    )


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox", "falcon_new"])
def test_the_rows_of_a_fused_matrix_that_wgsef_zeroes_are_those_of_a_group(name):
    dense = tiny_networks.build_dense(name)
    method = OnText(atoms="heads", ratio=0.5, selector="energy", refit=False, state="zeroed")
    model, report = pruned(copy.deepcopy(dense), method)
    units = list(find_units(model.structure, "test", ["heads"]))
    assert [layer.model_extra["kept"] for layer in report.layers]
    for unit, other, layer in zip(
        units, find_units(model_of(dense).structure, "test", ["heads"]), report.layers, strict=True
    ):
        kept_U = torch.zeros(unit.count, dtype=torch.bool)
        kept_U[layer.model_extra["kept"]] = True
        for (source, unit_R), (before, _) in zip(unit.sources, other.sources, strict=True):
            rows_R1 = kept_U[unit_R][:, None]
            assert torch.equal(weight_of(source), weight_of(before) * rows_R1)
        assert torch.equal(weight_of(unit.readout), weight_of(other.readout) * unit.columns(kept_U))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("olmo2", {}, "normalises the queries of all heads together"),
        ("falcon", {}, "has one key-value head for all queries"),
        ("falcon_new", {"alibi": True}, r"gives each head a slope \(ALiBi\) that depends on"),
    ],
)
def test_heads_that_are_not_independent_are_refused_and_neurons_go(name, changes, reason):
    made = tiny_networks.build_dense(name, **changes)
    with pytest.raises(UserError, match=f"flap: layer 0 of .* {reason}.*: set units=neurons"):
        pruned(made, Flap(ratio=0.5))
    _, report = pruned(made, Flap(ratio=0.5, units="neurons"))
    assert report.effect == "removed"


def test_moments_are_those_of_two_passes():
    x_TC = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    moments = InputMoments(5, torch.device("cpu"))
    for part in x_TC.split(33):
        moments.add(part)
    torch.testing.assert_close(moments.mean, x_TC.double().mean(0))
    torch.testing.assert_close(moments.variance, x_TC.double().var(0))


def readouts(made):
    """Inputs of every readout, by hooks on a plain forward, in the order of units."""
    found, units = {}, list(find_units(model_of(made).structure, "test"))
    handles = [
        unit.readout.register_forward_pre_hook(
            lambda module, args: found.update({module: args[0].flatten(0, 1)})
        )
        for unit in units
    ]
    made(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    return units, [found[unit.readout] for unit in units]


def test_the_mean_output_over_the_calibration_text_does_not_change():
    """The property that defines the bias of FLAP."""
    made = network()
    units, inputs = readouts(made)
    moments = readout_moments(model_of(made), units, tokens(), 4, SILENT)
    for unit, x_TC, moment in zip(units, inputs, moments, strict=True):
        dense_D = unit.readout(x_TC).double().mean(0)
        gone_U = torch.arange(unit.count) % 3 == 1
        kept_TC = x_TC[:, ~unit.columns(gone_U)]
        remove_units(unit, gone_U, moment.mean)
        torch.testing.assert_close(
            unit.readout(kept_TC).double().mean(0), dense_D, rtol=1e-4, atol=1e-5
        )


def test_flap_scores_are_those_of_a_loop():
    dense = network()
    units, inputs = readouts(dense)
    expected = []
    for unit, x_TC in zip(units, inputs, strict=True):
        metric = []
        for j in range(unit.readout.in_features):
            values = x_TC[:, j].double()
            variance = sum((v - values.mean()) ** 2 for v in values) / (len(values) - 1)
            weights = sum(float(w) ** 2 for w in unit.readout.weight[:, j])
            value = float(variance) * weights
            metric.append(value**2 if unit.kind == "heads" else value)
        metric = torch.tensor(metric, dtype=torch.float64)
        standard = (metric - metric.mean()) / metric.std()
        expected.append(torch.stack([part.mean() for part in standard.split(unit.width)]))
    gone = globally_lowest(expected, [u.weights_per_unit for u in units], 0.3)
    _, report = pruned(network(), Flap(ratio=0.3))
    for unit, gone_U in zip(units, gone, strict=True):
        entry = report.layers[unit.layer].model_extra
        assert entry[f"removed_{unit.kind}"] == int(gone_U.sum())


@given(st.integers(0, 10_000), st.floats(0.05, 0.9))
def test_the_global_cut_is_nearest_to_the_ratio(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (4, 24, 4, 24)]
    costs = [30, 3, 30, 3]
    gone = globally_lowest(scores, costs, ratio)
    best = [int(score_U.argmax()) for score_U in scores]
    assert not any(bool(gone_U[place]) for gone_U, place in zip(gone, best, strict=True))
    # No unit that goes scores above one that stays, the protected ones aside.
    free = [
        score_U[~gone_U & (torch.arange(len(score_U)) != place)]
        for score_U, gone_U, place in zip(scores, gone, best, strict=True)
    ]
    left = torch.cat([score_U[gone_U] for score_U, gone_U in zip(scores, gone, strict=True)])
    if len(left) and len(torch.cat(free)):
        assert float(left.max()) < float(torch.cat(free).min())
    cut = sum(int(gone_U.sum()) * cost for gone_U, cost in zip(gone, costs, strict=True))
    # The unit at the threshold goes as well, and one of each family may be kept against the order.
    assert abs(cut - ratio * 264) <= 30 + 2 * 33 + 30


def test_taylor_scores_are_sums_over_the_weights_of_a_unit():
    made = network()
    model = model_of(made)
    units = list(find_units(model.structure, "test"))
    found = taylor_scores(model, units, tokens(), 4, SILENT)
    twin = copy.deepcopy(made).requires_grad_(True)
    twin(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    grads = {weight: weight.grad for weight in twin.parameters()}
    twin.requires_grad_(False)
    for unit, other, score_U in zip(
        units, find_units(model_of(twin).structure, "test"), found, strict=True
    ):
        for u in range(unit.count):
            total = 0.0
            for source, unit_R in other.sources:
                for row in (unit_R == u).nonzero()[:, 0]:
                    total += float((source.weight[row] * grads[source.weight][row]).abs().sum())
            for column in range(u * unit.width, (u + 1) * unit.width):
                pair = other.readout.weight[:, column] * grads[other.readout.weight][:, column]
                total += float(pair.abs().sum())
            assert float(score_U[u]) == pytest.approx(total, rel=1e-4)
    assert all(weight.grad is None and not weight.requires_grad for weight in made.parameters())


def test_protected_layers_keep_all_and_the_rest_loses_the_ratio():
    model, report = pruned(network(), LLMPruner(ratio=0.25, protect_first=1, protect_last=1))
    extra = [entry.model_extra for entry in report.layers]
    removed = [(e["removed_heads"], e["removed_neurons"]) for e in extra]
    assert removed == [(0, 0), (1, 6), (0, 0)]
    assert model.structure.layers[1].mlp.down_proj.in_features == 18


@pytest.mark.parametrize(
    "method",
    [
        Flap(ratio=0.5, allocation="uniform"),
        Flap(ratio=0.5, allocation="uniform", compensate=False),
        LLMPruner(ratio=0.5, protect_first=0, protect_last=0),
    ],
)
def test_layers_of_one_width_reload_in_stock_transformers(method, tmp_path):
    model, _ = pruned(network(), method)
    assert save_model(model, tmp_path / "out") == "stock"
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        again(tokens(), use_cache=False).logits, model.network(tokens(), use_cache=False).logits
    )


def test_layers_of_different_widths_are_refused_on_export_only(tmp_path):
    model, _ = pruned(network(), Flap(ratio=0.4))
    assert len({layer.mlp.down_proj.in_features for layer in model.structure.layers}) > 1
    assert model.network(tokens(), use_cache=False).logits.isfinite().all()
    with pytest.raises(UserError, match="shape that differs"):
        save_model(model, tmp_path / "out")


@pytest.mark.parametrize("method", [Flap(ratio=0), LLMPruner(ratio=0, protect_first=0)])
def test_ratio_zero_changes_nothing(method):
    dense = network()(tokens(), use_cache=False).logits
    model, _ = pruned(network(), method)
    assert torch.equal(model.network(tokens(), use_cache=False).logits, dense)


def test_equal_scores_go_from_the_front():
    assert lowest(torch.tensor([1.0, 1, 1, 0]), 2).tolist() == [True, False, False, True]


def test_no_layer_left_to_prune_is_one_sentence():
    with pytest.raises(UserError, match=r"protect_first=4 .* leave none of the 3 layers"):
        pruned(network(), LLMPruner(ratio=0.2))


@pytest.mark.parametrize("method", [Flap(ratio=0.2), LLMPruner(ratio=0.2, protect_first=0)])
def test_offloaded_weights_are_refused_before_anything_is_cut(method):
    with pytest.raises(UserError, match=r"set model\.device_map=null"):
        pruned(cpu_offload(network(), execution_device=torch.device("cpu")), method)


def test_a_mixture_of_experts_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"flap removes neurons of dense .*, but Mixtral\w* has experts"
    ):
        pruned(tiny_networks.build("mixtral"), Flap(ratio=0.2))


def test_heads_are_found_beside_experts_of_a_form_that_has_no_neurons():
    known = inspect_model(tiny_networks.build("qwen2_moe"))
    shared_base = dataclasses.replace(known, refusal="experts in an unsupported form")
    assert len(list(find_units(shared_base, "flap", ("heads",)))) == len(known.layers)
