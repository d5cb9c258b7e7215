"""Work becomes time between bounds, on made-up hardware whose rates are round numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import UserError
from bench.estimation.boards import hardware_names, load_hardware
from bench.estimation.hardware import HERE, HardwareConfig, Utilisation
from bench.estimation.work import Work, time_of


def board(**changed):
    plain = {
        "name": "made_up",
        "device": "cuda",
        "peak": {"float32": 1e12, "bfloat16": 1e13},
        "bandwidth": 1e11,
        "memory": 1e10,
        "link": 1e10,
        "utilisation": Utilisation(
            matrix=(0.5, 1.0), attention=(0.25, 0.5), memory=(0.5, 1.0), link=(0.5, 1.0)
        ),
        "operator": (1e-6, 2e-6),
        "request": (1e-4, 1e-3),
        "start": (1.0, 2.0),
        "disk": (1e9, 2e9),
    }
    return HardwareConfig.model_validate({**plain, **changed})


WORKS = st.builds(
    Work,
    **dict.fromkeys(
        ("matrix", "precise", "attention", "weights", "moved", "operators", "requests", "link",
         "disk", "seconds"),
        st.floats(0, 1e15),
    ),
)  # fmt: skip


@given(work=WORKS, other=WORKS, device=st.sampled_from(["cuda", "cpu"]))
def test_bounds_are_in_order_and_grow_with_the_work(work, other, device):
    hardware = board(device=device)
    alone, both = (time_of(w, hardware, "bfloat16") for w in (work, work + other))
    assert 0 <= alone.low <= alone.high * (1 + 1e-12)
    assert both.low >= alone.low * (1 - 1e-9)
    assert both.high >= alone.high * (1 - 1e-9)


@pytest.mark.parametrize(
    ("work", "low", "high", "bound_by"),
    [
        (Work(matrix=1e13), 1.0, 2.0, "compute"),
        (Work(precise=1e12), 1.0, 2.0, "compute"),
        (Work(attention=1e13), 2.0, 4.0, "compute"),
        (Work(weights=1e11), 1.0, 2.0, "memory bandwidth"),
        (Work(moved=1e11), 1.0, 2.0, "memory bandwidth"),
        (Work(operators=1e6), 1.0, 2.0, "Python"),
        (Work(link=1e10), 1.0, 2.0, "host link"),
        (Work(disk=2e9), 1.0, 2.0, "disk"),
    ],
)
def test_each_quantity_has_its_rate(work, low, high, bound_by):
    found = time_of(work, board(), "bfloat16")
    assert found[:2] == pytest.approx((low, high))
    assert found.bound_by == bound_by


def test_a_product_hides_the_reading_of_its_weights_and_a_gpu_hides_python():
    product, weights, python = Work(matrix=1e13), Work(weights=5e10), Work(operators=5e5)
    assert time_of(product + weights, board(), "bfloat16").low == pytest.approx(1.0)
    assert time_of(product + python, board(), "bfloat16").low == pytest.approx(1.0)
    assert time_of(product + python, board(device="cpu"), "bfloat16").low == pytest.approx(1.5)


def test_every_board_is_valid_and_has_a_power_and_a_link():
    boards = [load_hardware(name) for name in hardware_names() if name != HERE]
    assert {"a100_40gb", "a100_80gb", "h100", "h200", "l40s", "rtx_4090", "mi300x"} == {
        each.name for each in boards
    }
    for each in boards:
        assert each.power
        assert each.link
        assert each.rate("bfloat16") > each.peak.get("float32", 0)


def test_an_unknown_board_and_an_unknown_rate_are_one_sentence():
    with pytest.raises(UserError, match="did you mean 'a100_40gb'"):
        load_hardware("a100_40g")
    with pytest.raises(UserError, match=r"no rate for model.dtype=float32: choose bfloat16"):
        load_hardware("mi300x").rate("float32")


def test_a_range_that_falls_is_refused():
    with pytest.raises(ValueError, match="from low to high"):
        board(operator=(2e-6, 1e-6))
