"""Work of a network's calls, from its shapes; FLOPs are those of `bench.measurement.flops`.

Shapes: B samples, L tokens of a sample, T tokens in all, D d_model, F an expert's width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from bench.estimation.boards import known_figures, measured_once
from bench.estimation.layer_timing import (
    Curve,
    LayerTimes,
    calls_identity,
    classifier_times,
    decoder_times,
    prompt_times,
)
from bench.estimation.work import Work
from bench.measurement.flops.analytic import CallTokens, decoder_macs, head_macs
from bench.measurement.flops.counter import Tally, meta_forward
from bench.models.classifiers.classifier import Classifier
from bench.models.network import replaced_forward, text_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.data.chat import ModelInputs
    from bench.models.macs import MatmulCost
    from bench.models.structure.model_structure import ModelStructure

FLOPS_PER_MAC = 2
_SAMPLE = 32
"""Tokens of the call on the meta device whose operators are counted."""
_GROUPED_OPERATORS = 15
"""Operators of a MoE layer around its grouped products: sort, gather, activate, combine."""
_LOOPED_OPERATORS = 6
"""Operators per expert and layer where a CPU goes through the experts one by one."""
_OBSERVED_OPERATORS = 24
"""Operators per expert and layer while a method observes what each expert computes."""


@dataclass(frozen=True)
class NetworkWork:
    """Coefficients of a network's work; a sample is a token of a decoder or an image.

    `matrix`, `head` and `pair` are FLOPs per sample, per row of logits, and per pair of query and
    key. Every call reads `weights` bytes; all routed experts have `routed` bytes, of which a token
    uses the share `met`. `elements` values per sample are read and written outside products. A call
    launches `operators` operators, without the experts of its `expert_layers` layers, each with
    `experts` experts. There are `depth` decoder layers, and all weights have `stored` bytes. A
    forward holds up to `widest` values per sample at a time and keeps `kept` for its backward; both
    are known only for classifiers. `missing` names parts without a formula. `times` are measured
    times of calls, if available, and `outside` is the number of operators outside timed layers.
    """

    itemsize: int
    stored: float
    elements: float
    operators: float
    matrix: float = 0.0
    head: float = 0.0
    pair: float = 0.0
    weights: float = 0.0
    head_weights: float = 0.0
    routed: float = 0.0
    met: float = 1.0
    experts: int = 0
    expert_layers: int = 0
    depth: int = 1
    widest: float = 0.0
    kept: float = 0.0
    missing: str | None = None
    times: LayerTimes | None = None
    outside: float = 0.0

    def forward(
        self,
        samples: float,
        calls: float = 1,
        pairs: float = 0.0,
        rows: float = 0.0,
        *,
        looped: bool = False,
        observed: bool = False,
    ) -> Work:
        """Return the work of `calls` forwards with `samples` in total, and `rows` of logits.

        `pairs` of queries and keys include masked ones. `looped` is true if experts are computed
        one by one, as on a CPU, and `observed` if a method observes each of them.
        """
        each = samples / max(calls, 1)
        hit = self.met_share(each) if self.routed else 0.0
        loop = _OBSERVED_OPERATORS if observed else _LOOPED_OPERATORS if looped else 0
        inside = self.expert_layers * (_GROUPED_OPERATORS + loop * self.experts * hit)
        if self.times is not None:
            further = self.expert_layers * self.experts * hit * observed
            return Work(
                matrix=rows * self.head,
                weights=calls * bool(rows) * self.head_weights,
                operators=calls * (self.outside + further * (loop - _LOOPED_OPERATORS)),
                timed=calls * self.times.call(each, pairs / max(calls, 1)),
            )
        return Work(
            matrix=samples * self.matrix + rows * self.head,
            attention=pairs * self.pair,
            weights=calls * (self.weights + hit * self.routed + bool(rows) * self.head_weights),
            moved=samples * self.elements * self.itemsize,
            operators=calls * (self.operators + inside),
        )

    def met_share(self, tokens: float) -> float:
        """Return the share of routed experts that at least one of a call's tokens uses."""
        # If T tokens choose independently, all of them miss an expert with probability (1 - k/E)^T.
        return float(1 - (1 - self.met) ** tokens)

    def head_only(self, rows: float) -> Work:
        """Return the work of the head on rows of hidden states, reading its weights once."""
        return Work(matrix=rows * self.head, weights=self.head_weights * (rows > 0))

    def training(self, samples: float, calls: float, pairs: float = 0.0, rows: float = 0.0) -> Work:
        """Return the work of forwards with backwards, which have twice as many products."""
        if self.times is not None and self.times.training is not None:
            return Work(timed=calls * self.times.training.at(samples / max(calls, 1)))
        return self.forward(samples, calls, pairs, rows) * 3

    def streamed(self, passes: float = 1) -> float:
        """Return the bytes sent over the link if the layers are not on the device."""
        return passes * (self.weights + self.routed)


