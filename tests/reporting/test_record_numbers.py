"""The counted cost is the headline in every report, whatever an analytic formula says."""

import pytest

from bench.records import Cost
from bench.reporting.cost_table import print_costs
from bench.reporting.html.report import run_details
from bench.reporting.leaderboard import build_leaderboard
from bench.reporting.plots.breakdown import cost_parts
from bench.reporting.plots.points import run_points
from bench.reporting.summary import print_summary
from bench.reporting.tables.numbers import our_value
from bench.reporting.tables.table_config import TableColumn
from bench.reporting.wandb_sync import build_overview
from tests.reporting.html.synthetic_records import record

SCOPE = "forward 1x512"
COUNTED = Cost(
    scope=SCOPE, quantity="flops", unit="FLOP", value=1.33e9, how="counted",
    parts={"attention": 0.33e9, "other": 1e9},
)  # fmt: skip
ANALYTIC = Cost(
    scope=SCOPE, quantity="flops", unit="FLOP", value=1.69e9, how="analytic",
    parts={"attention": 0.69e9, "other": 1e9},
)  # fmt: skip


@pytest.fixture(params=["counted first", "analytic first"])
def both(request):
    """A run whose layers a foreign method dropped: the formula still counts the dense model."""
    costs = (COUNTED, ANALYTIC) if request.param == "counted first" else (ANALYTIC, COUNTED)
    return record(1, method="naee").model_copy(update={"costs": costs})


def test_one_cost_per_scope_and_quantity_stays(both):
    assert both.headline_costs == [COUNTED]
    assert both.cost("flops", SCOPE) == COUNTED
    only = both.model_copy(update={"costs": (ANALYTIC,)})
    assert only.headline_costs == [ANALYTIC]
    assert only.cost("seconds", SCOPE) is None


def test_the_leaderboard_and_the_overview_in_wandb_have_the_counted_value(both):
    runs = build_leaderboard([both])
    assert [row.costs for row in runs.rows] == [(1.33e9,)]
    overview = build_overview(runs, None)
    assert overview.leaderboard.rows[0][-1] == 1.33e9
    (plot,) = overview.pareto.values()
    assert plot.data.rows[0][4] == 1.33e9


def test_figures_and_tables_have_the_counted_value(both):
    assert run_points([both], cost="flops")["cost"].tolist() == [1.33e9]
    assert cost_parts([both], "flops")["value"].sum() == pytest.approx(1.33e9)
    column = TableColumn(quantity="flops", scope="forward", unit="FLOP")
    assert our_value(column, [both]).value == 1.33e9


def test_the_summary_has_the_counted_value(both, capsys):
    print_summary([both])
    out = capsys.readouterr().out
    assert "1.33 G" in out
    assert "1.69 G" not in out


def test_the_page_of_a_run_still_lists_both(both):
    assert {cost["how"] for cost in run_details(both)["costs"]} == {"counted", "analytic"}
    print_costs(both)
