"""Every solver against a slow, direct transcription of its definition, group by group."""

import math

import pytest
import torch
from scipy.optimize import minimize

from bench.errors import UserError
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from methods.wgsef.groups import convolution
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.prox.operators import prox_envelope
from methods.wgsef.solvers.allocation import (
    GlobalAllocation,
    PatternAllocation,
    ProxParameters,
)
from methods.wgsef.solvers.group_lasso import (
    AdaHspgSolver,
    AdaptiveGroupLassoSolver,
    GroupLassoSolver,
    HspgSolver,
    ReleasedHspgSolver,
)
from methods.wgsef.solvers.optimizers import ProximalAdam, ProximalSGD
from methods.wgsef.solvers.penalties import (
    DeepHoyerSolver,
    GroupNormSolver,
    GrowingRegSolver,
    ReleasedDeepHoyerSolver,
    SlimmingSolver,
    hoyer_square,
)
from methods.wgsef.solvers.solver import HardThresholdSolver, MagnitudeSolver, SolverContext
from tests.methods.wgsef.solvers.solver_setup import (
    RATE,
    close,
    gradients,
    groups,
    sgd_step,
    slopes,
    solver_context,
    units,
)


@pytest.fixture
def context():
    return solver_context()


def test_group_lasso_is_the_block_soft_threshold(context):
    x, g = sgd_step(context, GroupLassoSolver(context, 0.5))
    expected = []
    for xj, gj in zip(x, g, strict=True):
        t = xj - RATE * gj
        expected.append(max(0.0, 1 - RATE * 0.5 * math.sqrt(len(t)) / float(t.norm())) * t)
    close(groups(context), expected)
    assert any(not e.any() for e in expected) and any(e.any() for e in expected)


@pytest.mark.parametrize("adam", [False, True])
def test_adaptive_group_lasso_minimises_its_objective(context, adam):
    solver = AdaptiveGroupLassoSolver(context, 0.3)
    gradients(context)
    x = groups(context)
    make = ProximalAdam if adam else ProximalSGD
    optimizer = make(context.network.parameters(), solver, RATE)
    plain = make(clone(context), MagnitudeSolver(context), RATE)
    plain.step()
    named = dict(zip(context.partition.parameters, plain.param_groups[0]["params"], strict=True))
    t = groups(context, {n: w.detach() for n, w in named.items()})
    optimizer.step()
    metric = groups(
        context, {n: optimizer.metric(w) for n, w in context.partition.parameters.items()}
    )
    v = groups(context)
    assert any(not one.any() for one in v) or adam
    for j in range(0, len(x), 23):
        lam = RATE * 0.3 * math.sqrt(len(t[j]))

        def objective(y, j=j, lam=lam):
            y = torch.tensor(y, requires_grad=True)
            value = 0.5 * (metric[j] * (y - t[j]) ** 2).sum() + lam * y.norm()
            value.backward()
            return float(value.detach()), y.grad.nan_to_num().numpy()

        best = minimize(objective, t[j].numpy(), jac=True, method="L-BFGS-B").fun
        assert objective(v[j].numpy())[0] <= best + 1e-6


def clone(context):
    copies = []
    for weight in context.network.parameters():
        copy = weight.detach().clone().requires_grad_(True)
        copy.grad = weight.grad.clone()
        copies.append(copy)
    return copies


def test_hspg_projects_what_left_its_half_space(context):
    solver = HspgSolver(context, strength=0.5, epsilon=0.2, warmup=0.0)
    context.partition.scale_((torch.arange(context.partition.groups) % 7 > 0).double())
    x, g = sgd_step(context, solver)
    expected = []
    for xj, gj in zip(x, g, strict=True):
        if not xj.any():
            expected.append(xj)
            continue
        y = xj - RATE * (gj + 0.5 * math.sqrt(len(xj)) * xj / xj.norm())
        expected.append(torch.zeros_like(y) if y @ xj < 0.2 * xj @ xj else y)
    close(groups(context), expected)
    assert 0 < sum(bool(e.any()) for e in expected) < sum(bool(xj.any()) for xj in x)


