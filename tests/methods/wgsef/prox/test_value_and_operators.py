"""The envelope against its certificates: Fenchel-Young, closed forms, end points, generic solvers.

Shapes: L rows, M groups, G elements in a group.
"""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from bench.errors import UserError
from methods.wgsef.prox.operators import (
    envelope_conjugate,
    envelope_value,
    gradient_factor,
    prox_debiased,
    prox_envelope,
    select_top_k,
)
from methods.wgsef.prox.root import (
    BudgetEquation,
    newton_root,
    newton_root_fixed_passes,
    sorting_root,
)
from tests.methods.wgsef.prox import oracles
from tests.methods.wgsef.prox.oracles import (
    debiased_,
    envelope_,
    envelope_elementwise,
    group_norms,
    keeps_exactly_k,
    selection_root,
)

ROOTS = [newton_root, newton_root_fixed_passes, selection_root, sorting_root]


def draw(seed: int):
    """A random problem of 3 rows with ties, empty groups, equal and unequal weights, any k."""
    rng = numpy.random.default_rng(seed)
    groups, elements = rng.integers(1, 14), rng.integers(1, 6)
    t_LMG = torch.tensor(rng.normal(size=(3, groups, elements)))
    if seed % 3 == 0:
        t_LMG = t_LMG.round()
    if seed % 5 == 0:
        t_LMG[:, ::2] = 0
    weight_LM = torch.ones(3, groups).double()
    if seed % 2:
        weight_LM = torch.tensor(rng.uniform(0.1, 2, size=(3, groups)))
    k = int(rng.choice([1, groups, rng.integers(1, groups + 1)]))
    return t_LMG, weight_LM, k, float(10 ** rng.uniform(-2, 1.5))


problems = st.integers(0, 2**32 - 1).map(draw)


def relative_gap(v_LMG, y_LMG, weight_LM, k):
    gap_L = oracles.fenchel_young_gap(v_LMG, y_LMG, weight_LM, k)
    size_L = envelope_conjugate(y_LMG.norm(dim=-1), weight_LM, k) + 1e-30
    return float((gap_L / size_L).abs().max())


@pytest.mark.broad
@settings(max_examples=600, deadline=None)
@given(problems)
def test_the_proximal_point_has_its_fenchel_young_certificate(problem):
    t_LMG, weight_LM, k, lam = problem
    v_LMG = prox_envelope(t_LMG.norm(dim=-1), k, lam, weight_LM).scale[..., None] * t_LMG
    assert relative_gap(v_LMG, (t_LMG - v_LMG) / lam, weight_LM, k) <= 1e-10


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(problems)
def test_the_certificate_holds_on_thousands_of_problems(problem):
    test_the_proximal_point_has_its_fenchel_young_certificate.hypothesis.inner_test(problem)


@settings(max_examples=300, deadline=None)
@given(problems)
@pytest.mark.broad
def test_all_roots_agree(problem):
    t_LMG, weight_LM, k, lam = problem
    norm_LM = t_LMG.norm(dim=-1)
    expected = prox_envelope(norm_LM, k, lam, weight_LM, root=sorting_root).scale
    for root in ROOTS:
        torch.testing.assert_close(
            prox_envelope(norm_LM, k, lam, weight_LM, root=root).scale,
            expected,
            atol=1e-12,
            rtol=1e-12,
        )


@settings(max_examples=300, deadline=None)
@given(problems)
def test_value_equals_the_k_support_form_and_bounds_the_ridge(problem):
    t_LMG, weight_LM, k, _ = problem
    norm_LM = t_LMG.norm(dim=-1)
    k_L = torch.full((3,), float(k)).double()
    closed_L = oracles.value_in_closed_form(norm_LM, weight_LM, k)
    torch.testing.assert_close(envelope_value(norm_LM, weight_LM, k_L), closed_L)
    excess_L = oracles.sparsity_excess(norm_LM, weight_LM, k_L)
    sparse_L = (norm_LM > 0).sum(-1) <= k
    assert (excess_L[sparse_L].abs() <= 1e-12 * closed_L[sparse_L]).all()
    assert (excess_L[~sparse_L] > 1e-9).all()


@settings(max_examples=300, deadline=None)
@given(problems)
def test_exactly_k_groups_are_left_when_and_only_when_the_criterion_says_so(problem):
    t_LMG, weight_LM, k, lam = problem
    norm_LM = t_LMG.norm(dim=-1)
    alive_L = prox_envelope(norm_LM, k, lam, weight_LM).alive
    assert torch.equal(keeps_exactly_k(norm_LM, k, lam, weight_LM), alive_L == k)
    assert (alive_L >= (norm_LM > 0).sum(-1).clamp(max=k)).all()


