"""How many expert bytes a folder for an inference engine saves, at the widths of DeepSeek-MoE.

A random DeepSeek-V2 with experts of 1408 at a hidden size of 2048, and two shared ones, is pruned
by 40 % to one aligned width and written for vLLM; stock transformers then loads it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import nn

from bench.data.calibration import Calibration
from bench.method import Context
from bench.models.model import Model
from bench.models.saving import save_model
from bench.models.serving.engines import find_engine
from bench.schema import ModelConfig
from methods.camera.pruning import CameraP
from tests.models.tiny_networks import tokenizer, tokens
from tests.performance.figure import Figure

RATIO, MOST, CLOSE = 0.4, 0.63, 1e-4
FLOAT = 4


def figures() -> list[Figure]:
    """Expert bytes of the folder over the dense ones, and the largest difference of logits."""
    torch.set_num_threads(1)
    model = deepseek_widths()
    dense = FLOAT * model.structure.moe_parameters
    method = CameraP(ratio=RATIO, scope="expert", aligned=True, align=64)
    method.apply(model, Context(0, Calibration(tokens(rows=2, length=64), "")))
    wanted = model.network(tokens()).logits
    with tempfile.TemporaryDirectory() as name:
        save_model(model, Path(name), find_engine("vllm"))
        held = expert_bytes(Path(name))
        stock, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True
        )
        with torch.no_grad():
            apart = float((stock.eval()(tokens()).logits - wanted).abs().max())
    share, width = held / dense, stock.config.moe_intermediate_size
    whole = apart <= CLOSE and not any(report.values())
    how = f"experts of {width} for 1408, {held / 1e6:.0f} of {dense / 1e6:.0f} MB"
    said = "stock transformers, nothing missing or left over in its report"
    return [
        Figure("expert bytes / dense", share, f"<= {MOST}", share <= MOST, how),
        Figure("difference of logits", apart, f"<= {CLOSE}", whole, said),
    ]


def deepseek_widths() -> Model:
    """Two MoE layers of eight routed experts, float32: 0.7 GB."""
    config = transformers.DeepseekV2Config(
        vocab_size=64,
        hidden_size=2048,
        intermediate_size=1408,
        moe_intermediate_size=1408,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=128,
        q_lora_rank=None,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    network: nn.Module = transformers.DeepseekV2ForCausalLM(config)
    network.eval().requires_grad_(False)
    named = ModelConfig(name="deepseek_widths", source="tests")
    return Model(named, network, tokenizer(), "", None, torch.device("cpu"))


def expert_bytes(folder: Path) -> int:
    """Bytes of all routed and shared experts in a folder's weight files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if "experts" in key:
                    total += tensors.get_tensor(key).nbytes
    return total
