"""State of one call on its way through the decoder: visual tokens that are left, and masks.

Shapes: B samples, S tokens of the call, T text rows, N visual rows that are left, D d_model, I
frames, V visual tokens of the call in the order in which they were encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.vlm.vision_tower import TowerOutput
from bench.models.vlm.visual_tokens import VisualTokens
from methods.visual_engine.attention import Rotary
from methods.visual_engine.kv_cache import CachedTokens
from methods.visual_engine.layer import CallContext, Streams
from methods.visual_engine.masks import PastPositions, attention_masks
from methods.visual_engine.selection_inputs import InputEmbeddings, SelectionInputs
from methods.visual_engine.selection_step import TokenPruningStep
from methods.visual_engine.settings import Window
from methods.visual_engine.token_index import Cells, Frames, TokenRows, rows_where


@dataclass(frozen=True)
class VisualTokensState:
    """The visual tokens that are left: rows of the call, cells in their frames, angles.

    `stacked` is what DeepStack adds after each of the first layers, [B, N, D] each.
    """

    rows: TokenRows
    cells: Cells
    rotary: Rotary
    stacked: list[Tensor]

    def among(self, chosen: TokenRows) -> VisualTokensState:
        """Keep those at the positions that `chosen` gives, counted among the present ones."""
        rows, index_BN = self.rows.among(chosen), chosen.index_BR
        parts = (self.cells.frame_N, self.cells.row_N, self.cells.column_N)
        frame_BN, row_BN, column_BN = (part.gather(1, index_BN) for part in parts)
        # Padding rows are copies of real ones; frame -1 keeps them out of frames and windows.
        frame_BN = frame_BN.masked_fill(~rows.validity, -1)
        return VisualTokensState(
            rows=rows,
            cells=Cells(frame_BN, row_BN, column_BN),
            rotary=(chosen.take(self.rotary[0]), chosen.take(self.rotary[1])),
            stacked=[chosen.take(each) for each in self.stacked],
        )


class ForwardState:
    """State that all layers of one call share, stage by stage; a pruning step ends a stage.

    `tokens` and `visual` are None in a call without images; `streams` are the decoder's inputs.
    """

    def __init__(
        self,
        text: TokenRows,
        text_rotary: Rotary,
        tokens: VisualTokens | None,
        visual: VisualTokensState | None,
        window: Window | None,
        streams: Streams,
        cache: Any | None,
        offset: int,
    ) -> None:
        self.text, self.text_rotary, self.visual = text, text_rotary, visual
        self.window, self.cache, self.offset = window, cache, offset
        self.cached_tokens: CachedTokens | None = (
            None if cache is None else cache.layers[0].cached_tokens
        )
        self.tokens = tokens
        self.frames: Frames | None = None
        self.whole: tuple[int, ...] = ()
        self.entered: InputEmbeddings | None = None
        if visual is not None and streams.visual_BND is not None:
            self.entered = InputEmbeddings(
                streams.text_BTD, streams.visual_BND, visual.rows.validity
            )
        self.stages: list[TokenRows] = [] if visual is None else [visual.rows]
        self._known: tuple[int, CallContext] | None = None

    def call(self, stage: int) -> CallContext:
        """Return the shared inputs of a stage's layers; stages come in order."""
        if self._known is None or self._known[0] != stage:
            self._known = stage, self._of_stage(stage)
        return self._known[1]

    def _of_stage(self, stage: int) -> CallContext:
        visual = self.visual
        past = (
            None
            if self.cached_tokens is None
            else PastPositions(self.cached_tokens.text, self.cached_tokens.visual[stage])
        )
        rows, cells = (None, None) if visual is None else (visual.rows, visual.cells)
        return CallContext(
            who=attention_masks(self.text, rows, cells, self.window, past, self.offset),
            text_rotary=self.text_rotary,
            visual_rotary=None if visual is None else visual.rotary,
            cache=self.cache,
        )

    def select(
        self,
        selection: TokenPruningStep,
        streams: Streams,
        encoded: Callable[[], TowerOutput | None],
    ) -> Streams:
        """Carry out a pruning step and return the streams without the removed tokens.

        `encoded` reads the outputs of the vision tower.
        """
        if self.visual is None or streams.visual_BND is None:
            return streams
        if self.frames is None:
            self.frames = Frames.of(self.visual.cells)
            self.whole = self.frames.counts
        frames, states_BND = self.frames, streams.visual_BND
        # Quotas are of the number of tokens a frame came with, also after earlier steps. A frame
        # that has no more than its quota is left unchanged, whatever `choose` returns for it.
        counts = zip(self.whole, frames.counts, strict=True)
        kept = [selection.quota.kept(n, m) for n, m in counts]
        untouched = [k >= m for k, m in zip(kept, frames.counts, strict=True)]
        if not all(untouched):
            sight = self._sight(selection, streams, frames, encoded())
            choice = selection.choose(sight, torch.tensor(kept, device=states_BND.device))
            untouched_I = torch.tensor(untouched, device=states_BND.device)
            if choice.changed_IM is not None and choice.states_IMD is not None:
                changed_IM = choice.changed_IM & ~untouched_I[:, None]
                states_BND = frames.put(states_BND, changed_IM, choice.states_IMD)
            chosen = rows_where(frames.spread(choice.keep_IM | untouched_I[:, None]))
            states_BND = chosen.take(states_BND)
            self.visual = self.visual.among(chosen)
            self.frames = Frames.of(self.visual.cells)
        self.stages.append(self.visual.rows)
        # The kept queries and keys belong to the rows before this step. A second step after the
        # same layer must not index them with the new rows; VisualPlan.select refuses such plans.
        return replace(streams, visual_BND=states_BND, ran=None)

    def _sight(
        self,
        selection: TokenPruningStep,
        streams: Streams,
        frames: Frames,
        encoded: TowerOutput | None,
    ) -> SelectionInputs:
        """Collect the inputs of a pruning step."""
        visual, states_BND = self.visual, streams.visual_BND
        assert visual is not None and states_BND is not None and self.entered is not None
        parts = (visual.cells.frame_N, visual.cells.row_N, visual.cells.column_N)
        packed = None
        if encoded is not None and self.tokens is not None:
            order_BS = _encoding_order(self.tokens)
            # Tower outputs come in encoding order, and earlier steps have removed rows: the
            # position of a row in the call leads to its encoding number.
            index_IM = frames.pack(order_BS.gather(1, visual.rows.index_BR))
            packed = replace(
                encoded,
                received_V=encoded.received_V[index_IM],
                keys_VHd=encoded.keys_VHd[index_IM],
                features_VF=encoded.features_VF[index_IM],
            )
        return SelectionInputs(
            name=selection.name,
            frames=frames,
            cells=Cells(*(frames.pack(part) for part in parts)),
            states_IMD=frames.pack(states_BND),
            whole=self.whole,
            visual=visual.rows,
            text=self.text,
            text_BTD=streams.text_BTD,
            entered=self.entered,
            ran=streams.ran,
            encoded=packed,
        )

    def commit_to_cache(self, length: int) -> None:
        """Record the call's `length` tokens in the cache."""
        if self.cached_tokens is None or self.cache is None:
            return
        self.cached_tokens.text = self.cached_tokens.text.extended_by(self.text, self.offset)
        # Per stage, since each layer's cache holds only the visual tokens that reached it. `length`
        # is logical: it includes removed tokens, whose positions later tokens still count.
        for stage, rows in enumerate(self.stages):
            self.cached_tokens.visual[stage] = self.cached_tokens.visual[stage].extended_by(
                rows, self.offset
            )
        for layer in self.cache.layers:
            layer.length = self.offset + length