def decoder_work(network: nn.Module, structure: ModelStructure, itemsize: int) -> NetworkWork:
    """Return the work of a decoder; that of a vision-language model does not include its tower.

    FLOPs without a formula are listed in `missing`.
    """
    routed = float(sum(p.numel() for b in structure.blocks for p in b.experts.parameters()))
    block = structure.blocks[0] if structure.blocks else None
    config = text_config(network)
    head = int(config.hidden_size) * int(config.vocab_size)
    layers = sum(p.numel() for layer in structure.layers for p in layer.parameters())
    known: dict[str, Any] = {}
    try:
        known = _decoder_flops(network, structure)
    except Exception as error:  # A formula may fail in any way for an unknown network.
        from bench.errors import error_sentence

        known = {"missing": f"FLOPs of {structure.architecture}: {error_sentence(error)}"}
    tally = _tally(network, structure)
    elements = tally.elements / _SAMPLE
    if block is not None:
        elements += len(structure.blocks) * block.top_k * (4 * block.d_model + 7 * block.d_ff)
    return NetworkWork(
        itemsize=itemsize,
        stored=float(itemsize * sum(p.numel() for p in network.parameters())),
        elements=elements,
        operators=tally.operators,
        outside=tally.operators - tally.inside,
        weights=itemsize * (layers - routed),
        head_weights=float(itemsize * head),
        routed=itemsize * routed,
        met=block.top_k / block.num_experts if block else 1.0,
        experts=block.num_experts if block else 0,
        expert_layers=len(structure.blocks),
        depth=len(structure.layers),
        **known,
    )


def _decoder_flops(network: nn.Module, structure: ModelStructure) -> dict[str, float]:
    tokens = CallTokens.text(1, _SAMPLE)
    rows = pairs = 0.0
    for product in decoder_macs(structure.layers, text_config(network), tokens):
        if product.part == "attention":
            pairs += product.macs
        else:
            rows += product.macs
    return {
        "matrix": FLOPS_PER_MAC * rows / _SAMPLE,
        "pair": FLOPS_PER_MAC * pairs / _SAMPLE**2,
        "head": FLOPS_PER_MAC * head_macs(network, 1).macs,
    }


def classifier_work(network: Classifier, itemsize: int) -> NetworkWork:
    """Return the work of an image classifier per image."""
    config = network.config
    tally = Tally()
    with meta_forward(network) as call:
        shape = (1, config.channels, config.size, config.size)
        image = torch.zeros(shape, dtype=torch.bfloat16, device="meta")
        with tally:
            call(image)
    stored = float(itemsize * sum(p.numel() for p in network.parameters()))
    return NetworkWork(
        itemsize, stored, tally.elements, tally.operators, weights=stored, widest=tally.widest,
        kept=_kept(network, shape), **_classifier_flops(network),
    )  # fmt: skip


def _classifier_flops(network: Classifier) -> dict[str, Any]:
    """Return the FLOPs per image, and what is missing of them."""
    from bench.errors import UserError
    from bench.measurement.flops.cost_rows import count_image_flops

    try:
        counted = count_image_flops(network, 1)
    except UserError as error:
        return {"missing": f"FLOPs: {error}"}
    left_out = ", ".join(counted.without_formula)
    missing = f"FLOPs of {left_out}" if left_out else None
    return {"matrix": float(counted.total), "missing": missing}


def _kept(network: Classifier, shape: tuple[int, ...]) -> int:
    """Return the number of values that a forward keeps for its backward, without weights."""
    named = (*network.named_parameters(), *network.named_buffers())
    weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
    for name, _ in network.named_parameters():
        weights[name].requires_grad_(True)
    own = {id(weight.untyped_storage()) for weight in weights.values()}
    # Referenced, because the id of a deleted object may be used again.
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and id(storage) not in own:
            found[id(storage)] = storage
        return tensor

    dtype = next(network.parameters()).dtype
    images = torch.empty(shape, dtype=dtype, device="meta")
    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(network, weights, images)
    return sum(storage.nbytes() for storage in found.values()) // dtype.itemsize


