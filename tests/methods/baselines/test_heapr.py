"""HEAPr's scores against its definition with the matrix G, and what it removes."""

import pytest
import torch

from bench.errors import UserError
from bench.models.structure.model_structure import inspect_model
from bench.ui import SILENT
from methods.baselines.heapr import Heapr
from methods.moe.micro_experts import expert_spans
from tests.methods.method_application import Masked, applied, model_of, zeroed
from tests.models.tiny_networks import build, build_dense, tokens, unfuse


def slow_scores(network, rows):
    """Collect a and g of every expert by hooks on its modules; G by a loop of outer products."""
    blocks = inspect_model(network).moe
    kept = {}
    for number, block in enumerate(blocks):
        for expert, module in enumerate(block.experts):
            hidden, slopes = kept.setdefault((number, expert), ([], []))
            module.down_proj.register_forward_pre_hook(
                lambda _, args, hidden=hidden: hidden.append(args[0].detach())
            )
            module.register_forward_hook(
                lambda _, __, z, slopes=slopes: z.register_hook(slopes.append) and None
            )
    network.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_())
    for row in rows.split(1):
        logits = network(row).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum").backward()
    scores = {}
    for (number, expert), (hidden, slopes) in kept.items():
        a_SF, g_SD = torch.cat(hidden), torch.cat(slopes)
        down_DF = blocks[number].expert(expert).down
        count = max(len(a_SF), 1)
        metric_DD = sum((torch.outer(g, g) for g in g_SD), torch.zeros(16, 16)) / count
        scores[number, expert] = [
            sum(float(a[k]) ** 2 for a in a_SF) / count * float(w_D @ metric_DD @ w_D)
            for k, w_D in enumerate(down_DF.T)
        ]
    return scores


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_scores_are_those_of_the_definition(name):
    network, rows = build(name), tokens(rows=3, length=8)
    found = Heapr(ratio=0.4)._scores(model_of(network), rows, SILENT)
    wanted = slow_scores(unfuse(build(name)), rows)
    for number, block in enumerate(inspect_model(network).moe):
        for expert, place in expert_spans(block):
            if expert < 0:
                assert found[number][place].isinf().all()
                continue
            mine = found[number][place].float()
            torch.testing.assert_close(
                mine, torch.tensor(wanted[number, expert]), rtol=1e-3, atol=1e-9
            )
    assert all(weight.grad is None for weight in network.parameters())


def test_an_expert_without_tokens_scores_zero():
    network = build("mixtral")
    block = inspect_model(network).moe[0]
    with Masked(block, [2]):
        score_N = Heapr(ratio=0.4)._scores(model_of(network), tokens(), SILENT)[0]
    place = dict(expert_spans(block))[2]
    assert not score_N[place].any()
    assert score_N.isfinite().all()


def test_all_layers_are_ranked_together_and_zeroed_equals_removed():
    networks = [build("qwen2_moe") for _ in range(2)]
    reports = [
        applied(Heapr(ratio=0.4, state=state), network)
        for state, network in zip(("zeroed", "removed"), networks, strict=True)
    ]
    rows = tokens()
    torch.testing.assert_close(
        networks[0](rows).logits, networks[1](rows).logits, rtol=1e-4, atol=1e-4
    )
    blocks = inspect_model(networks[0]).moe
    gone = [zeroed(block) for block in blocks]
    # The same total as that of CAMERA-P, in other shares, and none of it from shared experts.
    assert sum(map(len, gone)) == 2 * int(0.4 * blocks[0].micro_experts)
    assert len(gone[0]) != len(gone[1])
    assert all(min(places) >= blocks[0].d_shared for places in gone)
    assert reports[0].details["removed_parameters"] == reports[1].details["removed_parameters"]


def test_a_dense_feed_forward_is_one_expert():
    network = build_dense("llama")
    report = applied(Heapr(ratio=0.4, scope="layer"), network)
    assert [layer.removed for layer in report.layers] == [16, 16]


def test_refuses_what_it_cannot_measure_or_remove():
    with pytest.raises(UserError, match="cannot be observed"):
        Heapr(ratio=0.4).check(inspect_model(unfuse(build("mixtral"))))
    with pytest.raises(UserError, match="routed experts have 72"):
        Heapr(ratio=0.9).check(inspect_model(build("qwen2_moe")))
