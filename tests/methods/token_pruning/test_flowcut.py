"""FlowCut against a slow transcription that runs transformers' own modules on fewer rows."""

import math
from types import SimpleNamespace

import pytest
import torch

from bench.errors import UserError
from bench.models.macs import macs_by_part
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.tower.flowcut import FlowCut, patches_to_cut
from methods.token_pruning.tower.hiprune import HiPrune
from methods.token_pruning.visionzip import VisionZip
from methods.visual_engine.decoder import visual_engine_of
from tests.measurement.flops.agreement import agree
from tests.methods.token_pruning.recorded_steps import applied, loaded, record_steps
from tests.methods.token_pruning.test_variants import (
    NAME,
    TOLERANCE,
    N,
    a_prompt,
    last_logits,
    logits_of_rows,
    stock,
)
from tests.methods.visual_engine.tiny_mllms import prompt

DEPTH = 7  # of the tower; the sixth layer is projected, so layers 0, 2 and 4 are followed by cuts
DEEP = {"tower": {"num_hidden_layers": DEPTH}}


def sharpened(network):
    """The network with a tower whose attention is far from even, so that patches leave early."""
    for layer in network.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data *= 9
        layer.self_attn.k_proj.weight.data *= 3
    return network


def softmax_of_heads(query, rows):
    """Weights of one row for all rows, [S]: softmax in each head, then the mean over heads."""
    heads = range(query.shape[0])
    return sum((rows[:, h] @ query[h]).softmax(0) for h in heads) / len(heads)


def cut_tower(network, pixels, keep):
    """Features of the patches that the release leaves of one image, their places, all rows."""
    vision = network.model.vision_tower
    x = vision.pre_layrnorm(vision.embeddings(pixels))[0]
    places, score, rows = list(range(N)), None, []
    for index, layer in enumerate(vision.encoder.layers[: DEPTH - 1]):
        rows.append(len(x))
        h, attention = layer.layer_norm1(x), layer.self_attn
        q, k, v = (
            getattr(attention, f"{name}_proj")(h).unflatten(-1, (attention.num_heads, -1))
            for name in "qkv"
        )
        x = layer(x[None], None)[0]
        remaining, n = DEPTH - 3 - index, len(places)
        if n <= keep:
            continue
        c = softmax_of_heads(q[0] * attention.scale, k)[1:]
        s = softmax_of_heads(v[0], v)[1:]
        norm = v[1:].mean(1).abs().sum(-1)
        now = (c / c.sum() + s / s.sum()) * norm
        score = now if score is None else 0.5 * score + 0.5 * now
        if remaining % 2:
            continue
        share = (c / c.sum()).tolist()
        entropy = -sum(p * math.log(p) for p in share)
        leaving = (
            round((n - keep) / remaining**0.5 * (1 - (entropy / math.log(n)) ** 2))
            if remaining
            else n
        )
        left = max(n - leaving, keep)
        best = sorted(score.topk(left).indices.tolist())
        x = torch.cat([x[:1], x[1:][best]])
        places, score = [places[j] for j in best], score[best]
    return x[1:], places, rows


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("keep", [14, 6, 2])
def test_flowcut(seed, keep):
    call, network = a_prompt(seed), sharpened(stock(**DEEP))
    rows, places, lengths = cut_tower(network, call["pixel_values"], keep)
    assert len(rows) == keep and len(set(lengths)) > 2
    ours, engine = applied(NAME, FlowCut(keep=keep, positions="renumbered"), **DEEP)
    sharpened(ours)
    seen = record_steps(engine)
    wanted = logits_of_rows(network, call, rows)
    assert (last_logits(ours, call) - wanted).abs().max() < TOLERANCE
    assert seen[0].choice.keep_IM[0].nonzero()[:, 0].tolist() == places


@pytest.mark.parametrize("keep", [14, 6])
def test_every_image_is_cut_as_if_it_were_alone(keep):
    call = prompt(NAME, [4, (5, 5), 6], [3, (5, 5), 2, (5, 5), 5])
    network, (ours, engine) = sharpened(stock(**DEEP)), applied(NAME, FlowCut(keep=keep), **DEEP)
    sharpened(ours)
    seen = record_steps(engine)
    ours(**call)
    features = seen[0].inputs.require_tower_output()
    for image, pixels in enumerate(call["pixel_values"]):
        rows, places, _ = cut_tower(network, pixels[None], keep)
        kept = seen[0].choice.keep_IM[image]
        assert kept.nonzero()[:, 0].tolist() == places
        assert (features.features_VF[image][kept] - rows).abs().max() < TOLERANCE
    each = [cut_tower(network, pixels[None], keep)[2] for pixels in call["pixel_values"]]
    assert len(set(map(tuple, each))) > 1
    assert list(engine.tower_rows[: DEPTH - 1]) == [max(rows) for rows in zip(*each, strict=True)]


