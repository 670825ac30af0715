"""The attention backends of contiguous mode, called as vLLM calls them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import _custom_ops
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)
from vllm_rows import Shape, attention, close, varlen_stand_in

from vattn.integrations.vllm import attention as backends
from vattn.integrations.vllm import kernels

pytestmark = pytest.mark.vllm

BLOCK = 32  # tokens, which stock kernels take too
BLOCKS_PER_ROW = 4
ROWS = 6
LAYERS = 2
SHAPE = Shape(heads=4, kv_heads=2, head_size=64, head_size_v=64)


def views(layout: KVCacheLayout, shape: Shape = SHAPE, blocks: int = 0) -> list[torch.Tensor]:
    """The layers' caches as vLLM makes them, full of NaN."""
    blocks = blocks or ROWS * BLOCKS_PER_ROW
    spec = FullAttentionSpec(
        block_size=BLOCK,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        head_size_v=shape.head_size_v,
        dtype=shape.dtype,
    )
    page = spec.page_size_bytes
    raw = torch.zeros(LAYERS * blocks * page, dtype=torch.int8)
    tensor = KVCacheTensor(
        size=raw.numel(),
        layers=[f"layer {n}" for n in range(LAYERS)],
        layer_stride=page * blocks if layout.is_layer_compact else page,
        block_stride=page if layout.is_layer_compact else page * LAYERS,
    )
    caches = create_kv_cache_views(raw, spec, blocks, layout, tensor)
    for cache in caches:
        cache.fill_(torch.nan)
    return caches


def impl_of(backend: type[backends.ContiguousCpuBackend], **options: Any) -> Any:
    # As vllm.model_executor.layers.attention.Attention does.
    given = {
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": AttentionType.DECODER,
        "kv_sharing_target_layer_name": None,
        **options,
    }
    sinks = {name: given.pop(name) for name in ("sinks",) if name in given}
    heads = (SHAPE.heads, SHAPE.head_size, SHAPE.scale, SHAPE.kv_heads)
    return backend.get_impl_cls()(*heads, *given.values(), **sinks)


