"""Small random models of each family that `longspan.hf.extend_context` is for, and plain references."""

import math
from functools import partial

import torch
import transformers

from longspan import rope

VOCABULARY, TRAINED = 97, 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_CONFIGS = {
    "llama": partial(transformers.LlamaConfig, **_GROUPED),
    "mistral": partial(transformers.MistralConfig, **_GROUPED, sliding_window=None),
    "phi": partial(transformers.PhiConfig, **_GROUPED, partial_rotary_factor=0.5),
    "phi3": partial(transformers.Phi3Config, **_GROUPED, original_max_position_embeddings=TRAINED),
    "qwen2": partial(transformers.Qwen2Config, **_GROUPED),
    "qwen3": partial(transformers.Qwen3Config, **_GROUPED, head_dim=16),
    "gpt_neox": partial(transformers.GPTNeoXConfig, **_SIZES, rotary_pct=0.5),
}
FAMILIES = list(_CONFIGS)
CLOSE = {"atol": 3e-5, "rtol": 3e-5}


def make(family="llama", dtype=torch.float32, attention="sdpa", **changes):
    """A small random model; its weights large enough that attention is far from uniform."""
    torch.manual_seed(1)
    config = _CONFIGS[family](**changes)
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def tokens(batch, length):
    return torch.randint(2, VOCABULARY, (batch, length))


def in_parts(model, ids, sizes, **options):
    """Logits of a text read in several forwards with a cache, and the cache."""
    cache, logits = None, []
    for part in ids.split(sizes, dim=1):
        output = model(part, cache=cache, use_cache=True, **options)
        cache = output.cache
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


def turned(x, inv_freq, scale, positions):
    """x (H, n, D) rotated at positions (n,), half-split, in double."""
    angle = positions.double()[:, None] * inv_freq.double()
    cos, sin = (torch.cat([y, y], -1) * scale for y in (angle.cos(), angle.sin()))
    r = cos.shape[-1]
    a, b = x[..., : r // 2], x[..., r // 2 : r]
    return torch.cat([x[..., :r] * cos + torch.cat([-b, a], -1) * sin, x[..., r:]], -1)


def reference_logits(state, config, ids, see):
    """Logits (T, V) of a Llama by its state_dict, in double, each token's attention by itself.

    ``see(t)`` gives (inv_freq, scale), indices of the keys that token t sees, their positions, and its
    own.
    """
    state = {name: x.double() for name, x in state.items()}
    heads, groups = config.num_attention_heads, config.num_key_value_heads

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[name]

    x = state["model.embed_tokens.weight"][ids]
    length = len(ids)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        y = norm(x, layer + "input_layernorm.weight")
        q, k, v = (
            (y @ state[f"{layer}self_attn.{name}_proj.weight"].T).view(length, n, -1).transpose(0, 1)
            for name, n in (("q", heads), ("k", groups), ("v", groups))
        )
        out = []
        for t in range(length):
            frequencies, keys, places, own = see(t)
            keys = torch.as_tensor(keys)
            qt = turned(q[:, t : t + 1], *frequencies, torch.tensor([own]))
            kt = turned(k[:, keys], *frequencies, torch.as_tensor(places))
            kt, vt = (z.repeat_interleave(heads // groups, 0) for z in (kt, v[:, keys]))
            weights = (qt @ kt.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
            out.append((weights @ vt).reshape(-1))
        x = x + torch.stack(out) @ state[layer + "self_attn.o_proj.weight"].T
        y = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (y @ state[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ state[layer + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ state["lm_head.weight"].T


def growing(settings):
    """What each token sees where frequencies are those of its own length."""

    def see(t):
        every = torch.arange(t + 1)
        return rope.frequencies(**settings, seq_len=t + 1), every, every, t

    return see


def streaming(settings, window, sinks):
    """What each token sees in StreamingLLM's cache, with positions within the cache."""
    frequencies = rope.frequencies(**settings, seq_len=window + sinks)

    def see(t):
        keys = sorted({*range(min(sinks, t + 1)), *range(max(0, t - window + 1), t + 1)})
        return frequencies, keys, range(len(keys)), len(keys) - 1

    return see


def padded(lengths):
    """Rows of these lengths, padded on the left, and each one alone."""
    longest = max(lengths)
    ids, mask = tokens(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.int64)
    for row, n in enumerate(lengths):
        ids[row, : longest - n], mask[row, : longest - n] = 0, 0
    return ids, mask, [ids[row : row + 1, longest - n :] for row, n in enumerate(lengths)]


def check_beams(model, ids):
    """Beams reorder and repeat the cache; the scores of what they found are those of one pass."""
    begin = ids.shape[1]
    out = model.generate(
        ids, max_new_tokens=15, num_beams=4, do_sample=False, return_dict_in_generate=True,
        output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    logits = model(out.sequences, use_cache=False).logits[:, begin - 1 : -1].log_softmax(-1)
    score = logits.gather(2, out.sequences[:, begin:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, score, atol=1e-3, rtol=1e-4)
