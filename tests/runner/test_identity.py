"""The identity of a run covers every byte that can change its numbers, and no other."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.data import digests
from bench.data.digests import fingerprint
from bench.errors import UserError
from bench.evaluation.harness import file_source
from bench.method import Method
from bench.models import checkpoints, embedded
from bench.models.source import read_files
from bench.models.weight_files import find_weight_files
from bench.records import Store
from bench.runner import identity
from bench.runner.identity import (
    identity_differences,
    library_versions,
    method_files,
    method_identity,
    place_named,
)
from bench.runner.inputs import replaced_modules_identity, resolve_run
from bench.runner.session import Session
from methods.baselines.router_masks import MaskedRouter
from tests.records.test_store import make

MICRO_MOE = Path(next(iter(embedded.__path__))) / "micro_moe"
READ = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FAST = ["benchmark=nine_tasks_micro", "benchmark.tasks=[arc_easy]", "costs.length=16"]


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(MICRO_MOE, tmp_path / "model"))


@pytest.mark.parametrize("name", READ)
def test_a_byte_of_any_file_that_loading_reads_changes_it(model, name):
    before = read_files(model, remote_code=False)
    (model / name).write_bytes((model / name).read_bytes() + b" ")
    after = read_files(model, remote_code=False)
    assert {key for key in before if before[key] != after[key]} == {name}


@pytest.mark.parametrize("name", [
    "chat_template.jinja", "slimbench.json", "processor_config.json", "preprocessor_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "merges.txt",
    "additional_chat_templates/tools.jinja", "config.4.0.0.json", "tokenizer.4.0.0.json",
    "qformer_tokenizer/tokenizer.json", "video_preprocessor_config.json", "vocab.txt",
])  # fmt: skip
def test_a_new_file_that_loading_reads_changes_it(model, name):
    before = read_files(model, remote_code=False)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{}")
    assert read_files(model, remote_code=False) != before


@pytest.mark.parametrize("name", ["README.md", "training.json", "modeling.py", ".gitattributes"])
def test_a_file_that_loading_does_not_read_does_not(model, name):
    before = read_files(model, remote_code=False)
    (model / name).write_text("changed")
    assert read_files(model, remote_code=False) == before


def test_remote_code_counts_where_it_runs(model):
    before = read_files(model, remote_code=True)
    (model / "modeling.py").write_text("changed = True")
    assert read_files(model, remote_code=True) != before


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
    """A package whose method imports some of its modules."""
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
        # It may be imported by a computed name.
        ("unrelated.py", True),
    ],
)
def test_the_source_of_a_method_and_of_what_it_imports_counts(
    third_party, forget_sources, monkeypatch, file, changes
):
    import importlib
    import sys

    for name in [name for name in sys.modules if name.startswith("identified")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    method = importlib.import_module("identified.method").M()
    before = method_identity(method)
    forget_sources()
    (third_party / file).write_text((third_party / file).read_text() + "\n# changed\n")
    assert (method_identity(method) != before) == changes
    # Not by `monkeypatch`, which would put these modules back for the tests that follow.
    for name in [name for name in sys.modules if name.startswith("identified")]:
        del sys.modules[name]


def test_two_classes_with_equal_knobs_are_two_methods():
    one, other = compose_run_config(["method=[camera_p,gptq]"]).method.values()
    assert method_identity(one) != method_identity(other)
    assert method_identity(one).startswith("methods.camera.pruning.CameraP ")


MODELS = {
    "micro_moe": READ,
    "micro_llava": [*READ, "chat_template.jinja", "processor_config.json"],
    "micro_lenet": ["config.json"],
}


def identity_of_folder(folder):
    return read_files(folder, remote_code=False), fingerprint(find_weight_files(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A copy of the folder of a model of each kind."""
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        shutil.copytree(MICRO_MOE.parent / name, root / name)
    return root


@settings(max_examples=30)
@given(st.sampled_from(sorted(MODELS)), st.data())
def test_any_bit_of_any_file_that_loading_reads_changes_it(folders, name, data):
    folder = folders / name
    file = folder / data.draw(st.sampled_from([*MODELS[name], "model.safetensors"]))
    before, content = identity_of_folder(folder), file.read_bytes()
    changed = bytearray(content)
    place = data.draw(st.integers(0, len(content) - 1))
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(changed)
        assert identity_of_folder(folder) != before
    except UserError:
        pass  # a header that cannot be read has no identity at all
    finally:
        file.write_bytes(content)
    assert identity_of_folder(folder) == before


UNREAD = (
    "README.md", "LICENSE", ".gitattributes", "training.json", "modeling.py", "eval/results.json",
    "model.fp16.safetensors", "pytorch_model.bin", "model.onnx", "logs/events.tfevents",
    "trainer_state.json", "optimizer.pt", "picture.png",
)  # fmt: skip


