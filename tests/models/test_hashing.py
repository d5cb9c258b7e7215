"""Hash and validity of a network's current weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bench.errors import UserError
from bench.models import hashing
from bench.models.hashing import network_hash, refuse_not_finite


def network(dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False))
    made.register_buffer("flags", torch.tensor([True, False]))
    return made.to(dtype)


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.data())
def test_one_flipped_bit_is_another_state(dtype, data):
    made = network(dtype)
    before = network_hash(made)
    tensors = [t for t in (*made.parameters(), *made.buffers()) if t.dim()]
    tensor = data.draw(st.sampled_from(tensors))
    raw = tensor.detach().flatten().view(torch.uint8)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    assert network_hash(made) != before
    assert network_hash(network(dtype)) == before


def test_exchanged_rows_names_and_dtypes_are_other_states():
    made, other = network(), network()
    with torch.no_grad():
        other[0].weight.copy_(made[0].weight.flip(0))
    renamed = nn.Sequential(nn.Sequential(*network()))
    assert len({network_hash(n) for n in (made, other, renamed, network(torch.float64))}) == 4


def test_a_tensor_in_many_chunks_counts_in_every_one(monkeypatch):
    monkeypatch.setattr(hashing, "_CHUNK", 5)
    made, other = nn.Linear(7, 9), nn.Linear(7, 9)
    other.load_state_dict(made.state_dict())
    assert network_hash(made) == network_hash(other)
    with torch.no_grad():
        other.weight[-1, -1] += 1
    assert network_hash(made) != network_hash(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_by_name(value):
    made = network()
    refuse_not_finite(made, "mine")
    with torch.no_grad():
        made[2].weight[1, 1] = value
    with pytest.raises(UserError, match=r"method mine left numbers in 2\.weight that are NaN"):
        refuse_not_finite(made, "mine")
