"""Folders of strangers: absurd sizes, lying headers, programs in disguise; each is one sentence."""

import json
import os
import shutil
import struct
import time

import pytest

from bench.errors import UserError, is_panic
from bench.models.checkpoints import adapter_settings
from bench.models.loading import load_model, refuse_endless_text_files, skeleton
from bench.models.source import resolve_model
from bench.models.weight_files import find_weight_files, read_json_object
from bench.schema import ModelConfig
from tests.models.tiny_networks import build, save


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return save(build("qwen2_moe"), tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def source_of(folder):
    config = ModelConfig(name="tiny", source="local", path=str(folder), device="cpu")
    return resolve_model(config, offline=True)


def refusal(folder, match):
    began = time.monotonic()
    with pytest.raises(UserError, match=match) as raised:
        skeleton(source_of(folder))
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 5


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("key", "value"), [
    ("num_hidden_layers", -1), ("num_hidden_layers", 0), ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 2.5), ("num_hidden_layers", True), ("num_hidden_layers", "2"),
    ("num_experts", 10**9), ("num_experts", -3), ("hidden_size", 10**12), ("vocab_size", 0),
    ("intermediate_size", 1e300), ("num_attention_heads", 0), ("head_dim", -8),
])  # fmt: skip
def test_sizes_that_the_weights_cannot_have(folder, key, value):
    change_config(folder, **{key: value})
    refusal(folder, f"{key}=.* (is not a whole number|does not fit its weight files)")


@pytest.mark.parametrize("value", [10**6, 0, -1, "two"])
def test_more_experts_per_token_than_there_are(folder, value):
    change_config(folder, num_experts_per_tok=value)
    refusal(folder, "num_experts_per_tok")


def test_sizes_in_a_nested_config(folder):
    change_config(folder, text_config={"num_hidden_layers": 10**9})
    refusal(folder, "text_config: num_hidden_layers=1000000000")


def test_a_config_that_is_no_object_or_too_deep(folder):
    for text in ("[]", "5", "{", "[" * 100_000, '{"a":' * 100_000):
        (folder / "config.json").write_text(text)
        refusal(folder, r"config\.json is corrupt")


def with_header(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("change", "said"), [
    ({"dtype": "F33"}, "unknown dtype 'F33'"),
    ({"dtype": ["F32"]}, "cannot be read"),
    ({"shape": [10**18, 10**18]}, "does not match its size"),
    ({"shape": [10**18] * 10_000}, "does not match its size"),
    ({"shape": [2.0]}, "whole numbers"),
    ({"shape": [True, 2]}, "whole numbers"),
    ({"shape": [-2]}, "whole numbers"),
    ({"shape": "2"}, "whole numbers"),
    ({"shape": [1]}, "does not match its size"),
    ({"data_offsets": [0, float("inf")]}, "whole numbers"),
    ({"data_offsets": [0]}, "cannot be read"),
    ({"data_offsets": None}, "cannot be read"),
])  # fmt: skip
def test_a_header_that_no_tensor_can_have(tmp_path, change, said):
    with_header(tmp_path / "model.safetensors", {"a": ENTRY | change}, b"\0" * 8)
    with pytest.raises(UserError, match=said):
        find_weight_files(tmp_path)


def test_a_header_of_thousands_of_levels(tmp_path):
    with_header(tmp_path / "model.safetensors", b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    with pytest.raises(UserError, match="cannot be read"):
        find_weight_files(tmp_path)


def test_a_scalar_and_an_empty_tensor_are_right(tmp_path):
    scalar, empty = ENTRY | {"shape": [], "data_offsets": [0, 4]}, {"shape": [0, 3]}
    header = {"a": scalar, "b": ENTRY | empty | {"data_offsets": [4, 4]}}
    with_header(tmp_path / "model.safetensors", header, b"\0" * 4)
    assert find_weight_files(tmp_path) == (tmp_path / "model.safetensors",)


def test_a_pipe_among_the_files_is_not_opened(folder):
    os.mkfifo(folder / "added_tokens.json")
    refusal(folder, "neither a file nor a folder")


def test_a_file_of_json_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.models.weight_files.MAX_CONFIG_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": "much longer"}')
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_json_object(tmp_path / "a.json")


def change_tokenizer(folder, **changes):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# `a` becomes `aaaa`, thirty times in turn.
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}
NORMALIZER_BOMB = {"type": "Sequence", "normalizers": [DOUBLING] * 30}
PATTERN_BOMB = {
    "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
}  # fmt: skip


