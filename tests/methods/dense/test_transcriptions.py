"""Methods for micro-experts on dense decoders, against slow transcriptions of their definitions.

On a gated architecture with biases (Llama), a fused one (Phi-3), and plain ones (GPT-2, OPT).
"""

import copy
import math

import pytest
import torch
from torch.nn import functional

from bench.errors import UserError
from bench.models.structure.dense_layer import feed_forwards, is_projection, weight_of
from bench.models.structure.model_structure import inspect_model
from methods.baselines.micro_expert_controls import ActivationOnly, Magnitude
from methods.camera.joint import BitOptions, ReplacementErrors
from methods.camera.loss_aware import CameraLossAware
from methods.camera.pruning import CameraP
from methods.camera.quantization import CameraQ, CameraQDagger
from methods.dense.structured import taylor_scores
from methods.dense.units import find_units
from methods.dense.weight_pruning import Wanda
from methods.moe.quantizer.gptq import Gram, gptq, inverse_factor
from methods.moe.quantizer.grid import column_groups, round_weights
from methods.quantization import channel_scales
from methods.quantization.uniform import Awq, Gptq, Rtn
from methods.wgsef.layerwise.dense_decoder import OnText
from methods.wgsef.layerwise.moe_layers import WgsefLayerwise
from tests.methods.dense.architectures import applied, context, model_of
from tests.models.tiny_networks import build_dense, tokens

FORMS = pytest.mark.parametrize("name", ["llama_biased", "phi3", "gpt2", "opt"])


def rows_and_columns(network, layer):
    """The feed-forward's own matrices as (rows per neuron, columns per neuron, hidden, input)."""
    (part,) = feed_forwards(inspect_model(network).layers[layer])
    seen = {}
    handles = [
        part.sources[0].register_forward_pre_hook(
            lambda _, args: seen.update(x=args[0].flatten(0, -2).double())
        ),
        part.down.register_forward_pre_hook(
            lambda _, args: seen.update(h=args[0].flatten(0, -2).double())
        ),
    ]
    network(tokens())
    for handle in handles:
        handle.remove()
    return part, weight_of(part.down).double(), seen["h"], seen["x"]


def kept_neurons(before, after):
    """Indices of the neurons whose down columns are still there."""
    (old,), (new,) = feed_forwards(before), feed_forwards(after)
    old_DF, new_DF = weight_of(old.down), weight_of(new.down)
    return [
        next(j for j in range(old.width) if torch.equal(old_DF[:, j], column))
        for column in new_DF.T
    ]


SCORES = {
    "camera_p": lambda h, w: (
        (0.05 * float((h * h).sum()) + 0.95 * float((h * h).max())) * float((w * w).sum())
    ),
    "magnitude": lambda h, w: float((w * w).sum()),
    "activation_only": lambda h, w: float((h * h).sum()),
    "wgsef": lambda h, w: math.sqrt(float((h * h).mean())) * float(w.norm()),
}
RANKED = {
    "camera_p": CameraP(ratio=0.3, sequential=False),
    "magnitude": Magnitude(ratio=0.3, state="removed"),
    "activation_only": ActivationOnly(ratio=0.3, state="removed", sequential=False),
    "wgsef": WgsefLayerwise(
        ratio=0.3, state="removed", sequential=False, selector="energy", refit=False
    ),
    "wgsef_neurons": OnText(
        atoms="neurons", ratio=0.3, sequential=False, selector="energy", refit=False
    ),
}


@pytest.mark.parametrize("method", RANKED)
@FORMS
def test_a_ranking_keeps_the_neurons_that_a_loop_keeps(name, method):
    dense = build_dense(name)
    model, _ = applied(RANKED[method], copy.deepcopy(dense))
    score = SCORES[method.removesuffix("_neurons")]
    for index, layer in enumerate(inspect_model(model.network).layers):
        part, down_DF, hidden_SF, _ = rows_and_columns(dense, index)
        scored = [score(hidden_SF[:, j], down_DF[:, j]) for j in range(part.width)]
        gone = sorted(range(part.width), key=lambda j: scored[j])[: int(0.3 * part.width)]
        wanted = [j for j in range(part.width) if j not in gone]
        assert kept_neurons(inspect_model(dense).layers[index], layer) == wanted


