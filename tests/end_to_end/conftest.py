"""The command line, called in this process, with a small share of the questions."""

import pytest

from bench.cli.main import main

# Unless a test says otherwise.
SMALL = {
    "benchmark.limit": "6",
    "calibration.rows": "4",
    "costs.length": "32",
    "tracker": "none",
}


@pytest.fixture
def bench(tmp_path, capsys):
    """Call `bench COMMAND ...` on a results folder of this test; return exit code and outputs."""

    def call(*arguments):
        given = list(arguments)
        if given[0] == "run":
            keys = {argument.split("=")[0] for argument in given}
            given += [f"{key}={value}" for key, value in SMALL.items() if key not in keys]
            given += [f"results_dir={call.results}"]
        elif given[0] in ("ls", "show", "track", "export", "rescore"):
            given += ["--results-dir", str(call.results)]
        code = main(given)
        said = capsys.readouterr()
        return code, said.out, said.err

    call.results = tmp_path / "results"
    return call


@pytest.fixture
def refused(bench):
    """Run something that must be refused; return the sentence."""

    def call(*arguments):
        code, out, err = bench("run", *arguments)
        assert code == 2, err
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("bench: ")
        runs = bench.results / "runs"
        assert not runs.exists() or list(runs.iterdir()) == []
        return err

    return call
