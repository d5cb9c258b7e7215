"""Fine-tuning as a method: the network is trained with all earlier methods of the run active."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from bench.data import conversations
from bench.data.conversations import Conversations
from bench.errors import UserError
from bench.method import Context, Method, MethodReport
from bench.models.anatomy import Anatomy
from bench.models.model import Model
from bench.models.multimodal import FAMILIES
from methods.checkpoint import Keeper
from methods.visual_tokens.fine_tuning.examples import Examples
from methods.visual_tokens.fine_tuning.state import State


class VisualFineTuning(Method):
    """Train projector and language model on conversations about images; the tower stays frozen.

    The defaults are LLaVA-1.5's second stage, which the paper runs with all its strategies active
    (one epoch, 2e-5 with a cosine and 3 % of warm-up, no weight decay, 128 conversations per step).
    `data=llava` reads `path`, a JSON file in LLaVA's layout, and its images below `images`;
    `embedded` draws `count` scenes. `batch` conversations are processed at a time, and `batch`
    times `accumulate` make a step. `steps` limits the number of steps.

    Master weights, gradients and AdamW's two moments are float32 on one device: 16 bytes per
    trained weight, 112 GB for seven billion, and three quarters of that in a checkpoint, from which
    an interrupted run resumes. Nothing is sharded.
    """

    data: Literal["llava", "embedded"] = "llava"
    path: str | None = None
    images: str | None = None
    count: int = Field(default=512, ge=1)
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
            raise ValueError("data=llava needs path and images, data=embedded takes neither")
        return self

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model without images."""
        if anatomy.model_type not in FAMILIES:
            raise UserError(
                f"visual_finetune trains on images, but {anatomy.architecture} is not a "
                f"vision-language model that is supported: {', '.join(sorted(FAMILIES))}"
            )

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Train; the report has the loss of every step and the fingerprint of the data.

        Raises:
            UserError: there are too few conversations, or the loss diverges.
        """
        talks = self._talks(context.seed)
        total = min(self.steps or 10**9, self.epochs * (len(talks) // self._a_step))
        if total == 0:
            raise UserError(
                f"visual_finetune: {len(talks)} conversations are fewer than the "
                f"{self._a_step} of one step; lower batch or accumulate"
            )
        trained = trainable(model.network)
        with torch.enable_grad():
            losses = self._train(model, talks, trained, total, context)
        for weight in model.network.parameters():
            weight.requires_grad_(False)
            weight.grad = None
        model.network.eval()
        details = {
            "conversations": talks.fingerprint,
            "trained_parameters": sum(weight.numel() for weight in trained),
            "steps": total,
            "losses": [round(loss, 5) for loss in losses],
        }
        return MethodReport("none", details)

    @property
    def _a_step(self) -> int:
        return self.batch * self.accumulate

    def _talks(self, seed: int) -> Conversations:
        if self.data == "embedded":
            return conversations.embedded(self.count, seed)
        return conversations.from_file(str(self.path), str(self.images))

    def _train(
        self,
        model: Model,
        talks: Conversations,
        trained: list[nn.Parameter],
        total: int,
        context: Context,
    ) -> list[float]:
        """Return the mean loss of each step."""
        from transformers import get_cosine_schedule_with_warmup

        dtype = trained[0].dtype
        for weight in trained:
            # Steps of 2e-5 vanish in bfloat16, so weights are trained in float32. Assigning `.data`
            # does not raise `_version`, by which cached slices notice a change.
            weight.data = weight.data.float()
            torch.autograd.graph.increment_version(weight)
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            trained, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.warmup * total), total)
        examples = Examples(model.processor, self.longest, model.config.system_prompt)
        keeper = Keeper(context.folder, context.progress)
        state = State(trained, optimizer, schedule)
        if (saved := keeper.last()) is not None:
            state.go_on(saved)
        done = len(state.losses)
        # The order of batches depends on the seed alone, so a resumed run skips what was used and
        # sees the same batches as an uninterrupted one.
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
                raise UserError("visual_finetune: the loss is not finite; lower learning_rate")
            state.losses.append(loss)
            keeper.keep_if_due(state.checkpoint)
        keeper.keep(state.checkpoint)
        for weight in trained:
            weight.data = weight.data.to(dtype)
            # Weight slices cached before this change must be refreshed.
            torch.autograd.graph.increment_version(weight)
        return state.losses

    def _loss(self, model: Model, call: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the mean loss on the answers of one batch; half precision runs under autocast."""
        moved = {name: value.to(model.device) for name, value in call.items()}
        half = dtype != torch.float32
        with torch.autocast(model.device.type, dtype if half else torch.bfloat16, enabled=half):
            loss: Tensor = cast(Any, model.network)(**moved, use_cache=False).loss
        return loss

    def _batches(self, talks: Conversations, seed: int) -> Iterator[list[int]]:
        """Yield the numbers of each batch, in an order determined by the seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(talks), generator=generator)
            for start in range(0, len(talks) - self.batch + 1, self.batch):
                yield order[start : start + self.batch].tolist()


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of projector, language model and head, each once."""
    inner = cast(Any, network).model
    parts = [inner.language_model, cast(Any, network).lm_head]
    if hasattr(inner, "multi_modal_projector"):
        parts.append(inner.multi_modal_projector)
    elif hasattr(inner.visual, "merger"):
        parts.append(inner.visual.merger)
    # By identity: a head tied to the embeddings is one weight, and AdamW refuses duplicates.
    return list({id(weight): weight for part in parts for weight in part.parameters()}.values())