@FORMS
def test_loss_aware_energy_is_that_of_a_loop_over_tokens(name):
    dense = build_dense(name)
    method = CameraLossAware(ratio=0.3, state="removed")
    model, _ = applied(method, copy.deepcopy(dense))
    gradients = {}
    twin = copy.deepcopy(dense)
    twin.get_input_embeddings().weight.requires_grad_(True)
    parts = [feed_forwards(layer)[0] for layer in inspect_model(twin).layers]
    for place, part in enumerate(parts):
        part.down.register_forward_hook(
            lambda _, __, y, place=place: (
                y.register_hook(lambda g: gradients.update({place: g.flatten(0, -2).double()}))
                and None
            )
        )
    logits = twin(tokens()).logits
    functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten(), reduction="sum"
    ).backward()
    for index, layer in enumerate(inspect_model(model.network).layers):
        part, down_DF, hidden_SF, _ = rows_and_columns(dense, index)
        g_TD = gradients[index]
        energy = [
            float((hidden_SF[:, j] ** 2).sum())
            * sum(float(g @ down_DF[:, j]) ** 2 for g in g_TD) / len(g_TD)
            for j in range(part.width)
        ]  # fmt: skip
        gone = sorted(range(part.width), key=lambda j: energy[j])[: int(0.3 * part.width)]
        wanted = [j for j in range(part.width) if j not in gone]
        assert kept_neurons(inspect_model(dense).layers[index], layer) == wanted


@FORMS
def test_the_error_of_replacing_a_neuron_is_that_of_a_loop_over_tokens(name):
    network = build_dense(name)
    block = inspect_model(network).micro_expert_blocks[0]
    _, down_DF, hidden_SF, x_SD = rows_and_columns(network, 0)
    errors = ReplacementErrors(block, BitOptions((3, 0), group=8, block=4, clip="minmax"))
    errors.routed(0, x_SD.float(), hidden_SF.float(), torch.ones(len(x_SD)))
    view = block.expert(0)
    up = round_weights(view.up, 3, 8).double() @ x_SD.T
    up = up if view.up_bias is None else up + view.up_bias.double()[:, None]
    if view.form == "plain":
        rounded_FS = view.act(up)
    else:
        gate = round_weights(view.gate, 3, 8).double() @ x_SD.T
        gate = gate if view.gate_bias is None else gate + view.gate_bias.double()[:, None]
        rounded_FS = view.act(gate) * up
    for parts, loss_O in zip(errors.blocks[0], errors.losses, strict=True):
        hat_Dn = round_weights(down_DF[:, parts].float(), 3, 4).double()
        removed = replaced = 0.0
        for place, j in enumerate(parts.tolist()):
            for t in range(len(x_SD)):
                output = hidden_SF[t, j] * down_DF[:, j]
                removed += float((output**2).sum())
                replaced += float(((output - rounded_FS[j, t] * hat_Dn[:, place]) ** 2).sum())
        torch.testing.assert_close(
            loss_O, torch.tensor([replaced, removed]).double(), rtol=1e-4, atol=1e-6
        )


@FORMS
def test_gptq_is_that_of_the_hessian_of_a_plain_forward(name):
    dense = build_dense(name)
    options = {"bits": 4, "group": 16, "min_tokens": 4, "attention_bits": 16}
    model, report = applied(Gptq(**options), copy.deepcopy(dense))
    assert set(report.details["rounding"]) <= {"gptq", "damped"}
    part, _, hidden_SF, x_SD = rows_and_columns(dense, 0)
    packed = feed_forwards(inspect_model(model.network).layers[0])[0]
    inputs = [*[x_SD] * len(part.sources), hidden_SF]
    for before, after, z_SC in zip(part.projections, packed.projections, inputs, strict=True):
        weight_RC = weight_of(before)
        rows, columns = weight_RC.shape
        factor_CC, _ = inverse_factor(Gram((z_SC.T @ z_SC).float(), len(z_SC)), 0.01)
        groups = column_groups(columns, 16)
        bits_RG = torch.full((rows, len(groups)), 4)
        wanted = gptq(weight_RC, factor_CC.float(), groups, bits_RG).values(groups)
        # A code at the edge of rounding may differ in another order of summation.
        assert (after.weight - wanted).abs().gt(1e-5).float().mean() < 0.02


