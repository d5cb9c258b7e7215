"""Rows are split and put back without loss; bands cover every window exactly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.visual_engine import masks
from methods.visual_engine.masks import window_bands, window_mask
from methods.visual_engine.settings import Window
from methods.visual_engine.token_index import Cells, rows_where

marks = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4)
frames = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(marks)
def test_two_streams_put_together_are_the_whole(marked):
    mask = torch.tensor(marked)
    x = torch.randn(*mask.shape, 3)
    whole = torch.zeros_like(x)
    for part in (mask, ~mask):
        rows = rows_where(part)
        assert rows.validity.sum() == part.sum()
        places = rows.index_BR.masked_fill(~rows.validity, -1)
        for sample, line in enumerate(part):
            assert [p for p in places[sample].tolist() if p >= 0] == line.nonzero()[:, 0].tolist()
        whole = whole + rows.put(torch.zeros_like(x), rows.take(x))
    assert torch.equal(whole, x)


def cells(shapes):
    parts = []
    for number, (height, width) in enumerate(shapes):
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        frame = torch.full((height * width,), number)
        parts.append(torch.stack([frame, row.flatten(), column.flatten()]))
    return Cells(*torch.cat(parts, dim=1))


@settings(max_examples=60, deadline=None)
@given(frames, st.integers(0, 3), st.booleans(), st.integers(1, 30))
def test_bands_cover_every_query_once_and_all_that_it_sees(shapes, radius, causal, size):
    before, masks.BAND_QUERIES = masks.BAND_QUERIES, size
    try:
        window, where = Window(radius, causal), cells(shapes)
        near = window_mask(where, where, window)
        covered = torch.zeros_like(near)
        queries = []
        for query, key in window_bands(where, window):
            queries += range(query.start, query.stop)
            covered[query, key] = window_mask(where.part(query), where.part(key), window)
        assert queries == list(range(len(where.row_N)))
        assert torch.equal(covered, near)
    finally:
        masks.BAND_QUERIES = before


def test_neighbours_by_their_definition():
    where = cells([(3, 4), (2, 2)])
    for causal in (False, True):
        near = window_mask(where, where, Window(1, causal))
        for i in range(16):
            for j in range(16):
                close = max(
                    abs(where.row_N[i] - where.row_N[j]), abs(where.column_N[i] - where.column_N[j])
                )
                same = where.frame_N[i] == where.frame_N[j]
                assert near[i, j] == (same and close <= 1 and (j <= i or not causal))


def test_frames_that_lost_tokens_have_no_bands():
    where = cells([(4, 4)])
    assert window_bands(where.part(slice(1, 16)), Window(1)) is None
    assert (
        window_bands(Cells(*(part[[0, 1, 2, 5]] for part in vars(where).values())), Window(1))
        is None
    )
