"""Fine-tuning of a vision-language model with the run's visual strategies active.

Conversations become training tensors through the model's own chat template; the loss covers the
answers. Shapes: B conversations, S tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from bench.data import chat, conversations
from bench.data.chat import Conversation, Processor
from bench.data.conversations import Conversations
from bench.errors import UserError
from bench.method import (
    ALL_FORMS,
    Context,
    InputSize,
    Method,
    MethodReport,
    MethodWork,
    WeightForm,
)
from bench.models.model import Model
from bench.models.network import TransformersNetwork
from bench.models.structure.model_structure import ModelStructure
from methods import checkpoint
from methods.checkpoint import Checkpoint, CheckpointManager
from methods.visual_engine.strategy import require_visual_tokens_support

# Names of the modules of the inner model that project features of the tower to embeddings.
PROJECTORS = ("multi_modal_projector", "visual.merger", "connector", "aligner")


class VisualFineTuning(Method):
    """Train projector and language model on conversations about images; the tower stays frozen.

    The defaults are those of LLaVA-1.5's second stage, which the paper runs with all its strategies
    active: one epoch, a rate of 2e-5 with a cosine schedule and 3 % warm-up, no weight decay, 128
    conversations per step. `data=llava` reads `path`, a JSON file in LLaVA's layout, and its images
    below `images`; `embedded` draws `count` scenes. `batch` conversations are processed at a time,
    and a step accumulates `accumulate` batches. `steps` limits the number of steps.

    Master weights, gradients and AdamW's two moments are float32 on one device, without sharding:
    16 bytes per trained weight, or 112 GB for seven billion. A checkpoint, from which an
    interrupted run resumes, takes three quarters of that.
    """

    accepts: ClassVar[frozenset[WeightForm]] = ALL_FORMS - {"packed"}

    data: Literal["llava", "embedded"] = "llava"
    path: str | None = None
    images: str | None = None
    count: int = Field(default=512, ge=1, le=1_000_000)
    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch: int = Field(default=8, ge=1)
    accumulate: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    warmup: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    longest: int = Field(default=2048, ge=8)

    @model_validator(mode="after")
    def _data_is_somewhere(self) -> Self:
        if (self.data == "llava") != (self.path is not None and self.images is not None):
            raise ValueError(
                f"data={self.data} with path={self.path} and images={self.images}: data=llava "
                "needs path and images, data=embedded takes neither"
            )
        return self

    def check(self, structure: ModelStructure) -> None:
        """Refuse a model without images."""
        require_visual_tokens_support("visual_finetune", structure)

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return the training; each conversation is taken to be as long as an image prompt."""
        steps = self._steps(self.count if self.data == "embedded" else len(self._talks(seed=0)))
        weights = structure.parameters
        tensors = sum(1 for layer in structure.layers for _ in layer.parameters())
        return MethodWork(
            trained=float(steps * self._conversations_per_step),
            together=self.batch,
            readings=2.0,
            # AdamW reads weight, gradient and two moments and writes three of them; the gradient
            # is clipped before.
            elements=float(steps * weights * 10),
            operators=float(steps * 15 * tensors),
            # Master weights, gradients and two moments, less the weights that are held anyway.
            memory=12.0 * weights,
        )

    def _steps(self, conversations: int) -> int:
        return min(
            self.steps or 10**9, self.epochs * (conversations // self._conversations_per_step)
        )

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Train; the report contains the loss of every step and the fingerprint of the data.

        Raises:
            UserError: there are too few conversations, or the loss diverges.
        """
        talks = self._talks(context.seed)
        total = self._steps(len(talks))
        if total == 0:
            raise UserError(
                f"visual_finetune: {len(talks)} conversations are fewer than the "
                f"{self._conversations_per_step} of one step; lower batch or accumulate"
            )
        trained = trainable_parameters(model.network)
        with torch.enable_grad(), _float32_weights(model.network, trained) as dtype:
            losses = self._train(model, talks, trained, dtype, total, context)
        details = {
            "conversations": talks.fingerprint,
            "trained_parameters": sum(weight.numel() for weight in trained),
            "steps": total,
            "losses": [round(loss, 5) for loss in losses],
        }
        return MethodReport("none", details, trained=True)

    @property
    def _conversations_per_step(self) -> int:
        return self.batch * self.accumulate

    def _talks(self, seed: int) -> Conversations:
        if self.data == "embedded":
            return conversations.embedded_conversations(self.count, seed)
        return conversations.conversations_from_file(str(self.path), str(self.images))

    def _train(
        self,
        model: Model,
        talks: Conversations,
        trained: list[nn.Parameter],
        dtype: torch.dtype,
        total: int,
        context: Context,
    ) -> list[float]:
        """Return the mean loss of each step; `dtype` is the network's own."""
        from transformers import get_cosine_schedule_with_warmup

        optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.warmup * total), total)
        examples = TrainingExamples(model.processor, self.longest, model.config.system_prompt)
        keeper = CheckpointManager(context.folder, context.progress)
        state = FineTuningState(trained, optimizer, schedule)
        if (saved := keeper.latest()) is not None:
            state.resume(saved)
        done = len(state.losses)
        # The order of batches depends on the seed alone, so a resumed run skips those already used.
        batches = islice(self._batches(talks, context.seed), done * self.accumulate, None)
        for _ in context.progress.track(range(done, total), "fine-tuning"):
            loss = 0.0
            for _ in range(self.accumulate):
                call = examples.batch([talks[number] for number in next(batches)])
                part = self._loss(model, call, dtype) / self.accumulate
                part.backward()
                loss += float(part.detach())
            # 1.0 is the default of the Hugging Face trainer that LLaVA uses.
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if not math.isfinite(loss):
                raise UserError("visual_finetune: the loss is NaN or infinite: lower learning_rate")
            state.losses.append(loss)
            keeper.save_if_due(state.checkpoint)
        keeper.save(state.checkpoint)
        return state.losses

    def _loss(self, model: Model, call: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the mean loss on the answers of one batch; half precision runs under autocast."""
        moved = {name: value.to(model.device) for name, value in call.items()}
        half = dtype != torch.float32
        with torch.autocast(model.device.type, dtype if half else torch.bfloat16, enabled=half):
            loss: Tensor = model.network(**moved, use_cache=False).loss
        return loss

    def _batches(self, talks: Conversations, seed: int) -> Iterator[list[int]]:
        """Yield the indices of the conversations of each batch, shuffled by the seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(talks), generator=generator)
            for start in range(0, len(talks) - self.batch + 1, self.batch):
                yield order[start : start + self.batch].tolist()


