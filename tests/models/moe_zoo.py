"""Every architecture of transformers with experts that has a causal language model, tiny."""

import inspect

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.models.tiny_networks import VOCABULARY, randomise

# Fields of configs, under all of their names; a config gets those that it has.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "shared_expert_intermediate_size": 20,
    "shared_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
# What single architectures need beside: small sizes under names of their own, a layer of each kind.
OWN = {
    "bailing_hybrid": HYBRID,
    "beam": SPARSE,
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 16,
            "ffn_hidden_size": 12,
            "moe_num_experts": 6,
            "moe_top_k": 2,
        },
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {"shared_experts_intermediate_size": 24},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "granitemoehybrid": HYBRID | {"mamba_n_heads": 4, "mamba_d_state": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "kimi_linear": HYBRID | {"q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 12,
        "expert_ffn_hidden_size": 12,
        "zero_expert_num": 2,
    },
    # Its sliding layers have twice as many KV heads.
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "nemotron_h": {"layers_block_type": ["attention", "moe"]},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID
    | {
        "hc_lowrank": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
_NAMES = (
    "afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 "
    "deepseek_v32 deepseek_v4 doge dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint "
    "gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa "
    "granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling_text inkling2_text jamba "
    "jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash "
    "minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe "
    "qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text solar_open zaya"
)
NAMES = tuple(_NAMES.split())
# Whose experts are no sums of micro-experts, and the words that say why.
REFUSED = {
    "doge": "is a DogeCDMoE",
    "gemma4_text": "the layer itself holds experts, and norms follow them",
    "jetmoe": "no router",
    "llama4_text": "without the router's weights",
    "axk1": "role of its submodule post_mlp_layernorm is unknown",
    "inkling_text": "not a feed-forward of a known form",
    "longcat_flash": "do not declare their layout",
    "minimax_m3_vl_text": "not a feed-forward of a known form",
}
# Whose experts cannot be dropped: the choice is made elsewhere, or by more than hidden states.
UNDROPPABLE = ("dbrx", "deepseek_v4", "zaya")
SUPPORTED = tuple(name for name in NAMES if name not in REFUSED)
DROPPABLE = tuple(name for name in SUPPORTED if name not in UNDROPPABLE)


def fields(config_class):
    """Return the names of the fields of a config class."""
    found = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        found |= set(getattr(base, "__annotations__", {}))
    return found


def build(name, **changes):
    """A network of one architecture with random float32 weights."""
    config_class = CONFIG_MAPPING[name]
    known = fields(config_class)
    sizes = {key: value for key, value in SIZES.items() if key in known}
    config = config_class(**(sizes | OWN.get(name, {}) | changes))
    return randomise(AutoModelForCausalLM.from_config(config), 0)