def vision_work(network: nn.Module, inputs: ModelInputs, tokens: int, itemsize: int) -> Work:
    """Return the work of encoding the images of a call into visual tokens."""
    from bench.measurement.flops.analytic_vlm import vision_macs

    products = list(vision_macs(network, inputs, tokens))
    quadratic = [p for p in products if p.part == "vision" and p.masked == 0.0]
    tower = [p for name, p in network.named_parameters() if _of_tower(name)]
    return Work(
        matrix=flops_of(products),
        weights=float(itemsize * sum(p.numel() for p in tower)),
        operators=float(30 * max(1, len(quadratic) // 2)),
    )


def encoding_seconds(
    work: NetworkWork,
    network: nn.Module,
    inputs: ModelInputs,
    device: torch.device,
    *,
    measure: bool,
) -> float | None:
    """Return the seconds to encode an image on this machine, None if unknown.

    They are the time of a prefill with images beyond that of its decoder layers.
    """
    if work.times is None:
        return None
    shapes = {key: tuple(value.shape) for key, value in inputs.items()}
    facts = f"prompts {calls_identity(network)} {shapes}"
    if measure:
        found = measured_once(facts, partial(prompt_times, network, inputs, device), Curve)
    else:
        found = known_figures(facts, Curve)
    if found is None:
        return None
    rows, (_, length) = found.samples[-1], shapes["input_ids"]
    layers = work.times.call(rows * length, rows * length**2)
    return max(0.0, found.seconds[-1] - layers) / rows


def flops_of(products: Iterable[MatmulCost]) -> float:
    """Return the FLOPs of products, including masked pairs."""
    return FLOPS_PER_MAC * sum(product.macs for product in products)


def _of_tower(name: str) -> bool:
    return any(part in name for part in ("vision", "visual", "projector", "connector", "merger"))


class _CountedLayer:
    """Counts a layer's operators `again` more times, and answers for layers of the same form."""

    def __init__(self, tally: Tally, again: int) -> None:
        self._tally, self._again = tally, again
        self._began = 0, 0
        self._output: object = None

    def before(self, *_: object) -> None:
        self._began = self._tally.operators, self._tally.elements

    def after(self, _: nn.Module, __: object, output: object) -> None:
        operators, elements = self._began
        once = self._tally.operators - operators
        self._tally.operators += self._again * once
        self._tally.inside += (1 + self._again) * once
        self._tally.elements += self._again * (self._tally.elements - elements)
        self._output = output

    def answer(self, *_: object, **__: object) -> object:
        return self._output


def layer_form(layer: nn.Module) -> Hashable:
    """Return what determines the operators of a layer: its modules and its weights' shapes."""
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    weights = tuple(tuple(weight.shape) for weight in layer.parameters())
    return modules, weights, getattr(layer, "attention_type", None)


def alike_layers(structure: ModelStructure) -> list[list[nn.Module]]:
    """Return the decoder layers, grouped by form."""
    alike: dict[Hashable, list[nn.Module]] = defaultdict(list)
    for layer in structure.layers:
        alike[layer_form(layer)].append(layer)
    return list(alike.values())


def with_times(
    work: NetworkWork,
    network: nn.Module,
    structure: ModelStructure,
    device: torch.device,
    *,
    measure: bool,
) -> NetworkWork:
    """Return the work with measured times of calls on this machine, as far as they are known.

    Without `measure`, only times from earlier measurements are used.
    """
    if isinstance(network, Classifier):
        facts = f"times {next(network.parameters()).dtype} {network.config!r} {network}"
        timer = partial(classifier_times, network, work.matrix, device)
    else:
        forms = [(layers[0], len(layers)) for layers in alike_layers(structure)]
        facts = f"times {calls_identity(network)} {[layer_form(layer) for layer, _ in forms]}"
        timer = partial(decoder_times, network, forms, device)
    if measure:
        return replace(work, times=measured_once(facts, timer, LayerTimes))
    return replace(work, times=known_figures(facts, LayerTimes))


def _tally(network: nn.Module, structure: ModelStructure) -> Tally:
    """Count the operators of one forward on the meta device, without those of routed experts.

    Kernels of experts depend on the device and are added by `NetworkWork`. The first layer of each
    form represents the others, which can return the same output because it has no values on meta.
    """
    tally = Tally()

    def pause(*_: object) -> None:
        tally.paused += 1

    def resume(*_: object) -> None:
        tally.paused -= 1

    hooks = []
    stack = ExitStack()
    for first, *others in alike_layers(structure):
        counted = _CountedLayer(tally, len(others))
        hooks.append(first.register_forward_pre_hook(counted.before))
        hooks.append(first.register_forward_hook(counted.after))
        for other in others:
            stack.enter_context(replaced_forward(other, counted.answer))
    for block in structure.blocks:
        hooks.append(block.experts.register_forward_pre_hook(pause))
        hooks.append(block.experts.register_forward_hook(resume))
    try:
        with stack, meta_forward(network) as call:
            ids_BL = torch.zeros(1, _SAMPLE, dtype=torch.long, device="meta")
            with tally:
                call(input_ids=ids_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return tally
