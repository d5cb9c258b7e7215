"""Every shipped method is applied once, and the counts do not contradict what it reports."""

import copy
from types import SimpleNamespace

import pytest
import torch

from bench.config.composition import compose_run_config, config_names
from bench.data.calibration import Calibration
from bench.data.conversations import embedded_conversations
from bench.data.prompts import ProcessedPrompts
from bench.data.synthetic.scenes import training_conversations
from bench.errors import UserError
from bench.method import Context
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.embedded.micro_llava.network import new_model, new_processor
from bench.models.model import Model
from bench.runner.method_application import apply_methods
from bench.runner.session import Session
from bench.schema import CostsConfig, ModelConfig
from tests.models.tiny_networks import build, build_dense, tokens

COSTS = CostsConfig(name="tiny", length=8)
NAMES = config_names("method")
SHORT = {"recipe": {"epochs": 1, "batch": 200}, "steps": 2, "count": 4, "batch": 2, "accumulate": 1}
"""How long a method trains, for those that have these knobs."""
FITTING = {"sparsevlm": {"layers": (1, 2, 3)}, "wgsef_visual_heads": {"ratio": 0.5}}
"""Knobs whose usual values do not fit so small a model."""
QUICK = {
    "awq", "camera_p", "camera_pq", "d2_moe", "expert_frequency", "fastv", "flap", "layer_drop",
    "llm_pruner", "magnitude", "mc", "naee", "rtn", "shortgpt", "visionzip", "visual_finetune",
    "wanda", "wgsef", "wgsef_heads", "wgsef_visual_heads", "yopo_25",
}  # fmt: skip
"""One of each kind; the others, marked slow, change weights in the same ways."""


@pytest.fixture(scope="module")
def methods():
    """All methods by name, from one composition."""
    return compose_run_config([f"method=[{','.join(NAMES)}]", "ratio=0.4"]).method


@pytest.fixture(scope="module")
def models():
    """One tiny model of each kind, smallest first."""
    said = training_conversations.draw_conversations("train", 40, 3)
    processor = new_processor([f"{q} {a}" for talk in said for q, a in talk.turns], 300)
    torch.manual_seed(0)
    vision = VisionConfig(architecture="micro_vgg", channels=1, size=8)
    networks = [
        ("causal_lm", build("qwen2_moe", hidden_size=32, moe_intermediate_size=32), None),
        ("causal_lm", build_dense("llama_biased", num_hidden_layers=7), None),
        ("image_classifier", build_classifier(vision), None),
        ("image_text", new_model(processor).eval().requires_grad_(False), processor),
    ]
    return [
        Model(
            ModelConfig(name=kind, source="tests", kind=kind), network, reader and reader.tokenizer,
            "", None, torch.device("cpu"), reader,
        )
        for kind, network, reader in networks
    ]  # fmt: skip


def smallest(models, method):
    """Return a copy of the first model that a method accepts."""
    for model in models:
        if method.uses_prompts and model.processor is None:
            continue
        try:
            method.check(model.structure)
        except UserError as error:
            refusal = error
        else:
            return copy.deepcopy(model)
    raise refusal


def prompts_of(model):
    """Return one image with a question, as the model's processor encodes it; None without one."""
    if model.processor is None:
        return None
    (talk,) = embedded_conversations(1, 0)
    chat = [{"role": "user", "content": f"<image>\n{talk.turns[0][0]}"}]
    text = model.processor.apply_chat_template(chat, add_generation_prompt=True)
    call = model.processor(images=[talk.image], text=[text], return_tensors="pt")
    return ProcessedPrompts.of([dict(call)])


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_shipped_method_is_not_marked(name, methods, models):
    given = methods[name]
    knobs = {key: value for key, value in SHORT.items() if key in type(given).model_fields}
    method = type(given).model_validate(given.model_dump() | knobs | FITTING.get(name, {}))
    model = smallest(models, method)
    context = Context(0, Calibration(tokens(), "calibration"), prompts_of(model))
    config = SimpleNamespace(method={name: method}, costs=COSTS)
    with Session() as session:
        (applied,) = apply_methods(config, model, context, session)
    assert applied.check.refutation is None
    assert applied.confirmed_effect == applied.effect
