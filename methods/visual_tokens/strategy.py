"""Base class of visual strategies: supported models, and access to the network's plan."""

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
    """A method that adds its settings to the network's plan; several compose in any order.

    `form` sets how the plan is carried out, and must be the same for all strategies of a run.
    `skip` computes only what is read and normalises over the remaining keys. `official` computes
    everything and zeroes attention weights after the softmax, as the paper's released LLaVA code
    does: for its released checkpoints and for comparison; it saves no work.
    """

    form: Form = "skip"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model without images or with an unsupported decoder.

        Raises:
            UserError: the model does not fit the strategy.
        """
        if anatomy.model_type not in FAMILIES:
            raise UserError(
                f"{type(self).__name__} needs visual tokens, but {anatomy.architecture} is not a "
                f"vision-language model that is supported: {', '.join(sorted(FAMILIES))}"
            )
        decoder_layers(anatomy)
        if self.form == "official" and anatomy.moe:
            raise UserError("form=official does not support MoE models")

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Add the settings; from now on the network follows the whole plan.

        The report's `shape` and `work` are the inputs of the closed-form FLOPs and bytes of the
        plan.
        """
        engine = engine_of(model.network)
        engine.plan.agree(self.form)
        # On the network, not in the report: it then reflects every later change of the plan, and is
        # copied with the network.
        setattr(model.network, ATTRIBUTE, Told(engine))
        # Masked mode keeps its marks of visual tokens as an attribute of the cache, which does not
        # follow when the rows of a shared prefix are distributed to several prompts.
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
