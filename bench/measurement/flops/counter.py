"""FLOPs and operators of a call, counted by PyTorch's dispatcher, also on the meta device.

PyTorch's counter reports 0 for attention on a CPU, for grouped expert matmuls on every device, for
transformers' replacement of those if they are not available, and for products with a vector. Their
formulas are here. One multiply-add is two FLOPs.

FLOPs of attention for masked (query, key) pairs are observed at PyTorch's attention API. Below it,
in the dispatcher, the mask may have become an additive bias and attention may have been split into
its matmuls; in `scaled_dot_product_attention` it is still a mask.

Shapes: B samples, H heads, Q queries, K keys, d widths of q and v, R rows, C columns, S routed
rows, E experts, D and F widths of a matrix.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.errors import UserError
from bench.models.offload import without_offload_hooks

Arguments: TypeAlias = tuple[Any, ...]
Keywords: TypeAlias = dict[str, Any]
"""Arguments of an operator as passed to a mode of PyTorch, with any types."""
Counted = TypeVar("Counted")


@dataclass
class CountedFlops:
    """FLOPs of a call, filled in when the counting block ends.

    `modules` maps a module's path to FLOPs by operator, and `Global` to those of the whole call.
    `masked` is the FLOPs of masked pairs, None if mask values were not available. `attention_calls`
    is the number of calls of PyTorch's attention, where masks are observed. `operators` are all
    that ran. `without_formula` names matmuls without a formula; if there are any, the count is too
    small.
    """

    modules: dict[str, dict[object, int]] = field(default_factory=dict)
    masked: int | None = 0
    attention_calls: int = 0
    operators: frozenset[object] = frozenset()
    without_formula: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """FLOPs of the whole call, including masked pairs."""
        return sum(self.modules.get("Global", {}).values())

    @property
    def causal(self) -> int | None:
        """FLOPs of the whole call without masked pairs."""
        return None if self.masked is None else self.total - self.masked

    def per_copy(self, copies: int) -> CountedFlops:
        """Return the FLOPs per copy, for inputs that consist of equal copies."""
        modules = {
            path: {operator: flops // copies for operator, flops in counts.items()}
            for path, counts in self.modules.items()
        }
        masked = None if self.masked is None else self.masked // copies
        return replace(self, modules=modules, masked=masked)

    def in_modules(self, *leaves: str, within: tuple[str, ...] = ()) -> int:
        """Return the FLOPs of all modules named in `leaves`, counting nested matches once.

        An item of a `ModuleList` has the name of the list. With `within`, only modules inside
        modules of those names count.
        modules of those names count.
        """
        names, found = set(leaves), 0
        for path, counts in self.modules.items():
            # A ModuleList is never called, so the counter has only its items (`list.3`).
            *above, own = path.split(".")
            if own.isdigit() and above:
                own = above.pop()
            # FLOPs of a module include its submodules, so matches inside other matches are skipped.
            if own in names and not names & set(above) and (not within or set(within) & set(above)):
                found += sum(counts.values())
        return found


class _OperatorRecorder(TorchDispatchMode):
    """Records every operator that runs, including those into which the FLOP counter decomposes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not say
        self.seen: set[object] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        self.seen.add(getattr(func, "_overloadpacket", func))
        return func(*args, **(kwargs or {}))


@contextmanager
def count_flops() -> Iterator[CountedFlops]:
    """Count the FLOPs of the block; the result is complete when the block ends."""
    counted, operators, masked = CountedFlops(), _OperatorRecorder(), MaskedPairs()
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    # Dispatch modes form a stack, and the last one entered sees an operator first. The recorder is
    # entered before the counter and so sees the operators that the counter passes on.
    with operators, counter, masked:
        yield counted
    counted.modules = {path: dict(flops) for path, flops in counter.get_flop_counts().items()}
    counted.masked = None if masked.has_unknown_mask else masked.flops
    counted.attention_calls = masked.attention_calls
    counted.operators = frozenset(operators.seen)
    counted.without_formula = matmuls_without_formula(operators.seen, counter.flop_registry)


