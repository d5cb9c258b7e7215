"""Every method on every dense architecture: what runs, and what is refused with which sentence.

`python -m tests.methods.dense.architectures` writes the table of docs/dense.md.
"""

from pathlib import Path

import torch

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.method import Context
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.baselines.d2_moe.method import D2Moe
from methods.baselines.expert_scores import ExpertFrequency, Reap
from methods.baselines.heapr import Heapr
from methods.baselines.micro_expert_controls import (
    ActivationOnly,
    Magnitude,
    RandomExperts,
    RandomMicroExperts,
)
from methods.baselines.moe_slimming import MoESlimming
from methods.baselines.mone import Mone
from methods.baselines.naee import Naee
from methods.camera.joint import CameraPQ
from methods.camera.loss_aware import CameraLossAware
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ, CameraQDagger
from methods.dense.layer_removal import ShortGPT
from methods.dense.structured import Flap, LLMPruner
from methods.dense.weight_pruning import SparseGPT, Wanda, WeightMagnitude
from methods.quantization.mixture import Mc
from methods.quantization.uniform import Awq, Gptq, Rtn
from methods.wgsef.fine_tuning import WgsefFinetune
from methods.wgsef.layerwise.dense_decoder import OnText
from methods.wgsef.layerwise.moe_layers import WgsefLayerwise
from tests.models import tiny_networks

CUT = {"ratio": 0.4, "state": "removed"}
UNPROTECTED = {"protect_first": 0, "protect_last": 0}
# Rounding to nearest wherever the choice of bits is the point: columns of GPTQ are slow in tests.
NEAREST = {"group": 8, "rounding": "rtn"}
METHODS = {
    "camera_p": CameraP(ratio=0.4),
    "camera_loss_aware": CameraLossAware(**CUT),
    "heapr": Heapr(**CUT, scope="layer"),
    "moe_slimming": MoESlimming(**CUT),
    "camera_q": CameraQ(shares=(1, 2, 1), block=4, **NEAREST),
    "camera_q_dagger": CameraQDagger(bits=(4, 3), shares=(1, 1), **NEAREST),
    "camera_pq": CameraPQ(budget_bits=6, block=4, **NEAREST),
    "magnitude": Magnitude(**CUT),
    "activation_only": ActivationOnly(**CUT),
    "random_micro_experts": RandomMicroExperts(**CUT),
    "gptq": Gptq(bits=4, group=16, min_tokens=4),
    "rtn": Rtn(bits=4, group=8),
    "awq": Awq(bits=4, group=16),
    "wgsef_layerwise": WgsefLayerwise(selector="energy", **CUT),
    "wgsef_neurons": OnText(atoms="neurons", ratio=0.4, selector="energy"),
    "wgsef_heads": OnText(atoms="heads", ratio=0.5, selector="energy"),
    "weight_magnitude": WeightMagnitude(ratio=0.5),
    "wanda": Wanda(ratio=0.5, pattern="2:4"),
    "sparsegpt": SparseGPT(ratio=0.5, pattern="2:4"),
    "flap": Flap(ratio=0.5, allocation="uniform"),
    "flap units=neurons": Flap(ratio=0.5, units="neurons"),
    "llm_pruner": LLMPruner(ratio=0.5, **UNPROTECTED),
    "llm_pruner units=neurons": LLMPruner(ratio=0.5, units="neurons", **UNPROTECTED),
    "shortgpt": ShortGPT(count=1),
    "expert_frequency": ExpertFrequency(ratio=0.4),
    "random_experts": RandomExperts(ratio=0.4),
    "reap": Reap(ratio=0.4),
    "naee": Naee(ratio=0.4),
    "d2_moe": D2Moe(ratio=0.4),
    "mone": Mone(ratio=0.4),
    "mc": Mc(),
    "wgsef_finetune": WgsefFinetune(ratio=0.4),
}


def model_of(network):
    config = ModelConfig(name="tiny", source="tests")
    device = torch.device("cpu")
    return Model(config, network, tiny_networks.tokenizer(), "", None, device)


def context():
    return Context(seed=0, calibration=Calibration(tiny_networks.tokens(), "text"))


def applied(method, network):
    """Apply a method to a network as a run does; return the model and the report."""
    model = model_of(network)
    method.check(model.structure)
    return model, method.apply(model, context())


def refusal(method, network):
    """Return the sentence by which a method refuses a network, or None."""
    try:
        method.check(model_of(network).structure)
    except UserError as refused:
        return str(refused)
    return None


DOCUMENT = Path(__file__).parents[3] / "docs/dense.md"
START, END = "<!-- refused: written by tests -->\n", "<!-- end -->\n"


def table():
    """Return the table of what is refused, in Markdown."""
    networks = {name: tiny_networks.build_dense(name) for name in tiny_networks.DENSE_ARCHITECTURES}
    rows = ["| method | architectures (of the tests) | refused with |", "|---|---|---|"]
    for name, method in METHODS.items():
        said = {}
        for architecture, network in networks.items():
            sentence = refusal(method, network)
            if sentence is not None:
                # One row per reason: the name of the class is all that differs.
                for own in (type(network).__name__, network.config.model_type):
                    sentence = sentence.replace(own, "…")
                for module in network.modules():
                    sentence = sentence.replace(f" {type(module).__name__} ", " … ")
                said.setdefault(sentence, []).append(architecture)
        for sentence, who in said.items():
            names = "all" if len(who) == len(networks) else ", ".join(who)
            rows.append(f"| `{name}` | {names} | {sentence} |")
    return "\n".join(rows) + "\n"


def main():
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + START + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
