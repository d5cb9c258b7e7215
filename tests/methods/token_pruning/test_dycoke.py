"""DyCoke on frames as images, against a slow transcription on sequences that get shorter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from bench.errors import UserError
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.fastv import FastV
from methods.token_pruning.frames.dycoke import DyCoke, compared_frames
from methods.token_pruning.pact import PACT
from methods.visual_engine.cost.flops import decoder_shape
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.kv_cache import CachedPositions, select_cached
from methods.visual_engine.settings import DecodePruning
from methods.visual_tokens.strategies import LayerDrop
from tests.measurement.flops.agreement import agree
from tests.methods.token_pruning.recorded_steps import (
    CONTEXT,
    applied,
    loaded,
    record_steps,
    removals,
)
from tests.methods.token_pruning.test_variants import (
    NAME,
    TOLERANCE,
    Layers,
    N,
    last_logits,
    stock,
)
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.test_visual_equality import text_of
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt


def frames(count):
    """One word before each frame, three at the end."""
    return [part for _ in range(count) for part in (1, (5, 5))] + [3]


@pytest.mark.parametrize("repeated", [0.7, 0.5])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 8])
def test_the_release(count, repeated):
    """Pairs first, then the third frame of each group but the last; kept by rising similarity."""
    call, layers = prompt(NAME, frames(count), seed=count), Layers(stock())
    x = layers.embeddings(call)
    starts = (call["input_ids"][0] == IMAGE).nonzero()[:, 0][::N].tolist()
    image = [x[start : start + N] for start in starts]

    def least_similar(this, other):
        similar = cosine_similarity(image[this], image[other], dim=1)
        return image[this][similar.topk(int((1 - repeated) * N), largest=False).indices]

    left = list(image)
    for first in range(0, count - 1, 2):
        left[first + 1] = least_similar(first + 1, first)
    for first in range(0, count - 4, 4):
        left[first + 2] = least_similar(first + 2, first)
    rows = [
        part
        for start, kept in zip(starts, left, strict=True)
        for part in (x[start - 1, None], kept)
    ]
    x = torch.cat([*rows, x[-3:]])
    for index in range(4):
        x = layers.run(index, x, torch.arange(len(x)))
    method = DyCoke(variant="release", positions="renumbered", repeated=repeated)
    ours, engine = applied(NAME, method)
    assert (last_logits(ours, call) - layers.logits(x)).abs().max() < TOLERANCE
    assert engine.tokens_left() == [tuple(len(part) for part in left)]


def test_the_paper_compares_every_group_as_far_as_it_goes():
    assert compared_frames(4, last_whole=False) == [(1, 0), (3, 2), (2, 0)]
    assert compared_frames(4, last_whole=True) == [(1, 0), (3, 2)]
    assert compared_frames(7, last_whole=False) == [(1, 0), (3, 2), (2, 0), (5, 4), (6, 4)]
    assert compared_frames(1, last_whole=False) == []


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen3", "qwen3_vl"])
def test_skipped_is_masked(name):
    network, engine = applied(name, DyCoke(repeated=0.6))
    seen, other = record_steps(engine), build(name)
    call = prompt(name, [1, (4, 6), 1, (4, 6), 1, (4, 6), 2], [2, (4, 6), 3], [4])
    ours = network(**call).logits
    gone = removals(seen, call["input_ids"].shape)
    assert gone[0].gone_BS[0].any() and not gone[0].gone_BS[1].any()
    with masked_reference(other, engine.plan, gone):
        expected = other(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE


def test_frames_of_different_sizes_are_refused():
    network, _ = applied("qwen2_vl", DyCoke())
    with pytest.raises(UserError, match="the images of a prompt differ in size"):
        network(**prompt("qwen2_vl", [1, (4, 6), 1, (4, 4), 2]))


DECODING = {"decode_layer": 2, "decode_ratio": 0.6}
IMAGES = [4, (5, 5), 6]
LATE = FastV(after=2, keep=5, average=None)


class Decoding:
    """Token by token through transformers' own modules, as the release and the paper choose."""

    def __init__(self, variant, similarity, layer=2, ratio=0.6, name=NAME):
        self.variant, self.similarity, self.layer, self.ratio = variant, similarity, layer, ratio
        self.network = build(name)
        self.network.set_attn_implementation("eager")
        self.before, self.chosen, self.counts = None, None, []

    def start(self, call):
        found = self.network(**call, use_cache=True)
        self.keys = [layer.keys for layer in found.past_key_values.layers]
        self.values = [layer.values for layer in found.past_key_values.layers]
        self.image = (call["input_ids"][0] == IMAGE).nonzero()[:, 0]
        return found.logits[0, -1]

    def choose(self, attention):
        similar = self.before is not None and (
            cosine_similarity(attention, self.before, dim=0) >= self.similarity
        )
        self.before = attention
        if not similar:
            count = int(len(attention) * (1 - self.ratio))
            self.chosen = attention.topk(count).indices
        elif self.variant == "release":
            return torch.arange(len(attention))
        return self.chosen

    def token(self, token):
        """Logits after one more token."""
        decoder = self.network.model.language_model
        x = self.network.get_input_embeddings()(torch.tensor([[token]]))
        place = torch.tensor([[self.keys[0].shape[2]]])
        angles = decoder.rotary_emb(x, place)
        read, weights = torch.ones(int(place), dtype=torch.bool), None
        for index, layer in enumerate(decoder.layers):
            if index == self.layer:
                kept = self.choose(weights.mean(1)[0, -1][self.image])
                self.counts.append(len(kept))
                read[self.image] = False
                read[self.image[kept]] = True
            cache = DynamicCache()
            here = self.keys[index], self.values[index]
            cache.update(*(part[:, :, read] for part in here), 0)
            module, number = layer.self_attn, layer.self_attn.layer_idx
            module.layer_idx = 0
            out, weights = module(
                layer.input_layernorm(x), position_embeddings=angles, attention_mask=None,
                past_key_values=cache,
            )  # fmt: skip
            module.layer_idx = number
            new = cache.layers[0].keys[:, :, -1:], cache.layers[0].values[:, :, -1:]
            self.keys[index], self.values[index] = (
                torch.cat(pair, 2) for pair in zip(here, new, strict=True)
            )
            x = x + out
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.network.lm_head(decoder.norm(x))[0, -1]


