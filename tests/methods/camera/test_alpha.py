"""The alpha of each model, and its use in the ranking of micro-experts."""

import pytest

from bench.models.structure.model_structure import inspect_model
from methods.camera.analysis import resolve_alpha
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ
from tests.methods.method_application import applied, network_of, zeroed


@pytest.mark.parametrize(
    ("alpha", "model_type", "weight"),
    [
        ("paper", "deepseek", 0.95),
        ("paper", "qwen2_moe", 0.95),
        ("paper", "qwen3_moe", 1.0),
        ("low_peak", "deepseek", 0.05),
        ("low_peak", "qwen3_moe", 0.0),
        ("official", "deepseek", 0.9),
        ("official", "qwen2_moe", 1.0),
        (0.3, "qwen3_moe", 0.3),
    ],
)
def test_each_reading_has_a_number_for_each_model(alpha, model_type, weight):
    assert resolve_alpha(alpha, model_type) == weight


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("alpha", ["paper", "low_peak"])
def test_a_reading_is_the_number_it_stands_for(name, alpha):
    by_name, by_number = network_of(name), network_of(name)
    number = resolve_alpha(alpha, name)
    report = applied(CameraP(ratio=0.4, alpha=alpha, state="zeroed"), by_name)
    applied(CameraP(ratio=0.4, alpha=number, state="zeroed"), by_number)
    assert report.details["alpha"] == number
    for mine, theirs in zip(inspect_model(by_name).moe, inspect_model(by_number).moe, strict=True):
        assert zeroed(mine) == zeroed(theirs) != []


def test_quantization_reads_it_alike():
    few = {"bits": (4, 3, 2), "shares": (1, 2, 1), "block": 1, "group": 8}
    by_name, by_number = network_of("qwen3_moe"), network_of("qwen3_moe")
    applied(CameraQ(**few), by_name)
    applied(CameraQ(alpha=1.0, **few), by_number)
    mine, theirs = by_name.state_dict(), by_number.state_dict()
    assert all(bool((mine[key] == theirs[key]).all()) for key in theirs)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="low_peak"):
        CameraP(alpha="high")
