"""One pruning step of a plan, the sizes that determine its cost, and the time it takes."""

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

# Arguments: the inputs of a step, and the number of tokens that each frame keeps, [I].
ChooseTokens = Callable[[SelectionInputs, Tensor], TokenSelection]


@dataclass(frozen=True)
class SelectionSizes:
    """Input sizes of a pruning step, from which its cost is computed.

    Every frame has `counts` tokens, of which `kept` are kept. In each of the `samples`, a text row
    can attend to `keys` rows, of which `text` are text. `question_rows` is the number of text rows
    after the last image, and `input_visual_rows` the number of visual rows that entered the
    decoder; both are maxima over samples. In the preceding layer, `heads` of the `query_heads`
    heads, of width `head_dim`, attend to visual tokens, with keys of `groups` heads. `width` is
    d_model. `tower` is None unless the vision tower is recorded.
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
    """One point of the plan at which visual tokens are removed permanently.

    The step runs after `after` layers; 0 is before the decoder. Every frame keeps at most `quota`
    tokens, which `choose` selects; frames that do not exceed their quota are left unchanged. An
    `adaptive` step chooses in every frame and decides itself how many tokens to keep, up to
    `quota`. A step that `weighs` makes tokens stand for several in attention.

    With `renumbers`, the remaining tokens get new positions without gaps, as if the removed ones
    had never existed; otherwise tokens keep their positions. `attention` requests the queries and
    keys of the preceding layer, `reads_tower` the outputs of the vision tower. `name` is used in
    messages. `macs` counts the multiply-adds of the choice itself; None means unknown.
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

    On a GPU the time is exact only if `synchronized`.
    """

    seconds: float = 0.0
    steps: int = 0
    synchronized: bool = False

    def reset(self) -> None:
        """Set seconds and number to zero."""
        self.seconds, self.steps = 0.0, 0

    @contextmanager
    def measured(self) -> Iterator[SelectionOverhead]:
        """Reset, and synchronise with the device around all pruning steps in the `with` block."""
        self.reset()
        before, self.synchronized = self.synchronized, True
        try:
            yield self
        finally:
            self.synchronized = before

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Add the time of the `with` block as one pruning step."""
        self._wait(device)
        start = time.perf_counter()
        yield
        self._wait(device)
        self.seconds += time.perf_counter() - start
        self.steps += 1

    def _wait(self, device: torch.device) -> None:
        # Off by default, because waiting for the device slows down the prefill.
        if self.synchronized:
            synchronize(device)
