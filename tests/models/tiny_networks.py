"""Tiny random networks of every MoE architecture that is supported, built in milliseconds."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from bench.models import deepseek_moe

# Networks this small only wait for each other's threads.
torch.set_num_threads(1)
deepseek_moe.register_deepseek()
VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FINE = {"moe_intermediate_size": 12, "head_dim": 8}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
ARCHITECTURES = {
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 6,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe": ("Qwen3Moe", FINE | {"num_experts": 6, "norm_topk_prob": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 6}),
    "olmoe": ("Olmoe", {"num_experts": 6}),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"routed_scaling_factor": 2.0, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"n_group": 2, "topk_group": 1}),
    "phimoe": ("Phimoe", {"num_local_experts": 6}),
    "deepseek": (
        "Deepseek",
        {
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
        },
    ),
}


def build(name, seed=0, **changes):
    """A network of one architecture with random float32 weights large enough to matter."""
    family, extra = ARCHITECTURES[name]
    home = deepseek_moe if family == "Deepseek" else transformers
    config = getattr(home, f"{family}Config")(**(SIZES | extra | changes))
    return randomise(getattr(home, f"{family}ForCausalLM")(config), seed)


DENSE_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {"n_embd": 32, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT_SIZES = {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0}
FALCON_SIZES = {"ffn_hidden_size": 40, "hidden_dropout": 0.0, "attention_dropout": 0.0}
# Fields that these architectures name differently, or do not have.
WIDTHS = ("intermediate_size", "head_dim", "num_key_value_heads")
GPT_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
GPT_OWN = (*WIDTHS, *GPT_NAMES)
DENSE_ARCHITECTURES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama_biased": ("Llama", {"mlp_bias": True, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {"sliding_window": 8}),
    "gemma3": ("Gemma3", {"sliding_window": 8}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", GPT_SIZES),
    "opt": ("OPT", OPT_SIZES),
    "opt_post_norm": ("OPT", OPT_SIZES | {"do_layer_norm_before": False}),
    "opt_projected": ("OPT", OPT_SIZES | {"word_embed_proj_dim": 16}),
    "gpt_neox": ("GPTNeoX", {}),
    "falcon": ("Falcon", FALCON_SIZES | {"new_decoder_architecture": False}),
    "falcon_new": ("Falcon", FALCON_SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def build_dense(name, seed=0, **changes):
    """A decoder without experts, of one architecture, with random float32 weights."""
    family, extra = DENSE_ARCHITECTURES[name]
    config = getattr(transformers, f"{family}{'TextConfig' if family == 'Gemma3' else 'Config'}")
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    own = {"GPT2": GPT_OWN, "OPT": WIDTHS, "Falcon": WIDTHS, "GPTNeoX": WIDTHS[1:]}.get(family, ())
    sizes = {key: value for key, value in DENSE_SIZES.items() if key not in own}
    made = getattr(transformers, f"{family}{head}")(config(**(sizes | extra | changes)))
    return randomise(made, seed)


def llama():
    """A dense network of the same size."""
    sizes = {k: v for k, v in SIZES.items() if k != "num_experts_per_tok"}
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), 0)


def randomise(network, seed):
    """Draw every weight anew, so that each one has an effect that can be seen."""
    torch.manual_seed(seed)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)
    return network.eval().requires_grad_(False)


class Expert(nn.Module):
    """One gated feed-forward expert as a module of its own."""

    def __init__(self, gate, up, down, act):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(self._linear, (gate, up, down))
        self.act_fn = act

    @staticmethod
    def _linear(weight):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return linear

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ExpertList(nn.ModuleList):
    """The layout of transformers 4: a module per expert, called with the router's choice."""

    def forward(self, x, index, weight):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self):
            token, slot = torch.where(index == number)
            y.index_add_(0, token, expert(x[token]) * weight[token, slot, None].to(x.dtype))
        return y


def unfuse(network):
    """Replace all fused experts of a network by lists of modules with the same weights."""
    for module in network.modules():
        fused = getattr(module, "experts", None)
        if isinstance(fused, nn.Module) and hasattr(fused, "gate_up_proj"):
            halves = fused.gate_up_proj.chunk(2, dim=1)
            parts = zip(*halves, fused.down_proj, strict=True)
            module.experts = ExpertList(Expert(*part, fused.act_fn) for part in parts)
    return network


def tokens(rows=5, length=12, seed=0):
    """Random token ids, [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.manual_seed(seed))


def tokenizer():
    """A tokenizer with a word for every id: w0, w1, ..."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def save(network, folder):
    """Write network and tokenizer as a Hugging Face folder."""
    network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
