"""NAEE's error and search against the block itself, run without every subset in turn."""

from itertools import combinations

import pytest
import torch

from bench.errors import UserError
from bench.models.layer_stream import LayerStream
from bench.models.structure.model_structure import inspect_model
from bench.ui import SILENT
from methods.baselines.naee import (
    Naee,
    block_error_models,
    next_expert_to_drop,
    search_subset,
)
from methods.baselines.naee.block_error import BlockErrorModel
from methods.moe.micro_experts import expert_spans, zero_micro_experts
from tests.methods.method_application import Masked, applied, block_inputs, model_of, network_of
from tests.models.tiny_networks import ARCHITECTURES, Expert, build, tokens, unfuse


def slow_error(block, x_BLD, z_BLD, dropped, state):
    """Run the block without some experts; Frobenius norm a row in float64, summed over rows."""
    kept = {key: value.clone() for key, value in block.block.state_dict().items()}
    if state == "zeroed":
        places = dict(expert_spans(block))
        zero_micro_experts(
            block, torch.tensor([i for e in dropped for i in range(*places[e].indices(999))])
        )
        y_BLD = block.block(x_BLD)
    else:
        with Masked(block, dropped):
            y_BLD = block.block(x_BLD)
    block.block.load_state_dict(kept)
    rows = (z_BLD.double() - y_BLD.double()).flatten(1)
    return float(sum(torch.linalg.vector_norm(row) for row in rows))


def walk_of(network, *, progressive, kept):
    """Walk the blocks of a network with dropped experts, two rows at a time."""
    return block_error_models(
        model_of(network),
        tokens(),
        2,
        progressive=progressive,
        kept=kept,
        state="dropped",
        progress=SILENT,
    )


@pytest.mark.parametrize("state", ["dropped", "zeroed"])
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_error_is_that_of_the_block_without_them(name, layout, state):
    network = network_of(name, layout)
    block = inspect_model(network).moe[0]
    x_BLD = block_inputs(network, tokens())[0]
    y_BLD = block.block(x_BLD)
    error_model = BlockErrorModel(block, x_BLD, y_BLD, y_BLD, state)
    assert error_model.error(()) == 0
    for dropped in [(0,), (5,), (1, 4), (0, 3), (1, 2, 4, 5)]:
        expected = slow_error(block, x_BLD, y_BLD, dropped, state)
        assert error_model.error(dropped) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_progressive_compares_pruned_inputs_with_the_unpruned_output(name):
    dense, pruned = build(name), build(name)
    targets = [
        block.block(x)
        for block, x in zip(inspect_model(dense).moe, block_inputs(dense, tokens()), strict=True)
    ]
    walk = walk_of(pruned, progressive=True, kept=12)
    block, _ = next(walk)
    zero_micro_experts(block, torch.arange(40))
    later, error_model = next(walk)

    x_BLD = block_inputs(pruned, tokens())[1]
    for dropped in [(), (2,), (1, 5)]:
        expected = slow_error(later, x_BLD, targets[1], dropped, "dropped")
        assert error_model.error(dropped) == pytest.approx(expected, rel=1e-5)
    assert error_model.error(()) > 0.01


def test_not_progressive_sees_the_unpruned_model_throughout():
    walk = walk_of(build("olmoe"), progressive=False, kept=12)
    errors = []
    for block, error_model in walk:
        errors.append(error_model.error((1, 2)))
        zero_micro_experts(block, torch.arange(40))
    network = build("olmoe")
    for found, block, x in zip(
        errors, inspect_model(network).moe, block_inputs(network, tokens()), strict=True
    ):
        assert found == pytest.approx(slow_error(block, x, block.block(x), (1, 2), "dropped"))


