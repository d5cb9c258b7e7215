"""micro_llava before training: tokenizer, processor and architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from bench.data.synthetic.scenes import IMAGE_SIZE, tasks
from bench.models.embedded.training import END, PAD, byte_level_bpe

IMAGE = "<image>"
PATCH = 8
VISUAL_TOKENS = (IMAGE_SIZE // PATCH) ** 2
MAX_LENGTH = 512

# Content is one string with `<image>`, as lmms-eval's llava_hf passes it, or a list of parts, as
# processors take it; both give the same text.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}{{ ':\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)

# The harness's fixed sentences are one token each, as whole words are: they make up half of a
# prompt.
PHRASES = (tasks.SHORT_ANSWER_SUFFIX, tasks.LETTER_SUFFIX, " There are several options:\n")

# Digits are split one by one, so that every number is made of tokens the model has seen.
_WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def new_processor(texts: Iterable[str], vocabulary: int) -> LlavaProcessor:
    """Return a processor whose byte-level BPE is trained on the texts; any text round-trips."""
    # Without the phrases, which would otherwise fill the small vocabulary with their fragments.
    words = byte_level_bpe(_without_phrases(texts), vocabulary, _WORDS, [PAD, END, IMAGE])
    words.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        # CLIP's class token, which the strategy `default` drops: the processor subtracts it again.
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _without_phrases(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts without the sentences that are single tokens."""
    for text in texts:
        for phrase in PHRASES:
            text = text.replace(phrase, "\n")  # noqa: PLW2901
        yield text


def new_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Return an untrained model: four vision layers, six decoder layers of eight heads."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)
