"""The front against the definition, point by point."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.reporting.plots.pareto import pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25)


def undominated(points, sign):
    """Compare every point with every other one."""
    return [
        i
        for i, (cost, value) in enumerate(points)
        if not any(
            c <= cost and sign * v >= sign * value and (c < cost or sign * v > sign * value)
            for c, v in points
        )
    ]


@given(POINTS, st.booleans())
def test_the_front_is_what_no_point_dominates(points, higher_is_better):
    frame = pd.DataFrame(points, columns=["cost", "value"], dtype=float)
    front = pareto_front(frame, higher_is_better=higher_is_better)
    assert sorted(front.index) == undominated(points, 1 if higher_is_better else -1)
    assert front["cost"].is_monotonic_increasing


def test_points_without_a_number_are_left_out_and_columns_can_be_named():
    frame = pd.DataFrame({"bytes": [1.0, np.nan, 3.0], "acc": [0.5, 0.9, np.nan]})
    assert list(pareto_front(frame, "bytes", "acc").index) == [0]


@pytest.mark.parametrize("column", ["cost", "value"])
def test_an_empty_frame_has_an_empty_front(column):
    assert pareto_front(pd.DataFrame({"cost": [], "value": []}))[column].empty
