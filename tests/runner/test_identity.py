"""The identity of a run covers every byte that can change its numbers, and no other."""

import shutil
from pathlib import Path

import pytest

from bench.config.composition import compose_run_config
from bench.models import embedded
from bench.runner import identity
from bench.runner.identity import method_identity, model_files_identity
from bench.runner.inputs import resolve_run
from bench.runner.session import Session

MICRO_MOE = Path(next(iter(embedded.__path__))) / "micro_moe"
READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FAST = ["benchmark=nine_tasks_micro", "benchmark.tasks=[arc_easy]", "costs.length=16"]


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(MICRO_MOE, tmp_path / "model"))


@pytest.fixture
def fresh_process(monkeypatch):
    """Forget what the process remembers of source files, as a new process would."""

    def forget():
        identity._code_hash.cache_clear()
        identity._imported_names.cache_clear()

    forget()
    yield forget
    forget()


@pytest.mark.parametrize("name", READ)
def test_a_byte_of_any_file_that_loading_reads_changes_it(model, name):
    before = model_files_identity(model, remote_code=False)
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    after = model_files_identity(model, remote_code=False)
    assert {key for key in before if before[key] != after[key]} == {f"file {name}"}


@pytest.mark.parametrize("name", [
    "chat_template.jinja", "slimbench.json", "processor_config.json", "preprocessor_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "merges.txt",
    "additional_chat_templates/tools.jinja",
])  # fmt: skip
def test_a_new_file_that_loading_reads_changes_it(model, name):
    before = model_files_identity(model, remote_code=False)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    assert model_files_identity(model, remote_code=False) != before


@pytest.mark.parametrize("name", ["README.md", "training.json", "modeling.py", ".gitattributes"])
def test_a_file_that_loading_does_not_read_does_not(model, name):
    before = model_files_identity(model, remote_code=False)
    (model / name).write_text("changed")
    assert model_files_identity(model, remote_code=False) == before


def test_remote_code_counts_where_it_runs(model):
    before = model_files_identity(model, remote_code=True)
    (model / "modeling.py").write_text("changed = True")
    assert model_files_identity(model, remote_code=True) != before


def test_the_id_changes_with_the_models_config(model):
    given = [*FAST, "model=local", f"model.path={model}"]
    with Session() as session:
        before = resolve_run(compose_run_config(given), session).id
        config = model / "config.json"
        config.write_text(
            config.read_text().replace(
                '"num_experts_per_tok": ', '"unused": 1, "num_experts_per_tok": '
            )
        )
        assert resolve_run(compose_run_config(given), session).id != before


def test_the_id_names_the_device_and_not_how_it_was_asked_for():
    with Session() as session:
        ids = {
            resolve_run(compose_run_config([*FAST, *given]), session).id
            for given in ([], ["model.device=cpu"], ["model.device=cpu", "model.dtype=float32"])
        }
    assert len(ids) == 1


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A package whose method imports one module of three."""
    folder = tmp_path / "identified"
    (folder / "maths").mkdir(parents=True)
    method = "from bench.method import Method\nfrom .maths import scale\n\nclass M(Method):\n"
    method += "    def check(self, structure): ...\n    def apply(self, model, context): ...\n"
    (folder / "__init__.py").touch()
    (folder / "method.py").write_text(method)
    (folder / "maths" / "__init__.py").touch()
    (folder / "maths" / "scale.py").write_text("def late():\n    import identified.deep\n")
    (folder / "deep.py").write_text("factor = 1\n")
    (folder / "unrelated.py").write_text("factor = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("method.py", True),
        ("__init__.py", True),
        ("maths/__init__.py", True),
        ("maths/scale.py", True),
        ("deep.py", True),
        ("unrelated.py", False),
    ],
)
def test_the_source_of_a_method_and_of_what_it_imports_counts(
    third_party, fresh_process, monkeypatch, file, changes
):
    import importlib
    import sys

    for name in [name for name in sys.modules if name.startswith("identified")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    method = importlib.import_module("identified.method").M()
    before = method_identity(method)
    fresh_process()
    (third_party / file).write_text((third_party / file).read_text() + "\n# changed\n")
    assert (method_identity(method) != before) == changes
    for name in [name for name in sys.modules if name.startswith("identified")]:
        monkeypatch.delitem(sys.modules, name)


def test_two_classes_with_equal_knobs_are_two_methods():
    one, other = compose_run_config(["method=[camera_p,gptq]"]).method.values()
    assert method_identity(one) != method_identity(other)
    assert method_identity(one).startswith("methods.camera.pruning.CameraP ")
