"""vLLM attention backends that read a request's keys and values as one contiguous row.

A request owns the blocks ``[row * blocks_per_row, (row + 1) * blocks_per_row)``. In the layout
LBNHC consecutive blocks of a layer are consecutive tokens, so a row is an ordinary tensor, and
kernels that know no blocks attend to it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm import _custom_ops
from vllm.config import VllmConfig
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vattn.integrations.vllm import kernels

if TYPE_CHECKING:
    from vattn.integrations.vllm.specs import ContiguousSpec

# Of torch's flash kernels.
_MAX_FLASH_HEAD_SIZE = 256
_FLASH_HEAD_SIZE_STEP = 8
_FIRST_FLASH_CAPABILITY = DeviceCapability(8, 0)

_REMEDY = 'set "mode": "elastic" in kv_connector_extra_config, or serve this model without vattn'


@dataclass(frozen=True, kw_only=True)
class ContiguousMetadata(AttentionMetadata):
    """Which tokens of a batch are whose.

    Parameters
    ----------
    num_actual_tokens : int
        Queries of all requests; those after them are padding.
    max_query_len, max_seq_len : int
        No request has more queries, or more tokens.
    query_starts : torch.Tensor
        ``[requests + 1]``, int32.
    seq_lens : torch.Tensor
        ``[requests]``, int32.
    row_starts : torch.Tensor
        ``[requests + 1]``, int32, the first token of each row; the last entry is not read.
    """

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_starts: torch.Tensor
    seq_lens: torch.Tensor
    row_starts: torch.Tensor


class ContiguousMetadataBuilder(AttentionMetadataBuilder[ContiguousMetadata]):
    """Finds the row of each request in its block table, without waiting for the device.

    Attention stays outside of CUDA graphs, which is what vLLM assumes of a builder that says
    nothing else.
    """

    def __init__(
        self,
        kv_cache_spec: ContiguousSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._blocks_per_row = kv_cache_spec.blocks_per_row
        self._block_size = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ContiguousMetadata:
        """Describe one batch.

        Raises
        ------
        NotImplementedError
            The batch does not attend causally.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError(
                f"this batch is not causal, which contiguous rows need; {_REMEDY}"
            )
        first_blocks = common.block_table_tensor[:, 0]
        row_starts = first_blocks.new_zeros(common.num_reqs + 1, dtype=torch.int32)
        row_starts[:-1] = first_blocks // self._blocks_per_row
        row_starts *= self._blocks_per_row * self._block_size
        return ContiguousMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_starts=common.query_start_loc,
            seq_lens=common.seq_lens,
            row_starts=row_starts,
        )


