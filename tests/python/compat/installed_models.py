"""Run in a process of its own: transformers' Mamba models after longspan.compat.install().

Takes a JSON list of pairs (a function below, a name) and prints one JSON object for each.
transformers binds the functions when a modeling file is imported, so their slow twins stay behind
each as ``__wrapped__``.
"""

import contextlib
import inspect
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import import_utils

import longspan.compat

longspan.compat.install()  # modeling files are imported later, when a class is asked for

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ATTENTION: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Mamba2": {
        "num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16,
        "time_step_limit": (0.0, 0.1),
    },
    "Bamba": {**ATTENTION, **MAMBA2, "attn_layer_indices": [1]},
    "Jamba": {
        **ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
        "num_experts_per_tok": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "FalconH1": {**ATTENTION, **MAMBA2, "head_dim": 8, "mamba_d_ssm": 64},
    "NemotronH": {
        **ATTENTION, "head_dim": 8, "hybrid_override_pattern": "M*", "mamba_num_heads": 8,
        "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    },
    "Zamba2": {
        **ATTENTION, "mamba_d_state": 8, "mamba_ngroups": 2, "n_mamba_heads": 4, "mamba_headdim": 16,
        "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_mem_blocks": 1,
        "chunk_size": 16, "attention_hidden_size": 64, "attention_head_dim": 16,
    },
}  # fmt: skip


def make(name: str) -> tuple[Any, ModuleType]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model, sys.modules[type(model).__module__]


def bound(module: ModuleType) -> dict[str, Any]:
    """The modeling file's functions that look for a package, and what each of them found."""
    found = {}
    for name, function in vars(module).items():
        if inspect.isfunction(function):
            variables = inspect.getclosurevars(function).nonlocals
            if "implementation" in variables:
                found[name] = variables["implementation"]
    return found


@contextlib.contextmanager
def slow(module: ModuleType) -> Iterator[None]:
    fast = {name: getattr(module, name) for name in bound(module)}
    for name, function in fast.items():
        setattr(module, name, function.__wrapped__)
    yield
    for name, function in fast.items():
        setattr(module, name, function)


def everything(model: Any, train: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    found = {}
    if train:
        model.train()
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found["training logits"] = out.logits.detach()
    model.eval()
    with torch.no_grad():
        found["logits"] = model(ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
    found["tokens"] = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return found


def against_slow_path(name: str) -> dict[str, Any]:
    model, module = make(name)
    # FalconMamba's slow path normalises dt before its projection, mamba_inner_fn after it.
    train = name != "FalconMamba"
    fast = everything(model, train)
    with slow(module):
        expected = everything(model, train)
    assert fast.keys() == expected.keys()
    errors = {
        key: float((fast[key] - want).abs().max() / want.abs().max().clamp(min=0.1))
        for key, want in expected.items()
        if want.is_floating_point()
    }
    return {
        "model": name,
        "bound": sorted({function.__module__ for function in bound(module).values()}),
        "worst": max(errors, key=errors.__getitem__),
        "error": max(errors.values()),
        "same tokens": torch.equal(fast["tokens"], expected["tokens"]),
    }


def packed(name: str) -> dict[str, Any]:
    """Packed logits against each sequence's own, and against those of no packing."""
    model, _ = make(name)
    bounds = [0, 5, 14, 15, 21]
    cuts = torch.tensor(bounds).diff()
    ids = torch.randint(3, 97, (1, 21), generator=torch.Generator().manual_seed(1))
    seq_idx = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), cuts)[None]
    position_ids = torch.cat([torch.arange(n) for n in cuts])[None]
    model = model.backbone if name == "Mamba2" else model  # the head's forward drops seq_idx
    errors, leaks = [], []
    for training in (False, True):
        model.train(training)
        outs = []
        for call in (
            {"input_ids": ids, "seq_idx": seq_idx, "position_ids": position_ids},
            {"input_ids": ids},
            *({"input_ids": ids[:, begin:end]} for begin, end in pairwise(bounds)),
        ):
            with torch.no_grad():
                outs.append(model(**call, use_cache=False)[0])
        apart = torch.cat(outs[2:], 1)
        errors.append(float((outs[0] - apart).abs().max()))
        leaks.append(float((outs[1] - apart).abs().max()))
    return {"model": name, "error": max(errors), "without packing": min(leaks)}


def seen_by_transformers(name: str) -> dict[str, Any]:
    """What transformers' own look-ups say of a package."""
    found, version = import_utils._is_package_available(name, return_version=True)
    checks = {
        "mamba_ssm": import_utils.is_mamba_2_ssm_available,
        "causal_conv1d": import_utils.is_causal_conv1d_available,
        "flash_attn": import_utils.is_flash_attn_2_available,
    }
    return {
        "model": name, "found": found, "version": version, "available": checks[name](),
        "cuda": torch.cuda.is_available(),
    }  # fmt: skip


for mode, name in json.loads(sys.argv[1]):
    print(json.dumps(globals()[mode](name)))
