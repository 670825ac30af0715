"""vLLM's own block bookkeeping over a ledger, with workers that are a set of pages.

What a block holds is modelled as the tokens up to its end. So a prefix that is found in a block
which lost its memory meanwhile, or which somebody else wrote, is noticed when it is found.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.request import Request

from vattn.integrations.vllm.contiguous import ContiguousManager
from vattn.integrations.vllm.elastic import ElasticPool
from vattn.integrations.vllm.geometry import Geometry, blocks_per_frame, permanent_pages
from vattn.integrations.vllm.ledger import PageLedger
from vattn.integrations.vllm.specs import ContiguousSpec, ElasticFullSpec, ElasticSlidingSpec

BLOCK_SIZE = 4
HEADS = 3
HEAD_SIZE = 16
LAYERS = 2
LAYER_BYTES = BLOCK_SIZE * HEADS * 2 * HEAD_SIZE * 4  # of one block
WINDOW = 9
MAX_TOKENS = 64
_HAS_HASH_BLOCK_SIZE = any(field.name == "hash_block_size" for field in fields(KVCacheConfig))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An engine: ``kind`` is elastic, hybrid (with a sliding window as well) or contiguous."""

    kind: str
    layout: str = "LBNHC"
    num_blocks: int = 96
    page_bytes: int = 4096

    @property
    def layer_outermost(self) -> bool:
        return self.layout.startswith("L")

    @property
    def block_stride(self) -> int:
        return LAYER_BYTES if self.layer_outermost else LAYERS * LAYER_BYTES

    @property
    def frame_blocks(self) -> int:
        return blocks_per_frame(self.block_stride, self.page_bytes)

    @property
    def blocks_per_row(self) -> int:
        longest = -(-MAX_TOKENS // BLOCK_SIZE)
        return -(-longest // self.frame_blocks) * self.frame_blocks

    def config(self) -> KVCacheConfig:
        """What vLLM would plan."""
        sizes: dict[str, Any] = {
            "block_size": BLOCK_SIZE,
            "num_kv_heads": HEADS,
            "head_size": HEAD_SIZE,
            "dtype": torch.float32,
        }
        if self.kind == "contiguous":
            specs: list[Any] = [ContiguousSpec(**sizes, blocks_per_row=self.blocks_per_row)]
        else:
            specs = [ElasticFullSpec(**sizes)]
        if self.kind == "hybrid":
            specs.append(ElasticSlidingSpec(**sizes, sliding_window=WINDOW))
        names = [[f"{g}.{layer}" for layer in range(LAYERS)] for g in range(len(specs))]
        # Not in vLLM 0.31.
        hashing = {"hash_block_size": BLOCK_SIZE} if _HAS_HASH_BLOCK_SIZE else {}
        return KVCacheConfig(
            num_blocks=self.num_blocks,
            # The groups lie over each other: a block belongs to one of them at a time.
            kv_cache_tensors=[
                KVCacheTensor(
                    size=self.num_blocks * LAYERS * LAYER_BYTES,
                    layers=layers,
                    layer_stride=self.num_blocks * LAYER_BYTES
                    if self.layer_outermost
                    else LAYER_BYTES,
                    block_stride=self.block_stride,
                )
                for layers in names
            ],
            kv_cache_groups=[
                KVCacheGroupSpec(layers, spec) for layers, spec in zip(names, specs, strict=True)
            ],
            kv_cache_layout=self.layout,
            **hashing,
        )


class Workers:
    """Two workers that have pages, and may have none left."""

    def __init__(self, permanent: set[int]) -> None:
        self.mapped = [set(permanent), set(permanent)]
        self.refuse = False
        self.limit = 0  # pages, checked at every map
        self.on_unmap: Any = lambda pages: None

    def call(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Stand in for ``Server.call``."""
        pages = {page for first, n in request["runs"] for page in range(first, first + n)}
        assert len(pages) == sum(n for _, n in request["runs"]), "a page is named twice"
        answers: list[dict[str, Any]] = []
        for rank, mapped in enumerate(self.mapped):
            if request["op"] == "map":
                assert not pages & mapped, "mapped already"
                if self.refuse and rank == 1:
                    answers.append({"error": "none left", "kind": "OutOfPagesError"})
                    continue
                mapped |= pages
                assert len(mapped) <= self.limit, "above the budget"
            elif request["op"] == "unmap" or rank == 0:  # worker 1 has nothing to undo
                assert pages <= mapped, "not mapped"
                if request["op"] == "unmap":
                    self.on_unmap(pages)
                mapped -= pages
            answers.append({"mapped_pages": len(mapped)})
        return answers


def new_request(name: str, tokens: list[int]) -> Request:
    """A request that may find and leave cached blocks."""
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    return Request(name, tokens, sampling, None, block_hasher=hasher)


class Walk:
    """One engine, and the requests that are running."""

    def __init__(self, shape: Shape, *, seed: int) -> None:
        init_none_hash(sha256)
        config = shape.config()
        self.shape = shape
        self.rng = random.Random(seed)
        self.manager = KVCacheManager(
            config,
            max_model_len=MAX_TOKENS,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_caching=True,
        )
        geometry = Geometry.of(config, shape.page_bytes, shape.frame_blocks)
        permanent = np.concatenate(permanent_pages(geometry, None))
        self.workers = Workers({int(page) for page in permanent})
        self.workers.on_unmap = self._lose
        self.ledger = PageLedger(
            geometry,
            budget_pages=geometry.n_pages,
            floor_pages=0,
            minimum_pages=len(permanent) + geometry.max_frame_pages,
            call=self.workers.call,
        )
        self.ledger.hold(permanent, len(permanent))
        managers: list[Any] = list(self.manager.coordinator.single_type_managers)
        self.pool: ElasticPool | ContiguousManager = managers[0].pool_of_vattn()
        self.pool.bind(self.ledger)
        if isinstance(self.pool, ElasticPool):
            # By single frames, or several at a time.
            self.pool.ahead_bytes = seed % 2 * 3 * self.ledger.frame_pages * shape.page_bytes
        self.running: list[Request] = []
        self.held: dict[int, tuple[int, ...]] = {}  # what is in each block's memory
        self.hits = self.refused = self.preempted = self.came = 0
        self.set_budget(geometry.n_pages)

    # What a scheduler does.

    def admit(self) -> None:
        """A request comes, with a beginning that others may have had."""
        tokens = [self.rng.randrange(3)] * self.rng.randrange(1, 33)
        tokens += [self.rng.randrange(3) for _ in range(self.rng.randrange(1, 17))]
        self.came += 1
        request = new_request(f"r{self.came}", tokens)
        self.pool.settle()
        blocks, n_cached, _ = self.manager.get_computed_blocks(request)
        for group in blocks.blocks:
            for i, block in enumerate(group):
                if not block.is_null:
                    expected = tuple(tokens[: (i + 1) * BLOCK_SIZE])
                    assert self.held.get(block.block_id) == expected, "a prefix that is not there"
        self.hits += n_cached
        before = self._account()
        given = self.manager.allocate_slots(
            request,
            len(tokens) - n_cached,
            n_cached,
            blocks,
            full_sequence_must_fit=self.rng.random() < 0.5,
        )
        if given is None:
            self._refused(before)
            return
        self.running.append(request)
        self._compute(request, n_cached, len(tokens))

    def grow(self) -> None:
        """A request gets some tokens, or is preempted because there is no memory for them."""
        if not self.running:
            return
        request = self.rng.choice(self.running)
        n_new = self.rng.randrange(1, 6)
        if request.num_tokens + n_new > MAX_TOKENS:
            self.end(request)
            return
        request.append_output_token_ids([self.rng.randrange(3) for _ in range(n_new)])
        before = self._account()
        if self.manager.allocate_slots(request, n_new) is None:
            self._refused(before)
            self.preempted += 1
            self.end(request)
            return
        self._compute(request, request.num_tokens - n_new, request.num_tokens)

    def end(self, request: Request | None = None) -> None:
        """A request ends."""
        if self.running:
            request = request or self.rng.choice(self.running)
            self.running.remove(request)
            self.manager.free(request)

    def set_budget(self, pages: int) -> None:
        """A user changes the budget, and the scheduler follows."""
        self.ledger.set_budget(pages)
        self.workers.limit = self.ledger.budget_pages
        self.pool.enforce_budget()
        if self.ledger.over:
            assert self.running, "an idle engine is above its budget"

    def shrink(self) -> None:
        """Another thread takes what is not in use."""
        target = self.rng.randrange(self.ledger.mapped_pages + 1)
        self.pool.shrink_to(target)
        if not self.running:
            assert self.ledger.mapped_pages <= max(target, self.ledger.floor_pages)

    def forget(self) -> None:
        """A user resets the prefix cache."""
        if isinstance(self.pool, ElasticPool):
            assert self.pool.reset_prefix_cache() == (not self.running)

    def step(self) -> None:
        """Do one of all these, and check everything."""
        self.workers.refuse = self.rng.random() < 0.1
        self.ledger._refused_until = 0.0  # the walk does not wait for the clock
        lowest = self.ledger.minimum_pages
        highest = min(4 * lowest, self.ledger.geometry.n_pages) + 1
        acts = {
            self.admit: 30,
            self.grow: 50,
            self.end: 12,
            self.shrink: 4,
            self.forget: 1,
            lambda: self.set_budget(self.rng.randrange(lowest, highest)): 4,
        }
        self.rng.choices(list(acts), list(acts.values()))[0]()
        if self.ledger.over:
            self.pool.enforce_budget()
        self.check()

    def check(self) -> None:
        """Check what has to hold between any two steps."""
        ledger, geometry = self.ledger, self.ledger.geometry
        assert self.workers.mapped[0] == self.workers.mapped[1]
        mapped = self.workers.mapped[0]
        assert len(mapped) == ledger.mapped_pages
        assert mapped == {int(page) for page in np.flatnonzero(ledger._frames_on)}
        for request in self.running:
            tokens = tuple(request.all_token_ids)
            groups = self.manager.get_block_ids(request.request_id)
            for i, block in ((i, block) for group in groups for i, block in enumerate(group)):
                if block == 0:
                    continue  # outside of a sliding window
                assert ledger.backed(geometry.frame_of(block))
                assert self.held[block] == tokens[: (i + 1) * BLOCK_SIZE]
            if self.shape.kind == "contiguous":
                (row,) = groups
                assert row[0] % self.shape.blocks_per_row == 0
                assert row == list(range(row[0], row[0] + len(row)))
        assert self.manager.block_pool.blocks[0].is_null

    def _compute(self, request: Request, first: int, stop: int) -> None:
        """Write the tokens ``first`` to ``stop - 1`` of a request, as kernels do."""
        tokens = tuple(request.all_token_ids)
        for group in self.manager.get_block_ids(request.request_id):
            for i in range(first // BLOCK_SIZE, -(-stop // BLOCK_SIZE)):
                if group[i] != 0:
                    self.held[group[i]] = tokens[: (i + 1) * BLOCK_SIZE]
        request.num_computed_tokens = stop

    def _lose(self, pages: set[int]) -> None:
        """The workers unmap pages: what was there is gone, and nobody may need it."""
        for block in self.manager.block_pool.blocks:
            touched = self.ledger.geometry.pages_of_blocks(
                range(block.block_id, block.block_id + 1)
            )
            if pages.intersection(touched.tolist()):
                assert block.ref_cnt == 0, f"block {block.block_id} is in use"
                assert not block.is_null
                self.held.pop(block.block_id, None)

    def _account(self) -> tuple[list[int], int]:
        return sorted(self.workers.mapped[0]), self.manager.block_pool.get_num_free_blocks()

    def _refused(self, before: tuple[list[int], int]) -> None:
        self.refused += 1
        pages, free = self._account()
        # Memory may have been taken from others on the way, or given for nothing; never both sides
        # of the account, and no block.
        assert free >= before[1]
        assert len(pages) <= max(self.ledger.budget_pages, len(before[0]))
