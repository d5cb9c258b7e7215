"""Checkpoints in LLaVA's own layout, rewritten for transformers: equal logits, or a sentence."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from bench.cli.main import main
from bench.models.loading import open_folder

WORDS = [f"w{number}" for number in range(61)]
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 20, "patch_size": 4,
}  # fmt: skip


class OriginalLlava:
    """LLaVA-1.5 as its own repository computes it, on the names of its checkpoints."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.language_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
        self.tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
        self.projector = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))
        for part in (self.language_model, self.tower, self.projector):
            part.eval().requires_grad_(False)
            for weight in part.parameters():
                nn.init.normal_(weight, std=0.2)

    def logits(self, before, pixels, after):
        """Logits of a prompt of words, one image and words."""
        seen = self.tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        embed = self.language_model.get_input_embeddings()
        rows = [embed(torch.tensor(before)), self.projector(seen), embed(torch.tensor(after))]
        return self.language_model(inputs_embeds=torch.cat(rows)[None]).logits[0, -1]

    def save(self, folder, *, shards=2, own_tower=False, **changes):
        folder.mkdir()
        tensors = {
            name: weight.clone() for name, weight in self.language_model.state_dict().items()
        }
        tensors |= {f"model.mm_projector.{n}": w for n, w in self.projector.state_dict().items()}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        if own_tower:
            tensors |= {f"model.vision_tower.vision_tower.{n}": w for n, w in own_tower.items()}
        config = TEXT | {
            "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 16,
            "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
        } | changes  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        places, names = {}, sorted(tensors)
        for number in range(shards):
            file = f"model-{number}.safetensors"
            part = {name: tensors[name].contiguous() for name in names[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {w: n + 3 for n, w in enumerate(WORDS)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def original():
    return OriginalLlava()


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    """The folders of a checkpoint, of its tower, and of the rewritten model."""
    place = tmp_path_factory.mktemp("llava")
    original.tower.save_pretrained(place / "clip")
    source = original.save(place / "old")
    assert main(["convert", str(source), str(place / "new"), "--tower", str(place / "clip")]) == 0
    return source, place / "clip", place / "new"


def test_the_rewritten_model_has_the_same_logits(original, converted):
    model = open_folder(converted[2], kind="image_text")
    image = Image.new("RGB", (40, 20), (200, 30, 90))
    call = model.processor(text=["w3 w9 <image> w4 w5"], images=[[image]], return_tensors="pt")
    ids = call["input_ids"][0].tolist()
    token = model.network.config.image_token_id
    assert ids.count(token) == 25 and token == 64
    first = ids.index(token)
    with torch.no_grad():
        ours = model.network(**call).logits[0, -1]
        wanted = original.logits(ids[:first], call["pixel_values"], ids[first + 25 :])
    assert (ours[: len(wanted)] - wanted).abs().max() < 1e-5
    # Rows of added tokens are averages, so none of them is ever the answer.
    assert ours[len(wanted) :].max() < wanted.max()
    assert model.network.config.text_config.vocab_size == len(ours) == 128


def test_images_are_padded_as_its_config_says(original, converted, tmp_path):
    assert open_folder(converted[2], kind="image_text").processor.image_processor.do_pad
    source = original.save(tmp_path / "crop", image_aspect_ratio=None)
    given = ["convert", str(source), str(tmp_path / "new"), "--tower", str(converted[1])]
    assert main(given) == 0
    assert not open_folder(tmp_path / "new", kind="image_text").processor.image_processor.do_pad


def test_a_tower_that_was_trained_with_the_model_is_its_own(original, converted, tmp_path):
    stored = load_file(converted[1] / "model.safetensors")
    names = {n if n.startswith("vision_model.") else f"vision_model.{n}": n for n in stored}
    trained = {name: stored[n] + 1 for name, n in names.items()}
    source = original.save(tmp_path / "old", own_tower=trained)
    given = ["convert", str(source), str(tmp_path / "new"), "--tower", str(converted[1])]
    assert main(given) == 0
    network = open_folder(tmp_path / "new", kind="image_text").network
    ours = {n: w for n, w in network.named_parameters() if "vision_tower" in n}
    theirs = dict(original.tower.named_parameters())
    assert len(ours) == len(theirs)
    for name, weight in ours.items():
        short = name.split("vision_tower.")[1].removeprefix("vision_model.")
        (other,) = (w for n, w in theirs.items() if n.removeprefix("vision_model.") == short)
        assert torch.allclose(weight, other + 1)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "llama"}, "not a llava_llama checkpoint"),
        ({"mm_projector_type": "linear"}, "mm_projector_type=linear"),
    ],
)
def test_what_is_no_llava_1_5_is_refused_before_anything_is_written(
    original, converted, tmp_path, capsys, changes, said
):
    source = original.save(tmp_path / "old", **changes)
    given = ["convert", str(source), str(tmp_path / "new"), "--tower", str(converted[1])]
    assert main(given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_unknown_weight_is_named(original, converted, tmp_path, capsys):
    source = original.save(tmp_path / "old", own_tower={"x": torch.ones(2)})
    file = source / "model-0.safetensors"
    tensors = load_file(file) | {"model.image_newline": torch.ones(32)}
    save_file(tensors, file, metadata={"format": "pt"})
    given = ["convert", str(source), str(tmp_path / "new"), "--tower", str(converted[1])]
    assert main(given) == 2
    assert "model.image_newline, which is not in LLaVA-1.5's layout" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
