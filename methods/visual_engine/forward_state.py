"""State of one call as it passes through the decoder: the visual tokens left, and the masks.

Shapes: B samples, S tokens of the call, T text rows, N visual rows that are left, D d_model, I
frames, M rows of a frame, V visual tokens of the call in the order in which they were encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bench.errors import UserError
from bench.models.vlm.vision_tower import TowerOutput
from bench.models.vlm.visual_tokens import VisualTokens
from methods.visual_engine.attention import Rotary
from methods.visual_engine.kv_cache import (
    CachedTokens,
    CacheSelection,
    key_weights,
    select_cached,
)
from methods.visual_engine.layer import CallContext, Streams
from methods.visual_engine.masks import PastPositions, attention_masks
from methods.visual_engine.selection_inputs import (
    InputEmbeddings,
    LayerQK,
    LayersAhead,
    SelectionInputs,
    TokenSelection,
)
from methods.visual_engine.selection_step import TokenPruningStep
from methods.visual_engine.settings import DecodePruning, Window
from methods.visual_engine.token_index import Cells, Frames, TokenRows, rows_where


@dataclass(frozen=True)
class CallPositions:
    """Positions of a call's tokens, [B or 1, S] or with M-RoPE [3, B or 1, S].

    `rotate` returns cos and sin for such positions.
    """

    value: Tensor
    rotate: Callable[[Tensor], Rotary]

    def angles(self, closed_BS: Tensor | int = 0) -> Rotary:
        """Return the rotation of every token, with `closed_BS` subtracted from its position."""
        return self.rotate(self.value - closed_BS)


@dataclass(frozen=True)
class VisualTokensState:
    """The visual tokens that are left: rows of the call, cells in their frames, angles.

    `origin_BN` is the original position of a row's token in the call, which differs from the
    position of the row if a pruning step has changed the order. `stacked` is what DeepStack adds
    after each of the first layers, [B, N, D] each. `weight_BN` is the number of tokens that each
    one stands for as a key; None means 1.
    """

    rows: TokenRows
    cells: Cells
    rotary: Rotary
    stacked: list[Tensor]
    origin_BN: Tensor
    weight_BN: Tensor | None = None

    def subset(self, chosen: TokenRows) -> VisualTokensState:
        """Keep the tokens at the positions `chosen`, which are counted among the current ones."""
        rows, index_BN = self.rows.subset(chosen), chosen.index_BR
        cells = self.cells.map(lambda part_BN: part_BN.gather(1, index_BN))
        # Padding rows are copies of real ones; frame -1 keeps them out of frames and windows.
        frame_BN = cells.frame_N.masked_fill(~rows.validity, -1)
        return VisualTokensState(
            rows=rows,
            cells=replace(cells, frame_N=frame_BN),
            rotary=(chosen.take(self.rotary[0]), chosen.take(self.rotary[1])),
            stacked=[chosen.take(each) for each in self.stacked],
            origin_BN=self.origin_BN.gather(1, index_BN),
            weight_BN=None if self.weight_BN is None else self.weight_BN.gather(1, index_BN),
        )

    def reordered(self, moved_BN: Tensor) -> VisualTokensState:
        """Move the tokens to other rows; the positions and angles of the rows do not change."""
        return replace(
            self,
            cells=self.cells.map(lambda part_BN: part_BN.gather(1, moved_BN)),
            stacked=[each.gather(1, moved_BN[..., None].expand_as(each)) for each in self.stacked],
            origin_BN=self.origin_BN.gather(1, moved_BN),
        )

    def turned(self, angles: Rotary) -> VisualTokensState:
        """Return the same tokens with the angles of their rows, taken from those of the call."""
        return replace(self, rotary=take_angles(self.rows, angles))


@dataclass(frozen=True)
class ImageInputs:
    """The visual tokens of a call with images, and both streams as they enter the decoder."""

    tokens: VisualTokens
    embeddings: InputEmbeddings


class ForwardState:
    """State that the layers of one call share; each pruning step starts a new stage.

    `images` and `visual` are None in a call without images.
    """

    def __init__(
        self,
        text: TokenRows,
        text_rotary: Rotary,
        positions: CallPositions,
        images: ImageInputs | None,
        visual: VisualTokensState | None,
        window: Window | None,
        cache: DynamicCache | None,
        offset: int,
    ) -> None:
        self.text, self.text_rotary, self.visual = text, text_rotary, visual
        self.positions, self.window, self.cache, self.offset = positions, window, cache, offset
        self.cached_tokens: CachedTokens | None = (
            None if cache is None else cache.layers[0].cached_tokens
        )
        self.images = images
        self._selection: CacheSelection | None = None
        self.initial_counts: tuple[int, ...] = ()
        self.stages: list[VisualTokensState] = [] if visual is None else [visual]
        # Numbers of tokens removed so far by steps that renumber: before each position of the call,
        # and per sample for every stage.
        self._closed_BS: Tensor | int = 0
        self._closed_B: list[Tensor | int] = [0]
        self._current: tuple[int, CallContext] | None = None

    def call(self, passed: Sequence[TokenPruningStep]) -> CallContext:
        """Return the shared inputs of the layers after these steps, which only grow in a call."""
        if self._current is None or self._current[0] != len(passed):
            if any(step.renumbers for step in passed):
                self._renumber(len(passed))
            self._current = len(passed), self._build_context(len(passed))
        return self._current[1]

    def upcoming(self, reached: Sequence[TokenPruningStep]) -> CallContext:
        """Return the inputs of a layer after these steps, for rows that are not pruned yet."""
        before = self.text_rotary, self.visual
        if any(step.renumbers for step in reached):
            self._renumber(len(reached))
        context = self._build_context(len(reached))
        self.text_rotary, self.visual = before
        return context

    @property
    def generates(self) -> bool:
        """Whether the call is one token per sequence, with visual tokens in the cache."""
        if self.images is not None or self.text.count != 1 or self.cached_tokens is None:
            return False
        return self.cached_tokens.visual[-1].index_BR.shape[1] > 0

    def select_cached(self, pruning: DecodePruning, last_qk: LayerQK) -> None:
        """Choose the cached visual tokens that the generated token reads in later layers."""
        cached_tokens = cast(CachedTokens, self.cached_tokens)
        self._selection = cached_tokens.selection = select_cached(
            pruning, last_qk.attention_of_token(), cached_tokens.visual[-1], cached_tokens.selection
        )
        self._current = None

    def _renumber(self, stage: int) -> None:
        """Rotate the remaining rows by positions that close the gaps of removed tokens."""
        past_B1 = 0 if self.cached_tokens is None else self.cached_tokens.closed_B[stage][:, None]
        angles = self.positions.angles(self._closed_BS + past_B1)
        self.text_rotary = take_angles(self.text, angles)
        self.visual = self.visual and self.visual.turned(angles)

    def _build_context(self, stage: int) -> CallContext:
        """Return the shared inputs of the layers of a stage."""
        visual = self.visual
        past = (
            None
            if self.cached_tokens is None
            else PastPositions(self.cached_tokens.text, self.cached_tokens.visual[stage])
        )
        rows, cells = (None, None) if visual is None else (visual.rows, visual.cells)
        own_BN = None if visual is None else visual.weight_BN
        weight_BK = key_weights(
            None if past is None else past.visual,
            own_BN,
            len(self.text.index_BR),
            0 if rows is None else rows.count,
        )
        selection = self._selection
        partly = selection is not None and selection.valid_Bn is not None
        masks = attention_masks(
            self.text,
            rows,
            cells,
            self.window,
            past,
            self.offset,
            explicit=weight_BK is not None or partly,
            attention="causal" if self.images is None else self.images.tokens.attention,
        )
        if selection is not None:
            masks = masks.selected(selection, selection.attention_BN.shape[1])
        return CallContext(
            masks=masks if weight_BK is None else masks.weighed(weight_BK),
            text_rotary=self.text_rotary,
            visual_rotary=None if visual is None else visual.rotary,
            cache=self.cache,
            selection=selection,
        )

    def run_step(
        self,
        step: TokenPruningStep,
        streams: Streams,
        read_tower: Callable[[], TowerOutput | None],
        ahead: LayersAhead,
    ) -> Streams:
        """Carry out a pruning step and return the streams without the removed tokens."""
        visual, images, states_BND = self.visual, self.images, streams.visual_BND
        if visual is None or images is None or states_BND is None:
            return streams
        frames = Frames.of(visual.cells)
        self.initial_counts = self.initial_counts or frames.counts
        # Quotas refer to the initial number of tokens of a frame, even after earlier steps. Frames
        # that do not exceed their quota stay unchanged, whatever `choose` returns for them.
        counts = zip(self.initial_counts, frames.counts, strict=True)
        kept = [step.quota.kept(n, m) for n, m in counts]
        untouched = [k >= m and not step.adaptive for k, m in zip(kept, frames.counts, strict=True)]
        before, touched = visual.rows, not all(untouched)
        if touched:
            tower = read_tower() if step.reads_tower else None
            inputs = SelectionInputs(
                name=step.name,
                frames=frames,
                cells=visual.cells.map(frames.pack),
                states_IMD=frames.pack(states_BND),
                initial_counts=self.initial_counts,
                visual=visual.rows,
                text=self.text,
                text_BTD=streams.text_BTD,
                input_embeddings=images.embeddings,
                last_qk=streams.last_qk,
                ahead=ahead,
                tower_output=tower and _by_frame(tower, images.tokens, visual.origin_BN, frames),
                separator_BS=images.tokens.separator_BS,
            )
            choice = step.choose(inputs, torch.tensor(kept, device=states_BND.device))
            untouched_I = torch.tensor(untouched, device=states_BND.device)
            visual, states_BND = _chosen_tokens(
                choice, frames, visual, states_BND, untouched_I, renumbers=step.renumbers
            )
            self.visual = visual
        self.stages.append(visual)
        self._closed_B.append(self._closed_B[-1])
        if touched and step.renumbers:
            self._close_gaps(before, visual.rows, images.tokens)
        # The recorded queries and keys belong to the rows before this step. `VisualPlan.add_step`
        # refuses a second step after the same layer that would read them.
        return replace(streams, visual_BND=states_BND, last_qk=None)

    def _close_gaps(self, before: TokenRows, after: TokenRows, tokens: VisualTokens) -> None:
        """Count the tokens that the newest stage has removed, by which later positions decrease."""
        gone_BS = _marked(before, tokens) & ~_marked(after, tokens)
        # Before each position, hence without the position itself.
        self._closed_BS = self._closed_BS + gone_BS.cumsum(dim=1) - gone_BS.long()
        self._closed_B[-1] = self._closed_B[-1] + gone_BS.sum(dim=1)

    def commit_to_cache(self, length: int) -> None:
        """Record the call's `length` tokens in the cache."""
        if self.cached_tokens is None or self.cache is None:
            return
        self.cached_tokens.text = self.cached_tokens.text.extended_by(self.text, self.offset)
        if not self.generates:
            # Prompts and later turns read all visual tokens.
            self.cached_tokens.selection = None
        # Per stage, since each layer's cache holds only the visual tokens that reached it. `length`
        # includes removed tokens, because later tokens count their positions.
        for stage, visual in enumerate(self.stages):
            self.cached_tokens.visual[stage] = self.cached_tokens.visual[stage].extended_by(
                visual.rows, self.offset, visual.weight_BN
            )
            closed_B = self.cached_tokens.closed_B[stage] + self._closed_B[stage]
            self.cached_tokens.closed_B[stage] = closed_B
        for layer in self.cache.layers:
            layer.length = self.offset + length


