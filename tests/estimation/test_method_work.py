"""What methods declare of their work, against what they do to a small network."""

import math
from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.config.composition import compose_run_config
from bench.models.structure.model_structure import inspect_model
from methods.baselines.naee import search_subset, subsets_tried
from tests.methods.method_application import applied
from tests.models.tiny_networks import build, llama, tokens

ROWS = tokens(rows=4)
ON_EXPERTS = (
    "camera_p", "camera_loss_aware", "heapr", "naee", "d2_moe", "gptq", "camera_q",
    "expert_frequency", "reap", "mone", "mc",
)  # fmt: skip
ON_DENSE = ("wanda", "sparsegpt", "llm_pruner", "flap", "shortgpt", "gptq", "camera_p")
KNOBS = {
    "gptq": ["method.gptq.group=4"],
    "camera_q": ["method.camera_q.group=4"],
    "mc": ["method.mc.group=4"],
    "llm_pruner": ["ratio=0.4", "method.llm_pruner.protect_first=0"],
}


def method_of(name):
    config = compose_run_config([f"method={name}", *KNOBS.get(name, ["ratio=0.4"])])
    return config.method[name]


def passes(method, network):
    """Return how often the calibration tokens went through a layer, and a gradient came back."""
    seen = {"forward": 0, "backward": 0}
    layers = inspect_model(network).layers

    def back(gradient):
        seen["backward"] += gradient[..., 0].numel()

    def forward(_, __, output):
        state = output[0] if isinstance(output, tuple) else output
        seen["forward"] += state[..., 0].numel()
        if state.requires_grad:
            state.register_hook(back)

    # Not on the layer, which is also entered to learn its arguments, and then computes nothing.
    hooks = [layer.self_attn.register_forward_hook(forward) for layer in layers]
    try:
        applied(method, network, rows=ROWS)
    finally:
        for hook in hooks:
            hook.remove()
    whole = len(layers) * ROWS.numel()
    return seen["forward"] / whole, seen["backward"] / whole


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("name", "make"),
    [(name, lambda: build("qwen3_moe")) for name in ON_EXPERTS]
    + [(name, llama) for name in ON_DENSE],
)
def test_passes_are_those_that_happen(name, make):
    method, network = method_of(name), make()
    declared = method.work(inspect_model(network), ROWS.numel())
    forwards, backwards = passes(method, network)
    # Where a changed layer runs again, the last one does not.
    again = 1 / len(inspect_model(make()).layers)
    assert forwards <= declared.forwards <= forwards + again + 1e-9
    # With frozen weights a backward pass has half of the products.
    assert math.ceil(declared.backwards) == round(backwards)


@pytest.mark.parametrize("limit", [1, 30, 20_000])
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_subsets_are_counted_as_they_are_tried(limit, count):
    errors = {set_: sum(set_) for size in range(7) for set_ in combinations(range(6), size)}
    found = search_subset(6, count, lambda s: [errors[tuple(sorted(x))] for x in s], limit)
    assert subsets_tried(6, count, limit) == found.tried


def test_products_with_the_inputs_are_those_that_are_computed():
    network = llama()
    layers = inspect_model(network).layers
    declared = method_of("sparsegpt").work(inspect_model(network), ROWS.numel()).flops
    solved = 0.0
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            for linear in (part for part in layer.modules() if isinstance(part, torch.nn.Linear)):
                rows, columns = linear.weight.shape
                x_TC = torch.ones(ROWS.numel(), columns)
                _ = x_TC.T @ x_TC
                solved += 2 * 4 / 3 * columns**3 + rows * columns**2
    assert declared == pytest.approx(counter.get_total_flops() + solved)
