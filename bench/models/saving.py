"""Export of a network as a Hugging Face folder, in the most common format that can represent it.

`stock`: as published, or with equal widths of all experts, so that transformers loads it. `padded`:
likewise, but experts of different widths are zero-padded to the widest. `compressed-tensors`:
packed weights as inference engines read them. `slimbench`: as in memory, ragged or packed, with a
`slimbench.json` that `bench.models.loading` reads. `classifier`: an image classifier's own config
and weights, and an ONNX file on request. All weights are safetensors.

If transformers cannot build a network, it must not load parts of it. So the weights of a
`slimbench` folder are in `model.slimbench.safetensors`, which transformers reads only on request,
and config.json names an architecture that no engine has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NoReturn, cast

import torch
from torch import nn

from bench.errors import UserError
from bench.models import replaced_modules
from bench.models.classifiers import classifier, serialization
from bench.models.model import Model
from bench.models.network import TransformersNetwork
from bench.models.offload import is_offloaded
from bench.models.serving.compressed_tensors import (
    CompressedNetwork,
    plan_compressed,
    save_compressed,
)
from bench.models.serving.engines import ENGINES, Engine
from bench.models.serving.expert_widths import (
    ExpertWidths,
    all_experts_have,
    common_widths,
    layer_of_same_field,
    meta_network,
    network_shape,
    padded_network,
    save_shell,
)
from bench.models.structure.model_structure import inspect_model
from bench.models.weight_files import OWN_VARIANT

ExportFormat = Literal["stock", "padded", "compressed-tensors", "slimbench", "classifier"]


@dataclass(frozen=True)
class Removal:
    """Removed shares of the expert weights, relative to the published shape."""

    by_run: Fraction
    in_folder: Fraction
    widths: ExpertWidths
    narrowest: int
    widest: int

    def __str__(self) -> str:
        saved = f"{float(self.in_folder):.1%} of the expert weights"
        if self.narrowest == self.widths.routed:
            return f"all experts are {self.widths.routed} wide: the folder omits {saved}"
        return (
            f"experts of {self.narrowest} to {self.widest} micro-experts are stored "
            f"{self.widths.routed} wide: the folder omits {saved}, the run removed "
            f"{float(self.by_run):.1%}"
        )


@dataclass(frozen=True)
class ExportPlan:
    """How to write a network, after all checks."""

    form: ExportFormat
    description: replaced_modules.Description | None = None
    widths: ExpertWidths | None = None
    removal: Removal | None = None
    compressed: CompressedNetwork | None = None
    onnx: bool = False


def save_model(
    model: Model, folder: Path, engine: Engine | None = None, *, onnx: bool = False
) -> ExportFormat:
    """Save network and tokenizer or processor to a folder, and return the format.

    For an `engine`, experts get a common width in the engine's multiples, and packed weights are
    written as compressed-tensors. With `onnx`, an image classifier is also written as ONNX.

    Raises:
        UserError: no format can represent the network, it is offloaded, or the requested format
            does not exist for its kind of model.
    """
    plan = plan_export(model, engine, onnx=onnx)
    write_model(model, folder, plan)
    return plan.form


def plan_export(model: Model, engine: Engine | None = None, *, onnx: bool = False) -> ExportPlan:
    """Decide how to write a network, before anything is written; see `save_model`."""
    network = model.network
    if isinstance(network, classifier.Classifier):
        _refuse_code_on_modules(network)
        if engine is not None:
            raise UserError(
                f"--for {engine.name} is for language models; {network.config.architecture} is an "
                "image classifier"
            )
        return ExportPlan("classifier", onnx=onnx)
    if onnx:
        raise UserError(f"--onnx is for image classifiers; {model.structure.architecture} is none")
    if model.quantization is not None:
        raise UserError(
            f"{model.name} is already quantized by {model.quantization.method}: use its own "
            "folder instead of exporting it"
        )
    if is_offloaded(network):
        raise UserError("only a model in memory can be exported: set model.device_map=null")
    description = replaced_modules.describe_network(network)
    # Checked before writing, because a folder that loads as a different network is worse than none.
    refuse_unsavable(network, description)
    if engine is not None:
        return _plan_for_engine(model, description, engine)
    if description is None:
        return ExportPlan("stock")
    # Equal widths can be stated in the config, so that the folder loads without slimbench.
    widths = _common_widths(model, description, 1)
    if widths is not None and _is_stock(model, widths):
        return ExportPlan("stock", description, widths)
    return ExportPlan("slimbench", description)


def _is_stock(model: Model, widths: ExpertWidths) -> bool:
    """Return whether all experts have these widths, and transformers supports them."""
    return (
        all_experts_have(model.structure, widths)
        and widths.routed % ENGINES["transformers"].multiple == 0
        and layer_of_same_field(cast(TransformersNetwork, model.network), widths) is None
    )


def _plan_for_engine(
    model: Model, description: replaced_modules.Description | None, engine: Engine
) -> ExportPlan:
    """Plan a folder that an engine loads without custom code."""
    network = cast(TransformersNetwork, model.network)
    if not type(network).__module__.startswith("transformers."):
        raise UserError(
            f"{type(network).__name__} is not in transformers, so {engine.name} would need "
            "custom code for it: export without --for"
        )
    if description is not None and any(description["packed"].values()):
        if not _modules_of(description) <= PADDABLE_CLASSES:
            _refuse_modules(description, engine)
        found = plan_compressed(network, model.structure, engine)
        return ExportPlan("compressed-tensors", description, compressed=found)
    if description is None:
        return ExportPlan("stock")
    widths = _common_widths(model, description, engine.multiple)
    if widths is None:
        _refuse_modules(description, engine)
    removal = _removal(network, model, widths)
    form: ExportFormat = "stock" if all_experts_have(model.structure, widths) else "padded"
    return ExportPlan(form, description, widths, removal)


def _modules_of(description: replaced_modules.Description) -> set[str]:
    """Return the classes of a network's replaced modules."""
    return {spec["class"] for spec in description["modules"].values()}