@settings(max_examples=20)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(UNREAD), st.binary(max_size=40))
def test_no_byte_of_a_file_that_loading_does_not_read_does(folders, name, unread, content):
    folder = folders / name
    before, file = identity_of_folder(folder), folder / unread
    kept = file.read_bytes() if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    try:
        file.write_bytes(content)
        assert identity_of_folder(folder) == before
    finally:
        file.unlink() if kept is None else file.write_bytes(kept)


SOURCES = {
    "identified/__init__.py": b"",
    "identified/method.py": b"from .maths import scale\nimport identified_beside\n",
    "identified/maths/__init__.py": b"from . import late\n",
    "identified/maths/scale.py": b"factor = 1\n",
    "identified/maths/late.py": b"def late():\n    import identified.deep\n",
    "identified/deep.py": b"factor = 1\n",
    "identified/kernels/fast.cu": b"__global__ void f() {}\n",
    "identified/table.json": b'{"factor": 1}\n',
    "identified_beside.py": b"factor = 1\n",
}


@settings(max_examples=30)
@given(st.sampled_from(sorted(SOURCES)), st.data())
def test_any_byte_of_a_methods_source_or_data_changes_it(tmp_path_factory, name, data):
    root = tmp_path_factory.mktemp("sources")

    def hashed():
        for cached in vars(digests).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        return digests.code_hash(root / "identified/method.py", "identified.method", "identified")

    for path, content in (*SOURCES.items(), ("other/method.py", b""), ("unrelated.py", b"")):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        before = hashed()
        place = data.draw(st.integers(0, len(SOURCES[name])))
        changed = SOURCES[name][:place] + data.draw(st.binary(min_size=1, max_size=3))
        (root / name).write_bytes(changed + SOURCES[name][place:])
        assert hashed() != before
        (root / name).write_bytes(SOURCES[name])
        for path in ("other/method.py", "unrelated.py"):
            (root / path).write_bytes(data.draw(st.binary(min_size=1, max_size=3)))
        assert hashed() == before


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=6), min_size=2, max_size=3), st.data())
def test_any_byte_of_local_data_changes_it_and_their_place_does_not(tmp_path_factory, parts, data):
    def source(contents):
        folder = tmp_path_factory.mktemp("data")
        files = [folder / f"{name}.jsonl" for name in ("test", "train", "validation")]
        for file, content in zip(files, contents, strict=False):
            file.write_bytes(content)
        return file_source(files[: len(contents)]).fingerprint

    before = source(parts)
    assert source(parts) == before
    # The last byte of one split as the first of the next: the same bytes in the same order.
    moved = [parts[0][:-1], parts[0][-1:] + parts[1], *parts[2:]]
    assert (source(moved) == before) == (moved == parts)
    place = data.draw(st.integers(0, len(parts) - 1))
    assert source([*parts[:place], parts[place] + b"x", *parts[place + 1 :]]) != before


class Reading(Method):
    """Reads what its knobs name, and writes a folder."""

    table: str | None = None
    tables: dict[str, str] | None = None
    checkpoints: str | None = None
    writes = ("checkpoints",)

    def check(self, structure): ...
    def apply(self, model, context): ...


def test_files_that_a_method_reads_count_and_those_it_writes_do_not(tmp_path):
    table = tmp_path / "tables" / "deep" / "scale.json"
    table.parent.mkdir(parents=True)
    table.write_text("1")
    methods = [
        Reading(table=str(table)),
        Reading(table=str(tmp_path / "tables")),
        Reading(tables={"one": str(table)}),
        Reading(checkpoints=str(tmp_path / "tables")),
    ]
    before = [method_identity(method) for method in methods]
    table.write_text("2")
    after = [method_identity(method) for method in methods]
    assert [one != other for one, other in zip(before, after, strict=True)] == [
        True, True, True, False,
    ]  # fmt: skip


class Naming(Method):
    """Has a knob that offers words, and one that names anything."""

    order: Literal["random", "first"] | None = None
    source: str | None = None

    def check(self, structure): ...
    def apply(self, model, context): ...


