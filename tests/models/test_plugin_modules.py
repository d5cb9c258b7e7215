"""Replaced modules of a plug-in: saved by class, loaded only while the plug-in is known."""

import pytest
from torch import nn

from bench import plugins
from bench.errors import UserError
from bench.models.replaced_modules import (
    ReplacedModule,
    describe_network,
    install_described_modules,
)

NAME = f"{__name__}:Halved"


class Halved(ReplacedModule):
    """A linear layer with half of its rows."""

    def __init__(self, rows, columns):
        super().__init__()
        self.inner = nn.Linear(columns, rows)

    def spec(self):
        return {"rows": self.inner.out_features, "columns": self.inner.in_features}

    @classmethod
    def from_spec(cls, spec, original):
        return cls(spec["rows"], spec["columns"])


@pytest.fixture
def known(monkeypatch):
    package = __name__.partition(".")[0]
    monkeypatch.setattr(plugins, "active", lambda: plugins.Plugins(packages=(package,)))


def description():
    return describe_network(nn.Sequential(nn.Linear(3, 4), Halved(2, 4)))


def test_a_plug_ins_module_is_described_and_built_again(known):
    described = description()
    assert described["modules"] == {"1": {"class": NAME, "rows": 2, "columns": 4}}
    published = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    install_described_modules(published, described)
    assert isinstance(published[1], Halved)
    assert published[1].inner.weight.shape == (2, 4)


def test_without_the_plug_in_it_is_neither_written_nor_imported(known, monkeypatch):
    described = description()
    monkeypatch.setattr(plugins, "active", plugins.Plugins)
    with pytest.raises(UserError, match="declare its package as a plug-in"):
        description()
    with pytest.raises(UserError, match="install the plug-in"):
        install_described_modules(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), described)


@pytest.mark.parametrize("stated", [f"{__name__}:pytest", f"{__name__}:Missing", "os:system"])
def test_only_replaced_modules_are_built(known, stated):
    described = description()
    described["modules"]["1"]["class"] = stated
    with pytest.raises(UserError, match="cannot be built"):
        install_described_modules(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), described)
