"""The package as users get it: imports, wheels, and what they are told where something is missing."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import longspan

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(longspan.__file__).parent


def python(
    *arguments: str, path: list[Path] | None = None, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run this Python in another folder, with ``path`` before everything else that it imports from."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_imports_from_another_folder(tmp_path):
    done = python("-c", "import longspan; print(longspan.isa())", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == longspan.isa()


def test_version_is_the_one_of_the_metadata():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'^version = "{re.escape(longspan.__version__)}"$', text, re.M)


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cpu", "1.13.1", "2.0.0a0+git1234"])
def test_old_torch_is_an_import_error_that_says_so(tmp_path, version):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    done = python("-c", "import longspan", path=[tmp_path, PACKAGE.parent], cwd=tmp_path)
    assert done.returncode == 1
    assert last_line(done.stderr) == (
        f"ImportError: longspan needs torch 2.10 or later; this is torch {version}"
    )


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.10.0", (2, 10)), ("2.10.0a0+git12", (2, 10)), ("2.13.0+cpu", (2, 13)), ("3.0", (3, 0))],
)
def test_versions_are_read(version, expected):
    assert longspan._version(version) == expected


def test_missing_extension_is_an_import_error_that_says_so(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "longspan", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    done = python("-c", "import longspan", path=[tmp_path], cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: longspan's compiled extension is missing" in last_line(done.stderr)
    assert "pip install --no-build-isolation ." in last_line(done.stderr)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            "find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *_: None if name == 'torch' else find(name)",
            "longspan: torch is not installed here; `pip install torch` first (2.10 or later), or",
        ),
        (
            "version = importlib.metadata.version\n"
            "importlib.metadata.version = lambda name: '2.9.1' if name == 'torch' else version(name)",
            "longspan: torch 2.10 or later is needed, here is 2.9.1",
        ),
        (
            "import shutil\nshutil.which = lambda *_, **__: None",
            "longspan: cmake is not installed here; `pip install",
        ),
    ],
    ids=["no torch", "old torch", "no cmake"],
)
def test_setup_says_what_is_missing_in_one_line(tmp_path, before, message):
    script = (
        "import importlib.metadata, importlib.util, runpy, sys\n"
        f"{before}\n"
        f"sys.argv = ['setup.py', '-q', 'build_ext', '--build-temp', {str(tmp_path / 'temp')!r}, "
        f"'--build-lib', {str(tmp_path / 'lib')!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = python("-c", script, cwd=ROOT)
    assert done.returncode == 1
    assert last_line(done.stderr).startswith(message)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "lib").exists()


def test_source_archive_has_what_a_build_needs(tmp_path):
    done = python("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = [ROOT / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE")]
    needed += (ROOT / "csrc").rglob("*.*")
    needed += (ROOT / "python" / "longspan").rglob("*.py")
    needed += (ROOT / "tests" / "cpp").glob("*.*")
    assert {str(path.relative_to(ROOT)) for path in needed} <= names


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime(tmp_path):
    script = (
        "import re, torch, longspan\n"
        "x = torch.randn(1, 2, 256, 16)\n"
        "longspan.attention(x, x, x)\n"
        "torch.randn(512, 512) @ torch.randn(512, 512)\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(*sorted(set(re.findall(r'\\S*/lib(?:gomp|omp|iomp)\\S*', maps))))\n"
    )
    done = python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout


@pytest.mark.slow
def test_wheel_imports_in_another_place(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert any(re.fullmatch(r"longspan/_C\..*so", name) for name in names)
    assert "longspan/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Dist: torch>=2.10" in metadata
    sources = {str(p.relative_to(ROOT / "python")) for p in (ROOT / "python" / "longspan").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [*pip, "install", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    script = (
        "import torch, longspan\n"
        "x = torch.randn(1, 2, 100, 16)\n"
        "expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)\n"
        "torch.testing.assert_close(longspan.attention(x, x, x, causal=True), expected)\n"
        "print(longspan.__file__)\n"
    )
    done = python("-c", script, path=[site], cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site)