@contextmanager
def _float32_weights(network: nn.Module, trained: list[nn.Parameter]) -> Iterator[torch.dtype]:
    """Make the given weights trainable and float32 inside the `with` block; yield their own dtype.

    Afterwards, even after an error, the network is frozen and in its own dtype.
    """
    dtype = trained[0].dtype
    try:
        for weight in trained:
            # bfloat16 is too coarse for steps of 2e-5. Assigning `.data` does not increment
            # `_version`, which cached weight slices compare.
            weight.data = weight.data.float()
            torch.autograd.graph.increment_version(weight)
            weight.requires_grad_(True)
        yield dtype
    finally:
        for weight in trained:
            weight.data = weight.data.to(dtype)
            torch.autograd.graph.increment_version(weight)
        for weight in network.parameters():
            weight.requires_grad_(False)
            weight.grad = None
        network.eval()


def trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of projector, language model and head, each once."""
    inner = network.get_submodule("model")
    decoder = cast(TransformersNetwork, network).get_decoder()
    parts = [decoder, network.get_submodule("lm_head")]
    # Most models have a projector; in Qwen-VL it is the merger of the tower.
    parts += [part for name, part in inner.named_modules() if name in PROJECTORS]
    # Deduplicated by identity, because AdamW refuses a tied head twice.
    return list({id(weight): weight for part in parts for weight in part.parameters()}.values())


# The label that torch's cross-entropy ignores.
IGNORED = -100


class TrainingExamples:
    """Tokenises conversations for one processor; the loss covers answers and their end tokens."""

    def __init__(self, processor: Processor, longest: int, system: str | None = None) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._longest = longest
        self._system = system

    def batch(self, talks: Sequence[Conversation]) -> dict[str, Tensor]:
        """Return the network's inputs with `labels` [B, S], padded on the right.

        Raises:
            UserError: a conversation is longer than `longest`, or the chat template is not
                supported.
        """
        prompts = [self._rendered(talk, 0, answered=False) for talk in talks]
        images = [[talk.image] for talk in talks]
        # The processor, which expands the image into its tokens, gets only the prompt before the
        # first answer. Everything after it is text and is tokenised piece by piece, so that answers
        # begin and end at token boundaries.
        first = chat.encode_chats(self._processor, prompts, images, padding=True)
        rows, labels = [], []
        for number, talk in enumerate(talks):
            ids = first["input_ids"][number][first["attention_mask"][number].bool()].tolist()
            targets = [IGNORED] * len(ids)
            for part, is_answer in self._rest(talk):
                ids += part
                targets += part if is_answer else [IGNORED] * len(part)
            rows.append(ids)
            labels.append(targets)
        width = max(map(len, rows))
        if width > self._longest:
            raise UserError(
                f"a conversation has {width} tokens, but longest={self._longest}: raise longest or "
                "remove long conversations from the file"
            )
        padding = [self._tokenizer.pad_token_id] * width
        inputs = {name: value for name, value in first.items() if isinstance(value, Tensor)}
        inputs["input_ids"] = torch.tensor([row + padding[len(row) :] for row in rows])
        inputs["attention_mask"] = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        )
        inputs["labels"] = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])
        if "mm_token_type_ids" in inputs:
            # `mm_token_type_ids` is the modality of each token, 0 for the added text. It is written
            # through the mask, because the processor may have padded on the left.
            types = inputs["mm_token_type_ids"]
            widened = torch.zeros(len(rows), width, dtype=types.dtype)
            for number, mask in enumerate(first["attention_mask"].bool()):
                kept = types[number][mask]
                widened[number, : len(kept)] = kept
            inputs["mm_token_type_ids"] = widened
        return inputs

    def _rest(self, talk: Conversation) -> list[tuple[list[int], bool]]:
        """Return the tokens after the first prompt as pieces (tokens, whether they are answers)."""
        pieces: list[tuple[list[int], bool]] = []
        for turn, (_, answer) in enumerate(talk.turns):
            prompt = self._rendered(talk, turn, answered=False)
            rendered = self._rendered(talk, turn, answered=True)
            if not rendered.startswith(prompt + answer):
                raise UserError(
                    "the chat template of this model does not place an answer directly after its "
                    "prompt, so training labels cannot be determined: choose a different model"
                )
            # The end token is learned, so that generation stops. The line break that templates add
            # after it belongs to the next prompt.
            end = rendered[len(prompt) + len(answer) :]
            pieces.append((self._encode(answer + end.rstrip("\n")), True))
            if turn + 1 < len(talk.turns):
                following = self._rendered(talk, turn + 1, answered=False)
                gap = following[len(prompt) + len(answer) + len(end.rstrip("\n")) :]
                pieces.append((self._encode(gap), False))
        return pieces

    def _rendered(self, talk: Conversation, turn: int, *, answered: bool) -> str:
        """Render the conversation up to a turn, with its answer if `answered`."""
        last = talk.turns[turn]
        turns = [*talk.turns[:turn], last if answered else (last[0], None)]
        return chat.render_chat(self._processor, turns, images=1, system=self._system)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class FineTuningState:
    """Trained weights, AdamW's moments, the learning-rate schedule, and the losses so far."""

    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    losses: list[float] = field(default_factory=list)

    def checkpoint(self) -> Checkpoint:
        """Return the state as tensors and JSON values; the number of losses is the step."""
        tensors = checkpoint.prefixed_tensors(
            weights={str(number): weight for number, weight in enumerate(self.trained)},
            optimizer=checkpoint.optimizer_tensors(self.optimizer),
        )
        return Checkpoint(len(self.losses), tensors, {"losses": self.losses})

    @torch.no_grad()
    def resume(self, saved: Checkpoint) -> None:
        """Restore the state of an interrupted training."""
        for number, weight in saved.tensors_of("weights").items():
            self.trained[int(number)].copy_(weight)
        checkpoint.load_optimizer(self.optimizer, saved.tensors_of("optimizer"))
        self.losses = saved.state["losses"]
        # Only the step is stored, since rates are a function of it. Setting `last_epoch` does not
        # change the optimizer's rates, so they are set below.
        self.schedule.last_epoch = saved.step
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            group["lr"] = rate

    def _rates(self) -> list[float]:
        """Return the scheduled learning rates of the next step."""
        functions = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        return [float(rate) * function(self.schedule.last_epoch) for rate, function in functions]
