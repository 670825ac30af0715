"""Builds the extension vattn._C. Everything else is in pyproject.toml."""

import os
import shlex
import sys
import sysconfig
import zlib
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
SOURCES = sorted(str(path) for path in CSRC.rglob("*.cc"))
HEADERS = sorted(str(path) for path in CSRC.rglob("*.h"))
CXXFLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))


class BuildExt(build_ext):
    def finalize_options(self):
        super().finalize_options()
        # An editable install compiles in a throw-away directory. Keep the objects instead, so that
        # one edited file means one compilation; apart for every Python and every set of flags.
        key = zlib.crc32(" ".join(CXXFLAGS).encode())
        self.build_temp = f"build/{sys.implementation.cache_tag}-{key:08x}"


def needs_recompile(obj, src):
    inputs = [src, __file__, *HEADERS]
    return os.path.getmtime(obj) <= max(map(os.path.getmtime, inputs))


extension = Extension(
    "vattn._C",
    sources=SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    language="c++",
    # -DNDEBUG and -O3 usually come with Python's own flags, but CXXFLAGS in the environment
    # replaces those. -isystem: warnings are for our own code. CXXFLAGS again at the end, so that a
    # user's `-O0 -g` wins over what is here.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-DNDEBUG",
        "-Wall",
        "-Wextra",
        "-Wconversion",
        "-fvisibility=hidden",
        "-pthread",
        *("-isystem", pybind11.get_include()),
        *("-isystem", sysconfig.get_path("include")),
        *CXXFLAGS,
    ],
    extra_link_args=["-pthread"],
    libraries=["dl"],
)

with ParallelCompile("VATTN_BUILD_JOBS", needs_recompile=needs_recompile):
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
