"""Random histories against a model that stores what every token should hold."""

from __future__ import annotations

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
    precondition,
    rule,
    run_state_machine_as_test,
)

import vattn

N_ROWS, N_PAGES = 4, 12


class CacheMachine(RuleBasedStateMachine):
    """The model: a length per row, the values of a few of its tokens, and a budget of pages."""

    backend: Backend

    @initialize(
        layout=st.sampled_from(["interleaved", "per_layer"]),
        order=st.sampled_from(["NHD", "HND"]),
        ahead_pages=st.sampled_from([0, 0, 2]),
        extent_pages=st.sampled_from([1, 4, 8]),
    )
    def start(self, layout, order, ahead_pages, extent_pages):
        self.extent_pages = extent_pages
        self.cache = vattn.init(
            self.backend.config(
                pages=N_PAGES,
                layout=layout,
                order=order,
                lookahead=ahead_pages * self.backend.page_tokens,
                max_extent_bytes=extent_pages * self.backend.page_bytes,
            )
        )
        self.lens: dict[int, int] = {}
        self.longest: dict[int, int] = {}  # of all lengths since alloc: shrinking unmaps nothing
        self.marks: dict[int, dict[int, float]] = {}  # {row: {token: value}}
        self.next_value = 0.0

    def tokens(self, quarter_pages):
        return quarter_pages * self.backend.page_tokens // 4

    def tensors(self, row):
        for layer in range(2):
            for tensor in self.cache.kv(layer):
                yield (
                    tensor[row] if self.cache.config.order == "NHD" else tensor[row].transpose(0, 1)
                )

    @rule(quarter_pages=st.integers(0, 4 * N_PAGES))
    def alloc(self, quarter_pages):
        if len(self.lens) == N_ROWS:
            with pytest.raises(vattn.OutOfRowsError):
                self.cache.alloc(self.tokens(quarter_pages))
            return
        row = self.cache.alloc(self.tokens(quarter_pages))
        assert row not in self.lens
        self.lens[row], self.longest[row], self.marks[row] = 0, 0, {}

    @precondition(lambda self: self.lens)
    @rule(data=st.data())
    def free(self, data):
        row = data.draw(st.sampled_from(sorted(self.lens)))
        self.cache.free(row)
        del self.lens[row], self.longest[row], self.marks[row]

    @precondition(lambda self: self.lens)
    @rule(data=st.data())
    def step(self, data):
        rows = data.draw(st.lists(st.sampled_from(sorted(self.lens)), unique=True, min_size=1))
        lens = {row: self.tokens(data.draw(st.integers(0, 4 * N_PAGES))) for row in rows}
        self.run_step(lens)

    @precondition(lambda self: self.lens)
    @rule(data=st.data())
    def step_beside_another_thread(self, data):
        row = data.draw(st.sampled_from(sorted(self.lens)))
        lens = {row: self.tokens(data.draw(st.integers(0, 4 * N_PAGES)))}
        with ThreadPoolExecutor(max_workers=1) as executor:
            other = executor.submit(self.look_and_trim)
            self.run_step(lens)
            other.result()

    def look_and_trim(self):
        for _ in range(10):
            self.cache.check()
            self.cache.stats()
            self.cache.trim()

    def run_step(self, lens):
        before = self.cache.seq_lens
        try:
            self.cache.step(lens)
        except vattn.OutOfPagesError as error:
            shortage = error.needed - error.free
        else:
            shortage = 0
        if shortage != 0:
            assert shortage > 0
            assert self.cache.seq_lens == before
            # It said so only because it is true: what must stay mapped leaves no room. An extent of
            # several pages stays whole under a row that uses a part of it.
            used = {row: max(n, self.longest[row]) for row, n in (self.lens | lens).items()}
            whole = (self.extent_pages - 1) * self.cache.regions_per_row * len(used)
            assert self.pages(used) + whole > N_PAGES
            return
        for row, n in lens.items():
            old, self.lens[row] = self.lens[row], n
            self.longest[row] = max(self.longest[row], n)
            self.marks[row] = {t: value for t, value in self.marks[row].items() if t < n}
            for token in {old, (old + n) // 2, n - 1} if n > old else ():
                self.next_value += 1
                self.marks[row][token] = self.next_value
                for tensor in self.tensors(row):
                    tensor[token] = self.next_value

    def pages(self, lens):
        region_token_bytes = self.cache.token_bytes // self.cache.regions_per_row
        per_region = (-(-n * region_token_bytes // self.backend.page_bytes) for n in lens.values())
        return sum(per_region) * self.cache.regions_per_row

    @rule()
    def trim(self):
        self.cache.trim()
        stats = self.cache.stats()
        assert stats.rows_idle == 0

    @invariant()
    def every_marked_token_holds_its_value(self):
        for row, marks in getattr(self, "marks", {}).items():
            for tensor in self.tensors(row):
                for token, value in marks.items():
                    assert bool((tensor[token] == value).all()), (row, token)

    @invariant()
    def lengths_and_sums_agree(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        assert self.cache.seq_lens == [self.lens.get(row, 0) for row in range(N_ROWS)]
        stats = self.cache.stats()
        assert stats.mapped_bytes <= stats.held_bytes <= N_PAGES * self.backend.page_bytes
        assert stats.rows_active == len(self.lens)

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()
            assert self.cache.stats().held_bytes == 0


SETTINGS = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def run(name):
    torch.set_num_threads(1)
    machine = type("Machine", (CacheMachine,), {"backend": Backend(name)})
    run_state_machine_as_test(machine, settings=SETTINGS)


def test_random_histories_on_the_host():
    run("host")


def test_random_histories_on_the_cuda_driver_over_the_double(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a real libcuda is loaded; the double needs a process of its own")
    with double_in_use(monkeypatch):
        run("double")


@pytest.mark.gpu
def test_random_histories_on_a_gpu():
    run("gpu")
