"""A range of pages in a forked child, where the memory is the parent's."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

on_host = pytest.mark.parametrize("backend", ["host"], indirect=True)


@on_host
def test_a_forked_child_gets_a_clear_error_and_does_the_parent_no_harm(backend):
    code = """
        import os, torch, vattn
        pages = vattn.PageRange("1MiB")
        pages.map([(0, 2)])
        buffer = pages.tensor()
        buffer[:10] = 7
        pid = os.fork()
        if pid == 0:
            for call in (lambda: pages.map([(4, 1)]), lambda: pages.alias(4, 2),
                         lambda: pages.unmap([(0, 1)]), lambda: pages.mapped_pages, pages.check,
                         pages.mapped_runs, lambda: pages.is_mapped(0), pages.tensor):
                try:
                    call()
                except vattn.DriverError as error:
                    assert "forked" in str(error), error
                else:
                    os._exit(1)
            pages.close()
            del pages, buffer
            raise SystemExit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert bool((buffer[:10] == 7).all())
        pages.unmap([(0, 1)])
        pages.check()
        print("fine")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")
