"""Slips at the keyboard: each is answered by one sentence that says how to mend it.

Nothing is loaded and nothing is written; `test_wrong_input.py` has input that does not fit.
"""

import errno
import shlex

import pytest

import bench
from bench.cli.main import main
from bench.config.overrides import Overrides
from bench.config.run_config import validate
from bench.errors import UserError
from bench.evaluation.task_planning import task_code_errors
from bench.records import Store
from bench.records.files import refuse_unwritable
from tests.records.test_store import make

SEARCH = "sweep=camera_p_pareto"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Call a command that must be refused in an empty folder; return its sentence."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        assert main(list(arguments)) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("bench: ")
        assert said.err.count("\n") == 1
        assert not list(tmp_path.iterdir())
        return said.err

    return call


@pytest.mark.sample(25)
@pytest.mark.parametrize(("asked", "said"), [
    ("ratio=0.2,0.4", "add -m to run each of them"),
    ("method=dense,camera_p", "method=[dense,camera_p] applies them one after the other"),
    ("model.path=choice(a,b)", "write \"model.path='choice(a,b)'\" if this is one text"),
    ("seed=range(3)", "add -m"),
    ("method=null", "method=[] for the dense model"),
    ("method=5", "names no method"),
    ("model=null", "is not a choice: allowed:"),
    ("benchmark=3.5", "camera_micro"),
    ("=5", "has no key"),
    ("+ratio=0.3", "write ratio=0.3"),
    ("model.path=a=b", "\"model.path='a=b'\""),
    ("model.path=a[b", "\"model.path='a[b'\""),
    ("model.path=a#b", "\"model.path='a#b'\""),
    ("model.path=it's", "\"model.path='it\\'s'\""),
    ("camera_p", "as in method=camera_p"),
    ("a b=c", "a key has letters, digits, dots and slashes"),
    ("benchmark=organisation/name", "unknown benchmark 'organisation/name'"),
    ("hydra/launcher=locall", "did you mean 'local'?"),
    ("benchmark.limit=true", "a number is needed"),
    ("benchmark.limit=1e23", "numbers go up to"),
    ("benchmark.limit=100000000000000000000000", "numbers go up to"),
    ("costs.timing.batches=[true]", "costs.timing.batches=[true]: a number is needed"),
    ("costs.timing.max_seconds=inf", "a finite number is needed"),
    ("ratio=-5", "ratio=-5"),
    ("ratio=nan", "a finite number is needed"),
    ("objective=averge", "did you mean 'average'?"),
    ("model.path=/etc", "/etc is not a model folder: it has no config.json"),
    ("hydra.searchpath=[s3://x]", "s3:// cannot be read: give file://FOLDER or pkg://PACKAGE"),
    ("hydra.searchpath=[file:///nope]", "file:///nope is not a folder"),
    ("hydra.searchpath=[nope]", "nope is not a folder"),
    ("hydra.searchpath=[pkg://nope.conf]", "there is no package 'nope.conf'"),
    ("hydra.searchpath=nope", "as in hydra.searchpath=[pkg://your_package.conf]"),
    ("hydra.searchpath=[5]", "give a list of folders and packages"),
    ("hydra.searchpath=null", "give a list of folders and packages"),
    ("hydra.mode=foo", "allowed: RUN, MULTIRUN"),
    ("hydra.mode=5", "allowed: RUN, MULTIRUN"),
    ("~hydra.mode", "can be set, and not deleted"),
    ("hydra.verbose=5", "give true, or the names of loggers"),
    ("packages=[typo]", "there is no package 'typo'"),
    ("packages=[methods,typo]", "there is no package 'typo'"),
    ("packages=[methods.camera]", "give the whole, methods"),
    ("packages=[./mine]", "packages=[./mine]"),
    ("ratio=${nope}", "ratio=${nope}: there is no key 'nope' to refer to"),
    ("ratio=${model.nam}", "did you mean ${model.name}?"),
    ("model.path=${nope.deeper}", "there is no key 'nope.deeper'"),
    ("results_dir=${nope}", "results_dir=${nope}: there is no key"),
    ("ratio=${oc.env:NOPE_X}", "the environment variable NOPE_X is not set"),
    ("ratio=${ratio}", "ratio=${ratio} cannot be resolved: recursive interpolation"),
    ("ratio=${hydra:job.num}", "cannot refer to Hydra's own"),
    ("benchmark.data.gsm8k=x.jsonl", "write +benchmark.data.gsm8k=x.jsonl to add it"),
    ("benchmark.include=[mine]", "it is a key of benchmark=lm_eval; allowed here"),
    ("benchmark.gen_kwargs.top_k=5", "benchmark.gen_kwargs is empty: write +benchmark.gen_kwargs"),
    ("method={a:b}", "method={a:b} is a mapping where a name is needed: write method=NAME"),
    ("benchmark.gen_kwargs={a:1}", "unknown key 'benchmark.gen_kwargs'"),
    ("benchmark.images.data=mnist", "allowed here: benchmark.allow_missing"),
    ("benchmark.perplexity={}", "~benchmark.perplexity removes it with all entries (english)"),
    ("results_dir=null", "results_dir=null: a path is needed"),
    ("results_dir=5", "write results_dir=./NAME"),
    ("results_dir=true", "results_dir=true: a path is needed"),
    ("model=", "model= is empty, as an unset shell variable is: allowed: "),
    ("benchmark=''", "benchmark= is empty"),
    ("method=", "method= is empty"),
    ("hydra/launcher=", "hydra/launcher= is empty"),
    ("model=ORG/NAME@main", "write model=ORG/NAME model.revision=main"),
    ("model=olmoe_1b_7b@v1.0", "write model=olmoe_1b_7b model.revision=v1.0"),
    ("model=ORG/NAME:a/b", "write model=ORG/NAME model.revision=a/b"),
    ("model=https://huggingface.co/ORG/NAME", "write model=ORG/NAME\n"),
    ("model=hf://ORG/NAME@dev", "write model=ORG/NAME model.revision=dev"),
    ("model='https://huggingface.co/ORG/NAME/tree/dev'", "model=ORG/NAME model.revision=dev"),
])  # fmt: skip
def test_an_override_that_cannot_be_meant(refused, asked, said):
    assert said in refused("run", asked, "tracker=none")


