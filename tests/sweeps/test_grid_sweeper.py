"""The grid is Hydra's own, in its order, and what is given last for a key counts."""

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from bench.errors import UserError
from bench.sweeps.grid_sweeper import grid_jobs


def parsed(*texts):
    return OverridesParser.create().parse_overrides(list(texts))


@pytest.mark.parametrize("texts", [
    [], ["a=1"], ["a=1,2", "b=x,y,z"], ["a=range(1,4)", "b=[1,2],[3]", "+c={d:1}", "e=q"],
    ["a=1,2", "a=3"], ["a=choice(1,2)", "b=glob(x)"][:1],
])  # fmt: skip
def test_it_is_hydras_grid(texts):
    (hydras,) = BasicSweeper.split_arguments(parsed(*texts), None)
    assert grid_jobs(parsed(*texts), 100) == hydras


def test_an_override_without_a_value_stays_as_it_was_typed():
    assert grid_jobs(parsed("~a", "b=1,2"), 2) == [["~a", "b=1"], ["~a", "b=2"]]


def test_a_range_without_steps_is_for_searches():
    with pytest.raises(UserError, match="a search"):
        grid_jobs(parsed("a=interval(0,1)"), 9)


def test_a_grid_of_a_million_jobs_is_refused_before_it_is_listed():
    million = parsed("a=range(1000)", "b=range(0,500)", "b=range(0,1000)", "c=1")
    with pytest.raises(UserError, match=r"1,000,000 jobs \(1,000 of a x 1,000 of b\), more than "):
        grid_jobs(million, 10_000)
