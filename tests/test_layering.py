"""The tree keeps its layers, and the checker that says so catches a violation of every rule."""

from __future__ import annotations

from pathlib import Path

import pytest
from layering import MAX_FILE_LINES, MAX_FUNCTION_LINES, RULES, check_tree

ROOT = Path(__file__).resolve().parent.parent

LONG_FUNCTION = "def f() -> None:\n" + "    pass\n" * MAX_FUNCTION_LINES

# rule, file, its text: each breaks its rule once and no other.
PLANTED = [
    ("include-up", "csrc/base/a.h", '#include "driver/vmm_driver.h"\n'),
    ("include-up", "csrc/base/a.h", '#include "core/row.h"\n'),
    ("include-up", "csrc/driver/a.h", '#include "core/row.h"\n'),
    ("include-up", "csrc/core/a.h", '#include "bindings/module.h"\n'),
    ("include-up", "csrc/core/a.h", '  #  include "bindings/module.h"\n'),
    ("include-up", "csrc/misc/a.h", "\n"),
    ("include-driver", "csrc/core/a.cc", '#include "driver/cuda_api.h"\n'),
    ("include-driver", "csrc/core/a.cc", '#include "driver/host_driver.h"\n'),
    ("include-driver", "csrc/core/a.cc", '#include "driver/fault_driver.h"\n'),
    ("include-system", "csrc/core/a.cc", "#include <sys/mman.h>\n"),
    ("include-system", "csrc/core/a.cc", "#include <unistd.h>\n"),
    ("include-system", "csrc/base/a.cc", "#include <dlfcn.h>\n"),
    ("include-root", "csrc/core/a.cc", '#include "row.h"\n'),
    ("include-root", "csrc/core/a.cc", '#include "../driver/cuda_api.h"\n'),
    ("torch", "csrc/bindings/a.cc", "#include <torch/extension.h>\n"),
    ("torch", "csrc/bindings/a.cc", "at::Tensor t;\n"),
    ("python", "csrc/core/a.cc", "#include <Python.h>\n"),
    ("python", "csrc/driver/a.cc", "#include <pybind11/pybind11.h>\n"),
    ("python", "csrc/core/a.cc", "PyObject* object;\n"),
    ("python", "csrc/core/a.cc", "py::object object;\n"),
    ("python", "csrc/core/a.cc", "int to_dlpack();\n"),
    ("python", "csrc/base/a.cc", "struct DLManagedTensorVersioned;\n"),
    ("driver-api", "csrc/bindings/a.cc", "CUresult result;\n"),
    ("driver-api", "csrc/bindings/a.cc", "CUDA_SUCCESS;\n"),
    ("driver-api", "csrc/base/a.cc", "cuMemCreate();\n"),
    ("driver-api", "csrc/core/a.cc", "auto* p = mmap();\n"),
    ("driver-api", "csrc/core/a.cc", "memfd_create();\n"),
    ("driver-api", "csrc/bindings/a.cc", "int flags = MAP_FIXED;\n"),
    # On the line after a string that ends in a backslash, and after a digit separator.
    ("driver-api", "csrc/core/a.cc", 'f("\\\\"); // "\nint n = 65\'536; munmap(); n = 1\'024;\n'),
    ("core-cuda", "csrc/core/a.cc", "bool is_cuda;\n"),
    ("process-exit", "csrc/core/a.cc", "void f() { std::exit(1); }\n"),
    ("process-exit", "csrc/driver/a.cc", "void f() { abort (); }\n"),
    ("empty-catch", "csrc/core/a.cc", "void f() { try { g(); } catch (...) {\n} }\n"),
    ("file-lines", "csrc/core/a.cc", "\n" * (MAX_FILE_LINES + 1)),
    ("file-lines", "vattn/a.py", "\n" * (MAX_FILE_LINES + 1)),
    ("framework", "vattn/a.py", "def f() -> None:\n    import transformers\n"),
    ("framework", "vattn/a.py", "from vllm.v1 import core\n"),
    ("framework", "vattn/integrations/__init__.py", "import transformers\n"),
    ("framework", "vattn/integrations/vllm/a.py", "import transformers.cache_utils\n"),
    ("module-import", "vattn/a.py", "import torch\n"),
    (
        "module-import",
        "vattn/a.py",
        "try:\n    from torch import nn\nfinally:\n    pass\n",
    ),
    ("module-import", "vattn/a.py", "class A:\n    import numpy as np\n"),
    ("module-import", "vattn/integrations/__init__.py", "import torch\n"),
    ("integration-import", "vattn/a.py", "from vattn.integrations import vllm\n"),
    ("integration-import", "vattn/__init__.py", "from .integrations.vllm import connector\n"),
    ("integration-import", "vattn/tools/a.py", "from ..integrations import vllm\n"),
    ("program-import", "vattn/a.py", "def f():\n    from vattn import bench\n"),
    ("program-import", "vattn/integrations/vllm/a.py", "from vattn.replay.trace import read\n"),
    ("program-import", "vattn/a.py", "from .cli import main\n"),
    ("bare-except", "vattn/a.py", "try:\n    f()\nexcept:\n    pass\n"),
    ("function-lines", "vattn/a.py", LONG_FUNCTION),
    ("function-lines", "vattn/a.py", "async " + LONG_FUNCTION),
]

