"""An already loaded, possibly compressed model as the harness's language model.

Tokens, truncation and log-likelihoods are those of the harness's own `hf` model. What differs is
cost: only continuation positions meet the head, and softmax is in fp32 whatever the model's dtype.

Suffixes: B batch, T padded length, K kept positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bench.errors import UserError
from bench.evaluation.batches import Batches
from bench.evaluation.memory import Answers, Memory, key
from bench.evaluation.text.generation import generate
from bench.models.model import Model
from bench.progress import Progress

Tokens: TypeAlias = tuple[int, ...]
Scored: TypeAlias = tuple[float, bool]
Asked: TypeAlias = tuple[list[int], list[int]]
"""A request as the network sees it: one input, and the continuation that its end should predict."""

Question: TypeAlias = tuple[Tokens, list[tuple[int, list[int]]]]
"""One input of the network, and the continuations (request number, tokens) that it answers."""


class Adapter(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Scores the harness's requests with a `Model`, in batches sorted by length.

    What `memory` has is not scored again.
    """

    def __init__(
        self, model: Model, batch_size: int, progress: Progress, memory: Memory | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = model.tokenizer
        self.batches = Batches(batch_size, model.device, progress)
        self._memory = memory or Memory()
        self._model = model
        self._network = model.network.eval()
        self._progress = progress
        self._prefix_text: str = self.tokenizer.decode(self.prefix_token_id)
        self._cuts_head = "logits_to_keep" in inspect.signature(self._network.forward).parameters

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS where there is one."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode text; a BOS is added as the model's config or its tokenizer says, never twice."""
        special = self._model.config.add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self._prefix_text):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(string, **options))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """Return the log-likelihood of each continuation and whether it is the greedy one."""
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in windows as long as the model allows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            rolled = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._model.max_length, 1
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in rolled]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that follows each context, up to its first stop string."""
        asked = [
            (self.tok_encode(context), options) for context, options in (r.args for r in requests)
        ]
        return generate(self._model, asked, self.batches, self._memory, self._progress)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        asked = [self._asked(context, continuation) for _, context, continuation in requests]
        answers = self._memory.answers(
            [key("loglikelihood", *each) for each in asked],
            lambda missing: self._answer(missing, [asked[number] for number in missing]),
            self._progress,
        )
        return [(value, greedy) for value, greedy in answers]

    def _asked(self, context: list[int], continuation: list[int]) -> Asked:
        """Cut what is too long; the last token of a continuation is never an input."""
        longest = self._model.max_length
        if not 0 < len(continuation) <= longest:
            raise UserError(
                f"an answer of {len(continuation)} tokens cannot be scored: "
                f"model {self._model.name} takes 1 to {longest}"
            )
        return (context + continuation)[-(longest + 1) : -1], continuation

    def _answer(self, numbers: Sequence[int], asked: Sequence[Asked]) -> Iterable[Answers]:
        """Yield the answers of each batch, longest inputs first."""
        for batch in self.batches.each(_questions(numbers, asked), self._score):
            yield [(number, list(answer)) for answers in batch for number, answer in answers]

    @torch.no_grad()
    def _score(self, batch: Sequence[Question]) -> list[list[tuple[int, Scored]]]:
        """Score one padded batch; padding is on the right, where causal attention ignores it."""
        width = len(batch[0][0])
        ids_BT = torch.tensor([[*inputs, *[0] * (width - len(inputs))] for inputs, _ in batch])
        longest = [max(len(tokens) for _, tokens in asked) for _, asked in batch]
        first = min(len(inputs) - n for (inputs, _), n in zip(batch, longest, strict=True))
        logits_BKV = self._logits(ids_BT.to(self._model.device), width - first)
        read: list[torch.Tensor] = []
        for (inputs, asked), n, logits_KV in zip(batch, longest, logits_BKV, strict=True):
            end = len(inputs) - first
            logp_KV = logits_KV[end - n : end].float().log_softmax(-1)
            read += [_read(logp_KV, tokens) for _, tokens in asked]
        pairs = iter(torch.stack(read).tolist())  # one transfer from the device per batch
        return [
            [
                (number, (value, bool(greedy)))
                for (number, _), (value, greedy) in zip(
                    asked, islice(pairs, len(asked)), strict=True
                )
            ]
            for _, asked in batch
        ]

    def _logits(self, ids_BT: torch.Tensor, keep: int) -> torch.Tensor:
        """Return the logits at the last `keep` positions."""
        if self._cuts_head:
            logits: torch.Tensor = self._network(
                ids_BT, logits_to_keep=keep, use_cache=False
            ).logits
            return logits
        every: torch.Tensor = self._network(ids_BT, use_cache=False).logits
        return every[:, -keep:]


def _questions(numbers: Sequence[int], asked: Sequence[Asked]) -> list[Question]:
    """Group continuations by network input: choices of one token share theirs."""
    grouped: dict[Tokens, list[tuple[int, list[int]]]] = defaultdict(list)
    for number, (inputs, continuation) in zip(numbers, asked, strict=True):
        grouped[tuple(inputs)].append((number, continuation))
    return sorted(grouped.items(), key=lambda question: (-len(question[0]), question[0]))


def _read(logp_KV: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Return a continuation's log-likelihood and whether it is greedy, as two numbers.

    It ends where the input's last token predicts, that is in the last row.
    """
    target_K = torch.tensor(tokens, device=logp_KV.device)
    rows_KV = logp_KV[-len(tokens) :]
    value = rows_KV.gather(1, target_K[:, None]).sum()
    greedy = (rows_KV.argmax(-1) == target_K).all()
    return torch.stack([value, greedy.to(value.dtype)])
