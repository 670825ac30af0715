"""Can a second thread map memory while kernels run, at what cost to either?"""

from __future__ import annotations

import threading
import time

import torch

from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.driver import Driver
from benchmarks.gpu_questions.work import DEVICE, Matmuls

MOST_PAGES = 4000
WORK_S = 0.5
ROUNDS = 3


class Mapper:
    """Creates pages and maps them into one range, one after the other, in the calling thread."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.samples_us: list[float] = []
        self.error = ""
        self._handles: list[int] = []
        self._base = driver.reserve(MOST_PAGES * driver.page_bytes)

    def run(self, until: threading.Event, most: int = MOST_PAGES) -> None:
        """Map page after page until told to stop."""
        page = self.driver.page_bytes
        try:
            self.driver.use_here()
            while len(self._handles) < most and not until.is_set():
                address = self._base + len(self._handles) * page
                begin = time.perf_counter()
                handle = self.driver.create(page)
                self.driver.map(address, page, handle)
                self.samples_us.append((time.perf_counter() - begin) * 1e6)
                self._handles.append(handle)
        except RuntimeError as error:
            self.error = str(error)

    def give_back(self) -> None:
        """Unmap and release everything. Nothing on the device uses it."""
        page = self.driver.page_bytes
        for i, handle in enumerate(self._handles):
            self.driver.call("cuMemUnmap", self._base + i * page, page)
            self.driver.call("cuMemRelease", handle)
        self.driver.call("cuMemAddressFree", self._base, MOST_PAGES * page)


def _spread(samples: list[float]) -> dict[str, float]:
    if not samples:
        return {"n": 0}
    ordered = sorted(samples)
    return {
        "n": len(ordered),
        "median_us": ordered[len(ordered) // 2],
        "p99_us": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "max_us": ordered[-1],
    }


def _beside(driver: Driver, work: Matmuls, counter: torch.Tensor) -> tuple[Mapper, float]:
    """Run the work while another thread maps; returns what each took."""
    mapper = Mapper(driver)
    stop = threading.Event()
    thread = threading.Thread(target=mapper.run, args=(stop,))
    done = torch.cuda.Event()

    def meanwhile() -> None:
        counter.add_(1)
        done.record()
        thread.start()
        while not done.query():
            time.sleep(0.001)
        stop.set()
        thread.join()

    return mapper, work.timed_ms(meanwhile)


def ask(evidence: Evidence) -> tuple[bool | None, str]:
    """Compare quiet and busy: the time of a call, the time of the work, and its result."""
    work = Matmuls(WORK_S)
    driver = Driver()
    counter = torch.zeros(1 << 20, dtype=torch.int32, device=DEVICE)
    work.timed_ms(lambda: None)
    expected = work.result.clone()

    quiet_ms = [work.timed_ms(lambda: None) for _ in range(ROUNDS)]
    alone = Mapper(driver)
    alone.run(threading.Event(), most=500)
    alone.give_back()
    evidence.note(quiet_ms=quiet_ms, alone=_spread(alone.samples_us), alone_error=alone.error)
    if alone.error:
        return None, f"without kernels: {alone.error}"

    busy_ms, mappers = [], []
    for _ in range(ROUNDS):
        work.result.zero_()
        mapper, ms = _beside(driver, work, counter)
        busy_ms.append(ms)
        mappers.append(mapper)
        mapper.give_back()
        right = torch.equal(work.result, expected)
        evidence.note(busy_ms=busy_ms, result_right=right, error=mapper.error)
        if not right or mapper.error:
            return False, mapper.error or "the kernels' result was wrong"
    counted = bool((counter == ROUNDS).all())
    beside = _spread([us for mapper in mappers for us in mapper.samples_us])
    slow_down = min(busy_ms) / min(quiet_ms)
    evidence.note(beside=beside, slow_down=slow_down, counted=counted)
    if beside["n"] < ROUNDS:
        return False, f"{beside['n']} pages were mapped while kernels ran"
    us, alone_us = beside["median_us"], _spread(alone.samples_us)["median_us"]
    said = f"a page takes {us:.0f} us, {alone_us:.0f} us without kernels (medians)"
    return counted, f"{said}; the kernels took {slow_down:.3f} times as long"