@pytest.mark.parametrize(
    ("knobs", "changes"),
    [
        ({"source": "random"}, True),
        ({"source": "./random"}, True),
        ({"order": "random"}, False),
        ({"source": "elsewhere"}, False),
    ],
)
def test_a_folder_that_a_knob_names_counts_however_written(tmp_path, monkeypatch, knobs, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()
    method = Naming(**knobs)
    before = method_identity(method)
    (tmp_path / "random" / "s.json").write_text("1")
    assert (method_identity(method) != before) == changes
    assert (Path("random") in method_files(method)) == changes


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("named_lib", True),
        ("named_lib.Scale", True),
        ("named_lib:Scale", True),
        ("named_other", False),
        ("named.lib", False),
        ("numpy", False),
        ("...", False),
    ],
)
def test_a_module_that_a_knob_names_counts(tmp_path, monkeypatch, forget_sources, text, changes):
    monkeypatch.syspath_prepend(str(tmp_path))
    # The code of this class, with all tests, is not what is asked for.
    monkeypatch.setattr(identity, "class_identity", str)
    module = tmp_path / "named_lib.py"
    module.write_text("factor = 1")
    method = Naming(source=text)
    before = method_identity(method)
    forget_sources()
    module.write_text("factor = 2")
    assert (method_identity(method) != before) == changes


def test_a_method_whose_source_cannot_be_read_is_refused():
    kind = type("Made", (Method,), {"__module__": "nowhere", **methods_of_nothing()})
    with pytest.raises(UserError, match=r"nowhere\.Made has no source.*define the class in a file"):
        method_identity(kind())


def methods_of_nothing():
    return {"check": lambda self, structure: None, "apply": lambda self, model, context: None}


@pytest.mark.parametrize("spelling", ["0.30", "3e-1", "0.3"])
def test_spellings_of_a_number_are_one_run(spelling):
    one, other = (
        compose_run_config([*FAST, "method=camera_p", f"ratio={text}"])
        for text in ("0.3", spelling)
    )
    assert one.identity() == other.identity()


def test_code_that_scores_or_measures_counts(tmp_path, monkeypatch):
    package = tmp_path / "bench"
    for name in ("measurement", "evaluation", "models/embedded/micro", "reporting"):
        (package / name).mkdir(parents=True)
        (package / name / "code.py").write_text("x = 1")
    (package / "runner").mkdir()
    (package / "method.py").touch()
    monkeypatch.setattr(identity, "__file__", str(package / "runner" / "identity.py"))

    def now():
        identity.scoring_code_identity.cache_clear()
        return identity.scoring_code_identity()

    before = now()
    changes = {}
    for name in ("measurement", "evaluation", "models/embedded/micro", "reporting"):
        (package / name / "code.py").write_text("x = 2")
        changes[name] = now() != before
        (package / name / "code.py").write_text("x = 1")
    monkeypatch.undo()
    identity.scoring_code_identity.cache_clear()
    assert changes == {
        "measurement": True, "evaluation": True, "models/embedded/micro": False, "reporting": False,
    }  # fmt: skip


def test_versions_are_those_of_the_libraries_in_use():
    of = {
        name: library_versions(compose_run_config(given))
        for name, given in {
            "text": [],
            "offloaded": ["model.device_map=offload_cpu"],
            "images": ["model=micro_lenet", "benchmark=images"],
        }.items()
    }
    assert {"torch", "tokenizers", "numpy", "lm-eval"} <= of["text"].keys()
    assert of["offloaded"].keys() - of["text"].keys() == {"accelerate"}
    assert of["images"].keys() - of["text"].keys() == {"pillow", "torchvision"}