class _ContiguousImpl(AttentionImpl[ContiguousMetadata]):
    """What both devices have in common."""

    # vLLM passes these by position.
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        quantized = kv_cache_dtype if is_quantized_kv_cache(kv_cache_dtype) else None
        _refuse("ALiBi slopes", alibi_slopes is not None)
        _refuse("attention sinks", sinks is not None)
        _refuse(f"a sliding window of {sliding_window} tokens", sliding_window is not None)
        _refuse(f"a soft cap of {logits_soft_cap} on the scores", bool(logits_soft_cap))
        _refuse(f"attention of type {attn_type!r}", attn_type != AttentionType.DECODER)
        _refuse(f"a quantized KV cache ({quantized})", quantized is not None)
        _refuse(
            f"a layer that uses the KV cache of {kv_sharing_target_layer_name}",
            kv_sharing_target_layer_name is not None,
        )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ContiguousMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the rows of the batch; keys and values are in the cache already.

        Parameters
        ----------
        query, output : torch.Tensor
            ``[tokens, heads, head_size]``, padded at the end; padding in ``output`` is left as is.
        kv_cache : torch.Tensor
            ``[blocks, kv heads, tokens of a block, head_size + head_size_v]``, layout LBNHC.
        attn_metadata : ContiguousMetadata, optional
            None while vLLM measures or warms up: the output is then left as it is.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                f"contiguous rows do not quantize output; turn fuse_attn_quant off, or {_REMEDY}"
            )
        if attn_metadata is None:
            return output
        tokens = attn_metadata.num_actual_tokens
        self._attend(query[:tokens], flat_tokens(kv_cache), attn_metadata, output[:tokens])
        return output

    @abstractmethod
    def _attend(
        self,
        query: torch.Tensor,
        flat: torch.Tensor,
        metadata: ContiguousMetadata,
        output: torch.Tensor,
    ) -> None: ...

    @abstractmethod
    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store new keys and values, ``[tokens, kv heads, ...]``, in the slots that vLLM chose."""


class ContiguousCpuImpl(_ContiguousImpl):
    """Rows on the CPU, by torch's SDPA."""

    def _attend(
        self,
        query: torch.Tensor,
        flat: torch.Tensor,
        metadata: ContiguousMetadata,
        output: torch.Tensor,
    ) -> None:
        kernels.attend_rows(
            query,
            flat,
            metadata.query_starts,
            metadata.seq_lens,
            metadata.row_starts,
            scale=self.scale,
            head_size=self.head_size,
            out=output,
        )

    def do_kv_cache_update(  # noqa: D102
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        kernels.write_tokens(flat_tokens(kv_cache), key, value, slot_mapping)


class ContiguousCudaImpl(_ContiguousImpl):
    """Rows on CUDA, by torch's flash kernel for sequences of different lengths."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kernel = kernels.varlen_attn()

    def _attend(
        self,
        query: torch.Tensor,
        flat: torch.Tensor,
        metadata: ContiguousMetadata,
        output: torch.Tensor,
    ) -> None:
        kernels.attend_rows_varlen(
            query,
            flat,
            metadata.query_starts,
            metadata.seq_lens,
            metadata.row_starts,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
            scale=self.scale,
            head_size=self.head_size,
            out=output,
            kernel=self._kernel,
        )

    def do_kv_cache_update(  # noqa: D102
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        # vLLM's own kernel: it skips -1 without asking the host, which indexing in torch cannot.
        sizes = [self.head_size, kv_cache.shape[-1] - self.head_size]
        key_cache, value_cache = kv_cache.transpose(1, 2).split_with_sizes(sizes, dim=-1)
        _custom_ops.reshape_and_cache_flash(
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )


class _ContiguousBackend(AttentionBackend):
    """What both devices have in common."""

    # Keys are written by an operation of its own, before attention.
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_builder_cls() -> type[ContiguousMetadataBuilder]:
        """Return the class that vLLM makes one of for each group of layers."""
        return ContiguousMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Of all layouts, the one in which consecutive blocks of a layer are one tensor."""
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give each request a row of blocks."""
        return spec


class ContiguousCpuBackend(_ContiguousBackend):
    """Contiguous rows on the CPU; replaces ``CPU_ATTN``, the only one vLLM takes there."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Name of the member of vLLM's enumeration that this backend is registered for."""
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[ContiguousCpuImpl]:
        """Return the class that vLLM makes one of for each layer."""
        return ContiguousCpuImpl


class ContiguousCudaBackend(_ContiguousBackend):
    """Contiguous rows on CUDA; registered as ``CUSTOM``."""

    @staticmethod
    def get_name() -> str:
        """Name of the member of vLLM's enumeration that this backend is registered for."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[ContiguousCudaImpl]:
        """Return the class that vLLM makes one of for each layer."""
        return ContiguousCudaImpl

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether the flash kernel takes heads of this many elements."""
        return head_size <= _MAX_FLASH_HEAD_SIZE and head_size % _FLASH_HEAD_SIZE_STEP == 0

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Whether the flash kernel runs on such a device."""
        return bool(capability >= _FIRST_FLASH_CAPABILITY)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Leave the spec as it is, if the flash kernel can serve it.

        Raises
        ------
        NotImplementedError
            Keys and values differ in size.
        """
        _refuse(
            f"values of {spec.head_size_v} elements with keys of {spec.head_size}",
            spec.head_size_v != spec.head_size,
        )
        return super().customize_spec(spec)


def flat_tokens(kv_cache: torch.Tensor) -> torch.Tensor:
    """View ``[blocks, kv heads, tokens of a block, elements]`` as ``[tokens, kv heads, elements]``.

    Raises
    ------
    ValueError
        Tokens of neighbouring blocks are not neighbours in memory.
    """
    blocks, heads, block_size, elements = kv_cache.shape
    block_stride, head_stride, token_stride, element_stride = kv_cache.stride()
    if block_stride != block_size * token_stride:
        raise ValueError(
            f"blocks of {block_size} tokens are {block_stride} elements apart and tokens "
            f"{token_stride}, so rows are not contiguous; unset VLLM_KV_CACHE_LAYOUT, or set it to "
            "LBNHC"
        )
    size = (blocks * block_size, heads, elements)
    return kv_cache.as_strided(size, (token_stride, head_stride, element_stride))


def _refuse(what: str, condition: bool) -> None:
    if condition:
        raise NotImplementedError(f"contiguous rows do not support {what}; {_REMEDY}")