class MaskedPairs(TorchFunctionMode):
    """Mode that sums the FLOPs of masked (query, key) pairs while it is active.

    `has_unknown_mask` is set if the values of a mask were not available; the causal count is then
    unknown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.attention_calls = 0
        self.has_unknown_mask = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Arguments = (),
        kwargs: Keywords | None = None,
    ) -> object:
        """Record attention calls; run every function unchanged."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self._record_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _record_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: object,
    ) -> None:
        self.attention_calls += 1
        heads, queries, keys = prod(query.shape[:-2]), query.shape[-2], key.shape[-2]
        # q · k over the width of q, weight · v over the width of v, two FLOPs per multiply-add.
        per_pair = 2 * (query.shape[-1] + value.shape[-1])
        if is_causal:
            # Row i attends to keys 0 to i, because PyTorch aligns the causal mask at the top left.
            hidden = sum(max(keys - 1 - row, 0) for row in range(queries))
            self.flops += per_pair * heads * hidden
        elif attn_mask is not None:
            self._record_mask(attn_mask, heads * queries * keys, per_pair)

    def _record_mask(self, mask: Tensor, pairs: int, per_pair: int) -> None:
        if isinstance(mask, FakeTensor) or mask.is_meta:
            self.has_unknown_mask = True
            return
        # A float mask is added to the scores: transformers uses the dtype's minimum (or -inf) for
        # masked pairs. A bool mask is True for pairs that are not masked.
        lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() else None
        hidden = ~mask if lowest is None else mask <= lowest
        # A mask is broadcast over samples and heads, so its mean is used instead of its sum.
        self.flops += round(per_pair * pairs * float(hidden.double().mean()))


TensorShape = Sequence[int]
Formula = Callable[..., int]

# Operators that multiply matrices, recognised by name in any namespace: the first group matches
# whole words between underscores, the second any part of the name. The pattern is broad, because a
# false match only withholds a count, while a missed operator would make it too small unnoticed.
MATMUL_NAME = re.compile(
    r"(^|_)(mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|vdot|ger|addr|linear|einsum|bilinear|trilinear|conv\d?d?"
    r"|rnn|lstm|gru)(_|$)|matmul|attention|attn|convolution|gemm|multi_head|cdist"
)


def attention_flops(
    q_BHSd: TensorShape, k_BGTd: TensorShape, v_BGTd: TensorShape, *_: object, **__: object
) -> int:
    """Count q · k and weights · v in full, whatever the mask: causal attention is not halved."""
    return 2 * prod(q_BHSd[:3]) * k_BGTd[2] * (q_BHSd[3] + v_BGTd[3])


def grouped_matmul_flops(
    x_SD: TensorShape, weight_EDF: TensorShape, *_: object, **__: object
) -> int:
    """Count the product of each row with the matrix of the expert to which it is routed."""
    return 2 * prod(x_SD) * weight_EDF[-1]


def matrix_vector_flops(matrix_RC: TensorShape, *_: object, **__: object) -> int:
    """Count the product of a matrix and a vector, or the dot product of two vectors."""
    return 2 * prod(matrix_RC)


def addmv_flops(_bias: TensorShape, matrix_RC: TensorShape, *_: object, **__: object) -> int:
    """Count a matrix-vector product plus bias; the addition does not count."""
    return 2 * prod(matrix_RC)


def distance_flops(x_BMD: TensorShape, y_BND: TensorShape, *_: object, **__: object) -> int:
    """Count pairwise distances as the matmul x yᵀ from which they are computed."""
    return 2 * prod(x_BMD) * y_BND[-2]


def flop_formulas() -> dict[object, Formula]:
    """Return the formulas of those operators that exist in this installation."""
    aten = torch.ops.aten
    known: dict[object, Formula] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten.mv: matrix_vector_flops,
        aten.dot: matrix_vector_flops,
        aten.vdot: matrix_vector_flops,
        aten.addmv: addmv_flops,
        aten._cdist_forward: distance_flops,
        aten._euclidean_dist: distance_flops,
    }
    # transformers registers its replacement as a custom operator, and some versions of torch do not
    # have `_grouped_mm`.
    stand_in = getattr(torch.ops, "transformers", None)
    candidates = [(aten, "_grouped_mm"), (stand_in, "grouped_mm_fallback")]
    for space, name in candidates:
        if space is not None and hasattr(space, name):
            known[getattr(space, name)] = grouped_matmul_flops
    return known


def matmuls_without_formula(seen: Iterable[object], known: Iterable[object]) -> tuple[str, ...]:
    """Return the names of operators that ran, look like matmuls, and have no formula."""
    free = set(seen) - set(known)
    names = (str(packet) for packet in free)
    return tuple(sorted(name for name in names if is_matmul(name)))


def is_matmul(name: str) -> bool:
    """Return whether an operator multiplies matrices, judged by its name (`aten.addmm`)."""
    own = name.rpartition(".")[2]
    return MATMUL_NAME.search(own) is not None


COUNTABLE_EXPERTS = "batched_mm"


