"""Fixtures of the tests of the integrations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    # These models are too small for more, and on a busy machine threads wait for each other.
    import torch  # here, because it takes seconds

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
