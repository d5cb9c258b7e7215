"""A preallocated cache layer holds what transformers' own growing layer holds."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from bench.evaluation.multimodal.shared_prefix import GROWTH, PreallocatedCacheLayer, preallocated

OWNER_B = torch.tensor([0, 0, 1, 0, 1])


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def grown(length):
    layer = DynamicLayer()
    layer.update(drawn(2, 3, length, 4), drawn(2, 3, length, 5))
    return layer


@pytest.mark.parametrize(
    "calls", [[7, 1, 1], [GROWTH, 1, 1], [GROWTH + 9, 1], [1] * (2 * GROWTH + 5)]
)
def test_it_equals_the_layer_that_copies(calls):
    plain, ours = grown(11), preallocated(grown(11), OWNER_B)
    plain.batch_select_indices(OWNER_B)
    assert isinstance(ours, PreallocatedCacheLayer)
    for number, length in enumerate(calls):
        keys, values = drawn(5, 3, length, 4) + number, drawn(5, 3, length, 5) - number
        found, wanted = ours.update(keys, values), plain.update(keys, values)
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
        assert ours.get_seq_length() == plain.get_seq_length()


def test_appending_an_answer_does_not_copy_its_prefix():
    ours = preallocated(grown(11), OWNER_B)
    where = ours.keys.data_ptr()
    for _ in range(GROWTH):
        ours.update(drawn(5, 3, 1, 4), drawn(5, 3, 1, 5))
    assert ours.keys.data_ptr() == where
    ours.update(drawn(5, 3, 1, 4), drawn(5, 3, 1, 5))
    assert ours.keys.data_ptr() != where


def test_a_layer_of_a_different_class_is_kept():
    class Other(DynamicLayer):
        pass

    other = Other()
    other.update(drawn(2, 3, 4, 4), drawn(2, 3, 4, 5))
    assert preallocated(other, OWNER_B) is other
    assert other.keys.shape[0] == 5
