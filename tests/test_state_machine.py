"""Random histories against a model that stores what every byte of every row should be.

A hundred on the host, fewer where pages are large. STATE_MACHINE_EXAMPLES=5000 in the environment:
more of them.
"""

from __future__ import annotations

import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
import torch
from backends import Backend, double_in_use
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from state_model import Model, common, shapes

import vattn
from vattn.testing import init_with_faults

N_ROWS = 5

# How an operation is called: alone, beside a thread that looks and trims, or with the n-th driver
# call failing.
ALONE, BESIDE = 0, -1
HOW = st.sampled_from([ALONE] * 6 + [BESIDE] + [1, 1, 2, 3, 4, 5, 7, 9])
ROW = st.integers(0, N_ROWS - 1)
LENGTH = st.integers(0, 95)  # see CacheMachine.tokens
SALTS = ["", "tenant"]
FAILED = object()


class CacheMachine(RuleBasedStateMachine):
    """Operations on a small cache; after each, every byte is compared with the model."""

    backend: Backend

    @initialize(
        shape=st.sampled_from([0, 1, 2, 0, 1, 2, 3, 4]),
        layout=st.sampled_from(["interleaved", "per_layer"]),
        order=st.sampled_from(["NHD", "HND"]),
        region_pages=st.sampled_from([3, 7, 12, 20, 60]),
        ahead_pages=st.sampled_from([0, 0, 0, 2]),
        extent_pages=st.sampled_from([1, 1, 4, 8]),
        scrub=st.sampled_from(["never", "on_reuse"]),
        block_tokens=st.sampled_from([1, 7, None]),
        faulty=st.booleans(),
    )
    def start(self, shape, layout, order, region_pages, ahead_pages, extent_pages, scrub,
              block_tokens, faulty):  # fmt: skip
        shape = shapes(host=self.backend.name == "host")[shape]
        page_bytes = 4096 if self.backend.name == "host" else self.backend.page_bytes
        sizes = shape.region_token_bytes(layout, order)
        n_regions = len(set(shape.windows)) if len(sizes) == 1 else len(sizes)
        self.quarter_page = page_bytes / max(sizes) / 4
        self.limit = int(4 * shape.pages * self.quarter_page)
        self.n_pages = n_regions * region_pages
        self.slack = n_regions * extent_pages  # what a row may have beyond its pages
        self.faulty = faulty
        self.cache, self.faults = init_with_faults(
            vattn.CacheConfig(
                num_layers=shape.n_layers,
                layer_groups=shape.groups,
                dtype=shape.dtype,
                layout=layout,
                order=order,
                max_batch_size=N_ROWS,
                max_seq_len=self.limit,
                device=self.backend.device,
                page_bytes=page_bytes,
                memory=self.n_pages * page_bytes,
                max_extent_bytes=extent_pages * page_bytes,
                lookahead=int(4 * ahead_pages * self.quarter_page),
                scrub=scrub,
            )
        )
        self.model = Model(self.cache, shape)
        self.prefixes = None
        if not shape.has_window:
            self.prefixes = vattn.PrefixCache(self.cache, block_tokens=block_tokens)
        self.inserted: list[tuple[str, list[int]]] = []

    # How rules choose, and how they call.

    def tokens(self, length: int) -> int:
        """A number of tokens near a quarter of a page: one fewer, exactly, or one more."""
        quarters, offset = divmod(length, 3)
        n = quarters % (4 * self.model.shape.pages + 1) * self.quarter_page
        return min(max(0, int(n) + offset - 1), self.limit)

    def row(self, pick: int) -> int:
        """An active row; there is one more if there was none.

        Not a precondition: whether rows are active depends on threads, which hypothesis minds.
        """
        if not self.model.rows:
            row = self.cache.alloc()
            self.model.start(row, self.model.no_ids())
            self.run_step(ALONE, {row: self.tokens(7 * pick)})
        active = sorted(self.model.rows)
        return active[pick % len(active)]

    @property
    def n_inactive(self) -> int:
        return N_ROWS - len(self.model.rows)

    def used(self) -> list[int]:
        return [state.longest for state in self.model.rows.values()]

    def call(self, how, operation, *, demand=None, may_refuse=False):
        """What it returns, or FAILED: it raised what it may, and nothing has changed.

        OutOfPagesError is true only if rows of `demand` tokens do not fit, sharing nothing.
        """
        try:
            if how == BESIDE:
                with ThreadPoolExecutor(max_workers=1) as executor:
                    other = executor.submit(self.look_and_trim)
                    try:
                        return operation()
                    finally:
                        other.result()
            if how > 0 and self.faulty:
                self.faults.fail_nth(how)
            return operation()
        except (vattn.OutOfPagesError, vattn.DriverError, ValueError) as error:
            self.check_reason(error, how, demand, may_refuse)
        finally:
            self.faults.disarm()
        return FAILED

    def check_reason(self, error, how, demand, may_refuse):
        if isinstance(error, ValueError):
            assert may_refuse, error
            assert "window" in str(error)
        elif isinstance(error, vattn.DriverError):
            assert how > 0 and self.faulty, error
        else:
            assert error.needed > error.free
            if not self.faulty and not self.model.shape.has_window:
                slack = self.slack * len(demand)
                assert self.model.most_pages(demand) + slack > self.n_pages, error

    def look_and_trim(self) -> None:
        for _ in range(5):
            self.cache.check()
            self.cache.stats()
            self.cache.trim()

    # Requests begin, grow and end.

    @rule(how=HOW, length=LENGTH, hint=LENGTH)
    def alloc(self, how, length, hint):
        if self.n_inactive == 0:
            with pytest.raises(vattn.OutOfRowsError):
                self.cache.alloc(self.tokens(hint))
            return
        row = self.call(how, lambda: self.cache.alloc(self.tokens(hint)))
        if row is not FAILED:
            self.model.start(row, self.model.no_ids())
            self.model.check()
            self.run_step(how, {row: self.tokens(length)})

    @rule(how=HOW, pick=ROW, then=st.sampled_from(["", "", "trim", "forget"]))
    def free(self, how, pick, then):
        self.end(how, self.row(pick))
        if then == "trim":
            self.call(how, self.cache.trim)
            if how == ALONE:
                assert self.cache.stats().rows_idle == 0
        if then == "forget" and self.prefixes is not None:
            self.prefixes.clear()
            self.inserted.clear()

    def end(self, how, row):
        if self.call(how, lambda: self.cache.free(row)) is not FAILED:
            del self.model.rows[row]

    @rule(how=HOW, picks=st.lists(st.tuples(ROW, LENGTH), min_size=1, max_size=3))
    def step(self, how, picks):
        self.run_step(how, {self.row(pick): self.tokens(length) for pick, length in picks})

    @rule(how=HOW, n=st.sampled_from([1, 1, 2, 20]))
    def decode(self, how, n):
        rows = self.model.rows.items()
        self.run_step(how, {row: min(state.length + n, self.limit) for row, state in rows})

    def run_step(self, how, lens, ids=None):
        may_refuse = not all(
            n >= self.model.rows[row].length or self.model.can_be_cut_to(row, n)
            for row, n in lens.items()
        )
        demand = [max(state.longest, lens.get(row, 0)) for row, state in self.model.rows.items()]
        done = self.call(how, lambda: self.cache.step(lens), demand=demand, may_refuse=may_refuse)
        if done is not FAILED:
            for row, n in lens.items():
                self.model.set_length(row, n, ids)

    # Rows share tokens, or lose some.

    @rule(how=HOW, pick=ROW, n=st.sampled_from([1, 1, 2, 3]))
    def fork(self, how, pick, n):
        self.run_fork(how, self.row(pick), None, n)

    @rule(how=HOW, pick=ROW, length=LENGTH, n=st.sampled_from([1, 1, 2, 3]))
    def fork_a_part(self, how, pick, length, n):
        row = self.row(pick)
        self.run_fork(how, row, min(self.tokens(length), self.model.rows[row].length), n)

    def run_fork(self, how, row, seq_len, n):
        tokens = self.model.rows[row].length if seq_len is None else seq_len
        may_refuse = not self.model.can_be_cut_to(row, tokens)

        def fork():
            return self.cache.fork(row, seq_len, n)

        if n > self.n_inactive:
            errors = (vattn.OutOfRowsError, ValueError) if may_refuse else vattn.OutOfRowsError
            with pytest.raises(errors):
                fork()
            return
        children = self.call(how, fork, demand=self.used() + n * [tokens], may_refuse=may_refuse)
        if children is not FAILED:
            assert len(children) == n
            self.model.fork(row, tokens, children)

    @rule(how=HOW, pick=ROW, length=LENGTH)
    def truncate(self, how, pick, length):
        row = self.row(pick)
        n = min(self.tokens(length), self.model.rows[row].length)
        may_refuse = not self.model.can_be_cut_to(row, n)
        done = self.call(how, lambda: self.cache.truncate(row, n), may_refuse=may_refuse)
        if done is not FAILED:
            self.model.set_length(row, n)

    @rule(how=HOW, picks=st.lists(st.tuples(ROW, ROW), min_size=1, max_size=N_ROWS))
    def reorder(self, how, picks):
        parent_of = {self.row(pick): self.row(parent) for pick, parent in picks}
        rows, parents = list(parent_of), list(parent_of.values())
        demand = self.used() + [self.model.rows[parent].length for parent in parents]
        done = self.call(how, lambda: self.cache.reorder(rows, parents), demand=demand)
        if done is not FAILED:
            self.model.reorder(rows, parents)

    @rule(
        how=HOW, pick=ROW, back=st.sampled_from([5, 30, 300, 10**6]), run=st.integers(1, 30),
        skip=st.sampled_from([0, 1, 3]), gap=st.sampled_from([0, 1, 3, 200]),
        most=st.sampled_from([5, 40, 10**6]),
    )  # fmt: skip
    def compact(self, how, pick, back, skip, run, gap, most):
        row = self.row(pick)
        n = self.model.rows[row].length
        first = max(0, n - back)
        keep = [t for t in range(first + skip, n) if (t - first - skip) % (run + gap) < run][:most]

        def compact():
            self.cache.compact(row, keep, start=first)

        if self.model.shape.has_window:
            with pytest.raises(ValueError, match="window"):
                compact()
        elif self.call(how, compact, demand=[*self.used(), n]) is not FAILED:
            self.model.compact(row, keep, first)
        elif self.cache.seq_lens[row] != n:
            # A copy failed: what has not been moved is there.
            assert how > 0
            in_place = sum(token == first + i for i, token in enumerate(keep))
            self.model.compact(row, keep[:in_place], first)

    # Requests find what others left.

    @rule(how=HOW, pick=ROW, length=LENGTH, salt=st.sampled_from(SALTS), then_free=st.booleans())
    def insert(self, how, pick, length, salt, then_free):
        if self.prefixes is None:
            return
        row = self.row(pick)
        ids = self.model.rows[row].ids[0].tolist()
        ids = ids[: self.tokens(length)] or ids
        if ids:
            self.call(how, lambda: self.prefixes.insert(row, ids, salt=salt))
            self.inserted.append((salt, ids))
        if then_free:
            self.end(how, row)

    @rule(
        how=HOW, which=st.integers(0, 3), length=LENGTH, whole=st.booleans(),
        more=st.sampled_from([1, 2, 50]), same_salt=st.sampled_from([True, True, True, False]),
        then_insert=st.booleans(), then_free=st.booleans(),
    )  # fmt: skip
    def match(self, how, which, length, whole, more, same_salt, then_insert, then_free):
        if self.prefixes is None:
            return
        salt, ids = self.inserted[-1 - which % len(self.inserted)] if self.inserted else ("", [])
        if not same_salt:
            salt = SALTS[1 - SALTS.index(salt)]
        known = ids if whole else ids[: self.tokens(length)]
        ids = [*known, *self.model.new_ids(more).tolist()][: self.limit]

        def match():
            return self.prefixes.match(ids, salt=salt)

        if self.n_inactive == 0:
            with pytest.raises(vattn.OutOfRowsError):
                match()
            return
        found = self.call(how, match)
        if found is FAILED:
            return
        row, n_cached = found
        theirs = [common(ids, other) for of, other in self.inserted if of == salt]
        assert n_cached <= min(max(theirs, default=0), len(ids) - 1)
        prompt = torch.tensor(ids)
        self.model.start(row, prompt[:n_cached].repeat(len(self.model.shape.groups), 1))
        self.model.check()
        self.run_step(ALONE, {row: len(ids)}, prompt)
        if then_insert and self.model.rows[row].length == len(ids):
            self.prefixes.insert(row, ids, salt=salt)
            self.inserted.append((salt, ids))
        if then_free:
            self.end(how, row)

    # What holds after each of them.

    @invariant()
    def every_byte_of_every_row_is_what_it_should_be(self):
        self.model.check()
        if self.cache.config.scrub == "on_reuse" and self.backend.name == "host":
            self.model.check_scrubbed()

    @invariant()
    def sums_agree(self):
        self.cache.check()
        stats = self.cache.stats()
        assert stats.mapped_bytes <= stats.held_bytes <= self.n_pages * self.cache.page_bytes
        assert stats.rows_active == len(self.model.rows)
        if not self.model.shape.has_window:
            n_tokens = sum(state.length for state in self.model.rows.values())
            assert stats.used_bytes == n_tokens * self.cache.token_bytes
        if self.cache.config.lookahead == 0:  # or memory comes between two questions
            tokens = [state.length for state in self.model.rows.values()]
            mapped = stats.mapped_bytes + stats.aliased_bytes
            if not self.model.shape.has_window:
                assert mapped >= self.model.most_pages(tokens) * self.cache.page_bytes

    def teardown(self):
        # Or a failure's frames keep the cache, and with each a part of vm.max_map_count.
        error = sys.exc_info()[1]
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        if hasattr(self, "cache"):
            self.cache.close()
            assert self.cache.stats().held_bytes == 0
            del self.cache, self.model, self.prefixes, self.faults


def run(name, examples):
    torch.set_num_threads(1)
    machine = type("Machine", (CacheMachine,), {"backend": Backend(name)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("STATE_MACHINE_EXAMPLES", examples)),
            stateful_step_count=25,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_histories_on_the_host():
    run("host", examples=100)


def test_random_histories_on_the_cuda_driver_over_the_double(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a real libcuda is loaded; the double needs a process of its own")
    with double_in_use(monkeypatch):
        run("double", examples=10)


@pytest.mark.gpu
def test_random_histories_on_a_gpu():
    run("gpu", examples=10)