@FORMS
def test_rtn_rounds_every_matrix_and_attention_has_its_own_bits(name):
    dense = build_dense(name)
    model, _ = applied(Rtn(bits=3, group=8, attention_bits=5), copy.deepcopy(dense))
    inside = {
        id(linear)
        for layer in inspect_model(model.network).layers
        for linear in feed_forwards(layer)[0].projections
    }
    changed = 0
    for module_name, module in model.network.named_modules():
        if hasattr(module, "codes"):
            weight_RC = weight_of(dense.get_submodule(module_name))
            bits = 3 if id(module) in inside else 5
            torch.testing.assert_close(module.weight, round_weights(weight_RC, bits, 8))
            changed += 1
    assert changed == sum(
        1 for layer in inspect_model(dense).layers for m in layer.modules() if is_projection(m)
    )


@FORMS
def test_camera_q_gives_more_bits_to_the_neurons_of_more_energy(name):
    dense = build_dense(name)
    method = CameraQ(
        bits=(4, 2), shares=(1, 1), block=1, group=40, rounding="rtn", attention_bits=16
    )
    model, _ = applied(method, copy.deepcopy(dense))
    part, down_DF, hidden_SF, _ = rows_and_columns(dense, 0)
    energy = [SCORES["camera_p"](hidden_SF[:, j], down_DF[:, j]) for j in range(part.width)]
    order = sorted(range(part.width), key=lambda j: -energy[j])
    packed = feed_forwards(inspect_model(model.network).layers[0])[0]
    half = part.width // 2
    view = part.view()
    for linear, matrix_RD in zip(
        packed.sources, view.input_matrices(torch.tensor(order)), strict=True
    ):
        bits = [4] * half + [2] * half
        bits = bits * 2 if view.form == "fused" else bits
        wanted = [
            round_weights(row[None], b, 40)[0] for row, b in zip(matrix_RD, bits, strict=True)
        ]
        torch.testing.assert_close(linear.weight, torch.stack(wanted))
    ordered = view.down[:, order]
    wanted = [round_weights(ordered[:, :half], 4, 40), round_weights(ordered[:, half:], 2, 40)]
    torch.testing.assert_close(packed.down.weight, torch.cat(wanted, 1))


