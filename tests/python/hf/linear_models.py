"""Linearized models with maps that are not as they begin, and the same attention written out densely."""

import torch
from extend_models import make, tokens
from transformers import AttentionInterface, AttentionMaskInterface

import longspan.hf

FAMILIES = ["llama", "mistral", "phi3", "qwen2", "qwen3"]
WINDOW, SINKS = 7, 3
KINDS = {"hybrid": {"window": WINDOW, "sink_tokens": SINKS}, "pure": {"window": None}}


def linear(family="llama", kind="hybrid", dtype=torch.float32, layers="all", **options):
    """A model with random feature maps, and what linearize returned."""
    model = make(family, dtype)
    linearized = longspan.hf.linearize(
        model, tokens(1, 400)[0], layers=layers, steps=0, length=32, progress=False,
        **{**KINDS[kind], **options},
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "linear_features"):
            randomise(module.linear_features)
    return model, linearized


@torch.no_grad()
def randomise(features):
    for name, parameter in features.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("offset") else 0.2))


def nonlinearity(kind, y):
    if kind == "hedgehog":
        return torch.cat([y, -y], -1).softmax(-1)
    if kind == "elu":
        return torch.nn.functional.elu(y) + 1
    return y.relu() if kind == "relu" else y.softmax(-1)


def dense_weights(weights, kind, q, k, scale, window, sinks):
    """(H, T, T) unnormalised, of q (H, T, D) and k (H_kv, T, D), by the parameters' names."""

    def features(side, x):
        log = x @ weights[f"{side}.magnitude"] if f"{side}.magnitude" in weights else 0
        y = x @ weights[f"{side}.weight"] + weights[f"{side}.bias"]
        return nonlinearity(kind, y) * torch.as_tensor(log, dtype=x.dtype).exp()

    groups = len(q) // len(k)
    phi_q, phi_k = features("query", q), features("key", k).repeat_interleave(groups, 0)
    linear = phi_q @ phi_k.transpose(1, 2)
    if window:
        linear = linear * weights["offset"][:, :, None].exp()
    t = torch.arange(q.shape[1])
    distance = t[:, None] - t
    exact = (distance < (window or 0)) | (t < sinks)
    scores = (q @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale).exp()
    return torch.where(exact, scores, linear).masked_fill(distance < 0, 0)


def dense_attention(weights, kind, q, k, v, scale, window, sinks):
    """(H, T, D) of q (H, T, D), k and v (H_kv, T, D), in their dtype."""
    w = dense_weights(weights, kind, q, k, scale, window, sinks)
    return w / w.sum(-1, keepdim=True) @ v.repeat_interleave(len(q) // len(v), 0)


def dense_model(model, linearized):
    """Undo, and have the model's own forward attend by `dense_attention`, in double."""
    kept = {}
    for i in linearized.layers:
        features = model.model.layers[i].self_attn.linear_features
        kept[i] = {name: x.detach().double() for name, x in features.named_parameters()}
    kind, window, sinks = linearized.feature_map, linearized.window, linearized.sink_tokens
    linearized.undo()
    eager = AttentionInterface()["sdpa"]

    def attend(module, q, k, v, attention_mask, scaling, **kwargs):
        if module.layer_idx not in kept:
            return eager(module, q, k, v, attention_mask, scaling=scaling, **kwargs)
        out = [
            dense_attention(kept[module.layer_idx], kind, *x, scaling, window, sinks)
            for x in zip(q, k, v)
        ]
        return torch.stack(out).transpose(1, 2), None

    AttentionInterface.register("dense_linear", attend)
    AttentionMaskInterface.register("dense_linear", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("dense_linear")
    return model.double()
