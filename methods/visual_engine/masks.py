"""Attention masks of text rows and visual rows, computed once per call and used by every layer.

Shapes: B samples, T text rows, N visual rows of the call; P past text, M past visual tokens. Text
keys are [past | new], P + T; visual keys are [past | new], M + N; K counts either or both. Where
both are concatenated, visual keys come first. Masks are bool with True for "may attend", [B or 1,
1, queries, keys]; None means that every query attends to every key. If keys have weights w, masks
over visual keys are additive instead: log w, or -inf.

A window limits visual attention on the patch grid: a token at cell (r, c) attends to the cell
(r', c') of the same frame if max(|r - r'|, |c - c'|) is at most the radius. A window replaces the
visual keys that a token would attend to without it: earlier ones, all of its frame (Gemma 3), or
all of the prompt (PaliGemma). It is applied as a mask if there are few rows, and otherwise in
bands, which are grid rows with the keys in their reach. Frame -1 marks padding; padding rows attend
to each other, which keeps their softmax finite.

Shapes of windows: Q visual queries, K visual keys, N visual rows of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bench.models.vlm.visual_tokens import ImageAttention
from methods.visual_engine.kv_cache import CachedPositions, CacheSelection
from methods.visual_engine.settings import Window
from methods.visual_engine.token_index import Cells, TokenRows

# Number of visual rows from which windows are computed in bands instead of under one dense mask.
# On 2 cores of an AMD EPYC (float32, 16 heads of 64, radius 2) both take the same time at 100 to
# 150 rows: with fewer, more kernel calls cost more than the skipped keys save; with 256, bands take
# 0.56 of the time. The value affects speed only.
BANDED_FROM = 128
ALL = slice(None)


@dataclass(frozen=True)
class MaskBlock:
    """Visual queries that attend to the same range of keys, under one mask.

    `keys` are positions among the visual keys. The mask also covers the first `text_keys` text
    keys, which follow them.
    """

    samples: slice
    queries: slice
    keys: slice
    text_keys: int
    mask: Tensor


@dataclass(frozen=True)
class AttentionMasks:
    """All attention masks of one call.

    `causal` means that text rows attend to text in plain causal order and need no mask; otherwise
    `text_BTK` is their mask over text keys. `mixed_BTK` is the mask of text rows over visual and
    text keys. `blocks` cover all visual rows. If visual rows attend in plain causal order too,
    `blocks` is empty and `order` [T + N] sorts [text | visual] rows into the call's order.
    `before_BNK` is the mask of visual rows over text keys alone.
    """

    causal: bool
    text_BTK: Tensor | None
    mixed_BTK: Tensor | None
    before_BNK: Tensor | None
    blocks: tuple[MaskBlock, ...]
    order: Tensor | None

    def weighed(self, weight_BK: Tensor) -> AttentionMasks:
        """Return additive masks in which visual keys stand for `weight_BK` [B, M + N] tokens."""
        mixed = None if self.mixed_BTK is None else _weighed(self.mixed_BTK, weight_BK)
        blocks = tuple(
            replace(block, mask=_weighed(block.mask, weight_BK[block.samples, block.keys]))
            for block in self.blocks
        )
        return replace(self, mixed_BTK=mixed, blocks=blocks)

    def selected(self, selection: CacheSelection, seen: int) -> AttentionMasks:
        """Return masks over the selected ones of the `seen` cached visual keys."""
        if self.mixed_BTK is None or selection.index_Bn is None:
            return self
        batch = len(selection.index_Bn)
        visual, text = self.mixed_BTK[..., :seen], self.mixed_BTK[..., seen:]
        index = selection.index_Bn[:, None, None]
        chosen = visual.expand(batch, -1, -1, -1).gather(3, index)
        if selection.valid_Bn is not None:
            chosen = chosen & selection.valid_Bn[:, None, None]
        return replace(self, mixed_BTK=torch.cat([chosen, text.expand(batch, -1, -1, -1)], dim=-1))


def _weighed(mask_BQK: Tensor, weight_BV: Tensor) -> Tensor:
    """Return the additive mask over visual keys, which come first, and text keys."""
    text = mask_BQK.shape[-1] - weight_BV.shape[1]
    log_BK = functional.pad(weight_BV.log(), (0, text))
    return torch.where(mask_BQK, log_BK[:, None, None], -torch.inf)


@dataclass(frozen=True)
class StreamPositions:
    """Positions of text or visual tokens: of the call's queries, and of all keys so far."""

    query: Tensor
    key: Tensor
    key_valid: Tensor
    forwards: bool = False

    def can_attend_to(self, other: StreamPositions) -> Tensor:
        """Mark the keys of `other` before each query of this stream, [B, 1, Q, K].

        With `forwards`, keys after the query are marked as well.
        """
        # Strictly before: a readout row has the same position as the visual token that it repeats,
        # which is the only case of equal positions.
        query, key = self.query[:, :, None], other.key[:, None, :]
        seen = query != key if self.forwards else query > key
        return (seen & other.key_valid[:, None, :])[:, None]

    def can_attend_to_self(self) -> Tensor:
        """Mark the keys of this stream that its own queries attend to, [B, 1, Q, K]."""
        # Padding rows and readout rows attend at least to themselves: some kernels return NaN for a
        # softmax over no keys, and NaN times 0 is NaN.
        new = self.query.shape[1]
        own = torch.eye(new, dtype=torch.bool, device=self.query.device)
        past = torch.zeros(new, self.key.shape[1] - new, dtype=torch.bool, device=own.device)
        return self.can_attend_to(self) | torch.cat([past, own], dim=1)


