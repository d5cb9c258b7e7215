"""The strategies as methods: composition, choices, reports, what they refuse."""

import copy
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from bench.data.calibration import Calibration
from bench.data.prompts import ProcessedPrompts
from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.expert_view import ExpertView
from bench.models.structure.model_structure import inspect_model
from bench.models.vlm.decoder_view import decoder_layers
from bench.schema import ModelConfig
from methods.camera.pruning import CameraP
from methods.visual_engine.cost.flops import decoder_shape, layer_costs
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.weight_cache import NeuronOrder, permute_neurons
from methods.visual_tokens.allocation import top_heads_by_count, top_heads_by_share
from methods.visual_tokens.head_pruning import RELEASED_HEAD_COUNTS, HeadPruning
from methods.visual_tokens.strategies import LayerDrop, NeighborAttention, SparseFFN
from methods.visual_tokens.yopo import PaperRow, Yopo
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt
from tests.models.tiny_networks import build as text_model

SHARES = PaperRow(label="12%", heads=0.6, layers=0.75, neurons=0.25, window=3)


def loaded(name, **changes):
    network = build(name, **changes)
    config = ModelConfig(name="tiny", source="embedded:tiny")
    return Model(config, network, None, "", None, torch.device("cpu"))


def context(name, samples=3):
    calls = [prompt(name, [4, (3, 4), 5], seed=seed) for seed in range(samples)]
    return Context(seed=1, prompts=ProcessedPrompts.of(calls))


def four(**common):
    return [
        NeighborAttention(window=3, **common),
        HeadPruning(keep=0.6, whole_layers=1, **common),
        SparseFFN(keep=0.25, **common),
        LayerDrop(layers=3, **common),
    ]


@pytest.mark.broad
def test_any_order_gives_the_same_model():
    call = prompt("llava_llama", [4, (5, 5), 5], seed=9)
    where = call["input_ids"] != IMAGE
    answers = []
    for order in permutations(four()):
        model = loaded("llava_llama")
        for method in order:
            assert method.apply(model, context("llava_llama")).effect == "skipped"
        answers.append(model.network(**call).logits[where])
    assert all(torch.allclose(answers[0], answer, atol=1e-5) for answer in answers)
    assert (answers[0] - build("llava_llama")(**call).logits[where]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2", "qwen3_vl_moe"])
def test_a_preset_is_the_four_together_and_equals_its_mask(name):
    model, stock = loaded(name), build(name)
    lent = context(name)
    preset = Yopo(shares=SHARES, whole_layers=1)
    report = preset.apply(model, lent)
    parts = {"layer_drop", "head_pruning", "sparse_ffn"}
    assert set(report.details) == {"label", "row", "shape", "work"} | parts
    single = loaded(name)
    for method in four():
        method.apply(single, lent)
    plan = visual_engine_of(model.network).plan
    assert plan.layers[1].heads == visual_engine_of(single.network).plan.layers[1].heads
    call = prompt(name, [4, (3, 4), 5], seed=9)
    where = call["input_ids"] != IMAGE
    with masked_reference(stock, plan):
        expected = stock(**call).logits[where]
    assert (model.network(**call).logits[where] - expected).abs().max() < 1e-5


def test_a_preset_has_rows_for_single_architectures():
    row = PaperRow(label="69%", heads=1.0, layers=0.5, neurons=1.0, window=0)
    model = loaded("qwen2_vl")
    report = Yopo(shares=SHARES, models={"qwen2_vl": row}).apply(model, Context(seed=1))
    plan = visual_engine_of(model.network).plan
    assert report.details["label"] == "69%"
    assert (plan.cut, plan.window, plan.layers[0].heads) == (2, None, None)


@pytest.mark.parametrize("budget", [0.12, 0.3])
def test_a_budget_is_met_and_used_up(budget):
    model = loaded("llava_llama", num_hidden_layers=6)
    lent = context("llava_llama")
    report = Yopo(shares=SHARES, budget=budget, whole_layers=1).apply(model, lent).details
    engine = visual_engine_of(model.network)
    shape, work = decoder_shape(engine), layer_costs(engine)
    one_head = 2 * 2 * shape.head_dim / (2 * 4 * shape.d_model) / shape.depth
    assert budget - 3 * one_head <= report["visual_share"] <= budget
    assert report["heads"] == sum(layer.heads for layer in work)
    assert engine.plan.cut == report["layers"]


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(
        UserError, match=r"budget=0.0001 cannot be met: the cheapest settings leave 0\.0"
    ):
        Yopo(shares=SHARES, budget=0.0001).apply(loaded("llava_llama"), context("llava_llama"))


def test_official_counts_are_reachable():
    totals = {
        "llava_7b_8": 260, "llava_7b_16": 499, "llava_7b_24": 773,
        "llava_13b_5": 200, "llava_13b_10": 407, "llava_13b_20": 798, "llava_13b_30": 1197,
    }  # fmt: skip
    assert totals.keys() == RELEASED_HEAD_COUNTS.keys()
    for name, total in totals.items():
        size = len(RELEASED_HEAD_COUNTS[name])
        score = torch.rand(size, size, generator=torch.Generator().manual_seed(0))
        kept = top_heads_by_count(score, RELEASED_HEAD_COUNTS[name])
        assert [len(layer) for layer in kept] == RELEASED_HEAD_COUNTS[name]
        assert sum(map(len, kept)) == total


def test_a_mask_file_says_which_heads_stay(tmp_path):
    file = tmp_path / "headmask.npy"
    mask_LH = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=bool)
    np.save(file, mask_LH)
    model = loaded("llava_llama")
    method = HeadPruning(mask=str(file))
    assert not method.uses_prompts
    method.check(model.structure)
    report = method.apply(model, Context(seed=1))
    assert report.details["heads"] == [[0, 1, 2, 3], [1], [], [0, 3]]
    assert (report.details["kept"], report.details["of"]) == (7, 16)


