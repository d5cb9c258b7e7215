"""Training: the budget is met, a resumed run equals an uninterrupted one, bad input is refused."""

import pytest
import torch

from bench.data.image_sets import Splits, TensorSet
from bench.errors import UserError
from bench.method import RecipeConfig
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from methods.wgsef.groups import convolution
from methods.wgsef.groups.costs import GroupCosts
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.solvers.allocation import CostAllocation, GlobalAllocation, LayerAllocation
from methods.wgsef.solvers.envelope import DebiasedSolver, EnvelopeHalfSpaceSolver, EnvelopeSolver
from methods.wgsef.solvers.group_lasso import AdaHspgSolver, AdaptiveGroupLassoSolver
from methods.wgsef.solvers.hesso import HessoSolver
from methods.wgsef.solvers.optimizers import ProximalAdam, ProximalSGD
from methods.wgsef.solvers.penalties import GrowingRegSolver
from methods.wgsef.solvers.schedules import cubic_sparsity, learning_rate_factor
from methods.wgsef.solvers.solver import HardThresholdSolver, MagnitudeSolver
from methods.wgsef.trainer import Trainer, TrainingJob

SOLVERS = {
    "debiased": DebiasedSolver,
    "envelope": EnvelopeSolver,
    "envelope_half_space": EnvelopeHalfSpaceSolver,
    "adahspg": lambda context: AdaHspgSolver(context, 1e-2),
    "growing_reg": GrowingRegSolver,
    "hesso": lambda context: HessoSolver(context, start=0.1, span=0.8, periods=2),
    "hard_threshold": HardThresholdSolver,
}


def splits(count=48, channels=1):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, 8, 8), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = TensorSet(pixels, labels, ((0.5,) * channels, (0.25,) * channels), shift=1)
    return Splits("noise", images, images, channels, 8, 10, "drawn")


def trainer(
    solver,
    folder=None,
    budget="groups",
    sparsity=0.5,
    save_every=0,
    optimizer="sgd",
    channels=1,
    **settings,
):
    torch.manual_seed(0)
    network = build_classifier(VisionConfig(architecture="micro_vgg", channels=channels, size=8))
    image = torch.zeros(1, channels, 8, 8)
    families = convolution.filters(network, image)
    partition = GroupPartition(network, families)
    if budget in ("macs", "bytes", "seconds"):
        costs = GroupCosts(network, families, image, budget)
        allocation = CostAllocation(partition, sparsity, costs)
    else:
        kind = LayerAllocation if budget == "layer" else GlobalAllocation
        allocation = kind(partition, sparsity)
    rate = 0.05 if optimizer == "sgd" else 2e-3
    recipe = RecipeConfig(
        epochs=3,
        batch=8,
        rate=rate,
        optimizer=optimizer,
        save_every=save_every,
        sparse_share=0.6,
        **settings,
    )
    return Trainer(
        TrainingJob(
            network, splits(channels=channels), partition, allocation, solver, recipe, 7, folder
        )
    ), network


class Killed(Exception):
    pass


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "optimizer", "kill"),
    [
        ("debiased", "sgd", 9),
        ("debiased", "adam", 8),
        ("envelope", "adam", 5),
        ("envelope_half_space", "sgd", 9),
        ("adahspg", "sgd", 8),
        ("growing_reg", "sgd", 9),
        ("hesso", "sgd", 5),
        ("hard_threshold", "sgd", 16),
    ],
)
def test_a_killed_run_ends_in_the_very_same_weights(name, optimizer, kill, tmp_path):
    whole, expected = trainer(SOLVERS[name], optimizer=optimizer)
    outcome = whole.run()

    first, network = trainer(SOLVERS[name], tmp_path, save_every=2, optimizer=optimizer)
    step = first._train_step

    def until_killed(*batch):
        if first._step == kill:
            raise Killed
        step(*batch)

    first._train_step = until_killed
    with pytest.raises(Killed):
        first.run()
    second, network = trainer(SOLVERS[name], tmp_path, save_every=2, optimizer=optimizer)
    resumed = second.run()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[key]), key
    assert resumed.history == outcome.history
    assert torch.equal(resumed.keep, outcome.keep) and resumed.alive == outcome.alive


