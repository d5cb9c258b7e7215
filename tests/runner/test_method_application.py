"""What a method claims is held against the counts before and after it."""

import copy
import functools
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bench.data.calibration import Calibration
from bench.device.devices import describe_device
from bench.errors import UserError
from bench.method import Context, Method, MethodReport
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.hashing import network_hash
from bench.models.network import replace_forward
from bench.models.structure.model_structure import inspect_model
from bench.records import SizeAndWork, without_real_saving
from bench.records.record import lost_zeros, standing_effects
from bench.runner import replay
from bench.runner.identity import method_identity
from bench.runner.method_application import (
    apply_methods,
    check_effect,
    later_errors_attributed,
    refuse_idle,
)
from bench.runner.replay import refuse_other_network
from bench.runner.session import Session
from bench.schema import CostsConfig
from bench.ui import SILENT
from methods.baselines.d2_moe.method import D2Moe
from methods.baselines.naee import Naee
from methods.camera.pruning import CameraP
from methods.dense.layer_removal import ShortGPT
from methods.dense.structured import Flap
from methods.moe.micro_experts import keep_routed
from methods.quantization.uniform import Rtn
from methods.wgsef.layerwise.dense_decoder import OnText
from methods.wgsef.sparse_training import Wgsef
from tests.methods.method_application import model_of
from tests.models.tiny_networks import build, llama, tokens

COSTS = CostsConfig(name="tiny", length=8)


class Claimed(Method):
    """Does one thing to the network and reports another."""

    effect: str
    does: str = "nothing"
    ratio: float = 0.5

    def check(self, structure):
        """Accept every model."""

    def apply(self, model, context):
        DEEDS[self.does](model.network)
        return MethodReport(self.effect)


def zero(network):
    with torch.no_grad():
        network.model.layers[0].self_attn.q_proj.weight.zero_()


def drop_a_layer(network):
    # Nothing is told to the model: no cache is emptied, no config changed.
    del network.model.layers[0]


def pass_a_layer_by(network):
    replace_forward(network.model.layers[1], lambda hidden_states, *_, **__: hidden_states)


def halve_the_bytes(network):
    network.bfloat16()


def each_linear(network):
    for layer in network.model.layers:
        for part in list(layer.modules()):
            if isinstance(part, nn.Linear):
                yield part, part.weight.detach()


def hold_as_buffers(network):
    for part, weight in each_linear(network):
        del part.weight
        part.register_buffer("weight", weight)


def hold_as_short_buffers(network):
    hold_as_buffers(network)
    network.bfloat16()


def hold_as_attributes(network):
    for part, weight in each_linear(network):
        del part.weight
        part.weight = weight


def hold_in_lists(network):
    kept = {}
    for number, (part, weight) in enumerate(each_linear(network)):
        del part.weight
        kept[number] = [weight]
        replace_forward(part, lambda x, held=kept[number]: functional.linear(x, held[0]))
    network.kept = kept


def widen(network):
    drop_a_layer(network)
    network.double()


def pad(network):
    # The experts of a layer lose a third, and alignment to 64 stores more than there was.
    block = inspect_model(network).moe[0]
    kept = {expert: torch.arange(8) for expert in range(block.num_experts)}
    keep_routed(block, kept, align=64)


def drop_and_halve(network):
    drop_a_layer(network)
    network.bfloat16()


def zero_and_halve(network):
    zero(network)
    network.bfloat16()


def scale(network):
    # As small as can be, and yet no zero.
    with torch.no_grad():
        network.model.layers[0].self_attn.q_proj.weight.mul_(1e-20)


def fill_and_halve(network):
    with torch.no_grad():
        for _, weight in each_linear(network):
            weight.add_(weight == 0)
    network.bfloat16()


def widen_a_projection(network):
    network.model.layers[0].self_attn.q_proj.double()


def widen_experts(network):
    network.model.layers[1].mlp.experts.double()


