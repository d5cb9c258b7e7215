"""Pruning steps recorded in a running network, and what they removed for the masked reference."""

from dataclasses import dataclass, replace

import torch

from bench.method import Context
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.token_pruning.cdpruner import CDPruner
from methods.token_pruning.controls import Downsample, RandomTokens
from methods.token_pruning.dart import DART
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.fastv import FastV
from methods.token_pruning.pact import PACT
from methods.token_pruning.prumerge_plus import PruMerge, PruMergePlus
from methods.token_pruning.pyramid_drop import PyramidDrop
from methods.token_pruning.scope import SCOPE
from methods.token_pruning.sparsevlm import SparseVLM
from methods.token_pruning.visionzip import VisionZip
from methods.token_pruning.vscan import VScan
from methods.visual_engine.decoder import visual_engine_of
from tests.methods.visual_engine.masked_reference import Removal
from tests.methods.visual_engine.tiny_mllms import build

# Every method with settings that prune hard in four layers and a dozen tokens.
METHODS = {
    "fastv": FastV(after=1, keep=5, average=None),
    "pyramid_drop": PyramidDrop(),
    "sparsevlm": SparseVLM(layers=(1, 2), keep=(0.6, 0.25)),
    "visionzip": VisionZip(keep=6, contextual=0.34),
    "prumerge_plus": PruMergePlus(keep=5, neighbours=3),
    "dart": DART(after=2, keep=7, average=None, visual_pivots=2, text_pivots=2),
    "divprune": DivPrune(keep=0.4),
    "cdpruner": CDPruner(keep=5),
    "scope": SCOPE(keep=5),
    "random_tokens": RandomTokens(keep=0.4),
    "downsample": Downsample(keep=6),
}
# The image decides how many tokens stay, or several layers of one kind of tower are read.
LLAVA_METHODS = {
    "pact": PACT(after=2, keep=0.6, cutoff=0.3),
    "prumerge": PruMerge(neighbours=3),
    "prumerge_release": PruMerge(neighbours=3, variant="release"),
    "prumerge_plus_adaptive": PruMergePlus(keep="adaptive", neighbours=3, variant="release"),
    "sparsevlm_by_rank": SparseVLM(layers=(1, 2), rank_factor=0.7),
    "vscan": VScan(keep=9, then=4, windows=2, local_layer=1.0),
}
CONTEXT = Context(seed=3)


def loaded(name, **changes):
    config = ModelConfig(name="tiny", source="embedded:tiny")
    return Model(config, build(name, **changes), None, "", None, torch.device("cpu"))


def applied(name, *methods, **changes):
    """A network of one architecture with some methods, and its engine."""
    model = loaded(name, **changes)
    for method in methods:
        method.apply(model, CONTEXT)
    return model.network, visual_engine_of(model.network)


@dataclass
class RecordedStep:
    """One pruning step: its inputs, its budget and its choice."""

    after: int
    inputs: object
    keep: torch.Tensor
    choice: object
    adaptive: bool


def record_steps(engine):
    """Record every pruning step from now on in the list that is returned."""
    seen = []

    def recorded(step):
        def choose(inputs, keep):
            choice = step.choose(inputs, keep)
            seen.append(RecordedStep(step.after, inputs, keep, choice, step.adaptive))
            return choice

        return replace(step, choose=choose)

    engine.plan.steps = [recorded(step) for step in engine.plan.steps]
    return seen


def removals(seen, shape, width=32):
    """Tokens that the steps of one prefill [B, S] removed and replaced, for the reference."""
    found = []
    for each in seen:
        inputs, choice = each.inputs, each.choice
        frames = inputs.frames
        untouched = each.keep >= torch.tensor(frames.counts)
        if each.adaptive:
            untouched = torch.zeros_like(untouched)
        keep = choice.keep_IM | untouched[:, None]
        gone = torch.zeros(shape, dtype=torch.bool)
        states = torch.full((*shape, width), torch.nan)
        changed, weight = choice.changed_IM, torch.ones(shape)
        for frame, count in enumerate(frames.counts):
            for token in range(count):
                row, sample = frames.index_IM[frame, token], frames.sample_I[frame]
                place = inputs.visual.index_BR.flatten()[row]
                gone[sample, place] = not keep[frame, token]
                if changed is not None and changed[frame, token] and not untouched[frame]:
                    states[sample, place] = choice.states_IMD[frame, token]
                if choice.weight_IM is not None:
                    weight[sample, place] = choice.weight_IM[frame, token]
        found.append(Removal(each.after, gone, states, weight))
    return found
