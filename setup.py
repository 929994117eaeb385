"""Builds the extension with CMake, against the torch of the environment that runs this."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TOOLS = "`pip install 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.12' numpy` first"


def torch_folders() -> tuple[Path, Path]:
    """torch's include and library folders, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "longspan: torch is not installed here; `pip install torch` first (2.10 or later), "
            "or let pip fetch one to build against with a plain `pip install .`"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        sys.exit(f"longspan: torch 2.10 or later is needed, here is {version}")
    folder = Path(spec.origin).parent
    return folder / "include", folder / "lib"


def pybind11_include() -> str:
    """pybind11's headers, which setuptools does not bring."""
    try:
        import pybind11
    except ImportError:
        sys.exit(f"longspan: pybind11 is not installed here; {TOOLS}")
    return pybind11.get_include()


def tools_environment() -> dict[str, str]:
    """The environment with this Python's scripts first on PATH, where pip puts cmake and ninja."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            sys.exit(f"longspan: {tool} is not installed here; {TOOLS}")
    return {**os.environ, "PATH": path}


class CMakeBuild(build_ext):
    """Configures and builds the one extension; LONGSPAN_BUILD_DIR keeps CMake's folder elsewhere."""

    def build_extension(self, ext: Extension) -> None:
        """Build it to where setuptools expects it."""
        include, library = torch_folders()
        environment = tools_environment()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(os.environ.get("LONGSPAN_BUILD_DIR") or self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        python_include = [sysconfig.get_path("include"), pybind11_include()]
        subprocess.run(
            [
                "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                "-DLONGSPAN_BUILD_TESTS=OFF",
                "-DLONGSPAN_BUILD_EXTENSION=ON",
                f"-DLONGSPAN_TORCH_INCLUDE={include}",
                f"-DLONGSPAN_TORCH_LIBRARY={library}",
                f"-DLONGSPAN_PYTHON_INCLUDE={';'.join(python_include)}",
                f"-DLONGSPAN_EXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            ],
            check=True,
            env=environment,
        )  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(
            ["cmake", "--build", str(build), "--parallel", jobs, "--target", "longspan_extension"],
            check=True,
            env=environment,
        )


# pip asks for the metadata first, then downloads what it names, then builds: without torch that would
# be gigabytes before the build could say that it has none.
if {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv):
    torch_folders()

setup(ext_modules=[Extension("longspan._C", sources=[])], cmdclass={"build_ext": CMakeBuild},
      package_dir={"": "python"})  # fmt: skip
