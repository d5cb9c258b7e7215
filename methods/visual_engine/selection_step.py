"""One pruning step of a plan, the sizes from which its own cost is counted, and its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.device.devices import synchronize
from bench.models.vlm.vision_tower import TowerSizes
from methods.visual_engine.selection_inputs import SelectionInputs, TokenSelection
from methods.visual_engine.settings import Quota

# From the inputs of a step, and the number of tokens that each frame keeps [I], to those that stay.
ChooseTokens = Callable[[SelectionInputs, Tensor], TokenSelection]


@dataclass(frozen=True)
class SelectionSizes:
    """Input sizes of a pruning step: `counts` tokens of each frame, of which `kept` stay.

    A text row of one of the `samples` has `keys` text and visual rows to attend to, `text` of them
    text. `question_rows` is the number of text rows after the last image, `input_visual_rows` that
    of visual rows that entered the decoder, both of the sample that has most. `heads` heads of
    width `head_dim` attend to visual tokens in the preceding layer, of `query_heads` in all, whose
    keys are of `groups` heads; `width` is d_model. `tower` is None unless the vision tower is
    recorded.
    """

    counts: tuple[int, ...]
    kept: tuple[int, ...]
    samples: int
    keys: int
    text: int
    question_rows: int
    input_visual_rows: int
    heads: int
    query_heads: int
    groups: int
    head_dim: int
    width: int
    tower: TowerSizes | None

    @property
    def pairs(self) -> int:
        """Number of token pairs in frames padded to one length."""
        return len(self.counts) * max(self.counts) ** 2

    @property
    def row_macs(self) -> int:
        """Multiply-adds of q · k for one text row per sample against all keys, in all heads."""
        return self.samples * self.heads * self.keys * self.head_dim


@dataclass(frozen=True)
class TokenPruningStep:
    """One point of the plan at which visual tokens are removed for good.

    It is carried out when `after` layers have run, 0 being before the decoder. Every frame keeps
    `quota` tokens or fewer, chosen by `choose`; a frame that has no more than its quota is left
    unchanged. `attention` requests the queries and keys of the preceding layer, `reads_tower` the
    outputs of the vision tower; `name` is for messages. `macs` counts the multiply-adds of the
    choice itself; None means unknown. With `renumbers`, the positions of what is left close the
    gaps from here on, as if the removed tokens had never been; otherwise every token keeps its own.
    An `adaptive` step chooses in every frame, and the number that stays is what it returns; `quota`
    is then the most that can be. A step that `weighs` lets a token count for several in attention.
    """

    name: str
    after: int
    quota: Quota
    choose: ChooseTokens
    attention: bool = False
    reads_tower: bool = False
    macs: Callable[[SelectionSizes], float] | None = None
    renumbers: bool = False
    adaptive: bool = False
    weighs: bool = False


@dataclass
class SelectionOverhead:
    """Seconds spent in pruning steps, and their number, since the last `reset`.

    Exact only if `synchronized`: otherwise a GPU may still be working when the clock stops.
    """

    seconds: float = 0.0
    steps: int = 0
    synchronized: bool = False

    def reset(self) -> None:
        """Set both to zero."""
        self.seconds, self.steps = 0.0, 0

    @contextmanager
    def measured(self) -> Iterator[SelectionOverhead]:
        """Reset, and synchronise with the device around every pruning step inside the block."""
        self.reset()
        before, self.synchronized = self.synchronized, True
        try:
            yield self
        finally:
            self.synchronized = before

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Add the time of the block as one pruning step."""
        self._wait(device)
        start = time.perf_counter()
        yield
        self._wait(device)
        self.seconds += time.perf_counter() - start
        self.steps += 1

    def _wait(self, device: torch.device) -> None:
        # Off by default: waiting for the device at every step would slow down the prefill that is
        # being measured.
        if self.synchronized:
            synchronize(device)
