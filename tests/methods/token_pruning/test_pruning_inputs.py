"""Inputs of pruning steps, against transformers' eager attention."""

import pytest
import torch

from bench.errors import UserError
from bench.models.vlm.visual_tokens import locate_visual_tokens
from methods.token_pruning.cdpruner import CDPruner
from methods.token_pruning.dart import DART
from methods.token_pruning.fastv import FastV
from methods.token_pruning.pyramid_drop import PyramidDrop
from methods.token_pruning.sparsevlm import SparseVLM
from methods.token_pruning.visionzip import VisionZip
from methods.visual_tokens.strategies import LayerDrop
from tests.methods.token_pruning.recorded_steps import (
    METHODS,
    applied,
    loaded,
    record_steps,
    removals,
)
from tests.methods.visual_engine.tiny_mllms import IMAGE, VIDEO, build, prompt

NAMES = ["llava_llama", "qwen2_vl", "internvl_qwen2", "qwen2_5_vl", "qwen3_vl"]
BATCH = ([2, (3, 4), 6], [7, (4, 5), 2, (2, 3), 3])


def eager(name, call):
    """Attention of every layer [B, H, S, S] and input states of the stock network."""
    network = build(name)
    network.set_attn_implementation({"text_config": "eager"})
    states = []
    for layer in network.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    return network(**call, output_attentions=True).attentions, states


