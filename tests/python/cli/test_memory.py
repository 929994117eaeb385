"""What the command does to its process's memory."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from longspan.cli import _memory

def faults_of_the_third():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)
        found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found

before, kept = faults_of_the_third(), _memory.keep_freed_memory()
print(kept, before, faults_of_the_third())
with _memory.PeakMemory() as memory:  # what is kept goes back first, so that a rise is seen
    torch.ones(20_000_000)
print(memory.bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what glibc can be told")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept, before, after, rise = done.stdout.split()
    assert kept == "True"
    assert int(before) > 30  # pages of 4 KiB, or huge ones of 2 MiB
    assert int(after) < 0.1 * int(before)
    assert 70e6 < int(rise) < 100e6
