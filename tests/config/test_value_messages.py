"""A value of several possible types is refused by one sentence under its own key."""

import pytest

from bench.config.composition import compose_run_config
from bench.errors import UserError

IMAGES = ("model=micro_llava", "benchmark=mllm_seven_micro")


@pytest.mark.parametrize(("overrides", "said"), [
    (["method=camera_p", "method.camera_p.alpha=foo"],
     "method.camera_p.alpha=foo: input should be a valid number, unable to parse string as a "
     "number, or 'paper', 'low_peak' or 'official'"),
    ([*IMAGES, "method=fastv", "method.fastv.keep=0"],
     "method.fastv.keep=0: input should be greater than or equal to 2, or greater than 0, or"),
    ([*IMAGES, "method=prumerge", "method.prumerge.keep=foo"],
     "method.prumerge.keep=foo: input should be a valid integer, or a valid number, or 'all', or "
     "'adaptive'"),
    (["tracker.live=maybe"],
     "tracker.live=maybe: input should be 'auto', or a valid boolean, unable to interpret input"),
    ([*IMAGES, "method=fastv", "method.fastv.keep=1"],
     "method.fastv.keep=1: 1 would be a single token, and 1.0 is a share of 100 %: write"),
    ([*IMAGES, "method=vscan", "method.vscan.then=1"], "method.vscan.then=1: 1 would be a single"),
])  # fmt: skip
def test_a_value_that_fits_no_type(overrides, said):
    with pytest.raises(UserError) as refused:
        compose_run_config(overrides)
    assert str(refused.value).startswith(said)
