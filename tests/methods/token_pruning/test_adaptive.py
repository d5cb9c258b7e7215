"""Methods where the image decides how many tokens stay, against slow transcriptions, end to end."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from bench.errors import UserError
from methods.token_pruning.dart import DART
from methods.token_pruning.fastv import FastV
from methods.token_pruning.pact import PACT, density_centres
from methods.token_pruning.prumerge_plus import PruMerge, PruMergePlus
from methods.token_pruning.sparsevlm import SparseVLM
from methods.visual_engine.token_index import rows_where
from methods.visual_tokens.strategies import LayerDrop, NeighborAttention
from tests.methods.token_pruning.recorded_steps import applied, record_steps, removals
from tests.methods.token_pruning.test_variants import (
    BEFORE,
    NAME,
    RELEASE,
    TOLERANCE,
    Layers,
    N,
    Tower,
    a_prompt,
    last_logits,
    logits_of_rows,
    stock,
)
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.test_visual_equality import text_of
from tests.methods.visual_engine.tiny_mllms import build, prompt

CLUSTERING = {"after": 2, "keep": 0.6, "cutoff": 0.3}


def clustered(layers, x, keep, cutoff, recover):
    """PACT's choice for rows entering layer 2: the places of centres, and members of each."""
    layer = layers.decoder.layers[2]
    attention, width = layer.self_attn, layer.self_attn.head_dim
    h = layer.input_layernorm(x)
    q = attention.q_proj(h[: BEFORE + N]).unflatten(-1, (-1, width)).mean(0)
    k = attention.k_proj(h[: BEFORE + N]).unflatten(-1, (-1, width))
    heads = []
    for head in range(len(q)):
        products = k[:, head // (len(q) // k.shape[1])] @ q[head] / width**0.5
        heads.append(products.softmax(0)[BEFORE:])
    score = torch.stack(heads).mean(0) * x[BEFORE : BEFORE + N].norm(dim=-1)
    important = score.argsort(descending=True)[: int(keep * N)].tolist()
    _, rotated = layers.qk(2, x, torch.arange(len(x)))
    rotated = rotated[:, BEFORE : BEFORE + N].transpose(0, 1).flatten(1)

    def apart(a, b):
        return 0.0 if a == b else max(0.0, 1 - float(cosine_similarity(rotated[a], rotated[b], 0)))

    density = {a: sum(np.exp(-((apart(a, b) / 2) ** 2)) for b in important) for a in important}
    members = {}
    for a in sorted(important, key=lambda a: -density[a]):
        if all(apart(a, centre) > cutoff for centre in members):
            members[a] = []
    for a in range(N):
        nearest = min(members, key=lambda centre, a=a: apart(a, centre))
        if a in important or apart(a, nearest) <= recover * cutoff:
            members[nearest].append(a)
    return members


def weighed_run(layers, x, places, weight):
    """Rows after layers 2 and 3 where keys count for several tokens."""
    for index in (2, 3):
        mask = create_causal_mask(
            config=layers.decoder.config, inputs_embeds=x[None], attention_mask=None,
            past_key_values=None,
        )  # fmt: skip
        angles = layers.decoder.rotary_emb(x[None], places[None])
        mask = mask + weight.log()
        x = layers.decoder.layers[index](x[None], attention_mask=mask, position_embeddings=angles)
        x = x[0]
    return x


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("seed, cutoff, recover", [(0, 0.2, 1.5), (1, 0.3, 1.0), (2, 0.3, 0.0)])
def test_pact(seed, cutoff, recover, proportional):
    call, layers = a_prompt(seed), Layers(stock())
    x = layers.embeddings(call)
    for index in (0, 1):
        x = layers.run(index, x, torch.arange(len(x)))
    members = clustered(layers, x, 0.6, cutoff, recover)
    image = x[BEFORE : BEFORE + N]
    centres = sorted(members)
    assert 1 < len(centres) <= 15
    merged = torch.stack([image[members[centre]].mean(0) for centre in centres])
    places = torch.tensor(
        [*range(BEFORE), *(BEFORE + centre for centre in centres), *range(BEFORE + N, len(x))]
    )
    weight = torch.ones(len(places))
    if proportional:
        weight[BEFORE : BEFORE + len(centres)] = torch.tensor(
            [float(len(members[centre])) for centre in centres]
        )
    x = torch.cat([x[:BEFORE], merged, x[BEFORE + N :]])
    wanted = layers.logits(weighed_run(layers, x, places, weight))
    method = PACT(after=2, keep=0.6, cutoff=cutoff, recover=recover, proportional=proportional)
    ours, engine = applied(NAME, method)
    assert (last_logits(ours, call) - wanted).abs().max() < TOLERANCE
    assert engine.tokens_left() == [(len(centres),)]


@pytest.mark.parametrize("seed", range(5))
def test_centres_are_apart_and_every_member_is_in_reach_of_one(seed):
    torch.manual_seed(seed)
    points = torch.rand(2, 40, 3)
    distance, member = torch.cdist(points, points), torch.rand(2, 40) < 0.8
    centre = density_centres(distance, member, 0.4)
    assert not (centre & ~member).any()
    for frame in range(2):
        chosen = centre[frame].nonzero()[:, 0]
        between = distance[frame][chosen][:, chosen] + 9 * torch.eye(len(chosen))
        assert between.min() > 0.4
        assert (distance[frame][member[frame]][:, chosen].amin(1) <= 0.4).all()
    assert (density_centres(distance, member, 9.0).sum(1) == 1).all()
    assert torch.equal(density_centres(distance, member, -1.0), member)


@pytest.mark.parametrize("others", [(), (NeighborAttention(), LayerDrop(layers=3))])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_skipped_is_masked_with_positions_in_rows_and_columns(name, others):
    network, engine = applied(name, PACT(**CLUSTERING), *others)
    stock_network, seen = build(name), record_steps(engine)
    call = prompt(name, [2, (5, 5), 6], [7, (2, 4), 2, (5, 5), 3], [9])
    ours = network(**call).logits
    gone = removals(seen, call["input_ids"].shape)
    assert (gone[0].weight_BS > 1).any()
    with masked_reference(stock_network, engine.plan, gone):
        expected = stock_network(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE


@pytest.mark.parametrize("others", [(), (NeighborAttention(), LayerDrop(layers=3))])
@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen3"])
def test_skipped_is_masked_also_while_generating(name, others):
    network, engine = applied(name, PACT(**CLUSTERING), *others)
    stock_network, seen = build(name), record_steps(engine)
    call = prompt(name, [2, (5, 5), 6], [7, (2, 4), 2, (5, 5), 3], [9])
    caches = DynamicCache(), DynamicCache()
    ours = network(**call, past_key_values=caches[0]).logits
    gone = removals(seen, call["input_ids"].shape)
    assert (gone[0].weight_BS > 1).any()
    then = {"input_ids": torch.tensor([[5], [6], [7]])}
    mask = call["attention_mask"]
    then["attention_mask"] = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    after = network(**then, past_key_values=caches[0]).logits
    with masked_reference(stock_network, engine.plan, gone):
        expected = stock_network(**call, past_key_values=caches[1]).logits
        later = stock_network(**then, past_key_values=caches[1]).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE
    assert (after - later).abs().max() < TOLERANCE


def test_one_cluster_per_token_is_the_dense_model_on_them():
    """A cutoff of 0 merges none: the most important tokens stay, each with a weight of 1."""
    network, engine = applied(NAME, PACT(after=2, keep=1.0, cutoff=0.0, recover=0.0))
    call = prompt(NAME, [4, (5, 5), 6], [3, (5, 5), 2])
    assert (network(**call).logits - build(NAME)(**call).logits)[text_of(call)].abs().max() < 1e-5
    assert engine.tokens_left() == [(N, N)]


def test_nothing_prunes_after_tokens_that_count_for_several():
    with pytest.raises(UserError, match="fastv cannot prune after pact, whose tokens count for"):
        applied(NAME, PACT(after=1), FastV(after=2, keep=3, average=None))
    applied(NAME, PACT(after=1, proportional=False), FastV(after=2, keep=3, average=None))
    applied(NAME, DART(after=1, keep=9, average=None), PACT(after=2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", [PruMerge, PruMergePlus])
def test_prumerge_by_the_number_of_outliers(method, seed):
    call, network = a_prompt(seed), stock()
    tower = Tower(network, call["pixel_values"])
    width = tower.last_q.shape[-1]
    a = (tower.last_q[0] @ tower.last_k.T / width**0.5).softmax(-1)[1:]
    low, high = np.percentile(a.numpy().astype(np.float64), [25, 75])
    outliers = int((a > high + 1.5 * (high - low)).sum()) or 1
    kept = a.argsort(descending=True)[:outliers].tolist()
    if method is PruMergePlus:
        step = max(1, N // outliers // 3)
        kept += [j for j in range(0, N - 1, step) if j not in kept]
    x, k = tower.features[1:], tower.last_k[1:]
    rows = []
    for i in kept:
        others = sorted(
            (j for j in range(N) if j != i),
            key=lambda j: -float(cosine_similarity(k[i], k[j], dim=0)),
        )
        rows.append(x[i] + sum(a[j] * x[j] for j in others[:4]))
    rows.append(sum(a[j] * x[j] for j in range(N) if j not in kept))
    ours, engine = applied(NAME, method(keep="adaptive", neighbours=4, **RELEASE))
    wanted = logits_of_rows(network, call, torch.stack(rows))
    assert (last_logits(ours, call) - wanted).abs().max() < TOLERANCE
    assert engine.tokens_left() == [(len(rows),)]


def test_prumerge_by_a_budget_has_the_most_attention():
    network, engine = applied(NAME, PruMerge(keep=7, neighbours=0))
    seen, call = record_steps(engine), a_prompt(0)
    network(**call)
    attention = Tower(stock(), call["pixel_values"]).attention.mean(0)[0, 1:]
    kept = seen[0].choice.keep_IM[0].nonzero()[:, 0].tolist()
    assert kept == attention.topk(7).indices.sort().values.tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [1.0, 0.6])
def test_sparsevlm_by_the_rank_of_the_raters_attention(factor, seed):
    method = SparseVLM(layers=(1, 2), rank_factor=factor, recycle=False)
    network, engine = applied(NAME, method)
    seen, call = record_steps(engine), prompt(NAME, [4, (5, 5), 6], [5, (5, 5), 3], seed=seed)
    network(**call)
    left = []
    for step in seen:
        raters = rows_where(method._raters(step.inputs))
        weight = step.inputs.attention(raters)
        for frame, count in enumerate(step.inputs.frames.counts):
            real = raters.validity[step.inputs.frames.sample_I[frame]]
            rank = np.linalg.matrix_rank(weight[frame, real, :count].numpy())
            left.append(count - int(factor * (count - rank)))
    assert [count for frames in engine.tokens_left() for count in frames] == left
    assert len(left) == 4 and all(0 < count < N for count in left)


def test_sparsevlm_takes_shares_or_a_rank_factor():
    with pytest.raises(UserError, match=r"keep=\[0.5\] and rank_factor=0.5: set one"):
        applied(NAME, SparseVLM(layers=(2,), keep=(0.5,), rank_factor=0.5))


def test_the_report_has_no_number_that_the_image_decides():
    from bench.method import Context
    from tests.methods.token_pruning.recorded_steps import loaded

    details = PACT(after=2).apply(loaded(NAME), Context(seed=0)).details
    assert details["average_tokens"] is None and details["stages"] is None
    assert details["selections"][0]["adaptive"] is True