def frame_places(name, call, network):
    """For every frame its sample and the places of its tokens in the sequence."""
    tokens = locate_visual_tokens(network, call)
    for number in range(int(tokens.frame_BS.max()) + 1):
        sample, place = (tokens.frame_BS == number).nonzero().T
        yield int(sample[0]), place


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_fastv_ranks_by_the_last_words_attention_in_the_layer_before(name, after):
    network, engine = applied(name, FastV(after=after, keep=4, average=None))
    seen, call = record_steps(engine), prompt(name, *BATCH)
    network(**call)
    gone = removals(seen, call["input_ids"].shape)[0].gone_BS
    attention = eager(name, call)[0][after - 1]
    for sample, place in frame_places(name, call, network):
        score = attention[sample, :, -1, place].mean(0)
        kept = place[score.topk(4).indices]
        assert set(kept.tolist()) == set(place[~gone[sample, place]].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_pyramid_drop_ranks_by_products_and_halves_at_every_stage(name):
    network, engine = applied(name, PyramidDrop())
    seen, call = record_steps(engine), prompt(name, *BATCH)
    network(**call)
    assert [each.after for each in seen] == [1, 2, 3]
    for each in seen:
        whole = each.inputs.initial_counts
        assert each.keep.tolist() == [max(1, round(n * 0.5**each.after)) for n in whole]
    # Products and the softmax of one head rank alike; compare head by head through the logarithm.
    attention = eager(name, call)[0][0]
    products = seen[0].inputs.products(seen[0].inputs.last_row())[:, 0]
    last_qk = seen[0].inputs.last_qk
    q, k = last_qk.text.q[:, :, -1], last_qk.visual_k
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("bhd,bhnd->bhn", q, k) * last_qk.weights.view.scaling
    for frame, (sample, place) in enumerate(frame_places(name, call, network)):
        weight = attention[sample, :, -1, place].log()
        rows = [(seen[0].inputs.visual.index_BR[sample] == p).nonzero()[-1, 0] for p in place]
        direct = scores[sample][:, torch.stack(rows)]
        # Each head's logarithms differ from its products by one number, the denominator.
        assert torch.allclose((weight - direct).std(dim=1), torch.zeros(len(weight)), atol=1e-4)
        assert torch.allclose(products[frame, : len(place)], direct.mean(0), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sparsevlm_ranks_by_the_raters_and_recycles(name):
    method = SparseVLM(layers=(2,), keep=(0.4,))
    network, engine = applied(name, method)
    seen, call = record_steps(engine), prompt(name, *BATCH)
    network(**call)
    gone = removals(seen, call["input_ids"].shape)[0]
    attentions, states = eager(name, call)
    for sample, place in frame_places(name, call, network):
        ids, real = call["input_ids"][sample], call["attention_mask"][sample].bool()
        last = int((ids == IMAGE).nonzero()[-1, 0])
        words = [t for t in range(last + 1, len(ids)) if real[t]]
        visual = (ids == IMAGE).nonzero()[:, 0]
        share = (states[0][sample, visual] @ states[0][sample, words].T).softmax(-1).mean(0)
        rating = [t for t, s in zip(words, share, strict=True) if s >= share.mean()]
        score = attentions[1][sample][:, rating][:, :, place].mean((0, 1))
        order = score.argsort(descending=True)
        keep = round(0.4 * len(place))
        count = int(0.03 * (len(place) - keep)) + 1
        assert not gone.gone_BS[sample, place[order[:keep]]].any()
        assert (~gone.gone_BS[sample, place]).sum() == keep + count
        pool = place[order[keep : keep + max(int(0.3 * (len(place) - keep)), count)]]
        merged = [p for p in place.tolist() if not gone.states_BSD[sample, p].isnan().any()]
        assert len(merged) == count and set(merged) <= set(pool.tolist())
        total = gone.states_BSD[sample, merged].sum(0)
        assert torch.allclose(total, states[2][sample, pool].sum(0), atol=1e-4)


@pytest.mark.parametrize("name", NAMES[:3])
def test_dart_reads_keys_and_states_after_its_layer(name):
    method = DART(after=2, keep=5, average=None, visual_pivots=1, text_pivots=1)
    network, engine = applied(name, method)
    seen, call = record_steps(engine), prompt(name, *BATCH)
    network(**call)
    gone = removals(seen, call["input_ids"].shape)[0].gone_BS
    stock = build(name)
    found = stock(**call, output_hidden_states=True, use_cache=True)
    keys = found.past_key_values.layers[1].keys.abs().sum((1, 3))
    for sample, place in frame_places(name, call, network):
        state = torch.nn.functional.normalize(found.hidden_states[2][sample], dim=-1)
        own = int(place[keys[sample, place].argmax()])
        ids = call["input_ids"][sample]
        after = torch.arange(int((ids == IMAGE).nonzero()[-1, 0]) + 1, len(ids))
        asked = int(after[keys[sample, after].argmax()])
        chosen = {own}
        for pivot in (own, asked):
            free = [p for p in place.tolist() if p not in chosen]
            chosen |= set(sorted(free, key=lambda p: float(state[p] @ state[pivot]))[:2])
        assert chosen == set(place[~gone[sample, place]].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_features_through_the_projector_are_the_embeddings(name):
    """Which also says that features are in the order of the visual tokens."""
    network, engine = applied(name, METHODS["scope"])
    seen = record_steps(engine)
    network(**prompt(name, *BATCH))
    inputs = seen[0].inputs
    features = inputs.tower_output.features_VF[inputs.valid]
    embedded = inputs.tower_output.project(features)
    assert torch.allclose(embedded, inputs.states_IMD[inputs.valid], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_visionzip_keeps_what_the_tower_attends_to(name):
    network, engine = applied(name, VisionZip(keep=6, contextual=0.34))
    seen = record_steps(engine)
    network(**prompt(name, *BATCH))
    inputs, choice = seen[0].inputs, seen[0].choice
    assert choice.keep_IM.sum(1).tolist() == [6] * len(inputs.initial_counts)
    assert choice.changed_IM.sum(1).tolist() == [2] * len(inputs.initial_counts)
    for frame, count in enumerate(inputs.initial_counts):
        received = inputs.tower_output.received_V[frame, :count]
        dominant = set(received.topk(4).indices.tolist())
        kept = set(choice.keep_IM[frame].nonzero()[:, 0].tolist())
        assert dominant == kept - set(choice.changed_IM[frame].nonzero()[:, 0].tolist())


def test_a_tower_that_was_not_seen_is_missed():
    model = loaded("llava_llama")
    call = prompt("llava_llama", [3, (5, 5), 4])
    encoded = model.network.get_image_features(call.pop("pixel_values"), return_dict=True)
    VisionZip(keep=6).apply(model, None)
    with pytest.raises(UserError, match="visionzip reads the vision tower"):
        model.network(**call, mm_encoder_outputs={"image": encoded})


def test_images_without_a_question_are_refused_by_name():
    network, _ = applied("qwen2_vl", CDPruner(keep=3))
    match = "cdpruner chooses an image's tokens by the text after them"
    with pytest.raises(UserError, match=match):
        network(**prompt("qwen2_vl", [4, (3, 4)]))


def test_a_layer_without_visual_heads_cannot_be_read():
    network, engine = applied("llava_llama", FastV(after=1, keep=3, average=None))
    engine.plan.keep_heads([(), (0, 1), (0, 1), (0, 1)])
    with pytest.raises(UserError, match="fastv reads the attention of layer 0, in which no head"):
        network(**prompt("llava_llama", [4, (5, 5), 3]))


def test_selections_behind_the_cut_do_not_happen():
    network, engine = applied("llava_llama", PyramidDrop(), LayerDrop(layers=2))
    seen = record_steps(engine)
    network(**prompt("llava_llama", [4, (5, 5), 3]))
    assert [each.after for each in seen] == [1]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_videos_are_chosen_from_step_by_step(name):
    """The tower encodes images before videos, whatever their order in the prompt."""
    rng = torch.Generator().manual_seed(0)
    ids = [5, 6, *[VIDEO] * 12, 7, *[IMAGE] * 6, 8, 9]
    kinds = [{VIDEO: 2, IMAGE: 1}.get(token, 0) for token in ids]
    call = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids)).long(),
        "mm_token_type_ids": torch.tensor([kinds]).int(),
        "pixel_values": torch.randn(24, 96, generator=rng),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values_videos": torch.randn(48, 96, generator=rng),
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
    }
    network, engine = applied(name, METHODS["scope"].model_copy(update={"keep": 4}))
    seen = record_steps(engine)
    network(**call)
    inputs, choice = seen[0].inputs, seen[0].choice
    assert inputs.initial_counts == (6, 6, 6) and choice.keep_IM.sum(1).tolist() == [4, 4, 4]
    embedded = inputs.tower_output.project(inputs.tower_output.features_VF.flatten(0, 1))
    assert torch.allclose(embedded, inputs.states_IMD.flatten(0, 1), atol=1e-5)
