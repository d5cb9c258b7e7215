"""What methods declare of their work, against what they do to a small network."""

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.config.composition import compose_run_config
from bench.measurement.flops.counter import Tally
from bench.method import InputSize, MethodWork
from bench.models.bitpacking.packed_modules import PackedLinear
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.structure.model_structure import inspect_model
from methods.baselines.naee import search_subset, subsets_tried
from methods.dense import weight_pruning
from methods.moe.quantizer import rounding
from methods.moe.quantizer.grid import round_weights
from methods.quantization.channel_scales import (
    CLIP_ELEMENTS,
    CLIP_OPERATORS,
    CLIPPED_SHARES,
    ROUND_ELEMENTS,
    ROUND_OPERATORS,
    ROWS_AT_ONCE,
    clipped,
)
from methods.visual_engine.decoder import VisualEngine
from methods.visual_tokens.head_pruning import HeadPruning
from methods.visual_tokens.search import with_search
from methods.visual_tokens.strategies import LayerDrop, SparseFFN
from methods.visual_tokens.yopo import Yopo
from methods.wgsef.fine_tuning import PASS_OPERATORS, PASSES, WgsefFinetune
from methods.wgsef.layerwise.reconstruction import (
    DROP_OPERATORS,
    BackwardElimination,
    Reconstruction,
)
from methods.wgsef.prox.root import _BracketedNewton
from methods.wgsef.solvers.optimizers import ProximalAdam
from tests.methods.method_application import applied
from tests.methods.visual_engine.tiny_mllms import IMAGE
from tests.methods.visual_tokens.test_visual_strategies import SHARES, context, loaded
from tests.models.tiny_networks import build, llama, tokens

