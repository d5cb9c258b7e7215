"""Positions of text rows and visual rows in a call, and visual rows packed by frame.

Shapes: B samples, S tokens of the call, R rows of one stream (the maximum over samples), N visual
rows, I frames of the call in the order of their numbers, M rows of a frame (the maximum over
frames), D width. Samples with fewer rows are padded on the left, frames at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Positions of the tokens of one stream in a call.

    `index_BR` (int64) is the position of a row in the call. `valid_BR` marks real rows; None means
    that all rows are real and at the same positions in every sample. `full` means that all rows are
    real, wherever they are.

    `readout_BR` marks readout rows among text rows; None means that there are none. If a prompt
    ends with an image, the next token is predicted from its last visual token, for which strategies
    skip work. A readout row is a copy of that token that is computed like a text row: it attends to
    all tokens before it and to itself, and no other row attends to it.
    """

    index_BR: Tensor
    valid_BR: Tensor | None
    full: bool = True
    readout_BR: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of rows of the stream, R."""
        return self.index_BR.shape[1]

    @property
    def validity(self) -> Tensor:
        """Real rows, bool [B, R], also if `valid_BR` is None."""
        if self.valid_BR is None:
            return torch.ones_like(self.index_BR, dtype=torch.bool)
        return self.valid_BR

    @property
    def keys_valid(self) -> Tensor:
        """Rows to which other rows may attend, bool [B, R]: real rows except readout rows."""
        return self.validity if self.readout_BR is None else self.validity & ~self.readout_BR

    def take(self, x_BSD: Tensor) -> Tensor:
        """Return the stream's rows of a tensor, [B, R, D]; padding holds copies of other rows."""
        if self.valid_BR is None:
            # Positions are equal in all samples, so R indices suffice; `gather` needs one for each
            # element of the result.
            return x_BSD.index_select(1, self.index_BR[0])
        index_BR1 = self.index_BR[..., None]
        wide = x_BSD.expand(self.index_BR.shape[0], -1, -1)
        return wide.gather(1, index_BR1.expand(-1, -1, x_BSD.shape[-1]))

    def subset(self, chosen: TokenRows) -> TokenRows:
        """Keep the rows at the positions `chosen`, which are counted among these rows."""
        index_BR = self.index_BR.gather(1, chosen.index_BR)
        if self.valid_BR is None and chosen.valid_BR is None:
            return TokenRows(index_BR, None)
        valid_BR = self.validity.gather(1, chosen.index_BR) & chosen.validity
        return TokenRows(index_BR, valid_BR, chosen.full)

    def put(self, into_BSD: Tensor, x_BRD: Tensor) -> Tensor:
        """Return `into` with the stream's real rows written to their positions."""
        if self.valid_BR is None:
            return into_BSD.index_copy(1, self.index_BR[0], x_BRD)
        # Padding rows write zeros, but only outside the stream, because `rows_where` pads with
        # unmarked positions.
        real_BRD = torch.where(self.valid_BR[..., None], x_BRD, 0)
        return into_BSD.scatter(1, self.index_BR[..., None].expand_as(x_BRD), real_BRD)


def rows_after_images(
    text: TokenRows, visual: TokenRows, separator_BS: Tensor | None = None
) -> Tensor:
    """Mark the text rows after the last visual row of their sample, bool [B, T].

    Separators, which belong to an image, are not marked.
    """
    places_BN = visual.index_BR.masked_fill(~visual.validity, -1)
    after_BT = text.validity & (text.index_BR > places_BN.amax(dim=1, keepdim=True))
    if separator_BS is None:
        return after_BT
    return after_BT & ~separator_BS.gather(1, text.index_BR)


def last_positions(real_BS: Tensor) -> Tensor:
    """Mark the last real position of each sample, bool [B, S]."""
    later_BS = real_BS.flip(1).cumsum(dim=1).flip(1)
    return real_BS & (later_BS == 1)


def text_rows_where(text_BS: Tensor, readout_BS: Tensor) -> TokenRows:
    """Return the text rows and the readout rows at the marked positions of each sample."""
    if not bool(readout_BS.any()):
        return rows_where(text_BS)
    rows = rows_where(text_BS | readout_BS)
    # Padding rows are at unmarked positions, so the gather needs no mask.
    return replace(rows, readout_BR=readout_BS.gather(1, rows.index_BR))


def rows_where(mask_BS: Tensor) -> TokenRows:
    """Return the rows at the marked positions of each sample, in order, aligned at the right."""
    # The width of the stream must be known to allocate it, hence this transfer to the CPU.
    counts = mask_BS.sum(dim=1).tolist()
    width = max(counts)
    if len(set(counts)) == 1:
        index_BR = mask_BS.nonzero()[:, 1].view(len(counts), width)
        uniform = bool((index_BR == index_BR[:1]).all())
        return TokenRows(index_BR, None if uniform else torch.ones_like(index_BR, dtype=torch.bool))
    # A stable sort of 0 and 1 puts the marked positions last and in order; unmarked positions pad
    # shorter samples on the left.
    order_BS = mask_BS.to(torch.uint8).argsort(dim=1, stable=True)
    index_BR = order_BS[:, mask_BS.shape[1] - width :]
    return TokenRows(index_BR, mask_BS.gather(1, index_BR), full=False)