def test_hspg_begins_as_prox_sg(context):
    x, g = sgd_step(context, HspgSolver(context, strength=0.5, warmup=0.5))
    expected = []
    for xj, gj in zip(x, g, strict=True):
        t = xj - RATE * gj
        expected.append(max(0.0, 1 - RATE * 0.5 * math.sqrt(len(t)) / float(t.norm())) * t)
    close(groups(context), expected)


def released_hspg(x, buffers, phase, eps):
    """One step of the released code on one group, given its momentum's buffer."""
    norm = float(x.norm())
    if phase == "half-space":
        y = x - RATE * buffers
        return torch.zeros_like(x) if not norm or y @ x < eps * norm**2 else y
    return x - RATE * buffers


@pytest.mark.parametrize("phase", ["sub-gradient", "half-space"])
def test_released_hspg_puts_its_regulariser_into_the_momentum(context, phase):
    context.partition.scale_((torch.arange(context.partition.groups) % 7 > 0).double())
    warmup = 0.0 if phase == "half-space" else 1.0
    solver = ReleasedHspgSolver(context, strength=0.5, epsilon=0.95, warmup=warmup)
    optimizer = ProximalSGD(context.network.parameters(), solver, RATE, momentum=0.9)
    x, buffers = groups(context), [torch.zeros_like(xj) for xj in groups(context)]
    for seed in (1, 2, 3):
        gradients(context, seed)
        offset = 1e-6 if phase == "half-space" else 0.0
        for j, gj in enumerate(slopes(context)):
            pull = 0.5 * x[j] / (x[j].norm() + offset) if x[j].any() else torch.zeros_like(x[j])
            # torch's first buffer is the gradient itself.
            buffers[j] = (0.9 * buffers[j] if seed > 1 else 0) + gj + pull
            x[j] = released_hspg(x[j], buffers[j], phase, 0.95)
        optimizer.step()
        close(groups(context), x)
    zeros = sum(not xj.any() for xj in x)
    assert (zeros > len(x) // 7 + 1) is (phase == "half-space")


def test_released_hspg_stops_at_its_cap(context):
    solver = ReleasedHspgSolver(context, strength=50.0, epsilon=0.9, warmup=0.0, cap=0.4)
    sgd_step(context, solver)
    # All groups leave their half-space at once: the excess of the share over the cap goes.
    for family, alive_M in zip(
        context.partition.families, context.partition.split(context.partition.alive()), strict=True
    ):
        assert int((~alive_M).sum()) == int(family.groups * (1 - 0.4))
    before = int(context.partition.alive().sum())
    sgd_step(context, solver)
    assert int(context.partition.alive().sum()) == before


def test_adahspg_chooses_its_step_by_what_moves_more(context):
    for mu, chosen in ((0.0, True), (1e9, False)):
        solver = AdaHspgSolver(context, strength=0.5, mu=mu)
        optimizer = ProximalSGD(context.network.parameters(), solver, RATE)
        for _ in range(context.epoch):
            gradients(context)
            optimizer.step()
        assert solver.in_half_space_phase() is chosen


def test_deep_hoyer_adds_the_gradient_of_its_penalty(context):
    solver = DeepHoyerSolver(context, strength=0.7)
    named = {
        n: w.detach().double().requires_grad_(True) for n, w in context.partition.parameters.items()
    }
    penalty = 0.0
    for family in context.partition.families:
        norms = torch.zeros(family.groups).double()
        for owned in family.owned_slices:
            part = named[owned.tensor][owned.units].reshape(len(owned.units), -1).square().sum(1)
            norms = norms.index_add(0, owned.groups, part)
        norms = norms.sqrt()
        penalty = penalty + 0.7 * norms.sum() ** 2 / norms.square().sum()
    penalty.backward()
    gradients(context)
    before = {n: w.grad.clone() for n, w in context.partition.parameters.items()}
    solver.before_step(ProximalSGD(context.network.parameters(), solver, RATE))
    for name in context.partition.owned_parameters():
        added = context.partition.parameters[name].grad - before[name]
        torch.testing.assert_close(added.double(), named[name].grad, atol=1e-6, rtol=1e-4)


def test_released_deep_hoyer_sums_filters_and_channels_of_every_layer(context):
    gradients(context)
    layers = {
        n: m.weight
        for n, m in context.network.named_modules()
        if type(m).__name__ in ("Conv2d", "Linear")
    }
    assert len(layers) > len(context.partition.families)
    with torch.no_grad():
        next(iter(layers.values()))[0] = 0
    before = {n: w.grad.clone() for n, w in context.network.named_parameters()}
    solver = ReleasedDeepHoyerSolver(context, strength=0.7)
    solver.before_step(ProximalSGD(context.network.parameters(), solver, RATE))
    expected = dict(before)
    for name, weight in layers.items():
        w = weight.detach().double().flatten(2) if weight.ndim > 2 else weight.detach().double()
        sides = [
            torch.tensor([float(w[f].norm()) for f in range(w.shape[0])]).double(),
            torch.tensor([float(w[:, c].norm()) for c in range(w.shape[1])]).double(),
        ]
        power = w.square().sum()
        added = torch.zeros_like(w)
        for f in range(w.shape[0]):
            for c in range(w.shape[1]):
                for norms, place in ((sides[0], f), (sides[1], c)):
                    if norms[place] > 0:
                        added[f, c] += 2 * norms.sum() / power * w[f, c] / norms[place]
                    added[f, c] -= 2 * norms.sum() ** 2 / power**2 * w[f, c]
        expected[f"{name}.weight"] = before[f"{name}.weight"] + 0.7 * added.reshape(weight.shape)
    for name, weight in context.network.named_parameters():
        found = weight.grad.double()
        torch.testing.assert_close(found, expected[name].double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("matrix", "value"), [([[1.0, 0], [0, 1]], 4), ([[1.0, 0], [0, 0]], 2)])
def test_hoyer_square_counts_what_is_left_and_ignores_scale(matrix, value):
    weight = torch.tensor(matrix)
    assert float(hoyer_square(weight)) == pytest.approx(value)
    assert float(hoyer_square(7 * weight)) == pytest.approx(value)


def test_group_norm_as_released_has_the_same_penalty_and_another_ranking(context):
    pulls, scores = [], []
    for normalizer in ("mean", "max"):
        gradients(context)
        before = slopes(context)
        solver = GroupNormSolver(context, normalizer=normalizer)
        solver.before_step(ProximalSGD(context.network.parameters(), solver, RATE))
        pulls.append([new - old for new, old in zip(slopes(context), before, strict=True)])
        scores.append(context.partition.split(solver.score()))
    close(*pulls)
    for by_mean, by_maximum in zip(*scores, strict=True):
        assert float(by_maximum.max()) == pytest.approx(1)
        torch.testing.assert_close(by_maximum, by_mean / by_mean.max(), atol=1e-6, rtol=1e-5)


def test_slimming_adds_the_sign_of_every_scale_and_ranks_by_it(context):
    gradients(context)
    scales = {
        n: m.weight for n, m in context.network.named_modules() if type(m).__name__ == "BatchNorm2d"
    }
    before = {n: w.grad.clone() for n, w in scales.items()}
    solver = SlimmingSolver(context, strength=0.3)
    solver.before_step(ProximalSGD(context.network.parameters(), solver, RATE))
    for name, weight in scales.items():
        torch.testing.assert_close(weight.grad, before[name] + 0.3 * weight.detach().sign())
    expected = []
    for family in context.partition.families:
        (owned,) = [s for s in family.owned_slices if s.tensor.removesuffix(".weight") in scales]
        expected += scales[owned.tensor.removesuffix(".weight")].detach().abs().tolist()
    torch.testing.assert_close(solver.score(), torch.tensor(expected).double())


def test_slimming_without_batchnorm_is_one_sentence():
    network = build_classifier(VisionConfig(architecture="micro_lenet", channels=1, size=8))
    image = torch.zeros(1, 1, 8, 8)
    partition = GroupPartition(network, convolution.filters(network, image))
    context = SolverContext(network, partition, GlobalAllocation(partition, 0.5), 10, 5, image)
    with pytest.raises(UserError, match=r"slimming needs BatchNorm scales, but .* has none"):
        SlimmingSolver(context, 0.1)


def test_iterative_hard_thresholding_keeps_the_largest(context):
    solver = HardThresholdSolver(context)
    solver.step = 9
    unit = units(context)
    x, g = sgd_step(context, solver)
    t = [xj - RATE * gj for xj, gj in zip(x, g, strict=True)]
    order = sorted(range(len(t)), key=lambda j: -unit[j] * float(t[j].norm()))
    kept, left = [], {id(f): max(1, math.ceil(0.05 * f.groups)) for f in context.partition.families}
    owner = [f for f in context.partition.families for _ in range(f.groups)]
    for j in order:
        if left[id(owner[j])]:
            left[id(owner[j])] -= 1
            kept.append(j)
    rest = [j for j in order if j not in kept]
    kept += rest[: len(t) // 2 - len(kept)]
    close(groups(context), [t[j] if j in kept else torch.zeros_like(t[j]) for j in range(len(t))])


@pytest.mark.parametrize("make", [GroupNormSolver, GrowingRegSolver])
def test_torch_prunings_penalty_grows_as_the_group_weakens(context, make):
    gradients(context)
    before = slopes(context)
    solver = make(context)
    solver.before_step(ProximalSGD(context.network.parameters(), solver, RATE))
    pull = [
        float((after - old).norm() / xj.norm())
        for after, old, xj in zip(slopes(context), before, groups(context), strict=True)
    ]
    score_M = solver.score()
    for family, scores, pulls in zip(
        context.partition.families,
        context.partition.split(score_M),
        context.partition.split(torch.tensor(pull)),
        strict=True,
    ):
        assert family.groups == len(scores)
        assert pulls[scores.argmin()] > pulls[scores.argmax()]


def test_torch_prunings_solvers_refuse_other_groups():
    network = build_classifier(VisionConfig(architecture="micro_vgg", channels=1, size=8))
    image = torch.zeros(1, 1, 8, 8)
    partition = GroupPartition(network, convolution.filter_shapes(network, image))
    context = SolverContext(network, partition, GlobalAllocation(partition, 0.5), 10, 5, image)
    with pytest.raises(UserError, match="need groups=filters, got filter_shapes"):
        GroupNormSolver(context)


def test_a_pattern_keeps_its_share_of_every_run():
    torch.manual_seed(0)
    network = build_classifier(VisionConfig(architecture="micro_vgg", channels=1, size=8))
    image = torch.zeros(1, 1, 8, 8)
    families = convolution.weights(network, image)[1:]
    partition = GroupPartition(network, families)
    allocation = PatternAllocation(partition, 2, 4)
    score_M = partition.norms()
    keep_M = allocation.select(score_M)
    assert allocation.k(1.0) == int(keep_M.sum()) == partition.groups // 2
    for family, kept in zip(families, partition.split(keep_M), strict=True):
        (owned,) = family.owned_slices
        weight = partition.parameters[owned.tensor].detach().flatten().abs()
        for start in range(0, 400, 4):
            largest = weight[start : start + 4].topk(2).indices
            assert kept[start : start + 4].nonzero().flatten().tolist() == sorted(largest.tolist())
    # Each run solves the equation that it would solve alone.
    scale_M, _ = allocation.shrink(prox_envelope, score_M, ProxParameters(0.5), 1.0)
    alone = prox_envelope(score_M[None, 40:44], 2, 0.5).scale[0]
    torch.testing.assert_close(scale_M[40:44], alone)


def test_a_pattern_that_does_not_fit_is_one_sentence():
    network = build_classifier(VisionConfig(architecture="micro_vgg", channels=1, size=8))
    partition = GroupPartition(network, convolution.weights(network, torch.zeros(1, 1, 8, 8)))
    with pytest.raises(UserError, match=r"pattern=\[3,7\] does not fit the \d+ weights of"):
        PatternAllocation(partition, 3, 7)