@pytest.mark.sample(5)
@pytest.mark.parametrize("state", ["dropped", "zeroed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drops_the_best_subset_of_every_layer(name, state):
    """All subsets, layer after layer, each on what the pruned ones before it produce."""
    network = build(name)
    report = applied(Naee(ratio=0.45, state=state), network).layers
    slow, dense = build(name), build(name)
    for number, layer in enumerate(report):
        block = inspect_model(slow).moe[number]
        x_BLD = block_inputs(slow, tokens())[number]
        z_BLD = inspect_model(dense).moe[number].block(block_inputs(dense, tokens())[number])
        count, rest = divmod(int(0.45 * block.micro_experts), 12)
        assert count > 1
        errors = {
            subset: slow_error(block, x_BLD, z_BLD, subset, state)
            for subset in combinations(range(6), count)
        }
        best = min(errors, key=errors.get)
        assert tuple(layer.whole_experts) == best
        assert layer.error == pytest.approx(errors[best], rel=1e-4)
        assert (layer.search, layer.subsets_tried) == ("exhaustive", len(errors))
        if rest:
            left = [e for e in range(6) if e not in best]
            more = {e: slow_error(block, x_BLD, z_BLD, (*best, e), state) for e in left}
            assert layer.partial_expert == {"expert": min(more, key=more.get), "removed": rest}
        slow.model.layers[block.layer].mlp = network.model.layers[block.layer].mlp


def test_greedy_takes_one_after_the_other():
    network = unfuse(build("qwen2_moe"))
    block = inspect_model(network).moe[0]
    x_BLD = block_inputs(network, tokens())[0]
    y_BLD = block.block(x_BLD)
    error_model = BlockErrorModel(block, x_BLD, y_BLD, y_BLD, "dropped")
    found = search_subset(6, 3, error_model.errors, limit=19)

    dropped = []
    for _ in range(3):
        left = [e for e in range(6) if e not in dropped]
        errors = {e: slow_error(block, x_BLD, y_BLD, (*dropped, e), "dropped") for e in left}
        dropped.append(min(errors, key=errors.get))
    assert (found.strategy, found.tried) == ("greedy", 6 + 5 + 4)
    assert found.dropped == tuple(sorted(dropped))
    assert found.error == pytest.approx(min(errors.values()), rel=1e-5)
    best = search_subset(6, 3, error_model.errors, limit=20)
    assert (best.strategy, best.tried) == ("exhaustive", 20)
    assert best.error <= found.error


@pytest.mark.parametrize("name", [*ARCHITECTURES, "qwen2_moe normalised"])
def test_all_subsets_together_have_the_errors_of_each_alone(name):
    """By the table of choices where the rule allows it, and by the rule itself elsewhere."""
    changes = {"norm_topk_prob": True} if "normalised" in name else {}
    network = build(name.split()[0], **changes)
    block = inspect_model(network).moe[0]
    x_BLD = block_inputs(network, tokens())[0]
    y_BLD = block.block(x_BLD)
    error_model = BlockErrorModel(block, x_BLD, y_BLD, y_BLD, "dropped")
    # More than the 15 pairs that a token can be left with.
    subsets = [s for count in (1, 2, 3) for s in combinations(range(6), count)]
    alone = [error_model.error(subset) for subset in subsets]
    assert error_model.errors(subsets) == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek", "deepseek_v3"])
def test_errors_are_looked_up_only_where_weights_depend_on_the_chosen_alone(name):
    network = build(name)
    block = inspect_model(network).moe[0]
    x_BLD = block_inputs(network, tokens())[0]
    y_BLD = block.block(x_BLD)
    error_model = BlockErrorModel(block, x_BLD, y_BLD, y_BLD, "dropped")
    gone_SE = torch.zeros(20, 6, dtype=torch.bool)
    gone_SE.scatter_(1, torch.tensor(list(combinations(range(6), 3))), True)
    found = error_model._choices(gone_SE)
    assert (found is not None) == (name in ("mixtral", "qwen3_moe"))


def test_greedy_can_be_wrong_where_all_subsets_are_not():
    table = {(0,): 1, (1,): 2, (2,): 2, (0, 1): 9, (0, 2): 9, (1, 2): 3}

    def errors(subsets):
        return [table[tuple(sorted(subset))] for subset in subsets]

    assert search_subset(3, 2, errors, limit=2).dropped == (0, 1)
    assert search_subset(3, 2, errors, limit=3).dropped == (1, 2)
    assert next_expert_to_drop(3, (1,), errors) == (2, 3)


def test_searches_on_evenly_spaced_tokens_of_every_row():
    report = applied(Naee(ratio=0.4, tokens=20), build("mixtral")).details
    assert report["tokens"] == 5 * 4
    everything = applied(Naee(ratio=0.4, tokens=10_000), build("mixtral")).details
    assert everything["tokens"] == 60
    walk = walk_of(build("mixtral"), progressive=False, kept=4)
    block, error_model = next(walk)
    x_BLD = block_inputs(build("mixtral"), tokens())[0][:, ::3]
    expected = slow_error(block, x_BLD, block.block(x_BLD), (1, 3), "dropped")
    assert error_model.error((1, 3)) == pytest.approx(expected, rel=1e-5)


def test_refuses_experts_of_different_width():
    network = unfuse(build("mixtral"))
    experts = inspect_model(network).moe[0].experts
    experts[0] = Expert(torch.ones(5, 16), torch.ones(5, 16), torch.ones(16, 5), experts[0].act_fn)
    with pytest.raises(UserError, match="different widths"):
        Naee(ratio=0.2).check(inspect_model(network))


def test_both_streams_let_go_of_their_layer(monkeypatch):
    leave, left = LayerStream.__exit__, []

    def counted(self, *exception):
        left.append(self)
        leave(self, *exception)

    monkeypatch.setattr(LayerStream, "__exit__", counted)
    applied(Naee(ratio=0.2), network_of("mixtral"))
    assert len(left) == 2
