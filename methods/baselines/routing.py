"""What a router does when some of its experts are gone, by the model's own rule.

Shapes: T tokens, E experts, K experts a token, D d_model.

A dropped expert's logit is as good as -∞, and the model's own code does the rest, so nothing is
written down per architecture. What that comes to, for the experts that are kept:

* Mixtral; Qwen2-MoE, Qwen3-MoE and OLMoE with `norm_topk_prob`: the K largest logits; softmax
  over these K, so weights always sum to one.
* Qwen2-MoE, OLMoE without `norm_topk_prob`; DeepSeek-MoE; DeepSeek-V2 (times its scaling factor):
  softmax over all kept experts, the K largest as they are. A dropped expert's probability goes to
  the kept ones in proportion, so weights grow but need not sum to one.
* DeepSeek-V3: each kept expert's sigmoid, unchanged; groups compete with what they have left; the
  K chosen are normalised if `norm_topk_prob`, then scaled.
* Phi-MoE: sparsemixer over the kept experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bench.errors import UserError
from bench.models.anatomy import MoEBlock
from bench.models.own import OwnModule

CHOICE_BIAS = "e_score_correction_bias"


def route(
    router: nn.Module, logits_TE: Tensor, dropped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (weights [T, K], experts [T, K]) that the router's rule gives for these logits.

    The router runs with an identity in place of its weight, so that it reads the given logits
    from its input; that needs D ≥ E. The experts that `dropped` lists get a logit so low that
    their weight is exactly zero; one is still named where a rule finds fewer than K kept experts.
    """
    weight = cast(Tensor, router.weight)
    experts, d_model = weight.shape
    low = torch.finfo(logits_TE.dtype).min / 4
    masked_TE = logits_TE if dropped is None else logits_TE.index_fill(1, dropped, low)
    state = {"weight": torch.eye(experts, d_model, dtype=logits_TE.dtype, device=logits_TE.device)}
    bias_E = getattr(router, CHOICE_BIAS, None)
    if bias_E is not None and dropped is not None:
        state[CHOICE_BIAS] = bias_E.index_fill(0, dropped, low)
    as_input_TD = functional.pad(masked_TE, (0, d_model - experts))
    _, weight_TK, index_TK = functional_call(router, state, (as_input_TD,))
    return weight_TK, index_TK


def dense(weight_TK: Tensor, index_TK: Tensor, experts: int) -> Tensor:
    """Return the weights as one row a token over all experts, [T, E], zero where not chosen."""
    weight_TE = weight_TK.new_zeros(len(weight_TK), experts)
    return weight_TE.scatter_add_(1, index_TK, weight_TK)


def check_router(block: MoEBlock) -> None:
    """Refuse a router that cannot be run on other logits than its own; nothing is computed."""
    weight = getattr(block.router, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (block.num_experts, block.d_model):
        raise UserError(
            f"the router of {block.name} has no weight of one row an expert, so experts cannot be "
            "dropped from it: use form=zeroed"
        )
    if block.num_experts > block.d_model:
        raise UserError(
            f"{block.name} has {block.num_experts} experts for {block.d_model} hidden dimensions, "
            "and dropping them needs at most as many: use form=zeroed"
        )


class MaskedRouter(OwnModule):
    """A router that chooses among the kept experts only and calls them 0, 1, 2, ...

    It keeps the weights of all E experts, for rules that depend on an expert's number (groups).
    """

    kept: Tensor
    dropped: Tensor
    new_names: Tensor

    def __init__(self, router: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        weight = cast(Tensor, router.weight)
        gone = sorted(set(range(len(weight))) - set(kept))
        new_names = [kept.index(expert) if expert in kept else 0 for expert in range(len(weight))]
        self.router = router
        for name, numbers in (("kept", kept), ("dropped", gone), ("new_names", new_names)):
            self.register_buffer(name, torch.tensor(numbers, device=weight.device))

    @property
    def top_k(self) -> int:
        """How many experts a token goes to."""
        return cast(int, self.router.top_k)

    def structure(self) -> dict[str, Any]:
        """Return which experts are kept."""
        return {"kept": self.kept.tolist()}

    @classmethod
    def empty(cls, structure: dict[str, Any], original: nn.Module) -> Self:
        """Build it around a router of the published shape."""
        return cls(original, [int(expert) for expert in structure["kept"]])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logits of the kept experts, weights [T, K], experts by their new names)."""
        logits_TE = self.router(x)[0]
        weight_TK, index_TK = route(self.router, logits_TE, self.dropped)
        return logits_TE[:, self.kept], weight_TK, self.new_names[index_TK]
