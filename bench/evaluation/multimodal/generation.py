"""Greedy answers to questions about images, in real batches.

Suffixes: B batch, T padded length, I prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypedDict

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from bench.data.image_files import UnfitImage
from bench.evaluation.evidence import (
    Finish,
    Seen,
    check_length,
    settings_in_force,
    tokens_until_stop,
)
from bench.evaluation.metrics import NON_FINITE_LOGITS
from bench.evaluation.multimodal.prompts import (
    PER_TOKEN,
    EncodedPrompt,
    PromptEncoder,
    VisionFeatureCache,
    concatenate_outputs,
    image_hash,
    slice_tokens,
)
from bench.evaluation.multimodal.shared_prefix import (
    ImagePrefix,
    expand_prefix_cache,
    find_image_prefixes,
    prefill,
)
from bench.evaluation.networks import NonFiniteRows, language_model, pad_left
from bench.models.model import Model
from bench.schema import Overlong

MAX_ANSWER_TOKENS = 1024
"""Default of `max_new_tokens`, as in lmms-eval's own adapters."""
NetworkInputs: TypeAlias = dict[str, object]
"""Arguments of a forward that are not per token: pixels or features, grids, a KV cache."""
Ended: TypeAlias = tuple[str, Finish | None, int]
"""An answer, how it ended, and its number of tokens."""


class GenerationOptions(TypedDict, total=False):
    """The generation settings of a task that affect greedy decoding."""

    until: str | list[str] | None
    max_new_tokens: int | None


@dataclass(frozen=True)
class ImageQuestion:
    """A task's text for one document, its images, opened on demand, and its name in errors.

    `open_parts` returns texts and images in the order shown. Without it, images precede the text,
    or are where the text itself places them.
    """

    text: str
    open_images: Callable[[], list[Image.Image]]
    name: str = "a question"
    open_parts: Callable[[], list[str | Image.Image]] | None = None

    def rendered(self, prompts: PromptEncoder) -> tuple[str, list[Image.Image]]:
        """Return the full prompt, and its images in order."""
        if self.open_parts is None:
            images = self.open_images()
            return prompts.render(self.text, len(images)), images
        parts = self.open_parts()
        return prompts.render_parts(parts), [part for part in parts if not isinstance(part, str)]


@dataclass(frozen=True)
class Answer:
    """An answer, the full prompt, the hash of the images, and their sizes as seen by the model.

    If there is no answer, `text` is None and `missing` is the reason.
    """

    text: str | None
    prompt: str
    image_hash: str | None
    seen: Seen

    @property
    def missing(self) -> str | None:
        """Reason why there is no answer."""
        return self.seen.unanswered


