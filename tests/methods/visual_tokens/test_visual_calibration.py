"""Calibration against its definition: full attention matrices, direct sums, one run per cut."""

import json
from dataclasses import replace

import pytest
import torch

from bench.data.prompts import ProcessedPrompts
from bench.errors import MissingData, UserError
from bench.method import Context
from bench.ui import SILENT
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_tokens.allocation import earliest_cut
from methods.visual_tokens.calibration import calibrate, load_calibration_stats
from methods.visual_tokens.head_pruning import HeadPruning
from methods.visual_tokens.strategies import LayerDrop, SparseFFN
from tests.methods.visual_engine.tiny_mllms import IMAGE, LAYOUTS, build, laid_out_prompt, prompt
from tests.methods.visual_tokens.test_visual_strategies import context, loaded

NAMES = ["llava_llama", "internvl_qwen3", "qwen2_vl", "qwen3_vl_moe", "internvl_qwen3_moe"]
# Other rotations by layer, other norms, images that attend forwards.
OTHERS = ["gemma3", "paligemma", "cohere2_vision", "glm4v"]
ROWS = ([4, (3, 4), 5], [2, (2, 2), 7])


def found(name, **changes):
    engine = visual_engine_of(build(name, **changes))
    call = (laid_out_prompt if name in LAYOUTS else prompt)(name, *ROWS)
    return engine, call, calibrate(engine, ProcessedPrompts.of([call]), SILENT)