class Tally(TorchDispatchMode):
    """Counts operators, and the numbers that are read and written outside products.

    `inside` is the number of operators in decoder layers, `widest` the largest number of values in
    results at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.operators = 0
        self.inside = 0
        self.elements = 0
        self.paused = 0
        self.widest = 0
        self._held = 0
        self._alive = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        # A view may be one of a weight, such as a transposed matrix, which is no activation.
        if _is_view(func):
            return result
        for tensor in _tensors([result]):
            self._hold(tensor)
        # Operators of `prim` query a tensor, for example its device, without computing anything.
        if self.paused or func.namespace == "prim":
            return result
        self.operators += 1
        self.elements += _numbers([result])
        name = str(getattr(func, "_overloadpacket", func))
        # A product's inputs are weights, which are counted separately, and previous results; a
        # lookup reads as many numbers as it returns.
        if not is_matmul(name) and "embedding" not in name:
            self.elements += _numbers(args)
        return result

    def _hold(self, result: Tensor) -> None:
        """Count the result of an operator until it is freed, unless it is in place."""
        storage = result.untyped_storage()
        if storage not in self._alive:
            numbers = storage.nbytes() // result.itemsize
            self._alive.add(storage)
            weakref.finalize(storage, self._release, numbers)
            self._held += numbers
            self.widest = max(self.widest, self._held)

    def _release(self, numbers: int) -> None:
        self._held -= numbers


def _is_view(func: object) -> bool:
    """Return whether an operator returns a view of its input."""
    returns = getattr(getattr(func, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _numbers(values: Iterable[object]) -> int:
    return sum(tensor.numel() for tensor in _tensors(values))


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """Yield tensors of floats among arguments or results, and in lists and tuples of them."""
    for value in values:
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, Tensor) and each.is_floating_point():
                yield each


def on_meta_device(network: nn.Module, count: Callable[[Callable[..., Any]], Counted]) -> Counted:
    """Return the result of `count` for a forward of the network on the meta device.

    `count` may be called twice, and must not keep results of the first call.

    Raises:
        UserError: see `meta_forward`.
    """
    # Plain meta tensors take less than half of the time. They raise if code inspects their values,
    # while transformers does not inspect those of fake tensors (GPT-2's mask).
    try:
        with meta_forward(network, fake=False) as call:
            return count(call)
    except Exception:  # Any other cause raises again in the second forward.
        with meta_forward(network) as call:
            return count(call)


@contextmanager
def meta_forward(
    network: nn.Module, *, fake: bool = True, own_dtypes: bool = False
) -> Iterator[Callable[..., Any]]:
    """Yield a meta-device forward of the network; its own weights are not touched.

    Inputs must be created inside the block, on the meta device. With `fake`, all tensors are fake
    tensors on top of meta tensors, as in compilers. Floats are bfloat16, unless `own_dtypes`.

    Raises:
        UserError: the network needs values, on which its control flow depends, or tensors that are
            neither parameters nor buffers.
    """
    # transformers inspects mask values unless tensors are fake. Non-fake inputs must be allowed,
    # because its KV cache creates a plain empty tensor.
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with mode, _countable_experts(network), without_offload_hooks(network), torch.no_grad():
        tensors = (*network.named_parameters(), *network.named_buffers())
        weights = {name: _meta_like(tensor, own_dtypes) for name, tensor in tensors}

        # `named_parameters` lists a tied parameter once; `tie_weights` also replaces it under its
        # other names.
        def call(*args: object, **kwargs: object) -> object:
            return functional_call(network, weights, args=args, kwargs=kwargs, tie_weights=True)

        try:
            yield call
        except RuntimeError as error:
            kind, reason = type(network).__name__, str(error).splitlines()[0]
            raise UserError(f"{kind} cannot be counted on the meta device: {reason}") from None


def _meta_like(tensor: torch.Tensor, own_dtype: bool) -> torch.Tensor:
    """Return a meta tensor of the same shape, and of the same dtype or with floats as bfloat16."""
    # FLOPs do not depend on the dtype; with one dtype for all floats, inputs always match weights.
    kept = own_dtype or not tensor.is_floating_point()
    kind = tensor.dtype if kept else torch.bfloat16
    return torch.empty(tensor.shape, dtype=kind, device="meta")


@contextmanager
def _countable_experts(network: nn.Module) -> Iterator[None]:
    """Inside the block, compute experts with matmuls that the counter recognises."""
    config = getattr(network, "config", None)
    before = getattr(config, "_experts_implementation", None)
    # The eager implementation loops over the experts in use, which depend on values that do not
    # exist on the meta device; the matmuls of `batched_mm` have static shapes.
    if before is None or not hasattr(network, "set_experts_implementation"):
        yield
        return
    network.set_experts_implementation(COUNTABLE_EXPERTS)  # type: ignore[operator]  # transformers is untyped
    try:
        yield
    finally:
        network.set_experts_implementation(before)  # type: ignore[operator]  # transformers is untyped