@pytest.mark.parametrize(
    "content, match",
    [
        (np.ones((4, 5), dtype=bool), r"is for 4x5 .* the model has 4 layers of 4 heads"),
        (np.ones((3, 4), dtype=bool), r"is for 3x4 "),
        (np.ones(4, dtype=bool), r"is for 4 "),
        (np.ones((4, 4)), "holds float64: give an array of bool"),
        (np.array([[print]], dtype=object), "is not an array written by numpy.save"),
        (b"no array", "is not an array written by numpy.save"),
        (b"", "is not an array written by numpy.save"),
        (None, "there is no such file"),
    ],
    ids=str,
)
def test_a_mask_that_does_not_fit_is_refused(tmp_path, content, match):
    file = tmp_path / "headmask.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content, allow_pickle=True)
    with pytest.raises(UserError, match=match):
        HeadPruning(mask=str(file)).check(loaded("llava_llama").structure)


def test_counts_given_by_hand():
    model = loaded("llava_llama")
    report = HeadPruning(counts=[4, 1, 0, 2]).apply(model, context("llava_llama"))
    assert [len(layer) for layer in report.details["heads"]] == [4, 1, 0, 2]
    with pytest.raises(UserError, match=r"counts has 2 entries, .* has 4 layers"):
        HeadPruning(counts=[4, 1]).check(model.structure)
    with pytest.raises(UserError, match="a layer can keep 0 to 4 heads"):
        HeadPruning(counts=[9, 1, 1, 1]).apply(model, context("llava_llama"))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_one_threshold_for_all_layers(share):
    score = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    kept = top_heads_by_share(score, share, whole_layers=1, reached=4)
    assert sum(map(len, kept)) == round(share * 32)
    assert len(kept[0]) == 8 and kept[4] == kept[5] == ()
    stay = [score[layer, head] for layer in (1, 2, 3) for head in kept[layer]]
    rest = [score[layer, h] for layer in (1, 2, 3) for h in range(8) if h not in kept[layer]]
    assert not stay or min(stay) > max(rest)


def test_too_small_a_share_is_refused():
    with pytest.raises(UserError, match="3 heads in 4 layers cannot be kept: the first 1"):
        top_heads_by_share(torch.rand(4, 8), 0.1, whole_layers=1, reached=4)


def test_too_small_a_share_is_refused_before_calibration():
    structure = loaded("llava_llama").structure
    with pytest.raises(UserError, match=r"0 heads in \d layers cannot be kept"):
        HeadPruning(keep=0).check(structure)
    HeadPruning(keep=0, whole_layers=0).check(structure)
    HeadPruning(keep=0, threshold=0.5).check(structure)


