"""A Llama with carved feed-forwards, represented by an architecture of transformers.

The architecture is GLM-4-MoE: attention like Llama's, shared experts without a gate, and a router
that selects experts by sigmoid(s) + bias but weights them by sigmoid(s) times a factor. As in CMoE,
carved experts need weight 1 whatever the scores. If the scores are scaled down by ε, sigmoid(ε s)
is 1/2 + ε s/4 and keeps their order; with the factor 2 a selected expert has the weight 1 + ε s/2.
The offsets of the scores are the bias. Weights do not depend on the number of selected experts, so
a folder works with every `num_experts_per_tok`, and stays correct if a method drops experts.

Other architectures are not suitable. Softmax routers (Qwen2-MoE, Mixtral, Granite) divide a sum of
1 among the selected experts: down matrices scaled up for one number of experts are wrong for any
other number, and so as soon as a method drops some. None of them supports CMoE's own router, a
neuron per expert.

Shapes: T tokens, D d_model, E routed experts, W an expert's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from bench.errors import UserError
from bench.models.carving.neurons import CarvedFeedForward, ExpertLayout, carve_feed_forward
from bench.models.expert_hooks import observe_experts
from bench.models.layer_stream import LayerStream
from bench.models.network import TransformersNetwork
from bench.models.structure.expert_view import ExpertView
from bench.ui import Progress

if TYPE_CHECKING:
    from bench.models.model import Model

SCORE_SCALE = 2.0**-18
"""ε. Scores have a standard deviation of 1 and rarely exceed 5, so weights differ from 1 by at most
1e-5, while float32 can still distinguish scores that differ by 0.03 to 0.06."""
KEPT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def refuse_uncarvable(config: Any, layout: ExpertLayout, chosen: int) -> None:
    """Raise unless a network with this config can be carved; no weight is read.

    Raises:
        UserError: it is not a Llama, its width is not divisible, or too many experts are chosen.
    """
    kind = getattr(config, "model_type", None)
    fault = None
    if kind != "llama":
        fault = f"is a {kind}"
    elif config.mlp_bias or config.attention_bias:
        fault = "has biases"
    elif getattr(config, "quantization_config", None) is not None:
        fault = "is quantized"
    if fault is not None:
        raise UserError(
            "only dense decoders of model_type llama without biases can be carved; this one "
            f"{fault}: choose another model"
        )
    if layout.experts < 2:
        raise UserError(f"--experts {layout.experts}: a router needs at least 2 experts")
    parts, width = layout.experts + layout.shared, config.intermediate_size
    if width % parts:
        raise UserError(
            f"--experts {layout.experts} --shared {layout.shared}: a feed-forward of {width} "
            f"neurons cannot be divided into {parts} equal parts: choose numbers whose sum "
            f"divides {width}"
        )
    if not 1 <= chosen <= layout.experts:
        raise UserError(
            f"--chosen {chosen}: a token can have from 1 to {layout.experts} routed experts"
        )


@torch.no_grad()
def carve_model(
    model: Model, tokens_BL: Tensor, layout: ExpertLayout, chosen: int, progress: Progress
) -> TransformersNetwork:
    """Return a GLM-4-MoE network of the model's carved layers, with `chosen` experts per token.

    With all experts chosen it computes the same as the model. Every layer is observed with inputs
    from the original layers before it.

    Raises:
        UserError: the model cannot be carved; see `refuse_uncarvable`.
    """
    from transformers import AutoModelForCausalLM

    network = cast(TransformersNetwork, model.network)
    refuse_uncarvable(network.config, layout, chosen)
    weights = {k: v for k, v in model.network.state_dict().items() if ".mlp." not in k}
    for index, view, carved in _carve_layers(model, tokens_BL, layout, progress):
        tensors = block_tensors(view, carved)
        weights |= {f"model.layers.{index}.mlp.{name}": v for name, v in tensors.items()}
    config = _carved_config(network.config, layout, chosen)
    # On the meta device, because drawing random weights that are replaced takes time.
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(config, dtype=network.dtype)
    found.load_state_dict(weights, assign=True)
    found.generation_config = network.generation_config
    return cast(TransformersNetwork, found.eval())


class _SeenTokens:
    """Observer that stores inputs and hidden states of a dense feed-forward."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.hidden: list[Tensor] = []

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Store some tokens."""
        self.inputs.append(x_SD)
        self.hidden.append(hidden_SF)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Do nothing, because a dense feed-forward has no shared experts."""

    def output(self, y_TD: Tensor) -> None:
        """Do nothing."""


def _carve_layers(
    model: Model, tokens_BL: Tensor, layout: ExpertLayout, progress: Progress
) -> Iterator[tuple[int, ExpertView, CarvedFeedForward]]:
    structure = model.structure
    with LayerStream(model.network, structure.layers, tokens_BL, batch=4) as stream:
        for block in progress.track(structure.micro_expert_blocks, "carving layers"):
            seen = _SeenTokens()
            with observe_experts({block: seen}):
                stream.run(block.layer, advance=True)
            view = block.expert(0)
            inputs_TD, hidden_TF = torch.cat(seen.inputs), torch.cat(seen.hidden)
            yield block.layer, view, carve_feed_forward(view, inputs_TD, hidden_TF, layout)


def block_tensors(view: ExpertView, carved: CarvedFeedForward) -> dict[str, Tensor]:
    """Return the tensors of a block of experts by their names in transformers."""
    shared, dtype = carved.shared, view.down.dtype
    experts = [(view.gate[own], view.up[own], view.down[:, own]) for own in carved.experts]
    return {
        "shared_experts.gate_proj.weight": view.gate[shared],
        "shared_experts.up_proj.weight": view.up[shared],
        "shared_experts.down_proj.weight": view.down[:, shared].contiguous(),
        "experts.gate_up_proj": torch.stack([torch.cat((gate, up)) for gate, up, _ in experts]),
        "experts.down_proj": torch.stack([down for _, _, down in experts]),
        "gate.weight": (carved.rows * SCORE_SCALE).to(dtype),
        # The router adds the bias to sigmoid(ε s), which has the slope ε / 4.
        "gate.e_score_correction_bias": carved.offsets * (SCORE_SCALE / 4),
    }


def _carved_config(dense: Any, layout: ExpertLayout, chosen: int) -> Any:
    """Return the config of the carved network."""
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        **{name: getattr(dense, name) for name in KEPT_SETTINGS},
        # By default, GLM-4 rotates only half of each head's components.
        rope_parameters={**dense.rope_parameters, "partial_rotary_factor": 1.0},
        moe_intermediate_size=layout.width(dense.intermediate_size),
        n_routed_experts=layout.experts,
        n_shared_experts=layout.shared,
        num_experts_per_tok=chosen,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        num_mtp_layers=0,
    )
