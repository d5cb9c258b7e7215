"""Recipe of micro_llava in seven stages, each starting from the folder of the previous one:

    python -m bench.models.embedded.micro_llava.recipe describing --out ONE
    python -m bench.models.embedded.micro_llava.recipe answering --start ONE --out TWO
    python -m bench.models.embedded.micro_llava.recipe finding --start TWO --out THREE
    python -m bench.models.embedded.micro_llava.recipe choosing --start THREE --out FOUR
    python -m bench.models.embedded.micro_llava.recipe comparing --start FOUR --out FIVE
    python -m bench.models.embedded.micro_llava.recipe reading --start FIVE --out SIX
    python -m bench.models.embedded.micro_llava.recipe settling --start SIX --out SEVEN

A LLaVA of two million parameters sees scenes of the training split, answers questions about each
and names what is in every cell. A folder that it writes is a complete Hugging Face model with its
processor, plus ``training.json``, the log of the run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from bench.data.synthetic import Split
from bench.data.synthetic.scenes import (
    ConversationSpec,
    question_sets,
    scene,
    tasks,
    training_conversations,
)
from bench.models.embedded.micro_llava.network import new_model, new_processor
from bench.models.embedded.micro_llava.objectives import (
    Aligner,
    ConversationBatch,
    ConversationPacker,
    answer_loss,
)
from bench.models.embedded.training import (
    LOG_FILE,
    StepLimits,
    adamw,
    optimizer_steps,
    training_log,
    warmup_cosine,
    write_training_log,
)

LIBRARIES = ("torch", "transformers", "tokenizers")

_PROMPTS_PER_BATCH = 64
_MAX_ANSWER_TOKENS = 4

# A plain image, so that what remains is what the question text alone predicts.
_GREY = (52, 52, 52)

# First scene of a seed's alignment: far above the scenes of conversations, so that none is used by
# both.
_SCENES_PER_ALIGNMENT = 1_000_000_000


@dataclass(frozen=True)
class MicroLlavaRecipe:
    """Everything that determines the result besides the scenes."""

    seed: int = 7
    vocabulary: int = 480
    vocabulary_conversations: int = 2000
    steps: int = 6000
    minutes: float = 20.0
    images: int = 16
    conversation_spec: ConversationSpec = field(default_factory=ConversationSpec)
    description_weight: float = 8.0
    frozen_tower: bool = True
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    log_every: int = 50
    alignment_steps: int = 800
    alignment_minutes: float = 6.0
    alignment_images: int = 48


# Kinds of questions that the previous stage still gets wrong; at first those that find a thing by
# its shape, or ask where it is.
_BY_SHAPE = (
    "adversarial",
    "color",
    "column",
    "count_shape",
    "is_count",
    "is_number",
    "number_at",
    "row",
    "sideways",
    "size",
    "upright",
)
_BY_LETTER = (
    "column",
    "count_color",
    "count_shape",
    "is_placed",
    "number",
    "number_at",
    "row",
    "shape",
    "sideways",
    "size",
    "upright",
)
_BY_COMPARISON = (
    "color",
    "column",
    "count_shape",
    "is_count",
    "is_number",
    "is_placed",
    "number",
    "number_at",
    "row",
    "shape",
    "sideways",
    "upright",
)
_BY_NUMBER = ("is_number", "is_placed", "number", "number_at", "sideways")
_LATER_STAGE = MicroLlavaRecipe(
    steps=9000, description_weight=1.0, learning_rate=1.2e-3, frozen_tower=False
)
STAGES = {
    "describing": MicroLlavaRecipe(),
    "answering": replace(
        _LATER_STAGE,
        seed=8,
        conversation_spec=ConversationSpec(turns=12),
    ),
    "finding": replace(
        _LATER_STAGE,
        seed=9,
        minutes=50.0,
        conversation_spec=ConversationSpec(
            turns=8, extra_turns=5, extra_kinds=_BY_SHAPE, letter_turns=2
        ),
    ),
    "choosing": replace(
        _LATER_STAGE,
        seed=10,
        minutes=22.0,
        conversation_spec=ConversationSpec(
            turns=5, extra_turns=6, extra_kinds=_BY_LETTER, letter_turns=3, choice_share=0.65
        ),
    ),
    "comparing": replace(
        _LATER_STAGE,
        seed=11,
        minutes=55.0,
        learning_rate=1e-3,
        conversation_spec=ConversationSpec(
            turns=2,
            extra_turns=9,
            extra_kinds=_BY_COMPARISON,
            letter_turns=2,
            choice_share=0.75,
            ocr_share=0.35,
        ),
    ),
    "reading": replace(
        _LATER_STAGE,
        seed=12,
        minutes=20.0,
        learning_rate=6e-4,
        conversation_spec=ConversationSpec(
            turns=4,
            extra_turns=5,
            extra_kinds=_BY_NUMBER,
            letter_turns=1,
            choice_share=0.4,
            ocr_share=0.35,
            min_digits=(0, 2),
        ),
    ),
    "settling": replace(
        _LATER_STAGE,
        seed=13,
        minutes=15.0,
        learning_rate=6e-4,
        conversation_spec=ConversationSpec(
            turns=3,
            extra_turns=7,
            extra_kinds=_BY_COMPARISON,
            letter_turns=2,
            choice_share=0.7,
            ocr_share=0.25,
            min_digits=(0, 0, 2),
        ),
    ),
}
"""Emphasis of the stages: descriptions; questions, with the tower unfrozen; harder questions; the
letters of multiple choice; neighbours and everything that takes two looks; which of two digits is
meant; a mixture of all."""


class TrainingSteps(Dataset[ConversationBatch]):
    """The batch of each step, a pure function of the step's number."""

    def __init__(self, packer: ConversationPacker, settings: MicroLlavaRecipe) -> None:
        """Store how batches are made."""
        self._packer, self._settings = packer, settings

    def __len__(self) -> int:
        """Return the number of steps."""
        return self._settings.steps

    def __getitem__(self, step: int) -> ConversationBatch:
        """Draw the scenes of one step and pack them."""
        images, seed = self._settings.images, self._settings.seed
        numbers = range(step * images, (step + 1) * images)
        drawn = [
            training_conversations.draw_conversation(
                "train", seed, n, self._settings.conversation_spec
            )
            for n in numbers
        ]
        return self._packer.pack(drawn)