def _refuse_modules(description: replaced_modules.Description, engine: Engine) -> NoReturn:
    found = _modules_of(description)
    names = ", ".join(sorted(found - PADDABLE_CLASSES or found))
    raise UserError(f"{engine.name} has no {names}, which this run made: export without --for")


def _common_widths(
    model: Model, description: replaced_modules.Description, multiple: int
) -> ExpertWidths | None:
    """Return the widths of experts for a config; None if the network has no experts."""
    # Experts in a special form (a shared base, a masked router) have no widths to compare.
    own_form = any(description["packed"].values())
    own_form |= not _modules_of(description) <= PADDABLE_CLASSES
    if own_form or not model.structure.blocks:
        return None
    network = cast(TransformersNetwork, model.network)
    return common_widths(network.config, model.structure, multiple)


def _removal(network: TransformersNetwork, model: Model, widths: ExpertWidths) -> Removal:
    """Return the removed shares, relative to the shape in the network's config.

    Raises:
        UserError: the engine needs a width above the published one.
    """
    published = inspect_model(meta_network(network.config, network.dtype))
    widest = max(width for block in published.moe for width in block.widths)
    if widths.routed > widest:
        raise UserError(
            f"the published experts are {widest} wide, less than the {widths.routed} to which "
            "their width would be aligned: export --for transformers, or without --for"
        )
    served = inspect_model(network_shape(network, widths)).moe_parameters
    own = [width for block in model.structure.moe for width in block.widths]
    return Removal(
        1 - Fraction(model.structure.moe_parameters, published.moe_parameters),
        1 - Fraction(served, published.moe_parameters),
        widths,
        min(own),
        max(own),
    )