def _chosen_tokens(
    choice: TokenSelection,
    frames: Frames,
    visual: VisualTokensState,
    states_BND: Tensor,
    untouched_I: Tensor,
    *,
    renumbers: bool,
) -> tuple[VisualTokensState, Tensor]:
    """Return the tokens that a step keeps and their states; `untouched_I` marks whole frames."""
    if choice.changed_IM is not None and choice.states_IMD is not None:
        changed_IM = choice.changed_IM & ~untouched_I[:, None]
        states_BND = frames.replace_rows(states_BND, changed_IM, choice.states_IMD)
    keep_IM = choice.keep_IM | untouched_I[:, None]
    # If positions are renumbered, the order of the rows is the order of the tokens. Otherwise every
    # token keeps its position, whatever the order of the rows.
    if choice.order_IM is not None and renumbers:
        order_IM = choice.order_IM.masked_fill(untouched_I[:, None], 0)
        moved_BN = frames.unpack_order(reordered_rows(keep_IM, order_IM))
        states_BND = states_BND.gather(1, moved_BN[..., None].expand_as(states_BND))
        visual = visual.reordered(moved_BN)
    if choice.weight_IM is not None:
        weight_BN = frames.unpack_weights(choice.weight_IM.to(states_BND.dtype))
        visual = replace(visual, weight_BN=weight_BN)
    chosen = rows_where(frames.unpack(keep_IM))
    return visual.subset(chosen), chosen.take(states_BND)


