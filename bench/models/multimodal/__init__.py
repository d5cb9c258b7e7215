"""Vision-language models: positions of visual tokens, and the contents of decoder layers."""

from bench.data.prompts.samples import Samples
from bench.models.multimodal.decoder import Decoder, DecoderLayer, decoder_layers, open_decoder
from bench.models.multimodal.frames import VisualTokens
from bench.models.multimodal.location import FAMILIES, frame_size, locate

__all__ = [
    "FAMILIES",
    "Decoder",
    "DecoderLayer",
    "Samples",
    "VisualTokens",
    "decoder_layers",
    "frame_size",
    "locate",
    "open_decoder",
]