def test_a_resumed_run_keeps_the_times_that_were_measured_first(tmp_path):
    first, _ = trainer(DebiasedSolver, tmp_path, budget="seconds")
    first._checkpoints.save(first._checkpoint)
    measured = first._job.allocation.state()["costs"].clone()
    second, _ = trainer(DebiasedSolver, tmp_path, budget="seconds")
    second._job.allocation.state()["costs"].mul_(torch.arange(1, len(measured) + 1))
    second._resume()
    assert torch.equal(second._job.allocation.state()["costs"], measured)
    # The budget is that of the restored times.
    kept = torch.ones(second._job.partition.groups, dtype=torch.bool)
    assert second._job.allocation.used(kept)["kept"] == pytest.approx(float(measured.sum()))


def test_training_in_bfloat16_rounds_products_and_keeps_float32_weights(tmp_path):
    whole, _ = trainer(DebiasedSolver)
    rounded, network = trainer(DebiasedSolver, tmp_path, dtype="bfloat16", channels_last=True)
    expected, found = whole.run(), rounded.run()
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    # The first epoch, before roundings add up: products have 8 bits, so the losses are not equal.
    first, other = expected.history[0]["loss"], found.history[0]["loss"]
    assert 0 < abs(first - other) < 0.02 * first
    assert int(found.keep.sum()) == int(expected.keep.sum())


def test_the_memory_format_of_the_images_changes_only_rounding(tmp_path):
    # With one colour the two formats are the same.
    whole, _ = trainer(DebiasedSolver, channels=3)
    last, network = trainer(DebiasedSolver, tmp_path, channels_last=True, channels=3)
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    outcome, found = whole.run(), last.run()
    trained = [images for images in seen if len(images) == 8]
    assert trained and all(
        images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        for images in trained
    )
    assert found.history[0]["loss"] == pytest.approx(outcome.history[0]["loss"], rel=1e-5)
    assert torch.equal(found.keep, outcome.keep)
    assert all(tensor.is_contiguous() for tensor in network.state_dict().values())


def test_a_checkpoint_of_another_run_is_one_sentence(tmp_path):
    trainer(DebiasedSolver, tmp_path)[0].run()
    with pytest.raises(UserError, match="holds a checkpoint of a different run"):
        trainer(DebiasedSolver, tmp_path, optimizer="adam")[0].run()


