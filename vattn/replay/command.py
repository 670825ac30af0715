"""A trace of requests through the real allocator, without a model, and through other policies.

Lengths and arrivals are played through on a virtual clock: no model runs, and on the CPU nobody
touches the memory, so that the budget may be larger than the machine. What vattn does is real: its
allocator, its driver calls, its background thread.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from vattn.bench import common
from vattn.cache import KVCache, init
from vattn.config import CacheConfig
from vattn.pool import DEFAULT_MAX_EXTENT_BYTES, open_pool
from vattn.replay import picture, report
from vattn.replay.engine import Engine, Replay
from vattn.replay.options import load_model, load_trace, make_config, make_engine, parse
from vattn.replay.outcome import DEFINITIONS, Outcome, summarise
from vattn.replay.policies import OTHERS, Policy, VattnPolicy
from vattn.replay.trace import Trace


@contextmanager
def _bar(policy: str, n_requests: int) -> Iterator[Callable[[int], None]]:
    err = Console(stderr=True)
    if not err.is_terminal:
        err.print(f"{policy} ({n_requests} requests)", highlight=False)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(policy, total=n_requests)
        yield lambda done: bar.update(task, completed=done)


# Options that are recorded as they were given; trace and engine are recorded on their own.
SETTINGS = ("model", "dtype", "memory", "layout", "page_bytes", "seed", "rate", "qps")


def replay(trace: Trace, policy: Policy, engine: Engine) -> Outcome:
    """Replay with a bar that follows the requests that are done."""
    with _bar(policy.name, len(trace)) as on_done:
        return Replay(trace, policy, engine, on_done).run()


def replay_vattn(trace: Trace, config: CacheConfig, engine: Engine) -> Outcome:
    """Replay through a real cache, and check that all is in order and given back afterwards.

    Raises
    ------
    NothingMeasured
        The cache did not make the steps, or still has requests.
    RuntimeError
        An invariant of the cache is broken.
    """
    on_cpu = config.device_type == "cpu"
    cache = KVCache(config, open_pool(config, rehearsal=True)) if on_cpu else init(config)
    with cache:
        outcome = replay(trace, VattnPolicy(cache), engine)
        cache.check()
        after = cache.stats()
    if len(outcome.iterations) != 0:
        common.expect_calls(after.steps, len(outcome.iterations), "step()")
    if after.rows_active or after.used_bytes:
        raise common.NothingMeasured(
            f"{after.rows_active} rows with {after.used_bytes} bytes are left, expected none"
        )
    calls = {
        origin: {name: call.count for name, call in by_name.items() if call.count}
        for origin, by_name in after.driver_calls.items()
    }
    return dataclasses.replace(outcome, driver_calls=calls)


def main(arguments: list[str] | None = None, *, prog: str = "vattn replay") -> int:
    """Replay, print, draw, save."""
    options = parse(arguments, prog, __doc__)
    skipped = common.skip_reason(options.device)
    if skipped:
        common.console.print(f"{prog} on {options.device}: {skipped}")
        return 0
    env = common.environment(options.commit)
    start = time.perf_counter()
    trace = load_trace(options)
    config = make_config(options, trace, load_model(options.model))
    engine = make_engine(options, config)
    outcomes = []
    for name in options.policies:
        if name == "vattn":
            outcomes.append(replay_vattn(trace, config, engine))
        else:
            outcomes.append(replay(trace, OTHERS[name](config), engine))
    wall_s = time.perf_counter() - start
    if all(len(outcome.iterations) == 0 for outcome in outcomes):
        raise ValueError(
            f"all {len(trace)} requests are refused: none fits {options.memory} or "
            f"{config.max_seq_len} tokens; raise --memory or --max-seq-len"
        )
    vattn = next((outcome for outcome in outcomes if outcome.policy == VattnPolicy.name), None)
    summaries = [summarise(outcome) for outcome in outcomes]
    subject = f"{options.model}, {options.layout}"
    measurements = report.measurements_of(vattn) if vattn else []
    targets = report.targets_of(trace, summaries, subject=subject, wall_s=wall_s)
    report.show(trace, summaries, measurements, targets)
    path = common.save(
        "replay",
        options,
        env,
        measurements,
        targets,
        trace=report.trace_facts(trace),
        settings={
            **dataclasses.asdict(engine),
            "lookahead": config.lookahead,
            "max_extent": options.max_extent or DEFAULT_MAX_EXTENT_BYTES,
            **{name: value for name, value in vars(options).items() if name in SETTINGS},
        },
        definitions=DEFINITIONS,
        wall_s=wall_s,
        policies=list(map(report.as_json, outcomes, summaries)),
    )
    shown = [outcome for outcome in outcomes if len(outcome.iterations)]
    pictures = picture.draw_memory(trace, shown, path.with_name(f"{path.stem}-memory"))
    if vattn in shown:
        pictures += picture.draw_steps(trace, vattn, path.with_name(f"{path.stem}-steps"))
    for drawn in pictures:
        common.console.print(f"drawn: {drawn}", highlight=False, soft_wrap=True)
    return 0
