""""""

import pytest
import torch

from bench.models.expert_hooks import observe_experts
from bench.models.structure.model_structure import inspect_model
from tests.models.tiny_networks import ARCHITECTURES, build, tokens, unfuse


class Recorder:
    """Rebuilds a block's output from what is shown: y_t = Σ φ_ti w_i."""

    def __init__(self, block):
        self.block, self.pieces, self.outputs, self.routed_rows = block, [], [], 0

    def routed(self, expert, x_SD, hidden_SF, weight_S):
        self.routed_rows += len(x_SD)
        phi_SF = hidden_SF * weight_S[:, None]
        self.pieces.append((x_SD, phi_SF @ self.block.expert(expert).down.T))

    def shared(self, x_TD, hidden_TF, weight_T):
        self.pieces.append(
            (x_TD, (hidden_TF * weight_T[:, None]) @ self.block.shared_view().down.T)
        )

    def output(self, y_TD):
        self.outputs.append(y_TD)

    def rebuilt(self, inputs_TD):
        """Add up the pieces of each token, which its input identifies."""
        y_TD = torch.zeros_like(inputs_TD)
        for x_SD, y_SD in self.pieces:
            token_S = (x_SD[:, None] == inputs_TD).all(-1).float().argmax(-1)
            y_TD.index_add_(0, token_S, y_SD)
        return y_TD


@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_is_coefficients_times_columns(name, layout):
    network = build(name) if layout == "fused" else unfuse(build(name))
    rows = tokens()
    # Rows that begin alike have equal inputs at their first place, which could not be told apart.
    rows[:, 0] = 10 + torch.arange(len(rows))
    plain = network(rows).logits
    blocks = inspect_model(network).moe
    recorders = {block: Recorder(block) for block in blocks}
    inputs = {}
    hooks = [
        block.block.register_forward_pre_hook(
            lambda _, args, block=block: inputs.update({block: args[0].flatten(0, -2)})
        )
        for block in blocks
    ]
    with observe_experts(recorders, chunk=7):
        torch.testing.assert_close(network(rows).logits, plain, rtol=1e-5, atol=1e-5)
    for hook in hooks:
        hook.remove()
    for block, recorder in recorders.items():
        y_TD = torch.cat(recorder.outputs)
        rebuilt_TD = recorder.rebuilt(inputs[block])
        torch.testing.assert_close(rebuilt_TD, y_TD, rtol=1e-5, atol=1e-5)
        assert recorder.routed_rows == rows.numel() * block.top_k

    seen = len(recorders[blocks[0]].pieces)
    assert torch.equal(network(rows).logits, plain)
    assert len(recorders[blocks[0]].pieces) == seen


def test_blocks_that_are_not_watched_compute_as_before():
    network = build("olmoe")
    rows = tokens()
    plain = network(rows).logits
    block = inspect_model(network).moe[1]
    with observe_experts({block: Recorder(block)}):
        torch.testing.assert_close(network(rows).logits, plain, rtol=1e-5, atol=1e-5)


def test_is_undone_after_an_error():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    network = build("qwen2_moe")
    block = inspect_model(network).moe[0]
    before = network.config._experts_implementation
    known = set(ALL_EXPERTS_FUNCTIONS)

    with pytest.raises(RuntimeError), observe_experts({block: Recorder(block)}):
        raise RuntimeError
    assert network.config._experts_implementation == before
    assert set(ALL_EXPERTS_FUNCTIONS) == known
    assert not block.block._forward_hooks
    assert not block.shared._forward_pre_hooks


def test_observations_can_be_nested():
    network = build("qwen2_moe")
    rows = tokens()
    first, second = inspect_model(network).moe
    recorders = {block: Recorder(block) for block in (first, second)}
    with observe_experts({first: recorders[first]}):
        with observe_experts({second: recorders[second]}):
            network(rows)
        network(rows)
    routed = [recorder.routed_rows for recorder in recorders.values()]
    assert routed == [2 * rows.numel() * first.top_k, rows.numel() * second.top_k]