DEEDS = {
    "widen a projection": widen_a_projection,
    "widen experts": widen_experts,
    "print": lambda network: print("halfway"),
    "zero and halve": zero_and_halve,
    "scale": scale,
    "hold": hold_as_buffers,
    "hold in short": hold_as_short_buffers,
    "hold as attributes": hold_as_attributes,
    "hold in lists": hold_in_lists,
    "widen": widen,
    "pad": pad,
    "drop and halve": drop_and_halve,
    "nothing": lambda network: None,
    "zero": zero,
    "fill and halve": fill_and_halve,
    "drop": drop_a_layer,
    "pass": pass_a_layer_by,
    "halve": halve_the_bytes,
}


@pytest.fixture
def said(monkeypatch):
    """The warnings of a method's application."""
    lines = []
    monkeypatch.setattr(type(SILENT), "warn", lambda self, text: lines.append(text))
    return lines


def applied(unchanged=None, **methods):
    model = model_of(build("qwen2_moe"))
    context = Context(0, Calibration(tokens(rows=3), "calibration"))
    config = SimpleNamespace(method=methods, costs=COSTS)
    with Session() as session:
        session.dense_counts.clear()
        return apply_methods(config, model, context, session, unchanged), model


def test_a_model_that_is_kept_is_counted_as_one_that_is_not():
    deeds = {
        "first": Claimed(effect="removed", does="drop"),
        "second": Claimed(effect="zeroed", does="zero"),
    }
    (alone, _), (beside, _) = applied(**deeds), applied(model_of(build("qwen2_moe")), **deeds)
    assert [each.check for each in beside] == [each.check for each in alone]
    assert alone[0].check.before != alone[0].check.after == alone[1].check.before


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("effect", "does", "found"),
    [
        ("removed", "zero", "none"),
        ("removed", "nothing", "none"),
        ("removed", "pass", "skipped"),
        ("removed", "halve", "quantized"),
        ("removed", "hold", "none"),
        ("removed", "hold in short", "quantized"),
        ("removed", "hold as attributes", "none"),
        ("removed", "hold in lists", "none"),
        ("removed", "widen", "skipped"),
        ("removed", "pad", "none"),
        ("quantized", "zero", "none"),
        ("quantized", "pass", "skipped"),
        ("quantized", "drop", "removed"),
        ("quantized", "drop and halve", "removed"),
        ("quantized", "hold as attributes", "none"),
        ("skipped", "zero", "none"),
        ("skipped", "halve", "quantized"),
        ("none", "drop", "removed"),
        ("none", "halve", "quantized"),
        ("none", "pass", "skipped"),
        ("masked", "drop", "removed"),
        ("zeroed", "halve", "quantized"),
        ("zeroed", "zero and halve", "quantized"),
        ("zeroed", "nothing", "none"),
        ("zeroed", "hold", "none"),
        ("zeroed", "scale", "none"),
    ],
)
def test_a_saving_that_the_counts_do_not_show_is_not_claimed(said, effect, does, found):
    (method,), _ = applied(fake=Claimed(effect=effect, does=does))
    assert (method.effect, method.check.found) == (effect, found)
    assert method.confirmed_effect == "unconfirmed"
    assert without_real_saving([method]) == "unconfirmed"
    (line,) = said
    assert line.startswith("fake reports")
    assert effect in line


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("effect", "does", "found"),
    [
        ("removed", "drop", "removed"),
        ("removed", "drop and halve", "removed"),
        ("quantized", "halve", "quantized"),
        ("quantized", "hold in short", "quantized"),
        ("none", "hold", "none"),
        ("none", "zero", "none"),
        ("skipped", "pass", "skipped"),
        ("skipped", "drop", "removed"),
        ("zeroed", "zero", "none"),
        ("masked", "nothing", "none"),
    ],
)
def test_what_the_counts_show_stands(said, effect, does, found):
    (method,), _ = applied(fake=Claimed(effect=effect, does=does, ratio=0))
    assert method.check.found == found
    assert method.confirmed_effect == effect
    assert said == []