def stored_by_slot(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """vLLM's reshape_and_cache_flash: caches are [blocks, tokens of a block, heads, dim]."""
    assert (kv_cache_dtype, float(k_scale), float(v_scale)) == ("auto", 1, 1)
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // BLOCK, slot % BLOCK] = key[token]
            value_cache[slot // BLOCK, slot % BLOCK] = value[token]


@pytest.fixture(params=[backends.ContiguousCpuBackend, backends.ContiguousCudaBackend])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(kernels, "varlen_attn", lambda: varlen_stand_in)
    monkeypatch.setattr(_custom_ops, "reshape_and_cache_flash", stored_by_slot)
    return request.param


@dataclass
class Request:
    """A request: its row, and the keys and values it should have there."""

    row: int
    key: torch.Tensor
    value: torch.Tensor

    @property
    def blocks(self) -> list[int]:
        tokens = self.key.shape[0]
        first = self.row * BLOCKS_PER_ROW
        return [first + n if n * BLOCK < tokens else 0 for n in range(BLOCKS_PER_ROW)]

    def slot(self, position: int) -> int:
        return self.blocks[position // BLOCK] * BLOCK + position % BLOCK


class Engine:
    """As much of a worker as one attention layer sees of it."""

    def __init__(self, backend: Any, kv_cache: torch.Tensor) -> None:
        spec = SimpleNamespace(block_size=BLOCK, blocks_per_row=BLOCKS_PER_ROW)
        self.builder = backend.get_builder_cls()(spec, ["layer"], None, torch.device("cpu"))
        self.impl = impl_of(backend)
        self.kv_cache = kv_cache
        self.layer = SimpleNamespace(_k_scale=torch.tensor(1.0), _v_scale=torch.tensor(1.0))

    def step(
        self, queries: dict[int, int], requests: dict[int, Request], *, padding: int = 0
    ) -> tuple[CommonAttentionMetadata, torch.Tensor, torch.Tensor]:
        """One forward pass; ``queries`` says how many tokens each request is given.

        Returns metadata, queries and the output.
        """
        common, key, value = self.batch(queries, requests, padding)
        query = torch.randn(key.shape[0], SHAPE.heads, SHAPE.head_size)
        output = torch.full_like(query, 7.0)
        self.impl.do_kv_cache_update(self.layer, key, value, self.kv_cache, common.slot_mapping)
        returned = self.impl.forward(
            self.layer, query, key, value, self.kv_cache, self.builder.build(0, common), output
        )
        assert returned is output
        return common, query, output

    def batch(
        self, queries: dict[int, int], requests: dict[int, Request], padding: int
    ) -> tuple[CommonAttentionMetadata, torch.Tensor, torch.Tensor]:
        keys, values, slots, starts = [], [], [], [0]
        for name, count in queries.items():
            request = requests[name]
            before = request.key.shape[0]
            new = torch.randn(2, count, SHAPE.kv_heads, SHAPE.head_size)
            request.key = torch.cat([request.key, new[0]])
            request.value = torch.cat([request.value, new[1]])
            slots += [request.slot(position) for position in range(before, before + count)]
            keys.append(new[0])
            values.append(new[1])
            starts.append(starts[-1] + count)
        lens = [requests[name].key.shape[0] for name in queries]
        blocks = [requests[name].blocks for name in queries]
        # Padded requests and tokens, as where vLLM rounds up to the size of a CUDA graph.
        padded = torch.randn(padding, SHAPE.kv_heads, SHAPE.head_size)
        starts += [starts[-1]] * padding
        common = CommonAttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lens + [0] * padding, dtype=torch.int32),
            num_reqs=len(lens) + padding,
            num_actual_tokens=starts[-1],
            max_query_len=max(queries.values()),
            max_seq_len=max(lens) + 3,  # a bound, where scheduling is asynchronous
            block_table_tensor=torch.tensor(
                blocks + [[0] * BLOCKS_PER_ROW] * padding, dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots + [-1] * padding, dtype=torch.int64),
        )
        return common, torch.cat([*keys, padded]), torch.cat([*values, padded])


def new_requests(*rows: int) -> dict[int, Request]:
    nothing = torch.empty(0, SHAPE.kv_heads, SHAPE.head_size)
    return {name: Request(row, nothing, nothing) for name, row in enumerate(rows)}


# Chunked prefill, mixed with decodes and with requests that come and go.
STEPS = [{0: 5, 1: 40}, {0: 1, 1: 33, 2: 20}, {0: 1, 1: 1, 2: 1}, {2: 1, 0: 1}, {1: 54, 2: 2}]


@pytest.mark.parametrize("padding", [0, 2])
def test_steps_of_an_engine(backend: Any, padding: int) -> None:
    torch.manual_seed(1)
    kv_cache = views(KVCacheLayout.LBNHC)[1]
    engine = Engine(backend, kv_cache)
    requests = new_requests(4, 1, 3)
    for queries in STEPS:
        common, query, output = engine.step(queries, requests, padding=padding)
        begin = 0
        for name, count in queries.items():
            request, own = requests[name], slice(begin, begin + count)
            begin += count
            right = attention(
                query[own], request.key, request.value, scale=SHAPE.scale, causal=True
            )
            close(output[own], right)
        assert bool((output[common.num_actual_tokens :] == 7.0).all())
    written = kv_cache.isfinite().all(dim=-1).all(dim=1).flatten()  # [blocks * tokens]
    theirs = torch.zeros_like(written)
    for request in requests.values():
        theirs[[request.slot(n) for n in range(request.key.shape[0])]] = True
    assert torch.equal(written, theirs)


def test_the_output_is_that_of_stock_vllm() -> None:
    torch.manual_seed(2)
    ours = Engine(backends.ContiguousCpuBackend, views(KVCacheLayout.LBNHC)[0])
    requests = new_requests(4, 1, 3)
    stock = views(KVCacheLayout.LBHNC)[0].fill_(0)
    halves = stock.view(stock.shape[0], SHAPE.kv_heads, 2 * BLOCK, -1).chunk(2, dim=2)
    for queries in STEPS:
        common, query, output = ours.step(queries, requests)
        for name in queries:
            request = requests[name]
            slots = torch.tensor([request.slot(n) for n in range(request.key.shape[0])])
            _custom_ops.cpu_attn_reshape_and_cache(
                request.key, request.value, *halves, slots, "vec"
            )
        theirs = torch.empty_like(output)
        plan = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=common.num_reqs,
            num_heads=SHAPE.heads,
            num_kv_heads=SHAPE.kv_heads,
            head_dim=SHAPE.head_size,
            seq_lens=common.seq_lens,
            dtype=SHAPE.dtype,
            query_start_loc=common.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa="vec",
            enable_kv_split=False,
        )
        _custom_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=halves[0],
            value_cache=halves[1],
            output=theirs,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            scale=SHAPE.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=common.block_table_tensor,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
        )
        torch.testing.assert_close(output, theirs, atol=1e-5, rtol=1e-5)


def test_warm_up_leaves_the_output_alone(backend: Any) -> None:
    impl, output = impl_of(backend), torch.full((3, SHAPE.heads, SHAPE.head_size), 7.0)
    before = output.clone()
    nothing = torch.empty(0)
    assert impl.forward(None, output, nothing, nothing, nothing, None, output) is output
    assert torch.equal(output, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi slopes"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"sliding_window": 128}, "a sliding window of 128 tokens"),
        ({"logits_soft_cap": 30.0}, r"a soft cap of 30.0"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention of type .*'encoder_only'"),
        ({"kv_cache_dtype": "fp8"}, r"a quantized KV cache \(fp8\)"),
        ({"kv_sharing_target_layer_name": "layer 3"}, "uses the KV cache of layer 3"),
    ],
)
def test_what_rows_cannot_do_is_refused(backend: Any, options: Any, said: str) -> None:
    with pytest.raises(NotImplementedError, match=f"do not support .*{said}.*; set .*elastic"):
        impl_of(backend, **options)


