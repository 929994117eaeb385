"""longspan.compat.install(), in processes of their own, and what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_process import python


def run(code: str) -> list[str]:
    done = python(code, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_imports_that_name_the_peers() -> None:
    lines = run("""
        import importlib.util, sys
        import longspan.compat
        longspan.compat.install()
        longspan.compat.install("mamba_ssm")  # again: changes nothing
        import causal_conv1d, fast_transformers, fla, flash_attn, mamba_ssm
        import mamba_ssm.ops.triton.layer_norm
        from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn
        from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
        from fast_transformers.causal_product import causal_dot_product
        from fla.ops import chunk_linear_attn, fused_recurrent_retention
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import fused_recurrent_simple_gla
        from flash_attn.bert_padding import unpad_input
        from mamba_ssm import Mamba, Mamba2
        from mamba_ssm.modules.mamba2 import Mamba2
        from mamba_ssm.modules.mamba_simple import Mamba
        from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        from mamba_ssm.utils.generation import InferenceParams
        print(mamba_chunk_scan_combined.__module__)
        assert mamba_ssm is longspan.compat.mamba_ssm
        assert mamba_ssm.ops.triton.ssd_combined is sys.modules["mamba_ssm.ops.triton.ssd_combined"]
        for package in (causal_conv1d, fast_transformers, fla, flash_attn, mamba_ssm):
            assert importlib.util.find_spec(package.__name__) is package.__spec__
            assert package.__version__.count(".") == 2
        try:
            import mamba_ssm.nowhere
        except ModuleNotFoundError as error:
            print(error)
    """)
    assert lines == [
        "longspan.compat.mamba_ssm.ops.triton.ssd_combined",
        "No module named 'mamba_ssm.nowhere'",
    ]


def test_only_the_packages_named() -> None:
    lines = run("""
        import sys
        import longspan.compat
        longspan.compat.install("causal_conv1d")
        print(*(n for n in ("mamba_ssm", "causal_conv1d", "flash_attn") if n in sys.modules))
        try:
            longspan.compat.install("mamba_ssm", "mamba")
        except ValueError as error:
            print(error)
        print("mamba_ssm" in sys.modules)
    """)
    assert lines[0] == "causal_conv1d"
    assert "flash_attn, fla, fast_transformers, got 'mamba'" in lines[1]
    assert lines[2] == "False"


def test_a_real_package_that_is_imported_stays() -> None:
    lines = run("""
        import sys, types
        sys.modules["causal_conv1d"] = real = types.ModuleType("causal_conv1d")
        real.__file__ = "/elsewhere/causal_conv1d/__init__.py"
        import longspan.compat
        try:
            longspan.compat.install()
        except RuntimeError as error:
            print(error)
        print(sys.modules["causal_conv1d"] is real, "mamba_ssm" in sys.modules)
        longspan.compat.install("mamba_ssm")
        print(sys.modules["causal_conv1d"] is real, "mamba_ssm" in sys.modules)
    """)
    assert "causal_conv1d is already imported, from /elsewhere" in lines[0]
    assert lines[1:] == ["True False", "True True"]


# ---- transformers


def test_too_late_for_a_modeling_file() -> None:
    """Which then refuses packed sequences: what install() is for."""
    pytest.importorskip("transformers")
    lines = run("""
        import warnings, torch
        from transformers import Mamba2Config, Mamba2Model
        model = Mamba2Model(Mamba2Config(
            vocab_size=9, hidden_size=8, num_heads=4, head_dim=4, state_size=4, n_groups=1,
            num_hidden_layers=1,
        ))
        try:
            model(torch.ones(1, 4).long(), seq_idx=torch.tensor([[0, 0, 1, 1]]), use_cache=False)
        except ValueError as error:
            print(error)
        import longspan.compat
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            longspan.compat.install()
            longspan.compat.install()
        for warning in caught:
            print(warning.message)
    """)
    assert "packed sequences" in lines[0]
    assert len(lines) == 2
    assert "transformers.models.mamba2.modeling_mamba2 already imported" in lines[1]


PEERS = ("mamba_ssm", "causal_conv1d", "flash_attn")
SLOW_PATH = ("Mamba", "FalconMamba", "Mamba2", "Bamba", "Jamba", "FalconH1", "NemotronH", "Zamba2")
PACKED = ("Mamba2", "Bamba", "FalconH1", "NemotronH", "Zamba2")


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], dict[str, Any]]:
    """What `installed_models` found, by job: in one process, for importing transformers takes long."""
    pytest.importorskip("transformers")
    jobs = [
        *(("seen_by_transformers", name) for name in PEERS),
        *(("against_slow_path", name) for name in SLOW_PATH),
        *(("packed", name) for name in PACKED),
    ]
    script = str(Path(__file__).with_name("installed_models.py"))
    lines = run(
        f"import runpy, sys; sys.argv = [{script!r}, {json.dumps(jobs)!r}]; runpy.run_path(sys.argv[0])"
    )
    records = [json.loads(line) for line in lines if line.startswith('{"model"')]
    assert len(records) == len(jobs)
    return dict(zip(jobs, records))


@pytest.mark.parametrize("name", PEERS)
def test_what_transformers_sees(found: Any, name: str) -> None:
    """A package and a version; where it asks for CUDA, or for pip's metadata, what is there."""
    record = found["seen_by_transformers", name]
    assert record["found"]
    assert int(record["version"].split(".")[0]) >= 1
    assert record["available"] == (record["cuda"] and name != "flash_attn")


@pytest.mark.parametrize("name", SLOW_PATH)
def test_models_equal_their_slow_path(found: Any, name: str) -> None:
    """Logits with left padding, every gradient, and generated tokens."""
    record = found["against_slow_path", name]
    assert record["bound"]
    assert all(module.startswith("longspan.compat.") for module in record["bound"])
    assert record["error"] < 5e-6, record
    assert record["same tokens"]


@pytest.mark.parametrize("name", PACKED)
def test_models_keep_packed_sequences_apart(found: Any, name: str) -> None:
    record = found["packed", name]
    assert record["error"] < 5e-6, record
    assert record["without packing"] > 1e-2, record
