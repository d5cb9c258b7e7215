"""Tiny random vision-language models with processors of their real classes, made in a second."""

import copy

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from bench.models.model import Model
from bench.schema import ModelConfig

IMAGE, PAD, END, BEGIN = "<image>", "<pad>", "</s>", "<s>"
SPECIAL = (PAD, BEGIN, END, IMAGE, "<video>", "<img>", "</img>")
WORDS = ("yes", "no", "red", "blue", "A", "B", "C", "D", "0", "1", "square", "circle")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
}
CHATML = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer(**named):
    """A word of WORDS, or else a character, is a token."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = list(dict.fromkeys([*SPECIAL, *characters, *WORDS]))
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token=" "))
    words = "|".join(sorted((w for w in WORDS if len(w) > 1), key=len, reverse=True))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(f"{words}|[\\s\\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BEGIN, eos_token=END, **named
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[3:])})
    return tokenizer


def random(network, seed):
    """Give a network weights that are large enough to matter."""
    torch.manual_seed(seed)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.5)
        if weight.ndim == 1:
            weight.data += 1
    network.generation_config.eos_token_id = 2
    network.generation_config.pad_token_id = 0
    return network.eval().requires_grad_(False)


def wrap(name, network, processor, **settings):
    return Model(
        config=ModelConfig(name=name, source="embedded:tiny", kind="image_text", **settings),
        network=network,
        tokenizer=processor.tokenizer,
        processor=processor,
        fingerprint=name,
        revision=None,
        device=torch.device("cpu"),
    )


def make_llava(seed=0, **settings) -> Model:
    tokenizer = make_tokenizer()
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=20),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config=CLIP,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    network = random(transformers.LlavaForConditionalGeneration(config), seed)
    return wrap(f"llava{seed}", network, processor, **settings)


def make_qwen(seed=0) -> Model:
    tokenizer = make_tokenizer(
        extra_special_tokens={"image_token": IMAGE, "video_token": "<video>"}
    )
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=900
    )
    videos = transformers.Qwen2VLVideoProcessor(patch_size=4, temporal_patch_size=2, merge_size=2)
    processor = transformers.Qwen2VLProcessor(
        images, tokenizer, videos, chat_template=CHATML.replace("IMAGE", "'<img><image></img>'")
    )
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2VLConfig(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "rope_parameters": MROPE},
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=ids(IMAGE),
        video_token_id=ids("<video>"),
        vision_start_token_id=ids("<img>"),
        vision_end_token_id=ids("</img>"),
    )  # fmt: skip
    return wrap(
        "qwen", random(transformers.Qwen2VLForConditionalGeneration(config), seed), processor
    )


def make_internvl(seed=0) -> Model:
    tokenizer = make_tokenizer(
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": IMAGE, "video_token": "<video>",
        }
    )  # fmt: skip
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 16, "width": 16}),
        image_seq_length=16,
        chat_template=CHATML.replace("IMAGE", f"'{IMAGE}'"),
    )
    config = transformers.InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": [16, 16], "patch_size": [2, 2],
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=16,
    )  # fmt: skip
    return wrap(
        "internvl", random(transformers.InternVLForConditionalGeneration(config), seed), processor
    )


MAKERS = {"llava": make_llava, "qwen2_vl": make_qwen, "internvl": make_internvl}


@pytest.fixture(scope="session")
def mllms():
    """One model of each architecture, by name; nobody changes them."""
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture
def llava(mllms):
    return copy.copy(mllms["llava"])
