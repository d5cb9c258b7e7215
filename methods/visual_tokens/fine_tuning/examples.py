"""Training tensors from conversations, through the model's own chat template.

Shapes: B conversations, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.data.conversations import Conversation
from bench.data.prompts import chat
from bench.errors import UserError

IGNORED = -100  # ignored by torch's cross-entropy


class Examples:
    """Renders conversations for one processor; the loss covers answers and their end tokens."""

    def __init__(self, processor: Any, longest: int, system: str | None = None) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._longest = longest
        self._system = system

    def batch(self, talks: Sequence[Conversation]) -> dict[str, Tensor]:
        """Return the network's inputs with `labels` [B, S], padded on the right.

        Raises:
            UserError: a conversation is longer than `longest`, or the chat template is not
                supported.
        """
        asked = [self._rendered(talk, 0, answered=False) for talk in talks]
        images = [[talk.image] for talk in talks]
        # Only the prompt up to the first answer goes through the processor, which expands the image
        # into its tokens; everything after it is text and is tokenised piece by piece, so that the
        # borders between answers and prompts are exact token borders.
        first = chat.encode(self._processor, asked, images, padding=True)
        rows, labels = [], []
        for number, talk in enumerate(talks):
            ids = first["input_ids"][number][first["attention_mask"][number].bool()].tolist()
            known = [IGNORED] * len(ids)
            for part, said in self._rest(talk):
                ids += part
                known += part if said else [IGNORED] * len(part)
            rows.append(ids)
            labels.append(known)
        width = max(map(len, rows))
        if width > self._longest:
            raise UserError(
                f"a conversation has {width} tokens, but longest={self._longest}: raise it or "
                "remove long conversations from the file"
            )
        padded = [self._tokenizer.pad_token_id] * width
        made = {name: value for name, value in first.items() if isinstance(value, Tensor)}
        made["input_ids"] = torch.tensor([row + padded[len(row) :] for row in rows])
        made["attention_mask"] = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        )
        made["labels"] = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])
        if "mm_token_type_ids" in made:
            # `mm_token_type_ids` gives the modality of each token, 0 for the added text. The
            # processor may have padded on the left, hence the detour over the mask.
            types = made["mm_token_type_ids"]
            widened = torch.zeros(len(rows), width, dtype=types.dtype)
            for number, mask in enumerate(first["attention_mask"].bool()):
                kept = types[number][mask]
                widened[number, : len(kept)] = kept
            made["mm_token_type_ids"] = widened
        return made

    def _rest(self, talk: Conversation) -> list[tuple[list[int], bool]]:
        """Return the tokens after the first prompt in pieces, each marked if it is an answer's."""
        pieces: list[tuple[list[int], bool]] = []
        for turn, (_, answer) in enumerate(talk.turns):
            asked = self._rendered(talk, turn, answered=False)
            whole = self._rendered(talk, turn, answered=True)
            if not whole.startswith(asked + answer):
                raise UserError(
                    "the chat template of this model does not place an answer directly after its "
                    "prompt, so the training labels cannot be determined"
                )
            # The end token is learned, so that generation stops; the line break that templates add
            # after it is not generated and belongs to the next prompt.
            end = whole[len(asked) + len(answer) :]
            pieces.append((self._encode(answer + end.rstrip("\n")), True))
            if turn + 1 < len(talk.turns):
                following = self._rendered(talk, turn + 1, answered=False)
                gap = following[len(asked) + len(answer) + len(end.rstrip("\n")) :]
                pieces.append((self._encode(gap), False))
        return pieces

    def _rendered(self, talk: Conversation, turn: int, *, answered: bool) -> str:
        """Return the conversation up to the answer of a turn, or up to its end."""
        last = talk.turns[turn]
        turns = [*talk.turns[:turn], last if answered else (last[0], None)]
        return chat.render(self._processor, turns, images=1, system=self._system)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
