"""``attn_implementation="vattn"`` gives what transformers' own attention gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, filled, generate, left_padded, make_model, vattn_cache
from transformers import EncoderDecoderCache

from vattn.integrations.transformers import attention, cpu_attention, cuda_attention

VIA_INTERFACE = [name for name in FAMILIES if name != "bloom"]


def with_vattn(name: str) -> Any:
    model = make_model(name, "eager")
    model.set_attn_implementation("vattn")
    assert model.config._attn_implementation == "vattn"
    return model


def cache_for(model: Any) -> Any:
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(vattn_cache(model), vattn_cache(model))
    return vattn_cache(model)


@pytest.mark.parametrize("name", VIA_INTERFACE)
def test_every_family_says_the_same_as_with_eager(name: str) -> None:
    model = with_vattn(name)
    inputs = left_padded(5, 37, 21)
    ours = generate(model, inputs, cache_for(model))
    stock = generate(make_model(name, "eager"), inputs, None)
    assert ours.sequences.equal(stock.sequences)
    for mine, theirs in zip(ours.logits, stock.logits, strict=True):
        # Another order of summation, over logits of up to 10.
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


def test_it_can_be_asked_for_when_the_model_is_made() -> None:
    config = make_model("llama").config
    model = type(make_model("llama"))._from_config(config, attn_implementation="vattn")
    assert model.config._attn_implementation == "vattn"


def test_dropout_and_gradients_are_left_to_sdpa() -> None:
    ids = left_padded(9)["input_ids"]
    losses = []
    for attention_name in ("vattn", "sdpa"):
        model = make_model("llama", attention_dropout=0.5).train()
        model.set_attn_implementation(attention_name)
        torch.manual_seed(3)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append((loss.item(), model.lm_head.weight.grad.clone()))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1].equal(losses[1][1])


def test_another_prompt_on_a_filled_cache_is_refused() -> None:
    model = with_vattn("llama")
    for fresh in (left_padded(9), left_padded(7)):
        with vattn_cache(model) as cache:
            filled(model, cache, left_padded(9))
            with pytest.raises(ValueError, match=r"9 tokens are in the cache.*reset\(\)"):
                filled(model, cache, fresh)


# The computation, against attention written down.


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sees: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if sees is not None:
        scores = scores.masked_fill(~sees, -torch.inf)
    total = scores.exp().sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.view(1, -1, 1, 1).exp()
    return (scores.exp() / total) @ value


def qkv(queries: int, keys: int, heads: int = 6, kv_heads: int = 2, v_dim: int = 8) -> Any:
    torch.manual_seed(0)
    # Rows longer than what is used, as in the cache.
    key, value = torch.randn(3, kv_heads, 64, 8), torch.randn(3, kv_heads, 64, v_dim)
    return torch.randn(3, heads, queries, 8), key[:, :, :keys], value[:, :, :keys]


def causal(queries: int, keys: int, window: int | None = None) -> torch.Tensor:
    behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (behind >= 0) & (behind < (window or keys))


PADDING = torch.tensor([0, 4, 2])


def not_padding(keys: int) -> torch.Tensor:
    return torch.arange(keys) >= PADDING[:, None]


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("v_dim", [8, 5])
def test_groups_are_folded_under_any_mask(heads: int, queries: int, keys: int, v_dim: int) -> None:
    q, k, v = qkv(queries, keys, heads, v_dim=v_dim)
    torch.testing.assert_close(cpu_attention.attend(q, k, v), plain_attention(q, k, v))
    sees = causal(queries, keys) & not_padding(keys)[:, None, None]
    sees[..., -1] = True  # every query sees something
    ours = cpu_attention.attend(q, k, v, mask=sees, scaling=0.3)
    torch.testing.assert_close(ours, plain_attention(q, k, v, sees, scaling=0.3))
    for bias in (torch.randn(queries, keys), torch.randn(3, heads, queries, keys)):
        ours = cpu_attention.attend(q, k, v, mask=bias)
        torch.testing.assert_close(ours, plain_attention(q, k, v, bias=bias))


@pytest.mark.parametrize("extra", [{"softcap": 0.7}, {"sinks": torch.randn(6)}])
@pytest.mark.parametrize("queries", [1, 4])
def test_softcap_and_sinks(extra: dict[str, Any], queries: int) -> None:
    q, k, v = qkv(queries, 9)
    sees = causal(queries, 9)
    ours = cpu_attention.attend(q, k, v, mask=sees, **extra)
    torch.testing.assert_close(ours, plain_attention(q, k, v, sees, **extra))
    q, k, v = qkv(9, 9)
    ours = cpu_attention.attend(q, k, v, is_causal=True, **extra)
    torch.testing.assert_close(ours, plain_attention(q, k, v, causal(9, 9), **extra))


# What is called on CUDA, with kernels that compute on the CPU what the real ones document.


def flash_attn_stand_in(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    cache_leftpad: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """flash_attn_with_kvcache of flash-attn 2.8: [batch, tokens, heads, dim]."""
    assert cache_seqlens.dtype == torch.int32
    rows = []
    for b, used in enumerate(cache_seqlens.tolist()):
        start = 0 if cache_leftpad is None else int(cache_leftpad[b])
        k, v = k_cache[b, start:used], v_cache[b, start:used]
        rows.append(row_attention(q[b], k, v, softmax_scale, causal, window_size, softcap))
    return torch.stack(rows)


def varlen_stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn: [tokens, heads, dim]."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    rows = []
    for b, used in enumerate(seqused_k.tolist()):
        start = int(cu_seq_k[b])
        q = query[cu_seq_q[b] : cu_seq_q[b + 1]]
        assert len(q) <= max_q and used <= max_k
        k, v = key[start : start + used], value[start : start + used]
        is_causal = window_size[1] == 0
        rows.append(row_attention(q, k, v, scale, is_causal, window_size, 0.0))
    return torch.cat(rows)


def row_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    is_causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    window = None if window_size[0] < 0 else window_size[0] + 1
    sees = causal(len(q), len(k), window) if is_causal else None
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    result = plain_attention(q, k, v, sees, scaling=scale, softcap=softcap or None)
    return result[0].transpose(0, 1)


@pytest.fixture(params=["flash_attn", "varlen", "neither"])
def cuda_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kernels: dict[str, Callable[..., torch.Tensor] | None] = {
        "flash_attn_with_kvcache": flash_attn_stand_in if request.param == "flash_attn" else None,
        "varlen_attn": varlen_stand_in if request.param == "varlen" else None,
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(cuda_attention, name, lambda kernel=kernel: kernel)
    has_one = request.param != "neither"
    monkeypatch.setattr(cuda_attention, "has_flash", lambda _device, _dtype: has_one)
    return str(request.param)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (4, 9), (9, 9)])
@pytest.mark.usefixtures("cuda_kernel")
def test_rows_are_read_in_place_on_cuda(queries: int, keys: int, window: int | None) -> None:
    q, k, v = qkv(queries, keys)
    # Token-major memory, as on CUDA.
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    sees = causal(queries, keys, window)
    ours = cuda_attention.attend(q, k, v, is_causal=True, scaling=0.3, window=window)
    torch.testing.assert_close(ours, plain_attention(q, k, v, sees, scaling=0.3))
    ours = cuda_attention.attend(q, k, v, mask=not_padding(keys), window=window)
    for b, padding in enumerate(PADDING.tolist()):
        real = slice(max(0, padding - (keys - queries)), None)
        expected = plain_attention(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], sees & not_padding(keys)[b]
        )
        torch.testing.assert_close(ours[b : b + 1, :, real], expected[:, :, real])


@pytest.mark.usefixtures("cuda_kernel")
def test_what_flash_cannot_do_goes_another_way() -> None:
    q, k, v = qkv(4, 9)
    for extra in ({"softcap": 0.7}, {"sinks": torch.randn(6)}):
        ours = cuda_attention.attend(q, k, v, mask=not_padding(9), **extra)
        for b in (0, 2):
            sees = causal(4, 9) & not_padding(9)[b]
            expected = plain_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], sees, **extra)
            torch.testing.assert_close(ours[b : b + 1], expected)
    sees = causal(4, 9)[None, None]
    torch.testing.assert_close(
        cuda_attention.attend(q, k, v, mask=sees), plain_attention(q, k, v, sees)
    )
    wide = qkv(4, 9, v_dim=5)
    torch.testing.assert_close(
        cuda_attention.attend(*wide, is_causal=True), plain_attention(*wide, causal(4, 9))
    )


def mask_of(padding: torch.Tensor | None, **options: Any) -> torch.Tensor | None:
    return attention.attention_mask(
        batch_size=3, q_length=1, q_offset=8, kv_length=9, attention_mask=padding, **options
    )


def test_the_mask_suits_the_kernel(cuda_kernel: str) -> None:
    assert mask_of(None) is None
    assert mask_of(torch.ones(3, 9, dtype=torch.bool)) is None
    mask = mask_of(not_padding(9))
    assert mask is not None
    if cuda_kernel == "neither":
        assert mask.equal(not_padding(9)[:, None, None])
        return
    assert mask.equal(not_padding(9))
    # Padding elsewhere, or rules that only a full mask can say, are not for the kernels.
    in_the_middle = not_padding(9)
    in_the_middle[0, 3] = False
    for full in (mask_of(in_the_middle), mask_of(not_padding(9), allow_is_causal_skip=False)):
        assert full is not None and full.shape == (3, 1, 1, 9)


def test_kernels_that_are_not_there_are_not_chosen() -> None:
    assert not cuda_attention.has_flash(torch.device("cpu"), torch.bfloat16)
    assert not cuda_attention.has_flash(torch.device("cuda"), torch.float32)