@settings(max_examples=200, deadline=None)
@given(problems)
def test_the_one_line_form_is_the_same_operator(problem):
    t_LMG, weight_LM, k, lam = problem
    norm_LM = t_LMG.norm(dim=-1) + 0.1
    shrinkage = prox_envelope(norm_LM, k, lam, weight_LM)
    slope_LM = (lam * weight_LM).sqrt() * norm_LM
    fractional_LM = (shrinkage.gate > 0) & (shrinkage.gate < 1 - 1e-9)
    for row in range(3):
        if not fractional_LM[row].any():
            continue
        j = int(fractional_LM[row].int().argmax())
        b_M = lam * weight_LM[row]
        tau = slope_LM[row, j] / (shrinkage.gate[row, j] + b_M[j])
        scale_M = (1 - tau * b_M.sqrt() / norm_LM[row]).clamp(min=0).minimum(1 / (1 + b_M))
        torch.testing.assert_close(shrinkage.scale[row], scale_M)


def test_end_points_are_squared_group_lasso_and_weight_decay():
    norm_LM, weight_LM = torch.rand(4, 9).double() + 0.1, torch.rand(4, 9).double() + 0.5
    one_L, all_L = torch.ones(4).double(), torch.full((4,), 9.0).double()
    lasso_L = 0.5 * (weight_LM.sqrt() * norm_LM).sum(-1).square()
    torch.testing.assert_close(envelope_value(norm_LM, weight_LM, one_L), lasso_L)
    ridge_L = 0.5 * (weight_LM * norm_LM.square()).sum(-1)
    torch.testing.assert_close(envelope_value(norm_LM, weight_LM, all_L), ridge_L)
    decayed_LM = prox_envelope(norm_LM, 9, 0.3, weight_LM).scale
    torch.testing.assert_close(decayed_LM, 1 / (1 + 0.3 * weight_LM))


def test_gradient_agrees_with_finite_differences():
    torch.manual_seed(0)
    norm_LM, weight_LM = torch.rand(1, 8).double() + 0.1, torch.rand(1, 8).double() + 0.5
    k_L = torch.tensor([3.0]).double()
    slope_LM = gradient_factor(norm_LM, weight_LM, k_L) * norm_LM
    for j in range(8):
        step = torch.zeros_like(norm_LM)
        step[0, j] = 1e-6
        rise = envelope_value(norm_LM + step, weight_LM, k_L)
        fall = envelope_value(norm_LM - step, weight_LM, k_L)
        assert float((rise - fall) / 2e-6) == pytest.approx(float(slope_LM[0, j]), rel=1e-6)


@settings(max_examples=300, deadline=None)
@given(problems, st.floats(0.01, 0.99))
def test_the_debiased_point_is_optimal_and_keeps_whole_groups_unshrunk(problem, ratio):
    t_LMG, weight_LM, k, _ = problem
    lam = ratio / float(weight_LM.max())
    shrinkage = prox_debiased(t_LMG.norm(dim=-1), k, lam, weight_LM)
    v_LMG = shrinkage.scale[..., None] * t_LMG
    # Optimality: (t - v) / lam + d v is a subgradient of F at v.
    y_LMG = (t_LMG - v_LMG) / lam + weight_LM[..., None] * v_LMG
    assert relative_gap(v_LMG, y_LMG, weight_LM, k) <= 1e-10
    whole_LM = shrinkage.gate == 1
    torch.testing.assert_close(shrinkage.scale[whole_LM], torch.ones(int(whole_LM.sum())).double())


@settings(max_examples=100, deadline=None)
@given(problems)
def test_the_debiased_point_tends_to_hard_selection(problem):
    t_LMG, _, k, _ = problem
    norm_LM = torch.linspace(1, 2, t_LMG.shape[1]).double()[torch.randperm(t_LMG.shape[1])][None]
    torch.testing.assert_close(
        prox_debiased(norm_LM, k, 1 - 1e-9).scale, select_top_k(norm_LM, k).scale
    )


def test_the_debiased_step_descends_on_a_quadratic():
    torch.manual_seed(0)
    root_NN, target_N = torch.randn(60, 60).double(), torch.randn(60).double()
    hessian_NN = root_NN.T @ root_NN / 60
    smooth, rho, k = float(torch.linalg.eigvalsh(hessian_NN)[-1]), 0.4, 5
    alpha = 1 / (smooth + rho)
    x_N = torch.randn(60).double()
    weight_LM, k_L = torch.ones(1, 20).double(), torch.tensor([float(k)]).double()

    def objective(x_N):
        loss = 0.5 * x_N @ hessian_NN @ x_N - target_N @ x_N
        return loss + rho * oracles.sparsity_excess(
            x_N.reshape(20, 3).norm(dim=1)[None], weight_LM, k_L
        )

    for _ in range(200):
        t_MG = (x_N - alpha * (hessian_NN @ x_N - target_N)).reshape(20, 3)
        new_N = (
            prox_debiased(t_MG.norm(dim=1)[None], k, alpha * rho).scale[0][:, None] * t_MG
        ).ravel()
        bound = 0.5 * (2 / alpha - smooth - rho) * (new_N - x_N).square().sum()
        assert objective(new_N) <= objective(x_N) - bound + 1e-12
        x_N = new_N


