"""The example of a plug-in, by every command that needs its code; and methods at fault."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch

from bench import plugins
from bench.method import Context, LayerReport, Method, MethodReport
from bench.models.loading import open_folder
from bench.records import Store
from bench.runner import method_application
from bench.runner.replay import rebuild_model
from bench.runner.session import Session

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin"
ROWS = torch.arange(5, 69).view(2, 32)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example's folder, copied and entered, with no consent to anything."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(plugins.PROJECT_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copytree(EXAMPLE, tmp_path / "plugin")
    monkeypatch.chdir(tmp_path / "plugin")
    yield tmp_path / "plugin"
    for name in [name for name in sys.modules if name.startswith("weakest_plugin")]:
        del sys.modules[name]


@pytest.mark.broad
def test_every_command_finds_the_example(bench, example, tmp_path, capsys):
    code, _, said = bench("run", "method=zero_weakest")
    assert code == 2
    assert "unknown method 'zero_weakest'" in said
    assert bench("trust", "--yes")[0] == 0
    code, listed, _ = bench("ls", "methods", "--json")
    assert "zero_weakest" in {row["method"] for row in json.loads(listed)}
    given = ("method=zero_weakest", "benchmark=two_sciences")
    assert bench("run", "-m", *given, "ratio=0,0.4")[0] == 0
    # Jobs in this process leave no project behind for other folders.
    assert plugins.PROJECT_VARIABLE not in os.environ
    whole, zeroed = sorted(Store(bench.results).all(), key=lambda r: r.methods[0].config["ratio"])
    store = Store(bench.results)
    with Session() as session:
        models = [rebuild_model(record, store, session) for record in (whole, zeroed)]
    logits = [model.network(ROWS).logits for model in models]
    # Ratio 0 changes nothing.
    assert whole.methods[0].layers[0].zeroed == 0
    assert not torch.equal(*logits)
    for block, layer in zip(models[1].structure.moe, zeroed.methods[0].layers, strict=True):
        downs = [block.expert(index).down for index in range(block.num_experts)]
        empty = sum(int((down == 0).all(dim=0).sum()) for down in downs)
        assert empty == layer.zeroed == block.num_experts * int(0.4 * block.d_ff)
    # The recorded command repeats the run as it stands.
    _, command, _ = bench("show", zeroed.id, "--command")
    words = shlex.split(command)
    assert words[:2] == ["bench", "run"]
    # The fixture names the results folder itself.
    code, _, _ = bench(*(word for word in words[1:] if not word.startswith("results_dir=")))
    assert code == 0
    assert len(Store(bench.results).all()) == 2
    assert bench("resume", "latest", "--results-dir", str(bench.results))[0] == 0
    code, verdict, _ = bench("verify", zeroed.id, "--json", "--results-dir", str(bench.results))
    assert code == 0
    assert json.loads(verdict)["agrees"]
    assert bench("export", zeroed.id, str(tmp_path / "out"))[0] == 0
    torch.testing.assert_close(open_folder(tmp_path / "out").network(ROWS).logits, logits[1])


@pytest.mark.slow
@pytest.mark.own_session
@pytest.mark.parametrize("launcher", ["joblib", "slurm_local"])
def test_worker_processes_find_the_example(bench, example, launcher):
    assert bench("trust", "--yes")[0] == 0
    code, _, said = bench(
        "run", "-m", f"hydra/launcher={launcher}", "method=zero_weakest", "benchmark=two_sciences",
        "ratio=0.1,0.3",
    )  # fmt: skip
    assert code == 0, said
    assert len(Store(bench.results).all()) == 2


class Odd(Method):
    """Does in `apply` what the test says."""

    act: str = "none"

    def check(self, structure):
        """Accept everything."""

    def apply(self, model, context):
        """Do it."""
        if self.act == "raise":
            raise KeyError("no such layer")
        if self.act == "nothing":
            return None
        return MethodReport("none")


def test_a_wrong_report_names_the_method_and_its_line():
    odd = Odd(act="nothing")
    said = r"Odd \(.*test_plugins\.py:\d+\)\.apply returned NoneType instead of a Method"
    with pytest.raises(method_application.UserError, match=said):
        method_application._refuse_wrong_report("odd", odd, odd.apply(None, Context(seed=0)))


@pytest.mark.parametrize(
    ("details", "layers", "said"),
    [
        ({"set": {1}}, (), "type set is not JSON serializable"),
        ({"loss": float("nan")}, (), "not JSON compliant"),
        ({"rows": 2**70}, (), "needs more than 64 bits"),
        ({"name": "\ud800"}, (), "surrogates not allowed"),
        ({"history": "none"}, (), "history is not a list of objects"),
        ({"tree": json.loads("[" * 63 + "]" * 63)}, (), "nested deeper than 64 levels"),
        ({}, [LayerReport(layer=0, kept=numpy.int64(3))], "numpy.int64"),
        ({}, [LayerReport(layer=0, energy_per_expert=[float("nan")])], "energy_per_expert"),
        ({}, [3], "layers.0"),
        ({}, None, "not iterable"),
    ],
)
def test_what_a_record_cannot_hold_is_refused_before_the_scoring(details, layers, said):
    report = MethodReport("none", details=details, layers=layers)
    with pytest.raises(method_application.UserError, match=said) as raised:
        method_application._recordable("odd", Odd(), {}, report)
    assert "Odd (" in str(raised.value) and "\n" not in str(raised.value)


def test_numbers_by_layer_of_any_iterable_are_kept():
    layers = (LayerReport(layer=number, kept=(1, 2)) for number in range(2))
    applied = method_application._recordable("odd", Odd(), {}, MethodReport("none", {}, layers))
    assert [layer.layer for layer in applied.layers] == [0, 1]


def test_an_exception_carries_the_line_of_the_method():
    odd = Odd(act="raise")
    with (
        pytest.raises(KeyError) as caught,
        method_application._attribute_errors("odd", odd),
    ):
        odd.apply(None, Context(seed=0))
    (note,) = caught.value.__notes__
    assert "while applying method odd (" in note
    assert f"{Path(__file__).name}:" in note


def test_the_traceback_is_shown_when_asked_for(bench, tmp_path, monkeypatch):
    def fail(*given):
        raise KeyError("no such layer")

    tmp_path.joinpath("results").mkdir()
    monkeypatch.setattr("bench.cli.commands.records.show", fail)
    assert "Traceback" not in bench("show", "a")[2]
    code, _, said = bench("show", "a", "--traceback")
    assert code == 1
    assert 'raise KeyError("no such layer")' in said
    assert "bench: failed: KeyError" in said