def test_even_attention_waits_for_the_last_cut_and_a_peak_does_not():
    even, peak = torch.ones(1, 16), torch.zeros(1, 16)
    peak[0, 5] = 1
    count, target = torch.tensor([16]), torch.tensor([4])
    assert patches_to_cut(even, count, target, 4).tolist() == [0]
    assert patches_to_cut(peak, count, target, 4).tolist() == [6]
    assert patches_to_cut(even, count, target, 0).tolist() == [12]


def test_what_keeps_all_changes_nothing():
    call = a_prompt(0)
    ours, engine = applied(NAME, FlowCut(keep="all"), **DEEP)
    assert (last_logits(ours, call) - last_logits(stock(**DEEP), call)).abs().max() < TOLERANCE
    assert set(engine.tower_rows) == {N + 1}


def test_the_dense_network_has_its_whole_tower():
    """Inside `dense`, and in text; a copy cuts by itself."""
    call, plain = a_prompt(0), stock(**DEEP)
    model = loaded(NAME, **DEEP)
    FlowCut(keep=5).apply(model, SimpleNamespace(seed=0))
    engine = visual_engine_of(model.network)
    cut = last_logits(model.network, call)
    with engine.dense():
        assert (last_logits(model.network, call) - last_logits(plain, call)).abs().max() < TOLERANCE
    twin = model.copy()
    assert torch.equal(last_logits(twin.network, call), cut)
    with visual_engine_of(twin.network).dense():
        last_logits(twin.network, call)
        assert torch.equal(last_logits(model.network, call), cut)


def test_generation_reads_the_tower_once():
    call = a_prompt(1)
    ours, engine = applied(NAME, FlowCut(keep=5), **DEEP)
    first = last_logits(ours, call).argmax()
    tokens = ours.generate(**call, max_new_tokens=3, do_sample=False)
    assert tokens[0, -3] == first and engine.tokens_left() == [(5,)]
    assert ours.generate(**call, max_new_tokens=3, num_beams=2).shape == tokens.shape


def test_the_towers_own_flops_fall():
    from bench.measurement.flops import analytic_vlm
    from bench.measurement.image_prompt import count_prefill

    call, found = a_prompt(0), {}
    for name, methods in {"dense": (), "flowcut": (FlowCut(keep=5),)}.items():
        model = loaded(NAME, **DEEP)
        sharpened(model.network)
        for method in methods:
            method.apply(model, SimpleNamespace(seed=0))
        products = analytic_vlm.image_prompt_macs(model.network, model.structure, call)
        agree(count_prefill(model, call)[0], products)
        found[name] = macs_by_part(products)
    assert found["flowcut"]["vision"] < 0.8 * found["dense"]["vision"]
    assert found["flowcut"]["projector"] == found["dense"]["projector"] * 5 / N
    # Products of one row with keys and values, 16 wide, in five layers of at most N + 1 rows.
    assert 0 < found["flowcut"]["method"] <= 2 * 16 * (N + 1) * 5


def test_what_flowcut_goes_with():
    call = a_prompt(0)
    network, engine = applied(NAME, FlowCut(keep=9), VisionZip(keep=4), **DEEP)
    seen = record_steps(engine)
    network(**call)
    # The second method reads the tower as it ran: a removed patch received nothing.
    assert seen[0].choice.keep_IM.sum() == 9 and engine.tokens_left()[-1] == (4,)
    network, _ = applied(NAME, DivPrune(keep=9), FlowCut(keep=5), **DEEP)
    with pytest.raises(UserError, match="flowcut needs whole images"):
        network(**call)
    for methods in ((FlowCut(keep=9), HiPrune(keep=4)), (HiPrune(keep=9), FlowCut(keep=4))):
        with pytest.raises(UserError, match="prunes inside the vision tower and another"):
            applied(NAME, *methods, **DEEP)
    with pytest.raises(UserError, match="flowcut prunes before the layer of the vision tower"):
        applied(NAME, FlowCut(keep=5))
    with pytest.raises(UserError, match="vision tower of qwen2_vl cannot be read"):
        applied("qwen2_vl", FlowCut(keep=5))