def write_model(model: Model, folder: Path, plan: ExportPlan) -> None:
    """Write network and tokenizer or processor as planned."""
    network = model.network
    if isinstance(network, classifier.Classifier):
        serialization.save_classifier(network, folder)
        if plan.onnx:
            serialization.save_onnx(network, folder)
        return
    (model.processor or model.tokenizer).save_pretrained(folder)
    typed = cast(TransformersNetwork, network)
    if plan.compressed is not None:
        save_compressed(typed, plan.compressed, folder)
    elif plan.widths is not None:
        padded = padded_network(typed, model.structure, plan.widths)
        save_shell(padded, typed, folder)
    elif plan.description is None:
        typed.save_pretrained(folder)
    else:
        _write_own_format(typed, folder, plan.description)


def _write_own_format(
    network: TransformersNetwork, folder: Path, description: replaced_modules.Description
) -> None:
    # By default, transformers converts fused experts back to the checkpoint's names per expert,
    # which is not possible for ragged or packed weights.
    network.save_pretrained(folder, variant=OWN_VARIANT, save_original_format=False)
    replaced_modules.write_description(description, folder)
    # Engines select their own class by this name, and would load the weights that they recognise.
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["architectures"] = [f"Slimbench{type(network).__name__}"]
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _refuse_code_on_modules(network: nn.Module) -> None:
    """Raise if a forward of the network is replaced on the module's instance only."""
    # For example, a decoder that skips work for visual tokens would be saved as the dense model.
    named = list(network.named_modules())
    found = [name for name, module in named if "forward" in vars(module)]
    found += [name for name, module in named if module._forward_hooks or module._forward_pre_hooks]
    if found:
        raise UserError(
            f"{found[0] or 'the network'} is changed only while it runs, which cannot be saved: "
            "give the method in each run instead of exporting it"
        )


def refuse_unsavable(network: nn.Module, description: replaced_modules.Description | None) -> None:
    """Raise if config and description do not rebuild the network as it is."""
    _refuse_code_on_modules(network)
    typed = cast(TransformersNetwork, network)
    rebuilt = meta_network(typed.config, typed.dtype)
    if description is not None:
        with torch.device("meta"):
            replaced_modules.install_described_modules(rebuilt, description)
    known = dict(rebuilt.named_modules())
    for name, module in network.named_modules():
        # Exact types instead of isinstance, because a subclass with a different forward would be
        # rebuilt as its base.
        if name and type(module) is not type(known.get(name)):
            raise UserError(
                f"{name} is a {type(module).__name__}, which cannot be written to a folder"
            )
    # On the meta device, so that the check needs no memory for weights.
    shapes = {key: weight.shape for key, weight in rebuilt.state_dict().items()}
    for key, weight in network.state_dict().items():
        if shapes.get(key) != weight.shape:
            raise UserError(
                f"{key} has a shape that differs from the network's config, which states one for "
                "all layers: remove the same share of each, by the method's own knob "
                "(allocation=uniform, scope=layer, no protected layers, units=neurons)"
            )
    for name, module in network.named_modules():
        if name and (other := _different_number(module, known[name])) is not None:
            raise UserError(
                f"{name}.{other} is {getattr(module, other)} and would be loaded as "
                f"{getattr(known[name], other)}: the method changed one of the network's config "
                "and its modules, but not the other"
            )


def _different_number(module: nn.Module, rebuilt: nn.Module) -> str | None:
    """Return an attribute with which a rebuilt module would compute differently, or None."""
    for name, value in vars(module).items():
        # Other integers are sizes: shapes of weights determine them, and methods that remove
        # channels do not update them.
        decides = isinstance(value, float | bool) or name in _ROUTING
        if decides and name != "training" and getattr(rebuilt, name, value) != value:
            return name
    return None


_ROUTING = ("top_k", "num_experts_per_tok", "n_group", "topk_group")


# Replaced modules that can be saved as published ones with wider experts.
PADDABLE_CLASSES = {"RaggedExperts", "GatedExpert"}
