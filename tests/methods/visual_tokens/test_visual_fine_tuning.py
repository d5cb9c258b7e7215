"""Training under strategies: what is trained on, what runs afterwards, and bad input."""

import json

import pytest
import torch

from bench.data.chat import Conversation
from bench.data.conversations import conversations_from_file, embedded_conversations
from bench.data.synthetic.scenes import training_conversations
from bench.errors import MissingData, UserError
from bench.method import Context
from bench.models.embedded.micro_llava.network import new_model, new_processor
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.schema import ModelConfig
from methods.visual_tokens.fine_tuning import (
    IGNORED,
    TrainingExamples,
    VisualFineTuning,
    trainable_parameters,
)
from methods.visual_tokens.strategies import LayerDrop, SparseFFN
from tests.models.tiny_networks import build as build_text

FEW = {"data": "embedded", "count": 8, "batch": 2, "accumulate": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def processor():
    said = training_conversations.draw_conversations("train", 40, 3)
    return new_processor([f"{q} {a}" for talk in said for q, a in talk.turns], 300)


@pytest.fixture
def model(processor):
    torch.manual_seed(0)
    network = new_model(processor).eval().requires_grad_(False)
    about = ModelConfig(name="new", source="tests", kind="image_text")
    return Model(about, network, processor.tokenizer, "", None, torch.device("cpu"), processor)


def picture():
    return embedded_conversations(1, 0)[0].image


def test_the_loss_is_on_answers_alone(processor):
    talks = [
        Conversation(picture(), [("What color is it?", "red"), ("How many circles?", "two")]),
        Conversation(picture(), [("Is there a star?", "no")]),
    ]
    batch = TrainingExamples(processor, 500).batch(talks)
    for number, talk in enumerate(talks):
        kept = batch["labels"][number] != IGNORED
        said = processor.tokenizer.decode(batch["labels"][number][kept])
        assert said.replace("<|end|>", " ").split() == [answer for _, answer in talk.turns]
        mask = batch["attention_mask"][number].bool()
        assert (batch["labels"][number][kept] == batch["input_ids"][number][kept]).all()
        assert not kept[~mask].any()


def test_the_tokens_are_those_of_the_whole_conversation(processor):
    talk = Conversation(picture(), [("What color is it?", "red"), ("How many circles?", "two")])
    ours = TrainingExamples(processor, 500).batch([talk])["input_ids"][0]
    messages = []
    for number, (question, answer) in enumerate(talk.turns):
        parts = [{"type": "image"}] if number == 0 else []
        text = [*parts, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    whole = processor.apply_chat_template(messages, tokenize=False).rstrip("\n")
    theirs = processor(images=[talk.image], text=[whole], return_tensors="pt")["input_ids"][0]
    assert ours.tolist() == theirs.tolist()


@pytest.mark.broad
def test_training_under_strategies_lowers_the_loss_and_leaves_the_tower(model):
    SparseFFN(keep=0.5, choose="first").apply(model, Context(seed=1))
    LayerDrop(layers=3).apply(model, Context(seed=1))
    before = {name: weight.clone() for name, weight in model.network.named_parameters()}
    report = VisualFineTuning(**FEW, epochs=6).apply(model, Context(seed=1))
    losses = report.details["losses"]
    assert report.details["steps"] == len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    changed = {n for n, w in model.network.named_parameters() if not torch.equal(w, before[n])}
    assert changed and not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any(weight.requires_grad for weight in model.network.parameters())
    assert report.details["trained_parameters"] == sum(
        w.numel() for w in trainable_parameters(model.network)
    )


@pytest.mark.broad
def test_what_was_trained_is_what_runs(model):
    """Weights cut out before the training must not serve the network after it."""
    half = model.network.to(torch.bfloat16)
    SparseFFN(keep=0.5, choose="first", reorder=False).apply(model, Context(seed=1))
    call = TrainingExamples(model.processor, 500).batch([embedded_conversations(1, 4)[0]])
    call.pop("labels")
    call["pixel_values"] = call["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        # Visual rows have no logits, and NaN equals nothing.
        before = half(**call).logits.nan_to_num()
        VisualFineTuning(**FEW).apply(model, Context(seed=1))
        after = half(**call).logits.nan_to_num()
        # The same weights in a network that was never asked anything before.
        fresh = new_model(model.processor).to(torch.bfloat16).eval()
        fresh.load_state_dict(half.state_dict())
        twin = Model(model.config, fresh, None, "", None, torch.device("cpu"), model.processor)
        SparseFFN(keep=0.5, choose="first", reorder=False).apply(twin, Context(seed=1))
        assert not torch.equal(before, after)
        assert torch.equal(fresh(**call).logits.nan_to_num(), after)


@pytest.mark.broad
def test_the_same_seed_trains_the_same(processor):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        network = new_model(processor).eval()
        about = ModelConfig(name="new", source="tests", kind="image_text")
        own = Model(about, network, None, "", None, torch.device("cpu"), processor)
        found.append(VisualFineTuning(**FEW, steps=2).apply(own, Context(seed=5)).details["losses"])
    assert found[0] == found[1]


def llava_file(folder, rows):
    file = folder / "talks.json"
    file.write_text(json.dumps(rows))
    return str(file)


def row(**changes):
    said = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a circle"},
    ]
    return {"id": "1", "image": "a.png", "conversations": said} | changes


def test_llavas_layout_is_read(tmp_path):
    picture().save(tmp_path / "a.png")
    text_only = {"id": "2", "conversations": row()["conversations"]}
    talks = conversations_from_file(llava_file(tmp_path, [row(), text_only]), str(tmp_path))
    assert len(talks) == 1
    assert talks[0].turns == [("What is it?", "a circle")]
    assert talks[0].image.size == picture().size


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"image": "a.png"}], "not in LLaVA's layout"),
        ([row(image="../../etc/passwd")], "outside the folder"),
        ([row(conversations=[{"from": "gpt", "value": "x"}] * 2)], "alternate"),
        ([], "no conversation with an image"),
    ],
)
def test_another_layout_is_one_sentence(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        conversations_from_file(llava_file(tmp_path, rows), str(tmp_path))


@pytest.mark.broad
def test_a_failed_training_leaves_the_network_as_it_runs(model):
    network = model.network.to(torch.bfloat16)
    with pytest.raises(UserError, match="the loss is NaN or infinite"):
        VisualFineTuning(**FEW | {"learning_rate": 1e30}, epochs=6).apply(model, Context(seed=1))
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert not any(
        weight.requires_grad or weight.grad is not None for weight in network.parameters()
    )
    assert not network.training


def test_what_cannot_be_trained_is_refused(tmp_path, model):
    with pytest.raises(MissingData, match=r"none\.json"):
        conversations_from_file(str(tmp_path / "none.json"), str(tmp_path))
    with pytest.raises(UserError, match="fewer than the"):
        VisualFineTuning(**FEW | {"count": 2}).apply(model, Context(seed=1))
    with pytest.raises(UserError, match="longest=20"):
        VisualFineTuning(**FEW, longest=20).apply(model, Context(seed=1))
    with pytest.raises(UserError, match="not a supported vision-language model"):
        VisualFineTuning(**FEW).check(inspect_model(build_text("qwen2_moe")))
    with pytest.raises(ValueError, match="needs path and images"):
        VisualFineTuning()