@pytest.mark.parametrize(
    ("does", "named"),
    [
        ("widen a projection", r"layers\.0\.self_attn\.q_proj\.weight"),
        ("widen experts", r"layers\.1\.mlp\.experts\.\w+"),
    ],
)
def test_a_dtype_that_does_not_fit_the_others_is_refused_by_method_and_weight(does, named):
    message = rf"method fake left model\.{named} in torch.float64, which was in torch.float32"
    with pytest.raises(UserError, match=message):
        applied(fake=Claimed(effect="none", does=does))


def test_what_a_method_prints_is_not_among_the_results(capsys):
    applied(fake=Claimed(effect="none", does="print", ratio=0))
    assert capsys.readouterr() == ("", "halfway\n")


@pytest.mark.broad
def test_the_methods_of_this_repository_are_confirmed(said):
    methods, _ = applied(
        camera_p=CameraP(ratio=0.4, state="removed", align=4),
        rtn=Rtn(bits=4, group=8),
    )
    assert [method.confirmed_effect for method in methods] == ["removed", "quantized"]
    assert methods[0].check.after == methods[1].check.before
    assert said == []


@pytest.mark.broad
def test_one_false_claim_marks_a_run_that_has_a_true_one(said):
    methods, _ = applied(
        camera_p=CameraP(ratio=0.4, state="removed", align=4),
        fake=Claimed(effect="removed", does="zero"),
    )
    assert without_real_saving(methods) == "unconfirmed"


@pytest.mark.parametrize(
    ("does", "standing"),
    [("fill and halve", ["quantized"]), ("halve", ["zeroed", "quantized"])],
)
def test_zeros_that_a_later_method_fills_no_longer_count_as_an_effect(said, does, standing):
    methods, _ = applied(
        sparse=Claimed(effect="zeroed", does="zero"),
        packed=Claimed(effect="quantized", does=does),
    )
    assert standing_effects(methods) == standing
    assert [*lost_zeros(methods)] == ([] if "zeroed" in standing else ["sparse"])
    assert said == [*lost_zeros(methods).values()]


def patch_a_class(network):
    type(network.model.layers[0].mlp).forward = lambda self, x: 0 * x


def patch_an_inherited_name(network):
    type(network.model.layers[0].mlp).__call__ = lambda self, x: 0 * x


def patch_a_library(network):
    torch.nn.functional.silu = functools.wraps(torch.relu)(lambda x, **_: torch.relu(x))


def patch_the_code_of_the_class(network):
    sys.modules[type(network).__module__].apply_rotary_pos_emb = lambda q, k, *_, **__: (q, k)


def hook_all_modules(network):
    nn.modules.module.register_module_forward_hook(lambda module, given, found: found)


@pytest.mark.parametrize(
    ("patch", "named"),
    [
        (patch_a_class, r"Qwen2Moe\w+\.forward"),
        (patch_an_inherited_name, r"Qwen2Moe\w+\.__call__"),
        (patch_a_library, r"torch\.nn\.functional\.silu"),
        (patch_the_code_of_the_class, r"modeling_qwen2_moe\.apply_rotary_pos_emb"),
        (hook_all_modules, "what every module does"),
    ],
)
def test_code_that_other_networks_compute_by_is_put_back_and_the_method_refused(
    monkeypatch, patch, named
):
    def answers():
        torch.manual_seed(0)
        return build("qwen2_moe")(tokens()).logits

    before = answers()
    monkeypatch.setitem(DEEDS, "patch", patch)
    with pytest.raises(UserError, match=f"method fake changes .*{named}.*by which all other"):
        applied(fake=Claimed(effect="none", does="patch", ratio=0))
    assert torch.equal(answers(), before)


def test_settings_of_the_process_are_put_back(monkeypatch, tmp_path):
    def change(network):
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)

    folder = Path.cwd()
    monkeypatch.setitem(DEEDS, "change", change)
    applied(fake=Claimed(effect="none", does="change", ratio=0))
    assert Path.cwd() == folder
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.float32, True)


