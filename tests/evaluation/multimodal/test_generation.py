"""Answers against a plain loop of forward passes, one question at a time, pixels and all."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from bench.device.devices import select_device
from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.multimodal.generation import Generation, ImageQuestion, PerRowStopping
from bench.evaluation.multimodal.prompts import PromptEncoder, VisionFeatureCache
from bench.ui import SILENT

ARCHITECTURES = ("llava", "qwen2_vl", "internvl")


def picture(seed, size=(24, 24)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions():
    """Prompts of several lengths, several sizes of image, one image twice, one question without."""
    shown = [[picture(0)], [picture(1, (40, 20))], [picture(0)], [], [picture(2, (16, 64))]]
    asked = ["Is it red?", "What?", "A longer question\nthan the others: blue?", "No image", "yes?"]
    return [
        ImageQuestion(text, lambda found=found: found)
        for text, found in zip(asked, shown, strict=True)
    ]


def plain(model, question, new, until=()):
    """The definition: encode prompt and pixels, forward the whole sequence, take the best token."""
    prompts, images = PromptEncoder(model, None), question.open_images()
    call = prompts.encode(prompts.render(question.text, len(images)), images)
    made = []
    while len(made) < new:
        logits = model.network(**call, use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
        text = model.tokenizer.decode(made, skip_special_tokens=True)
        if made[-1] == 2 or any(stop in text for stop in until):
            break
        call["input_ids"] = torch.cat([call["input_ids"], torch.tensor([[made[-1]]])], dim=1)
        call["attention_mask"] = torch.ones_like(call["input_ids"])
        if "mm_token_type_ids" in call:
            types = call["mm_token_type_ids"]
            call["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(types[:, :1])], dim=1)
    text = model.tokenizer.decode([t for t in made if t != 2], skip_special_tokens=True)
    for stop in until:
        text = text.partition(stop)[0]
    return text


def answer(model, asked, batch, gib=1.0, **options):
    features = VisionFeatureCache(model, int(gib * 2**30))
    generation = Generation(model, PromptEncoder(model, None), features, options)
    each = AdaptiveBatches(batch, select_device("cpu"), SILENT).map(asked, generation.run)
    return [answer.text for answers in each for answer in answers]


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_answers_like_a_plain_loop(name, batch, mllms):
    model, asked = mllms[name], questions()
    expected = [plain(model, question, 6) for question in asked]
    assert len(set(expected)) > 2
    assert answer(model, asked, batch, max_new_tokens=6) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_image_seen_twice_is_encoded_once_and_answers_stay(name, mllms, monkeypatch):
    model, asked = mllms[name], questions()
    encode, calls = model.network.get_image_features, []

    def counted(pixel_values, **given):
        calls.append(pixel_values.shape)
        return encode(pixel_values, **given)

    counted.__signature__ = __import__("inspect").signature(encode)
    monkeypatch.setattr(model.network, "get_image_features", counted)
    kept = answer(model, asked, 2, max_new_tokens=5)
    assert len(calls) == 3
    calls.clear()
    assert answer(model, asked, 2, gib=0.0, max_new_tokens=5) == kept
    assert len(calls) == 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_network_that_takes_no_features_is_given_pixels(name, mllms, monkeypatch):
    model, asked = mllms[name], questions()
    expected = answer(model, asked, 3, max_new_tokens=5)
    monkeypatch.setattr(VisionFeatureCache, "outputs_for", None)
    features = VisionFeatureCache(model, 0)
    features.supported = False
    generation = Generation(model, PromptEncoder(model, None), features, {"max_new_tokens": 5})
    assert [each.text for each in generation.run(asked)] == expected


def test_the_memory_for_images_is_bounded(llava):
    one = VisionFeatureCache(llava, 2**30)
    inputs = PromptEncoder(llava, None).encode("<image>", [picture(0)])
    one.outputs_for("a", inputs, torch.device("cpu"))
    size = one._bytes
    features = VisionFeatureCache(llava, 2 * size)
    for key in ("a", "b", "a", "c"):
        features.outputs_for(key, inputs, torch.device("cpu"))
    assert list(features._outputs) == ["a", "c"]
    assert features._bytes == 2 * size


def test_rows_stop_by_themselves_at_a_string(llava):
    asked = questions()
    free = answer(llava, asked, 5, max_new_tokens=8)
    stop = random.Random(0).choice([text[2] for text in free if len(text) > 3])
    expected = [plain(llava, question, 8, (stop,)) for question in asked]
    assert expected == [text.partition(stop)[0] for text in free] != free
    assert answer(llava, asked, 5, max_new_tokens=8, until=[stop]) == expected


def test_a_row_is_done_when_full_or_at_a_string_over_two_tokens(llava):
    tokenizer = llava.tokenizer
    ids = torch.tensor([tokenizer.encode("xyz", add_special_tokens=False)] * 2)
    assert PerRowStopping(tokenizer, ["yz"], [9, 9], 0)(ids, None).tolist() == [True, True]
    assert PerRowStopping(tokenizer, ["yz"], [9, 9], 2)(ids, None).tolist() == [False, False]
    assert PerRowStopping(tokenizer, [], [3, 4], 0)(ids, None).tolist() == [True, False]


def test_a_question_without_room_for_an_answer_is_left_out_or_refused(mllms):
    from dataclasses import replace

    from bench.errors import UserError

    short = replace(mllms["llava"])
    short.config = short.config.model_copy(update={"max_length": 30})
    named = [replace(question, name="task t, document 7") for question in questions()]
    features = VisionFeatureCache(short, 0)
    prompts = PromptEncoder(short, None)
    found = Generation(short, prompts, features, {"max_new_tokens": 2}).run(named)
    # The question without an image is the only short one.
    assert [answer.seen.unanswered is None for answer in found] == [False] * 3 + [True, False]
    assert "model llava0 has room for 29" in found[0].seen.unanswered
    refusing = Generation(short, prompts, features, {}, overlong="refuse")
    with pytest.raises(UserError, match=r"task t, document 7: .* tokens do not fit"):
        refusing.run(named)


def test_an_answer_says_what_was_seen(mllms):
    for name, sizes in {"llava": "20x20", "qwen2_vl": "16x32"}.items():
        model, question = mllms[name], ImageQuestion("What?", lambda: [picture(1, (30, 20))])
        generation = Generation(
            model, PromptEncoder(model, None), VisionFeatureCache(model, 0), {"max_new_tokens": 3}
        )
        (found,) = generation.run([question])
        width = PromptEncoder(model, None).encode(found.prompt, question.open_images())
        assert found.seen.prompt_tokens == width["input_ids"].shape[1]
        assert found.seen.image_sizes == (sizes,)
        assert found.seen.finish in ("eos", "length")
        assert found.seen.answer_tokens <= 3


def test_vicuna_with_its_sentence_is_what_the_harness_sends(llava):
    """lmms-eval's `llava_hf` writes this for a tokenizer without a template of its own."""
    said = PromptEncoder(llava, "A chat.").render("Is it red?", 1)
    assert said == "A chat. USER: <image>\nIs it red? ASSISTANT:"
    assert PromptEncoder(llava, "").render("Hm?", 0) == "USER: Hm? ASSISTANT:"
