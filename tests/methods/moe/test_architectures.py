"""Every architecture with experts: a block is its decomposition, zeroed is removed, or refused."""

import copy
from functools import cache

import pytest
import torch

from bench.models.expert_hooks import observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.structure.model_structure import inspect_model
from methods.baselines.expert_removal import drop_experts, router_mode
from methods.baselines.expert_scores import Reap
from methods.camera.pruning import CameraP
from methods.moe.calibration import NullObserver
from tests.methods.method_application import Masked, applied
from tests.methods.moe.architectures import DOCUMENT, END, METHODS, START, refusal, table
from tests.models import moe_zoo
from tests.models.moe_zoo import DROPPABLE, REFUSED, SUPPORTED
from tests.models.tiny_networks import tokens


@cache
def original(name):
    return moe_zoo.build(name)


def network_of(name):
    return copy.deepcopy(original(name))


def rows():
    return tokens(rows=3, length=10)


class Outputs(NullObserver):
    """Keeps what a block returns, shared experts beside it included."""

    def output(self, y_TD):
        self.y_TD = y_TD


def slow_output(block, x_TD, index_TK, weight_TK):
    """Sum a block's micro-experts one by one, token by token."""
    y_TD = torch.zeros_like(x_TD)
    for token, x_D in enumerate(x_TD):
        for expert, weight in zip(index_TK[token].tolist(), weight_TK[token], strict=True):
            view = block.expert(expert)
            hidden_F = view.hidden(x_D[None])[0]
            for channel in range(view.width):
                y_TD[token] += weight * hidden_F[channel] * view.down[:, channel]
            if view.down_bias is not None:
                y_TD[token] += weight * view.down_bias
    y_TD *= block.routed_scale
    shared = block.shared_view()
    if shared is not None:
        gate = 1 if block.shared_gate is None else torch.sigmoid(block.shared_gate(x_TD))
        y_TD += block.shared_scale * gate * shared.combine(shared.hidden(x_TD))
    return y_TD


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_block_equals_its_decomposition(name):
    network = network_of(name)
    blocks = inspect_model(network).moe
    seen = {}
    for block in blocks:
        block.experts.register_forward_pre_hook(
            lambda _, args, kwargs, name=block.name: seen.update({name: (*args, *kwargs.values())}),
            with_kwargs=True,
        )
    observers = {block: Outputs() for block in blocks}
    with observe_experts(observers):
        network(rows())
    for block, found in observers.items():
        x, index_TK, weight_TK = seen[block.name]
        wanted = slow_output(block, x.flatten(0, -2), index_TK, weight_TK)
        apart = (found.y_TD - wanted).norm() / wanted.norm()
        assert apart < 1e-6, block.name


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", SUPPORTED)
def test_layer_by_layer_equals_the_whole_forward(name):
    network, seen = network_of(name), []
    layers = inspect_model(network).layers
    stream = LayerStream(network, layers, rows(), batch=2)
    layers[-1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    for index in range(len(layers)):
        stream.run(index, advance=True)
    last, seen[:] = torch.cat(seen), []
    network(rows())
    torch.testing.assert_close(last, seen[0], rtol=1e-5, atol=1e-5)


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", SUPPORTED)
def test_zeroed_equals_removed(name):
    zeroed, removed = network_of(name), network_of(name)
    # Random routers reach few experts, and the others go first without any effect.
    knobs = {"ratio": 0.9, "alpha": 0.3}
    first = applied(CameraP(state="zeroed", **knobs), zeroed)
    second = applied(CameraP(state="removed", **knobs), removed)
    wanted = zeroed(rows()).logits
    torch.testing.assert_close(removed(rows()).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(original(name)(rows()).logits, wanted)
    counted = [
        sum(weight.numel() for weight in network.parameters()) for network in (zeroed, removed)
    ]
    each = inspect_model(zeroed).moe[0].parameters_each
    padding = second.details["padding_micro_experts"]
    assert first.details["removed_parameters"] == second.details["removed_parameters"]
    assert counted[0] - counted[1] == second.details["removed_parameters"] - padding * each


def busiest(network, block):
    """Return the two experts that most tokens are routed to."""
    seen = []
    hook = block.experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[1]), with_kwargs=True
    )
    network(rows())
    hook.remove()
    counts = torch.bincount(seen[0].flatten(), minlength=block.num_experts)
    return sorted(counts.argsort(descending=True)[:2].tolist())


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", DROPPABLE)
def test_masked_in_the_models_own_code_equals_dropped(name):
    network = network_of(name)
    block = inspect_model(network).moe[-1]
    dropped = busiest(network, block)
    with Masked(block, dropped):
        masked = network(rows()).logits
    assert not torch.equal(masked, original(name)(rows()).logits)
    wrapped = copy.deepcopy(network)
    drop_experts(inspect_model(wrapped).moe[-1], dropped, "masked")
    torch.testing.assert_close(wrapped(rows()).logits, masked, rtol=1e-4, atol=1e-4)
    if router_mode(inspect_model(network)) == "rows removed":
        drop_experts(block, dropped, "rows removed")
        torch.testing.assert_close(network(rows()).logits, masked, rtol=1e-4, atol=1e-4)


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", DROPPABLE)
def test_reap_drops_from_every_layer(name):
    network = network_of(name)
    report = applied(Reap(ratio=0.3), network)
    structure = inspect_model(network)
    assert report.effect == "removed"
    assert all(block.num_experts < 6 for block in structure.moe)
    assert network(rows()).logits.isfinite().all()


@pytest.mark.parametrize("name", REFUSED)
def test_other_structures_are_refused_with_their_difference(name):
    assert REFUSED[name] in refusal(METHODS["camera_p"], network_of(name))


@pytest.mark.broad
def test_the_document_states_what_runs_and_what_is_refused():
    text = DOCUMENT.read_text(encoding="utf-8")
    written = text.partition(START)[2].partition(END)[0]
    assert written == table(), "run python -m tests.methods.moe.architectures"
