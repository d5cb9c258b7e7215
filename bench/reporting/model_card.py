"""README.md of an exported model: its origin, how to load it, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.records import Record
from bench.records.record import lost_zeros
from bench.ui import clean

LOAD_WITH_ENGINES = """\
Loads, without custom code, with each of:

{lines}
"""
PADDED_NOTE = """\
Experts of different widths are padded with zeros to the widest one, so this folder and the loaded
model are larger than the remaining weights. The outputs are the same.
"""
COMPRESSED_NOTE = """\
The weights are packed as compressed-tensors (`pip install compressed-tensors`); `config.json` says
which modules have how many bits.
"""
LOAD_WITH_SLIMBENCH = """\
Loads with slimbench; stock transformers cannot build it:

    from bench.models.loading import open_folder
    model = open_folder("THIS_FOLDER")          # model.network, model.tokenizer

or in a run: `bench run model=local model.path=THIS_FOLDER`. {why}
"""
LOAD_CLASSIFIER = """\
An image classifier in slimbench's own format; `config.json` holds the shapes of its layers:

    from pathlib import Path
    from bench.models.classifiers.serialization import load_classifier_folder as load
    network = load(Path("THIS_FOLDER"))         # images [B, C, H, H] to logits [B, K]

or in a run: `bench run model=local model.kind=image_classifier model.path=THIS_FOLDER
benchmark=images`. Images must be normalised as `bench.data.image_catalogue` does. `model.onnx`, if
present, computes the same function.
"""
LOAD_OWN_CLASSIFIER = """\
A network of the class `{target}`; `config.json` holds the shapes of its layers.
Where that class can be imported, a run loads it:

    bench run model=module model._target_={target} model.path=THIS_FOLDER benchmark=images \\
        packages=[methods,{package}]

Images must be normalised as `bench.data.image_catalogue` does. `model.onnx`, if present, computes
the same function.
"""
REPLACED_MODULES_NOTE = "`slimbench.json` lists the modules that were replaced or reshaped."
UNKNOWN_CLASS_NOTE = "Its architecture is not in transformers."
_CLASS_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Contents:
    """Contents of an exported folder: a format of `bench.models.saving`, and bytes of weights.

    `removal` describes how equal widths of all experts affect the run's removal of weights.
    """

    form: str
    bytes: int
    removal: str | None = None


def model_card(record: Record, contents: Contents, loading: Sequence[str], *, stock: bool) -> str:
    """Return the model card of an exported run.

    `loading` are the commands of the engines that load it; `stock` is true if transformers has the
    network's class.
    """
    parts = (
        _front_matter(record, contents.form),
        f"# {_code(f'{record.model.name}: {record.label}')}\n",
        _loading_section(record, contents.form, loading, stock),
        _size_section(record, contents),
        _provenance_section(record),
    )
    return "\n".join(parts)


def _front_matter(record: Record, form: str) -> str:
    """Return the YAML block that the Hugging Face hub reads."""
    library = "slimbench" if form == "classifier" else "transformers"
    lines = ["---", f"library_name: {library}", "tags: [slimbench, model-compression]"]
    # Only `owner/name` is a model on the hub; a local path is not valid as a base model.
    if _HUB_NAME.fullmatch(record.model.source):
        lines.append(f"base_model: {json.dumps(record.model.source)}")
    return "\n".join([*lines, "---", ""])


def _size_section(record: Record, contents: Contents) -> str:
    lines = [f"- weight files: {contents.bytes:,} bytes"]
    if contents.removal is not None:
        lines.append(f"- {contents.removal}")
    measured = {"parameters": "parameters in memory", "bytes": "bytes of weights in memory"}
    for quantity, words in measured.items():
        cost = record.cost(quantity)
        if cost is not None:
            lines.append(f"- {words}, measured in the run: {int(cost.value):,}")
    dense = f"- parameters before any method: {record.model.parameters:,}"
    return "\n".join(["## Size", "", *lines, dense, ""])


def _loading_section(record: Record, form: str, loading: Sequence[str], stock: bool) -> str:
    if form == "classifier":
        target = record.model.architecture
        # A record may hold any text here, and only a name may stand in a command.
        if record.model.source != "module" or not _CLASS_NAME.fullmatch(target):
            return LOAD_CLASSIFIER
        return LOAD_OWN_CLASSIFIER.format(target=target, package=target.partition(".")[0])
    # Replaced modules need slimbench even if transformers has the network's class, so the format is
    # checked before `stock`.
    if form == "slimbench":
        return LOAD_WITH_SLIMBENCH.format(why=REPLACED_MODULES_NOTE)
    if not stock:
        return LOAD_WITH_SLIMBENCH.format(why=UNKNOWN_CLASS_NOTE)
    lines = "\n".join(f"    {line}" for line in loading)
    notes = {"padded": PADDED_NOTE, "compressed-tensors": COMPRESSED_NOTE}
    text = LOAD_WITH_ENGINES.format(lines=lines)
    return f"{text}\n{notes[form]}" if form in notes else text


def _provenance_section(record: Record) -> str:
    """Return the origin of the weights and the changes to them, in enough detail to repeat them."""
    model = record.model
    revision = f" at {_code(model.revision)}" if model.revision else ""
    lines = [
        "## How it was made",
        "",
        f"- run {_code(record.id)}: {_code(record.command)}",
        f"- from {_code(model.source)}{revision}, {_code(model.architecture)}, "
        f"{model.parameters:,} parameters,",
        f"  weights SHA-256 {_code(model.fingerprint)}",
    ]
    if record.provenance.get("calibration"):
        lines.append(f"- calibration text SHA-256 {_code(record.provenance['calibration'])}")
    for name, version in record.environment.get("versions", {}).items():
        lines.append(f"- {_code(f'{name} {version}')}")
    for method in record.methods:
        knobs = json.dumps(method.config, indent=1)
        head = f"### {_code(method.name)}: weights {method.confirmed_effect}"
        lines += ["", head, "", "```json", knobs, "```"]
    lines += [f"\n{_code(reason)}" for reason in lost_zeros(record.methods).values()]
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    """Return text of a record as code in one line, so that it is not interpreted as Markdown."""
    line = " ".join(clean(text).split())
    # A fence longer than any row of backticks in the text; spaces separate backticks at its ends.
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"
