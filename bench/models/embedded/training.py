"""Tokenizer, optimizer, schedules, loop and log of the embedded models' recipes."""

from __future__ import annotations

import importlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn, optim

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from tokenizers import Tokenizer

END = "<|end|>"
PAD = "<|pad|>"
LOG_FILE = "training.json"

# Sets the learning rate of a step, given the completed fraction of the training.
Schedule = Callable[[float], None]


class TrainingStep(NamedTuple):
    """One step: its number from 1, the seconds elapsed before it, and whether it is the last."""

    number: int
    seconds: float
    is_last: bool


@dataclass(frozen=True)
class StepLimits:
    """Duration of a training: it ends after `steps` or `minutes`, whichever comes first."""

    steps: int
    minutes: float = math.inf


def optimizer_steps(
    network: nn.Module,
    optimizer: optim.Optimizer,
    schedule: Schedule,
    limits: StepLimits,
    max_norm: float = math.inf,
) -> Iterator[TrainingStep]:
    """Yield steps with zero gradients; the caller computes gradients, then the step is taken.

    Gradients are clipped to `max_norm`. The schedule follows the larger of the completed fractions
    of steps and minutes.
    """
    started = time.monotonic()
    network.train()
    for number in range(1, limits.steps + 1):
        seconds = time.monotonic() - started
        progress = max(number / limits.steps, seconds / 60 / limits.minutes)
        schedule(progress)
        optimizer.zero_grad()
        yield TrainingStep(number, seconds, progress >= 1)
        if math.isfinite(max_norm):
            nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        if progress >= 1:
            break


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> optim.AdamW:
    """Return AdamW over the trainable weights, with decay on matrices only."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # Decay would pull gains towards 0, while their neutral value is 1.
    groups = [
        {"params": [w for w in trained if w.ndim >= 2], "weight_decay": weight_decay},
        {"params": [w for w in trained if w.ndim < 2], "weight_decay": 0.0},
    ]
    return optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def one_cycle(
    optimizer: optim.Optimizer, learning_rate: float, steps: int, warmup_share: float
) -> Schedule:
    """Return torch's one-cycle schedule, which counts steps and must be called for every one."""
    scheduler = optim.lr_scheduler.OneCycleLR(
        optimizer,
        learning_rate,
        total_steps=steps,
        pct_start=warmup_share,
        # By default, OneCycleLR cycles the momentum and overrides the optimizer's own.
        cycle_momentum=False,
    )
    # The constructor has set the learning rate of the first step.
    is_first = True

    def advance(_: float) -> None:
        nonlocal is_first
        if not is_first:
            scheduler.step()
        is_first = False

    return advance


def warmup_cosine(
    optimizer: optim.Optimizer, learning_rate: float, warmup_share: float
) -> Schedule:
    """Return a schedule that depends only on progress, for trainings with a time limit."""

    def set_rate(progress: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine_rate(progress, learning_rate, warmup_share)

    return set_rate


def warmup_cosine_rate(progress: float, learning_rate: float, warmup_share: float) -> float:
    """Return the rate at a fraction of the training: linear warm-up, then half a cosine to zero."""
    if progress < warmup_share:
        return learning_rate * progress / warmup_share
    decayed = (progress - warmup_share) / (1 - warmup_share)
    return learning_rate * (1 + math.cos(math.pi * min(decayed, 1.0))) / 2


def byte_level_bpe(
    texts: Iterable[str], vocabulary: int, words: str, special_tokens: Sequence[str]
) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can encode any text; tokens do not cross `words`.

    `words` is a regular expression in the syntax of `tokenizers`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_log(
    settings: DataclassInstance, network: nn.Module, seconds: float, libraries: Sequence[str]
) -> dict[str, object]:
    """Return a description of a training: settings, size, library versions and duration."""
    versions = {name: str(importlib.import_module(name).__version__) for name in libraries}
    return {
        "settings": asdict(settings),
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "versions": {"python": platform.python_version(), **versions},
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
    }


def write_training_log(folder: Path, log: dict[str, object]) -> None:
    """Write the log next to the weights."""
    (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