# What looks like a violation and is none.
LEGAL = {
    "csrc/base/fork.cc": "#include <pthread.h>\n",
    "csrc/driver/cuda_api.cc": (
        '#include <dlfcn.h>\n#include "base/log.h"\n#include "driver/cuda_api.h"\nCUresult r;\n'
    ),
    "csrc/core/row.cc": (
        '#include <vector>\n#include "driver/vmm_driver.h"\n#include "driver/tracing_driver.h"\n'
        "// mmap() here would be wrong, and so would abort()\n"
        '/*\n#include "driver/cuda_api.h"\nCUresult */\n'
        'const char* text = "cuMemMap \\" abort()";\n'
        'const char* raw = R"x(" abort() ")x";\n'
        "const char quote = '\"'; int n = 65'536; int curve, unmap, recurse; Stream exit_stream;\n"
        "void f() { try { g(); } catch (...) { /* best effort */ } }\n"
    ),
    "csrc/bindings/module.cc": (
        '#include <pybind11/pybind11.h>\n#include "core/row.h"\n#include "driver/cuda_device.h"\n'
        "DLManagedTensor* t; PyObject* o; CudaVmmDriver d;\n"
    ),
    "vattn/__init__.py": (
        "from __future__ import annotations\nimport typing\nfrom typing import TYPE_CHECKING\n"
        "from vattn import _C\nfrom ._C import Error\n"
        "if TYPE_CHECKING:\n    import torch\nif typing.TYPE_CHECKING:\n    import numpy\n"
        "def __getattr__(name: str) -> object:\n"
        "    import torch\n    from vattn.integrations import vllm\n    return vllm\n"
    ),
    "vattn/cli.py": "from vattn.errors import E\ndef f():\n    from vattn.bench import step\n",
    "vattn/demo/__init__.py": "import transformers\nimport torch\n",
    "vattn/integrations/transformers.py": "import torch\nimport transformers\n",
    "vattn/integrations/transformers_cache.py": "import transformers\n",
    "vattn/integrations/vllm/a.py": "from vllm.v1 import core\nfrom . import b\n",
    "vattn/a.py": (
        "def f() -> None:\n"
        + '    """Text.\n'
        + "    text\n" * MAX_FUNCTION_LINES
        + '    """\n'
        + "    pass\n" * (MAX_FUNCTION_LINES - 1)
    ),
}


def plant(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_tree_keeps_its_layers() -> None:
    assert list((ROOT / "csrc").glob("*/*.cc")), "looking in the wrong place"
    assert list((ROOT / "vattn").glob("*.py")), "looking in the wrong place"
    found = check_tree(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_planted_violation_is_caught(tmp_path: Path, rule: str, name: str, text: str) -> None:
    plant(tmp_path, name, text)
    found = check_tree(tmp_path)
    assert found, f"{rule} let it pass"
    assert all(f"[{rule}]" in line and line.startswith(f"{name}:") for line in found), found


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


def test_what_only_looks_like_a_violation_passes(tmp_path: Path) -> None:
    for name, text in LEGAL.items():
        plant(tmp_path, name, text)
    assert check_tree(tmp_path) == []


def test_a_violation_names_its_line(tmp_path: Path) -> None:
    plant(tmp_path, "csrc/core/a.cc", "/* two\nlines */\nauto* p = mmap();\n")
    assert check_tree(tmp_path)[0].startswith("csrc/core/a.cc:3: [driver-api] core names mmap")