def all_visual_tokens(
    tokens: VisualTokens, rows: TokenRows, rotary: Rotary, stacked: list[Tensor]
) -> VisualTokensState:
    """Return the state before any pruning."""
    parts = (tokens.frame_BS, tokens.row_BS, tokens.column_BS)
    cells = Cells(*parts).map(lambda part_BS: part_BS.gather(1, rows.index_BR))
    return VisualTokensState(rows, cells, rotary, stacked, rows.index_BR)


def take_angles(rows: TokenRows, angles: Rotary) -> Rotary:
    """Return the angles of some rows, taken from those of the call, [B, R, up to d] each."""
    return rows.take(angles[0]), rows.take(angles[1])


def reordered_rows(keep_IM: Tensor, order_IM: Tensor) -> Tensor:
    """Return, for each row of a frame, the row whose token moves there, [I, M].

    The tokens of kept rows are sorted by `order`, ties as they are, and distributed over the same
    rows. Other rows do not move.
    """
    place_IM = torch.arange(keep_IM.shape[1], device=keep_IM.device).expand_as(keep_IM)
    # The j-th kept row gets the token that is j-th in order. Stable sorts of the marks bring the
    # kept rows to the front of both lists.
    places_IM = (~keep_IM).long().argsort(dim=1, stable=True)
    sorted_IM = order_IM.argsort(dim=1, stable=True)
    removed_IM = ~keep_IM.gather(1, sorted_IM)
    tokens_IM = sorted_IM.gather(1, removed_IM.long().argsort(dim=1, stable=True))
    kept_IM = torch.arange(keep_IM.shape[1], device=keep_IM.device) < keep_IM.sum(1, keepdim=True)
    return place_IM.scatter(1, places_IM, torch.where(kept_IM, tokens_IM, places_IM))


