"""Attention masks of text rows and visual rows, computed once per call and used by every layer.

Shapes: B samples, T text rows, N visual rows of the call; P past text, M past visual tokens. Text
keys are [past | new], P + T; visual keys are [past | new], M + N; K counts either or both. Where
both are concatenated, visual keys come first. Masks are bool with True for "may attend", [B or 1,
1, queries, keys]; None means that every query attends to every key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.visual_tokens.cache import Places
from methods.visual_tokens.plan import Window
from methods.visual_tokens.rows import Rows
from methods.visual_tokens.windows import Cells, bands, neighbours

# Number of visual rows from which windows are computed in bands instead of under one dense mask.
# On 2 cores of an AMD EPYC (float32, 16 heads of 64, radius 2) both break even between 100 and 150
# rows: below, another kernel call costs more than the skipped keys; at 256 bands take 0.56 of the
# time. Another value costs time only, never exactness.
BANDED_FROM = 128
EVERY = slice(None)


@dataclass(frozen=True)
class Block:
    """Visual queries that attend to the same range of keys, under one mask.

    `keys` are positions among the visual keys; the first `text_keys` text keys follow them.
    """

    samples: slice
    queries: slice
    keys: slice
    text_keys: int
    mask: Tensor


@dataclass(frozen=True)
class Attendance:
    """All attention masks of one call.

    `causal`: text rows attend to text in plain causal order, so no mask is needed; otherwise
    `text_BTK` is the mask over text keys. `mixed_BTK` is the mask of text rows over visual and text
    keys. `blocks` cover all visual rows, unless visual rows, too, are in plain causal order: then
    `blocks` is empty and `order` [T + N] sorts [text | visual] rows into the call's order.
    `before_BNK` is the mask of visual rows over text keys alone.
    """

    causal: bool
    text_BTK: Tensor | None
    mixed_BTK: Tensor | None
    before_BNK: Tensor | None
    blocks: tuple[Block, ...]
    order: Tensor | None


@dataclass(frozen=True)
class Stream:
    """Positions of one kind of tokens: those of the call's queries and those of all keys so far."""

    query: Tensor
    key: Tensor
    key_valid: Tensor

    def sees(self, other: Stream) -> Tensor:
        """Mark the keys of `other` at or before each query of this stream, [B, 1, Q, K]."""
        earlier = self.query[:, :, None] >= other.key[:, None, :]
        return (earlier & other.key_valid[:, None, :])[:, None]

    def sees_itself(self) -> Tensor:
        """Mark the keys of this stream that its own queries attend to, [B, 1, Q, K]."""
        # Padding rows are queries like any other. Each attends at least to itself: a softmax over
        # nothing is NaN in some kernels, and NaN times 0 stays NaN.
        new = self.query.shape[1]
        own = torch.eye(new, dtype=torch.bool, device=self.query.device)
        past = torch.zeros(new, self.key.shape[1] - new, dtype=torch.bool, device=own.device)
        return self.sees(self) | torch.cat([past, own], dim=1)


@dataclass(frozen=True)
class Past:
    """The tokens of earlier calls that a layer's cache holds."""

    text: Places
    visual: Places


