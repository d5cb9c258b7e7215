"""An example of a method: it sets the weakest columns of every expert to zero."""

import torch
from pydantic import Field

from bench.errors import UserError
from bench.method import Context, LayerReport, Method, MethodReport
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure


class ZeroWeakest(Method):
    """Zero the `ratio` of each routed expert's down columns that have the smallest norm."""

    ratio: float = Field(default=0.2, ge=0, lt=1)

    def check(self, structure: ModelStructure) -> None:
        """Refuse a model without experts, before its weights are loaded."""
        if not structure.moe:
            raise UserError(f"zero_weakest needs MoE blocks; {structure.architecture} has none")

    @torch.no_grad()
    def apply(self, model: Model, context: Context) -> MethodReport:
        """Change the weights in place; zeroed weights claim no gain in time or memory."""
        layers = []
        for block in model.structure.moe:
            zeroed = 0
            for index in range(block.num_experts):
                down_DF = block.expert(index).down
                weakest_f = down_DF.norm(dim=0).argsort()[: int(self.ratio * down_DF.shape[1])]
                down_DF[:, weakest_f] = 0
                zeroed += len(weakest_f)
            layers.append(LayerReport(layer=block.layer, zeroed=zeroed))
        return MethodReport("zeroed", layers=layers)