def test_a_changed_knob_is_refused():
    class Restless(Claimed):
        def apply(self, model, context):
            self.__dict__["ratio"] = 0.9
            return MethodReport("none")

    with pytest.raises(UserError, match=r"changes its knob ratio from 0\.5 to 0\.9: keep"):
        applied(fake=Restless(effect="none"))


def test_a_network_made_again_is_the_one_that_was_scored_or_is_refused(monkeypatch):
    model = model_of(build("qwen2_moe"))
    record = SimpleNamespace(id="abc", provenance={"network": network_hash(model.network)})
    refuse_other_network(record, model)
    zero(model.network)
    own = Claimed(effect="zeroed", does="zero")
    record.environment = {**describe_device(), "versions": {}}
    record.provenance["identity"] = {"methods": {"fake": method_identity(own)}}
    config = SimpleNamespace(method={"fake": own})
    monkeypatch.setattr(replay, "recorded_config", lambda *_: config)
    with pytest.raises(UserError, match=r"fake makes other weights than run abc scored, from the"):
        refuse_other_network(record, model)
    record.environment["threads"] = -1
    refuse_other_network(record, model)  # only warned of: sums may be added up in another order
    record.provenance["identity"] = {"methods": {"fake": "code of then"}}
    with pytest.raises(UserError, match=r"the code of method fake changed since run abc"):
        refuse_other_network(record, model)
    refuse_other_network(SimpleNamespace(provenance={}), model)


def test_a_network_that_a_method_exchanges_is_looked_at_anew():
    model = model_of(build("qwen2_moe"))
    before = model.structure
    model.network = copy.deepcopy(model.network)
    assert model.structure.moe[0].block is not before.moe[0].block


def test_nan_in_a_buffer_is_refused(monkeypatch):
    monkeypatch.setitem(
        DEEDS, "blank", lambda network: [held.fill_(torch.nan) for held in network.buffers()]
    )
    with pytest.raises(UserError, match=r"method fake left numbers in .*inv_freq that are NaN"):
        applied(fake=Claimed(effect="none", does="blank"))


@pytest.mark.parametrize("effect", ["deleted", "Removed", "", "removed+quantized"])
def test_an_unknown_effect_is_refused(effect):
    with pytest.raises(UserError, match=r"effect '.*'; allowed: removed, zeroed"):
        applied(fake=Claimed(effect=effect))


@pytest.mark.broad
def test_a_method_after_one_that_drops_layers_sees_those_that_are_left():
    (dropped, pruned), model = applied(
        block_drop=Claimed(effect="removed", does="drop"),
        camera_p=CameraP(ratio=0.4, state="removed", align=4),
    )
    assert dropped.confirmed_effect == "removed"
    assert [layer.layer for layer in pruned.layers] == [0, 1]
    assert len(model.structure.layers) == 2
    with torch.no_grad():
        assert model.network(tokens(), use_cache=False).logits.isfinite().all()


@pytest.mark.broad
def test_asked_for_a_saving_and_changed_nothing(said):
    applied(fake=Claimed(effect="none", ratio=0.2))
    assert said == ["fake saved nothing, although ratio=0.2"]
    said.clear()
    applied(fake=Claimed(effect="none", ratio=0))
    assert said == []


MOE, DENSE = inspect_model(build("qwen2_moe")), inspect_model(llama())
VISION = inspect_model(
    build_classifier(VisionConfig(architecture="micro_lenet", channels=1, size=8))
)