def train(
    model: LlavaForConditionalGeneration,
    losses: Iterator[torch.Tensor],
    settings: MicroLlavaRecipe,
    limits: StepLimits,
) -> list[dict[str, float]]:
    """Take one optimizer step per loss; return the curve."""
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay)
    # Stages are also limited by time, so that a recipe ends in the planned time on any machine; the
    # price is that the number of steps, hence the weights, depend on its speed.
    schedule = warmup_cosine(optimizer, settings.learning_rate, settings.warmup_share)
    curve, recent = [], list[float]()
    for step in optimizer_steps(model, optimizer, schedule, limits, max_norm=1.0):
        loss = next(losses)
        loss.backward()
        recent.append(loss.item())
        if step.number % settings.log_every == 0 or step.is_last:
            curve.append({"step": step.number, "loss": round(sum(recent) / len(recent), 4)})
            print(f"{step.seconds:6.0f} s", curve[-1], flush=True)
            recent.clear()
    return curve


@torch.no_grad()
def greedy_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image_prompts: Sequence[tuple[Image.Image, str]],
) -> list[str]:
    """Answer each prompt about its image, greedily."""
    answers: list[str] = []
    for start in range(0, len(image_prompts), _PROMPTS_PER_BATCH):
        images, prompts = zip(*image_prompts[start : start + _PROMPTS_PER_BATCH], strict=True)
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in prompts
        ]
        texts = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(images=list(images), text=texts, return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=_MAX_ANSWER_TOKENS, do_sample=False)
        # Prompts are padded on the left, so all answers start at the same column.
        answer_ids = output[:, inputs["input_ids"].shape[1] :]
        answers += [
            text.strip() for text in processor.batch_decode(answer_ids, skip_special_tokens=True)
        ]
    return answers


def task_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    task: str,
    documents: Sequence[tasks.SceneDocument],
    *,
    blank: bool = False,
) -> float:
    """Return the fraction of correct answers; `blank` replaces all images by a grey one.

    A question of MMBench counts as correct when it is answered correctly in all rotations of its
    options.
    """
    rendered = [tasks.render_task_prompt(task, document) for document in documents]
    images = [_blank()] * len(documents) if blank else _images(task, documents)
    prompts = [prompt for prompt, _ in rendered]
    answers = greedy_answers(model, processor, list(zip(images, prompts, strict=True)))
    right = [text == gold for text, (_, gold) in zip(answers, rendered, strict=True)]
    questions: dict[int, bool] = {}
    for number, (document, hit) in enumerate(zip(documents, right, strict=True)):
        # MMBench's circular evaluation: the rotations of one question share their index modulo
        # ROTATION.
        question = document["index"] % tasks.ROTATION_OFFSET if task == "mmbench_en" else number
        questions[question] = questions.get(question, True) and hit
    return sum(questions.values()) / len(questions)


def _images(task: str, documents: Sequence[tasks.SceneDocument]) -> list[Image.Image]:
    """Return the documents' images; GQA keeps them in a separate data set."""
    if task != "gqa":
        return [document["image"] for document in documents]
    split: Split = "test" if documents[0]["imageId"].startswith("test") else "train"
    by_id = {row["id"]: row["image"] for row in question_sets.scene_images(task, split)}
    return [by_id[document["imageId"]] for document in documents]