@settings(max_examples=15, deadline=None)
@given(problems, st.booleans())
def test_metrics_and_costs_agree_with_a_generic_solver(problem, with_costs):
    t_LMG, weight_LM, k, lam = problem
    t_MG, weight_M = t_LMG[0], weight_LM[0]
    groups = len(t_MG)
    rng = numpy.random.default_rng(groups)
    metric_M = torch.tensor(rng.uniform(0.3, 2, size=groups))
    cost_M = torch.tensor(rng.uniform(0.5, 2, size=groups) if with_costs else numpy.ones(groups))
    budget = k * float(cost_M.sum()) / groups
    cost_LM = cost_M[None] if with_costs else None
    norm_M = t_MG.norm(dim=1)
    found_M = prox_envelope(
        norm_M[None],
        budget if with_costs else k,
        lam,
        weight_M[None],
        metric_M[None],
        cost_LM=cost_LM,
    ).gate[0]

    def objective(gate_M, module=torch):
        # min over v of 1/2 h ||v - t||^2 + lam/2 d ||v||^2 / u, group by group.
        b_M = lam * weight_M / metric_M
        return 0.5 * (metric_M * norm_M**2 * b_M / (gate_M + b_M)).sum()

    solved = minimize(
        lambda u: float(objective(torch.tensor(u))),
        numpy.full(groups, min(1.0, budget / float(cost_M.sum()))),
        bounds=[(0, 1)] * groups,
        constraints={"type": "ineq", "fun": lambda u: budget - float(cost_M.numpy() @ u)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert float((cost_M * found_M).sum()) <= budget * (1 + 1e-9)
    assert float(objective(found_M)) <= solved.fun + 1e-9 * (1 + abs(solved.fun))


@settings(max_examples=60, deadline=None)
@given(problems)
def test_the_elementwise_metric_is_the_group_metric_where_that_is_constant(problem):
    t_LMG, weight_LM, k, lam = problem
    metric_M1 = torch.linspace(0.5, 2, t_LMG.shape[1]).double()[:, None]
    found_MG = envelope_elementwise(t_LMG[0], metric_M1.expand_as(t_LMG[0]), k, lam, weight_LM[0])
    scale_LM = prox_envelope(t_LMG[:1].norm(dim=-1), k, lam, weight_LM[:1], metric_M1.T).scale
    torch.testing.assert_close(found_MG, scale_LM[0][:, None] * t_LMG[0], atol=1e-10, rtol=1e-10)


def test_the_elementwise_metric_is_optimal_where_it_varies():
    torch.manual_seed(3)
    t_MG, metric_MG = torch.randn(9, 4).double(), torch.rand(9, 4).double() + 0.2
    weight_M, lam, k = torch.rand(9).double() + 0.5, 0.7, 3
    v_MG = envelope_elementwise(t_MG, metric_MG, k, lam, weight_M)
    y_MG = metric_MG * (t_MG - v_MG) / lam
    assert relative_gap(v_MG[None], y_MG[None], weight_M[None], k) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 9, 64])
def test_weights_in_place_get_the_operator_of_their_rows(dtype, elements):
    torch.manual_seed(0)
    weight_MG = torch.randn(500, elements).to(dtype)
    before_MG = weight_MG.double()
    shrinkage = envelope_(weight_MG, 100, 0.5)
    expected = prox_envelope(before_MG.norm(dim=1)[None], 100, 0.5).scale[0]
    torch.testing.assert_close(
        weight_MG.double(),
        expected[:, None] * before_MG,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-4,
        rtol=1e-2 if dtype == torch.bfloat16 else 1e-4,
    )
    assert torch.equal(group_norms(weight_MG) > 0, shrinkage.gate[0] > 0)
    debiased_(weight_MG, 50, 0.999)
    assert int((group_norms(weight_MG) > 0).sum()) >= 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost", [None, 0.1])
