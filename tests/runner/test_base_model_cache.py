"""The model that the runs of a session share: loaded once, lent unchanged."""

import pytest
import torch

from bench.device import devices
from bench.models import loading
from bench.models.source import resolve_model
from bench.runner.session import BaseModelCache
from bench.schema import ModelConfig
from tests.models.tiny_networks import build, save


@pytest.fixture
def source(tmp_path):
    return found(save(build("mixtral"), tmp_path / "one"))


def found(folder):
    asked = ModelConfig(name="tiny", source="local", path=str(folder), device="cpu")
    return resolve_model(asked, offline=True)


@pytest.fixture
def loads(monkeypatch):
    done = []
    real = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda source: done.append(source) or real(source))
    return done


def test_is_loaded_once_and_lent_unchanged(source, loads):
    keeper = BaseModelCache()
    dense = keeper.acquire(source, will_change=False)
    before = {k: v.clone() for k, v in dense.network.state_dict().items()}
    lent = keeper.acquire(source, will_change=True)
    for weight in lent.network.parameters():
        weight.zero_()
    assert lent.structure.moe[0].block is not dense.structure.moe[0].block
    again = keeper.acquire(source, will_change=False)
    assert again is dense
    assert all(torch.equal(v, before[k]) for k, v in again.network.state_dict().items())
    assert len(loads) == 1


def test_a_tokenizer_that_a_method_changed_is_loaded_again(source, loads):
    keeper = BaseModelCache()
    lent = keeper.acquire(source, will_change=True)
    known = len(lent.tokenizer)
    lent.tokenizer.add_tokens(["of a method"])
    assert len(keeper.acquire(source, will_change=True).tokenizer) == known
    assert len(loads) == 2


def test_what_is_kept_is_a_copy_like_those_that_are_lent(source, monkeypatch):
    """A loaded network lies scattered in memory and would lose against any copy of it."""
    first = []
    real = loading.load_model
    monkeypatch.setattr(
        loading, "load_model", lambda source: first.append(real(source)) or first[0]
    )
    kept = BaseModelCache().acquire(source, will_change=False)
    assert kept is not first[0]
    loaded = dict(first[0].network.named_parameters())
    for name, weight in kept.network.named_parameters():
        assert torch.equal(weight, loaded[name])
        assert weight.data_ptr() != loaded[name].data_ptr()


def test_is_given_away_when_a_copy_does_not_fit(source, loads, monkeypatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 0)
    keeper = BaseModelCache()
    dense = keeper.acquire(source, will_change=False)
    assert keeper.acquire(source, will_change=True) is dense
    assert keeper.acquire(source, will_change=False) is not dense
    assert len(loads) == 2


@pytest.mark.broad
def test_another_source_takes_its_place(source, loads, tmp_path):
    keeper = BaseModelCache()
    keeper.acquire(source, will_change=False)
    other = found(save(build("mixtral", seed=1), tmp_path / "two"))
    assert keeper.acquire(other, will_change=False).fingerprint == other.fingerprint
    assert loads == [source, other]
    keeper.release()
    keeper.acquire(other, will_change=False)
    assert len(loads) == 3