@dataclass(frozen=True)
class PastPositions:
    """The tokens of earlier calls that a layer's cache holds."""

    text: CachedPositions
    visual: CachedPositions


@dataclass(frozen=True)
class _Shortcuts:
    """Properties of a call by which masks can be left out.

    - `uniform`: no padding in text and cache, and their tokens at the same positions in every
      sample, so that one row of masks serves the whole batch unless visual rows are padded.
    - `single`: one text row after everything else, as in generation. It attends to all keys, so
      without padding it needs no mask.
    - `causal`: `uniform` in a first call, so that the kernel's causal flag replaces the text mask.
      With a past it cannot, because SDPA aligns the triangle with the first key.
    """

    uniform: bool
    single: bool
    causal: bool

    @classmethod
    def of(
        cls,
        text: TokenRows,
        visual: TokenRows | None,
        past: PastPositions | None,
        offset: int,
        *,
        forwards: bool,
    ) -> _Shortcuts:
        """Find the properties of a call; with `forwards`, tokens attend to later ones as well."""
        uniform_past = past is None or (past.text.uniform and past.visual.uniform)
        uniform = text.valid_BR is None and uniform_past
        # No padding, wherever the text is.
        full = text.full and (past is None or (past.text.full and past.visual.full))
        return cls(
            uniform=uniform,
            single=full and text.count == 1 and visual is None,
            causal=uniform and offset == 0 and not forwards,
        )


def attention_masks(
    text: TokenRows,
    visual: TokenRows | None,
    cells: Cells | None,
    window: Window | None,
    past: PastPositions | None,
    offset: int,
    *,
    explicit: bool = False,
    attention: ImageAttention = "causal",
) -> AttentionMasks:
    """Compute the masks of one call that starts `offset` tokens into its sequences.

    `visual` and `cells` [B, N] are None in a call without images, `past` is None in a first call.
    With `explicit`, masks over visual keys are never None, so that weights of keys can be added.
    `attention` says which keys the call's visual tokens attend to.
    """
    forwards = attention == "prompt"
    text_tokens = _stream_positions(text, offset, past.text if past else None)
    visual_tokens = _visual_positions(visual, offset, past, text_tokens)
    text_tokens = replace(text_tokens, forwards=forwards)
    visual_tokens = replace(visual_tokens, forwards=forwards)
    shortcuts = _Shortcuts.of(text, visual, past, offset, forwards=forwards)
    causal, single = shortcuts.causal, shortcuts.single
    text_mask = None if causal or single else text_tokens.can_attend_to_self()
    mixed = None
    if not single or explicit:
        to_visual = text_tokens.can_attend_to(visual_tokens)
        mixed = torch.cat([to_visual, text_tokens.can_attend_to_self()], dim=-1)
    if visual is None or cells is None:
        return AttentionMasks(causal, text_mask, mixed, None, (), None)
    before = visual_tokens.can_attend_to(text_tokens)
    if shortcuts.uniform and visual.valid_BR is None:
        mixed, before = None if mixed is None else mixed[:1], before[:1]
    plain = causal and attention == "causal" and text.readout_BR is None and not explicit
    if window is None and plain and visual.valid_BR is None:
        # Without a window, visual rows are causal as well, so both streams in the order of the call
        # are one causal attention without a mask.
        order = torch.cat([text.index_BR[0], visual.index_BR[0]]).argsort()
        return AttentionMasks(causal, text_mask, mixed, before, (), order)
    if window is None:
        own = visual_tokens.can_attend_to_self()
        if attention == "frame":
            own = _with_own_frame(own, cells)
        blocks: tuple[MaskBlock, ...] = (_mask_block(ALL, ALL, ALL, own, before),)
    else:
        first_key = visual_tokens.key.shape[1] - visual.count
        blocks = _window_blocks(cells, window, before, first_key)
    return AttentionMasks(causal, text_mask, mixed, before, blocks, None)


def _with_own_frame(own: Tensor, cells: Cells) -> Tensor:
    """Let every visual row attend to all rows of its frame, which are the last keys."""
    frame_BN = cells.frame_N
    same_BNN = (frame_BN[:, :, None] == frame_BN[:, None, :]) & (frame_BN >= 0)[:, None, :]
    past = own.shape[-1] - frame_BN.shape[1]
    return own | functional.pad(same_BNN, (past, 0))[:, None]


def _stream_positions(
    rows: TokenRows, offset: int, past: CachedPositions | None
) -> StreamPositions:
    if past is None:
        query = rows.index_BR + offset
        return StreamPositions(query, query, rows.keys_valid)
    whole = past.extended_by(rows, offset)
    return StreamPositions(rows.index_BR + offset, whole.index_BR, whole.valid_BR)


