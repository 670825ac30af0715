"""The layers of the source tree, and a few house limits, as rules that a test can check.

Pure functions from a folder to a list of sentences. A rule that never fired proves nothing, so
test_layering.py plants a violation of every rule in ``RULES`` and expects it here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring, which we want long

RULES = {
    "include-up": "includes point down: base <- driver <- core <- bindings",
    "include-driver": "core includes driver interfaces and decorators, no implementation",
    "include-system": "base and core include the standard library only",
    "include-root": "a quoted include starts at csrc/",
    "torch": "nothing in csrc names torch",
    "python": "only bindings name Python, pybind11 or DLPack",
    "driver-api": "only driver names CU*, cu*() or mmap and its relatives",
    "core-cuda": "core does not know that CUDA exists",
    "process-exit": "a library throws, it never ends the process",
    "empty-catch": "an empty catch block says why",
    "file-lines": f"a file has at most {MAX_FILE_LINES} lines",
    "framework": "a framework is imported by its own integration only",
    "module-import": "importing vattn needs nothing but the standard library",
    "integration-import": "integrations are imported lazily",
    "program-import": "the library does not know the programs on top of it",
    "bare-except": "except names what it catches",
    "function-lines": f"a function has at most {MAX_FUNCTION_LINES} lines",
}

# What a layer may include of the others (and of itself).
MAY_INCLUDE = {
    "base": {"base"},
    "driver": {"base", "driver"},
    "core": {"base", "driver", "core"},
    "bindings": {"base", "driver", "core", "bindings"},
}
# The interface, and decorators that know nothing but the interface.
CORE_MAY_INCLUDE = {"driver/vmm_driver.h", "driver/tracing_driver.h"}
# base/fork.cc and base/scheduling.cc need what has no standard counterpart.
SYSTEM_HEADERS = {"base": {"pthread.h"}, "core": set[str]()}

FRAMEWORKS = {"transformers", "vllm", "sglang", "accelerate"}
# Applications on top of the library: they may import what they show.
APPLICATIONS = {"bench", "demo", "replay"}
# What only programs import: those, and the others that the command line runs.
PROGRAMS = APPLICATIONS | {"__main__", "cli", "doctor", "plan"}
_PROGRAM_MODULES = [["vattn", name] for name in sorted(PROGRAMS)]

_NAMES: list[tuple[str, set[str], re.Pattern[str]]] = [
    # rule, the layers it holds for, what must not be there
    ("torch", set(MAY_INCLUDE), re.compile(r"\b(?:torch|at|c10)\s*::")),
    (
        "python",
        {"base", "driver", "core"},
        re.compile(
            r"\bpybind11\b|\bPYBIND11_\w+|\bpy\s*::|\bPy[A-Z_]\w*"
            r"|(?i:dlpack)|\bDL(?:Tensor|ManagedTensor|Device|DataType)\w*|\bkDL[A-Z]\w*"
        ),
    ),
    (
        "driver-api",
        {"base", "core", "bindings"},
        re.compile(
            r"\bCU[A-Za-z_]\w*|\bcu[A-Z]\w*"
            r"|\b(?:mmap|munmap|mremap|mprotect|madvise|fallocate)\b|\bmemfd_\w+"
            r"|\b(?:MAP|MADV|PROT)_[A-Z]+\b"
        ),
    ),
    ("core-cuda", {"core"}, re.compile(r"\w*(?i:cuda)\w*")),
    (
        "process-exit",
        set(MAY_INCLUDE),
        re.compile(r"\b(?:exit|_exit|_Exit|quick_exit|abort|terminate)\s*\("),
    ),
]

_TOKENS = re.compile(
    r"""(?P<comment> //[^\n]* | /\*.*?\*/ )
      | (?P<string> R"(?P<delimiter>[^()\\\s]{0,16})\(.*?\)(?P=delimiter)"
                  | "(?:\\.|[^"\\\n])*"
                  | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+' )  # not the ' in 65'536""",
    re.DOTALL | re.VERBOSE,
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?P<open>[<"])(?P<name>[^>"\n]+)[>"]', re.M)
_EMPTY_CATCH = re.compile(r"\bcatch\s*\([^)]*\)\s*\{\s*\}")


class Source(NamedTuple):
    path: PurePosixPath  # from the root of the tree
    text: str

    def at(self, line: int, rule: str, what: str) -> str:
        return f"{self.path}:{line}: [{rule}] {what}; {RULES[rule]}"

    def at_offset(self, offset: int, rule: str, what: str) -> str:
        return self.at(self.text.count("\n", 0, offset) + 1, rule, what)


def check_tree(root: Path) -> list[str]:
    """Every violation in ``root``/csrc and ``root``/vattn, as ``path:line: [rule] sentence``."""
    found: list[str] = []
    for source in _sources(root / "csrc", {".h", ".cc"}, root):
        found += [*_check_length(source), *check_cpp(source)]
    for source in _sources(root / "vattn", {".py"}, root):
        found += [*_check_length(source), *check_python(source)]
    return found


def _sources(folder: Path, suffixes: set[str], root: Path) -> Iterator[Source]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in suffixes:
            yield Source(PurePosixPath(path.relative_to(root)), path.read_text())


def _check_length(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield source.at(lines, "file-lines", f"{lines} lines")


# C++


def blank(text: str, kinds: set[str]) -> str:
    """``text`` with its comments or strings replaced by spaces: every offset stays what it was."""

    def replace(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0]) if match.lastgroup in kinds else match[0]

    return _TOKENS.sub(replace, text)


def check_cpp(source: Source) -> Iterator[str]:
    layer = source.path.parts[1]
    if layer not in MAY_INCLUDE:
        yield source.at(1, "include-up", f"csrc/{layer} is not a layer")
        return
    for match in _INCLUDE.finditer(blank(source.text, {"comment"})):
        broken = _check_include(layer, match["name"], quoted=match["open"] == '"')
        if broken is not None:
            yield source.at_offset(match.start(), broken, f"{layer} includes {match['name']}")
    code = blank(source.text, {"comment", "string"})
    for rule, layers, names in _NAMES:
        for match in names.finditer(code) if layer in layers else ():
            yield source.at_offset(match.start(), rule, f"{layer} names {match[0].strip()}")
    for match in _EMPTY_CATCH.finditer(source.text):  # a comment in the block is enough
        yield source.at_offset(match.start(), "empty-catch", "an empty catch block")


def _check_include(layer: str, name: str, *, quoted: bool) -> str | None:
    """The rule that ``#include name`` breaks in ``layer``."""
    top = name.split("/")[0]
    if top in {"torch", "ATen", "c10"}:
        return "torch"
    if top in {"pybind11", "dlpack", "Python.h", "dlpack.h"}:
        return None if layer == "bindings" else "python"
    if quoted:
        if top not in MAY_INCLUDE:
            return "include-root"
        if top not in MAY_INCLUDE[layer]:
            return "include-up"
        if layer == "core" and top == "driver" and name not in CORE_MAY_INCLUDE:
            return "include-driver"
        return None
    is_standard = re.fullmatch(r"[a-z_]+", name) is not None
    if layer in SYSTEM_HEADERS and not is_standard and name not in SYSTEM_HEADERS[layer]:
        return "include-system"
    return None


# Python


def check_python(source: Source) -> Iterator[str]:
    tree = ast.parse(source.text)
    yield from _check_imports(source, tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield source.at(node.lineno, "bare-except", "a bare except")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = _function_lines(node)
            if lines > MAX_FUNCTION_LINES:
                yield source.at(node.lineno, "function-lines", f"{node.name} has {lines} lines")


def _function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def _check_imports(source: Source, tree: ast.Module) -> Iterator[str]:
    part, *rest = source.path.parts[1:]
    in_integration = part == "integrations" and rest != ["__init__.py"]
    own = rest[0].removesuffix(".py") if in_integration else ""
    is_application = part.removesuffix(".py") in APPLICATIONS
    is_program = part.removesuffix(".py") in PROGRAMS
    for node, at_import_time in _imports(tree):
        for module in _imported_modules(source, node):
            top = module.split(".")[0]
            what = f"imports {module}"
            # transformers.py, transformers/ and transformers_cache.py are all transformers' own.
            is_own = own == top or own.startswith(f"{top}_")
            if top in FRAMEWORKS and not is_own and not is_application:
                yield source.at(node.lineno, "framework", what)
            elif not is_program and module.split(".")[:2] in _PROGRAM_MODULES:
                yield source.at(node.lineno, "program-import", what)
            elif not at_import_time or in_integration or is_application:
                continue
            elif top not in {"vattn", *sys.stdlib_module_names}:
                yield source.at(node.lineno, "module-import", what)
            elif module.startswith("vattn.integrations.") and part != "integrations":
                yield source.at(node.lineno, "integration-import", what)


def _imports(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import that can run, and whether it runs when the module is imported."""

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[tuple[ast.AST, bool]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import_time = False
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children = list(node.orelse)
        yield node, at_import_time
        for child in children:
            yield from visit(child, at_import_time)

    for node, at_import_time in visit(tree, True):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, at_import_time


def _imported_modules(source: Source, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Absolute names; ``from a import b`` counts as ``a.b``, since b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        # The package of a/b.py is a, and so is that of a/__init__.py.
        package = source.path.parts[:-1]
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]
