"""Mutated files of a model folder: a right network or one sentence, soon, never a traceback."""

import copy
import json
import os
import random
import shutil
import struct
import time

import pytest
import torch

from bench.errors import UserError
from bench.models import replaced_modules
from bench.models.loading import load_model, skeleton
from bench.models.source import resolve_model
from bench.models.structure.model_structure import inspect_model
from bench.models.weight_files import find_weight_files
from bench.schema import ModelConfig
from methods.moe.micro_experts import delete_micro_experts
from tests.models.tiny_networks import build, save

thorough = os.environ.get("HYPOTHESIS_PROFILE") == "searching"
SOME, MANY = 40, 1000
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**18, 10**400, 0.5, -0.0, float("nan"),
    float("inf"), "", "x", "../x", "/etc/passwd", "\x00", "é" * 9, [], [1], [[]], {}, {"a": 1},
    ["x"] * 99, "qwen2_moe", "llama", "silu", "float16", "os.system",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a network with experts of different widths, which a description file names."""
    network = build("qwen2_moe")
    for block in inspect_model(network).moe:
        delete_micro_experts(block, torch.arange(3), 1)
    folder = save(build("qwen2_moe"), tmp_path_factory.mktemp("fuzzed"))
    network.save_pretrained(folder)
    description = replaced_modules.describe_network(network)
    assert description is not None and description["modules"]
    replaced_modules.write_description(description, folder)
    return folder


def places(node, path=()):
    """Yield the path of every value of a JSON tree."""
    inner = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in inner:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutated(content, draw):
    """Return the text of a JSON tree with one to three values replaced, removed or nested."""
    tree, deep = copy.deepcopy(content), False
    for _ in range(draw.randint(1, 3)):
        known = list(places(tree))
        if not known:
            break
        *way, last = draw.choice(known)
        node = tree
        for key in way:
            node = node[key]
        kind = draw.random()
        if kind < 0.15:
            del node[last]
        elif kind < 0.2 and not deep:
            # Once: what is nested twice as deep cannot be written down here.
            node[last], deep = json.loads("[" * 900 + "]" * 900), True
        else:
            node[last] = copy.deepcopy(draw.choice(HOSTILE))
    text = json.dumps(tree)
    if draw.random() < 0.1:  # damage of bytes instead of values
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(["", '"', "\\", "{", "\x00", "9" * 5000]) + text[place:]
    return text


def ends_well(attempt, seen):
    began = time.process_time()
    try:
        attempt()
    except UserError as error:
        assert "\n" not in str(error), seen
    assert time.process_time() - began < 10, seen


def fuzz_json(saved, folder, name, count):
    source = ModelConfig(name="tiny", source="local", path=str(folder), device="cpu")
    content, draw = json.loads((saved / name).read_text()), random.Random(name)

    def build_it():
        found = resolve_model(source, offline=True)
        inspect_model(skeleton(found))

    for number in range(count):
        text = mutated(content, draw)
        (folder / name).write_text(text)
        ends_well(build_it, (number, text[:2000]))


def fuzz_headers(saved, folder, count):
    file, draw = folder / "model.safetensors", random.Random("headers")
    whole = (saved / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    content, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for number in range(count):
        text = mutated(content, draw).encode()
        told = len(text) if draw.random() < 0.9 else draw.choice([0, 7, 2**63, len(text) + 1])
        file.write_bytes(struct.pack("<Q", told) + text + data[: draw.choice([None, 100])])
        ends_well(lambda: find_weight_files(folder), (number, text[:2000]))


@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "slimbench.json"])
def test_mutated_json(saved, tmp_path, name, count):
    fuzz_json(saved, shutil.copytree(saved, tmp_path / "model"), name, count)


@pytest.mark.parametrize("count", [SOME, pytest.param(MANY, marks=pytest.mark.slow)])
def test_mutated_headers(saved, tmp_path, count):
    fuzz_headers(saved, shutil.copytree(saved, tmp_path / "model"), count)


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_what_passes_the_checks_loads_or_is_refused(saved, tmp_path, monkeypatch, count):
    # The trial of its tokenizer takes a process each time, and the tokenizer is not what changes.
    monkeypatch.setattr("bench.models.loading.refuse_endless_text_files", lambda folder: None)
    folder = shutil.copytree(saved, tmp_path / "model")
    config = ModelConfig(name="tiny", source="local", path=str(folder), device="cpu")
    content, draw = json.loads((saved / "config.json").read_text()), random.Random("loading")
    for number in range(count):
        text = mutated(content, draw)
        (folder / "config.json").write_text(text)
        ends_well(lambda: load_model(resolve_model(config, offline=True)), (number, text[:2000]))