@pytest.mark.parametrize("asked", [
    ["ratio=0.2", "ratio=0.4"], ["ratio=0.2", "+ratio=0.4"], ["++ratio=0.2", "ratio=0.4"],
    ["ratio=0.2", "~ratio"], ["model=micro_moe", "model=micro_llava"],
    ["method=rtn", "method=[camera_p]"], ["hydra/launcher=local", "hydra/launcher=joblib"],
    ["-m", "seed=1,2", "seed=3"], ["costs.timing.rounds=3", "seed=1", "costs.timing.rounds=4"],
])  # fmt: skip
def test_one_key_twice(refused, asked):
    said = refused("run", *asked, "tracker=none")
    texts = [text for text in asked if text not in ("-m", "seed=1")]
    assert f"bench: {texts[0]} and {texts[1]} both set " in said
    assert "give one of them" in said


def test_a_sweep_of_too_many_jobs(refused):
    many = ["-m", "seed=range(1000)", "ratio=range(0,1,0.001)", "tracker=none"]
    assert "1,000,000 jobs (1,000 of seed x 1,000 of ratio)" in refused("run", *many)
    said = refused("run", "-m", "seed=1,2", "hydra.sweeper.max_jobs=1")
    assert "more than hydra.sweeper.max_jobs=1: give fewer values, or raise it" in said


