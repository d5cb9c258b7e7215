"""An undisturbed run to compare with, made once, which also loads all that children then have."""

import pandas as pd
import pytest

from bench.cli.main import main
from bench.evaluation.response_cache import ResponseCache
from bench.records import samples
from tests.faults.killable_runs import SMALL, counted, only, timeless


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The results folder of a pruned run that nothing happened to; `scored` is beside it."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ResponseCache,
            "get_or_compute",
            counted(ResponseCache.get_or_compute, results.parent / "scored"),
        )
        assert main(["run", "method=camera_p", "ratio=0.4", *SMALL, f"results_dir={results}"]) == 0
    return results


@pytest.fixture
def same(undisturbed):
    """Assert that a results folder holds the undisturbed run, down to the last bit of a sample."""

    def check(results):
        ours, theirs = only(results), only(undisturbed)
        assert timeless(ours) == timeless(theirs)
        pd.testing.assert_frame_equal(
            samples(ours.id, results), samples(theirs.id, undisturbed), check_exact=True
        )
        assert not list((results / "unfinished").iterdir())
        assert [path.name for path in (results / "runs").iterdir()] == [ours.id]

    return check