@pytest.mark.parametrize("solver", [DebiasedSolver, MagnitudeSolver])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_a_global_budget_leaves_exactly_k_groups(solver, sparsity):
    run, _ = trainer(solver, sparsity=sparsity)
    outcome = run.run()
    partition = run._job.partition
    k = partition.groups - int(sparsity * partition.groups)
    assert int(outcome.keep.sum()) == int(partition.alive().sum()) == k
    assert outcome.alive == (k if solver is DebiasedSolver else partition.groups)
    floors = [max(1, -(-size // 20)) for size in partition.sizes]
    left = [int(part.sum()) for part in partition.split(outcome.keep)]
    assert all(count >= floor for count, floor in zip(left, floors, strict=True))


def test_a_budget_per_layer_leaves_its_share_of_each():
    run, _ = trainer(DebiasedSolver, budget="layer", sparsity=0.5)
    outcome = run.run()
    partition = run._job.partition
    left = [int(part.sum()) for part in partition.split(outcome.keep)]
    assert left == [size // 2 for size in partition.sizes]


@pytest.mark.parametrize("unit", ["macs", "bytes"])
@pytest.mark.parametrize("solver", [DebiasedSolver, EnvelopeSolver])
def test_a_cost_budget_is_met_and_used(unit, solver):
    run, network = trainer(solver, budget=unit, sparsity=0.6)
    outcome = run.run()
    partition = run._job.partition
    costs = GroupCosts(network, partition.families, torch.zeros(1, 1, 8, 8), unit)
    kept = torch.tensor([[int(part.sum()) for part in partition.split(outcome.keep)]])
    spent = float(costs.total(kept)) / costs.dense()
    assert 0.3 < spent <= 0.4


def test_dead_groups_stay_dead_while_the_others_are_tuned():
    run, _ = trainer(DebiasedSolver, sparsity=0.7)
    outcome = run.run()
    assert torch.equal(run._job.partition.alive(), outcome.keep)
    assert [line["epoch"] for line in outcome.history] == [1, 2, 3]
    assert outcome.history[-1]["alive"] == int(outcome.keep.sum())


def test_prox_sgd_and_prox_adam_are_their_base_step_without_a_solver():
    class Idle:
        def before_step(self, optimizer): ...
        def after_step(self, optimizer): ...

    for make, base, knobs in (
        (ProximalSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (ProximalAdam, torch.optim.AdamW, {"weight_decay": 0.1}),
    ):
        mine, theirs = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        first, second = make([mine], Idle(), lr=0.1, **knobs), base([theirs], lr=0.1, **knobs)
        for optimizer, weight in ((first, mine), (second, theirs)):
            for _ in range(3):
                optimizer.zero_grad()
                before = weight.detach().square().sum()
                assert torch.equal(optimizer.step(lambda w=weight: backward(w)), before)
        assert torch.equal(mine, theirs)


def backward(weight):
    loss = weight.square().sum()
    loss.backward()
    return loss.detach()


def test_adams_metric_is_what_its_step_was_divided_by():
    weight = torch.zeros(4, requires_grad=True)
    optimizer = ProximalAdam(
        [weight], type("Idle", (), {"before_step": noop, "after_step": noop})(), lr=0.1
    )
    weight.grad = torch.tensor([1.0, -2.0, 3.0, 0.5])
    optimizer.step()
    step = weight.grad / optimizer.metric(weight) * optimizer.rate
    torch.testing.assert_close(weight.detach(), -step)


def noop(self, optimizer):
    """Leave everything as it is."""


def test_the_recipe_is_that_of_torch_with_nesterov_and_norms_without_decay():
    settings = {"nesterov": True, "decay_norms": False, "decay": 0.1, "warmup": 0.3}
    ours, network = trainer(MagnitudeSolver, **settings)
    _, theirs = trainer(MagnitudeSolver)
    theirs.requires_grad_(True).train()
    network.train()
    matrices = [weight for weight in theirs.parameters() if weight.ndim > 1]
    vectors = [weight for weight in theirs.parameters() if weight.ndim == 1]
    assert matrices
    assert vectors
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    steps = 18
    for step in range(1, 4):
        images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
        ours._train_step(images, labels)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (step / steps) / 0.3
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(images), labels).backward()
        optimizer.step()
    for weight, expected in zip(network.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"warmup": 0.7}, "warmup=0.7 must be below sparse_share=0.7"),
        ({"nesterov": True, "optimizer": "adam"}, "needs optimizer=sgd and momentum above 0"),
        ({"nesterov": True, "momentum": 0}, "needs optimizer=sgd and momentum above 0"),
    ],
)
def test_settings_of_a_recipe_that_do_not_fit_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        RecipeConfig(**settings)


def test_schedules_begin_and_end_where_they_say():
    assert [cubic_sparsity(p) for p in (-1, 0, 1, 2)] == [0, 0, 1, 1]
    assert learning_rate_factor(0.05, 0.7) == 1
    assert learning_rate_factor(0.7, 0.7) == pytest.approx(0)
    assert learning_rate_factor(0.7001, 0.7) == pytest.approx(0.5, abs=1e-3)
    assert learning_rate_factor(1.0, 0.7) == pytest.approx(0)


def test_floors_above_the_budget_are_one_sentence():
    with pytest.raises(UserError, match=r"leaves 1 of 160 groups, fewer than the floors .*\(10\)"):
        trainer(DebiasedSolver, sparsity=0.995)


def test_floors_above_a_cost_budget_are_one_sentence():
    with pytest.raises(UserError, match="of all macs, less than the floors of all layers together"):
        trainer(DebiasedSolver, budget="macs", sparsity=0.9999)


def test_a_batch_above_the_data_is_one_sentence():
    run, _ = trainer(DebiasedSolver)
    job = run._job
    small = RecipeConfig(epochs=1, batch=64)
    with pytest.raises(UserError, match=r"recipe\.batch=64 is larger"):
        Trainer(
            TrainingJob(
                job.network, splits(20), job.partition, job.allocation, DebiasedSolver, small, 0
            )
        )


def test_the_adaptive_group_lasso_trains_with_adam():
    run, _ = trainer(lambda context: AdaptiveGroupLassoSolver(context, 1e-3), optimizer="adam")
    assert 0 < int(run.run().keep.sum()) <= 80
