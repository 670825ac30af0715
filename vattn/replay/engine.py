"""The scheduler: requests through a memory policy, iteration by iteration, on a virtual clock.

One iteration: requests admitted in the iteration before start with all of their prompt, every
running request gets memory for its tokens (``grow``), and has one more token when the iteration is
over. Requests are admitted first come, first served, while an iteration runs, so that their memory
can be mapped ahead of their prefill; they wait for the end of that iteration, as in every engine
that schedules while the device works. When memory is short, the youngest request is preempted: its
memory is freed, it goes back to the front of the queue, and what it had is computed again.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vattn.bench.common import NothingMeasured
from vattn.errors import OutOfPagesError
from vattn.replay.outcome import Iteration, Outcome
from vattn.replay.policies import IntArray, Policy
from vattn.replay.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine's sizes, and what its iterations take.

    Attributes
    ----------
    max_batch_size : int
        Requests that run at a time.
    max_seq_len : int
        Tokens; longer requests are refused.
    decode_s : float
        Virtual seconds of an iteration, whatever the batch.
    prefill_tokens_per_s : float
        What prompts add to the iteration that they start in.
    admit_ahead : bool
        Whether requests are admitted one iteration before they start. Else they start at once, and
        their memory is mapped in the caller's time.
    real_pace : bool
        Whether iterations take their time. Else the next one starts as soon as nothing is left to
        be mapped ahead, and the time that took is recorded.
    """

    max_batch_size: int
    max_seq_len: int
    decode_s: float
    prefill_tokens_per_s: float
    admit_ahead: bool = True
    real_pace: bool = False


NEVER = np.iinfo(np.int64).max // 2


