"""Questions about the same images share one prefill and get the answers they get alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.multimodal import shared_prefix
from bench.evaluation.multimodal.generation import Generation, ImageQuestion
from bench.evaluation.multimodal.prompts import PromptEncoder, VisionFeatureCache
from bench.method import Context
from bench.ui import SILENT

ARCHITECTURES = ("llava", "qwen2_vl", "internvl")


def picture(seed, size=(24, 24)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions():
    """Three about one image, two about a larger one, one about a third, one without."""
    images = [picture(0)] * 3 + [picture(1, (40, 20))] * 2 + [picture(2)]
    texts = ["Is it red?", "Is it a long question about blue?", "What?", "Why?", "Who is it?", "A?"]
    asked = [ImageQuestion(t, lambda i=i: [i]) for t, i in zip(texts, images, strict=True)]
    return [*asked, ImageQuestion("No image", list)]


def answers(model, asked, batch=8, share=True, **options):
    generation = Generation(
        model, PromptEncoder(model, None), VisionFeatureCache(model, 2**30), options, share
    )
    each = AdaptiveBatches(batch, torch.device("cpu"), SILENT).map(asked, generation.run)
    return [answer.text for answers in each for answer in answers]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch", [2, 7])
def test_answers_equal_those_of_whole_prompts(name, batch, mllms):
    expected = answers(mllms[name], questions(), 1, share=False, max_new_tokens=6)
    assert len(set(expected)) > 3
    assert answers(mllms[name], questions(), batch, max_new_tokens=6) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefix_goes_through_the_decoder_once(name, mllms):
    model, widths = mllms[name], []

    def spy(module, args, kwargs):
        widths.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    hook = model.network.model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        answers(model, questions()[:5], max_new_tokens=1)
        shared = sum(rows * width for rows, width in widths)
        widths.clear()
        answers(model, questions()[:5], share=False, max_new_tokens=1)
    finally:
        hook.remove()
    assert shared < 0.9 * sum(rows * width for rows, width in widths)


def test_a_question_before_its_image_shares_nothing():
    image, config = 9, type("Config", (), {"image_token_id": 9})
    rows = [[1, 2, image, 3], [1, 4, image, 3], [1, 2, image, 5], [1, 2, image, 6]]
    encoded = [{"input_ids": torch.tensor([row])} for row in rows]
    assert shared_prefix.find_image_prefixes(encoded[:2], ["a", "a"], config) == []
    assert shared_prefix.find_image_prefixes(encoded[::2], ["a", "b"], config) == []
    (prefix,) = shared_prefix.find_image_prefixes(encoded, ["b", "c", "a", "a"], config)
    assert prefix == shared_prefix.ImagePrefix((2, 3), 3)


def test_a_prompt_that_is_a_prefix_of_another_keeps_a_token_of_its_own():
    config = type("Config", (), {"image_token_id": 9})
    encoded = [{"input_ids": torch.tensor([row])} for row in ([9, 1, 2], [9, 1, 2, 3], [9, 1, 2])]
    (prefix,) = shared_prefix.find_image_prefixes(encoded, ["a"] * 3, config)
    assert prefix.length == 2


def micro(backend, **options):
    settings = {"harness": "lmms_eval", "suite": "micro", "limit": 12, "batch_size": 7}
    settings |= {"tasks": ("pope", "textvqa_val"), "backend": backend} | options
    return plan(BenchmarkConfig(name="b", **settings), offline=True)


@pytest.fixture(scope="module")
def micro_llava():
    from bench.errors import UserError
    from bench.models import loading, source
    from bench.schema import ModelConfig

    config = ModelConfig(
        name="micro_llava", source="embedded:micro_llava", kind="image_text", device="cpu"
    )
    try:
        return loading.load_model(source.resolve_model(config, offline=True))
    except UserError as error:
        pytest.skip(str(error))


def applied(model, method):
    changed = model.copy()
    method.apply(changed, Context(seed=0, calibration=None, prompts=None, progress=SILENT))
    return changed


def windows():
    from methods.visual_tokens.strategies import NeighborAttention

    return NeighborAttention(window=1)


def drop():
    from methods.visual_tokens.strategies import LayerDrop

    return LayerDrop(layers=2)


def official():
    from methods.visual_tokens.strategies import LayerDrop

    return LayerDrop(layers=2, execution="masked")


@pytest.mark.broad
@pytest.mark.parametrize("method", [None, windows, drop])
def test_both_backends_give_the_same_samples_whatever_is_skipped(micro_llava, method):
    model = micro_llava if method is None else applied(micro_llava, method())
    shared, plain = evaluate(model, micro("prefix_sharing")), evaluate(model, micro("padded"))
    assert shared.samples == plain.samples
    assert shared.metrics == plain.metrics
    assert (shared.backend["used"], plain.backend["used"]) == ("prefix_sharing", "padded")


def fastv():
    from methods.token_pruning.fastv import FastV

    return FastV(keep=0.5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("method", [fastv, official])
def test_a_method_that_looks_at_whole_prompts_uses_the_padded_backend(micro_llava, method):
    model = applied(micro_llava, method())
    found = evaluate(model, micro("prefix_sharing", tasks=("pope",), limit=6))
    assert found.backend["used"] == "padded"
    assert found.backend["reasons"] == ["a method needs whole prompts"]
    assert found.samples == evaluate(model, micro("padded", tasks=("pope",), limit=6)).samples


def test_a_window_shorter_than_the_prompts_shares_nothing(llava):
    slides = replace(llava)
    config = type(llava.network.config)(**llava.network.config.to_dict())
    config.get_text_config().sliding_window = 64
    slides.network = type("Network", (), {"config": config})
    assert (
        shared_prefix.unsupported_reason(slides)
        == "the network has sliding attention over 64 tokens"
    )
    assert shared_prefix.unsupported_reason(llava) is None


def test_images_that_see_the_question_are_not_shared(llava):
    from tests.methods.visual_engine.tiny_mllms import build

    paligemma = replace(llava)
    paligemma.network = build("paligemma")
    reason = shared_prefix.unsupported_reason(paligemma)
    assert reason == "the network's images attend to the question after them"