@pytest.mark.sample(2)
@pytest.mark.parametrize(("asked", "said"), [
    ("hydra.sweeper.trials=0", "a whole number from 1 on"),
    ("hydra.sweeper.parallel=many", "a whole number from 1 on"),
    ("hydra.sweeper.early_margin=nan", "0 or more is needed"),
    ("hydra.sweeper.early_margin=two", "0 or more is needed"),
    ("hydra.sweeper.early_tasks=piqa", "a list of names is needed"),
    ("hydra.sweeper.early_tasks=null", "a list of names is needed"),
    ("hydra.sweeper.early_tasks=[1]", "a list of names is needed"),
    ("hydra.sweeper.space=null", "ranges by key are needed"),
    ("hydra.sweeper.objectives=[minimize flops,maximize flops]", "names flops twice"),
    ("hydra.sweeper.objectives=[]", "is empty"),
    ("hydra.sweeper.objectives=[maximize foo]", "'foo' is neither a metric"),
    ("hydra.sweeper.objectives=[minimize flop]", "did you mean 'flops'?"),
    ("hydra.sweeper.study=../outside", "a name without slashes"),
])  # fmt: skip
def test_a_search_that_cannot_be_meant_leaves_no_sweep(refused, asked, said):
    assert said in refused("run", SEARCH, asked, "tracker=none", "offline=true")


@pytest.mark.parametrize(
    "value", ["a=b", "a[b", "a#b", "it's", 'say "x"', "$HOME", "a\\", "{", "%"]
)
def test_the_quoted_override_is_what_was_meant(value):
    from bench.config.overrides import quoted_override

    (argument,) = shlex.split(quoted_override(f"model.path={value}"))
    assert Overrides.parse([argument]).value("model.path") == value


@pytest.mark.parametrize("command", [
    ["ls", "runs"], ["gc"], ["status"], ["compare", "a", "b"], ["plot", "front"], ["verify", "a"],
    ["export", "a", "b"], ["resume", "latest"], ["track"], ["report"], ["show", "a"],
])  # fmt: skip
def test_a_results_folder_that_is_not_there(refused, tmp_path, command):
    assert "no such folder" in refused(*command, "--results-dir", str(tmp_path / "missing"))


@pytest.mark.parametrize("command", [
    ["ls", "runs", "--results-dir", "a" * 5000], ["gc", "--results-dir", "a" * 300],
    ["run", "results_dir=" + "a" * 5000], ["run", f"model.path={'a' * 300}", "model=local"],
])  # fmt: skip
def test_a_path_that_no_system_takes(refused, command):
    assert "ile name too long" in refused(*command)


def test_a_folder_that_this_user_may_not_list(refused, tmp_path, monkeypatch):
    """Raised by hand, because the permissions of files do not bind root."""

    def forbidden(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Store, "ids", lambda store: forbidden(store.runs))
    assert f"{tmp_path}/runs: Permission denied" in refused(
        "show", "a", "--results-dir", str(tmp_path)
    )


@pytest.mark.parametrize("flags", [["--cfg", "jobb"], ["--cfg"], ["-c"]])
def test_a_flag_of_hydras_without_its_word(refused, flags):
    assert "argument --" in refused("run", *flags)


def test_lists_that_need_no_results_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ls", "models"]) == 0
    assert "micro_moe" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [
    ["verify", "a", "--tolerance", "nan"], ["verify", "a", "--tolerance", "-1"],
    ["verify", "a", "--tolerance", "inf"], ["compare", "a", "b", "--flips", "-1"],
    ["report", "--samples", "²"], ["report", "--samples", "9" * 40],
])  # fmt: skip
def test_numbers_of_options(refused, arguments):
    assert repr(arguments[-1]) in refused(*arguments)


@pytest.mark.parametrize("call", [
    lambda: bench.run([1]), lambda: bench.run(5),
    lambda: bench.compare("1a2b"), lambda: bench.plot("front", "1a2b"),
])  # fmt: skip
def test_a_text_where_a_list_is_due(call):
    with pytest.raises(UserError, match="is not a list of strings: write bench"):
        call()


