"""Every release's variant against a slow transcription of that release, end to end.

The transcriptions run transformers' own modules on sequences that truly get shorter, one image and
one sample at a time. Logits of the last row are equal only if the same tokens stay, with the same
merged vectors, in the same order and at the same positions.
"""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.errors import UserError
from methods.token_pruning import sparsevlm
from methods.token_pruning.base import regularly_spaced
from methods.token_pruning.dart import DART
from methods.token_pruning.prumerge_plus import PruMergePlus
from methods.token_pruning.pyramid_drop import PyramidDrop
from methods.token_pruning.sparsevlm import SparseVLM
from methods.token_pruning.visionzip import VisionZip, add_mean_of_sources
from methods.visual_engine.settings import Quota
from tests.methods.token_pruning.recorded_steps import applied
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt

TOLERANCE, BEFORE, N, AFTER = 1e-5, 4, 25, 6
NAME = "llava_llama"
RELEASE = {"variant": "release", "positions": "renumbered"}


def a_prompt(seed):
    return prompt(NAME, [BEFORE, (5, 5), AFTER], seed=seed)


def stock(**changes):
    network = build(NAME, **changes)
    network.set_attn_implementation("eager")
    return network


def last_logits(network, call):
    with torch.no_grad():
        return network(**call).logits[0, -1]


class Tower:
    """What a release reads of CLIP: features, the class token's attention, keys."""

    def __init__(self, network, pixels):
        vision = network.model.vision_tower
        inputs = []
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            for layer in vision.encoder.layers
        ]
        found = vision(pixels, output_hidden_states=True, output_attentions=True)
        for hook in hooks:
            hook.remove()
        self.features = found.hidden_states[-2][0]  # the class token first
        self.attention = found.attentions[-2][0]  # of the layer that makes these features
        module = vision.encoder.layers[-2].self_attn
        self.keys = module.k_proj(inputs[-2])[0].unflatten(-1, (module.num_heads, -1))
        last = vision.encoder.layers[-1].self_attn
        self.last_q, self.last_k = last.q_proj(inputs[-1])[0], last.k_proj(inputs[-1])[0]