@pytest.mark.parametrize("choose", ["first", "random"])
def test_controls_need_no_images(choose):
    model = loaded("llava_llama")
    for method in (HeadPruning(keep=0.75, choose=choose), SparseFFN(choose=choose)):
        assert method.apply(model, Context(seed=3)).details["scores"] == choose
    kept = visual_engine_of(model.network).plan.layers[0].neurons[0]
    assert len(kept) == 12
    assert (kept.tolist() == list(range(12))) == (choose == "first")


def test_random_choices_follow_the_seed():
    def kept(seed):
        model = loaded("llava_llama")
        return HeadPruning(keep=0.75, choose="random").apply(model, Context(seed=seed)).details

    assert kept(1) == kept(1) != kept(2)


@pytest.mark.parametrize(
    "kind, knobs",
    [
        (NeighborAttention, {"window": 4}),
        (NeighborAttention, {"radius": 2}),
        (HeadPruning, {"counts": [1], "threshold": 0.1}),
        (HeadPruning, {"mask": "m.npy", "counts": [1]}),
        (HeadPruning, {"mask": "m.npy", "choose": "first"}),
        (HeadPruning, {"counts": "llava_70b"}),
        (HeadPruning, {"threshold": 0.1, "choose": "first"}),
        (SparseFFN, {"keep": 0}),
        (LayerDrop, {"layers": 0}),
        (Yopo, {"shares": {"label": "x"}}),
    ],
)
def test_wrong_knobs_are_refused(kind, knobs):
    with pytest.raises(ValidationError):
        kind(**knobs)


def test_what_does_not_fit_is_said_before_weights_are_loaded():
    with pytest.raises(UserError, match="not a supported vision-language model"):
        SparseFFN().check(inspect_model(text_model("mixtral")))
    with pytest.raises(UserError, match="has 4 layers"):
        LayerDrop(layers=9).check(inspect_model(build("llava_llama")))
    with pytest.raises(UserError, match="does not support MoE models"):
        SparseFFN(execution="masked").check(inspect_model(build("qwen3_vl_moe")))


def test_missing_prompts_are_refused():
    with pytest.raises(UserError, match="prompts with images"):
        SparseFFN().apply(loaded("llava_llama"), Context(seed=1))
    imageless = Context(seed=1, prompts=ProcessedPrompts.of([prompt("llava_llama", [9])]))
    with pytest.raises(UserError, match="has no image"):
        SparseFFN().apply(loaded("llava_llama"), imageless)


def test_executions_do_not_mix():
    model = loaded("llava_llama")
    NeighborAttention().apply(model, Context(seed=1))
    with pytest.raises(UserError, match="execution=masked cannot be combined with execution=skip"):
        LayerDrop(execution="masked").apply(model, Context(seed=1))