def test_what_amounts_to_nothing_is_accepted(backend: Any) -> None:
    impl = impl_of(backend, sinks=None, logits_soft_cap=0.0)
    assert (impl.num_heads, impl.num_kv_heads, impl.head_size) == (4, 2, 64)
    assert backend.get_impl_cls()(4, 64, 0.1).num_kv_heads == 4


def test_output_in_fewer_bits_is_refused(backend: Any) -> None:
    impl, t, scale = impl_of(backend), torch.empty(0), torch.ones(1)
    for options in ({"output_scale": scale}, {"output_block_scale": scale}):
        with pytest.raises(NotImplementedError, match="fuse_attn_quant"):
            impl.forward(None, t, t, t, t, None, t, **options)


@pytest.mark.parametrize("causal", [False, torch.tensor([True])], ids=str)
def test_batches_that_are_not_causal_are_refused(backend: Any, causal: Any) -> None:
    engine = Engine(backend, views(KVCacheLayout.LBNHC)[0])
    common, _, _ = engine.batch({0: 2}, new_requests(1), 0)
    with pytest.raises(NotImplementedError, match="not causal"):
        engine.builder.build(0, common.replace(causal=causal))


def test_flat_is_the_cache_itself() -> None:
    for layer, kv_cache in enumerate(views(KVCacheLayout.LBNHC)):
        flat = backends.flat_tokens(kv_cache)
        assert flat.shape == (ROWS * BLOCKS_PER_ROW * BLOCK, SHAPE.kv_heads, 2 * SHAPE.head_size)
        assert flat.data_ptr() == kv_cache.data_ptr()
        kv_cache[9, 1, 5] = float(layer)
        assert bool((flat[9 * BLOCK + 5, 1] == layer).all())
        assert int(flat.isfinite().sum()) == flat.shape[-1]


@pytest.mark.parametrize("layout", [KVCacheLayout.LBHNC, KVCacheLayout.BLNHC], ids=str)
def test_layouts_without_rows_are_refused(layout: KVCacheLayout) -> None:
    with pytest.raises(ValueError, match=r"blocks of 32 tokens are .* not contiguous.*LBNHC"):
        backends.flat_tokens(views(layout)[0])


def test_a_cache_of_one_block_will_do() -> None:
    kv_cache = views(KVCacheLayout.LBNHC, blocks=1)[0]
    assert backends.flat_tokens(kv_cache).shape[0] == BLOCK


def test_what_vllm_asks_the_backends(backend: Any) -> None:
    assert AttentionBackendEnum[backend.get_name()]
    assert backend.supported_kv_cache_layouts() == (KVCacheLayout.LBNHC,)
    assert backend.supports_block_size(BLOCK) and backend.supports_block_size(1)
    assert not backend.forward_includes_kv_cache_update
    support = backend.get_builder_cls().get_cudagraph_support(None, None)
    assert support == AttentionCGSupport.NEVER


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        ({}, []),
        ({"head_size": 80}, []),
        ({"head_size": 84}, ["head_size not supported"]),
        ({"head_size": 264}, ["head_size not supported"]),
        ({"dtype": torch.float32}, ["dtype not supported"]),
        ({"kv_cache_dtype": "fp8"}, ["kv_cache_dtype not supported"]),
        ({"device_capability": DeviceCapability(7, 5)}, ["compute capability not supported"]),
        ({"has_sliding_window": True}, ["sliding window not supported"]),
        ({"use_non_causal": True}, ["non-causal attention not supported"]),
        ({"has_sink": True}, ["attention sinks not supported"]),
        ({"use_dcp": True}, ["DCP not supported"]),
    ],
    ids=str,
)
def test_what_cuda_cannot_do_is_known_before_start(
    changed: dict[str, Any], reasons: list[str]
) -> None:
    asked: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": AttentionType.DECODER,
        "use_kv_connector": True,
        **changed,
    }
    assert backends.ContiguousCudaBackend.validate_configuration(**asked) == reasons


def test_values_smaller_than_keys() -> None:
    heads = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    spec, smaller = FullAttentionSpec(**heads), FullAttentionSpec(**heads, head_size_v=32)
    assert backends.ContiguousCpuBackend.customize_spec(smaller) is smaller
    assert backends.ContiguousCudaBackend.customize_spec(spec) is spec
    with pytest.raises(NotImplementedError, match="values of 32 elements with keys of 64"):
        backends.ContiguousCudaBackend.customize_spec(smaller)