class Generation:
    """One set of generation settings, ready to run on batches of questions.

    With `share`, the common prefix of questions about the same images is computed once.
    """

    def __init__(
        self,
        model: Model,
        prompts: PromptEncoder,
        features: VisionFeatureCache,
        options: GenerationOptions,
        share: bool = False,
        overlong: Overlong = "truncate",
    ) -> None:
        self._share = share
        self._overlong = overlong
        self._model = model
        self._network = language_model(model)
        self._prompts = prompts
        self._features = features
        until = options.get("until") or []
        self._until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        self._max_new_tokens = int(options.get("max_new_tokens") or MAX_ANSWER_TOKENS)
        # The generation config comes first, because chat models end a turn with a token other than
        # the tokenizer's EOS, and may list several.
        own = self._network.generation_config.eos_token_id
        ends = model.tokenizer.eos_token_id if own is None else own
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        pad = model.tokenizer.pad_token_id
        self._pad_token = int(pad if pad is not None else (self._ends or [0])[0])
        self.in_force = settings_in_force(
            self._network.generation_config.to_diff_dict(),
            {"do_sample": False, "num_beams": 1},
            max_new_tokens=self._max_new_tokens,
            until=self._until,
        )

    @torch.no_grad()
    def run(self, questions: Sequence[ImageQuestion]) -> list[Answer]:
        """Answer questions of any length, padded on the left."""
        answers: dict[int, Answer] = {}
        rendered: list[tuple[int, str, list[Image.Image]]] = []
        for index, question in enumerate(questions):
            try:
                rendered.append((index, *question.rendered(self._prompts)))
            except UnfitImage as error:
                answers[index] = Answer(None, "", None, Seen(0, 0, unanswered=str(error)))
        # From here a row is a rendered prompt, and its index the place of its question.
        keys = [image_hash(images) if images else None for _, _, images in rendered]
        encoded = [self._prompts.encode(prompt, images) for _, prompt, images in rendered]
        reasons = [
            self._check_length(questions[index].name, prompt["input_ids"].shape[1])
            for (index, _, _), prompt in zip(rendered, encoded, strict=True)
        ]
        fitting = [row for row, reason in enumerate(reasons) if reason is None]
        ended = self._answer([encoded[row] for row in fitting], [keys[row] for row in fitting])
        answered = dict(zip(fitting, ended, strict=True))
        for row, (index, prompt, _) in enumerate(rendered):
            end = answered.get(row)
            if end is None and reasons[row] is None and len(fitting) > 1:
                # Repeated alone, without padding or a shared prefix: see `IsolatingScorer`.
                (end,) = self._answer([encoded[row]], [keys[row]])
            text, finish, tokens = end or (None, None, 0)
            seen = Seen(
                encoded[row]["input_ids"].shape[1],
                tokens,
                finish=finish,
                unanswered=None if end else reasons[row] or NON_FINITE_LOGITS,
                image_sizes=self._prompts.image_sizes(encoded[row]),
            )
            answers[index] = Answer(text, prompt, keys[row], seen)
        return [answers[index] for index in range(len(questions))]

    def _check_length(self, name: str, width: int) -> str | None:
        """Return why a prompt of `width` tokens is skipped; None if an answer fits after it."""
        # Truncation on the left would remove image tokens, which networks refuse, so a prompt that
        # is too long is skipped instead of truncated.
        policy: Overlong = "refuse" if self._overlong == "refuse" else "skip"
        return check_length(policy, name, width, self._model.max_length - 1, self._model.name)

    def _answer(self, encoded: list[EncodedPrompt], hashes: list[str | None]) -> list[Ended | None]:
        """Answer prompts, in separate batches with and without a shared prefix."""
        # Two batches, because only one of them starts from a cache.
        prefixes: list[ImagePrefix] = []
        if self._share:
            prefixes = find_image_prefixes(encoded, hashes, self._network.config)
        limits = [self._token_limit(prompt["input_ids"].shape[1]) for prompt in encoded]
        sharing = [row for prefix in prefixes for row in prefix.rows]
        others = [row for row in range(len(encoded)) if row not in set(sharing)]
        answers: dict[int, Ended | None] = {}

        def write(rows: list[int], tokens: dict[str, Tensor], inputs: NetworkInputs) -> None:
            ended = self._generate(tokens, inputs, [limits[row] for row in rows])
            answers.update(zip(rows, ended, strict=True))

        if others:
            prompts = [encoded[row] for row in others]
            inputs = self._visual_inputs(prompts, [hashes[row] for row in others])
            write(others, self._padded(prompts), inputs)
        if sharing:
            write(sharing, *self._prefilled(prefixes, encoded, hashes))
        return [answers[row] for row in range(len(encoded))]

    def _prefilled(
        self,
        prefixes: Sequence[ImagePrefix],
        encoded: list[EncodedPrompt],
        hashes: list[str | None],
    ) -> tuple[dict[str, Tensor], NetworkInputs]:
        """Compute each prefix once; return the full prompts and a cache of their prefixes."""
        begins = [slice_tokens(encoded[prefix.rows[0]], 0, prefix.length) for prefix in prefixes]
        begin = self._padded(begins)
        visual = self._visual_inputs(begins, [hashes[prefix.rows[0]] for prefix in prefixes])
        cache = prefill(self._network, begin, visual)
        owners = [index for index, prefix in enumerate(prefixes) for _ in prefix.rows]
        owner_B = torch.tensor(owners, device=self._model.device)
        expand_prefix_cache(self._network, cache, owner_B)
        rest = self._padded(
            [
                slice_tokens(encoded[row], prefix.length, None)
                for prefix in prefixes
                for row in prefix.rows
            ]
        )
        # The full prompt is passed although its prefix is in the cache: `generate` processes only
        # tokens beyond the cache's length, and needs the mask of all of them. There is padding
        # before the prefix and between prefix and rest; the mask hides both, and positions are
        # counted from the mask.
        names = ("input_ids", "attention_mask")
        tokens = {name: torch.cat([begin[name][owner_B], rest[name]], dim=1) for name in names}
        return tokens, {"past_key_values": cache}

    def _token_limit(self, width: int) -> int:
        """Return the maximum number of new tokens after a prompt of `width` tokens."""
        return min(self._max_new_tokens, self._model.max_length - width)

    def _padded(self, prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
        """Pad all per-token outputs of the processor to one length."""
        fills = {"input_ids": self._pad_token}
        return {
            name: pad_left([prompt[name] for prompt in prompts], fills.get(name, 0)).to(
                self._model.device
            )
            for name in PER_TOKEN
            if name in prompts[0]
        }

    def _visual_inputs(
        self, prompts: Sequence[EncodedPrompt], hashes: Sequence[str | None]
    ) -> NetworkInputs:
        """Return the images as features, or as pixels if the network does not accept features."""
        device, dtype = self._model.device, self._network.dtype
        per_prompt = [
            {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in prompt.items()
                if name not in PER_TOKEN
            }
            for prompt, key in zip(prompts, hashes, strict=True)
            if key is not None
        ]
        if not per_prompt:
            return {}
        pixels: NetworkInputs = {
            name: torch.cat([visual[name] for visual in per_prompt]).to(device)
            for name in per_prompt[0]
        }
        if not self._features.supported:
            return pixels
        keys = [key for key in hashes if key is not None]
        outputs = [
            self._features.outputs_for(key, visual, device)
            for key, visual in zip(keys, per_prompt, strict=True)
        ]
        # Grids are kept, because M-RoPE positions depend on them; pixels would be encoded again.
        grids = {n: value for n, value in pixels.items() if not n.startswith("pixel_values")}
        return grids | {"mm_encoder_outputs": {"image": concatenate_outputs(outputs)}}

    def _generate(
        self, tokens: dict[str, Tensor], inputs: NetworkInputs, limits: list[int]
    ) -> list[Ended | None]:
        """Return the answer of each row, None if its logits are not finite."""
        width = tokens["input_ids"].shape[1]
        end = (self._ends or [self._pad_token])[0]
        lost = NonFiniteRows(len(limits), width, end)
        stop = PerRowStopping(self._model.tokenizer, self._until, limits, width)
        # All settings are passed, because a model's generation config may enable sampling, with a
        # temperature about which greedy decoding would warn.
        output_BT = self._network.generate(
            **tokens,
            **inputs,
            max_new_tokens=max(limits),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([lost]),
            # Overrides a checkpoint's generation config, which may replace NaN by 0.
            remove_invalid_values=False,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad_token,
            use_cache=True,
        )
        rows = zip(output_BT[:, width:].tolist(), limits, lost.tokens_B.tolist(), strict=True)
        # A row continues with padding until the whole batch is done, hence the cut per row.
        return [
            self._ended(answer[:limit])
            if not 0 <= finite < limit or self._ends_in(answer[:finite])
            else None
            for answer, limit, finite in rows
        ]

    def _ends_in(self, tokens: list[int]) -> bool:
        """Return whether an answer has ended within its first tokens."""
        if any(token in self._ends for token in tokens):
            return True
        text = self._text(tokens)
        return any(stop in text for stop in self._until)

    def _ended(self, tokens: list[int]) -> Ended:
        """Cut an answer at its end token and at its first stop string."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        decoded = self._text(tokens[:end])
        text = decoded
        for stop in self._until:
            text = text.partition(stop)[0]
        if text != decoded:
            return text, "stop", tokens_until_stop(tokens[:end], self._text, self._until)
        return (text, "length", len(tokens)) if end is None else (text, "eos", end)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self._model.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class BatchDecoder(Protocol):
    """The interface of a tokenizer that is used to find stop strings."""

    def batch_decode(self, sequences: Tensor) -> list[str]:
        """Return the text of each row of token ids."""


class PerRowStopping(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed here
    """Stops each row of a batch individually: at a stop string, or at its maximum length."""

    def __init__(
        self, tokenizer: BatchDecoder, until: list[str], limits: list[int], width: int
    ) -> None:
        self._tokenizer = tokenizer
        self._until = until
        self._limit_B = torch.tensor(limits)
        self._width = width
        # If each token has at least one character, a stop string of n characters that ends in the
        # last token is within the last n tokens. A miss only costs time, because `_ended` cuts the
        # answer.
        self._tail = max(map(len, until), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return which rows are done, bool [B]."""
        output_BT = input_ids[:, self._width :]
        full_B = self._limit_B.to(input_ids.device) <= output_BT.shape[1]
        if not self._until:
            return full_B
        texts = self._tokenizer.batch_decode(output_BT[:, -self._tail :])
        stopped = [any(stop in text for stop in self._until) for text in texts]
        return full_B | torch.tensor(stopped, device=input_ids.device)