def test_the_code_of_replaced_modules_counts_whoever_wrote_it(
    tmp_path, monkeypatch, forget_sources
):
    file = tmp_path / "replacing.py"
    file.write_text(
        "from bench.models.replaced_modules import ReplacedModule\nfactor = 1\n"
        "class Linear(ReplacedModule):\n"
        "    def spec(self): ...\n    def from_spec(self, spec): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("replacing").Linear()
    with torch.device("meta"):
        routed = MaskedRouter(MixtralTopKRouter(MixtralConfig()), [0, 1], 8)
    before = replaced_modules_identity(nn.Sequential(nn.Linear(2, 2), routed, own))
    assert {name.rpartition(".")[2] for name in before} == {"MaskedRouter", "Linear"}
    forget_sources()
    file.write_text(file.read_text().replace("factor = 1", "factor = 2"))
    after = replaced_modules_identity(own)
    assert after.keys() == {"class replacing.Linear"}
    assert not after.items() & before.items()


def test_versions_of_what_methods_and_checkpoints_need_count():
    plain = compose_run_config([])
    adapted = plain.model_copy(
        update={"model": plain.model.model_copy(update={"adapter": "adapter"})}
    )
    assert library_versions(adapted).keys() - library_versions(plain).keys() == {"peft"}
    packed = checkpoints.Quantization("compressed-tensors", 1)
    more = library_versions(plain, packed).keys() - library_versions(plain).keys()
    assert more == {"compressed_tensors"}
    solved = compose_run_config(["method=mc"])
    assert library_versions(solved).keys() - library_versions(plain).keys() == {"scipy"}


def test_versions_of_what_a_plug_in_imports_count(tmp_path, monkeypatch, forget_sources):
    """At any depth of its code, whatever the distribution is called."""
    (tmp_path / "solving.py").write_text(
        "from bench.method import Method\nimport json, pydantic\nfrom solving_maths import solve\n"
        "class M(Method):\n"
        "    def check(self, structure): ...\n"
        "    def apply(self, model, context): ...\n"
    )
    (tmp_path / "solving_maths.py").write_text(
        "def solve():\n    import sklearn.svm, scipy, absent_library\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    method = importlib.import_module("solving").M()
    config = compose_run_config([])
    with_method = config.model_copy(update={"method": {"m": method}})
    before = library_versions(with_method)
    assert before.keys() - library_versions(config).keys() == {"scipy", "scikit-learn"}
    monkeypatch.setattr(digests, "version", lambda name: {"scipy": "9.9"}.get(name, "1"))
    digests.library_version.cache_clear()
    try:
        assert library_versions(with_method)["scipy"] == "9.9"
    finally:
        digests.library_version.cache_clear()


def test_differences_are_named_by_dotted_keys_and_short_hashes():
    given = [[*FAST, "method=camera_p", "ratio=0.35"], [*FAST, "method=[camera_p,gptq]", "seed=1"]]
    records = []
    with Session() as session:
        for place, overrides in enumerate(given):
            config = compose_run_config(overrides)
            inputs = resolve_run(config, session)
            provenance = {"identity": inputs.identity, "calibration": "x"}
            changed = {"config": config.plain(), "provenance": provenance}
            records.append(make(f"run{place}").model_copy(update=changed))
    rows = {row["part"]: row for row in identity_differences(*records, shortened=True)}
    assert rows["order of methods"]["run0"] == "camera_p"
    assert rows["order of methods"]["run1"] == "camera_p, gptq"
    assert (rows["seed"]["run0"], rows["seed"]["run1"]) == ("1234", "1")
    assert rows["method.camera_p.ratio"]["run0"] == "0.35"
    assert rows["method.gptq.bits"]["run0"] == "-"
    name, code = rows["methods.gptq"]["run1"].split()
    assert (name, len(code)) == ("methods.quantization.uniform.Gptq", 12)
    full = {row["part"]: row for row in identity_differences(*records)}
    assert len(full["methods.gptq"]["run1"].split()[1]) == 64
    assert not {"weights", "code", "files.config.json", "tasks.arc_easy"} & rows.keys()
    assert identity_differences(records[0], records[0]) == []


def test_the_command_says_why_two_runs_differ(tmp_path, capsys):
    config = compose_run_config([*FAST, "method=camera_p"]).plain()
    for name, code in (("a" * 12, "1" * 64), ("b" * 12, "1" * 12 + "2" * 52)):
        identity_parts = {"methods": {"mine": f"plug.Mine {code}"}, "versions": {"torch": "2"}}
        changed = {"config": config, "provenance": {"identity": identity_parts}}
        Store(tmp_path).write(make(name).model_copy(update=changed), [], "")
    where = ["--results-dir", str(tmp_path)]
    assert main(["show", "aaaa", "--why", "bbbb", *where, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {
        "part": "methods.mine",
        "a" * 12: f"plug.Mine {'1' * 64}",
        "b" * 12: f"plug.Mine {'1' * 12}{'2' * 52}",
    }
    assert main(["show", "aaaa", "--why", "bbbb", *where]) == 0
    shown = capsys.readouterr().out
    assert "methods.mine" in shown
    assert "torch" not in shown
    assert main(["show", "aaaa", "--why", "aaaa", *where]) == 0
    assert "do not differ in any part" in capsys.readouterr().out


@pytest.mark.sample(1)
@pytest.mark.parametrize("benchmark", [
    ["benchmark=nine_tasks_micro", "benchmark.tasks=[arc_easy,hellaswag]"],
    ["model=micro_llava", "benchmark=mllm_seven_micro", "benchmark.tasks=[gqa]"],
])  # fmt: skip
def test_a_sweep_watches_task_files_and_a_methods_code(benchmark):
    config = compose_run_config([*benchmark, "costs.length=16"])
    with Session() as session:
        files = resolve_run(config, session).files(config)
    assert {"hellaswag", "gqa"} & {file.name for file in files}
    text = compose_run_config(["method=camera_p"])
    (method,) = text.method.values()
    assert "pruning.py" in {file.name for file in method_files(method)}


def test_only_what_is_written_as_a_path_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "digits").mkdir()
    (tmp_path / "file").touch()
    named = ["digits", "./digits", "file", "~/file", "missing", "long " * 2000, "a\0b", "~nobody/x"]
    assert [place_named(text) is not None for text in named] == [
        False, True, True, True, False, False, False, False,
    ]  # fmt: skip
    assert place_named("digits", bare=True) is not None
