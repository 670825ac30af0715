"""What ``vattn replay`` can be asked for, and the trace, model and cache that follow from it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vattn.bench import common
from vattn.config import LAYOUTS, CacheConfig
from vattn.models import MODELS, ModelShape
from vattn.replay.engine import Engine
from vattn.replay.policies import POLICIES
from vattn.replay.synthetic import make_synthetic, poisson_arrivals
from vattn.replay.trace import Trace, read_trace

QUICK_REQUESTS = 50
DEFAULT_BATCH = 256
PAPER_BATCH = {"vattention_decode_latency": 64}


def parse(arguments: list[str] | None, prog: str, description: str | None) -> argparse.Namespace:
    """Read the command line.

    Raises
    ------
    ValueError
        A value that cannot be, or options that exclude each other.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    _add_trace(parser)
    _add_cache(parser)
    _add_engine(parser)
    common.add_arguments(parser)
    options = parser.parse_args(arguments)
    if (options.trace is None) == (options.synthetic is None):
        raise ValueError("expected a TRACE or --synthetic N, exactly one of them")
    for name in ("rate", "decode_ms", "prefill_tokens_per_s"):
        value = getattr(options, name)
        if not 0 < value < np.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, expected more than 0")
    for name in ("limit", "max_batch_size", "max_seq_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    options.policies = options.policies.split(",")
    for name in options.policies:
        if name not in POLICIES:
            raise ValueError(f"--policies names {name!r}, expected some of {', '.join(POLICIES)}")
    return options


def _add_trace(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("requests").add_argument
    known = "vAttention CSV, Azure CSV or Mooncake JSONL; the first line says which"
    add("trace", nargs="?", type=Path, metavar="TRACE", help=known)
    add("--synthetic", type=int, metavar="N", help="N made-up requests instead of a trace")
    add("--seed", type=int, default=0, help="of made-up lengths and arrivals (default: 0)")
    add("--limit", type=int, metavar="N", help="the first N requests only")
    add("--rate", type=float, default=1.0, metavar="X", help="arrivals X times as fast")
    poisson = "Poisson arrivals per second where the trace has none (default there: all at once)"
    add("--qps", type=float, help=poisson)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("memory").add_argument
    every = ",".join(POLICIES)
    add("--policies", default=every, metavar="A,B", help=f"some of {every} (default: all)")
    add("--model", default="llama-3-8b", help=f"{', '.join(MODELS)}, or a config.json")
    add("--dtype", default="bfloat16", help="of keys and values (default: bfloat16)")
    add("--memory", default="40GiB", help="budget of every policy (default: 40GiB)")
    batch = f"requests at a time (default: {DEFAULT_BATCH}; {_paper_batches()} as in the paper)"
    add("--max-batch-size", type=int, metavar="N", help=batch)
    longest = "what a full reservation reserves; longer requests are refused (default: the longest"
    add("--max-seq-len", type=int, metavar="TOKENS", help=f"{longest}, rounded up to 1024)")
    add("--layout", choices=LAYOUTS, default="interleaved", help="of vattn (default: interleaved)")
    add("--page-bytes", default="2MiB", help="of vattn (default: 2MiB)")
    add("--max-extent", metavar="BYTES", help="largest piece that vattn maps (default: vattn's)")
    add("--lookahead", type=int, metavar="TOKENS", help="vattn maps ahead (default: vattn's)")


def _paper_batches() -> str:
    return ", ".join(f"{batch} for {name}" for name, batch in PAPER_BATCH.items())


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("engine").add_argument
    add("--decode-ms", type=float, default=25.0, help="virtual time of an iteration (default: 25)")
    prefill = "prompt tokens per virtual second, in addition (default: 8000)"
    add("--prefill-tokens-per-s", type=float, default=8000.0, metavar="N", help=prefill)
    admit = (
        "ahead: requests get their row while an iteration runs, and start with the next; now: they "
        "start at once, and their memory is mapped in the caller's time (default: ahead)"
    )
    add("--admit", choices=("ahead", "now"), default="ahead", help=admit)
    pace = (
        "virtual: the next iteration starts as soon as nothing is left to be mapped ahead; real: "
        "iterations take their time, and the background has no more than that (default: virtual)"
    )
    add("--pace", choices=("virtual", "real"), default="virtual", help=pace)


def load_trace(options: argparse.Namespace) -> Trace:
    """Read or make the trace, and give it the arrivals that were asked for."""
    if options.trace is None:
        trace = make_synthetic(options.synthetic, seed=options.seed, qps=options.qps)
    else:
        trace = read_trace(options.trace)
        if options.qps is not None:
            trace = _with_poisson_arrivals(trace, options.qps, options.seed)
    if options.rate != 1:
        if trace.arrival_s is None:
            raise ValueError(
                f"--rate is {options.rate:g}, but {trace.name} has no arrivals; use --qps"
            )
        trace = trace.arriving(trace.arrival_s / options.rate)
    n = min(QUICK_REQUESTS, len(trace)) if options.quick else len(trace)
    return trace.head(n if options.limit is None else min(n, options.limit))


def _with_poisson_arrivals(trace: Trace, qps: float, seed: int) -> Trace:
    if trace.arrival_s is not None:
        raise ValueError(f"--qps is {qps:g}, but {trace.name} has arrivals; use --rate")
    return trace.arriving(poisson_arrivals(len(trace), qps, np.random.default_rng(seed)))


def load_model(name: str) -> ModelShape:
    """Look up a model by name, or read its ``config.json``."""
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"--model is {name!r}, expected {', '.join(MODELS)}, or the path of a config.json"
        )
    from vattn.plan.hf_config import read_config

    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return read_config(fields, name=name).shape


def make_config(options: argparse.Namespace, trace: Trace, model: ModelShape) -> CacheConfig:
    """Make vattn's configuration; the other policies read their sizes from it too."""
    longest = int((trace.prompt_tokens + trace.generated_tokens).max())
    lookahead = {} if options.lookahead is None else {"lookahead": options.lookahead}
    return CacheConfig(
        num_layers=model.num_layers,
        layer_groups=model.layer_groups,
        dtype=options.dtype,
        max_batch_size=options.max_batch_size or PAPER_BATCH.get(trace.name, DEFAULT_BATCH),
        max_seq_len=options.max_seq_len or -(-longest // 1024) * 1024,
        device=options.device,
        memory=options.memory,
        layout=options.layout,
        page_bytes=options.page_bytes,
        max_extent_bytes=options.max_extent,
        **lookahead,
    )


def make_engine(options: argparse.Namespace, config: CacheConfig) -> Engine:
    """Make the engine that all policies share."""
    return Engine(
        max_batch_size=config.max_batch_size,
        max_seq_len=config.max_seq_len,
        decode_s=options.decode_ms / 1e3,
        prefill_tokens_per_s=options.prefill_tokens_per_s,
        admit_ahead=options.admit == "ahead",
        real_pace=options.pace == "real",
    )
