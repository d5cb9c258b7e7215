"""Methods in an order that cannot work are refused by what they declare, before any is applied."""

import copy
import dataclasses
from typing import ClassVar

import pytest
from torch import nn

from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.method import ALL_FORMS, Method, MethodReport
from bench.models import loading
from bench.models.replaced_modules import weight_forms
from bench.models.source import resolve_model
from bench.runner.inputs import check_run, resolve_calibration_inputs
from bench.runner.method_application import apply_methods, refuse_impossible_order
from bench.runner.session import Session
from bench.ui import SILENT

SMALL = [
    "calibration.rows=2",
    "calibration.length=64",
    "offline=true",
    "tracker=none",
    "ratio=0.25",
]


def config_of(methods, *more):
    # Of a mixture of experts, flap removes heads only.
    own = ["method.flap.units=heads"] if "flap" in methods.split(",") else []
    return compose_run_config([f"method=[{methods}]", *SMALL, *own, *more])


@pytest.mark.sample(4)
@pytest.mark.parametrize(("methods", "cure"), [
    ("rtn,camera_p", "list camera_p before rtn"),
    ("camera_q,camera_p", "list camera_p before camera_q"),
    ("rtn,gptq", "use gptq or rtn, not both"),
    ("rtn,wgsef_heads", "list wgsef_heads before rtn"),
    ("rtn,flap", "list flap before rtn"),
    ("d2_moe,camera_q", "use camera_q or d2_moe, not both"),
    ("camera_p,d2_moe", "use d2_moe or camera_p, not both"),
    ("camera_p,rtn,naee", "list naee before camera_p"),
])  # fmt: skip
def test_an_order_that_cannot_work(tmp_path, methods, cure):
    with pytest.raises(UserError, match=cure):
        check_run(config_of(methods, f"results_dir={tmp_path}"), Session())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "methods",
    ["camera_p,rtn", "wgsef_heads,camera_p,camera_q", "rtn,shortgpt", "naee,d2_moe", "d2_moe,flap"],
)
def test_an_order_that_works(tmp_path, methods):
    check_run(config_of(methods, f"results_dir={tmp_path}"), Session())


def test_a_training_that_begins_anew_comes_first():
    own = ("model=micro_resnet", "benchmark=images")
    config = compose_run_config(["method=[train,wgsef]", *own])
    with pytest.raises(UserError, match="which discards the result of train"):
        refuse_impossible_order(config, set())
    kept = compose_run_config(["method=[train,wgsef]", "method.wgsef.restart=false", *own])
    refuse_impossible_order(kept, set())


def test_zeroed_experts_keep_their_form():
    refuse_impossible_order(config_of("camera_p,d2_moe", "method.camera_p.state=zeroed"), set())


def test_a_folder_of_quantized_weights_is_refused_like_a_method_that_packs():
    config = config_of("camera_p")
    with pytest.raises(UserError, match="method=camera_p cannot change the weights of model=micro"):
        refuse_impossible_order(config, {"packed"})
    refuse_impossible_order(config_of("shortgpt"), {"packed"})


def test_a_quantized_checkpoint_takes_only_methods_that_leave_weights_alone():
    refuse_impossible_order(config_of("fastv", "model=micro_llava"), {"prequantized"})
    for method in ("shortgpt", "camera_p", "rtn", "wanda"):
        with pytest.raises(UserError, match=f"method={method} .* quantized in the checkpoint"):
            refuse_impossible_order(config_of(method), {"prequantized"})


class Foreign(Method):
    """A method of someone who does not know of forms."""

    seen: ClassVar[list[object]] = []

    def check(self, structure):
        pass

    def apply(self, model, context):
        return MethodReport("none")


def test_a_method_that_declares_nothing_takes_and_leaves_everything():
    config = config_of("rtn")
    both = config.model_copy(update={"method": {**config.method, "foreign": Foreign()}})
    refuse_impossible_order(both, set())
    assert Foreign().accepts == ALL_FORMS
    pruned = both.model_copy(update={"method": {"foreign": Foreign(), **config.method}})
    refuse_impossible_order(pruned, set())


def test_a_method_for_images_needs_a_model_that_sees(tmp_path):
    with pytest.raises(UserError, match="wgsef_visual_heads needs a vision-language model"):
        check_run(config_of("wgsef_visual_heads", f"results_dir={tmp_path}"), Session())


FIRST = ["rtn", "d2_moe", "bitsmoe_style", "camera_p", "naee", "wgsef_heads"]
SECOND = ["gptq", "d2_moe", "magnitude", "naee", "wgsef_heads", "flap", "shortgpt", "reap"]


@pytest.fixture(scope="module")
def micro_moe():
    return loading.load_model(resolve_model(config_of("rtn").model, offline=True))


def applied(model, methods):
    config = config_of(methods)
    own = dataclasses.replace(model, network=copy.deepcopy(model.network))
    context = resolve_calibration_inputs(config).prepare(config, own, SILENT)
    with Session() as session:
        apply_methods(config, own, context, session)
    return own


@pytest.mark.broad
def test_what_is_declared_is_what_is_left(micro_moe):
    plain: nn.Module = micro_moe.network
    assert weight_forms(plain) == set()
    for name, form in {
        "rtn": "packed",
        "d2_moe": "shared_base",
        "mone": "novices",
        "bitsmoe_style": "packed",
        "camera_p": "ragged",
    }.items():
        (method,) = config_of(name).method.values()
        assert method.leaves == form
        assert weight_forms(applied(micro_moe, name).network) == {form}


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("second", SECOND)
def test_every_order_is_refused_up_front_or_works(micro_moe, first, second):
    if first == second:
        return
    config = config_of(f"{first},{second}")
    try:
        refuse_impossible_order(config, set())
    except UserError:
        # The refusal is true: the second method does not fit what the first one leaves.
        changed, method = applied(micro_moe, first), config_of(second).method[second]
        with pytest.raises((UserError, AttributeError)):
            method.check(changed.structure)
            applied(changed, second)
    else:
        applied(micro_moe, f"{first},{second}")
