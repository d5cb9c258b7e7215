"""One forward of a packed batch, in which only scored positions meet the output head.

Suffixes: B sequences, T positions, R positions read, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bench.evaluation.text.shared import mask
from bench.evaluation.text.shared.rows import Laid


class Forward:
    """A network that takes packed sequences and returns logits at chosen positions."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self._network = network
        self._device = device
        self._head = network.get_output_embeddings()

    def __call__(self, laid: Laid, read_R: Tensor, cache: Cache | None) -> Tensor:
        """Return the logits [R, V] at `read_R`, indices into the flattened batch; extend the cache.

        Scaling or soft-capping that the network applies after its head is included.
        """
        trunk = 0 if cache is None else int(cache.get_seq_length())
        # Without branches the network's own causal mask and positions are right, and attention may
        # take a causal kernel, which is faster than one with an explicit mask. Padding is on the
        # right, where nothing looks.
        inputs: dict[str, Any] = {"use_cache": False}
        if laid.ends_BT is not None:
            ends_BT = torch.from_numpy(laid.ends_BT).to(self._device)
            inputs["attention_mask"] = mask.for_network(self._network, ends_BT, trunk)
            inputs["position_ids"] = torch.from_numpy(laid.depths_BT).to(self._device)
        if cache is not None:
            inputs |= {"past_key_values": cache, "use_cache": True}
        ids_BT = torch.from_numpy(laid.tokens_BT).to(self._device)

        # `logits_to_keep` takes one range or index for all rows, but every row is read elsewhere,
        # so the hidden states are cut in front of the head. The head still gets three dimensions.
        def cut(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_BTD, *others = args
            return hidden_BTD.flatten(0, 1)[read_R.to(hidden_BTD.device)][None], *others

        hook = self._head.register_forward_pre_hook(cut)
        try:
            logits: Tensor = self._network(input_ids=ids_BT, **inputs).logits
        finally:
            hook.remove()
        return logits[0]