def _blank() -> Image.Image:
    return Image.new("RGB", (scene.IMAGE_SIZE, scene.IMAGE_SIZE), _GREY)


def score_tasks(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> dict[str, object]:
    """Score the test questions with their images and, as a control, without."""
    model.eval()
    seen: dict[str, float] = {}
    blind: dict[str, float] = {}
    for task in question_sets.TASKS:
        documents = question_sets.documents(task, "test")
        seen[task] = round(task_accuracy(model, processor, task, documents), 4)
        blind[task] = round(task_accuracy(model, processor, task, documents, blank=True), 4)
        chance = question_sets.chance_accuracy(task)
        print(f"{task:14} {seen[task]:.3f} blind {blind[task]:.3f} chance {chance:.3f}", flush=True)
    return {
        "accuracy": seen,
        "blank_image": blind,
        "chance": {
            task: round(question_sets.chance_accuracy(task), 4) for task in question_sets.TASKS
        },
    }


def align(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, settings: MicroLlavaRecipe
) -> list[dict[str, float]]:
    """Teach the vision tower, the projector and the word embeddings what patches contain."""
    aligner, images = Aligner(processor), settings.alignment_images
    first = _SCENES_PER_ALIGNMENT * (settings.seed + 1)
    starts = range(first, first + settings.alignment_steps * images, images)
    losses = (aligner.loss(model, aligner.patches("train", start, images)) for start in starts)
    limits = StepLimits(settings.alignment_steps, settings.alignment_minutes)
    return train(model, losses, settings, limits)


def start_from_scratch(
    folder: Path, settings: MicroLlavaRecipe
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, dict[str, object]]:
    """Make the processor and a model whose vision tower knows the words; return its curve."""
    torch.manual_seed(settings.seed)
    conversations = training_conversations.draw_conversations(
        "train", settings.vocabulary_conversations, settings.seed
    )
    turns = [turn for conversation in conversations for turn in conversation.turns]
    texts = [f"USER:\n{question}\nASSISTANT:\n{answer}" for question, answer in turns]
    processor = new_processor(texts, settings.vocabulary)
    model = new_model(processor)
    processor.save_pretrained(folder)
    aligned = align(model, processor, settings)
    model.save_pretrained(folder)
    return model, processor, {"alignment": aligned}


def start_from_stage(
    start: Path, folder: Path, settings: MicroLlavaRecipe
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, dict[str, object]]:
    """Load a model that a stage of this recipe wrote, and that stage's log."""
    torch.manual_seed(settings.seed)
    model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(start)
    processor.save_pretrained(folder)
    before = json.loads((start / LOG_FILE).read_text())
    return model, processor, {"before": before}


def run_stage(folder: Path, settings: MicroLlavaRecipe, start: Path | None = None) -> None:
    """Train from scratch or from `start`, save, score what was saved, and write the log."""
    started = time.monotonic()
    # Sharp attention produces many denormal numbers, which CPUs process many times more slowly.
    torch.set_flush_denormal(True)
    model, processor, origin = (
        start_from_scratch(folder, settings)
        if start is None
        else start_from_stage(start, folder, settings)
    )
    # Turns are short, and for them eager attention is faster than SDPA on a CPU.
    model.set_attn_implementation("eager")
    print(f"{model.num_parameters():,} parameters", flush=True)
    # The first stage keeps the tower as aligned, while the decoder learns to read its features.
    model.model.vision_tower.requires_grad_(not settings.frozen_tower)
    steps = TrainingSteps(ConversationPacker(processor, settings.description_weight), settings)
    # One worker draws scenes while the model trains. Batches are numbered, so their content does
    # not depend on it.
    loader = DataLoader(steps, batch_size=None, num_workers=1, prefetch_factor=4)
    limits = StepLimits(settings.steps, settings.minutes)
    curve = train(model, (answer_loss(model, batch) for batch in loader), settings, limits)
    log = training_log(settings, model, time.monotonic() - started, LIBRARIES)
    log["scenes"] = {task: question_sets.fingerprint(task) for task in question_sets.TASKS}
    log |= origin | {"curve": curve}
    # Also before scoring, which takes a while.
    write_training_log(folder, log)
    model.to(torch.bfloat16).save_pretrained(folder)
    # Scored as users load it: after the rounding to bfloat16, and through the files.
    saved = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    write_training_log(folder, log | {"results": score_tasks(saved, processor)})


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="the folder of the previous stage")
    parser.add_argument("--steps", type=int, help="maximum number of steps, for a trial")
    arguments = parser.parse_args()
    chosen = STAGES[arguments.stage]
    steps = min(chosen.steps, arguments.steps or chosen.steps)
    run_stage(arguments.out, replace(chosen, steps=steps), arguments.start)


if __name__ == "__main__":
    main()
