"""Even subsampling of a grid, the simplest way to have fewer tokens."""

from __future__ import annotations


def subsampled(rows: int, columns: int, keep: int) -> list[tuple[int, int]]:
    """List `keep` cells (row, column) of a grid, spread evenly over it.

    The number of grid rows used makes distances between cells similar in both directions; cells are
    shared among those rows as evenly as possible and centred. 144 cells of 24x24 are every second
    row and column.
    """
    # Square spacing: used / rows = (keep / used) / columns, solved for the rows used.
    used = round((keep * rows / columns) ** 0.5)
    # No row can hold more than `columns` cells, so at least ⌈keep / columns⌉ rows are needed.
    used = min(rows, max(used, -(-keep // columns), 1))
    cells = []
    for i in range(used):
        # Differences of rounded-down multiples sum to `keep` exactly, whatever the remainder.
        count = keep * (i + 1) // used - keep * i // used
        row = (2 * i + 1) * rows // (2 * used)
        cells += [(row, (2 * j + 1) * columns // (2 * count)) for j in range(count)]
    return cells
