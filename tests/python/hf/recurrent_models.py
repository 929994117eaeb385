"""Small random models of each class that `longspan.hf.accelerate` is for."""

import torch
import transformers

VOCABULARY = 97

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_ATTENTION = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_HEADS = {  # of Bamba and those that name them alike
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}  # fmt: skip
# A rank of 8: over the 2 that "auto" gives here, Falcon's and Jamba's norms are ill-conditioned.
_MAMBA = {"state_size": 8, "time_step_rank": 8, "num_hidden_layers": 2}
_RANKED = {"mamba_d_state": 8, "mamba_dt_rank": 8, "num_hidden_layers": 3}  # Jamba and Zamba
_FALCON_H1 = {
    **_ATTENTION, **_HEADS, "mamba_d_ssm": 64, "num_hidden_layers": 2,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.6,
}  # fmt: skip
_QWEN = {  # Qwen3-Next and Qwen3.5
    **_ATTENTION, "head_dim": 16, "num_hidden_layers": 3, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip

# name -> kind in transformers, its number of mixers, options
_MODELS = {
    "mamba": ("Mamba", 2, _MAMBA),
    "mamba_biased": ("Mamba", 2, {**_MAMBA, "use_bias": True, "hidden_act": "gelu"}),
    "falcon_mamba": ("FalconMamba", 2, _MAMBA),
    "jamba": (
        "Jamba", 2,
        {
            **_ATTENTION, **_RANKED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
    "zamba": (
        "Zamba", 3,
        {
            **_ATTENTION, **_RANKED, "num_key_value_heads": 4, "n_mamba_heads": 2,
        },
    ),
    "mamba2": (
        "Mamba2", 2,
        {
            "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "num_hidden_layers": 2,
            "chunk_size": 16,
        },
    ),
    "bamba": (
        "Bamba", 2, {**_ATTENTION, **_HEADS, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    ),
    "falcon_h1": ("FalconH1", 2, _FALCON_H1),
    "falcon_h1_normed": ("FalconH1", 2, {**_FALCON_H1, "mamba_rms_norm": True}),
    "granite": (
        "GraniteMoeHybrid", 2,
        {
            **_ATTENTION, **_HEADS, "num_hidden_layers": 3, "num_local_experts": 0,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 48,
        },
    ),
    "nemotron_h": (
        "NemotronH", 2,
        {
            **_ATTENTION, "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2,
            "ssm_state_size": 16, "chunk_size": 16,
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"],
        },
    ),
    "zamba2": (
        "Zamba2", 3,
        {
            **_ATTENTION, "num_key_value_heads": 4, "num_hidden_layers": 3, "n_mamba_heads": 8,
            "mamba_d_state": 16, "mamba_ngroups": 2, "chunk_size": 16,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        },
    ),
    "qwen3_next": (
        "Qwen3Next", 2,
        {
            **_QWEN, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
        },
    ),
    "qwen3_5": ("Qwen3_5Text", 2, _QWEN),
}  # fmt: skip
ALL = list(_MODELS)
DELTA = ["qwen3_next", "qwen3_5"]
MAMBA1 = ALL[: ALL.index("mamba2")]
MAMBA2 = ALL[ALL.index("mamba2") : ALL.index("qwen3_next")]
LIMITED = ["nemotron_h", "zamba2"]  # whose step sizes have a lower limit


def mixers(name):
    """How many mixers the model has."""
    return _MODELS[name][1]


def make(name, dtype=torch.float32, **changes):
    """A small random model, every parameter of which matters."""
    torch.manual_seed(1)
    kind, _, options = _MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **options, **changes})
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            leaf = key.rsplit(".", 1)[-1]
            if leaf == "A_log":
                p.add_(0.1 * torch.randn_like(p))
            elif leaf in ("dt_bias", "dt_proj_bias") or key.endswith("dt_proj.bias"):
                p.uniform_(-8, -1)  # step sizes on both sides of a lower limit of 0.001
            elif leaf == "bias":
                p.normal_(std=0.3)
            elif name in DELTA and "norm" in key and "linear_attn" not in key:
                p.uniform_(-0.5, 0.5)  # these multiply by 1 more
            elif "norm" in key or leaf == "D":
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=1.0 if "embed" in key else p.shape[-1] ** -0.5)
    return model.to(dtype).eval()
