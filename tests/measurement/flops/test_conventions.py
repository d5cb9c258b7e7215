"""The papers' totals, by their own conventions, on networks of the true size without weights."""

import pytest
import torch
import transformers

from bench.measurement.flops.analytic import CallTokens, decoder_macs, text_config
from bench.measurement.flops.analytic_vlm import image_prompt_macs, visual_layers
from bench.measurement.flops.conventions import CONVENTION_UNITS, CONVENTIONS, ConventionInputs
from bench.models.macs import VisualLayer, macs_by_part, matrix_weights
from bench.models.structure.model_structure import inspect_model
from methods.visual_engine.cost.flops import VisualFlops
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.settings import Window
from methods.visual_tokens.head_pruning import RELEASED_HEAD_COUNTS

TOKEN, VISUAL = 32000, 576
SIZES = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}


def llava(size, scale=1):
    """LLaVA-1.5 without weights; a scaled one has every width and the image's area divided."""
    width, inner, layers = SIZES[size]
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width // scale,
        "intermediate_size": inner // scale,
        "num_hidden_layers": layers,
        "num_attention_heads": layers,
        "num_key_value_heads": layers,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    if scale > 1:
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        vision |= small | {"num_attention_heads": 1, "image_size": 14 * 6}
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=TOKEN
    )
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(config).eval()


def call(before=35, visual=VISUAL, after=11, side=336):
    """A prompt with one image."""
    ids = [5] * before + [TOKEN] * visual + [7] * after
    pixels = torch.empty(1, 3, side, side, device="meta")
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


@pytest.fixture(scope="module", params=["7b", "13b"])
def model(request):
    return request.param, llava(request.param)


TOTALS = {
    "7b": {"yopo": 7.634, "pyramiddrop": 3.817, "visionzip": 3.817, "vtw": 3.232},
    "13b": {"yopo": 14.888},
}


def paper(name, network, inputs):
    config = text_config(network)
    layers = visual_layers(network, inspect_model(network), inputs)
    text = int((inputs["input_ids"] != TOKEN).sum())
    sizes = ConventionInputs(config.hidden_size, config.intermediate_size, text, layers)
    return CONVENTIONS[name](sizes) / 1e12


def test_totals_that_papers_print(model):
    size, network = model
    for name, total in TOTALS[size].items():
        assert paper(name, network, call()) == pytest.approx(total, abs=6e-4), name


def test_this_suites_own_count_of_visual_rows_alone_is_the_papers(model):
    """Without text and grouped keys nothing is counted differently, and the shares are spec 2's."""
    size, network = model
    inputs = call(before=0, after=0)
    layout = CallTokens.prompt(inputs["input_ids"] == TOKEN)
    layers = inspect_model(network).layers
    parts = macs_by_part(decoder_macs(layers, text_config(network), layout))
    total = sum(parts.values())
    assert 2 * total / 1e12 == pytest.approx(TOTALS[size]["yopo"], abs=6e-4)
    attention = VISUAL * sum(matrix_weights(layer.self_attn) for layer in layers) / total
    shares = (attention, parts["visual"] / total - attention, parts["attention"] / total)
    expected = {"7b": (0.324, 0.653, 0.023), "13b": (0.325, 0.657, 0.018)}[size]
    assert shares == pytest.approx(expected, abs=6e-4)


def test_a_whole_prefill_of_the_7b_model(model):
    """By hand: CLIP-L/336 on 577 rows, the projector, 622 rows of Llama, one row of the head."""
    size, network = model
    width, inner, depth = SIZES[size]
    parts = macs_by_part(image_prompt_macs(network, inspect_model(network), call()))
    rows, seen = 35 + VISUAL + 11, VISUAL
    tower = 24 * (577 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 577**2 * 1024)
    assert parts["vision"] == tower + VISUAL * 1024 * 3 * 14**2
    assert parts["projector"] == VISUAL * (1024 * width + width**2)
    assert parts["attention"] == depth * 2 * rows**2 * width
    assert parts["visual"] == seen * depth * (4 * width**2 + 3 * width * inner)
    assert parts["text"] == (rows - seen) * depth * (4 * width**2 + 3 * width * inner)
    assert parts["head"] == width * 32064