def attendance(
    text: Rows,
    visual: Rows | None,
    cells: Cells | None,
    window: Window | None,
    past: Past | None,
    offset: int,
) -> Attendance:
    """Compute the masks of one call that starts `offset` tokens into its sequences.

    `visual` and `cells` [B, N] are None in a call without images, `past` in a first call.
    """
    places = _stream(text, offset, past.text if past else None)
    seen = _visual_stream(visual, offset, past, places)
    # Four properties decide what can be left out. `alike`: no padding, and every sample has text at
    # the same positions; one row of masks then serves the whole batch. `full`: no padding, wherever
    # the text is. `alone`: one text row after everything else, as in generation; it attends to all
    # keys and needs no mask, and `full` is enough for that. `causal`: `alike` in a first call; the
    # kernel's own causal flag then replaces the text mask. It does not with a past, because SDPA
    # aligns the flag's triangle with the first key, not with the last.
    alike = text.valid_BR is None and (past is None or (past.text.alike and past.visual.alike))
    full = text.full and (past is None or (past.text.full and past.visual.full))
    alone = full and text.count == 1 and visual is None
    causal = alike and offset == 0
    text_mask = None if causal or alone else places.sees_itself()
    mixed = None if alone else torch.cat([places.sees(seen), places.sees_itself()], dim=-1)
    if visual is None or cells is None:
        return Attendance(causal, text_mask, mixed, None, (), None)
    before = seen.sees(places)
    if alike and visual.valid_BR is None:
        mixed, before = None if mixed is None else mixed[:1], before[:1]
    if window is None and causal and visual.valid_BR is None:
        # Without a window, visual rows are causal as well. Both streams in the order of the call
        # are then one plain causal attention, which runs without any mask.
        order = torch.cat([text.index_BR[0], visual.index_BR[0]]).argsort()
        return Attendance(causal, text_mask, mixed, before, (), order)
    if window is None:
        blocks: tuple[Block, ...] = (_block(EVERY, EVERY, EVERY, seen.sees_itself(), before),)
    else:
        first_key = seen.key.shape[1] - visual.count
        blocks = _windows(cells, window, before, first_key)
    return Attendance(causal, text_mask, mixed, before, blocks, None)


def _stream(rows: Rows, offset: int, past: Places | None) -> Stream:
    if past is None:
        query = rows.index_BR + offset
        return Stream(query, query, rows.validity)
    whole = past.followed_by(rows, offset)
    return Stream(rows.index_BR + offset, whole.index_BR, whole.valid_BR)


def _visual_stream(visual: Rows | None, offset: int, past: Past | None, text: Stream) -> Stream:
    """Return the positions of visual tokens; in a call without images only past ones."""
    if visual is not None:
        return _stream(visual, offset, past.visual if past else None)
    none = text.query[:, :0]
    if past is None:
        return Stream(none, none, none.bool())
    return Stream(none, past.visual.index_BR, past.visual.valid_BR)


def _windows(cells: Cells, window: Window, before: Tensor, first_key: int) -> tuple[Block, ...]:
    """Cut the visual rows into blocks whose windows are computed at once.

    A few rows share one dense mask; many are cut into bands of grid rows, for all samples together
    if their grids are equal and for each sample alone otherwise.
    """
    alike, (batch, count) = cells.alike(), cells.frame_N.shape
    samples = [EVERY] if alike else [slice(b, b + 1) for b in range(batch)]
    # One block with all keys: for few rows, and where the rows are not whole frames in raster
    # order, as after token pruning.
    whole = (slice(0, count), slice(0, count))
    blocks = []
    for chosen in samples if count >= BANDED_FROM else [EVERY]:
        own = cells.of(slice(0, 1) if alike else chosen)
        pairs = bands(own.sample(0), window) if count >= BANDED_FROM else None
        for queries, keys in [whole] if pairs is None else pairs:
            near = neighbours(own.part(queries), own.part(keys), window)[:, None]
            text = before[chosen if before.shape[0] > 1 else EVERY][:, :, queries]
            moved = slice(first_key + keys.start, first_key + keys.stop)
            blocks.append(_block(chosen, queries, moved, near, text))
    return tuple(blocks)


def _block(samples: slice, queries: slice, keys: slice, near: Tensor, before: Tensor) -> Block:
    """Join the masks over visual and text keys."""
    # Visual rows never attend to text after their image, so the text keys behind the last one that
    # is used are cut off, which saves the product with the whole question. Unused keys in front or
    # between stay: keys must remain one slice, since gathering them would copy all of them per
    # layer.
    used = before.flatten(0, -2).any(dim=0).nonzero()
    text_keys = int(used[-1]) + 1 if len(used) else 0
    batch = max(near.shape[0], before.shape[0])
    parts = [part.expand(batch, -1, -1, -1) for part in (near, before[..., :text_keys])]
    return Block(samples, queries, keys, text_keys, torch.cat(parts, dim=-1))