class Replay:
    """One trace under one policy. ``run`` it once."""

    def __init__(
        self, trace: Trace, policy: Policy, engine: Engine, on_done: Callable[[int], None]
    ) -> None:
        """``on_done(n)`` is called with the number of requests that are done, now and then."""
        self._policy = policy
        self._engine = engine
        self._on_done = on_done
        # Per request. Plain lists: they are read one by one.
        self._prompt = trace.prompt_tokens.tolist()
        self._left = np.maximum(trace.generated_tokens, 1).tolist()
        n = len(trace)
        self._arrival = [0.0] * n if trace.arrival_s is None else trace.arrival_s.tolist()
        self._started_at = np.full(n, np.nan)
        self._n_arrived = 0
        self._waiting: deque[int] = deque()
        # Per row.
        rows = engine.max_batch_size
        self._request = [-1] * rows
        self._lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self._rows_left: IntArray = np.full(rows, NEVER)
        self._running: IntArray = np.zeros(rows, dtype=np.int64)
        self._age: IntArray = np.zeros(rows, dtype=np.int64)
        self._n_running = 0
        self._admitted: list[int] = []  # rows that start with the next iteration
        self._promised_bytes = 0  # to those
        # What comes out.
        self._now = 0.0
        self._log = array("d")
        self._n_started = 0
        self._completed = self._refused = self._preemptions = self._recomputed_tokens = 0

    def run(self) -> Outcome:
        """Replay everything.

        Raises
        ------
        NothingMeasured
            The policy did not grant what it was asked for.
        OutOfPagesError
            A request that is alone does not get what the budget says it can have.
        """
        start, cpu_start = time.perf_counter(), time.process_time()
        while self._receive():
            self._iterate()
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        self._on_done(self._completed + self._refused)
        fields = len(Iteration._fields)
        return Outcome(
            policy=self._policy.name,
            budget_bytes=self._policy.budget_bytes,
            iterations=np.frombuffer(self._log, dtype=np.float64).reshape(-1, fields),
            queueing_s=(self._started_at - self._arrival)[~np.isnan(self._started_at)],
            completed=self._completed,
            refused=self._refused,
            preemptions=self._preemptions,
            recomputed_tokens=self._recomputed_tokens,
            wall_s=wall_s,
            cpu_s=cpu_s,
        )

    def _receive(self) -> bool:
        """Take in who has arrived; if nobody is there, wait for the next. False: all are done."""
        while True:
            arrivals, n = self._arrival, self._n_arrived
            while n < len(arrivals) and arrivals[n] <= self._now:
                self._queue(n)
                n += 1
            self._n_arrived = n
            if self._n_running or self._admitted or self._waiting:
                return True
            if n == len(arrivals):
                return False
            self._now = arrivals[n]

    def _queue(self, request: int) -> None:
        longest = self._prompt[request] + self._left[request] - 1
        if (
            longest > self._engine.max_seq_len
            or self._policy.bytes_for(longest) > self._policy.budget_bytes
        ):
            self._refused += 1
        else:
            self._waiting.append(request)

    def _iterate(self) -> None:
        clock = time.perf_counter_ns
        if not self._engine.admit_ahead or not self._n_running:
            self._admit()
        started = self._start()
        grow_ns = self._grow()
        grown_at = clock()
        prefill = sum(self._prompt[self._request[row]] for row in started if self._running[row])
        duration = self._engine.decode_s + prefill / self._engine.prefill_tokens_per_s
        if self._engine.admit_ahead:
            self._admit()
        if self._engine.real_pace:
            time.sleep(max(0.0, duration - (clock() - grown_at) / 1e9))
            settle_ns = 0
        else:
            self._policy.settle()
            settle_ns = clock() - grown_at
        self._record(duration, prefill, grow_ns, settle_ns)
        self._advance(duration)

    def _admit(self) -> None:
        """Give rows to who has waited longest, as long as prompt and headroom fit."""
        if not self._waiting:
            return
        policy = self._policy
        available = policy.available_bytes() - self._promised_bytes
        n = self._n_running + len(self._admitted)
        while self._waiting and n < self._engine.max_batch_size:
            request = self._waiting[0]
            need = policy.bytes_for(self._prompt[request])
            # Who is alone has everything: it was checked when the request came.
            if n > 0 and need + policy.growth_bytes > available:
                return
            self._waiting.popleft()
            row = policy.admit(self._prompt[request])
            self._request[row] = request
            self._admitted.append(row)
            self._promised_bytes += need
            available -= need
            n += 1

    def _start(self) -> list[int]:
        started = self._admitted
        for row in started:
            request = self._request[row]
            self._lengths[row] = self._prompt[request]
            self._rows_left[row] = self._left[request]
            self._running[row] = 1
            self._age[row] = self._n_started
            self._n_started += 1
            if np.isnan(self._started_at[request]):
                self._started_at[request] = self._now
        self._n_running += len(started)
        self._admitted = []
        self._promised_bytes = 0
        return started

    def _grow(self) -> int:
        """Grant everyone memory; returns the nanoseconds of the call that could."""
        clock = time.perf_counter_ns
        while True:
            start = clock()
            try:
                self._policy.grow(self._lengths)
            except OutOfPagesError:
                if self._n_running == 1:
                    raise
                self._preempt(int(np.where(self._running, self._age, -1).argmax()))
            else:
                return clock() - start

    def _preempt(self, row: int) -> None:
        request = self._request[row]
        length = int(self._lengths[row])
        if length > self._prompt[request]:
            self._recomputed_tokens += length - 1  # the last one was not there yet
        self._prompt[request] = length
        self._left[request] = int(self._rows_left[row])
        self._release(row)
        self._waiting.appendleft(request)
        self._preemptions += 1

    def _release(self, row: int) -> None:
        self._policy.free(row)
        self._lengths[row] = 0
        self._running[row] = 0
        self._rows_left[row] = NEVER
        self._n_running -= 1

    def _record(self, duration: float, prefill: int, grow_ns: int, settle_ns: int) -> None:
        memory = self._policy.memory(self._lengths)
        used_bytes = int(self._lengths.sum()) * self._policy.token_bytes
        used, _, granted, mapped, *_ = memory
        if not 0 < used_bytes == used <= granted <= mapped:
            raise NothingMeasured(
                f"{self._policy.name} at {self._now:.3f} s: {used_bytes} bytes of tokens, of which "
                f"it knows {used}; {granted} are granted and {mapped} mapped, expected each to "
                "cover the one before"
            )
        now = Iteration(
            start_s=self._now,
            duration_s=duration,
            prefill_tokens=prefill,
            running=self._n_running,
            waiting=len(self._waiting),
            used_bytes=used_bytes,
            needed_bytes=memory.needed_bytes,
            granted_bytes=memory.granted_bytes,
            mapped_bytes=memory.mapped_bytes,
            calls_in_step=memory.calls_in_step,
            calls_in_background=memory.calls_in_background,
            grow_ns=grow_ns,
            settle_ns=settle_ns,
        )
        self._log.extend(now)

    def _advance(self, duration: float) -> None:
        """The iteration is over: everyone who ran has one more token, and some are done."""
        self._now += duration
        self._rows_left -= self._running
        done = np.flatnonzero(self._rows_left == 0).tolist()
        for row in done:
            self._release(row)
        self._lengths += self._running
        if done:
            self._completed += len(done)
            self._on_done(self._completed + self._refused)
