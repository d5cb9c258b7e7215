"""Reference pages made from the code: config, commands, Python, record, shipped configs."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bench import schema
from bench.cli.parser import build_parser

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GROUPS = {
    "model": schema.ModelConfig,
    "benchmark": schema.BenchmarkConfig,
    "calibration": schema.CalibrationConfig,
    "prompts": schema.PromptsConfig,
    "costs": schema.CostsConfig,
    "tracker": schema.TrackerConfig,
}
API = {
    "Run, compare, draw, read": [
        "bench.run", "bench.estimate", "bench.compare", "bench.plot",
        "bench.runner.session.Session", "bench.records.index.load", "bench.records.index.samples",
        "bench.records.store.Store",
    ],
    "Write a method": [
        "bench.method.Method", "bench.method.Context", "bench.method.MethodReport",
        "bench.method.InputSize", "bench.method.LayerReport", "bench.method.MethodWork",
        "bench.method.RepeatedStep",
        "bench.method.RecipeConfig",
        "bench.models.model.Model",
        "bench.models.structure.model_structure.ModelStructure",
        "bench.models.structure.moe_block.MoEBlock",
        "bench.models.structure.expert_view.ExpertView",
        "bench.models.replaced_modules.ReplacedModule", "bench.models.macs.FlopsProvider",
    ],
    "Results": [
        "bench.runner.launch.Runs", "bench.estimation.run_estimate.SweepEstimate",
        "bench.estimation.run_estimate.RunEstimate", "bench.estimation.run_estimate.PhaseEstimate",
        "bench.reporting.comparison.comparison.Comparison",
        "bench.reporting.comparison.contrast.Contrast", "bench.records.record.run_id",
        "bench.records.record.without_real_saving",
    ],
    "Errors": [
        "bench.errors.UserError", "bench.errors.MissingData", "bench.errors.RunsFailed",
        "bench.errors.LibraryFailure", "bench.errors.Stopped",
    ],
}  # fmt: skip


def pages() -> dict[str, str]:
    """Return the generated pages by path."""
    return {
        "reference/commands.md": _commands(),
        "reference/config.md": _config(),
        "reference/python.md": _python(),
        "reference/record.md": _record(),
        "reference/shipped.md": _shipped(),
    }


def _commands() -> str:
    parser = build_parser()
    # argparse keeps its subparsers in the action that it adds for them.
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = ["# Commands", _text(parser.description or ""), parser.epilog or ""]
    parts += [
        f"## bench {name}\n\n```text\n{command.format_help().rstrip()}\n```"
        for name, command in action.choices.items()
    ]
    parts.append("Exit codes and messages are in [errors.md](../errors.md).")
    return "\n\n".join(parts) + "\n"


def _config() -> str:
    whole = (CONF / "config.yaml").read_text(encoding="utf-8")
    parts = [
        "# Configuration",
        "Every key can be set on the command line, as in `benchmark.limit=100`. A group is chosen "
        "by the name of a file in `conf/GROUP/`, and its keys are set below its name. Unknown keys "
        "and impossible values are refused before anything is loaded.",
        "## The run",
        f"```yaml\n{whole.rstrip()}\n```",
    ]
    for group, model in GROUPS.items():
        parts += [f"## {group}", *_model(model, group, _comments(group))]
    return "\n\n".join(parts) + "\n"


def _model(model: type[BaseModel], prefix: str, comments: dict[str, str]) -> Iterator[str]:
    """Yield the description of a section and the table of its keys, then its inner sections."""
    yield _text(inspect.getdoc(model) or "")
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}.{field.alias or name}"
        kinds = (field.annotation, *get_args(field.annotation))
        inner += [(key, k) for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        default = "required" if field.is_required() else _default(_given(field))
        about = field.description or comments.get(name, "")
        rows.append(f"| `{key}` | {_type(field.annotation)} | {default} | {_cell(about)} |")
    yield "\n".join(rows)
    for key, kind in inner:
        yield f"### {key}"
        yield from _model(kind, key, comments)


def _comments(group: str) -> dict[str, str]:
    """Return the comments at the ends of lines in the files of a group, by key."""
    found: dict[str, str] = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\s*(\w+):.*?\s#\s+(.*)", line):
                found.setdefault(match[1], match[2])
    return found


def _python() -> str:
    parts = ["# Python", "What `bench` does on the command line, with objects instead of words."]
    for title, names in API.items():
        parts += [
            f"## {title}",
            *(f"::: {name}\n    options: {{heading_level: 3}}" for name in names),
        ]
    return "\n\n".join(parts) + "\n"


def _described(name: str) -> str:
    return f"::: {name}\n    options: {{heading_level: 3}}"


def _record() -> str:
    names = ["Record", "AppliedMethod", "EffectCheck", "SizeAndWork", "DenseModel", "Metric",
             "TaskEvidence", "Cost", "MissingMeasurement", "EstimatedPhase"]  # fmt: skip
    parts = [
        "# The record",
        "`results/runs/ID/record.json` holds these fields. Readers ignore fields that they do not "
        "know. The id is explained in [identity.md](../identity.md).",
        *(f"::: bench.records.record.{name}" for name in names),
    ]
    return "\n\n".join(parts) + "\n"


def _shipped() -> str:
    parts = ["# What is shipped", "The same lists with plug-ins: `bench ls GROUPs`."]
    for group in ("method", "model", "benchmark", "table", "experiment", "sweep"):
        files = [f for f in sorted((CONF / group).glob("*.yaml")) if not f.stem.startswith("_")]
        rows = [f"| `{group}=` | |", "|---|---|"]
        rows += [f"| `{file.stem}` | {_cell(_first_comment(file))} |" for file in files]
        parts += [f"## {group}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    said = [line[2:] for line in lines if line.startswith("# ") and "@package" not in line]
    return said[0] if said else ""


def _given(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{'null' if value is None else value}`"


def _type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)
    return f"`{text}`".replace("|", r"\|")


def _cell(text: str) -> str:
    return _text(text).replace("|", r"\|")


def _text(text: str) -> str:
    # Names such as <br> in a docstring are no markup.
    return re.sub(r"<(?=\w)", "&lt;", text)