@pytest.mark.parametrize(
    ("make", "structure", "least"),
    [
        (lambda ratio: CameraP(ratio=ratio), MOE, 0.05),
        (lambda ratio: Naee(ratio=ratio), MOE, 0.05),
        (lambda ratio: D2Moe(ratio=ratio), MOE, 0.05),
        (lambda ratio: OnText(atoms="heads", ratio=ratio), DENSE, 0.5),
        (lambda ratio: OnText(atoms="neurons", ratio=ratio), DENSE, 0.5),
        (lambda ratio: Flap(ratio=ratio, allocation="uniform"), DENSE, 0.5),
        (lambda ratio: ShortGPT(ratio=ratio), DENSE, 0.5),
        (lambda ratio: Wgsef(ratio=ratio), VISION, 0.5),
        (lambda ratio: Wgsef(ratio=ratio, scope="layer"), VISION, 0.5),
    ],
)
def test_a_ratio_that_rounds_down_to_nothing_is_refused_before_weights_are_loaded(
    make, structure, least
):
    with pytest.raises(UserError, match=r"method\.x\.ratio=0\.0001 rounds down to nothing"):
        refuse_idle("x", make(0.0001), structure)
    refuse_idle("x", make(least), structure)


def test_a_ratio_of_zero_may_change_nothing():
    refuse_idle("x", CameraP(ratio=0), MOE)
    refuse_idle("x", ShortGPT(count=0), DENSE)


def test_a_fifth_of_three_heads_is_none():
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}
    three = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, intermediate_size=8))
    with pytest.raises(UserError, match=r"ratio=0\.2 rounds down to nothing"):
        refuse_idle("wgsef_heads", OnText(atoms="heads", ratio=0.2), inspect_model(three))


COUNTS = st.builds(
    SizeAndWork,
    parameters=st.integers(2, 5),
    packed=st.integers(0, 3),
    bytes=st.integers(1, 5),
    flops=st.none() | st.integers(1, 5).map(float),
    held=st.integers(0, 2),
    padding=st.integers(0, 2),
    nonzero=st.none() | st.integers(0, 3),
)


@given(COUNTS, COUNTS)
def test_every_claim_stands_exactly_if_its_count_falls(before, after):
    def stands(effect):
        return check_effect(effect, before, after).refutation is None

    def weights(counts):
        return counts.parameters + counts.held - counts.padding

    fewer, smaller = weights(after) < weights(before), after.bytes < before.bytes
    removed = fewer and smaller
    quantized = after.packed > before.packed or (smaller and not fewer)
    counted = before.flops is not None and after.flops is not None
    skipped = counted and after.flops < before.flops
    claims = {"removed": removed, "quantized": quantized, "skipped": skipped}
    assert {effect: stands(effect) for effect in claims} == claims
    saved = any(claims.values())
    assert [stands(effect) for effect in ("masked", "none")] == [not saved] * 2
    known = before.nonzero is not None and after.nonzero is not None
    assert stands("zeroed") == (not saved and known and after.nonzero < before.nonzero)


@pytest.mark.parametrize(("effect", "true"), [("quantized", "none"), ("removed", "zeroed")])
def test_a_refuted_saving_names_the_effect_that_fits(effect, true):
    counts = SizeAndWork(parameters=9, packed=0, bytes=36, flops=1.0)
    assert check_effect(effect, counts, counts).refutation.endswith(f" have the effect {true}")


def test_an_error_after_apply_names_the_line_of_the_innermost_method():
    from tests.end_to_end.test_plugins import Odd

    methods = {"camera_p": CameraP(ratio=0.2), "odd": Odd(act="raise")}
    with pytest.raises(KeyError) as caught, later_errors_attributed(methods):
        methods["odd"].apply(None, None)
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"in the code of a method \(.*test_plugins\.py:\d+\)", note)
    with pytest.raises(KeyError) as caught, later_errors_attributed({}):
        raise KeyError
    assert not hasattr(caught.value, "__notes__")


def test_zeroed_weights_that_are_offloaded_are_not_confirmed():
    counts = SizeAndWork(parameters=9, packed=0, bytes=36, flops=1.0)
    refutation = check_effect("zeroed", counts, counts).refutation
    assert refutation == "reports zeroed weights, which cannot be confirmed: they are offloaded"
