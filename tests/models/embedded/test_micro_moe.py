"""The committed micro_moe: it loads as any model does, and is as good as its log says."""

import json
import math
import platform
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2MoeForCausalLM,
)

from bench.data import calibration
from bench.data.synthetic.world import entities, question_sets
from bench.models.embedded.micro_moe import FOLDER, recipe

CHANCE = {
    "boolq": 1 / 2,
    "openbookqa": 1 / 4,
    "rte": 1 / 2,
    "arc_easy": 1 / 4,
    "winogrande": 1 / 2,
    "hellaswag": 1 / 4,
    "arc_challenge": 1 / 4,
    "piqa": 1 / 2,
    "mathqa": 1 / 5,
}
LOG: dict[str, Any] = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def model() -> Qwen2MoeForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    assert isinstance(loaded, Qwen2MoeForCausalLM)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_is_a_small_mixture_with_routed_and_shared_experts(model: Qwen2MoeForCausalLM) -> None:
    assert 2e6 < model.num_parameters() < 4e6
    assert model.config.num_experts >= 8
    assert model.config.shared_expert_intermediate_size > 0
    assert model.config.max_position_embeddings >= 512
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) < 10e6


@given(text=st.text())
def test_any_text_round_trips(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_small_numbers_are_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(len(tokenizer(f" {number}")["input_ids"]) == 1 for number in range(1, 100))


def test_context_and_answer_meet_between_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for task in question_sets.TASKS:
        for document in question_sets.documents(task, "test")[:50]:
            for context, continuation in entities.render_question(task, document).choices:
                parts = [tokenizer(text)["input_ids"] for text in (context, continuation)]
                assert tokenizer(context + continuation)["input_ids"] == parts[0] + parts[1]


def test_log_is_of_this_world_and_this_english() -> None:
    assert LOG["world"] == {"seed": question_sets.SEED, "fingerprint": question_sets.fingerprint()}
    same_python = LOG["versions"]["python"].split(".")[:2] == [*platform.python_version_tuple()][:2]
    if same_python:
        assert LOG["english"]["fingerprint"] == calibration.fingerprint()


def test_every_task_is_learned_and_none_is_saturated() -> None:
    accuracies = LOG["results"]["accuracy"]
    gains = [accuracies[task] - CHANCE[task] for task in question_sets.TASKS]
    assert min(gains) >= 0.08
    assert sum(gains) / len(gains) >= 0.20
    assert max(accuracies.values()) < 0.99


@pytest.mark.parametrize("task", question_sets.TASKS)
@pytest.mark.slow
def test_accuracy_is_what_the_log_says(
    task: str, model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    measured = recipe.task_accuracy(model, tokenizer, task, question_sets.documents(task, "test"))
    assert measured == pytest.approx(LOG["results"]["accuracy"][task], abs=0.011)


@pytest.mark.broad
def test_perplexity_is_what_the_log_says_and_beats_word_counts(
    model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    measured = recipe.english_perplexity(model, tokenizer)
    assert measured < unigram_perplexity(tokenizer) / 3
    if LOG["english"]["fingerprint"] == calibration.fingerprint():
        assert measured == pytest.approx(LOG["results"]["english_perplexity"], rel=0.01)


def unigram_perplexity(tokenizer: PreTrainedTokenizerFast) -> float:
    counts = Counter(tokenizer(calibration.train_text(), verbose=False)["input_ids"])
    test = tokenizer(calibration.test_text(), verbose=False)["input_ids"]
    total = counts.total() + len(tokenizer)
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in test) / len(test))


@pytest.mark.broad
def test_no_expert_is_idle(model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = tokenizer(calibration.train_text(), verbose=False)["input_ids"][:4096]
    texts += tokenizer("\n".join(question_sets.corpus()[::200]))["input_ids"][:4096]
    with torch.no_grad():
        output = model(input_ids=torch.tensor(texts).view(-1, 512), output_router_logits=True)
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    for logits in output.router_logits:
        shares = torch.bincount(logits.topk(chosen).indices.flatten(), minlength=experts) / 8192
        assert shares.min() > 0.1 * chosen / experts
        assert shares.max() < 5 * chosen / experts


@pytest.mark.slow
def test_recipe_writes_a_complete_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = recipe.task_accuracy
    monkeypatch.setattr(
        recipe,
        "task_accuracy",
        lambda model, words, task, asked: scored(model, words, task, asked[:5]),
    )
    recipe.train_and_save(
        tmp_path, recipe.MicroMoeRecipe(steps=2, world_rows=8, english_rows=1, log_every=1)
    )
    names = {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    assert names <= {file.name for file in tmp_path.iterdir()}
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["settings"]["steps"] == len(log["curve"]) == 2
    assert set(log) == set(LOG)
