"""A tiny random mixture-of-experts model with its own tokenizer, made in a second."""

import copy

import pytest
import torch

from bench.data import calibration
from bench.models.model import Model
from bench.schema import ModelConfig

END = "<|end|>"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """For matrices this small a second thread only waits, on a busy machine for very long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    fast = ByteLevelBPETokenizer()
    fast.train_from_iterator([calibration.test_text()[:40_000]], 600, special_tokens=[END])
    return PreTrainedTokenizerFast(tokenizer_object=fast._tokenizer, eos_token=END)


def make_model(tokenizer, seed: int = 0, max_length: int | None = None) -> Model:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # far from uniform, so that wrong answers differ from right ones
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Model(
        config=ModelConfig(name=f"tiny{seed}", source="embedded:tiny", max_length=max_length),
        network=Qwen2MoeForCausalLM(config).eval().requires_grad_(False),
        tokenizer=tokenizer,
        fingerprint=str(seed),
        revision=None,
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="session")
def model(tokenizer) -> Model:
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def other_model(tokenizer) -> Model:
    return make_model(tokenizer, seed=1)


@pytest.fixture
def short_model(tokenizer) -> Model:
    """The tiny model with a context so short that every long prompt is cut."""
    return make_model(tokenizer, max_length=24)


@pytest.fixture
def half_model(model) -> Model:
    half = copy.deepcopy(model.network).to(torch.bfloat16)
    return Model(model.config, half, model.tokenizer, "half", None, model.device)


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """Undo what a test does to the switch that keeps the process off the hub."""
    import datasets.config
    import huggingface_hub.constants

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
