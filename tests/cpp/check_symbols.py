"""Check that object files of one instruction set share no symbol with the others.

A weak (or unique) symbol is merged at link time with those of the same name in other objects: an
AVX-512 copy of, say, a std::vector's function could then run on a processor without AVX-512. So every
weak symbol of a kernel object must lie in the namespace of its instruction set.

    check_symbols.py NM LEVEL OBJECT...     exits with 1 and names the symbols that do not
"""

import re
import subprocess
import sys


def weak_symbols_outside(nm: str, level: str, path: str) -> list[str]:
    """The mangled names of path's weak and unique definitions outside longspan::<level>."""
    # A mangled name may begin with a special prefix (guard variable, vtable, type), nest in functions
    # (Z), and carry qualifiers (N, K); then comes the outermost namespace.
    inside = re.compile(rf"^_Z(?:GV|GR|T[VTIS])?Z*N?[KVrRO]*8longspan{len(level)}{level}")
    listing = subprocess.run(
        [nm, "--defined-only", "--portability", path], check=True, capture_output=True, text=True
    ).stdout
    entries = [line.split()[:2] for line in listing.splitlines() if line.strip()]
    weak = [name for name, kind in entries if kind in "WVuwv"]
    # DW.ref.*: the exception tables' pointer to the C++ runtime, which is the same data in all objects.
    return [name for name in weak if not inside.match(name) and not name.startswith("DW.ref.")]


def main() -> int:
    """Print what is wrong, if anything."""
    nm, level, *objects = sys.argv[1:]
    if not objects:
        sys.exit("no objects to check")
    wrong = 0
    for path in objects:
        for name in weak_symbols_outside(nm, level, path):
            print(f"{path}: weak symbol outside longspan::{level}: {name}")
            wrong += 1
    if not wrong:
        print(f"{len(objects)} objects of {level}: every weak symbol lies in longspan::{level}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
