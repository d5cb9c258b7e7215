"""Base class of visual strategies: supported models, and access to the network's plan."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict

from bench.errors import UserError
from bench.method import Context, InputSize, Method, MethodReport, MethodWork
from bench.models.macs import FLOPS_PROVIDER_ATTRIBUTE
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.vlm.decoder_view import decoder_layers
from bench.models.vlm.frames import FRAME_READERS, REFUSED_ARCHITECTURES, fixed_frame_size
from bench.models.vlm.visual_tokens import BIDIRECTIONAL
from methods.visual_engine.cost.flops import (
    VisualFlops,
    average_tokens,
    decoder_shape,
    layer_costs,
    token_stages,
)
from methods.visual_engine.decoder import VisualEngine, visual_engine_of
from methods.visual_engine.settings import Execution


class VisualStrategy(Method):
    """A method that adds its settings to the network's plan; strategies compose in any order.

    `execution` sets how the plan is carried out, and must be the same for all strategies of a run.
    `skip` computes only what is needed and normalises attention over the remaining keys. `masked`
    computes everything and zeroes attention weights after the softmax, as the paper's released
    LLaVA code does; it saves no work and serves its released checkpoints and comparisons.
    """

    execution: Execution = "skip"

    def check(self, structure: ModelStructure) -> None:
        """Refuse a model without images or with an unsupported decoder.

        Raises:
            UserError: the model does not fit the strategy.
        """
        require_visual_tokens_support(type(self).__name__, structure)
        decoder_layers(structure)
        if self.execution == "masked" and structure.moe:
            raise UserError("execution=masked does not support MoE models: set execution=skip")
        if self.execution == "masked" and structure.model_type in BIDIRECTIONAL:
            raise UserError(
                f"execution=masked does not support {structure.architecture}, whose image tokens "
                "attend in both directions: set execution=skip"
            )

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Return a reordering of the weights, if there is one: a plan itself costs nothing."""
        reorders = bool(getattr(self, "reorder", False)) and self.execution == "skip"
        return MethodWork(readings=2.0 * reorders)

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Add the settings to the plan, which the network follows from here on.

        `shape` and `work` in the report are the inputs of the closed-form FLOPs and bytes of the
        plan.
        """
        engine = visual_engine_of(model.network)
        engine.plan.set_execution(self.execution)
        # An attribute of the network, so that it reflects later changes of the plan and is copied
        # with the network.
        setattr(model.network, FLOPS_PROVIDER_ATTRIBUTE, VisualFlops(engine))
        # Masked mode stores its marks of visual tokens on the cache, and they are lost when the
        # rows of a shared prefix are distributed to several prompts.
        model.needs_prompt = model.needs_prompt or self.execution == "masked"
        details = self.configure(engine, model, context)
        details |= {
            "shape": asdict(decoder_shape(engine)),
            "work": [asdict(layer) for layer in layer_costs(engine)],
        }
        return MethodReport("skipped" if self.execution == "skip" else "masked", details)

    @abstractmethod
    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Add this strategy's settings to the engine's plan; return the details of its report.

        A method that combines several strategies calls this instead of `apply`. The details are
        JSON values.
        """


def require_visual_tokens_support(method: str, structure: ModelStructure) -> None:
    """Raise `UserError` unless the model is a supported vision-language model."""
    reason = REFUSED_ARCHITECTURES.get(structure.model_type)
    if reason is not None:
        raise UserError(f"{method} does not support {structure.architecture}: {reason}")
    if structure.model_type not in FRAME_READERS:
        raise UserError(
            f"{method} needs visual tokens, but {structure.architecture} is not a supported "
            f"vision-language model: choose one of {', '.join(sorted(FRAME_READERS))}"
        )


def tokens_by_stage(engine: VisualEngine) -> dict[str, object]:
    """Report a frame's tokens by stage of the whole plan, and their average over layers.

    All are None if the model has no fixed image size, in which case costs can be computed from the
    report's `work`, or if the number of tokens kept depends on the image.
    """
    size = fixed_frame_size(engine.network)
    if size is None or any(step.adaptive for step in engine.plan.steps):
        return {"frame": None, "stages": None, "average_tokens": None}
    stages = token_stages(engine, size[0] * size[1])
    average = average_tokens(stages)
    return {"frame": size[0] * size[1], "stages": stages, "average_tokens": average}