@FORMS
def test_camera_q_dagger_gives_more_bits_to_the_columns_of_more_energy(name):
    dense = build_dense(name)
    method = CameraQDagger(bits=(4, 2), shares=(1, 1), group=40, rounding="rtn", attention_bits=16)
    model, _ = applied(method, copy.deepcopy(dense))
    part, _, _, x_SD = rows_and_columns(dense, 0)
    packed = feed_forwards(inspect_model(model.network).layers[0])[0]
    width = x_SD.shape[1]
    neurons = packed_order(part, packed, dense)
    for linear, matrix_RD in zip(packed.sources, part.view().input_matrices(neurons), strict=True):
        energy = [SCORES["camera_p"](x_SD[:, j], matrix_RD[:, j].double()) for j in range(width)]
        order = sorted(range(width), key=lambda j: -energy[j])
        wanted = torch.zeros_like(matrix_RD)
        for bits, columns in ((4, order[: width // 2]), (2, order[width // 2 :])):
            wanted[:, columns] = round_weights(matrix_RD[:, columns], bits, 40)
        torch.testing.assert_close(linear.weight, wanted)


def packed_order(part, packed, dense):
    """The order of the neurons by falling energy."""
    _, down_DF, hidden_SF, _ = rows_and_columns(dense, 0)
    energy = [SCORES["camera_p"](hidden_SF[:, j], down_DF[:, j]) for j in range(part.width)]
    return torch.tensor(sorted(range(part.width), key=lambda j: -energy[j]))


def test_taylor_scores_of_a_plain_architecture_are_sums_over_weights():
    network = build_dense("opt")
    model = model_of(network)
    units = list(find_units(model.structure, "test"))
    rows = tokens()
    found = taylor_scores(model, units, rows, 2, context().progress)
    twin = copy.deepcopy(network).requires_grad_(True)
    twin(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    layer = twin.model.decoder.layers[1]
    heads, neurons = found[2], found[3]

    def first_order(weight):
        return (weight * weight.grad).abs().detach()

    for j in range(40):
        total = first_order(layer.fc1.weight)[j].sum() + first_order(layer.fc2.weight)[:, j].sum()
        assert float(neurons[j]) == pytest.approx(float(total), rel=1e-4)
    attention = layer.self_attn
    for h in range(4):
        own = slice(8 * h, 8 * h + 8)
        total = sum(
            first_order(part.weight)[own].sum()
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        total += first_order(attention.out_proj.weight)[:, own].sum()
        assert float(heads[h]) == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("name", ["phi3", "opt"])
def test_wanda_zeroes_the_lowest_scores_of_every_row(name):
    dense = build_dense(name)
    model, _ = applied(Wanda(ratio=0.5), copy.deepcopy(dense))
    part, _, hidden_SF, x_SD = rows_and_columns(dense, 0)
    pruned = feed_forwards(inspect_model(model.network).layers[0])[0]
    inputs = [*[x_SD] * len(part.sources), hidden_SF]
    for before, after, z_SC in zip(part.projections, pruned.projections, inputs, strict=True):
        for row, left in zip(weight_of(before), weight_of(after), strict=True):
            scored = [abs(float(w)) * float(z_SC[:, j].norm()) for j, w in enumerate(row)]
            gone = sorted(range(len(row)), key=lambda j: scored[j])[: len(row) // 2]
            assert sorted((left == 0).nonzero()[:, 0].tolist()) == sorted(gone)


class Definition:
    """AWQ by its definition, for one matrix: no Gram matrix, no hooks."""

    @staticmethod
    def scales(x_SC, exponent):
        mean = [float(sum(abs(v) for v in x_SC[:, j].tolist())) / len(x_SC) for j in range(
            x_SC.shape[1]
        )]  # fmt: skip
        scale = torch.tensor([max(m**exponent, 1e-4) for m in mean])
        return scale / math.sqrt(float(scale.max()) * float(scale.min()))

    @staticmethod
    def clipped(weight_RC, x_SC, bits, group):
        result = weight_RC.clone()
        for r in range(len(weight_RC)):
            for start in range(0, weight_RC.shape[1], group):
                w = weight_RC[r, start : start + group]
                x = x_SC[:, start : start + group]
                best = None
                for i in range(10):
                    limit = float(w.abs().max()) * (1 - i / 20)
                    trial = w.clamp(-limit, limit)
                    error = float(
                        ((x @ (round_weights(trial[None], bits, group)[0] - w)) ** 2).sum()
                    )
                    if best is None or error < best[0] * (1 - 1e-6):
                        best = error, trial
                result[r, start : start + group] = best[1]
        return result


@pytest.mark.parametrize("name", ["llama_biased", "opt"])
def test_awq_is_its_definition_on_a_feed_forward(name):
    dense = build_dense(name)
    method = Awq(bits=3, group=8, attention_bits=16)
    model, report = applied(method, copy.deepcopy(dense))
    part, _, hidden_SF, x_SD = rows_and_columns(dense, 0)
    hidden_SF, x_SD = hidden_SF.float(), x_SD.float()
    view = part.view()

    def output(matrices, down_DF):
        """The feed-forward with other matrices, as far as the search looks."""
        other = copy.copy(view)
        object.__setattr__(other, "up", matrices[-1])
        if view.form != "plain":
            object.__setattr__(other, "gate", matrices[0])
            return other.hidden(x_SD) @ down_DF.T
        return x_SD @ matrices[-1].T

    inputs = list(view.input_matrices())
    wanted = output(inputs, view.down)
    errors = []
    for exponent in (step / 20 for step in range(20)):
        s = Definition.scales(x_SD, exponent)
        rounded = [round_weights(w * s, 3, 8) / s for w in inputs]
        errors.append(float((output(rounded, view.down) - wanted).square().mean()))
    in_scale = Definition.scales(x_SD, errors.index(min(errors)) / 20)
    errors = []
    for exponent in (step / 20 for step in range(20)):
        s = Definition.scales(hidden_SF, exponent)
        rounded = round_weights(view.down * s, 3, 8) / s
        errors.append(float((hidden_SF @ (rounded - view.down).T).square().mean()))
    hidden_scale = Definition.scales(hidden_SF, errors.index(min(errors)) / 20)

    found = feed_forwards(inspect_model(model.network).layers[0])[0]
    assert all(entry["folded"] for entry in report.layers[0].scaled)
    last = len(inputs) - 1
    for place, (linear, weight_FD) in enumerate(zip(found.sources, inputs, strict=True)):
        scaled = weight_FD * in_scale
        scaled = scaled / hidden_scale[:, None] if place == last else scaled
        scaled = Definition.clipped(scaled[::5], x_SD / in_scale, 3, 8)
        close(linear.weight[::5], round_weights(scaled, 3, 8))
    scaled = (view.down * hidden_scale)[::5]
    scaled = Definition.clipped(scaled, hidden_SF / hidden_scale, 3, 8)
    close(found.down.weight[::5], round_weights(scaled, 3, 8))


def close(found, wanted):
    # Nearly equal errors of two clips may be told apart differently.
    apart = (found - wanted).abs() > 1e-4
    assert apart.float().mean() < 0.02


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "olmo2", "gpt2", "opt", "falcon"])
def test_folded_scales_change_nothing_in_float64(name):
    network = build_dense(name).double()
    model = model_of(network)
    wanted = network(tokens()).logits
    method = Awq(bits=2, group=8, clip_weights=False)
    with torch.no_grad():
        scaled = list(method._scale_layers(model, context().calibration, context().progress))
    exponents = [entry["exponent"] for layer in scaled for entry in layer if entry["folded"]]
    assert any(exponents)
    torch.testing.assert_close(network(tokens()).logits, wanted, rtol=1e-10, atol=1e-10)


def test_scaling_and_clipping_help_where_channels_differ():
    network = build_dense("llama")
    for layer in network.model.layers:
        layer.post_attention_layernorm.weight[::7] *= 20
        layer.input_layernorm.weight[::5] *= 20
    wanted = network(tokens()).logits
    errors = {}
    for label, method in {
        "rtn": Rtn(bits=3, group=32, attention_bits=3),
        "awq": Awq(bits=3, group=32, attention_bits=3),
    }.items():
        model, report = applied(method, copy.deepcopy(network))
        errors[label] = float((model.network(tokens()).logits - wanted).norm() / wanted.norm())
        bits = report.details["bits"]
        assert bits["experts"]["mean_bits_with_overhead"] == pytest.approx(3 + 32 / 32, abs=0.3)
    assert errors["awq"] < 0.9 * errors["rtn"]


def test_a_norm_that_also_feeds_unquantized_weights_takes_no_scale():
    network = build_dense("falcon")
    _, report = applied(Awq(bits=3, group=8, attention_bits=16), network)
    assert all(layer.scaled == [] for layer in report.layers)


def test_activations_that_are_not_finite_are_one_sentence():
    network = build_dense("llama")
    network.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite inputs in layer 1"):
        applied(Awq(group=8), network)


def test_rho_zero_and_no_clipping_equal_rtn(monkeypatch):
    monkeypatch.setattr(channel_scales, "EXPONENTS", (0.0,))
    dense = build_dense("qwen2")
    options = {"bits": 3, "group": 8, "attention_bits": 4}
    ours, first = applied(Awq(clip_weights=False, **options), copy.deepcopy(dense))
    plain, second = applied(Rtn(**options), copy.deepcopy(dense))
    assert torch.equal(ours.network(tokens()).logits, plain.network(tokens()).logits)
    assert first.details["bits"] == second.details["bits"]
    assert first.details["bytes_after"] == second.details["bytes_after"]
