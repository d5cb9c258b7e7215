"""Check whether a model supports prefix sharing: static checks, then a numerical probe."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from numpy.typing import NDArray

from bench.device.memory import is_out_of_memory
from bench.evaluation.batching import TokenBudget
from bench.evaluation.harness import BackendReport
from bench.evaluation.networks import language_model
from bench.evaluation.text.prefix.forward import Forward
from bench.evaluation.text.prefix.packing import PackedSequence, PrefixGroup, SharedPrefix
from bench.evaluation.text.prefix.scorer import LoglikelihoodAccumulator, PrefixSharingScorer
from bench.evaluation.text.prefix.trie import Trie
from bench.evaluation.text.requests import LoglikelihoodRequest
from bench.models.model import Model
from bench.models.network import non_attention_layer, text_config
from bench.ui import SILENT

REQUIRED_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values")
SUPPORTED_ATTENTION = ("sdpa", "eager", "flex_attention")
PROBE_PREFIX, PROBE_BRANCH = 6, 8
"""Tokens of the probe: in the common prefix of its two paths, and in each branch."""

# In float32 layouts differ only in the order of summation. Half precision rounds activations in
# every layer, and kernels for masked and unmasked attention round differently, which 2 % of a sum
# of nine log-probabilities covers. If a branch attends to another branch's tokens, or positions are
# wrong by a branch, predictions for random tokens change by far more.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 0.02
"""Maximum relative difference of the probe's log-likelihoods; a wrong mask changes them more."""


def unsupported_reason(model: Model) -> str | None:
    """Return why a network needs the padded backend, or None if it supports prefix sharing."""
    return static_reason(model) or _probe_reason(model)


def static_reason(model: Model) -> str | None:
    """Return an obstacle in signature, head, attention or layer types; nothing is computed."""
    network = language_model(model)
    missing = set(REQUIRED_ARGUMENTS) - set(inspect.signature(network.forward).parameters)
    if missing:
        return f"the network's forward has no argument {min(missing)}"
    if getattr(network, "get_output_embeddings", lambda: None)() is None:
        return "the network has no output head that could be restricted to scored positions"
    # FlashAttention supports only causal and padding masks.
    attention = network.config._attn_implementation
    if attention not in SUPPORTED_ATTENTION:
        return f"model.attention={attention} supports no tree attention mask"
    layer = non_attention_layer(model.network)
    return None if layer is None else f"the network has {layer} layers"


def _probe_reason(model: Model) -> str | None:
    """Score two paths separately, in one packed sequence, and after a cached prefix; compare."""
    # A probe instead of a list of architectures: whether a mask and positions are respected depends
    # on the version of transformers, on remote code, on the attention kernel and on changes by
    # methods, and a network that ignores them gives wrong numbers without an error.
    trie = _probe_trie(model)
    of = PackedSequence.of
    separate = PrefixGroup(None, [of(trie, 0, 1, 0), of(trie, 1, 2, 0)])
    layouts = {
        "in a packed sequence": PrefixGroup(None, [of(trie, 0, 2, 0)]),
        "after a cached prefix": PrefixGroup(
            SharedPrefix(None, 0, 2, 0, PROBE_PREFIX), [of(trie, 0, 2, PROBE_PREFIX)]
        ),
    }
    try:
        expected = _probe_loglikelihoods(model, trie, separate)
        found = {where: _probe_loglikelihoods(model, trie, g) for where, g in layouts.items()}
    # Errors of a forward for a mask or cache that it does not expect. Running out of memory says
    # nothing about the network.
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        return f"the network fails on packed sequences: {type(error).__name__} {reason}"
    allowed = TOLERANCE.get(language_model(model).dtype, HALF_TOLERANCE)
    for where, values in found.items():
        difference = float(np.abs(values / expected - 1).max())
        if not difference <= allowed:  # Also true for NaN.
            return f"log-likelihoods differ {where}, by a relative {difference:.2g}"
    return None


def _probe_trie(model: Model) -> Trie:
    """Return two paths with a common prefix, made of random tokens of the vocabulary."""
    draw = np.random.default_rng(0)
    vocabulary = int(text_config(model.network).vocab_size)
    prefix = draw.integers(vocabulary, size=PROBE_PREFIX).tolist()
    requests = []
    for first in range(2):
        # The branches start with tokens 0 and 1, so that they differ exactly from there; other
        # tokens are random, so that no mistake cancels out.
        branch = [first, *draw.integers(vocabulary, size=PROBE_BRANCH).tolist()]
        requests.append(LoglikelihoodRequest(prefix + branch[:-1], branch))
    return Trie(requests)


def _probe_loglikelihoods(model: Model, trie: Trie, group: PrefixGroup) -> NDArray[np.float64]:
    """Return the log-likelihoods of the probe's two paths, computed in one of the three layouts."""
    budget = TokenBudget(4096, model.device, SILENT)
    forward = Forward(language_model(model), model.device)
    scorer = PrefixSharingScorer(forward, budget, BackendReport("prefix_sharing"))
    # Only the number of targets matters here, because the accumulator counts missing ones.
    requests = [LoglikelihoodRequest([], [0] * (PROBE_BRANCH + 1)) for _ in trie.leaves]
    batches = scorer.walk(trie, [group], LoglikelihoodAccumulator(requests))
    results = dict(result for batch in batches for result in batch)
    return np.array([results[index].value for index in sorted(results)])