def test_a_row_whose_sums_underflow_or_overflow_has_the_root_of_sorting(dtype, cost):
    limits = torch.finfo(dtype)
    for slope in (limits.smallest_normal * limits.eps, limits.max / 2):
        slope_LM = torch.full((1, 4), slope, dtype=dtype)
        cost_LM = None if cost is None else torch.full_like(slope_LM, cost)
        budget = BudgetEquation(
            slope_LM,
            torch.full((1, 1), 0.5, dtype=dtype),
            torch.tensor([0.2], dtype=dtype),
            cost_LM,
        )
        found, expected = (budget.gates(root(budget)) for root in (newton_root, sorting_root))
        torch.testing.assert_close(found, expected)


def test_rows_are_solved_together_as_they_are_alone():
    torch.manual_seed(0)
    norm_LM = torch.rand(64, 300).double()
    k_L = torch.randint(1, 300, (64,)).double()
    together = prox_envelope(norm_LM, k_L, 0.1).scale
    alone = [prox_envelope(norm_LM[i : i + 1], int(k_L[i]), 0.1).scale for i in range(64)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_long_rows_in_blocks_agree_with_sorting():
    torch.manual_seed(0)
    norm_LM = torch.randn(1, 700_000).double().abs()
    fast = prox_envelope(norm_LM, 1000, 5.0).scale
    torch.testing.assert_close(fast, prox_envelope(norm_LM, 1000, 5.0, root=sorting_root).scale)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_an_impossible_k_is_one_sentence(k):
    with pytest.raises(UserError, match=rf"k must be in \(0, 5\] .*got {k}"):
        prox_envelope(torch.rand(1, 5), k, 0.1)


def test_a_debiased_ratio_of_one_is_one_sentence():
    with pytest.raises(UserError, match=r"below 1, got 1\.2"):
        prox_debiased(torch.rand(1, 5), 2, 0.6, torch.tensor([[1.0, 1.0, 2.0, 1.0, 1.0]]))


def test_a_strength_of_zero_is_one_sentence():
    with pytest.raises(UserError, match="lam must be above 0, got 0"):
        prox_envelope(torch.rand(1, 5), 2, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("make", [prox_envelope, prox_debiased])
def test_the_factors_do_not_depend_on_the_unit_of_the_norms(make, size, dtype):
    torch.manual_seed(0)
    norm_LM = torch.rand(2, 40, dtype=dtype) + 0.1
    norm_LM[:, ::7] = 0
    for k in (3, 20, 40):
        expected = make(norm_LM, k, 0.3).scale
        torch.testing.assert_close(make(norm_LM * size, k, 0.3).scale, expected)
        row = make(norm_LM[:1] * size, k, 0.3).scale
        torch.testing.assert_close(row, expected[:1])


@pytest.mark.parametrize("lam", [1e-7, 1e-5, 1e-3, 1.0, 100.0])
def test_single_precision_keeps_the_groups_that_double_keeps(lam):
    torch.manual_seed(1)
    norm_LM = torch.rand(1, 200).double() + 0.01
    for k in (1, 20, 150):
        exact = prox_envelope(norm_LM, k, lam)
        found = prox_envelope(norm_LM.float(), k, lam)
        torch.testing.assert_close(found.scale.double(), exact.scale, atol=2e-4, rtol=2e-4)
        at_zero = exact.gate < 1e-3 * min(1.0, lam)
        assert torch.equal((found.gate > 0)[~at_zero], (exact.gate > 0)[~at_zero])


@settings(max_examples=200, deadline=None)
@given(problems, st.floats(0.01, 100))
def test_one_row_is_evaluated_as_many_are(problem, eta):
    t_LMG, _, k, lam = problem
    slope_LM = t_LMG.norm(dim=-1)
    offset_L1 = torch.full((3, 1), lam).double()
    together = BudgetEquation(slope_LM, offset_L1, torch.full((3,), float(k)).double())
    kept_L, rate_L = together.evaluate(torch.full((3,), eta).double())
    for row in range(3):
        alone = BudgetEquation(
            slope_LM[row : row + 1], offset_L1[:1], torch.full((1,), float(k)).double()
        )
        kept, rate = alone.evaluate(torch.tensor([eta]).double())
        assert float(kept) == pytest.approx(float(kept_L[row]), rel=1e-12, abs=1e-12)
        assert float(rate) == pytest.approx(float(rate_L[row]), rel=1e-9, abs=1e-9)


def test_the_closed_form_of_the_value_holds_with_ties():
    norm_LM = torch.tensor([[0.3, 0.3, 0.3, 0.3], [2.0, 2.0, 2.0, 1.0]]).double()
    for k in (1, 2, 3, 4):
        closed_L = oracles.value_in_closed_form(norm_LM, torch.ones(2, 4).double(), k)
        value_L = envelope_value(
            norm_LM, torch.ones(2, 4).double(), torch.full((2,), float(k)).double()
        )
        torch.testing.assert_close(closed_L, value_L)
