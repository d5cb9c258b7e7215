"""Times of layers on this machine: their curve, what is timed, and what cannot be."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from bench.device.machine import MachineReading
from bench.estimation import boards
from bench.estimation import layer_timing as timing
from bench.estimation import network as networks
from bench.estimation.layer_timing import Curve, LayerTimes
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.structure.model_structure import inspect_model
from tests.models.tiny_networks import build, build_dense, llama

CPU = torch.device("cpu")
CURVE = Curve(samples=(1, 16, 128), seconds=(1.0, 2.0, 16.0))


@pytest.mark.parametrize(
    ("samples", "seconds"), [(0.5, 1.0), (1, 1.0), (8.5, 1.5), (16, 2.0), (72, 9.0), (240, 30.0)]
)
def test_a_curve_is_linear_between_its_points_and_beyond_the_last(samples, seconds):
    assert CURVE.at(samples) == pytest.approx(seconds)


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6))
def test_more_samples_never_take_less_time(one, other):
    curve = Curve(samples=(1, 16, 128), seconds=(3.0, 2.0, 16.0))
    low, high = sorted((one, other))
    assert 3.0 <= curve.at(low) <= curve.at(high) or low < 16


def test_pairs_beyond_the_timed_rows_take_more_time():
    times = LayerTimes(forward=CURVE, length=128, pair=1e-3)
    assert times.call(128, 128 * 128) == 16.0
    assert times.call(128, 128 * 1128) == pytest.approx(16.0 + 128.0)
    # Shorter rows have fewer pairs, but never take less than half.
    assert times.call(128, 0) == 8.0


class Clocked(torch.nn.Module):
    """A layer that states what a call takes: 2 ms, and 10 us per token."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 4))

    def forward(self, x_BLD, **_):
        return 0.002 + 1e-5 * x_BLD.shape[0] * x_BLD.shape[1]


@pytest.fixture
def clocked(monkeypatch):
    """A Llama on the meta device of three such layers, whose clock is what they state."""
    monkeypatch.setattr(timing, "call_seconds", lambda call, _: call())
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    with torch.device("meta"):
        network = llama()
        network.model.layers = torch.nn.ModuleList(Clocked() for _ in range(3))
    return network


def test_layers_that_are_built_alike_count_as_often_as_they_are_there(clocked):
    found = timing.decoder_times(clocked, [(clocked.model.layers[0], 3)], CPU)
    assert found.forward.samples == (1, 16, 128, 1024)
    assert found.forward.seconds == pytest.approx(
        [3 * (0.002 + 1e-5 * n) for n in (1, 16, 128, 1024)]
    )
    # A row of 1,024 tokens states as much as eight of 128.
    assert found.pair == 0
    assert all(weight.is_meta for weight in clocked.parameters())