def all_visual_tokens(
    tokens: VisualTokens, rows: TokenRows, rotary: Rotary, stacked: list[Tensor]
) -> VisualTokensState:
    """Return the state before any pruning."""
    parts = (tokens.frame_BS, tokens.row_BS, tokens.column_BS)
    return VisualTokensState(
        rows, Cells(*(part.gather(1, rows.index_BR) for part in parts)), rotary, stacked
    )


def _encoding_order(tokens: VisualTokens) -> Tensor:
    """Return the number of each visual token among all of the call, frame by frame, [B, S].

    Frames are numbered as they were encoded: images in reading order, then videos.
    """
    # The argsort of an argsort is each element's rank. The tower encodes all images before all
    # videos, whatever their order in the text, so the order of the tokens in the prompt is not that
    # of its outputs; frame numbers are.
    number_V = tokens.frame_BS[tokens.mask].argsort(stable=True).argsort()
    return torch.zeros_like(tokens.frame_BS).masked_scatter(tokens.mask, number_V)


def match_tower_output(encoded: TowerOutput, tokens: VisualTokens) -> TowerOutput:
    """Bring the tower's outputs into the order of a call's tokens, repeating them for beams.

    Raises:
        UserError: the tower encoded different images than the call's.
    """
    counts = tokens.mask.sum(dim=1).tolist()
    found, wanted = len(encoded.received_V), sum(counts)
    if found == wanted:
        return encoded
    # Beam search repeats each sample next to itself, but its images are encoded once. Repeating per
    # sample gives the encoding order only while frame numbers increase along the batch; with images
    # and videos they do not, since all images are encoded first.
    beams = wanted // max(found, 1)
    if bool((tokens.frame_BS[tokens.mask].diff() < 0).any()):
        raise UserError(
            "a method that reads the vision tower cannot follow beams over both images and videos"
        )
    if beams * found != wanted or any(
        len(set(counts[b : b + beams])) > 1 for b in range(0, len(counts), beams)
    ):
        raise UserError(
            f"the vision tower encoded {found} visual tokens, but the call has {wanted}: pass the "
            "pixels in the same call"
        )
    index, start = [], 0
    for count in counts[::beams]:
        index += list(range(start, start + count)) * beams
        start += count
    order_V = torch.tensor(index, device=encoded.received_V.device)
    return replace(
        encoded,
        received_V=encoded.received_V[order_V],
        keys_VHd=encoded.keys_VHd[order_V],
        features_VF=encoded.features_VF[order_V],
    )
