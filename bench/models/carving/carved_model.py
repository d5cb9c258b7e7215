"""A Llama with carved feed-forwards, in an architecture of transformers that computes it.

That is GLM-4-MoE's: attention like Llama's, shared experts without a gate, and a router that
chooses by sigmoid(s) + bias but weighs by sigmoid(s) alone, times a factor. Carved experts need
weight 1 whatever the scores, as in CMoE. With the scores scaled down by ε, sigmoid(ε s) is 1/2 +
ε s/4 and keeps their order; with the factor 2 a chosen expert has the weight 1 + ε s/2. The offsets
of the scores are the bias. Weights do not depend on how many experts are chosen, so that one folder
serves every `num_experts_per_tok`, and stays right where a method drops experts.

Other architectures hold less. Softmax routers (Qwen2-MoE, Mixtral, Granite) divide a sum of 1 among
the chosen experts: down matrices scaled up for one number of experts are wrong for any other, as
soon as a method drops some. A neuron as router, as CMoE has it, none of them computes.

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
"""ε. Scores have a standard deviation of 1 and rarely exceed 5, so that weights differ from 1 by
1e-5 at most, while float32 still tells scores apart that differ by 0.03 to 0.06."""
KEPT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def refuse_uncarvable(config: Any, layout: ExpertLayout, chosen: int) -> None:
    """Raise unless a network of this config can be carved so; no weight is read.

    Raises:
        UserError: it is no Llama, its width cannot be divided so, or too many experts are chosen.
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
        raise UserError(f"--experts {layout.experts}: a router needs 2 experts at least")
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
    """Return a GLM-4-MoE network that is the model with `chosen` of its experts per token.

    With all experts chosen it computes what the model does. Every layer is observed on the
    outputs of the original layers before it.

    Raises:
        UserError: it cannot be carved so; see `refuse_uncarvable`.
    """
    from transformers import AutoModelForCausalLM

    network = cast(TransformersNetwork, model.network)
    refuse_uncarvable(network.config, layout, chosen)
    weights = {k: v for k, v in model.network.state_dict().items() if ".mlp." not in k}
    for index, view, carved in _carve_layers(model, tokens_BL, layout, progress):
        tensors = block_tensors(view, carved)
        weights |= {f"model.layers.{index}.mlp.{name}": v for name, v in tensors.items()}
    config = _carved_config(network.config, layout, chosen)
    # On the meta device: random weights that are replaced at once would only take time.
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(config, dtype=network.dtype)
    found.load_state_dict(weights, assign=True)
    found.generation_config = network.generation_config
    return cast(TransformersNetwork, found.eval())


class _SeenTokens:
    """Observer that keeps what a dense feed-forward read and computed."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.hidden: list[Tensor] = []

    def routed(self, expert: int, x_SD: Tensor, hidden_SF: Tensor, weight_S: Tensor) -> None:
        """Keep some tokens."""
        self.inputs.append(x_SD)
        self.hidden.append(hidden_SF)

    def shared(self, x_TD: Tensor, hidden_TF: Tensor, weight_T: Tensor) -> None:
        """Ignore shared experts: a dense feed-forward has none."""

    def output(self, y_TD: Tensor) -> None:
        """Ignore the output."""


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
        # The router adds it to sigmoid(ε s), which has the slope ε / 4.
        "gate.e_score_correction_bias": carved.offsets * (SCORE_SCALE / 4),
    }


def _carved_config(dense: Any, layout: ExpertLayout, chosen: int) -> Any:
    """Return the config of the carved network."""
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        **{name: getattr(dense, name) for name in KEPT_SETTINGS},
        # Of its heads GLM-4 rotates a half where nothing is said.
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