ROWS = tokens(rows=4)
ON_EXPERTS = (
    "camera_p", "camera_loss_aware", "heapr", "naee", "d2_moe", "gptq", "camera_q",
    "expert_frequency", "reap", "mone", "mc", "bitsmoe_style", "wgsef_layerwise", "wgsef_finetune",
)  # fmt: skip
ON_DENSE = (
    "wanda", "sparsegpt", "llm_pruner", "flap", "shortgpt", "gptq", "camera_p", "wgsef_neurons",
    "awq",
)  # fmt: skip
INPUTS = InputSize(rows=ROWS.shape[0], length=ROWS.shape[1], batch=8)
KNOBS = {
    "gptq": ["method.gptq.group=4", "method.gptq.min_tokens=1"],
    "rtn": ["method.rtn.group=4"],
    "awq": ["method.awq.group=4"],
    "camera_q": ["method.camera_q.group=4"],
    "mc": ["method.mc.group=4"],
    "bitsmoe_style": ["method.bitsmoe_style.group=4", "method.bitsmoe_style.mean_bits=8"],
    "wgsef_finetune": [
        "ratio=0.4",
        "method.wgsef_finetune.steps=3",
        "method.wgsef_finetune.rows=3",
    ],
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

    def forward(module, _, output):
        if "forward" in vars(module):  # answers with what it computed before
            return
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
    declared = method.work(inspect_model(network), INPUTS)
    forwards, backwards = passes(method, network)
    trained = declared.trained / INPUTS.rows
    # Where a changed layer runs again, the last one does not.
    again = 1 / len(inspect_model(make()).layers)
    assert forwards <= declared.forwards + trained <= forwards + again + 1e-9
    # With frozen weights a backward pass has half of the products.
    # Training of experts alone sends no gradient below those of the first layer.
    reached = math.ceil(declared.backwards) + trained
    assert reached - again * trained == pytest.approx(backwards)


@pytest.mark.parametrize("limit", [1, 30, 20_000])
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_subsets_are_counted_as_they_are_tried(limit, count):
    errors = {set_: sum(set_) for size in range(7) for set_ in combinations(range(6), size)}
    found = search_subset(6, count, lambda s: [errors[tuple(sorted(x))] for x in s], limit)
    assert subsets_tried(6, count, limit) == found.tried


def visual_inputs(context):
    calls = context.prompts.inputs
    rows, length = len(calls) * len(calls[0]["input_ids"]), calls[0]["input_ids"].shape[1]
    return InputSize(rows, length, int((calls[0]["input_ids"][0] == IMAGE).sum()))


@pytest.mark.parametrize(
    "method",
    [
        LayerDrop(layers=3),
        LayerDrop(max_kl=1.0),
        HeadPruning(keep=0.6, whole_layers=1),
        SparseFFN(keep=0.25),
        Yopo(shares=SHARES, whole_layers=1),
        Yopo(shares=SHARES, whole_layers=1, repair=True),
    ],
    ids=str,
)
def test_dense_passes_of_a_visual_method_are_those_that_happen(method):
    model, given, seen = loaded("llava_llama"), context("llava_llama"), []
    layers = inspect_model(model.network).layers
    inputs = visual_inputs(given)
    declared = method.work(model.structure, inputs)
    for layer in layers:
        layer.self_attn.register_forward_hook(
            lambda _, __, output: seen.append(output[0][..., 0].numel())
        )
    method.apply(model, given)
    assert declared.forwards == pytest.approx(sum(seen) / (len(layers) * inputs.tokens))
    assert declared.possible == 0


def test_a_search_answers_once_per_share_and_once_in_full(monkeypatch):
    model, given, answered = loaded("llava_llama"), context("llava_llama"), []
    answer = VisualEngine.last_logits
    monkeypatch.setattr(
        VisualEngine, "last_logits", lambda *args: answered.append(1) or answer(*args)
    )
    Yopo(shares=SHARES, whole_layers=1, budget=0.9).apply(model, given)
    inputs = visual_inputs(given)
    declared = with_search(MethodWork(), inputs, timed=False)
    # The calibration has answered once before.
    calls = len(answered) / len(given.prompts.inputs) - 1
    assert declared.forwards + declared.possible == pytest.approx(calls)
    timed = with_search(MethodWork(), inputs, timed=True)
    assert declared.forwards < timed.forwards < timed.forwards + timed.possible


def operators_of(call):
    tally = Tally()
    with tally:
        call()
    return tally.operators, tally.elements


def test_operators_of_a_search_are_those_that_it_launches():
    rows, columns, group = 2 * ROWS_AT_ONCE, 64, 32
    weight_RC, x_SC = torch.randn(rows, columns), torch.randn(8, columns)
    launched, moved = operators_of(lambda: round_weights(weight_RC, 4, group))
    assert launched == pytest.approx(columns // group * ROUND_OPERATORS, rel=0.2)
    assert moved == pytest.approx(rows * columns * ROUND_ELEMENTS, rel=0.2)
    launched, moved = operators_of(lambda: clipped(weight_RC, x_SC, 4, group))
    trials = 2 * columns // group * len(CLIPPED_SHARES)
    assert launched == pytest.approx(trials * CLIP_OPERATORS, rel=0.2)
    assert moved == pytest.approx(len(CLIPPED_SHARES) * weight_RC.numel() * CLIP_ELEMENTS, rel=0.2)


@pytest.mark.parametrize("width", [1, 4])
def test_operators_of_an_elimination_are_those_that_it_launches(width):
    x_TM = torch.randn(64, 16, dtype=torch.float64)
    problem = Reconstruction.from_gram(x_TM.T @ x_TM / 64, torch.randn(16, 8), width)
    state = BackwardElimination(problem)
    launched, _ = operators_of(lambda: state.drop(state.cheapest()[1]))
    assert launched == pytest.approx(DROP_OPERATORS, rel=0.2)


@pytest.mark.parametrize("layers", [2, 6])
def test_operators_of_fine_tuning_are_those_of_its_steps(layers, monkeypatch):
    launched, step = [], ProximalAdam.step
    passes, narrow = [], _BracketedNewton.narrow
    monkeypatch.setattr(_BracketedNewton, "narrow", lambda self: passes.append(1) or narrow(self))
    monkeypatch.setattr(
        ProximalAdam, "step", lambda self: launched.append(operators_of(lambda: step(self))[0])
    )
    method, network = (
        WgsefFinetune(ratio=0.4, steps=10, rows=2),
        build("qwen3_moe", num_hidden_layers=layers),
    )
    declared = method.work(inspect_model(network), INPUTS).operators
    applied(method, network, rows=ROWS)
    assert len(launched) == method.steps
    # The weights decide how many passes the search takes.
    expected = (method.sparse_share * method.steps - 1) * PASSES
    searched = (expected - len(passes)) * PASS_OPERATORS
    assert declared == pytest.approx(sum(launched) + searched, rel=0.05)


def test_products_with_the_inputs_are_those_that_are_computed():
    network = llama()
    layers = inspect_model(network).layers
    work = method_of("sparsegpt").work(inspect_model(network), INPUTS)
    declared = work.flops + sum(step.times * step.flops for step in work.steps)
    solved = 0.0
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            for linear in (part for part in layer.modules() if isinstance(part, torch.nn.Linear)):
                rows, columns = linear.weight.shape
                x_TC = torch.ones(ROWS.numel(), columns)
                _ = x_TC.T @ x_TC
                solved += 2 * 4 / 3 * columns**3 + rows * columns**2
    assert declared == pytest.approx(counter.get_total_flops() + solved)


QUANTIZED = [(name, lambda: build("qwen3_moe")) for name in ("gptq", "camera_q", "mc")] + [
    (name, llama) for name in ("gptq", "rtn", "awq")
]


@pytest.mark.parametrize(("name", "make"), QUANTIZED)
def test_later_calls_dequantize_the_weights_that_are_declared(name, make, monkeypatch):
    method, network, dequantized = method_of(name), make(), []
    declared = method.work(inspect_model(network), INPUTS).per_call
    applied(method, network, rows=ROWS)
    dense = PackedLinear.dense

    def counted(self, dtype):
        dequantized.append(self.numel)
        return dense(self, dtype)

    monkeypatch.setattr(PackedLinear, "dense", counted)
    # Enough tokens that each expert has some.
    network(torch.randint(0, 32, (8, 64)))
    numbers = sum(step.times * step.elements / 5 for step in declared)
    assert numbers == sum(dequantized) > 0
    routed = sum(step.times for step in declared if step.routed)
    assert bool(routed) == any(block.num_experts > 1 for block in inspect_model(make()).blocks)


@pytest.mark.parametrize(("name", "make"), [*QUANTIZED[:1], ("gptq", llama), ("sparsegpt", llama)])
def test_steps_are_the_matrices_that_are_solved(name, make, monkeypatch):
    method, network, solved = method_of(name), make(), Counter()
    declared = method.work(inspect_model(network), INPUTS).steps
    owner = weight_pruning if name == "sparsegpt" else rounding
    solve = getattr(owner, name)

    def counted(weight_RC, *args, **kwargs):
        solved[tuple(weight_RC.shape)] += 1
        return solve(weight_RC, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    applied(method, network, rows=ROWS)
    # Each step is a call of its own, and does what the method does.
    once = Counter()
    for step in declared:
        before = Counter(solved)
        step.prepare(torch.device("cpu"), torch.float32)()
        (shape,) = solved - before
        solved[shape] -= 1
        once[shape] += step.times
    assert once == solved


@pytest.mark.parametrize("name", ["train", "wgsef", "hspg"])
def test_a_training_step_is_tried_without_a_trace(name, tmp_path, monkeypatch):
    method = compose_run_config([f"method={name}"]).method[name]
    classifier = build_classifier(VisionConfig(architecture="micro_lenet", size=8, channels=1))
    step, few = method.work(inspect_model(classifier), InputSize()).steps
    # A batch of 64 images, and 16 of them for networks whose batch is too large to try.
    assert (step.times, few.times) == (1, 4) and step.key != few.key
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    calls = [each.prepare(torch.device("cpu"), torch.float32) for each in (step, few)]
    with torch.no_grad():  # as the timer calls it
        for call in 2 * calls:
            call()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not list(tmp_path.iterdir())
    # Where checkpoints lie changes no time; a recipe does.
    elsewhere = method.model_copy(update={"checkpoints": "elsewhere"})
    longer = method.model_copy(
        update={"recipe": method.recipe.model_copy(update={"batch": 2 * method.recipe.batch})}
    )
    keys = [
        m.work(inspect_model(classifier), InputSize()).steps[0].key for m in (elsewhere, longer)
    ]
    assert keys[0] == step.key != keys[1]