def plan(kept, neurons, windowed=True, depth=32):
    """Half of the layers with visual tokens; heads are kept in all of them."""
    shown = [VisualLayer(VISUAL, kept, neurons, windowed)] * (depth // 2)
    return [*shown, *[VisualLayer(0, kept, 1.0, windowed)] * (depth - depth // 2)]


@pytest.mark.parametrize(
    ("size", "kept", "neurons", "label"),
    [("7b", 0.75, 0.5, 0.254), ("7b", 0.5, 0.25, 0.122), ("13b", 0.75, 0.5, 0.256),
     ("13b", 0.5, 0.25, 0.123)],
)  # fmt: skip
def test_labels_follow_from_squared_heads(size, kept, neurons, label):
    width, inner, depth = SIZES[size]
    whole = ConventionInputs(width, inner, 0, [VisualLayer(VISUAL)] * depth)
    part = ConventionInputs(width, inner, 0, plan(kept, neurons, depth=depth))
    yopo = CONVENTIONS["yopo"]
    assert yopo(part) / yopo(whole) == pytest.approx(label, abs=1e-3)


def test_the_papers_share_of_qwen2_vl():
    whole = [VisualLayer(2867)] * 28
    kept = [VisualLayer(2867, 0.5)] * 24 + [VisualLayer(0, 0.5)] * 4
    yopo, sizes = CONVENTIONS["yopo"], (3584, 18944, 0)
    assert yopo(ConventionInputs(*sizes, whole)) / 1e12 == pytest.approx(44.25, abs=0.01)
    share = yopo(ConventionInputs(*sizes, kept)) / yopo(ConventionInputs(*sizes, whole))
    assert share == pytest.approx(0.6895, abs=2e-4)


def test_withdrawal_and_pyramids_as_papers_print_them():
    width, inner, _ = SIZES["7b"]
    withdrawn = [VisualLayer(VISUAL)] * 16 + [VisualLayer(0)] * 16
    vtw = CONVENTIONS["vtw"](ConventionInputs(width, inner, 46, withdrawn)) / 1e12
    assert vtw == pytest.approx(1.7, abs=0.05)
    stages = [VisualLayer(n) for n in (576, 288, 144, 72) for _ in range(8)]
    pyramid = CONVENTIONS["pyramiddrop"](ConventionInputs(width, inner, 46, stages)) / 1e12
    assert pyramid == pytest.approx(1.78, abs=0.01)


@pytest.mark.parametrize(
    ("mask", "neurons", "linear"), [("llava_7b_24", 2, 0.282), ("llava_7b_16", 4, 0.160)]
)
def test_linear_shares_of_what_really_runs(mask, neurons, linear):
    """Spec 2 with the released heads: a sixteenth of the 7B model, whose shares are the same."""
    network = llava("7b", scale=16).to_empty(device="cpu").requires_grad_(False)
    network.model.language_model.rotary_emb.inv_freq.fill_(1.0)
    engine = VisualEngine(network, inspect_model(network))
    whole = VisualFlops(engine)
    engine.plan.set_execution("skip")
    inputs = call(before=2, visual=36, side=14 * 6)
    dense = sum(p.macs for p in whole.prefill(inputs) if p.tokens == "visual")
    engine.plan.cut_at(16)
    engine.plan.keep_heads([tuple(range(count)) for count in RELEASED_HEAD_COUNTS[mask]])
    inner = network.config.text_config.intermediate_size
    engine.plan.keep_neurons([(torch.arange(inner // neurons),)] * 32)
    engine.plan.set_window(Window(0))
    left = sum(p.macs - p.masked for p in whole.prefill(inputs) if p.tokens == "visual")
    whole_share = 36 * 32 * (4 * 256**2 + 3 * 256 * 688 + 2 * 36 * 256)
    assert left / whole_share == pytest.approx(linear, abs=4e-3)
    assert dense < whole_share * 1.05


def test_a_convention_that_counts_multiply_adds_is_no_flop():
    """One visual token in one layer, no text: YOPO counts two per multiply-add, the rest one."""
    decoder = ConventionInputs(64, 128, 0, [VisualLayer(1)])
    exact = 4 * 64**2 + 3 * 64 * 128 + 2 * 64
    assert CONVENTIONS["yopo"](decoder) == 2 * exact
    assert CONVENTIONS["pyramiddrop"](decoder) == exact
    assert CONVENTION_UNITS["yopo"] == "FLOP"
    assert {unit for name, unit in CONVENTION_UNITS.items() if name != "yopo"} == {"MAC"}
    assert CONVENTION_UNITS.keys() == CONVENTIONS.keys()
