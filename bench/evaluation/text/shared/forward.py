"""One forward of laid rows, of which only the positions that are asked about meet the head.

Suffixes: B rows, T places, R positions read, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.evaluation.text.shared import mask
from bench.evaluation.text.shared.rows import Laid


class Forward:
    """A network that is given rows of paths and returns logits at chosen places."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self._network = network
        self._device = device
        self._head = network.get_output_embeddings()

    def __call__(self, laid: Laid, read_R: Tensor, cache: Cache | None) -> Tensor:
        """Return the logits [R, V] at places that count through the batch; grows a cache.

        Whatever the network does to its logits after the head (a scale, a soft cap) is done.
        """
        trunk = 0 if cache is None else int(cache.get_seq_length())
        inputs: dict[str, Any] = {"use_cache": False}
        if laid.ends_BT is not None:
            ends_BT = torch.from_numpy(laid.ends_BT).to(self._device)
            inputs["attention_mask"] = mask.for_network(self._network, ends_BT, trunk)
            inputs["position_ids"] = torch.from_numpy(laid.depths_BT).to(self._device)
        if cache is not None:
            inputs |= {"past_key_values": cache, "use_cache": True}
        ids_BT = torch.from_numpy(laid.tokens_BT).to(self._device)

        def cut(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_BTD, *others = args
            return hidden_BTD.flatten(0, 1)[read_R.to(hidden_BTD.device)][None], *others

        hook = self._head.register_forward_pre_hook(cut)
        try:
            logits: Tensor = self._network(input_ids=ids_BT, **inputs).logits
        finally:
            hook.remove()
        return logits[0]
