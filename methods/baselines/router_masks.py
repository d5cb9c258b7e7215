"""Routing with some experts dropped, by the model's own rule.

Shapes: T tokens, E experts, K experts per token, D d_model.

A dropped expert's logit is effectively -∞ and the model's own code does the rest, so no rule is
reimplemented per architecture. For the kept experts this means:

* Mixtral; Qwen2-MoE, Qwen3-MoE and OLMoE with `norm_topk_prob`: the K largest logits; softmax
  over these K, so weights always sum to one.
* Qwen2-MoE, OLMoE without `norm_topk_prob`; DeepSeek-MoE; DeepSeek-V2 (times its scaling factor):
  softmax over all kept experts, the K largest as they are. A dropped expert's probability is
  redistributed to the kept ones in proportion, so weights grow but need not sum to one.
* DeepSeek-V3: the sigmoid of each kept expert, unchanged; groups compete with the experts they
  have left; the K chosen are normalised if `norm_topk_prob`, then scaled.
* Phi-MoE: sparsemixer over the kept experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bench.errors import UserError
from bench.models.replaced_modules import ModuleSpec, ReplacedModule
from bench.models.structure.moe_block import MoEBlock

CHOICE_BIAS = "e_score_correction_bias"


def route(
    router: nn.Module, logits_TE: Tensor, dropped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (weights [T, K], experts [T, K]) that the router's rule gives for these logits.

    The router runs with an identity in place of its weight, so it reads the given logits from its
    input; this needs D ≥ E. The experts listed in `dropped` get a logit so low that their weight is
    exactly zero; one may still be selected where a rule finds fewer than K kept experts.
    """
    weight = cast(Tensor, router.weight)
    experts, d_model = weight.shape
    # Finite, since -inf - (-inf) in a softmax is NaN; a quarter of the range, since DeepSeek-V3
    # adds the bias and sums the two best scores of a group, which must not overflow.
    low = torch.finfo(logits_TE.dtype).min / 4
    masked_TE = logits_TE if dropped is None else logits_TE.index_fill(1, dropped, low)
    state = {"weight": torch.eye(experts, d_model, dtype=logits_TE.dtype, device=logits_TE.device)}
    bias_E = getattr(router, CHOICE_BIAS, None)
    # DeepSeek-V3 selects by sigmoid(logit) + bias. The sigmoid is bounded by 0, so a low logit
    # alone would not keep a dropped expert with a large bias from being selected.
    if bias_E is not None and dropped is not None:
        state[CHOICE_BIAS] = bias_E.index_fill(0, dropped, low)
    # Zero padding: identity [E, D] times the padded input reproduces the E logits exactly.
    as_input_TD = functional.pad(masked_TE, (0, d_model - experts))
    _, weight_TK, index_TK = functional_call(router, state, (as_input_TD,))
    return weight_TK, index_TK


def dense_routing_weights(weight_TK: Tensor, index_TK: Tensor, experts: int) -> Tensor:
    """Scatter the weights to [T, E]: one column per expert, zero where not selected."""
    weight_TE = weight_TK.new_zeros(len(weight_TK), experts)
    return weight_TE.scatter_add_(1, index_TK, weight_TK)


def check_router(block: MoEBlock) -> None:
    """Refuse a router that cannot be run on given logits. Nothing is computed."""
    weight = getattr(block.router, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (block.num_experts, block.d_model):
        raise UserError(
            f"the router of {block.name} has no weight with one row per expert, so experts cannot "
            "be dropped from it: use state=zeroed"
        )
    if block.num_experts > block.d_model:
        raise UserError(
            f"{block.name} has {block.num_experts} experts, but dropping supports at most as "
            f"many as hidden dimensions ({block.d_model}): use state=zeroed"
        )


class MaskedRouter(ReplacedModule):
    """A router that selects among the kept experts only and renumbers them 0, 1, 2, ...

    It keeps the weights of all E experts, for rules that depend on an expert's index (groups).
    """

    kept: Tensor
    dropped: Tensor
    new_names: Tensor  # the key of saved folders, so the name stays

    def __init__(self, router: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        weight = cast(Tensor, router.weight)
        gone = sorted(set(range(len(weight))) - set(kept))
        # Dropped experts get index 0: where one is still selected, its weight is zero, and the
        # index only has to be valid.
        new_names = [kept.index(expert) if expert in kept else 0 for expert in range(len(weight))]
        self.router = router
        for name, numbers in (("kept", kept), ("dropped", gone), ("new_names", new_names)):
            self.register_buffer(name, torch.tensor(numbers, device=weight.device))

    @property
    def top_k(self) -> int:
        """Number of experts per token."""
        return cast(int, self.router.top_k)

    def spec(self) -> ModuleSpec:
        """Return which experts are kept."""
        return {"kept": self.kept.tolist()}

    @classmethod
    def from_spec(cls, spec: ModuleSpec, original: nn.Module) -> Self:
        """Wrap a router of the published shape."""
        return cls(original, [int(expert) for expert in spec["kept"]])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits of the kept experts, weights [T, K], experts by their new index)."""
        logits_TE = self.router(x)[0]
        weight_TK, index_TK = route(self.router, logits_TE, self.dropped)
        return logits_TE[:, self.kept], weight_TK, self.new_names[index_TK]
