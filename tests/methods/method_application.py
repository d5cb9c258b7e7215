"""Application of a method to a tiny network, and slow views of what its blocks compute."""

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bench.data.calibration import Calibration
from bench.method import Context
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.moe.micro_experts import expert_spans, expert_view
from tests.models.tiny_networks import build, tokens, unfuse


def network_of(name, layout="fused"):
    return build(name) if layout == "fused" else unfuse(build(name))


def model_of(network):
    return Model(
        ModelConfig(name="tiny", source="tests"), network, None, "", None, torch.device("cpu")
    )


def context(seed=0, rows=None):
    rows = tokens() if rows is None else rows
    return Context(seed=seed, calibration=Calibration(rows, "calibration"))


def applied(method, network, seed=0, rows=None):
    method.check(inspect_model(network))
    return method.apply(model_of(network), context(seed, rows))


def zeroed(block):
    """The flat indices of micro-experts that are zero in all three matrices."""
    flat = []
    for expert, place in expert_spans(block):
        part = expert_view(block, expert)
        dead = ~(part.gate.any(1) | part.up.any(1) | part.down.any(0))
        flat += [place.start + int(i) for i in dead.nonzero()]
    return flat


def block_inputs(network, rows):
    """What goes into every MoE block when rows pass, [B, L, D] each."""
    inputs = {}
    blocks = inspect_model(network).moe
    hooks = [
        block.block.register_forward_pre_hook(
            lambda _, args, name=block.name: inputs.update({name: args[0].clone()})
        )
        for block in blocks
    ]
    network(rows)
    for hook in hooks:
        hook.remove()
    return [inputs[block.name] for block in blocks]


def numel(network):
    return sum(weight.numel() for weight in network.parameters())


class Masked(TorchFunctionMode):
    """Makes a block's router see -inf for some experts, inside the model's own code."""

    def __init__(self, block, dropped):
        super().__init__()
        self.dropped = list(dropped)
        (self.weight,) = (
            weight
            for weight in block.router.parameters()
            if weight.shape == (block.num_experts, block.d_model)
        )
        # Wherever they lie: in the router, in a part of it, or in the block.
        self.biases = [
            tensor
            for name, tensor in (*block.block.named_parameters(), *block.block.named_buffers())
            if name.rpartition(".")[2] in ("e_score_correction_bias", "expert_bias")
        ]

    def __enter__(self):
        self.before = [bias.clone() for bias in self.biases]
        for bias in self.biases:
            bias[..., self.dropped] = -torch.inf
        return super().__enter__()

    def __exit__(self, *error):
        for bias, before in zip(self.biases, self.before, strict=True):
            bias.copy_(before)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and args[1] is self.weight:
            result[..., self.dropped] = -torch.inf
        return result
