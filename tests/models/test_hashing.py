"""Digests of weight files, and the hash and validity of a network's current weights."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.errors import UserError
from bench.models import hashing
from bench.models.hashing import digest, fingerprint, refuse_not_finite, state_hash


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@settings(max_examples=30, deadline=None)
@given(first=st.binary(max_size=40), second=st.binary(max_size=40))
def test_equal_exactly_when_bytes_are(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("files")
    marks = []
    for number, content in enumerate((first, second)):
        (folder / str(number)).mkdir()
        file = folder / str(number) / "model.safetensors"
        file.write_bytes(content)
        marks.append(fingerprint([file]))
    assert (marks[0] == marks[1]) == (first == second)


def test_changes_with_names_and_not_with_order(tmp_path):
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file in files:
        file.write_text(file.name)
    assert fingerprint(files) == fingerprint(files[::-1])
    before = fingerprint(files[:2])
    assert fingerprint([files[0], files[1].rename(tmp_path / "d")]) != before


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = digest(file)
    real = hashing.hashlib.file_digest
    monkeypatch.setattr(hashing.hashlib, "file_digest", None)
    assert digest(file) == first
    monkeypatch.setattr(hashing.hashlib, "file_digest", real)
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert digest(file) != first


def test_a_broken_or_unwritable_cache_does_not_matter(tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = digest(file)
    for remembered in hashing._digest_cache().iterdir():
        remembered.write_text("nonsense")
    assert digest(file) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert digest(file) == first


def test_blobs_of_the_hub_are_named_by_their_digest(tmp_path):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"anything")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert digest(tmp_path / "model.safetensors") == name


def network(dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False))
    made.register_buffer("flags", torch.tensor([True, False]))
    return made.to(dtype)


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.data())
def test_one_flipped_bit_is_another_state(dtype, data):
    made = network(dtype)
    before = state_hash(made)
    tensors = [t for t in (*made.parameters(), *made.buffers()) if t.dim()]
    tensor = data.draw(st.sampled_from(tensors))
    raw = tensor.detach().flatten().view(torch.uint8)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    assert state_hash(made) != before
    assert state_hash(network(dtype)) == before


def test_exchanged_rows_names_and_dtypes_are_other_states():
    made, other = network(), network()
    with torch.no_grad():
        other[0].weight.copy_(made[0].weight.flip(0))
    renamed = nn.Sequential(nn.Sequential(*network()))
    assert len({state_hash(n) for n in (made, other, renamed, network(torch.float64))}) == 4


def test_a_tensor_in_many_chunks_counts_in_every_one(monkeypatch):
    monkeypatch.setattr(hashing, "_CHUNK", 5)
    made, other = nn.Linear(7, 9), nn.Linear(7, 9)
    other.load_state_dict(made.state_dict())
    assert state_hash(made) == state_hash(other)
    with torch.no_grad():
        other.weight[-1, -1] += 1
    assert state_hash(made) != state_hash(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_by_name(value):
    made = network()
    refuse_not_finite(made, "mine")
    with torch.no_grad():
        made[2].weight[1, 1] = value
    with pytest.raises(UserError, match=r"method mine left numbers in 2\.weight that are NaN"):
        refuse_not_finite(made, "mine")
