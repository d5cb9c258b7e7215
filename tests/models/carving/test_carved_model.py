"""A carved network is the dense one with all experts, and one without the others with fewer."""

import pytest
import torch
import transformers

from bench.cli.main import main
from bench.errors import UserError
from bench.models.carving.carved_model import carve_model, refuse_uncarvable
from bench.models.carving.neurons import ExpertLayout
from bench.models.loading import load_model
from bench.models.model import Model
from bench.models.source import resolve_model
from bench.schema import ModelConfig
from bench.ui import SILENT
from tests.models.tiny_networks import SIZES, VOCABULARY, save

LAYOUT = ExpertLayout(experts=4, shared=2)


def dense_network(tied, **settings):
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 24, "num_attention_heads": 4, "hidden_size": 32}
    config = transformers.LlamaConfig(
        **sizes | {"tie_word_embeddings": tied, "initializer_range": 0.3} | settings
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def carve(network, chosen, layout=LAYOUT):
    config = ModelConfig(name="tiny", source="local", path="tiny")
    model = Model(config, network, None, "", None, torch.device("cpu"))
    torch.manual_seed(1)
    rows = torch.randint(0, VOCABULARY, (4, 32))
    return carve_model(model, rows, layout, chosen, SILENT)


def reloaded(network, folder):
    """The folder's network, by transformers alone."""
    network.save_pretrained(folder)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(2)
    return torch.randint(0, VOCABULARY, (2, 24))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [2, 4])
def test_with_all_experts_stock_transformers_computes_the_dense_logits(
    tied, heads, tokens, tmp_path
):
    dense = dense_network(tied, num_key_value_heads=heads, rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 5e4,
    })  # fmt: skip
    carved = reloaded(carve(dense, chosen=4), tmp_path)
    expected = dense(tokens).logits
    assert float((carved(tokens).logits - expected).abs().max() / expected.abs().max()) < 1e-5
    assert carved.num_parameters() == dense.num_parameters() + 3 * 4 * 32


def test_chosen_experts_have_weight_1_and_are_those_of_highest_score(tokens, tmp_path):
    dense = dense_network(tied=True)
    carved = reloaded(carve(dense, chosen=2), tmp_path)
    block = carved.model.layers[1].mlp
    x = torch.randn(50, 32)
    _, weights, index = block.gate(x)
    assert torch.allclose(weights, torch.ones_like(weights), atol=5e-5)
    scores = x @ block.gate.weight.T / 4 + block.gate.e_score_correction_bias
    # Scores closer than float32 tells sigmoids apart may be taken for each other.
    chosen, best = scores.gather(1, index), scores.topk(2, dim=1).values
    assert torch.allclose(chosen.sum(1), best.sum(1), atol=2.0**-23)

    total = block.shared_experts(x)
    for expert in range(4):
        taken = (index == expert).any(1, keepdim=True)
        gate, up = (x @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        total += taken * ((torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[expert].T)
    assert torch.allclose(block(x[None])[0], total, atol=1e-3)


def test_one_folder_serves_every_number_of_experts(tokens, tmp_path):
    dense = dense_network(tied=True)
    expected = dense(tokens).logits
    reloaded(carve(dense, chosen=1), tmp_path)
    error = [
        float(
            (
                transformers.AutoModelForCausalLM.from_pretrained(
                    tmp_path, num_experts_per_tok=chosen
                )(tokens).logits
                - expected
            ).norm()
        )
        for chosen in (1, 2, 3, 4)
    ]
    assert error == sorted(error, reverse=True)
    assert error[-1] < 1e-4 * float(expected.norm())


@pytest.mark.parametrize(
    ("settings", "layout", "chosen", "words"),
    [
        ({"mlp_bias": True}, LAYOUT, 2, "has biases"),
        ({"intermediate_size": 26}, LAYOUT, 2, "26 neurons cannot be divided into 6"),
        ({}, ExpertLayout(1, 1), 1, "--experts 1: a router needs at least 2"),
        ({}, LAYOUT, 5, "--chosen 5: a token can have from 1 to 4"),
    ],
)
def test_what_cannot_be_carved_is_refused_by_its_config(settings, layout, chosen, words):
    with pytest.raises(UserError, match=words):
        refuse_uncarvable(dense_network(tied=True, **settings).config, layout, chosen)


def test_another_architecture_is_refused():
    with pytest.raises(UserError, match="this one is a qwen3"):
        refuse_uncarvable(transformers.Qwen3Config(), LAYOUT, 2)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save(dense_network(tied=True), folder)
    return folder


def carve_words(dense_folder, target, *more):
    text = target.parent / "text.txt"
    text.write_text(" ".join(f"w{n % 50 + 3}" for n in range(2000)))
    chosen = [f"model={dense_folder}", "model.device=cpu", "offline=true"]
    words = ["calibration=text", f"calibration.path={text}", "calibration.rows=2"]
    layout = ["--experts", "4", "--shared", "2"]
    return ["carve", str(target), *chosen, *layout, *words, "calibration.length=32", *more]


def test_the_command_writes_a_folder_that_methods_for_experts_take(dense_folder, tmp_path, capsys):
    target = tmp_path / "carved"
    assert main(carve_words(dense_folder, target, "--chosen", "3")) == 0
    assert "a shared expert and 4 routed ones, of which a token uses 3" in capsys.readouterr().out
    source = resolve_model(ModelConfig(name="c", source="local", path=str(target)), offline=True)
    structure = load_model(source).structure
    assert [(b.num_experts, b.top_k, b.d_shared) for b in structure.moe] == [(4, 3, 8)] * 3


def test_the_command_refuses_before_weights_are_read(dense_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.models.loading.load_model", None)
    target = tmp_path / "carved"
    assert main(carve_words(dense_folder, target, "--chosen", "5")) == 2
    assert "--chosen 5" in capsys.readouterr().err
    assert not target.exists()
    target.mkdir()
    (target / "mine").write_text("")
    assert main(carve_words(dense_folder, target, "--chosen", "3")) == 2
    assert "is not an empty folder" in capsys.readouterr().err