@pytest.mark.parametrize(
    "make",
    [
        llama,
        pytest.param(lambda: build("qwen3_moe"), marks=pytest.mark.broad),
        pytest.param(lambda: build("deepseek_v2"), marks=pytest.mark.broad),
        pytest.param(lambda: build_dense("gpt2"), marks=pytest.mark.broad),
        pytest.param(lambda: build_dense("gemma3"), marks=pytest.mark.broad),
        pytest.param(lambda: build_dense("phi3"), marks=pytest.mark.broad),
    ],
)
def test_real_layers_can_be_called_with_random_numbers(make, monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    with torch.device("meta"):
        network = make()
    structure = inspect_model(network)
    forms = [(layers[0], len(layers)) for layers in networks.alike_layers(structure)]
    assert sum(count for _, count in forms) == len(structure.layers)
    found = timing.decoder_times(network, forms, CPU)
    assert min(found.forward.seconds) > 0
    assert all(weight.is_meta for weight in network.parameters())


def test_layers_that_are_too_large_or_cannot_be_called_are_not_timed(clocked, monkeypatch):
    layers = [(clocked.model.layers[0], 3)]
    with monkeypatch.context() as patch:
        patch.setattr(timing, "_WEIGHT_BYTES", 63)
        assert timing.decoder_times(clocked, layers, CPU) is None
    with monkeypatch.context() as patch:
        patch.setattr(timing, "_CALL_FLOPS", 1)
        assert timing.decoder_times(clocked, layers, CPU) is None
    assert timing.decoder_times(clocked, [(torch.nn.Linear(2, 2), 1)], CPU) is None
    monkeypatch.setattr(Clocked, "forward", lambda self, x_BLD, **_: self.missing)
    assert timing.decoder_times(clocked, layers, CPU) is None


def test_a_classifier_is_timed_in_forward_and_training(monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    with torch.device("meta"):
        network = build_classifier(
            VisionConfig(architecture="micro_lenet", size=16, channels=1, classes=10)
        )
    found = timing.classifier_times(network, 1e3, CPU)
    assert found.forward.samples == (1, 16, 128)
    assert found.training.samples == (16, 128)
    assert all(weight.is_meta for weight in network.parameters())


def test_a_classifier_that_fails_on_random_images_is_not_timed():
    with torch.device("meta"):
        network = build_classifier(
            VisionConfig(architecture="micro_lenet", size=16, channels=1, classes=10)
        )
    network.features.append(torch.nn.Linear(7, 7))
    assert timing.classifier_times(network, 1e3, CPU) is None


def test_times_are_remembered_by_network_and_dtype_and_a_run_measures_none(monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(boards, "_known", {})
    monkeypatch.setattr("bench.device.machine.MachineMonitor", machine(2.0))
    with torch.device("meta"):
        network = llama()
    structure = inspect_model(network)
    work = networks.decoder_work(network, structure, 4)
    assert networks.with_times(work, network, structure, CPU, measure=False).times is None
    boards._known.clear()
    timed = networks.with_times(work, network, structure, CPU, measure=True)
    again = networks.with_times(work, network, structure, CPU, measure=False)
    assert timed.times == again.times is not None
    halved = network.to(torch.bfloat16)
    assert networks.with_times(work, halved, structure, CPU, measure=False).times is None
    # The layers' operators and FLOPs are in the time; the head's are not.
    forward = timed.forward(32, 1, 32 * 32, 4)
    assert forward.timed == timed.times.call(32, 32 * 32)
    assert forward.matrix == 4 * work.head
    assert 0 < forward.operators < work.forward(32).operators


def machine(*others):
    """Return monitors of two cores that read these loads by others in turn, the last one again."""
    readings = [*others]

    class Monitor:
        def __init__(self, device):
            value = readings.pop(0) if len(readings) > 1 else readings[0]
            self.reading = MachineReading(2, 2, 2, value, None, None, None)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    return Monitor


def curves():
    """Return a measurement whose figures count its calls, and the figures so far."""
    made = []

    def measure():
        made.append(timing.Curve(samples=(1.0,), seconds=(len(made) + 1.0,)))
        return made[-1]

    return measure, made


@pytest.mark.parametrize(
    ("others", "measured", "kept", "remembered"),
    [
        ((0.0,), 1, 1.0, True),
        ((1.5, 0.3, 0.1), 3, 3.0, True),
        ((1.5, 0.3, 0.9), 3, 2.0, False),
    ],
)
def test_a_disturbed_measurement_is_repeated_and_never_remembered(
    others, measured, kept, remembered, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(boards, "_known", {})
    monkeypatch.setattr(boards, "cache_folder", lambda _: tmp_path / "hardware")
    monkeypatch.setattr("bench.device.machine.MachineMonitor", machine(*others))
    boards._warn_of_load.cache_clear()
    measure, made = curves()
    found = boards.measured_once("curve", measure, timing.Curve)
    assert (len(made), found.seconds) == (measured, (kept,))
    # This process does not measure again; the next one does.
    assert boards.measured_once("curve", measure, timing.Curve) == found
    assert len(made) == measured
    assert bool(list(tmp_path.rglob("*.json"))) == remembered
    assert ("others kept 0.3 of 2 cores busy" in caplog.text) != remembered


def test_what_decides_the_time_of_a_call_tells_networks_apart():
    with torch.device("meta"):
        one, other = llama(), llama()
    assert timing.calls_identity(one) == timing.calls_identity(other)
    other.config._attn_implementation = "eager"
    assert timing.calls_identity(one) != timing.calls_identity(other)
    assert timing.calls_identity(one) != timing.calls_identity(one.to(torch.bfloat16))
    # The tower of a vision-language model, which its text config does not hold.
    wide, narrow = (tiny_llava(intermediate) for intermediate in (32, 16))
    assert timing.calls_identity(wide) != timing.calls_identity(narrow)


def tiny_llava(intermediate):
    text = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 16}
    vision = {"model_type": "clip_vision_model", "intermediate_size": intermediate}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(config)
