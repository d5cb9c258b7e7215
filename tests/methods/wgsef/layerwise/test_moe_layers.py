"""Selection over several experts at once, against the same on the block-diagonal problem."""

import pytest
import torch

from bench.data.calibration import Calibration
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.moe.micro_experts import expert_spans, expert_view
from methods.wgsef.layerwise import reconstruction
from methods.wgsef.layerwise.moe_layers import WgsefLayerwise
from methods.wgsef.layerwise.reconstruction import Reconstruction
from tests.methods.wgsef.layerwise.oracles import by_elimination, by_energy, by_homotopy
from tests.models.tiny_networks import ARCHITECTURES, build, tokens

PAIRS = [
    (reconstruction.select_by_energy, by_energy),
    (reconstruction.select_by_elimination, by_elimination),
    (
        reconstruction.select_by_homotopy,
        lambda problem, k: by_homotopy(problem, k, reconstruction.HOMOTOPY_STEPS),
    ),
]


def blocks(sizes=(5, 9, 3), outputs=4, count=300):
    generator = torch.Generator().manual_seed(1)
    grams, weights = [], []
    for size in sizes:
        mix = torch.randn(4, size, generator=generator, dtype=torch.float64)
        seen = torch.randn(count, 4, generator=generator, dtype=torch.float64) * size
        phi_TM = torch.relu(seen @ mix)
        grams.append(phi_TM.T @ phi_TM / count)
        weights.append(torch.randn(size, outputs, generator=generator, dtype=torch.float64))
    return grams, weights


@pytest.mark.parametrize("k", [1, 6, 13, 17])
@pytest.mark.parametrize(("select", "single"), PAIRS)
def test_many_problems_are_the_block_diagonal_one(select, single, k):
    grams, weights = blocks()
    kept = select([Reconstruction.from_gram(g, w) for g, w in zip(grams, weights, strict=True)], k)
    whole = Reconstruction.from_gram(torch.block_diag(*grams), torch.cat(weights))
    expected = single(whole, k).norm(dim=1) > 0
    assert torch.equal(torch.cat(kept), expected)
    assert int(expected.sum()) == k


def test_an_expert_that_was_never_visited_goes_first():
    grams, weights = blocks()
    grams[1] = torch.zeros_like(grams[1])
    problems = [Reconstruction.from_gram(g, w) for g, w in zip(grams, weights, strict=True)]
    for select, _ in PAIRS:
        kept = select(problems, 8)
        assert not kept[1].any() and kept[0].all() and kept[2].all()


def applied(network, **knobs):
    config = ModelConfig(name="tiny", source="tests")
    model = Model(config, network, None, "", None, torch.device("cpu"))
    method = WgsefLayerwise(**{"ratio": 0.4, **knobs})
    method.check(model.structure)
    context = Context(seed=0, calibration=Calibration(tokens(), "calibration"))
    return model, method.apply(model, context)


@pytest.mark.sample(8)
@pytest.mark.parametrize("selector", ["debiased", "greedy", "energy"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_removes_the_budget_and_removed_equals_zeroed(name, selector):
    zeroed, report = applied(build(name), selector=selector, state="zeroed")
    removed, again = applied(build(name), selector=selector, state="removed", align=4)
    for found in (report, again):
        assert found.details["removed_micro_experts"] == sum(
            int(0.4 * block.micro_experts) for block in inspect_model(build(name)).moe
        )
    assert [x.kept_per_expert for x in report.layers] == [x.kept_per_expert for x in again.layers]
    ids = tokens()[:2]
    torch.testing.assert_close(
        removed.network(ids).logits, zeroed.network(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_a_share_of_each_expert_is_a_share_of_each_expert():
    name = next(iter(ARCHITECTURES))
    _, report = applied(build(name), scope="expert", ratio=0.5, state="zeroed")
    for block, layer in zip(inspect_model(build(name)).moe, report.layers, strict=True):
        widths = [place.stop - place.start for _, place in expert_spans(block)]
        left = layer.kept_per_expert
        assert all(abs(kept - width / 2) <= 1 for kept, width in zip(left, widths, strict=True))


def test_the_refit_never_adds_to_the_error_and_leaves_the_others_alone():
    name = next(iter(ARCHITECTURES))
    _, report = applied(build(name), state="zeroed", sequential=False)
    for layer in report.layers:
        assert layer.refit["error_after"] <= layer.refit["error_before"]
    before = build(name)
    after, _ = applied(build(name), refit=False, state="zeroed")
    for old, new in zip(inspect_model(before).moe, after.structure.moe, strict=True):
        for expert, _ in expert_spans(old):
            one, two = expert_view(old, expert).down, expert_view(new, expert).down
            stays = two.any(0)
            assert torch.equal(one[:, stays], two[:, stays])
