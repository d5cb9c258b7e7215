"""Even subsampling of a grid, the plainest way to have fewer tokens."""

from __future__ import annotations


def subsampled(rows: int, columns: int, keep: int) -> list[tuple[int, int]]:
    """Return `keep` cells of a grid (row, column), spread evenly over it.

    As many grid rows are used as keep the cells' distances alike in both directions; the cells are
    shared among them as evenly as possible and centred. 144 of 24x24 are every second of both.
    """
    used = round((keep * rows / columns) ** 0.5)
    used = min(rows, max(used, -(-keep // columns), 1))
    cells = []
    for i in range(used):
        count = keep * (i + 1) // used - keep * i // used
        row = (2 * i + 1) * rows // (2 * used)
        cells += [(row, (2 * j + 1) * columns // (2 * count)) for j in range(count)]
    return cells