@pytest.mark.parametrize("first", [True, False])
def test_composes_with_zeroed_experts(first):
    """Another method may zero expert weights before or after; both effects are there."""
    call = prompt("qwen3_vl_moe", [4, (3, 4), 5], seed=9)
    where = call["input_ids"] != IMAGE
    model, stock = loaded("qwen3_vl_moe"), build("qwen3_vl_moe")
    lent = context("qwen3_vl_moe")
    changes = [
        lambda m: Yopo(shares=SHARES, whole_layers=1, heads="first", neurons="first").apply(
            m, lent
        ),
        lambda m: [block.expert(1).zero(torch.arange(6)) for block in m.structure.moe],
    ]
    for change in changes if first else reversed(changes):
        change(model)
        model.network(**call)
    [block.expert(1).zero(torch.arange(6)) for block in inspect_model(stock).moe]
    with masked_reference(stock, copy.deepcopy(visual_engine_of(model.network).plan)):
        expected = stock(**call).logits[where]
    assert (model.network(**call).logits[where] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llava_qwen2_moe", "internvl_qwen3_moe", "qwen3_vl_moe"])
@pytest.mark.parametrize("visual_first", [True, False])
def test_composes_with_removed_micro_experts(name, visual_first):
    """CAMERA-P really removes neurons; visual rows then use those that both methods kept."""
    tokens = torch.randint(3, 58, (4, 16), generator=torch.Generator().manual_seed(0))
    text = Context(seed=1, calibration=Calibration(tokens, ""))
    call, model, stock = prompt(name, [4, (3, 4), 5], seed=9), loaded(name), loaded(name)
    camera = {"ratio": 0.4, "alpha": 0.5, "align": 4}
    visual = Yopo(shares=SHARES, whole_layers=1, reorder=False)
    if not visual_first:
        CameraP(**camera, state="removed").apply(model, text)
    visual.apply(model, context(name))
    model.network(**call)
    if visual_first:
        CameraP(**camera, state="removed").apply(model, text)
    CameraP(**camera, state="zeroed").apply(stock, text)
    plan = copy.deepcopy(visual_engine_of(model.network).plan)
    if not visual_first:
        for layer, mine in zip(decoder_layers(stock.structure), plan.layers, strict=True):
            plan.layers[layer.index] = replace(mine, neurons=kept_of(layer, mine.neurons))
    where = call["input_ids"] != IMAGE
    with masked_reference(stock.network, plan):
        expected = stock.network(**call).logits[where]
    assert (model.network(**call).logits[where] - expected).abs().max() < 1e-5


def kept_of(layer, neurons):
    """Numbers among neurons that were not zeroed, as numbers among all of them."""
    left = [unit.gate.any(dim=1).nonzero()[:, 0] for unit in layer.units()]
    return tuple(
        (there if len(there) else torch.arange(unit.width))[chosen]
        for unit, there, chosen in zip(layer.units(), left, neurons, strict=True)
    )


@pytest.mark.parametrize("name", ["llava_llama", "llava_qwen2_moe"])
def test_neurons_that_another_method_permutes_are_followed(name):
    """A permutation keeps the width, so only the rows of the weights show it."""
    model, call = loaded(name), prompt(name, [4, (5, 5), 5])
    SparseFFN(choose="random", reorder=False).apply(model, Context(seed=1))
    before = model.network(**call).logits
    rng = torch.Generator().manual_seed(0)
    for layer in visual_engine_of(model.network).decoder.layers:
        for unit in layer.units():
            permute_neurons(unit, torch.randperm(unit.width, generator=rng))
    assert torch.allclose(model.network(**call).logits, before, atol=1e-5)


def test_neurons_with_equal_gates_keep_their_numbers():
    """Zeroed neurons have equal gate rows; when others are removed, each keeps its own number."""
    gate, up, down = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)
    gate[1:4] = 0
    order = NeuronOrder(ExpertView(gate, up, down, nn.SiLU()))
    left = torch.tensor([0, 1, 2, 3, 5])
    narrower = ExpertView(gate[left], up[left], down[:, left], nn.SiLU())
    assert order.update(narrower).tolist() == left.tolist()


def test_neurons_are_scored_after_others_were_removed():
    """Heads first, then removed micro-experts, then neurons scored on what is left."""
    name = "qwen3_vl_moe"
    model, lent = loaded(name), context(name)
    HeadPruning(keep=0.75, choose="first").apply(model, lent)
    tokens = torch.randint(3, 58, (4, 16), generator=torch.Generator().manual_seed(0))
    camera = CameraP(ratio=0.4, alpha=0.5, align=4, state="removed")
    camera.apply(model, Context(seed=1, calibration=Calibration(tokens, "")))
    SparseFFN(keep=0.5).apply(model, lent)
    assert model.network(**prompt(name, [4, (3, 4), 5])).logits.isfinite().all()
    engine = visual_engine_of(model.network)
    for layer in engine.decoder.layers:
        widths = [unit.width for unit in layer.units()]
        left = [len(unit) for unit in engine.weight_cache.places(layer)]
        # Half of the loaded 12; a neuron that was removed may be among them where scores are 0.
        assert all(1 <= kept <= min(6, width) for kept, width in zip(left, widths, strict=True))


def test_a_feed_forward_that_cannot_be_followed_is_named():
    model = loaded("llava_llama")
    SparseFFN(choose="random").apply(model, Context(seed=1))
    mlp = model.network.model.language_model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, 40, bias=False), nn.Linear(32, 40, bias=False)
    mlp.down_proj = nn.Linear(40, 32, bias=False)
    with pytest.raises(UserError, match="cannot be tracked"):
        model.network(**prompt("llava_llama", [4, (5, 5), 5]))
