"""Separation of a sequence into text rows and visual rows, and their recombination.

Shapes: B samples, S tokens of the call, R rows of one stream (the maximum over samples), D width.
Samples with fewer rows are padded on the left; `valid_BR` marks the real rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Positions of the tokens of one stream in a call.

    `index_BR` (int64) is a row's position in the call, `valid_BR` marks real rows; None means that
    all are real and that every sample has its rows at the same positions. `full` means that all
    rows are real, wherever they are.
    """

    index_BR: Tensor
    valid_BR: Tensor | None
    full: bool = True

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

    def take(self, x_BSD: Tensor) -> Tensor:
        """Return the stream's rows of a tensor, [B, R, D]; padding holds copies of other rows."""
        if self.valid_BR is None:
            # With equal positions in all samples one index of R rows suffices, where `gather` needs
            # one of the size of the result.
            return x_BSD.index_select(1, self.index_BR[0])
        index_BR1 = self.index_BR[..., None]
        wide = x_BSD.expand(self.index_BR.shape[0], -1, -1)
        return wide.gather(1, index_BR1.expand(-1, -1, x_BSD.shape[-1]))

    def among(self, chosen: Rows) -> Rows:
        """Keep the rows at the positions that `chosen` gives, counted among these rows."""
        index_BR = self.index_BR.gather(1, chosen.index_BR)
        if self.valid_BR is None and chosen.valid_BR is None:
            return Rows(index_BR, None)
        valid_BR = self.validity.gather(1, chosen.index_BR) & chosen.validity
        return Rows(index_BR, valid_BR, chosen.full)

    def put(self, into_BSD: Tensor, x_BRD: Tensor) -> Tensor:
        """Return `into` with the stream's real rows written to their positions."""
        if self.valid_BR is None:
            return into_BSD.index_copy(1, self.index_BR[0], x_BRD)
        # Padding writes zeros, but only to tokens outside the stream: `rows_where` fills up with
        # unmarked positions.
        real_BRD = torch.where(self.valid_BR[..., None], x_BRD, 0)
        return into_BSD.scatter(1, self.index_BR[..., None].expand_as(x_BRD), real_BRD)


def after_images(text: Rows, visual: Rows) -> Tensor:
    """Mark the text rows after the last visual row of their sample, bool [B, T]."""
    places_BN = visual.index_BR.masked_fill(~visual.validity, -1)
    return text.validity & (text.index_BR > places_BN.amax(dim=1, keepdim=True))


def rows_where(mask_BS: Tensor) -> Rows:
    """Return the rows at the marked positions of each sample, in order, aligned at the right."""
    # The width of the stream must be known to allocate it, hence this transfer to the CPU.
    counts = mask_BS.sum(dim=1).tolist()
    width = max(counts)
    if len(set(counts)) == 1:
        index_BR = mask_BS.nonzero()[:, 1].view(len(counts), width)
        alike = bool((index_BR == index_BR[:1]).all())
        return Rows(index_BR, None if alike else torch.ones_like(index_BR, dtype=torch.bool))
    # A stable sort of 0 and 1 puts the marked positions last and in order; unmarked positions fill
    # up on the left.
    order_BS = mask_BS.to(torch.uint8).argsort(dim=1, stable=True)
    index_BR = order_BS[:, mask_BS.shape[1] - width :]
    return Rows(index_BR, mask_BS.gather(1, index_BR), full=False)
