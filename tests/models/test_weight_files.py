"""The weights that are hashed are the weights that are loaded, in every layout of a folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.errors import UserError
from bench.models import embedded
from bench.models.classifiers.serialization import load_classifier_folder
from bench.models.loading import load_model
from bench.models.source import resolve_model
from bench.models.weight_files import find_weight_files
from bench.runner.session import BaseModelCache
from bench.schema import ModelConfig
from tests.models.tiny_networks import build, save

EMBEDDED = Path(next(iter(embedded.__path__)))


def source_of(folder, **more):
    options = {"name": "tiny", "source": "local", "path": str(folder), "device": "cpu"} | more
    return resolve_model(ModelConfig(**options), offline=True)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return save(build("qwen2_moe"), tmp_path_factory.mktemp("qwen2_moe"))


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def add_shards(folder, changed=False):
    """Write the weights a second time, as two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    where = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        factor = -1 if changed else 1
        shard = {n: tensors[n] * factor for n in half}
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def first_weight(folder, **more):
    return next(load_model(source_of(folder, **more)).network.parameters())


@pytest.mark.parametrize("kept", ["both", "shards"])
def test_next_to_a_single_file_shards_are_neither_loaded_nor_hashed(folder, kept):
    single = source_of(folder)
    weight = first_weight(folder)
    add_shards(folder, changed=True)
    if kept == "both":
        assert find_weight_files(folder) == (folder / "model.safetensors",)
        assert source_of(folder).fingerprint == single.fingerprint
        torch.testing.assert_close(first_weight(folder), weight)
        return
    (folder / "model.safetensors").unlink()
    assert len(find_weight_files(folder)) == 2
    assert source_of(folder).fingerprint != single.fingerprint
    torch.testing.assert_close(first_weight(folder), -weight)


@pytest.mark.parametrize("name", [
    "model.fp16.safetensors", "adapter_model.safetensors", "consolidated.safetensors",
    "other/model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "model.fp16.safetensors.index.json",
])  # fmt: skip
def test_what_is_not_loaded_changes_nothing(folder, name):
    before = source_of(folder)
    weight = first_weight(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: -t for n, t in tensors.items()}, folder / name, metadata={"format": "pt"})
    assert source_of(folder) == before
    torch.testing.assert_close(first_weight(folder), weight)


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json.*merge it"):
        source_of(folder)


@pytest.mark.parametrize("name", ["config.json", "config.5.0.0.json"])
def test_weights_named_by_the_config_are_refused(folder, name):
    content = json.loads((folder / "config.json").read_text())
    (folder / name).write_text(json.dumps(content | {"transformers_weights": "o.safetensors"}))
    with pytest.raises(UserError, match=r"transformers_weights=o\.safetensors: remove that key"):
        source_of(folder)


def test_a_classifier_folder_holds_to_the_same_file(tmp_path):
    folder = Path(shutil.copytree(EMBEDDED / "micro_lenet", tmp_path / "model"))
    before = source_of(folder, kind="image_classifier")
    weight = next(load_classifier_folder(folder).parameters())
    add_shards(folder, changed=True)
    assert source_of(folder, kind="image_classifier") == before
    torch.testing.assert_close(next(load_classifier_folder(folder).parameters()), weight)


def test_a_changed_config_is_another_model_in_the_same_process(folder):
    cache = BaseModelCache()
    before = cache.acquire(source_of(folder), will_change=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    after = cache.acquire(source_of(folder), will_change=False)
    assert after.network.config.rms_norm_eps == 0.5
    assert before is not after


@pytest.fixture(scope="module")
def opened():
    """Names of the files that Python opens; an audit hook cannot be removed, only be let idle."""
    names = []
    listening = [True]

    def note(event, arguments):
        if listening and event == "open":
            names.append(str(arguments[0]))

    sys.addaudithook(note)
    yield names
    listening.clear()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("micro_moe", "causal_lm"),
        ("micro_llava", "image_text"),
        ("micro_lenet", "image_classifier"),
    ],
)
def test_every_file_that_python_opens_while_loading_is_hashed(tmp_path, opened, name, kind):
    folder = Path(shutil.copytree(EMBEDDED / name, tmp_path / "model"))
    source = source_of(folder, kind=kind)
    opened.clear()
    load_model(source)
    inside = {str(Path(file).relative_to(folder)) for file in opened if str(folder) in file}
    assert inside
    assert inside <= source.files.keys() | {file.name for file in find_weight_files(folder)}


def test_vocabulary_files_of_every_tokenizer_are_hashed(tmp_path):
    import ast

    import transformers

    from bench.models.source import read_files

    # Read from the source: importing a hundred tokenizers takes half a minute.
    named = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            is_names = isinstance(node, ast.Assign) and any(
                getattr(target, "id", "").lower() == "vocab_files_names" for target in node.targets
            )
            if is_names and isinstance(node.value, ast.Dict):
                values = (value.value for value in node.value.values)
                named |= {value for value in values if isinstance(value, str)}
    assert len(named) > 10
    for name in named:
        (tmp_path / name).write_text("x")
    assert read_files(tmp_path, remote_code=False).keys() == named
