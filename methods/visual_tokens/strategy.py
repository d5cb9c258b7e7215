"""What the four strategies share: which models they fit, how they reach the network's plan."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict
from typing import Any

from bench.errors import UserError
from bench.method import Context, Method, MethodReport
from bench.models.anatomy import Anatomy
from bench.models.model import Model
from bench.models.multimodal import FAMILIES, decoder_layers
from bench.models.multimodal.planned import ATTRIBUTE
from methods.visual_tokens.engine import Engine, engine_of
from methods.visual_tokens.plan import Form
from methods.visual_tokens.products import Told
from methods.visual_tokens.work import shape_of, work_of


class VisualStrategy(Method):
    """A method that adds its settings to the network's one plan; several compose in any order.

    `form` says how the plan is carried out, and must be the same for all strategies of a run.
    `skip`, the product, computes nothing that nobody reads and normalises over what is left.
    `official` computes everything and zeroes attention weights after the softmax, as the paper's
    released LLaVA code does: for its released checkpoints and for comparison; it saves nothing.
    """

    form: Form = "skip"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model that sees no images or whose decoder is not understood."""
        if anatomy.model_type not in FAMILIES:
            raise UserError(
                f"{type(self).__name__} is about an image's tokens, but {anatomy.architecture} is "
                f"not a vision-language model that is known: {', '.join(sorted(FAMILIES))}"
            )
        decoder_layers(anatomy)
        if self.form == "official" and anatomy.moe:
            raise UserError("form=official is the paper's LLaVA code, which knows no experts")

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Add the settings; what is computed from now on follows the whole plan.

        The report's `shape` and `work` are what `cost` counts the plan's FLOPs and bytes from.
        """
        engine = engine_of(model.network)
        engine.plan.agree(self.form)
        setattr(model.network, ATTRIBUTE, Told(engine))
        model.needs_prompt = model.needs_prompt or self.form == "official"
        details = self._set(engine, model, context)
        details |= {
            "shape": asdict(shape_of(engine)),
            "work": [asdict(layer) for layer in work_of(engine)],
        }
        return MethodReport("skipped" if self.form == "skip" else "masked", details)

    @abstractmethod
    def _set(self, engine: Engine, model: Model, context: Context) -> dict[str, Any]:
        """Add this strategy's settings to the plan and describe them in JSON values."""
