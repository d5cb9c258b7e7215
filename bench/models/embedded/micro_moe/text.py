"""Training text of micro_moe: tokenizer, and batches of the world's documents and of English."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from bench.data import calibration
from bench.data.synthetic.world import entities, question_sets
from bench.models.embedded.training import END, PAD, byte_level_bpe

_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class WeightedRows(NamedTuple):
    """Token ids in rows of one length, and the weight of each token in the loss."""

    tokens: torch.Tensor
    weights: torch.Tensor


class TrainingDocument(NamedTuple):
    """A document of the world in two parts; only questions have an ``answer``."""

    context: str
    answer: str = ""


def training_documents(seed: int) -> list[TrainingDocument]:
    """Return all training documents of the world."""
    found = [TrainingDocument(text) for text in question_sets.prose_texts(seed)]
    for task in question_sets.TASKS:
        prompts = (
            entities.render_question(task, doc)
            for doc in question_sets.documents(task, "train", seed)
        )
        found += [TrainingDocument(*prompt.choices[prompt.gold]) for prompt in prompts]
    return found


def train_tokenizer(
    documents: Iterable[TrainingDocument], vocabulary: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; any text round-trips, and small numbers are one token."""
    # Repeated often enough that BPE merges every number below 100 into one token.
    numbers = [" ".join(map(str, range(100)))] * 1000
    texts = [context + answer for context, answer in documents]
    everything = [*texts, calibration.train_text(), *numbers]
    tokenizer = byte_level_bpe(everything, vocabulary, _WORDS, [END, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=1024
    )


def world_batches(
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[TrainingDocument],
    rng: random.Random,
    *,
    rows: int,
    width: int,
    question_weights: tuple[float, float],
) -> Iterator[WeightedRows]:
    """Yield batches of documents packed into rows, epoch after epoch without end.

    Each row starts with the start of a document, as questions do when they are scored.
    ``question_weights`` are those of a question's context and of its answer.
    """
    encoded = list(_encode_documents(tokenizer, documents, question_weights))
    waiting: list[_WeightedTokens] = []
    while True:
        # Packing follows the shuffle, so that documents have different neighbours in each epoch.
        rng.shuffle(encoded)
        waiting += _pack_rows(encoded, width)
        while len(waiting) >= rows:
            batch, waiting = waiting[:rows], waiting[rows:]
            tokens = torch.tensor([row.tokens for row in batch])
            yield WeightedRows(tokens, torch.tensor([row.weights for row in batch]))


class _WeightedTokens(NamedTuple):
    tokens: list[int]
    weights: list[float]


def _encode_documents(
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[TrainingDocument],
    question_weights: tuple[float, float],
) -> Iterator[_WeightedTokens]:
    contexts = tokenizer([piece.context for piece in documents])["input_ids"]
    answers = tokenizer([piece.answer + END for piece in documents])["input_ids"]
    for piece, context, answer in zip(documents, contexts, answers, strict=True):
        before, after = question_weights if piece.answer else (1.0, 1.0)
        yield _WeightedTokens(context + answer, [before] * len(context) + [after] * len(answer))


def _pack_rows(encoded: Iterable[_WeightedTokens], width: int) -> Iterator[_WeightedTokens]:
    """Join documents into rows of ``width`` tokens; the excess of the last document is cut."""
    tokens: list[int] = []
    weights: list[float] = []
    for row in encoded:
        tokens, weights = tokens + row.tokens, weights + row.weights
        if len(tokens) >= width:
            yield _WeightedTokens(tokens[:width], weights[:width])
            # The rest of the document is dropped, not moved to the next row: it would start without
            # its context, which no scored question does.
            tokens, weights = [], []


def english_batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, rows: int, width: int
) -> Iterator[WeightedRows]:
    """Yield batches of windows at random positions of the English training text, without end."""
    stream = torch.tensor(tokenizer(calibration.train_text(), verbose=False)["input_ids"])
    while True:
        starts = [rng.randrange(len(stream) - width) for _ in range(rows)]
        tokens = torch.stack([stream[start : start + width] for start in starts])
        yield WeightedRows(tokens, torch.ones(tokens.shape))
