"""Families whose images are laid out otherwise: located, computed as masked, or refused.

The table of architectures in docs/visual_tokens.md is what these tests have found.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import bench
from bench.errors import UserError
from bench.models.vlm.decoder_view import decoder_layers
from bench.models.vlm.visual_tokens import locate_visual_tokens
from methods.token_pruning.sparsevlm import SparseVLM
from methods.token_pruning.visionzip import VisionZip
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_engine.strategy import require_visual_tokens_support
from tests.methods.token_pruning.recorded_steps import METHODS, applied, record_steps, removals
from tests.methods.visual_engine.masked_reference import masked_reference
from tests.methods.visual_engine.test_visual_equality import assert_equal, planned, text_of
from tests.methods.visual_engine.tiny_mllms import (
    ARCHITECTURES,
    IMAGE,
    LAYOUTS,
    anyres_canvas,
    build,
    laid_out_prompt,
)

TOLERANCE = 1e-5
# Text first, last, between, none; one image and two; tall and wide ones; padding on the left.
BATCH = ([2, (3, 4), 6], [7, (2, 5), 2, (4, 2), 3], [9])
ORDERS = ([(3, 3), 4], [5, (2, 4)], [(4, 2)])

# As in the docs' table: the model's name, its frames, and what else there is of its images.
FRAMES = {
    "llava": ("LLaVA-1.5", "whole images of one size", ""),
    "llava_next": ("LLaVA-NeXT", "the small whole image; its tiles in their places", "newlines"),
    "llava_onevision": ("LLaVA-OneVision", "as LLaVA-NeXT; no videos", "newlines"),
    "internvl": ("InternVL", "tiles", ""),
    "idefics3": ("Idefics3", "tiles, the whole image last", "tags, line breaks"),
    "smolvlm": ("SmolVLM", "as Idefics3", "tags, line breaks"),
    "mistral3": ("Mistral 3", "whole images of any size", "breaks behind rows"),
    "pixtral": ("Pixtral (`llava`)", "whole images of any size", "breaks behind rows"),
    "deepseek_vl": ("DeepSeek-VL", "whole images of one size", ""),
    "glm4v": ("GLM-4V", "whole images of any size; no videos", ""),
    "cohere2_vision": ("Cohere2-Vision, up to its window", "tiles, the whole image last", "breaks"),
    "gemma3": ("Gemma 3, up to its window", "images or crops, attending in both directions", ""),
    "paligemma": ("PaliGemma", "whole images; the prompt attends in both directions", ""),
    "qwen2_vl": ("Qwen2-VL", "whole images of any size, frames of videos", ""),
    "qwen2_5_vl": ("Qwen2.5-VL", "as Qwen2-VL", ""),
    "qwen3_vl": ("Qwen3-VL", "as Qwen2-VL", "timestamps"),
    "qwen3_vl_moe": ("Qwen3-VL with experts", "as Qwen2-VL", "timestamps"),
}
# Why not, for each that users ask for.
REFUSED = {
    "qwen3_5": ("Qwen3.5", "three of four layers are recurrent"),
}


def architectures_table():
    """The docs' table, in Markdown."""
    lines = ["| model | `model_type` | a frame is | text inside an image |", "|---|---|---|---|"]
    lines += [f"| {n} | `{kind}` | {frame} | {text} |" for kind, (n, frame, text) in FRAMES.items()]
    lines += [f"| {n} | `{kind}` | refused: {why} | |" for kind, (n, why) in REFUSED.items()]
    return "\n".join(lines)


def test_the_docs_have_the_table_of_what_is_tested():
    families = {family: build(name).config.model_type for name, (family, *_) in _all().items()}
    families["Pixtral"] = "pixtral"
    assert set(FRAMES) == set(families.values())
    text = (Path(bench.__file__).parents[1] / "docs" / "visual_tokens.md").read_text()
    assert architectures_table() in text


def _all():
    one_of_each = {family: name for name, (family, *_) in (ARCHITECTURES | LAYOUTS).items()}
    return {name: (ARCHITECTURES | LAYOUTS)[name] for name in one_of_each.values()}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_reference_is_refused_by_name(kind):
    assert kind in transformers.models.auto.configuration_auto.CONFIG_MAPPING
    structure = SimpleNamespace(model_type=kind, architecture=kind)
    with pytest.raises(UserError, match=f"fastv does not support {kind}: {REFUSED[kind][1]}"):
        require_visual_tokens_support("fastv", structure)


def test_a_decoder_that_caps_its_products_is_refused_by_name():
    """PaliGemma 2."""
    layer = SimpleNamespace(self_attn=SimpleNamespace(config=SimpleNamespace(model_type="gemma2")))
    structure = SimpleNamespace(
        model_type="paligemma", architecture="PaliGemma", moe=(), layers=[layer]
    )
    with pytest.raises(UserError, match=r"decoder of PaliGemma \(gemma2\): it caps the products"):
        decoder_layers(structure)


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", LAYOUTS)
def test_skipping_equals_masking(name):
    """Heads, neurons, windows and a cut; prefill and generation, which encodes images first."""
    network, stock, plan = planned(name)
    assert_equal(network, stock, plan, laid_out_prompt(name, *BATCH), tokens=5)
    for row in ORDERS:
        call = laid_out_prompt(name, row)
        with torch.no_grad():
            with masked_reference(stock, plan):
                expected = stock(**call).logits
            ours = network(**call).logits
        where = text_of(call)
        assert not where.any() or (ours - expected)[where].abs().max() < TOLERANCE


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plan_that_skips_nothing_is_transformers_own_forward(name):
    network, stock = build(name), build(name)
    visual_engine_of(network).plan.set_execution("skip")
    call = laid_out_prompt(name, *BATCH)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        for each in (call, *(laid_out_prompt(name, row) for row in ORDERS)):
            read = text_of(each)
            read[:, -1] = True  # also where an image ends the prompt
            off = (network(**each).logits - stock(**each).logits)[read]
            assert off.abs().max() < TOLERANCE
        ours, theirs = (
            torch.stack(net.generate(**call, **settings, return_dict_in_generate=True).logits)
            for net in (network, stock)
        )
    assert (ours - theirs).abs().max() < TOLERANCE


