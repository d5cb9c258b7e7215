"""The committed micro_llava: a real LLaVA that sees, and is as good as its log says."""

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from bench.data.synthetic.scenes import question_sets, tasks, training_conversations
from bench.data.synthetic.scenes.question_kinds import KINDS
from bench.data.synthetic.scenes.scene import generate_scene
from bench.models.embedded import training
from bench.models.embedded.micro_llava import FOLDER, recipe
from bench.models.embedded.micro_llava.network import VISUAL_TOKENS
from bench.models.embedded.micro_llava.objectives import (
    WORD_GROUPS,
    Aligner,
    ConversationPacker,
    hidden_states,
)

LOG: dict[str, Any] = json.loads((FOLDER / "training.json").read_text())
RESULTS = LOG["results"]


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    loaded = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)
    assert isinstance(loaded, LlavaForConditionalGeneration)
    return loaded.eval()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    loaded = AutoProcessor.from_pretrained(FOLDER)
    assert isinstance(loaded, LlavaProcessor)
    return loaded


def spread(task: str, count: int) -> list[tasks.SceneDocument]:
    documents = question_sets.documents(task)
    return documents[:: len(documents) // count][:count]


def test_is_a_small_llava_with_heads_and_layers_to_cut(
    model: LlavaForConditionalGeneration,
) -> None:
    text = model.config.text_config
    assert 1e6 < model.num_parameters() < 4e6
    assert text.num_hidden_layers >= 6
    assert text.num_attention_heads >= 8
    assert text.intermediate_size >= 2 * text.hidden_size
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) < 6e6


def test_an_image_is_64_visual_tokens(processor: LlavaProcessor) -> None:
    image, turns = training_conversations.draw_conversations("test", 1)[0]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0][0]}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=[image], text=text, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == VISUAL_TOKENS == 64
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)


def test_template_takes_strings_and_parts_alike(processor: LlavaProcessor) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    rendered = {
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        for content in (parts, "<image>\nWhy?")
    }
    assert rendered == {"USER:\n<image>\nWhy?\nASSISTANT:\n"}


@pytest.mark.parametrize("text", ["Größe: 3,5 m\n\n", " There are several options:\nA. red", "\t"])
def test_any_text_round_trips(text: str, processor: LlavaProcessor) -> None:
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


@torch.no_grad()
def test_turns_of_a_batch_are_prompts_of_an_evaluation(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """The oracle: each turn alone, through the processor and the whole model."""
    conversation = training_conversations.draw_conversations("test", 1, seed=3)[0]
    batch = ConversationPacker(processor).pack([conversation])
    groups = zip(hidden_states(model, batch), batch.turns, strict=True)
    packed = {
        tuple(row.tolist()): hidden_TD
        for hidden_RTD, turns in groups
        for hidden_TD, row in zip(hidden_RTD, turns.tokens_RT, strict=True)
    }
    assert len(packed) == len(conversation.turns)
    for question, answer in conversation.turns:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        )
        inputs = processor(images=[conversation.image], text=text, return_tensors="pt")
        start = len(batch.prefix_P)
        # The template's last newline is of no answer.
        alone_LD = model.model(**inputs).last_hidden_state[0, start:-1]
        tokens = tuple(inputs["input_ids"][0, start:-1].tolist())
        (found_TD,) = [h for row, h in packed.items() if row[: len(tokens)] == tokens]
        torch.testing.assert_close(found_TD[: len(tokens)], alone_LD, atol=2e-5, rtol=1e-4)


def test_log_is_of_these_scenes() -> None:
    assert LOG["scenes"] == {task: question_sets.fingerprint(task) for task in question_sets.TASKS}
    assert RESULTS["chance"] == {
        task: round(question_sets.chance_accuracy(task), 4) for task in question_sets.TASKS
    }


