"""Builds the extension with CMake, against the torch of the environment that runs this."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folders() -> tuple[Path, Path]:
    """torch's include and library folders, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "longspan: torch is not installed here; `pip install torch` first (2.10 or later), "
            "or let pip fetch one to build against with a plain `pip install .`"
        )
    folder = Path(spec.origin).parent
    return folder / "include", folder / "lib"


class CMakeBuild(build_ext):
    """Configures and builds the one extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        include, library = torch_folders()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        python_include = [sysconfig.get_path("include"), pybind11.get_include()]
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
        )  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


setup(ext_modules=[Extension("longspan._C", sources=[])], cmdclass={"build_ext": CMakeBuild},
      package_dir={"": "python"})  # fmt: skip