@pytest.fixture
def quick_limits(monkeypatch, tmp_path):
    """The same program with limits that a test can wait for."""
    from bench.models import text_files_probe

    text = open(text_files_probe.__file__).read()  # noqa: PTH123, SIM115
    copy = tmp_path / "probe.py"
    copy.write_text(text.replace("SECONDS, BYTES = 20, 8 * 2**30", "SECONDS, BYTES = 2, 2**30"))
    assert copy.read_text() != text
    monkeypatch.setattr(text_files_probe, "__file__", str(copy))


@pytest.mark.parametrize("changes", [
    {"normalizer": NORMALIZER_BOMB}, {"pre_tokenizer": PATTERN_BOMB},
])  # fmt: skip
def test_a_tokenizer_that_does_not_end(folder, quick_limits, changes):
    change_tokenizer(folder, **changes)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be used"):
        load_model(source_of(folder))


@pytest.mark.sample(1)
@pytest.mark.parametrize("template", [
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}"
    "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}{{ f(1) }}",
])  # fmt: skip
def test_a_chat_template_that_does_not_end(folder, quick_limits, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"the chat template in chat_template\.jinja cannot be us"):
        refuse_endless_text_files(folder)


def test_templates_and_tokenizers_of_every_day_pass(folder):
    (folder / "chat_template.jinja").write_text(
        "{% if not messages %}{{ raise_exception('none') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | tojson }}\n{% endfor %}"
        "{{ strftime_now('%Y') }}"
    )
    began = time.monotonic()
    refuse_endless_text_files(folder)
    assert time.monotonic() - began < 5


def test_a_panic_is_known_by_the_module_of_its_class():
    kind = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    assert is_panic(kind("boom"))
    assert not is_panic(KeyboardInterrupt())


def test_a_further_config_that_is_too_deep_is_not_read(folder):
    (folder / "config_old.json").write_text("[" * 100_000)
    assert find_weight_files(folder)


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()

    def write(text="", **settings):
        text = text or json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]} | settings)
        (tmp_path / "adapter_config.json").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize("text", ["[]", "{}", "{", "[" * 100_000, '{"a":' * 100_000])
def test_an_adapter_without_readable_settings(adapter, text):
    with pytest.raises(UserError, match=r"adapter_config\.json is corrupt"):
        adapter_settings(adapter(text))


@pytest.mark.parametrize(("key", "value"), [
    ("target_modules", "(a+)+$"), ("target_modules", ["q_proj", "(.*)*x"]), ("target_modules", 5),
    ("exclude_modules", ".*"), ("modules_to_save", [["lm_head"]]), ("layers_pattern", "(a|a)*"),
    ("rank_pattern", {"(a+)+$": 4}), ("alpha_pattern", {"^q": 4}),
])  # fmt: skip
def test_an_adapter_names_modules_and_gives_no_patterns(adapter, key, value):
    with pytest.raises(UserError, match=f"{key}.* (not a module name|not a list of module names)"):
        adapter_settings(adapter(**{key: value}))


def test_names_of_modules_are_read(adapter):
    named = {"target_modules": "all-linear", "rank_pattern": {"layers.0.q_proj": 4}}
    named |= {"modules_to_save": None, "exclude_modules": ["lm_head"]}
    assert adapter_settings(adapter(**named)) == named


def test_a_folder_whose_code_may_run_is_not_read_before_its_links_and_pipes(folder):
    os.mkfifo(folder / "extra_config.json")  # to read it would never end
    config = ModelConfig(
        name="tiny",
        source="local",
        path=str(folder),
        trust_remote_code=True,
        allow_remote_code=True,
        revision="0" * 40,
    )
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        resolve_model(config, offline=True)
