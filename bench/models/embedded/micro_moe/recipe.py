"""Recipe of micro_moe: ``python -m bench.models.embedded.micro_moe.recipe --out DIR``.

A Qwen2-MoE of a few million parameters reads the closed world (prose that states every fact, and
the training questions of the nine tasks) and the English training pages. The folder it writes is a
complete Hugging Face model plus ``training.json``, the log of the run.
"""

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from bench.data import calibration
from bench.data.synthetic.world import entities, question_sets
from bench.models.embedded.training import (
    END,
    PAD,
    StepLimits,
    adamw,
    byte_level_bpe,
    one_cycle,
    optimizer_steps,
    training_log,
    write_training_log,
)

LIBRARIES = ("torch", "transformers", "tokenizers")
_BATCH = 64
_IGNORED = -100

# GPT-2's pre-tokenization, but with numbers of at most three digits.
_WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Tasks reported as acc; the others are reported as acc_norm (log-probability per character).
_ACC_TASKS = frozenset({"boolq", "rte", "winogrande"})


@dataclass(frozen=True)
class MicroMoeRecipe:
    """Everything that determines the result besides the seed of the world."""

    seed: int = 7
    vocabulary: int = 2048
    steps: int = 1800
    world_rows: int = 32
    world_width: int = 128
    english_rows: int = 1
    english_width: int = 512
    english_weight: float = 0.3
    question_weight: float = 0.25
    answer_weight: float = 4.0
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    balance_weight: float = 0.01
    log_every: int = 50


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


def new_model(settings: MicroMoeRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    """Return an untrained model: 16 routed experts, 4 of them active, and one shared expert."""
    config = Qwen2MoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
        initializer_range=0.05,
    )
    # Most rows are short, and for them eager attention is faster than SDPA on a CPU.
    return Qwen2MoeForCausalLM._from_config(config, attn_implementation="eager")


def language_model_loss(
    model: Qwen2MoeForCausalLM, batch: WeightedRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted language-modelling loss and the load-balancing loss."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=batch.tokens, output_router_logits=True)
    logits, targets = output.logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten()
    weights = batch.weights[:, 1:].flatten()
    losses = cross_entropy(logits.float(), targets, reduction="none")
    # Per layer and averaged: over all layers at once, an expert idle in one layer could be made up
    # for by a busy one of the same index in another.
    balance = [
        load_balancing_loss_func((router.float(),), model.num_experts, model.num_experts_per_tok)
        for router in output.router_logits
    ]
    return (losses * weights).sum() / weights.sum(), torch.stack(balance).mean()


def train(
    model: Qwen2MoeForCausalLM,
    world_text: Iterator[WeightedRows],
    english_text: Iterator[WeightedRows],
    settings: MicroMoeRecipe,
) -> list[dict[str, float]]:
    """Train the model in place; return the loss curve."""
    optimizer = adamw(model, settings.learning_rate, settings.weight_decay)
    schedule = one_cycle(optimizer, settings.learning_rate, settings.steps, settings.warmup_share)
    curve = []
    for step in optimizer_steps(
        model, optimizer, schedule, StepLimits(settings.steps), max_norm=1.0
    ):
        world_loss, world_balance = language_model_loss(model, next(world_text))
        # Two backward passes per step: rows of 128 and 512 tokens in one batch would be mostly
        # padding, and one graph at a time is in memory.
        (world_loss + settings.balance_weight * world_balance).backward()
        english_loss, english_balance = language_model_loss(model, next(english_text))
        balance = settings.balance_weight * english_balance
        (settings.english_weight * english_loss + balance).backward()
        if step.number % settings.log_every == 0 or step.is_last:
            losses = {
                "world_loss": round(world_loss.item(), 4),
                "english_loss": round(english_loss.item(), 4),
                "balance": round(world_balance.item(), 4),
            }
            curve.append({"step": step.number, **losses})
            print(f"{step.seconds:6.0f} s", curve[-1], flush=True)
    return curve


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


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    documents: Sequence[entities.WorldDocument],
) -> float:
    """Return the fraction of correct answers: ``acc`` or ``acc_norm``, as usual for the task."""
    prompts = [entities.render_question(task, document) for document in documents]
    pairs = [pair for prompt in prompts for pair in prompt.choices]
    scores = iter(log_probabilities(model, tokenizer, pairs))
    right = 0
    for prompt in prompts:
        lengths = [1] * len(prompt.lengths) if task in _ACC_TASKS else prompt.lengths
        values = [next(scores) / length for length in lengths]
        right += values.index(max(values)) == prompt.gold
    return right / len(prompts)


@torch.no_grad()
def english_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, width: int = 512
) -> float:
    """Return the perplexity on the English test text, in windows of ``width`` tokens."""
    stream = torch.tensor(tokenizer(calibration.test_text(), verbose=False)["input_ids"])
    windows = stream[: len(stream) // width * width].view(-1, width)
    total, count = 0.0, 0
    for window in windows.split(4):
        logits = model(input_ids=window).logits[:, :-1].float()
        total += float(cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="sum"))
        count += window[:, 1:].numel()
    return math.exp(total / count)


def score_model(
    model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, object]:
    """Score the model on the test questions and on the English test pages."""
    model.eval()
    accuracies = {}
    for task in question_sets.TASKS:
        accuracies[task] = task_accuracy(
            model, tokenizer, task, question_sets.documents(task, "test")
        )
        print(f"{task:14} {accuracies[task]:.4f}", flush=True)
    perplexity = english_perplexity(model, tokenizer)
    print(f"English perplexity {perplexity:.2f}", flush=True)
    return {"accuracy": accuracies, "english_perplexity": round(perplexity, 3)}


def train_and_save(folder: Path, settings: MicroMoeRecipe) -> None:
    """Train, save, score what was saved, and write the log."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    documents = training_documents(question_sets.SEED)
    tokenizer = train_tokenizer(documents, settings.vocabulary)
    model = new_model(settings, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(documents):,} documents", flush=True)
    world_text = world_batches(
        tokenizer,
        documents,
        rng,
        rows=settings.world_rows,
        width=settings.world_width,
        question_weights=(settings.question_weight, settings.answer_weight),
    )
    english_text = english_batches(
        tokenizer, rng, rows=settings.english_rows, width=settings.english_width
    )
    started = time.monotonic()
    curve = train(model, world_text, english_text, settings)
    log = training_log(settings, model, time.monotonic() - started, LIBRARIES)
    log["world"] = {"seed": question_sets.SEED, "fingerprint": question_sets.fingerprint()}
    log["english"] = {"fingerprint": calibration.fingerprint()}
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Scored as users load it: after the rounding to bfloat16, and through the files.
    saved = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    write_training_log(folder, log | {"results": score_model(saved, tokenizer), "curve": curve})


def main() -> None:
    """Parse the command line and run the recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=MicroMoeRecipe.steps)
    arguments = parser.parse_args()
    train_and_save(arguments.out, MicroMoeRecipe(steps=arguments.steps))


if __name__ == "__main__":
    main()