@pytest.mark.parametrize("name", NAMES + OTHERS)
def test_head_scores_are_sums_over_the_whole_attention_matrix(name):
    _, call, stats = found(name)
    network = build(name)
    network.set_attn_implementation({"text_config": "eager"})
    weights = network(**call, output_attentions=True).attentions
    visual = call["input_ids"] == IMAGE
    text = call["attention_mask"].bool() & ~visual
    for layer, attention in enumerate(weights):
        for sample in range(2):
            rows = attention[sample][:, text[sample]]
            for ours, mass in ((stats.text, rows.sum(1)), (stats.last, rows[:, -1])):
                ratio = mass[:, visual[sample]].sum(-1) / mass[:, text[sample]].sum(-1)
                assert torch.allclose(ours[sample, layer], ratio, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava_llama", "internvl_phi3"])
def test_neuron_scores_are_mean_activations_times_column_norms(name):
    engine, call, stats = found(name)
    visual = call["input_ids"] == IMAGE
    inputs = []
    for layer in engine.decoder.layers:
        layer.feed_forward.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    engine.network(**call)
    for layer, x, scores in zip(engine.decoder.layers, inputs, stats.neurons, strict=True):
        (unit,) = layer.units()
        direct = unit.hidden(x[visual]).abs().mean(0) * unit.down.norm(dim=0)
        assert torch.allclose(scores[0], direct, rtol=1e-4)


def test_expert_scores_weigh_each_token_as_the_router_does():
    engine, call, stats = found("qwen3_vl_moe")
    visual = call["input_ids"] == IMAGE
    block = engine.decoder.layers[1].moe
    seen = []
    block.block.register_forward_pre_hook(lambda _, args: seen.append(args[0][visual]))
    engine.network(**call)
    _, weight, index = block.router(seen[0])
    for number, unit in enumerate(engine.decoder.layers[1].units()):
        token, slot = torch.where(index == number)
        hidden = unit.hidden(seen[0][token]) * weight[token, slot][:, None]
        direct = hidden.abs().sum(0) / len(seen[0]) * unit.down.norm(dim=0)
        assert torch.allclose(stats.neurons[1][number], direct, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES + OTHERS)
def test_cuts_cost_what_running_them_costs(name):
    engine, call, stats = found(name)
    dense = build(name)(**call).logits[:, -1].double().log_softmax(-1)
    engine.plan.set_execution("skip")
    for cut in range(1, 5):
        engine.plan.cut_at(cut)
        answer = engine.network(**call).logits[:, -1].double().log_softmax(-1)
        direct = (dense.exp() * (dense - answer)).sum(-1).mean()
        assert stats.cut_kl[cut - 1] == pytest.approx(float(direct), rel=1e-3, abs=1e-6)
    assert stats.cut_kl[0] > 1e-4


def test_stats_do_not_depend_on_what_was_reordered_before():
    fresh = found("llava_llama")[2]
    engine = visual_engine_of(build("llava_llama"))
    rng = torch.Generator().manual_seed(0)
    engine.plan.keep_heads([(3, 1)] * 4)
    engine.plan.keep_neurons([(torch.randperm(48, generator=rng)[:9],)] * 4)
    engine.weight_cache.reorder()
    again = calibrate(engine, ProcessedPrompts.of([prompt("llava_llama", *ROWS)]), SILENT)
    assert torch.allclose(again.last, fresh.last, rtol=1e-4)
    assert torch.allclose(again.neurons[2][0], fresh.neurons[2][0], rtol=1e-4)


def test_voting_is_the_statistic_beating_the_threshold():
    stats = found("llava_llama")[2]
    ratio = torch.rand(10, 4, 4, generator=torch.Generator().manual_seed(0))
    stats = replace(stats, last=ratio)
    for votes in (0.0, 0.4, 0.5, 0.9):
        for tau in (0.1, 0.35, 0.8):
            voted = (ratio > tau).sum(0) > round(votes * 10)
            assert torch.equal(stats.head_statistic(votes) > tau, voted)


def test_a_threshold_keeps_the_first_layers_whole():
    model, lent = loaded("llava_llama"), context("llava_llama", samples=5)
    heads = HeadPruning(threshold=1e9).apply(model, lent).details["heads"]
    assert heads == [[0, 1, 2, 3], [0, 1, 2, 3], [], []]


def test_saved_stats_come_back(tmp_path):
    _engine, _, stats = found("qwen3_vl_moe")
    stats.save(tmp_path)
    again = load_calibration_stats(tmp_path)
    assert again.origin == stats.origin
    assert again.cut_kl == stats.cut_kl and torch.equal(again.last, stats.last)

    model = loaded("qwen3_vl_moe")
    details = (
        SparseFFN(keep=0.5, calibration_folder=str(tmp_path)).apply(model, Context(seed=1)).details
    )
    assert details["scores"] == stats.origin
    kept = visual_engine_of(model.network).plan.layers[2].neurons
    for indices, score in zip(kept, stats.neurons[2], strict=True):
        assert set(indices.tolist()) == set(score.topk(6).indices.tolist())


def test_damaged_calibrations_are_refused(tmp_path):
    strategy = SparseFFN(calibration_folder=str(tmp_path))
    with pytest.raises(MissingData, match=r"has no calibration\.json"):
        strategy.apply(loaded("llava_llama"), Context(seed=1))
    found("llava_llama", intermediate_size=40)[2].save(tmp_path)
    with pytest.raises(UserError, match="a different width"):
        strategy.apply(loaded("llava_llama"), Context(seed=1))
    facts = json.loads((tmp_path / "calibration.json").read_text())
    facts["cut_kl"][0] += 1
    (tmp_path / "calibration.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="was changed"):
        strategy.apply(loaded("llava_llama"), Context(seed=1))
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        strategy.apply(loaded("llava_llama"), Context(seed=1))


def test_layers_are_cut_where_the_answer_stays():
    stats = found("llava_llama")[2]
    stats = replace(stats, cut_kl=[0.9, 0.2, 0.3, 0.0])
    assert [earliest_cut(stats, x) for x in (1.0, 0.25, 0.1, 0.0)] == [1, 2, 4, 4]
    model, lent = loaded("llava_llama"), context("llava_llama")
    details = LayerDrop(max_kl=1e9).apply(model, lent).details
    assert details["layers"] == 1 and visual_engine_of(model.network).plan.cut == 1


def test_images_are_measured_once_a_run(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "methods.visual_tokens.calibration.calibrate",
        lambda *given: calls.append(given) or calibrate(*given),
    )
    model, lent = loaded("llava_llama"), context("llava_llama")
    HeadPruning(keep=0.75).apply(model, lent)
    SparseFFN().apply(model, lent)
    assert len(calls) == 1
