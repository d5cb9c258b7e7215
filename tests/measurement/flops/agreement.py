"""What the tests of FLOPs share: the counter and arithmetic side by side, in both conventions."""

import pytest

from bench.models.macs import macs_by_part

AGREE = 0.01


def agree(counted, products, rel=AGREE):
    """Hold the dispatcher's count against arithmetic, with and without masked pairs."""
    assert counted.without_formula == ()
    assert counted.total > 0
    assert 2 * sum(macs_by_part(products).values()) == pytest.approx(counted.total, rel=rel)
    causal = 2 * sum(macs_by_part(products, masked=False).values())
    assert causal == pytest.approx(counted.causal, rel=rel)
    assert causal <= counted.total * (1 + rel)