@dataclass(frozen=True)
class Frames:
    """Positions of each frame's rows, in raster order.

    `index_IM` are positions among the B · N visual rows of the batch, `valid_IM` marks the real
    ones, `sample_I` is the sample of each frame, and `counts` the number of its rows.
    """

    index_IM: Tensor
    valid_IM: Tensor
    sample_I: Tensor
    counts: tuple[int, ...]
    shape: torch.Size

    @staticmethod
    def of(cells: Cells) -> Frames:
        """Sort the visual rows [B, N] of a batch by frame."""
        frame_R = cells.frame_N.flatten()
        real_R = (frame_R >= 0).nonzero()[:, 0]
        # The stable sort keeps rows of a frame in sequence order, which is raster order. Frame
        # numbers are unique over the batch, so no frame mixes samples.
        real_R = real_R[frame_R[real_R].argsort(stable=True)]
        _, counts_I = torch.unique_consecutive(frame_R[real_R], return_counts=True)
        counts = tuple(counts_I.tolist())
        place_M = torch.arange(max(counts), device=frame_R.device)
        valid_IM = place_M < counts_I[:, None]
        start_I = counts_I.cumsum(0) - counts_I
        # Padding repeats row 0 of the batch; any valid index will do, since `valid_IM` excludes it.
        index_IM = real_R[torch.where(valid_IM, start_I[:, None] + place_M, 0)]
        sample_I = index_IM[:, 0] // cells.frame_N.shape[1]
        return Frames(index_IM, valid_IM, sample_I, counts, cells.frame_N.shape)

    def pack(self, x_BN: Tensor) -> Tensor:
        """Return values of visual rows [B, N, ...] by frame, [I, M, ...]."""
        return x_BN.flatten(0, 1)[self.index_IM]

    def unpack(self, chosen_IM: Tensor) -> Tensor:
        """Convert marks by frame into marks of visual rows, bool [B, N]."""
        marks_R = torch.zeros(self.shape.numel(), dtype=torch.bool, device=chosen_IM.device)
        marks_R[self.index_IM[chosen_IM & self.valid_IM]] = True
        return marks_R.view(self.shape)

    def unpack_weights(self, weight_IM: Tensor) -> Tensor:
        """Convert weights by frame into weights of visual rows, [B, N]; padding rows get 1."""
        weight_R = weight_IM.new_ones(self.shape.numel())
        weight_R[self.index_IM[self.valid_IM]] = weight_IM[self.valid_IM]
        return weight_R.view(self.shape)

    def unpack_order(self, moved_IM: Tensor) -> Tensor:
        """Convert row indices of frames into visual row indices of samples, [B, N].

        Padding rows keep their indices.
        """
        count = self.shape[1]
        order_R = torch.arange(self.shape.numel(), device=moved_IM.device)
        order_R[self.index_IM[self.valid_IM]] = self.index_IM.gather(1, moved_IM)[self.valid_IM]
        return (order_R % count).view(self.shape)

    def replace_rows(self, x_BND: Tensor, changed_IM: Tensor, states_IMD: Tensor) -> Tensor:
        """Replace the marked rows of each frame, [B, N, D]."""
        marked_IM = changed_IM & self.valid_IM
        flat_RD = x_BND.flatten(0, 1).clone()
        flat_RD[self.index_IM[marked_IM]] = states_IMD[marked_IM].to(x_BND.dtype)
        return flat_RD.view_as(x_BND)


@dataclass(frozen=True)
class Cells:
    """Frame, row and column of visual tokens, int64 of equal shape [..., N]."""

    frame_N: Tensor
    row_N: Tensor
    column_N: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Cells:
        """Apply a function to all three tensors."""
        return Cells(change(self.frame_N), change(self.row_N), change(self.column_N))

    def part(self, chosen: slice) -> Cells:
        """Select tokens."""
        return self.map(lambda part: part[..., chosen])

    def of(self, samples: slice) -> Cells:
        """Select samples of a batch."""
        return self.map(lambda part: part[samples])

    def sample(self, index: int) -> Cells:
        """Return one sample's tokens, without the batch dimension."""
        return self.map(lambda part: part[index])

    def uniform(self) -> bool:
        """Whether all samples of a batch have the same frames of the same shapes."""
        # Frames are numbered over the whole batch, so numbers are compared relative to a sample's
        # first frame. With padding (-1) they differ, and samples just do not share a mask.
        frame = self.frame_N - self.frame_N[:, :1]
        return all(bool((part == part[:1]).all()) for part in (frame, self.row_N, self.column_N))