def _marked(rows: TokenRows, tokens: VisualTokens) -> Tensor:
    """Mark the positions of some rows in the call, bool [B, S]."""
    # Padding rows may repeat the positions of real rows, so they must not clear any mark.
    marked_BS = torch.zeros_like(tokens.frame_BS)
    return marked_BS.scatter_add(1, rows.index_BR, rows.validity.long()) > 0


def _encoding_order(tokens: VisualTokens) -> Tensor:
    """Return the index of each visual token in the tower's outputs, [B, S].

    Frames are numbered in the order of encoding: images in reading order, then videos.
    """
    # The argsort of an argsort is each element's rank. Tokens must be ranked by frame number,
    # because the tower encodes all images before all videos, whatever their order in the prompt.
    number_V = tokens.frame_BS[tokens.mask].argsort(stable=True).argsort()
    return torch.zeros_like(tokens.frame_BS).masked_scatter(tokens.mask, number_V)


def match_tower_output(tower: TowerOutput, tokens: VisualTokens) -> TowerOutput:
    """Match the tower's outputs to the visual tokens of a call, repeating them for beams.

    Raises:
        UserError: the tower encoded different images than those of the call.
    """
    counts = tokens.mask.sum(dim=1).tolist()
    found, wanted = len(tower.received_V), sum(counts)
    if found == wanted:
        return tower
    # Beam search repeats each sample, but its images are encoded once. Repeating outputs per sample
    # is right only if frame numbers increase along the batch. With both images and videos they do
    # not, since all images are encoded first.
    beams = wanted // max(found, 1)
    if bool((tokens.frame_BS[tokens.mask].diff() < 0).any()):
        raise UserError(
            "a method that reads the vision tower does not support beam search on prompts with "
            "both images and videos: generate without beams"
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
    order_V = torch.tensor(index, device=tower.received_V.device)
    return tower.select(order_V)


def _by_frame(
    tower: TowerOutput, tokens: VisualTokens, origin_BN: Tensor, frames: Frames
) -> TowerOutput:
    """Pack the tower's outputs of the remaining visual tokens by frame: V becomes [I, M]."""
    # Outputs are in encoding order, and earlier steps have removed and moved rows, so they are
    # looked up by the original position of each token.
    order_BS = _encoding_order(tokens)
    return tower.select(frames.pack(order_BS.gather(1, origin_BN)))
