"""longspan as part of a process: threads, fork, signals, and the choice of instruction set."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import longspan
from longspan import _C


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(longspan.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_one_openmp_runtime() -> None:
    """Two would fight for the processors; torch brings libgomp and the kernels share it."""
    done = python("""
        import torch, longspan
        x = torch.randn(1, 4, 500, 16, requires_grad=True)
        longspan.attention(x, x, x).sum().backward()
        lines = open("/proc/self/maps").read().splitlines()
        files = {line.split()[-1] for line in lines if "/" in line}
        for file in files:
            name = file.rsplit("/", 1)[1]
            if any(runtime in name for runtime in ("libgomp", "libomp", "libiomp")):
                print(file)
    """)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout


@pytest.mark.parametrize("level", _C.isa_levels())
def test_the_environment_chooses_the_instruction_set(level: str) -> None:
    done = python("import longspan; print(longspan.isa())", LONGSPAN_ISA=level)
    assert done.stdout.split() == [level], done.stderr


def test_the_best_instruction_set_is_the_default() -> None:
    done = python("import longspan; print(longspan.isa())", LONGSPAN_ISA="")
    assert done.stdout.split() == [_C.isa_levels()[0]], done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = python("import longspan", LONGSPAN_ISA="sse9")
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "sse9" in done.stderr
    assert ", ".join(_C.isa_levels()) in done.stderr


def test_instruction_sets_agree() -> None:
    """To rounding: the fast ones sum in another order, and bfloat16's dot product flushes denormals."""
    before = longspan.isa()
    found = {}
    try:
        for level in _C.isa_levels():
            assert _C.set_isa(level)
            torch.manual_seed(0)
            x = torch.randn(1, 2, 300, 40)
            found[level] = longspan.attention(x, x, x, causal=True)
        assert not _C.set_isa("sse9")
        assert longspan.isa() == level
    finally:
        _C.set_isa(before)
    for out in found.values():
        torch.testing.assert_close(out, found["generic"], rtol=1e-5, atol=1e-5)


def test_fork_after_a_call() -> None:
    """A child of fork has none of the parent's threads, and must not wait for them."""
    done = python("""
        import os, sys, torch, longspan
        torch.set_num_threads(3)
        x = torch.randn(1, 4, 500, 16, requires_grad=True)

        def call():
            out = longspan.attention(x, x, x, causal=True)
            (d_x,) = torch.autograd.grad(out.sum(), x) if os.getpid() == parent else (None,)
            y = x.detach()
            step = longspan.attention_decode(y[:, :, :1], y, y, torch.tensor([500]))
            return out.detach(), step

        parent = os.getpid()
        want = call()
        child = os.fork()
        if child == 0:
            same = all(torch.equal(a, b) for a, b in zip(call(), want))
            os._exit(0 if same else 3)
        _, status = os.waitpid(child, 0)
        again = all(torch.equal(a, b) for a, b in zip(call(), want))
        sys.exit(os.waitstatus_to_exitcode(status) or (0 if again else 4))
    """)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_forked_workers_of_a_data_loader() -> None:
    done = python("""
        import torch, longspan
        from torch.utils.data import DataLoader

        x = torch.randn(8, 1, 2, 300, 16)
        want = torch.stack([longspan.attention(row, row, row) for row in x])

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, i):
                return longspan.attention(x[i], x[i], x[i])

        loader = DataLoader(Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork")
        for batch in loader:
            torch.testing.assert_close(batch, want, rtol=0, atol=0)
    """)
    assert done.returncode == 0, done.stderr


def test_interrupt_during_a_call() -> None:
    """Ctrl-C while the kernel runs: KeyboardInterrupt after it, and everything still works."""
    code = """
        import torch, longspan
        x = torch.randn(1, 8, 6000, 64)
        longspan.attention(x[:, :, :100], x, x)
        try:
            print("ready", flush=True)
            for _ in range(1000):
                longspan.attention(x, x, x)
            print("never interrupted")
        except KeyboardInterrupt:
            y = x[:, :, :50]
            torch.testing.assert_close(
                longspan.attention(y, y, y), torch.nn.functional.scaled_dot_product_attention(y, y, y)
            )
            print("interrupted")
    """
    path = str(Path(longspan.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        child.send_signal(signal.SIGINT)
        try:
            out, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert out.strip() == "interrupted"
    assert child.returncode == 0


def test_calls_from_many_threads() -> None:
    """Callers of their own threads do not disturb each other."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [torch.randn(1, 2, 200, 16) for _ in range(8)]
    want = [longspan.attention(x, x, x, causal=True) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: longspan.attention(x, x, x, causal=True), inputs * 4))
    for out, expected in zip(found, want * 4):
        assert torch.equal(out, expected)
