"""Part ``batching``: many requests of different lengths, one after the other or together."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.hf_generate.model import GREEDY, Shape, TokenClock, build, gaps, synchronize
from benchmarks.hf_generate.results import Part, Rate
from benchmarks.hf_generate.turns import ChildFailed, in_child, there_and_back
from vattn.bench.common import Distribution, Measurement, at_least, expect_calls, progress
from vattn.integrations import transformers as integration

SERIAL, PADDED = "one by one", "left-padded batch"
HF_DEFAULT, HF_TUNED = "HF generate_batch, default", "HF generate_batch, tuned"
OURS = "vattn generate_batch"
DTYPE = "float32"
SPEED_GOAL = 1.5  # times the tokens/s of HF's with settings for the requests

# It warns of the missing eos_token_id for each call.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and how many tokens are wanted."""

    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Requests whose lengths are spread evenly, and how often each subject serves them all."""

    lengths: str
    shape: Shape
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    rounds: dict[str, int]
    # By itself HF takes nearly all memory that is free.
    default: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    count: int = 32

    @property
    def name(self) -> str:
        return f"{self.lengths}, {self.shape.layers} layers of {self.shape.hidden_size}"

    def requests(self) -> list[Request]:
        """Make the requests; the same each time."""
        source = random.Random(0)
        lengths = _spread(self.prompt_tokens, self.count, source)
        return [
            Request(prompt=source.choices(range(1, self.shape.vocab_size), k=n), new_tokens=new)
            for n, new in zip(lengths, _spread(self.new_tokens, self.count, source), strict=True)
        ]


@dataclass(kw_only=True)
class Served:
    """The new tokens of each request, times from token to token, and that of the whole.

    ``seconds`` is that of the call. ``around_s`` is its part before the first request is taken and
    after the last token: HF makes its cache in each call, and on CUDA records graphs.
    """

    tokens: list[list[int]]
    gaps_ns: list[float]
    seconds: float = 0.0
    around_s: float = 0.0


Server = Callable[[Any, list[Request]], Served]


def _spread(ends: tuple[int, int], count: int, source: random.Random) -> list[int]:
    low, high = ends
    values = [low + (high - low) * i // (count - 1) for i in range(count)]
    source.shuffle(values)
    return values


def scenarios(is_smoke: bool) -> list[Scenario]:
    """List what is measured."""
    big = Shape(heads=8, kv_heads=8, head_dim=64, hidden_size=512, intermediate_size=1408)
    tiny = Shape(layers=4, heads=4, kv_heads=4, head_dim=16, hidden_size=64, intermediate_size=176)
    mixed = Scenario(
        lengths="mixed",
        shape=big,
        prompt_tokens=(8, 199),
        new_tokens=(48, 48),
        rounds={SERIAL: 1, PADDED: 5, HF_DEFAULT: 1, HF_TUNED: 5, OURS: 5},
        tuned={"num_blocks": 64, "max_batch_tokens": 512},
    )
    uneven = Scenario(
        lengths="uneven",
        shape=big,
        prompt_tokens=(64, 640),
        new_tokens=(12, 120),
        rounds={SERIAL: 1, PADDED: 5, OURS: 5},
    )
    if is_smoke:
        once: dict[str, Any] = {
            "shape": replace(tiny, layers=2),
            "count": 4,
            "prompt_tokens": (2, 20),
            "default": {"max_memory_percent": 0.01},
        }
        return [
            replace(mixed, **once, new_tokens=(4, 4), rounds=dict.fromkeys(mixed.rounds, 1)),
            replace(uneven, **once, new_tokens=(2, 20), rounds=dict.fromkeys(uneven.rounds, 1)),
        ]
    return [mixed, replace(mixed, shape=tiny), uneven]


def measure(is_smoke: bool, device: str, deadline: float) -> Part:
    """Measure all scenarios, until the deadline.

    Expected: a batch reads the weights once for all rows, so it is faster than one by one by nearly
    the number of rows; padding computes what nobody wants, and waits for the longest.
    """
    part = Part()
    for scenario in scenarios(is_smoke):
        left = deadline - time.monotonic()
        if left <= 0:
            part.miss(f"batching/{scenario.name}", "skipped", "no time was left")
            continue
        served: dict[str, list[Served]] = defaultdict(list)
        answers = in_child(run_scenario, scenario, device, limit_s=left)
        try:
            turns = progress(range(sum(scenario.rounds.values())), scenario.name)
            for (subject, answer), _ in zip(answers, turns, strict=True):
                if isinstance(answer, Served):
                    served[subject].append(answer)
                else:
                    part.miss(f"batching/{scenario.name}/{subject}", "failed", answer)
        except ChildFailed as error:
            part.miss(f"batching/{scenario.name}", "failed", str(error))
        _summarize(part, scenario, served)
    return part


def run_scenario(scenario: Scenario, device: str) -> Iterator[tuple[str, Served | str]]:
    """Serve all requests with one subject after the other. A text says why one has failed."""
    model = build(scenario.shape, dtype=DTYPE, device=device)
    requests = scenario.requests()
    servers: dict[str, Server] = {
        SERIAL: _serve_serially,
        PADDED: _serve_padded,
        HF_DEFAULT: partial(_serve_with_hf, settings=scenario.default),
        HF_TUNED: partial(_serve_with_hf, settings=scenario.tuned),
        OURS: _serve_with_vattn,
    }
    warm: set[str] = set()
    for subject in there_and_back(scenario.rounds):
        is_warm = subject in warm
        yield subject, _try_to_serve(servers[subject], model, requests, device, is_warm=is_warm)
        warm.add(subject)


def _try_to_serve(
    server: Server, model: Any, requests: list[Request], device: str, *, is_warm: bool
) -> Served | str:
    try:
        if not is_warm:
            server(model, [replace(request, new_tokens=2) for request in requests[:2]])
        return _serve(server, model, requests, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _serve(server: Server, model: Any, requests: list[Request], device: str) -> Served:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # some subjects take a share of what the driver has free
    start = time.perf_counter()
    served = server(model, requests)
    synchronize(device)
    served.seconds = time.perf_counter() - start
    for tokens, request in zip(served.tokens, requests, strict=True):
        expect_calls(len(tokens), request.new_tokens, "tokens")
    return served


def _serve_serially(model: Any, requests: list[Request]) -> Served:
    served = Served(tokens=[], gaps_ns=[])
    for request in requests:
        one = _serve_padded(model, [request])
        served.tokens += one.tokens
        served.gaps_ns += one.gaps_ns
    return served


def _serve_padded(model: Any, requests: list[Request]) -> Served:
    longest = max(len(request.prompt) for request in requests)
    pads = [longest - len(request.prompt) for request in requests]
    ids = [[0] * n + request.prompt for n, request in zip(pads, requests, strict=True)]
    mask = [[0] * n + [1] * (longest - n) for n in pads]
    clock = TokenClock()
    tokens = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(request.new_tokens for request in requests),
        stopping_criteria=[clock],
        **GREEDY,
    )
    new = tokens[:, longest:].tolist()
    own = [row[: request.new_tokens] for row, request in zip(new, requests, strict=True)]
    return Served(tokens=own, gaps_ns=gaps(clock.times))


def _serve_with_hf(model: Any, requests: list[Request], settings: dict[str, Any]) -> Served:
    if model.device.type == "cpu" and find_spec("psutil") is None:
        raise RuntimeError("transformers asks psutil how much memory there is: pip install psutil")
    start = time.perf_counter()
    (new_tokens,) = {request.new_tokens for request in requests}
    outputs = model.generate_batch(
        [request.prompt for request in requests],
        generation_config=GenerationConfig(max_new_tokens=new_tokens, **GREEDY),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
        record_timestamps=True,
        progress_bar=False,
    )
    return _from_outputs(outputs, start)


def _serve_with_vattn(model: Any, requests: list[Request]) -> Served:
    start = time.perf_counter()
    outputs = integration.generate_batch(
        model,
        [request.prompt for request in requests],
        [GenerationConfig(max_new_tokens=r.new_tokens, **GREEDY) for r in requests],
        record_timestamps=True,
        progress_bar=False,
    )
    return _from_outputs(outputs, start)


def _from_outputs(outputs: dict[str, Any], start: float) -> Served:
    end = time.perf_counter()
    taken = min(out.created_time for out in outputs.values())
    done = max((out.timestamps[-1] for out in outputs.values() if out.timestamps), default=end)
    return Served(
        tokens=[out.generated_tokens for out in outputs.values()],
        gaps_ns=[gap * 1e9 for out in outputs.values() for gap in gaps(out.timestamps or ())],
        around_s=(taken - start) + (end - done),
    )


def _summarize(part: Part, scenario: Scenario, served: dict[str, list[Served]]) -> None:
    requests = scenario.requests()
    wanted = sum(request.new_tokens for request in requests)
    medians = {}
    for subject in (s for s in scenario.rounds if served[s]):
        runs = served[subject]
        between = [ns for run in runs for ns in run.gaps_ns]
        if between:
            what = f"{subject}: from token to token of a request, {scenario.name}"
            name = f"batching/{scenario.name}/{subject}"
            times = Distribution.of(between)
            part.measurements.append(
                Measurement(name=name, what=what, ns=times, calls={"rounds": len(runs)})
            )
        rate = Rate.of([wanted / run.seconds for run in runs])
        serving = Rate.of([wanted / (run.seconds - run.around_s) for run in runs])
        medians[subject] = rate.median
        part.rows.append(
            {
                "scenario": scenario.name,
                "model": str(scenario.shape),
                "subject": subject,
                "requests": len(requests),
                "prompt_tokens": sum(len(request.prompt) for request in requests),
                "new_tokens": wanted,
                "tokens_per_s": asdict(rate),
                "tokens_per_s_serving": asdict(serving),
                "p99_gap_ns": times.p99 if between else None,
                **_equal_to(served[SERIAL], runs[0]),
            }
        )
    other, goal = (HF_TUNED, SPEED_GOAL) if HF_TUNED in scenario.rounds else (PADDED, 1.0)
    if other in medians and OURS in medians:
        ratio = medians[OURS] / medians[other]
        name = f"tokens/s, {scenario.name}: {OURS} against {other}"
        part.targets.append(at_least(name, ratio, goal, "times"))


def _equal_to(serial: list[Served], run: Served) -> dict[str, int | None]:
    """Count the requests that got what they get alone, and the tokens up to a difference."""
    if not serial:
        return {"equal_requests": None, "equal_tokens": None}
    pairs = list(zip(serial[0].tokens, run.tokens, strict=True))
    return {
        "equal_requests": sum(alone == together for alone, together in pairs),
        "equal_tokens": sum(_length_of_common_start(*pair) for pair in pairs),
    }


def _length_of_common_start(one: list[int], other: list[int]) -> int:
    both = zip(one, other, strict=True)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
