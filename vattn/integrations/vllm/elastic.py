"""Elastic mode: vLLM's own blocks and prefix cache, over a pool that has memory where it is used.

The managers are vLLM's; they only get their blocks from :class:`ElasticPool`, which prefers blocks
that have memory, then gives memory to more of them, then takes the least recently used cached one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)

from vattn.integrations.vllm.ledger import PageLedger, bound

# No attention kernel loads more keys at a time.
TILE_TOKENS = 256


class ElasticPool:
    """Hands out the blocks of a ``BlockPool`` that have memory; passes everything else on.

    Made before the workers are known: until :meth:`bind`, there is nothing to hand out.

    Notes
    -----
    Every method but ``shrink_to`` is for the scheduler's thread. ``shrink_to`` may be called by
    another one between two steps; what it leaves to do with vLLM's own data is done by
    :meth:`settle` when the next step begins.
    """

    # Memory that is mapped ahead of the blocks that will be in it, once new memory is what blocks
    # get. The workers have half of it to fault in while the other half is handed out.
    ahead_bytes = 32 * 2**20

    # By the id of the pool, which lives as long as the one over it does.
    _of: ClassVar[weakref.WeakValueDictionary[int, ElasticPool]] = weakref.WeakValueDictionary()

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.ledger: PageLedger | None = None
        # Blocks that have got memory and were not handed out since, in the order to do that in.
        self._fresh: dict[int, KVCacheBlock] = {}
        self._draining: set[int] = set()
        self._permanent: set[int] = set()
        self._dropped: list[int] = []
        # The end of the run of blocks without memory in vLLM's free queue.
        self._last_unbacked: KVCacheBlock = pool.blocks[-1]
        self._promised = 0
        self._clock = 0
        self._used_at = np.zeros(0, np.int64)

    @classmethod
    def over(cls, pool: BlockPool | ElasticPool) -> ElasticPool:
        """Return the one over a pool: all groups of layers share it, as they share the pool."""
        if isinstance(pool, ElasticPool):
            return pool
        made = cls._of.get(id(pool))
        if made is None:
            made = cls._of[id(pool)] = cls(pool)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def bind(self, ledger: PageLedger) -> None:
        """Start handing out blocks of frames that this ledger backs."""
        self.ledger = ledger
        self._used_at = np.zeros(ledger.geometry.n_frames, np.int64)
        if ledger.pages_missing([0]) == 0:
            # The null block's memory, which stays, is all that its frame needs.
            self._back([0])
            self._permanent = {0}

    def step_begins(self) -> None:
        """Keep other threads from taking memory, and see what they have taken."""
        self._ledger().step_begins()
        self.settle()

    # Admission.

    def begin(self) -> None:
        """Forget what was promised to the groups of the request before."""
        self._promised = 0

    def promise(self, n_blocks: int) -> bool:
        """See to it that so many blocks more can be handed out now, for one group of a request.

        Returns
        -------
        bool
            False: they cannot. The request waits, or another one is preempted.
        """
        ledger = self._ledger()
        self._promised += n_blocks
        with ledger.lock:
            short = self._promised - self._free_backed()
            if short <= 0:
                return True
            frames = self._frames_for(short)
            return frames is not None and self._back(frames)

    def backable(self) -> int:
        """Blocks that could be handed out by and by: what stock vLLM calls free."""
        ledger = self._ledger()
        frames = ledger.room // ledger.frame_pages
        unbacked = self._n_unbacked()
        return self._free_backed() + min(frames * ledger.geometry.frame_blocks, unbacked)

    # Handing out.

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Hand out blocks as ``BlockPool.get_new_blocks`` does, all of them with memory.

        Raises
        ------
        ValueError
            There are not so many: ``promise`` was not asked before.
        """
        ledger = self._ledger()
        taken: list[KVCacheBlock] = []
        grows = False
        with ledger.lock:
            self.settle()
            while len(taken) < num_blocks:
                block = (
                    self._uncached()
                    or self._from_new_frames(num_blocks - len(taken))
                    or self._least_recently_used()
                )
                if block is None:
                    raise ValueError(f"cannot get {num_blocks} blocks that have memory")
                if block.block_hash is not None:
                    self.pool.evict_blocks({block.block_id})
                self.pool.touch([block])
                taken.append(block)
                grows = self._fresh.pop(block.block_id, None) is not None or grows
            self.note_use(taken)
            if grows and len(self._fresh) < self._ahead_blocks / 2:
                self._map_new_frames(0)
        return taken

    def note_use(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Remember that these blocks are used: their frames are the last ones to lose memory."""
        self._clock += 1
        for frame in {self._ledger().geometry.frame_of(block.block_id) for block in blocks}:
            self._used_at[frame] = self._clock

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, as ``BlockPool.reset_prefix_cache`` does."""
        ledger = self._ledger()
        with ledger.lock:
            self.settle()
            done = self.pool.reset_prefix_cache()
            if done:
                self._fresh.clear()
                self._add_fresh(ledger.backed_frames())
            return done

    # Giving memory back.

    def shrink_to(self, pages: int) -> None:
        """Take the memory from frames that nobody uses, until at most so many pages are mapped."""
        ledger = self._ledger()
        with ledger.lock:
            idle = [frame for frame in self._held_frames() if self._users(frame) == 0]
            idle.sort(key=lambda frame: int(self._used_at[frame]))
            self._drop(ledger.enough_of(idle, ledger.mapped_pages - pages))

    def enforce_budget(self) -> None:
        """Get below a budget that was lowered; what running requests hold follows as they end.

        Frames with the fewest users are drained: no block of them is handed out any more.
        """
        ledger = self._ledger()
        with ledger.lock:
            self._drop([frame for frame in self._draining if self._users(frame) == 0])
            if not ledger.over:
                self._draining.clear()
            elif ledger.pages_freed(self._draining) < ledger.over:
                self.shrink_to(ledger.budget_pages)
                held = sorted(self._held_frames(), key=self._users)
                self._draining = set(ledger.enough_of(held, ledger.over))
            self.settle()

    def settle(self) -> None:
        """Let vLLM forget what was cached in frames that lost their memory."""
        ledger = self._ledger()
        with ledger.lock:
            dropped, self._dropped = self._dropped, []
            for frame in dropped:
                self.pool.evict_blocks(set(ledger.geometry.blocks_of(frame)))
            if dropped:
                self._gather_unbacked()

    # Inside. The free queue of vLLM has, from the front: blocks that were freed without a hash,
    # blocks never used, cached blocks with the least recently used first. Blocks without memory are
    # one run in it, ascending, so that it can be skipped; frames get memory from the lowest on.

    def _gather_unbacked(self) -> None:
        for frame in self._ledger().unbacked_frames():
            for block_id in self._ledger().geometry.blocks_of(frame):
                self._last_unbacked = self.pool.blocks[block_id]
                self._to_tail(self._last_unbacked)

    def _ledger(self) -> PageLedger:
        return bound(self.ledger)

    def _held_frames(self) -> list[int]:
        return [f for f in self._ledger().backed_frames() if f not in self._permanent]

    def _n_blocks(self, frame: int) -> int:
        """Blocks of a frame that can be handed out: not the null block."""
        return len(self._ledger().geometry.blocks_of(frame)) - (frame == 0)

    def _users(self, frame: int) -> int:
        blocks = self.pool.blocks
        return sum(blocks[i].ref_cnt > 0 for i in self._ledger().geometry.blocks_of(frame))

    def _n_unbacked(self) -> int:
        ledger = self._ledger()
        geometry = ledger.geometry
        full = ledger.n_backed * geometry.frame_blocks
        for frame in {0, geometry.n_frames - 1}:
            if ledger.backed(frame):
                full -= geometry.frame_blocks - self._n_blocks(frame)
        return geometry.num_blocks - 1 - full

    def _free_backed(self) -> int:
        free = self.pool.get_num_free_blocks() - self._n_unbacked()
        for frame in self._draining:
            free -= self._n_blocks(frame) - self._users(frame)
        return max(0, free)

    def _frames_for(self, n_blocks: int) -> list[int] | None:
        frames: list[int] = []
        for frame in self._ledger().unbacked_frames():
            if n_blocks <= 0:
                break
            frames.append(frame)
            n_blocks -= self._n_blocks(frame)
        return frames if n_blocks <= 0 else None

    def _back(self, frames: Sequence[int], *, ahead: bool = False) -> bool:
        if not self._ledger().back(frames, ahead=ahead):
            return False
        self._add_fresh(frames)
        return True

    def _add_fresh(self, frames: Iterable[int]) -> None:
        for frame in frames:
            for block_id in self._ledger().geometry.blocks_of(frame):
                if not self.pool.blocks[block_id].is_null:
                    self._fresh[block_id] = self.pool.blocks[block_id]

    def _drop(self, frames: Sequence[int]) -> None:
        if frames:
            self._ledger().unback(frames)
            self._draining.difference_update(frames)
            self._dropped += frames
            for frame in frames:
                for block_id in self._ledger().geometry.blocks_of(frame):
                    self._fresh.pop(block_id, None)

    def _usable(self, block: KVCacheBlock) -> bool:
        frame = self._ledger().geometry.frame_of(block.block_id)
        return self._ledger().backed(frame) and frame not in self._draining

    def _uncached(self) -> KVCacheBlock | None:
        queue = self.pool.free_block_queue
        while (block := queue.fake_free_list_head.next_free_block).next_free_block is not None:
            if block.block_hash is not None:
                break
            if self._usable(block):
                return block
            if not self._ledger().backed(self._ledger().geometry.frame_of(block.block_id)):
                break  # blocks never used begin here
            self._to_tail(block)
        for block in self._fresh.values():
            if block.ref_cnt == 0 and self._usable(block):
                return block
        return None

    @property
    def _ahead_blocks(self) -> int:
        ledger = self._ledger()
        frames = self.ahead_bytes // (ledger.frame_pages * ledger.page_bytes)
        return frames * ledger.geometry.frame_blocks

    def _map_new_frames(self, n_blocks: int) -> bool:
        # In one call to the workers, and more than are wanted; but no more than there is room for.
        ledger = self._ledger()
        wanted = -(-max(n_blocks, self._ahead_blocks) // ledger.geometry.frame_blocks)
        most = min(wanted, ledger.room_ahead // ledger.frame_pages)
        frames = list(islice(ledger.unbacked_frames(), most))
        return bool(frames) and self._back(frames, ahead=True)

    def _from_new_frames(self, n_blocks: int) -> KVCacheBlock | None:
        return self._uncached() if self._map_new_frames(n_blocks) else None

    def _least_recently_used(self) -> KVCacheBlock | None:
        block = self.pool.free_block_queue.fake_free_list_head.next_free_block
        while block.next_free_block is not None:
            if self._usable(block):
                return block
            backed = self._ledger().backed(self._ledger().geometry.frame_of(block.block_id))
            block = (block if backed else self._last_unbacked).next_free_block
        return None

    def _to_tail(self, block: KVCacheBlock) -> None:
        if block.ref_cnt == 0 and not block.is_null:
            self.pool.free_block_queue.remove(block)
            self.pool.free_block_queue.append(block)


class _ElasticManager(SingleTypeKVCacheManager):
    """Mixed into vLLM's managers: their blocks come from an :class:`ElasticPool`."""

    def __init__(self, kv_cache_spec: Any, block_pool: BlockPool, **options: Any) -> None:
        pool = ElasticPool.over(block_pool)
        super().__init__(kv_cache_spec, block_pool=pool, **options)
        self.elastic = pool

    def pool_of_vattn(self) -> ElasticPool:
        """Return what gives blocks to requests: one pool for all groups."""
        return self.elastic

    def new_step_starts(self) -> None:
        """Tell the pool as well."""
        super().new_step_starts()
        if self.kv_cache_group_id == 0:
            self.elastic.step_begins()

    def get_num_blocks_to_allocate(
        self, *arguments: Any, apply_admission_cap: bool = False, **options: Any
    ) -> int:
        """Blocks needed, plus those that stock vLLM takes for free but that can get no memory.

        vLLM compares the sum with the free blocks of its pool, keeping its own reserves. More than
        there are blocks if the memory cannot be had: the request is not scheduled.
        """
        pool = self.elastic
        if self.kv_cache_group_id == 0:
            pool.begin()
        needed: int = super().get_num_blocks_to_allocate(
            *arguments, apply_admission_cap=apply_admission_cap, **options
        )
        if needed == 0:
            return 0
        # The capped call only asks whether the whole request would fit.
        if not apply_admission_cap and not pool.promise(needed):
            return pool.num_gpu_blocks + 1
        if self.kv_cache_group_id == 0:
            needed += pool.get_num_free_blocks() - pool.backable()
        return needed

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *arguments: Any
    ) -> None:
        """Take cached blocks over, and remember that they are used."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *arguments)
        self.elastic.note_use(new_computed_blocks)


class ElasticFullManager(_ElasticManager, FullAttentionManager):
    """vLLM's manager for full attention, over memory that comes and goes."""


class ElasticSlidingManager(_ElasticManager, SlidingWindowManager):
    """vLLM's manager for sliding windows, over memory that comes and goes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Kernels load whole tiles and mask what lies below the window, through block tables that
        # still name blocks given back since: there must be memory.
        self.extra_retained_tokens += TILE_TOKENS