def logits_of_rows(network, call, rows):
    """Logits of the last token where an image is these features, positions without gaps."""
    embed = network.get_input_embeddings()
    ids = call["input_ids"][0]
    image = network.model.multi_modal_projector(rows[None])[0]
    parts = [embed(ids[:BEFORE]), image, embed(ids[BEFORE + N :])]
    return network(inputs_embeds=torch.cat(parts)[None]).logits[0, -1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep, contextual", [(8, 0.25), (7, 0.4), (5, 0.0), (1, 0.1)])
def test_visionzip(seed, keep, contextual):
    call, network = a_prompt(seed), stock()
    tower = Tower(network, call["pixel_values"])
    targets = round(keep * contextual)
    received = tower.attention.sum(0)[0, 1:]
    dominant = sorted(received.topk(keep - targets - 1).indices.tolist())
    rest = [j for j in range(N) if j not in dominant]
    step = max(1, len(rest) // targets) if targets else 1
    goals = rest[::step][:targets]
    metric = normalize(tower.keys[1:].mean(1), dim=-1)
    joined = {goal: [] for goal in goals}
    for j in rest:
        if goals and j not in goals:
            joined[max(goals, key=lambda goal, j=j: float(metric[j] @ metric[goal]))].append(j)
    x = tower.features[1:]
    rows = [tower.features[0], *(x[j] for j in dominant)]
    rows += [x[goal] + (x[others].mean(0) if others else 0) for goal, others in joined.items()]
    assert len(rows) == keep
    amount = 1 / N if keep == 1 else keep
    ours, _ = applied(NAME, VisionZip(keep=amount, contextual=contextual, **RELEASE))
    wanted = logits_of_rows(network, call, torch.stack(rows))
    assert (last_logits(ours, call) - wanted).abs().max() < TOLERANCE


def test_visionzip_adds_the_mean_of_those_who_joined():
    """Six tokens; 1 and 2 join target 0, 4 and 5 join target 3; a lonely target stays as it is."""
    x = torch.randn(1, 6, 3)
    keys = torch.tensor([[[1.0, 0], [1, 0.1], [1, 0.2], [0, 1], [0.1, 1], [0.2, 1]]])
    target = torch.tensor([[True, False, False, True, False, False]])
    merged = add_mean_of_sources(x, keys, target, ~target)
    assert torch.allclose(merged[0, 0], x[0, 0] + (x[0, 1] + x[0, 2]) / 2)
    assert torch.allclose(merged[0, 3], x[0, 3] + (x[0, 4] + x[0, 5]) / 2)
    assert torch.equal(add_mean_of_sources(x, keys, target, target & ~target), x)


def test_regular_spacing_leaves_the_tail_without_targets():
    marked = regularly_spaced(torch.ones(2, 523, dtype=torch.bool), torch.tensor([10, 0]))
    assert marked[0].nonzero()[:, 0].tolist() == list(range(0, 469, 52))
    assert not marked[1].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep, neighbours", [(9, 3), (6, 32), (2, 1)])
def test_prumerge_plus(seed, keep, neighbours):
    import numpy as np

    call, network = a_prompt(seed), stock()
    tower = Tower(network, call["pixel_values"])
    width = tower.last_q.shape[-1]
    a = (tower.last_q[0] @ tower.last_k.T / width**0.5).softmax(-1)[1:]
    low, high = np.percentile(a.numpy().astype(np.float64), [25, 75])
    outliers = int((a > high + 1.5 * (high - low)).sum()) or 1
    outliers = min(outliers, keep - 1)
    order = a.argsort(descending=True).tolist()
    salient, rest = order[:outliers], sorted(order[outliers:])
    added = keep - 1 - outliers
    sampled = [rest[j * len(rest) // added] for j in range(added)]
    x, k = tower.features[1:], tower.last_k[1:]
    rows = []
    for i in [*salient, *sampled]:
        others = sorted(
            (j for j in range(N) if j != i),
            key=lambda j: -float(cosine_similarity(k[i], k[j], dim=0)),
        )
        rows.append(x[i] + sum(a[j] * x[j] for j in others[:neighbours]))
    rows.append(sum(a[j] * x[j] for j in range(N) if j not in [*salient, *sampled]))
    ours, _ = applied(NAME, PruMergePlus(keep=keep, neighbours=neighbours, **RELEASE))
    wanted = logits_of_rows(network, call, torch.stack(rows))
    assert (last_logits(ours, call) - wanted).abs().max() < TOLERANCE


def test_prumerge_plus_needs_a_tower_with_a_last_layer():
    with pytest.raises(UserError, match="layer -1 of the vision tower of qwen2_vl cannot be read"):
        applied("qwen2_vl", PruMergePlus(keep=5, variant="release"))


class Layers:
    """A decoder run layer by layer on rows [S, D] that a release shortens in between."""

    def __init__(self, network):
        self.network, self.decoder = network, network.model.language_model
        self.weights = None

        def keep(_, args, output):
            self.weights = output[1][0]

        for layer in self.decoder.layers:
            layer.self_attn.register_forward_hook(keep)

    def embeddings(self, call):
        states = []
        hook = self.decoder.layers[0].register_forward_pre_hook(lambda _, a: states.append(a[0]))
        self.network(**call)
        hook.remove()
        return states[0][0]

    def run(self, index, x, places):
        """Rows after one layer; its attention [H, S, S] is in `weights`."""
        mask = create_causal_mask(
            config=self.decoder.config, inputs_embeds=x[None], attention_mask=None,
            past_key_values=None,
        )  # fmt: skip
        angles = self.decoder.rotary_emb(x[None], places[None])
        layer = self.decoder.layers[index]
        return layer(x[None], attention_mask=mask, position_embeddings=angles)[0]

    def qk(self, index, x, places):
        """Queries and keys of a layer after rotation, [H, S, d]."""
        layer, angles = self.decoder.layers[index], self.decoder.rotary_emb(x[None], places[None])
        h = layer.input_layernorm(x[None])
        q, k = (
            project(h).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        return tuple(part[0] for part in apply_rotary_pos_emb(q, k, *angles))

    def logits(self, x):
        return self.network.lm_head(self.decoder.norm(x[-1]))


@pytest.mark.parametrize("seed", range(3))
def test_pyramid_drop(seed):
    """The last token's attention by the next layer's weights, softmax first, then over heads."""
    call, layers = a_prompt(seed), Layers(stock())
    x, left, places = layers.embeddings(call), N, torch.arange(BEFORE + N + AFTER)
    for index in range(4):
        if index:
            q, k = layers.qk(index, x, places)
            share = (q[:, -1:] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)[:, 0].mean(0)
            left = round(0.5**index * N)
            image = share[BEFORE : len(x) - AFTER]
            kept = image.topk(left).indices.sort().values + BEFORE
            x = torch.cat([x[:BEFORE], x[kept], x[-AFTER:]])
            places = torch.arange(len(x))
        x = layers.run(index, x, places)
    ours, _ = applied(NAME, PyramidDrop(**RELEASE))
    assert (last_logits(ours, call) - layers.logits(x)).abs().max() < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [13, 20])
def test_dart(seed, keep):
    """Pivots by key norm; exclusive turns of equal size on states after the final norm."""
    call, layers = a_prompt(seed), Layers(stock())
    x, places = layers.embeddings(call), torch.arange(BEFORE + N + AFTER)
    x = layers.run(0, x, places)
    _, k = layers.qk(1, x, places)
    x = layers.run(1, x, places)
    norm = k.abs().sum((0, 2))
    image = list(range(BEFORE, BEFORE + N))
    words = list(range(BEFORE + N, len(x)))
    pivots = [image[j] for j in norm[image].topk(2).indices]
    speakers = [*pivots, *(words[j] for j in norm[words].topk(2).indices)]
    state = layers.decoder.norm(x)
    chosen = set(pivots)
    for speaker in sorted(speakers):
        free = [j for j in image if j not in chosen]
        free.sort(key=lambda j: float(cosine_similarity(state[j], state[speaker], dim=0)))
        chosen |= set(free[: keep // 4])
    assert len(chosen) == 2 + 4 * (keep // 4)
    rows = [*range(BEFORE), *sorted(chosen), *words]
    x, places = x[rows], places[rows]
    for index in (2, 3):
        x = layers.run(index, x, places)
    method = DART(
        after=2, keep=keep, average=None, visual_pivots=2, text_pivots=2, variant="release"
    )
    ours, _ = applied(NAME, method)
    assert (last_logits(ours, call) - layers.logits(x)).abs().max() < TOLERANCE


def density_peaks(x, pool, count):
    """Centres and the centre of every member, by loops."""

    def apart(a, b):
        return float((x[a] - x[b]).norm()) / x.shape[-1] ** 0.5

    density = {}
    for a in pool:
        near = sorted(apart(a, b) ** 2 for b in pool)[:count]
        density[a] = float(torch.tensor(-sum(near) / len(near)).exp())
    most = max(apart(a, b) for a in pool for b in pool)
    lonely = {
        a: min((apart(a, b) for b in pool if density[b] > density[a]), default=most) for a in pool
    }
    centres = sorted(pool, key=lambda a: -density[a] * lonely[a])[:count]
    return centres, {
        a: a if a in centres else min(centres, key=lambda c, a=a: apart(a, c)) for a in pool
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.4, 0.2])
def test_sparsevlm(seed, share, monkeypatch):
    """A layer runs in full; its own attention prunes its outputs; cluster means come behind."""
    monkeypatch.setattr(sparsevlm, "CLUSTER_SIZE", 2)
    call, layers = a_prompt(seed), Layers(stock())
    x = layers.embeddings(call)
    words, image = x[BEFORE + N :], x[BEFORE : BEFORE + N]
    mean = (image @ words.T).softmax(-1).mean(0)
    raters = [j for j in range(AFTER) if mean[j] > mean.mean()]
    places = torch.arange(len(x))
    for index in (0, 1):
        x = layers.run(index, x, places)
    p = layers.weights[:, [BEFORE + N + j for j in raters]].mean((0, 1))[BEFORE : BEFORE + N]
    order = p.argsort(descending=True).tolist()
    keep = round(share * N)
    pool = order[keep : keep + int(0.3 * (N - keep)) + 1]
    count = len(pool) // 2 + 1
    states = x[BEFORE : BEFORE + N]
    centres, owner = density_peaks(states, pool, count)
    merged = [states[[a for a in pool if owner[a] == c]].mean(0) for c in centres]
    rows = [*states[sorted(order[:keep])], *merged]
    x = torch.cat([x[:BEFORE], torch.stack(rows), x[-AFTER:]])
    places = torch.arange(len(x))
    for index in (2, 3):
        x = layers.run(index, x, places)
    ours, _ = applied(NAME, SparseVLM(layers=(2,), keep=(share,), **RELEASE))
    assert (last_logits(ours, call) - layers.logits(x)).abs().max() < TOLERANCE


def test_release_budgets():
    """132 tokens stay of DART's "128"; SparseVLM's tables leave what the release leaves."""
    assert Quota(count=128, turns=8, pivots=4).kept(576, 576) == 132
    assert Quota(count=64, turns=8, pivots=4).kept(576, 576) == 68
    steps = SparseVLM(average=192, variant="release")._steps(32, None)
    assert [step.after for step in steps] == [3, 7, 16]
    left, m = [], 576
    for step in steps:
        m = step.quota.left(576, m)
        left.append(m)
    assert left == [309, 204, 113]
    assert Quota(recycled=0.3, pool_extra=1).merged(99) == 4
    assert Quota(recycled=0.3).merged(99) == 3


def test_with_one_word_the_release_would_have_no_rater():
    ours, _ = applied(NAME, SparseVLM(layers=(2,), keep=(0.4,), **RELEASE))
    logits = last_logits(ours, prompt(NAME, [3, (5, 5), 1]))
    assert logits.isfinite().all()


def test_kept_positions_leave_every_token_where_it_was():
    """The class token and the merged rest take the places of removed tokens."""
    call = a_prompt(0)
    for method in (
        VisionZip(keep=7, variant="release"),
        PruMergePlus(keep=7, variant="release"),
        SparseVLM(layers=(2,), keep=(0.4,), variant="release"),
    ):
        network, _ = applied(NAME, method)
        logits = network(**call).logits[0]
        text = call["input_ids"][0] != IMAGE
        assert logits[text].isfinite().all()
