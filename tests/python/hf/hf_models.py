"""Small random models of each class that `longspan.hf` is for."""

import torch
import transformers

VOCABULARY = 97
WINDOW = 24  # well below the tests' lengths
CLOSE = {"atol": 5e-5, "rtol": 5e-5}  # of logits up to 5, in float32

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_ENCODER = {key: _SIZES[key] for key in list(_SIZES)[:5] if key != "num_key_value_heads"}


def _causal(kind, **options):
    return lambda: (
        getattr(transformers, f"{kind}ForCausalLM"),
        getattr(transformers, f"{kind.removesuffix('ForCausalLM')}Config")(**{**_SIZES, **options}),
    )


_MODELS = {
    "llama": _causal("Llama"),
    "qwen3": _causal("Qwen3", use_sliding_window=True, **_ALTERNATING),
    # A cap within the scores' range, so that it bends them.
    "gemma2": _causal("Gemma2", attn_logit_softcapping=0.5, query_pre_attn_scalar=1, **_ALTERNATING),
    "gemma3": lambda: (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(**{**_SIZES, "query_pre_attn_scalar": 8, **_ALTERNATING}),
    ),
    "mistral": _causal("Mistral", sliding_window=WINDOW),
    "gpt_oss": _causal("GptOss", num_local_experts=2, num_experts_per_tok=1, **_ALTERNATING),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1,
            eos_token_id=None, pad_token_id=0, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        ),
    ),
    "bert": lambda: (
        transformers.BertForMaskedLM,
        transformers.BertConfig(
            **_ENCODER, max_position_embeddings=512, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    ),
}  # fmt: skip
CAUSAL = [name for name in _MODELS if name != "bert"]
ALL = list(_MODELS)


def make(name, dtype=torch.float32, **changes):
    """A small random model; its weights large enough that attention is far from uniform."""
    torch.manual_seed(1)
    kind, config = _MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = kind(config).to(dtype).eval()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the other one has no double
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.normal_()
            elif parameter.dim() == 2:
                parameter.mul_(6)
    return model


def tokens(batch, length):
    return torch.randint(2, VOCABULARY, (batch, length))


def padding(kind, batch, length):
    """A 2-D mask; the first row is padded, the second less, others not."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row, n in zip(range(batch), (length // 3, 5)):
        if kind == "left":
            mask[row, :n] = 0
        elif kind == "right":
            mask[row, length - n :] = 0
        elif kind == "holes":
            mask[row, n : 2 * n] = 0
    return mask


def with_attention(model, name):
    model.set_attn_implementation(name)
    return model


def assert_gradients_agree(grads, expected, floor=1e-4, **close):
    """Each relative to the largest of its tensor, but at least to ``floor``."""
    assert grads.keys() == expected.keys()
    close = close or CLOSE
    for name, want in expected.items():
        scale = want.abs().max().clamp(min=floor)
        torch.testing.assert_close(
            grads[name] / scale, want / scale, msg=lambda text, n=name: f"{n}: {text}", **close
        )
