"""README.md of an exported model: what it is, how to load it, how it was made."""

from __future__ import annotations

import json
import re

from bench.records import Record
from bench.ui import clean

LOAD_WITH_TRANSFORMERS = """\
Loads in transformers:

    AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
"""
PADDED_NOTE = """\
Experts of different widths are padded with zeros to the widest one, so this folder and the loaded
model are larger than the remaining weights. The outputs are the same.
"""
LOAD_WITH_SLIMBENCH = """\
Loads with slimbench; stock transformers cannot build it:

    from bench.models.loading import open_folder
    model = open_folder("THIS_FOLDER")          # model.network, model.tokenizer

or in a run: `bench run model=local model.path=THIS_FOLDER`. {why}
"""
LOAD_CLASSIFIER = """\
An image classifier in slimbench's own format; `config.json` holds the shapes of its layers:

    from bench.models.classifiers.serialization import load_classifier_folder as load
    network = load(Path("THIS_FOLDER"))         # images [B, C, H, H] to logits [B, K]

or in a run: `bench run model=local model.kind=image_classifier model.path=THIS_FOLDER
benchmark=images`. Images must be normalised as `bench.data.image_catalogue` does. `model.onnx`, if
present, computes the same function.
"""
REPLACED_MODULES_NOTE = "`slimbench.json` lists the modules that were replaced or reshaped."
UNKNOWN_CLASS_NOTE = "Its architecture is not in transformers."
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def model_card(record: Record, form: str, *, stock: bool) -> str:
    """Return the model card of a run exported in a format of `bench.models.saving`.

    `stock` tells whether transformers has the network's class.
    """
    parts = (
        _front_matter(record),
        f"# {_code(f'{record.model.name}: {record.label}')}\n",
        _loading_section(form, stock),
        _provenance_section(record),
    )
    return "\n".join(parts)


def _front_matter(record: Record) -> str:
    """Return the YAML block that the Hugging Face hub reads."""
    lines = ["---", "library_name: transformers", "tags: [slimbench, model-compression]"]
    # Only `owner/name` is a model on the hub; a local path must not be given as a base model.
    if _HUB_NAME.fullmatch(record.model.source):
        lines.append(f"base_model: {json.dumps(record.model.source)}")
    return "\n".join([*lines, "---", ""])


def _loading_section(form: str, stock: bool) -> str:
    if form == "classifier":
        return LOAD_CLASSIFIER
    # Replaced modules need slimbench even where transformers has the network's class, so the format
    # is checked before `stock`.
    if form == "slimbench":
        return LOAD_WITH_SLIMBENCH.format(why=REPLACED_MODULES_NOTE)
    loading = (
        LOAD_WITH_TRANSFORMERS if stock else LOAD_WITH_SLIMBENCH.format(why=UNKNOWN_CLASS_NOTE)
    )
    return f"{loading}\n{PADDED_NOTE}" if form == "padded" else loading


def _provenance_section(record: Record) -> str:
    """Describe what was done to which weights, in enough detail to repeat it."""
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
    parameters = record.cost("parameters")
    if parameters is not None:
        lines += ["", f"Parameters in memory: {int(parameters.value):,}."]
    return "\n".join([*lines, ""])


def _code(text: str) -> str:
    """Return text of a record as code in one line, so that it is no Markdown of its own."""
    line = " ".join(clean(text).split())
    # A fence longer than any row of backticks inside; spaces keep backticks at the ends apart.
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"
