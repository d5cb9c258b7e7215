"""Scores of micro_moe: accuracy on each task of the world, and perplexity on English."""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bench.data import english, world

_BATCH = 64
_IGNORED = -100
# Tasks reported as acc; the others are reported as acc_norm (log-probability per character).
_PLAIN = frozenset({"boolq", "rte", "winogrande"})


def log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
) -> list[float]:
    """Return the log-probability of each continuation given its context."""
    contexts = tokenizer([context for context, _ in pairs])["input_ids"]
    # Context and continuation are encoded together, as lm-eval does; the number of context tokens
    # is where the continuation starts.
    wholes = tokenizer([context + continuation for context, continuation in pairs])["input_ids"]
    # Rows of like length share a batch, so little of it is padding. Padding is on the right, where
    # causal attention does not see it.
    order = sorted(range(len(pairs)), key=lambda i: len(wholes[i]))
    scores = [0.0] * len(pairs)
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        found = _score(model, [wholes[i] for i in rows], [len(contexts[i]) for i in rows])
        for i, score in zip(rows, found, strict=True):
            scores[i] = score
    return scores


@torch.no_grad()
def _score(model: PreTrainedModel, sequences: list[list[int]], prefixes: list[int]) -> list[float]:
    """Sum the log-probabilities of the tokens of each sequence after its prefix."""
    width = max(map(len, sequences))
    targets = torch.full((len(sequences), width), _IGNORED)
    tokens = torch.zeros_like(targets)
    for row, (sequence, prefix) in enumerate(zip(sequences, prefixes, strict=True)):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        targets[row, prefix : len(sequence)] = tokens[row, prefix : len(sequence)]
    logits = model(input_ids=tokens).logits[:, :-1].float()
    losses = cross_entropy(
        logits.transpose(1, 2), targets[:, 1:], reduction="none", ignore_index=_IGNORED
    )
    return (-losses.sum(dim=1)).tolist()


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    documents: Sequence[world.Document],
) -> float:
    """Return the fraction of correct answers: ``acc`` or ``acc_norm``, as usual for the task."""
    prompts = [world.render(task, document) for document in documents]
    pairs = [pair for prompt in prompts for pair in prompt.choices]
    scores = iter(log_probabilities(model, tokenizer, pairs))
    right = 0
    for prompt in prompts:
        lengths = [1] * len(prompt.lengths) if task in _PLAIN else prompt.lengths
        values = [next(scores) / length for length in lengths]
        right += values.index(max(values)) == prompt.gold
    return right / len(prompts)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, width: int = 512
) -> float:
    """Return the perplexity on the English test text, in windows of ``width`` tokens."""
    stream = torch.tensor(tokenizer(english.test_text(), verbose=False)["input_ids"])
    windows = stream[: len(stream) // width * width].view(-1, width)
    total, count = 0.0, 0
    for window in windows.split(4):
        logits = model(input_ids=window).logits[:, :-1].float()
        total += float(cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="sum"))
        count += window[:, 1:].numel()
    return math.exp(total / count)