def _visual_positions(
    visual: TokenRows | None, offset: int, past: PastPositions | None, text: StreamPositions
) -> StreamPositions:
    """Return the positions of visual tokens; in a call without images only past ones."""
    if visual is not None:
        return _stream_positions(visual, offset, past.visual if past else None)
    none = text.query[:, :0]
    if past is None:
        return StreamPositions(none, none, none.bool())
    return StreamPositions(none, past.visual.index_BR, past.visual.valid_BR)


def _window_blocks(
    cells: Cells, window: Window, before: Tensor, first_key: int
) -> tuple[MaskBlock, ...]:
    """Cut the visual rows into blocks, each of which is one attention call.

    A few rows share one dense mask. Many rows are cut into bands of grid rows, for all samples
    together if their grids are equal, and otherwise for each sample separately.
    """
    uniform, (batch, count) = cells.uniform(), cells.frame_N.shape
    samples = [ALL] if uniform else [slice(b, b + 1) for b in range(batch)]
    # One block with all keys is used for few rows, and if the rows are not whole frames in raster
    # order, as after token pruning.
    whole = (slice(0, count), slice(0, count))
    blocks = []
    for chosen in samples if count >= BANDED_FROM else [ALL]:
        own = cells.of(slice(0, 1) if uniform else chosen)
        pairs = window_bands(own.sample(0), window) if count >= BANDED_FROM else None
        for queries, keys in [whole] if pairs is None else pairs:
            near = window_mask(own.part(queries), own.part(keys), window)[:, None]
            text = before[chosen if before.shape[0] > 1 else ALL][:, :, queries]
            moved = slice(first_key + keys.start, first_key + keys.stop)
            blocks.append(_mask_block(chosen, queries, moved, near, text))
    return tuple(blocks)


def _mask_block(
    samples: slice, queries: slice, keys: slice, near: Tensor, before: Tensor
) -> MaskBlock:
    """Join the masks over visual and text keys."""
    # Text keys after the last one used are cut off, which saves the product with the question.
    # Unused keys before it are kept, because keys must be one slice: gathering them would copy all
    # of them in every layer.
    used = before.flatten(0, -2).any(dim=0).nonzero()
    text_keys = int(used[-1]) + 1 if len(used) else 0
    batch = max(near.shape[0], before.shape[0])
    parts = [part.expand(batch, -1, -1, -1) for part in (near, before[..., :text_keys])]
    return MaskBlock(samples, queries, keys, text_keys, torch.cat(parts, dim=-1))


# Approximate number of queries per band: enough for efficient matmuls, few enough to skip most
# keys. On 2 cores of an AMD EPYC (float32, 16 heads of 64, radius 2), 576 rows take 13.0 ms under
# one dense mask and 5.9, 4.4, 5.6, 6.4 and 9.9 ms in bands of 24, 48, 96, 192 and 384.
BAND_QUERIES = 96


def window_mask(query: Cells, key: Cells, window: Window) -> Tensor:
    """Mark the visual keys in each query's window, bool [..., Q, K]."""

    def distance(q: Tensor, k: Tensor) -> Tensor:
        return q[..., :, None] - k[..., None, :]

    down, right = distance(query.row_N, key.row_N), distance(query.column_N, key.column_N)
    near = torch.maximum(down.abs(), right.abs()) <= window.radius
    if window.causal:
        near &= (down > 0) | ((down == 0) & (right >= 0))
    return near & (distance(query.frame_N, key.frame_N) == 0)


def window_bands(cells: Cells, window: Window) -> list[tuple[slice, slice]] | None:
    """Cut one sample's rows into bands of whole grid rows, with the keys in reach of each.

    Each pair is (queries, keys) as positions among the N rows. None if the rows are not whole
    frames in raster order, as after token pruning.
    """
    frame_N = cells.frame_N.cpu()
    _, counts = torch.unique_consecutive(frame_N, return_counts=True)
    bands, start = [], 0
    for count in counts.tolist():
        part = slice(start, start + count)
        # Padding (frame -1) is in no band, so its output stays zero.
        width = int(cells.column_N[part].max()) + 1
        if int(frame_N[start]) >= 0:
            if not _is_raster(cells.part(part), width):
                return None
            bands += _frame_bands(part, width, window.radius)
        start += count
    return bands


def _is_raster(frame: Cells, width: int) -> bool:
    order = torch.arange(len(frame.row_N), device=frame.row_N.device)
    return bool((frame.row_N * width + frame.column_N == order).all())


def _frame_bands(frame: slice, width: int, radius: int) -> list[tuple[slice, slice]]:
    """Cut one frame into bands, each with the surrounding rows in reach of its windows."""
    height = (frame.stop - frame.start) // width
    step = max(1, BAND_QUERIES // width)
    pieces = []
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = max(0, top - radius), min(height, bottom + radius)
        query = slice(frame.start + top * width, frame.start + bottom * width)
        pieces.append((query, slice(frame.start + first * width, frame.start + last * width)))
    return pieces