def test_images_attend_forwards_only_where_the_processor_says_so():
    """Without types, transformers' masks of Gemma 3 are causal, and so are ours."""
    network, stock = build("gemma3"), build("gemma3")
    visual_engine_of(network).plan.set_execution("skip")
    call = laid_out_prompt("gemma3", [2, (1, 1), 6])
    where = text_of(call)
    both = stock(**call).logits[where]
    del call["token_type_ids"]
    causal = stock(**call).logits[where]
    assert (both - causal).abs().max() > 1e-3
    assert (network(**call).logits[where] - causal).abs().max() < TOLERANCE
    call = laid_out_prompt("paligemma", [2, (1, 1), 6])
    del call["token_type_ids"]
    with pytest.raises(UserError, match="token_type_ids is missing"):
        locate_visual_tokens(build("paligemma"), call)


def test_a_sequence_beyond_a_sliding_window_is_refused():
    network = build("gemma3", sliding_window=30)
    visual_engine_of(network).plan.set_execution("skip")
    network(**laid_out_prompt("gemma3", [4, (1, 1), 8]))
    with pytest.raises(UserError, match=r"has 31 tokens.* attend to the last 30 only"):
        network(**laid_out_prompt("gemma3", [4, (1, 1), 9]))


def test_an_answer_to_learn_from_is_no_prompt():
    call = laid_out_prompt("paligemma", [(1, 1), 6])
    call["token_type_ids"][0, -2:] = 1
    with pytest.raises(UserError, match="give the prompt alone"):
        locate_visual_tokens(build("paligemma"), call)


@pytest.mark.sample(12)
@pytest.mark.parametrize("method", ["fastv", "divprune", "sparsevlm"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pruned_equals_masked(name, method):
    network, engine = applied(name, METHODS[method])
    seen, stock, call = record_steps(engine), build(name), laid_out_prompt(name, *BATCH)
    with torch.no_grad():
        ours = network(**call).logits
        gone = removals(seen, call["input_ids"].shape)
        with masked_reference(stock, engine.plan, gone):
            expected = stock(**call).logits
    assert (ours - expected)[text_of(call)].abs().max() < TOLERANCE
    assert all(bool(removal.gone_BS.any()) for removal in gone)


@pytest.mark.parametrize("size", [(3, 4), (2, 5), (4, 2), (1, 1), (2, 7)])
def test_newlines_are_separators_and_tiles_are_put_together(size):
    network = build("llava_next")
    call = laid_out_prompt("llava_next", [3, size, 2])
    found = locate_visual_tokens(network, call)
    rows, columns = anyres_canvas(size)
    assert int(found.separator_BS.sum()) == rows
    canvas = found.frame_BS == 1
    assert int(canvas.sum()) == rows * columns
    assert int(found.row_BS[canvas].max()) == rows - 1
    assert int(found.column_BS[canvas].max()) == columns - 1
    # The image's embeddings at separators are the learned newline, and nowhere else.
    features = network.model.get_image_features(
        call["pixel_values"], call["image_sizes"], return_dict=True
    ).pooler_output[0]
    newline = (features == network.model.image_newline).all(dim=-1)
    image = call["input_ids"][0] == IMAGE
    assert torch.equal(found.separator_BS[0, image], newline)
    encoded = {**call, "mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=[features])}}
    del encoded["pixel_values"], encoded["image_sizes"]
    again = locate_visual_tokens(network, encoded)
    assert torch.equal(again.frame_BS, found.frame_BS)
    assert torch.equal(again.column_BS, found.column_BS)


def test_separators_are_no_words_of_the_question():
    network, engine = applied("llava_next", SparseVLM(layers=(1,), keep=(0.5,)))
    seen = record_steps(engine)
    network(**laid_out_prompt("llava_next", [3, (3, 4), 2]))
    assert int(seen[0].inputs.question_rows().sum()) == 2


def test_several_images_of_onevision_are_not_cut():
    call = laid_out_prompt("llava_onevision", [2, (3, 4), 1, (4, 2), 3])
    found = locate_visual_tokens(build("llava_onevision"), call)
    assert int(found.separator_BS.sum()) == 2
    assert [int((found.frame_BS == frame).sum()) for frame in (0, 1)] == [25, 25]


def test_towers_with_other_layouts_are_not_read():
    with pytest.raises(UserError, match="the vision tower of llava_next"):
        applied("llava_next", VisionZip(keep=5))


def test_an_image_that_is_cut_is_refused():
    call = laid_out_prompt("mistral3", [2, (3, 4), 6])
    call["input_ids"][0, 3] = 7
    with pytest.raises(UserError, match="an image must come in one chunk"):
        locate_visual_tokens(build("mistral3"), call)
