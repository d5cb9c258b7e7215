"""DeepSeek-MoE-16B (`model_type: deepseek`, arXiv 2401.06066), which transformers does not contain.

It is a Llama decoder whose feed-forward parts, after `first_k_dense_replace` dense layers, are
DeepSeek-V2's MoE blocks with greedy softmax routing, unnormalised and unscaled. Both are taken from
transformers, and the per-expert weights of the checkpoint are fused on loading as for Qwen2-MoE.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Experts,
    DeepseekV2Moe,
    DeepseekV2TopkRouter,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bench.errors import UserError

MODEL_TYPE = "deepseek"

# Settings that only ever had these values in published checkpoints. The V2 classes ignore them, so
# a different value would load and compute something else without an error.
FIXED_SETTINGS = {"moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False}


@strict
class DeepseekConfig(LlamaConfig):  # type: ignore[misc]
    """DeepSeek-MoE's config.json; `intermediate_size` is the width of its dense layers."""

    model_type = MODEL_TYPE
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    # Fields that DeepSeek-V2's router reads and that DeepSeek-MoE's config.json lacks. With these
    # values V2's router is the plain softmax top-k of DeepSeek-MoE.
    routed_scaling_factor: float = 1.0
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse variants that these classes would compute incorrectly."""
        for key, value in FIXED_SETTINGS.items():
            if getattr(self, key) != value:
                raise UserError(
                    f"config.json: {key}={getattr(self, key)} is not supported, only {value}"
                )
        super().__post_init__(**kwargs)


class DeepseekDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A Llama layer whose feed-forward part is a MoE block, except in the first layers."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if layer_idx >= config.first_k_dense_replace:
            self.mlp = DeepseekV2Moe(config)


class _ExpertsMixin:
    """Hooks of transformers for networks with experts, which Llama does not have."""

    config_class = DeepseekConfig
    _no_split_modules = ("DeepseekDecoderLayer",)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches this module's source for the decorator's name, which is not there
        # because the experts are imported, and would fall back to a loop over experts.
        return True

    def _init_weights(self, module: nn.Module) -> None:
        # Llama's initialiser handles only linear layers and norms. Fused experts and the router are
        # plain parameters, which would stay uninitialised.
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, DeepseekV2Experts | DeepseekV2TopkRouter):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=self.config.initializer_range)  # type: ignore[attr-defined]


class DeepseekModel(_ExpertsMixin, LlamaModel):  # type: ignore[misc]
    """The decoder without its head."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, layer) for layer in layers)
        self.post_init()


class DeepseekForCausalLM(_ExpertsMixin, LlamaForCausalLM):  # type: ignore[misc]
    """DeepSeek-MoE with its language-modelling head."""

    def __init__(self, config: DeepseekConfig) -> None:
        # Skip LlamaForCausalLM's own constructor, which would build a dense decoder first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@cache
def register_deepseek() -> None:
    """Register DeepSeek-MoE and its checkpoint layout with transformers' Auto classes."""
    AutoConfig.register(MODEL_TYPE, DeepseekConfig)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
    register_checkpoint_conversion_mapping(
        MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
    )