@pytest.mark.parametrize("task", question_sets.TASKS)
def test_every_task_is_learned_and_well_above_chance(task: str) -> None:
    assert RESULTS["accuracy"][task] >= max(0.8, RESULTS["chance"][task] + 0.3)


@pytest.mark.parametrize("task", question_sets.TASKS)
def test_no_task_can_be_answered_without_the_image(task: str) -> None:
    assert RESULTS["blank_image"][task] <= RESULTS["chance"][task] + 0.06


def test_answers_a_handful_of_test_questions(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    documents = spread("vqav2", 48)
    seen = recipe.task_accuracy(model, processor, "vqav2", documents)
    assert seen >= RESULTS["accuracy"]["vqav2"] - 0.15
    assert recipe.task_accuracy(model, processor, "vqav2", documents, blank=True) < seen - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("task", question_sets.TASKS)
def test_accuracy_is_what_the_log_says(
    task: str, model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    measured = recipe.task_accuracy(model, processor, task, question_sets.documents(task))
    assert measured == pytest.approx(RESULTS["accuracy"][task], abs=0.015)


def test_patches_are_labelled_with_what_their_cell_holds(processor: LlavaProcessor) -> None:
    labels = Aligner(processor).patches("test", 0, 8).words_BVG.view(8, 8, 8, len(WORD_GROUPS))
    for number, label in enumerate(labels):
        for i, thing in enumerate(generate_scene("test", number).cells):
            row, column = divmod(i, 3)
            square = label[1 + 2 * row : 3 + 2 * row, 1 + 2 * column : 3 + 2 * column].flatten(0, 1)
            assert (square == square[0]).all()
            words = [
                group[w] for group, w in zip(WORD_GROUPS[:4], square[0], strict=False) if w >= 0
            ]
            assert sorted(words) == sorted(thing.name.split() if thing else ["empty"])
        assert (label[[0, 7], :, 0] == WORD_GROUPS[0].index("empty")).all()


@pytest.mark.parametrize("stage", ["finding", "choosing", "comparing", "reading", "settling"])
def test_later_stages_ask_more_of_what_is_hard(stage: str) -> None:
    spec = recipe.STAGES[stage].conversation_spec
    assert set(spec.extra_kinds) <= set(KINDS)
    said = training_conversations.draw_conversation("train", 9, 0, spec).turns
    matching = [(text, answer) for text, answer in said if text.find("Which one is ") >= 0]
    assert len(matching) == spec.letter_turns
    for text, letter in matching:
        wanted = text.split("Which one is ")[1].split("?")[0]
        assert f"{letter}. {wanted}\n" in text
    assert len(said) <= spec.turns + spec.extra_turns + spec.letter_turns + 1


def test_learning_rate_rises_and_falls_to_nothing() -> None:
    settings = recipe.MicroLlavaRecipe()
    rates = [
        training.warmup_cosine_rate(i / 100, settings.learning_rate, settings.warmup_share)
        for i in range(101)
    ]
    assert max(rates) == settings.learning_rate == rates[5]
    assert rates[0] == 0
    assert rates[100] == pytest.approx(0)


@pytest.mark.slow
def test_recipe_writes_a_complete_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = recipe.task_accuracy
    monkeypatch.setattr(
        recipe,
        "task_accuracy",
        lambda model, processor, task, asked, **how: scored(
            model, processor, task, asked[:4], **how
        ),
    )
    settings = recipe.MicroLlavaRecipe(
        steps=2,
        images=2,
        conversation_spec=training_conversations.ConversationSpec(turns=2),
        alignment_steps=2,
        alignment_images=2,
        log_every=1,
    )
    recipe.run_stage(tmp_path, settings)
    names = {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    names |= {"processor_config.json", "chat_template.jinja"}
    assert names <= {file.name for file in tmp_path.iterdir()}
    log = json.loads((tmp_path / "training.json").read_text())
    assert len(log["curve"]) == len(log["alignment"]) == 2
    assert set(log) ^ set(LOG) == {"alignment", "before"}
