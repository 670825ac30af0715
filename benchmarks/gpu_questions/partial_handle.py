"""Can a part of a physical handle be mapped?"""

from __future__ import annotations

from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.driver import Driver

PAGES = 4
MARK = b"vattn" * 100


def _try_map(driver: Driver, address: int, pages: tuple[int, int], handle: int) -> str:
    """Map pages [first, end) of a handle; returns what the first call that failed answered."""
    first, end = (page * driver.page_bytes for page in pages)
    result = driver.result("cuMemMap", address, end - first, first, handle, 0)
    if result == "CUDA_SUCCESS":
        driver.set_access(address, end - first)
    return result


def ask(evidence: Evidence, driver: Driver | None = None) -> tuple[bool | None, str]:
    """Map the first part, then a part from an offset; check that it is the handle's memory."""
    driver = driver or Driver()
    page = driver.page_bytes
    handle = driver.create(PAGES * page)
    base = driver.reserve(4 * PAGES * page)
    whole, first, later = base, base + PAGES * page, base + 2 * PAGES * page
    evidence.note(page_bytes=page, handle_bytes=PAGES * page)
    driver.map(whole, PAGES * page, handle)

    results = {}
    for name, at, pages in (
        ("first page of 4", first, (0, 1)),
        ("first 3 pages of 4", first, (0, 3)),
        ("last page of 4, from an offset", later, (3, 4)),
        ("more than the handle", later, (0, PAGES + 1)),
    ):
        result = _try_map(driver, at, pages, handle)
        same_memory = None
        if result == "CUDA_SUCCESS" and pages[1] <= PAGES:
            mark = name.encode() + MARK
            driver.write(at, mark)
            same_memory = driver.read(whole + pages[0] * page, len(mark)) == mark
        if result == "CUDA_SUCCESS":
            driver.call("cuMemUnmap", at, (pages[1] - pages[0]) * page)
        results[name] = {"cuMemMap": result, "same_memory": same_memory}
        evidence.note(results=results)

    driver.call("cuMemUnmap", whole, PAGES * page)
    driver.call("cuMemRelease", handle)
    driver.call("cuMemAddressFree", base, 4 * PAGES * page)
    works = {name: r["same_memory"] is True for name, r in results.items()}
    from_start = works["first page of 4"] and works["first 3 pages of 4"]
    from_offset = works["last page of 4, from an offset"]
    said = f"from the start: {'yes' if from_start else 'no'}"
    said += f"; from an offset: {'yes' if from_offset else 'no'}"
    return from_start, f"{said} ({results['last page of 4, from an offset']['cuMemMap']})"
