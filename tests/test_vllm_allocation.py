"""The hook that answers vLLM's one allocation, and notices when vLLM does it otherwise."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from vattn.integrations.vllm.allocation import KvAllocation, check_views  # noqa: E402

SIZE = 4096


def _hook(buffer: torch.Tensor) -> KvAllocation:
    return KvAllocation(SIZE, lambda: buffer)


def test_the_kv_buffer_is_ours_and_everything_else_is_torchs() -> None:
    buffer = torch.ones(SIZE + 64, dtype=torch.int8)
    with _hook(buffer):
        other = torch.zeros(SIZE, dtype=torch.float32)
        smaller = torch.zeros(SIZE // 2, dtype=torch.int8)
        shaped = torch.zeros((SIZE, 1), dtype=torch.int8)
        kv = torch.zeros(SIZE, dtype=torch.int8, device=torch.device("cpu"))
    assert kv.data_ptr() == buffer.data_ptr()
    assert kv.shape == (SIZE,)
    assert int(kv.sum()) == SIZE, "nobody may write to it: most of it has no memory"
    for tensor in (other, smaller, shaped):
        assert not tensor.any()
        assert tensor.data_ptr() != buffer.data_ptr()


def test_outside_of_the_context_nothing_is_answered() -> None:
    buffer = torch.ones(SIZE, dtype=torch.int8)
    with _hook(buffer):
        torch.zeros(SIZE, dtype=torch.int8)
    assert torch.zeros(SIZE, dtype=torch.int8).data_ptr() != buffer.data_ptr()


@pytest.mark.parametrize("times", [0, 2])
def test_a_vllm_that_allocates_otherwise_is_refused(times: int) -> None:
    buffer = torch.ones(SIZE, dtype=torch.int8)
    hook = _hook(buffer)
    hook.__enter__()
    for _ in range(times):
        torch.zeros(SIZE, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=f"{times} int8 buffers of 4096 bytes, expected 1"):
        hook.__exit__(None, None, None)


def test_an_error_inside_is_not_hidden_by_the_check() -> None:
    with pytest.raises(KeyError), _hook(torch.ones(SIZE, dtype=torch.int8)):
        raise KeyError("vLLM's own")


def test_a_kv_cache_outside_of_the_buffer_is_noticed() -> None:
    buffer = torch.ones(SIZE, dtype=torch.int8)
    check_views(buffer, {"first": buffer[:16], "last": buffer[-1:]})
    with pytest.raises(RuntimeError, match="KV cache of stray is not in the buffer"):
        check_views(buffer, {"first": buffer[:16], "stray": torch.ones(16)})
