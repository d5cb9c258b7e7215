"""Networks that were quantized, and the same ones with rounded weights in the ordinary layout."""

import torch

from bench.data.calibration import Calibration
from bench.method import Context
from bench.models.bitpacking.packed_modules import packed_linears
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.camera.joint import CameraPQ
from methods.camera.quantization import CameraQ, CameraQDagger
from methods.quantization.mixture import Mc
from methods.quantization.uniform import Gptq, Rtn
from tests.models.tiny_networks import build, tokens, unfuse

# Small enough for the tiny networks to have several groups a row, and GPTQ on most experts.
SMALL = {"group": 8, "min_tokens": 4}
METHODS = {
    "rtn": Rtn(bits=3, group=8),
    "gptq": Gptq(bits=4, **SMALL),
    "mc": Mc(**SMALL),
    "camera_q": CameraQ(shares=(1, 2, 1), block=2, **SMALL),
    "camera_q_random": CameraQ(shares=(1, 2, 1), block=2, ranking="random", **SMALL),
    "camera_q_expert": CameraQ(bits=(8, 4, 3), shares=None, mean_bits=5, scope="expert", **SMALL),
    "camera_q_dagger": CameraQDagger(bits=(3, 1), shares=(1, 1), **SMALL),
    "camera_pq": CameraPQ(budget_bits=6, block=4, **SMALL),
    "camera_pq_global": CameraPQ(budget_bits=6, block=4, scope="global", rounding="rtn", group=8),
}


def network_of(name, layout="fused"):
    return build(name) if layout == "fused" else unfuse(build(name))


def model_of(network):
    config = ModelConfig(name="tiny", source="tests")
    return Model(config, network, None, "", None, torch.device("cpu"))


def context(rows=5, length=12):
    return Context(seed=0, calibration=Calibration(tokens(rows, length), "fingerprint"))


def applied(method, network, lent=None):
    method.check(inspect_model(network))
    return method.apply(model_of(network), lent or context())


def rounded_in_place(packed, network):
    """Write the numbers that a packed network's codes stand for into an ordinary network."""
    for theirs, ours in zip(inspect_model(packed).moe, inspect_model(network).moe, strict=True):
        for expert in range(ours.num_experts):
            source, target = theirs.expert(expert), ours.expert(expert)
            target.zero(torch.arange(target.width))
            target.gate[: source.width] = source.gate
            target.up[: source.width] = source.up
            target.down[:, : source.width] = source.down
    for name, linear in packed_linears(packed):
        if ".experts." not in name:
            network.get_submodule(name).weight.copy_(linear.weight)
    return network
