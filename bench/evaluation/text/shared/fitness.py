"""Which networks can be asked by shared beginnings: named refusals, then a try on a few tokens."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from bench.device.memory import is_exhausted
from bench.evaluation.attention import foreign_layers, text_config
from bench.evaluation.budget import TokenBudget
from bench.evaluation.engine import Asked
from bench.evaluation.text.question import Question
from bench.evaluation.text.shared.forward import Forward
from bench.evaluation.text.shared.groves import Grove, Row, Trunk
from bench.evaluation.text.shared.reading import Tally
from bench.evaluation.text.shared.scoring import SharedScorer
from bench.evaluation.text.shared.trie import Trie
from bench.models.model import Model
from bench.progress import SILENT

NEEDED = ("attention_mask", "position_ids", "past_key_values")
ATTENTIONS = ("sdpa", "eager", "flex_attention")
STEM, BRANCH = 6, 8
"""Tokens of the probe: what its two paths share, and what each has for itself."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 0.02
"""How far the probe's sums may differ, relative to themselves; a wrong mask moves them by more."""


def unfit(model: Model) -> str | None:
    """Return why a network must be asked plainly, or None when it need not be."""
    return _named(model.network) or _tried(model)


def _named(network: Any) -> str | None:
    """Refuse what can be seen without a forward."""
    missing = set(NEEDED) - set(inspect.signature(network.forward).parameters)
    if missing:
        return f"the network's forward takes no {min(missing)}"
    if getattr(network, "get_output_embeddings", lambda: None)() is None:
        return "the network has no head that could be given chosen positions only"
    attention = network.config._attn_implementation
    if attention not in ATTENTIONS:
        return f"model.attention={attention} takes no mask for branches"
    foreign = foreign_layers(network)
    return None if foreign is None else f"the network has layers of {foreign}"


def _tried(model: Model) -> str | None:
    """Score two paths apart, as branches of one row, and on a trunk; all must agree."""
    trie = _probe(model)
    alone = Grove(None, [_row(trie, 0, 1, 0), _row(trie, 1, 2, 0)])
    branches = Grove(None, [_row(trie, 0, 2, 0)])
    trunk = Grove(Trunk(None, 0, 2, 0, STEM), [_row(trie, 0, 2, STEM)])
    try:
        wanted = _values(model, trie, alone)
        found = {"in one row": _values(model, trie, branches)}
        found["on a kept beginning"] = _values(model, trie, trunk)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        if isinstance(error, RuntimeError) and is_exhausted(error):
            raise
        reason = str(error).partition("\n")[0]
        return f"the network does not take branches: {type(error).__name__} {reason}"
    network: Any = model.network
    allowed = TOLERANCE.get(network.dtype, HALF_TOLERANCE)
    for how, values in found.items():
        off = float(np.abs(values / wanted - 1).max())
        if not off <= allowed:  # also when it is not a number
            return f"the network answers otherwise {how}: by {off:.2g} of a log-likelihood"
    return None


def _probe(model: Model) -> Trie:
    """Make two paths that share their beginning, of tokens drawn from the vocabulary."""
    draw = np.random.default_rng(0)
    vocabulary = int(text_config(model.network).vocab_size)
    stem = draw.integers(vocabulary, size=STEM).tolist()
    questions = []
    for first in range(2):
        branch = [first, *draw.integers(vocabulary, size=BRANCH).tolist()]
        questions.append(Question(stem + branch[:-1], branch))
    return Trie(questions)


def _values(model: Model, trie: Trie, grove: Grove) -> Any:
    """Return the log-likelihoods of the probe's two paths, computed in a certain way."""
    budget = TokenBudget(4096, model.device, SILENT)
    scorer = SharedScorer(Forward(model.network, model.device), budget, Asked("shared"))
    questions = [Question([], [0] * (BRANCH + 1)) for _ in trie.leaves]
    answers = dict(a for batch in scorer.walk(trie, [grove], Tally(questions)) for a in batch)
    return np.array([answers[number].value for number in sorted(answers)])


def _row(trie: Trie, low: int, high: int, start: int) -> Row:
    return Row(low, high, start, trie.size(low, high, start))