def continued(network, call, tokens):
    """Logits after a prompt and after each token that follows it."""
    cache, found = DynamicCache(), []
    with torch.no_grad():
        found.append(network(**call, past_key_values=cache).logits[:, -1])
        mask = call["attention_mask"]
        for row in tokens:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            step = {"attention_mask": mask, "past_key_values": cache}
            found.append(network(torch.as_tensor(row).view(-1, 1), **step).logits[:, -1])
    return torch.stack(found, 1), cache


# The tiny network's attention changes little between tokens: 0.98 lies among its cosines.
@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("similarity", [0.9, 0.98, 1.1])
def test_generated_tokens_read_what_the_newest_attends_to(variant, similarity):
    call, tokens = prompt(NAME, IMAGES, seed=3), [7, 19, 4, 33, 7, 50, 21, 12]
    slow = Decoding(variant, similarity)
    with torch.no_grad():
        wanted = torch.stack([slow.start(call), *(slow.token(token) for token in tokens)])
    chosen = slow.counts.count(10)
    if variant == "release":
        assert (chosen > 1) == (similarity > 0.9) and (chosen < len(tokens)) == (similarity < 1)
    method = DyCoke(variant=variant, decode_similarity=similarity, **DECODING)
    ours, _ = applied(NAME, method)
    found, _ = continued(ours, call, tokens)
    assert (found[0] - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize("similarity", [0.98, 1.1])
def test_every_sequence_of_a_batch_chooses_for_itself(variant, similarity):
    """Prompts of one, of two and of no image: as each would alone."""
    rows = [[4, (5, 5), 6], [2, (5, 5), 3, (5, 5), 2], [7]]
    call, tokens = prompt(NAME, *rows, seed=3), [[7, 2, 9], [19, 5, 5], [4, 8, 1]]
    method = DyCoke(variant=variant, decode_similarity=similarity, **DECODING)
    ours, _ = applied(NAME, method)
    together, _ = continued(ours, call, list(zip(*tokens, strict=True)))
    pixels = [slice(0, 1), slice(1, 3), slice(0, 0)]
    for number, own in enumerate(pixels):
        real = call["attention_mask"][number].bool()
        alone = {key: call[key][number][real][None] for key in ("input_ids", "attention_mask")}
        if own.stop > own.start:
            alone["pixel_values"] = call["pixel_values"][own]
        found, _ = continued(ours, alone, tokens[number])
        assert (together[number] - found[0]).abs().max() < TOLERANCE


def test_beams_carry_their_choices_along():
    call = prompt(NAME, IMAGES, seed=3)
    ours, _ = applied(NAME, DyCoke(decode_similarity=0.98, **DECODING))
    told = ours.generate(**call, max_new_tokens=5, num_beams=3, do_sample=False,
                         return_dict_in_generate=True, output_scores=True)  # fmt: skip
    length = call["input_ids"].shape[1]
    # The score of the best beam is that of its tokens, fed one by one.
    answer = told.sequences[0, length:]
    logits, _ = continued(ours, call, answer[:-1].tolist())
    each = logits[0].log_softmax(-1).gather(1, answer[:, None])
    assert float(each.sum()) / len(answer) == pytest.approx(float(told.sequences_scores[0]), 1e-4)


def test_a_selection_follows_its_samples():
    tokens = CachedPositions(torch.arange(6).expand(2, 6), torch.ones(2, 6).bool())
    pruning = DecodePruning("dycoke", 1, drop=0.5, similarity=0.9, repeats=True)
    first = select_cached(pruning, torch.rand(2, 6), tokens, None)
    moved = first.map(lambda part: part.flip(0))
    assert torch.equal(moved.index_Bn, first.index_Bn.flip(0))
    again = select_cached(pruning, first.attention_BN.flip(0), tokens, moved)
    assert torch.equal(again.index_Bn, moved.index_Bn)


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2", "qwen3_vl"])
def test_a_choice_of_everything_changes_nothing(name):
    """Gathered in another order, every token is read; a tenth of them is another answer."""
    call = prompt(name, [4, (4, 6), 6] if "qwen3" in name else IMAGES, seed=3)
    plain, _ = applied(name, DyCoke(decode_ratio=0))
    whole, _ = continued(plain, call, [7, 19])
    ours, engine = applied(name, DyCoke(decode_ratio=1e-9, decode_layer=2))
    engine.plan.decode = replace(engine.plan.decode, drop=0.0)
    assert (continued(ours, call, [7, 19])[0] - whole).abs().max() < TOLERANCE
    less, _ = applied(name, DyCoke(decode_ratio=0.9, decode_layer=2))
    assert (continued(less, call, [7, 19])[0] - whole).abs().max() > 10 * TOLERANCE


def test_calls_of_several_tokens_read_everything():
    call = prompt(NAME, IMAGES, seed=3)
    plain, _ = applied(NAME, DyCoke(decode_ratio=0))
    ours, _ = applied(NAME, DyCoke(**DECODING))
    turns = []
    for network in (plain, ours):
        cache = DynamicCache()
        network(**call, past_key_values=cache)
        turns.append(network(torch.tensor([[7, 19, 4]]), past_key_values=cache).logits)
    assert torch.equal(*turns)


def test_a_later_turn_ends_a_choice():
    ours, _ = applied(NAME, DyCoke(**DECODING | {"variant": "paper", "decode_similarity": 0}))
    call, cache = prompt(NAME, IMAGES, seed=3), DynamicCache()
    with torch.no_grad():
        ours(**call, past_key_values=cache)
        ours(torch.tensor([[7]]), past_key_values=cache)
        assert cache.layers[0].cached_tokens.selection is not None
        ours(torch.tensor([[7, 19, 4]]), past_key_values=cache)
        # The token after it has read nothing selected that it could read again.
        assert cache.layers[0].cached_tokens.selection is None


def test_another_image_ends_a_choice():
    first, second = prompt(NAME, IMAGES, seed=3), prompt(NAME, [2, (5, 5), 2], seed=4)
    ours, _ = applied(NAME, DyCoke(**DECODING))
    cache, step = DynamicCache(), torch.tensor([[7]])
    with torch.no_grad():
        ours(**first, past_key_values=cache)
        ours(step, past_key_values=cache)
        assert cache.layers[0].cached_tokens.selection.index_Bn.shape == (1, 10)
        past = cache.get_seq_length()
        second["attention_mask"] = torch.ones(1, past + second["input_ids"].shape[1])
        ours(**second, past_key_values=cache)
        assert cache.layers[0].cached_tokens.selection is None
        ours(step, past_key_values=cache)
    assert cache.layers[0].cached_tokens.selection.index_Bn.shape == (1, 20)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2"])
def test_the_cost_of_a_generated_token(name):
    """What is counted, what arithmetic says, what stays in the cache unread."""
    from bench.measurement.flops.analytic_vlm import token_after_prompt_macs
    from bench.measurement.image_prompt import count_prefill, time_prefill

    found, calls = [], prompt(name, IMAGES, seed=3)
    for ratio in (0, 0.6):
        model = loaded(name)
        DyCoke(**DECODING | {"decode_ratio": ratio}).apply(model, CONTEXT)
        products = token_after_prompt_macs(model.network, model.structure, calls)
        counted = count_prefill(model, calls)[1]
        agree(counted, products)
        found.append((time_prefill(model, calls), counted.total))
    (whole, all_flops), (part, fewer_flops) = found
    engine = visual_engine_of(model.network)
    shape, visual = decoder_shape(engine), int((calls["input_ids"] == IMAGE).sum())
    unread = visual - int(0.4 * visual)
    assert whole.side_cache_bytes == 0 and part.cache_bytes == whole.cache_bytes
    assert part.side_cache_bytes == 2 * 4 * 2 * unread * shape.groups * shape.head_dim
    pair = 2 * shape.heads * shape.head_dim
    chosen_by = shape.heads * shape.head_dim * (calls["input_ids"].shape[1] + 1)
    assert all_flops - fewer_flops == 2 * (2 * unread * pair - chosen_by)


@pytest.mark.parametrize(
    "methods, message",
    [
        ([DyCoke(decode_layer=4)], "decode_layer=4, but the decoder has 4 layers: set 1 to 3"),
        ([LayerDrop(layers=2), DyCoke(**DECODING)], "visual tokens leave after 2"),
        ([DyCoke(**DECODING), LATE], "fastv removes tokens after 2"),
        ([LATE, DyCoke(**DECODING)], "fastv removes tokens after 2"),
        ([PACT(after=1), DyCoke(**DECODING)], "the tokens of pact count for several each"),
        ([DyCoke(**DECODING), DyCoke(**DECODING)], "set decode_ratio=0 for one of them"),
    ],
)
def test_what_cannot_be_combined(methods, message):
    with pytest.raises(UserError, match=message):
        applied(NAME, *methods)


def test_a_layer_without_heads_cannot_choose():
    _, engine = applied(NAME, DyCoke(**DECODING))
    with pytest.raises(UserError, match="no head attends to visual tokens in the last of them"):
        engine.plan.keep_heads([(0, 1), (), (0,), (0,)])


def test_the_layer_is_checked_before_the_weights_are_loaded():
    with pytest.raises(UserError, match="decode_layer=9, but the decoder has 4 layers"):
        DyCoke(decode_layer=9).check(loaded(NAME).structure)


@pytest.mark.parametrize("other", [FastV(after=1, keep=5, average=None), DivPrune(keep=0.5)])
def test_tokens_left_by_other_methods_are_chosen_from(other):
    call = prompt(NAME, IMAGES, seed=3)
    ours, _ = applied(NAME, DyCoke(**DECODING), other)
    _, cache = continued(ours, call, [7, 19])
    kept = cache.layers[-1].visual_keys.shape[2]
    assert cache.layers[0].cached_tokens.selection.index_Bn.shape[1] == int(0.4 * kept)
