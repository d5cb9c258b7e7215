"""A method that raises, leaves NaN, or keeps memory: one sentence with its name."""

import pytest
import torch

from bench.records import Store
from methods.camera.pruning import CameraP
from tests.faults.killable_runs import run

RUN = ("method=camera_p", "ratio=0.4")
LEAKED = []


def after_apply(act):
    """Return what lets `act` do something to the model after camera_p."""

    def arm():
        apply = CameraP.apply

        def faulty(self, model, context):
            report = apply(self, model, context)
            act(model)
            return report

        CameraP.apply = faulty

    return arm


def test_nan_weights_are_refused_by_method_and_tensor(tmp_path, undisturbed):
    def act(model):
        with torch.no_grad():
            model.network.model.layers[1].self_attn.q_proj.weight[3, 3] = float("nan")

    code, said = run(tmp_path / "results", *RUN, before=after_apply(act))
    assert code == 2
    assert said.strip() == (
        "bench: method camera_p left numbers in model.layers.1.self_attn.q_proj.weight "
        "that are NaN or infinite"
    )
    assert not Store(tmp_path / "results").all()


@pytest.mark.broad
def test_a_method_that_raises_is_named_and_the_next_run_is_untouched(tmp_path, same):
    def act(model):
        raise ZeroDivisionError("no token came")

    code, said = run(tmp_path / "results", *RUN, before=after_apply(act))
    assert code != 0
    assert "ZeroDivisionError: no token came, while applying method camera_p" in said
    code, said = run(tmp_path / "results", *RUN)
    assert (code, "leaks" in said) == (0, False)
    same(tmp_path / "results")


@pytest.mark.broad
def test_memory_that_a_method_keeps_is_reported(tmp_path, same):
    def act(model):
        LEAKED.append(torch.ones(100 * 2**20))

    code, said = run(tmp_path / "results", *RUN, before=after_apply(act))
    assert code == 0
    assert "camera_p leaks 4" in " ".join(said.split())
    assert "MiB in addition to the model's own memory" in " ".join(said.split())
    same(tmp_path / "results")
