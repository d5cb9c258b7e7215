"""A checkpoint as the compressed-tensors library stores it."""

import copy
import json

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from safetensors.torch import save_file


def write_quantized(network, folder, bits=4, activations=False):
    """Put quantized weights into the folder of a network, and return one that computes with them.

    Every linear layer but the head has `bits` per weight and one scale per row; with `activations`,
    its inputs are rounded to 8 bits with one scale per token. `network` itself is compressed.
    """
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if activations else None
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, strategy="channel"),
        input_activations=inputs,
    )
    config = QuantizationConfig(
        config_groups={"all": scheme},
        format="int-quantized" if activations else "pack-quantized",
        ignore=["lm_head"],
        quantization_status="frozen",
    )
    apply_quantization_config(network, config)
    for module in network.modules():
        if hasattr(module, "weight_scale"):
            largest = module.weight.abs().amax(1, keepdim=True)
            module.weight_scale.data = largest / (2 ** (bits - 1) - 1)
            module.quantization_status = QuantizationStatus.FROZEN
    # Its forward rounds the weights, which makes it the reference for those in the files.
    reference = copy.deepcopy(network)
    ModelCompressor(quantization_config=config).compress_model(network)
    # A tied head is stored once, as the embedding.
    tied = {"lm_head.weight"} if network.config.tie_word_embeddings else set()
    state = network.state_dict()
    tensors = {name: state[name].contiguous() for name in state.keys() - tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    stored = json.loads(config.model_dump_json()) | {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": stored}))
    return reference
