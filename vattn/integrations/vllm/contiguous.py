"""Contiguous mode: a request owns one row, a run of consecutive blocks.

Row 0 belongs to the null block: kernels read it in dummy runs. A row whose request has ended is
parked: it keeps its memory and the next request takes it over, until others need the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vattn.integrations.vllm.ledger import PageLedger, bound


class ContiguousManager(FullAttentionManager):
    """Gives each request the blocks of one row, and memory to as much of it as it needs.

    Notes
    -----
    A row is parked when its first block has no reference: vLLM gives the reference back when no
    step in flight can touch the block any more.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: Any, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        self.ledger: PageLedger | None = None
        self.blocks_per_row: int = kv_cache_spec.blocks_per_row
        self.n_rows = self.block_pool.num_gpu_blocks // self.blocks_per_row
        # Row that get_num_blocks_to_allocate() backed for a request that has none yet.
        self._chosen: tuple[str, int] | None = None
        self._clock = 0
        self._used_at = np.zeros(self.n_rows, np.int64)

    def pool_of_vattn(self) -> ContiguousManager:
        """Return what gives blocks to requests: the manager itself."""
        return self

    def bind(self, ledger: PageLedger) -> None:
        """Start serving with the memory of this ledger."""
        self.ledger = ledger

    def new_step_starts(self) -> None:
        """Tell the ledger as well."""
        super().new_step_starts()
        self._ledger().step_begins()

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], **_: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find nothing: the rows of other requests are theirs."""
        return tuple([] for _ in kv_cache_group_ids), 0

    # Admission.

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        *arguments: Any,
        apply_admission_cap: bool = False,
        **options: Any,
    ) -> int:
        """Blocks needed, plus those that vLLM takes for free but that can get no memory.

        More than there are blocks if there is no row, or no memory: the request is not scheduled.
        """
        ledger = self._ledger()
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, *arguments, apply_admission_cap=apply_admission_cap, **options
        )
        with ledger.lock:
            row = self._row_for(request_id, num_tokens)
            if row is None:
                return self.block_pool.num_gpu_blocks + 1
            missing = self._missing_frames(row, num_tokens)
            if not missing and self._row_of(request_id) == row:
                return needed
            # The capped call only asks whether the whole request would fit.
            if not apply_admission_cap and not self._back(row, missing):
                return self.block_pool.num_gpu_blocks + 1
            self._chosen = request_id, row
            return needed + max(0, self.block_pool.get_num_free_blocks() - self._backable(row))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Hand out the next blocks of the request's row."""
        blocks = self.req_to_blocks[request_id]
        n_new = -(-num_tokens // self.block_size) - len(blocks)
        if n_new <= 0:
            return []
        row = self._row_of(request_id)
        if row is None:
            assert self._chosen is not None and self._chosen[0] == request_id
            row, self._chosen = self._chosen[1], None
        if len(blocks) + n_new > self.blocks_per_row:
            raise RuntimeError(
                f"request {request_id} needs {len(blocks) + n_new} blocks, but a row has "
                f"{self.blocks_per_row}; this is a bug of vattn"
            )
        first = row * self.blocks_per_row + len(blocks)
        new = self.block_pool.blocks[first : first + n_new]
        self.block_pool.touch(new)
        blocks.extend(new)
        self._clock += 1
        self._used_at[row] = self._clock
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return new

    # Giving memory back.

    def shrink_to(self, pages: int) -> None:
        """Take the memory from parked rows until at most so many pages are mapped."""
        ledger = self._ledger()
        with ledger.lock:
            self._reclaim(ledger.mapped_pages - pages, keep=None)

    def enforce_budget(self) -> None:
        """Get below a budget that was lowered; what running requests hold follows as they end."""
        self.shrink_to(self._ledger().budget_pages)

    def settle(self) -> None:
        """Nothing is left to do: vLLM has cached nothing in parked rows."""

    # Inside.

    def _ledger(self) -> PageLedger:
        return bound(self.ledger)

    def _row_of(self, request_id: str) -> int | None:
        blocks = self.req_to_blocks.get(request_id)
        return blocks[0].block_id // self.blocks_per_row if blocks else None

    def _is_parked(self, row: int) -> bool:
        return self.block_pool.blocks[row * self.blocks_per_row].ref_cnt == 0

    def _parked(self) -> list[int]:
        return [row for row in range(1, self.n_rows) if self._is_parked(row)]

    def _spare_frames(self, row: int) -> range:
        """Frames of a row that have memory and no block in use: all of a parked row's."""
        geometry, blocks = self._ledger().geometry, self.block_pool.blocks
        backed = self._frames_of(row)[: self._n_backed(row)]
        first = 0 if self._is_parked(row) else len(backed)
        # From the end: the blocks of a request are the first ones of its row.
        while first and not any(blocks[b].ref_cnt for b in geometry.blocks_of(backed[first - 1])):
            first -= 1
        return backed[first:]

    def _frames_of(self, row: int) -> range:
        frame_blocks = self._ledger().geometry.frame_blocks
        per_row = self.blocks_per_row // frame_blocks
        return range(row * per_row, (row + 1) * per_row)

    def _n_backed(self, row: int) -> int:
        frames = self._frames_of(row)
        return self._ledger().count_backed(frames.start, frames.stop)

    def _missing_frames(self, row: int, num_tokens: int) -> list[int]:
        n_blocks = -(-num_tokens // self.block_size)
        n_frames = -(-n_blocks // self._ledger().geometry.frame_blocks)
        return list(self._frames_of(row)[self._n_backed(row) : n_frames])

    def _row_for(self, request_id: str, num_tokens: int) -> int | None:
        """Row of a request, or the parked one that fits it best: whose memory is just enough."""
        row = self._row_of(request_id)
        if row is not None:
            return row
        parked = self._parked()
        if not parked:
            return None
        n_frames = -(-num_tokens // (self.block_size * self._ledger().geometry.frame_blocks))

        def misfit(row: int) -> tuple[int, int]:
            more = self._n_backed(row) - n_frames
            return (0, more) if more >= 0 else (1, -more)

        return min(parked, key=misfit)

    def _backable(self, row: int) -> int:
        """Blocks that could be handed out by and by: what stock vLLM calls free."""
        ledger = self._ledger()
        others = [r for r in range(1, self.n_rows) if r != row]
        frames = self._n_backed(row) + sum(len(self._spare_frames(r)) for r in others)
        frames += ledger.room // ledger.frame_pages
        used = sum(self.block_pool.blocks[b].ref_cnt > 0 for b in self._blocks_of(row))
        return frames * ledger.geometry.frame_blocks - used

    def _blocks_of(self, row: int) -> range:
        return range(row * self.blocks_per_row, (row + 1) * self.blocks_per_row)

    def _back(self, row: int, missing: Sequence[int]) -> bool:
        ledger = self._ledger()
        short = ledger.pages_missing(missing) - ledger.room + ledger.over
        self._reclaim(short, keep=row)
        return ledger.back(missing)

    def _reclaim(self, n_pages: int, keep: int | None) -> None:
        """Take pages that no request uses, each row from its end.

        From parked rows first, the longest parked one before the others; then what running requests
        have taken over from longer ones.
        """
        ledger = self._ledger()
        if n_pages <= 0:
            return
        rows = sorted(
            (row for row in range(1, self.n_rows) if row != keep),
            key=lambda row: (not self._is_parked(row), int(self._used_at[row])),
        )
        frames = (frame for row in rows for frame in reversed(self._spare_frames(row)))
        victims = ledger.enough_of(frames, n_pages)
        if victims:
            ledger.unback(victims)