def test_a_method_knows_a_number_from_a_truth_value(tmp_path):
    from bench.config.composition import compose_run_config

    config = compose_run_config(["method=camera_p"]).plain()
    knobs = {"_target_": "methods.camera.pruning.CameraP", **config["method"]["camera_p"]}
    for wrong in (True, float("inf"), float("nan"), 2**70):
        with pytest.raises(UserError, match=r"method\.camera_p\.alpha"):
            validate({**config, "method": {"camera_p": {**knobs, "alpha": wrong}}})


def test_the_hint_at_prefetch_names_the_tasks_that_were_chosen(refused):
    said = refused("run", "benchmark=nine_tasks", "benchmark.tasks=[boolq]", "offline=true")
    assert '`bench prefetch benchmark=nine_tasks "benchmark.tasks=[boolq]"`' in said
    whole = refused("run", "benchmark=nine_tasks", "offline=true")
    assert "`bench prefetch benchmark=nine_tasks`" in whole


class TooSoon(Exception):
    """Work began before the target was looked at."""


@pytest.fixture
def no_work(monkeypatch):
    """Fail as soon as records are read or a model is built."""

    def begun(*given, **more):
        raise TooSoon

    for name in ("bench.records.Store.all", "bench.cli.commands.export.rebuild_model"):
        monkeypatch.setattr(name, begun)


@pytest.mark.parametrize("command", [
    ["report", "--out", "FILE/report.html"], ["report", "--out", "/proc/no/report.html"],
    ["report", "--out", "FOLDER"], ["plot", "front", "--output", "FILE/a.png"],
    ["plot", "front", "--output", "a.bmp"], ["plot", "front", "--output", "FOLDER/a.svg\0"],
    ["export", "a", "FILE/model"], ["export", "a", "/proc/no/model"], ["track"],
])  # fmt: skip
def test_a_target_that_cannot_be_written_is_refused_before_any_work(
    tmp_path, monkeypatch, capsys, no_work, command
):
    monkeypatch.chdir(tmp_path)
    results, file, folder = tmp_path / "results", tmp_path / "file", tmp_path / "folder"
    Store(results).write(make(), [], "")
    file.write_text("in the way")
    folder.mkdir()
    (results / "tracked").write_text("in the way")
    places = {"FILE": str(file), "FOLDER": str(folder)}
    named = [
        word.replace(key, place) if key in word else word
        for word in command
        for key, place in [next((p for p in places.items() if p[0] in word), ("", ""))]
    ]
    before = sorted(tmp_path.rglob("*"))
    assert main([*named, "--results-dir", str(results)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written" in said or "must end in" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_on_a_full_disk_is_no_mistake(tmp_path, monkeypatch):
    def full(**given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        refuse_unwritable("--out", tmp_path / "a")


def test_verify_refuses_a_run_without_samples(tmp_path, capsys):
    Store(tmp_path).write(make(), [], "")
    assert main(["verify", "a", "--results-dir", str(tmp_path)]) == 2
    assert "has no samples to repeat" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "said"), [
    (SystemExit("no such video"), "its code ended the program (no such video)"),
    (SystemExit(1), "its code ended the program (exit code 1)"),
    (KeyError("SLIMBENCH_NO_SUCH_VARIABLE"), "it needs the environment variable SLIMBENCH_NO"),
    (KeyError("question"), "KeyError: 'question'"),
    (RuntimeError("set OPENAI_API_KEY"), "RuntimeError: set OPENAI_API_KEY"),
])  # fmt: skip
def test_a_task_whose_code_fails_is_named(error, said):
    with pytest.raises(UserError) as raised, task_code_errors("lmms-eval", "mmvet"):
        raise error
    assert "task 'mmvet' of lmms-eval cannot be set up" in str(raised.value)
    assert said in str(raised.value)
