"""``vattn plan``: what a model's KV cache needs, and what fits."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from vattn.models import MODELS, ModelShape
from vattn.plan import report
from vattn.plan.estimate import PAGE_SIZES, Question, compare
from vattn.plan.hf_config import read_config
from vattn.plan.lengths import SPECIFICATIONS, Lengths, MeanOnly, parse_lengths, read_lengths
from vattn.plan.source import Source, find
from vattn.units import DTYPES, dtype_name, parse_bytes

DEFAULT_DTYPE = "bfloat16"
SHORT_DTYPES = {
    "fp8": "float8_e4m3fn",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape on one device, the element type, and what to tell about them."""

    shape: ModelShape
    dtype: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes for keys and values, and how they came about."""

    memory_bytes: int
    notes: tuple[str, ...]


def main(arguments: list[str] | None = None, *, prog: str = "vattn plan") -> int:
    """Run the command.

    Raises
    ------
    ValueError
        Options that contradict each other or cannot be met, a configuration that is not understood.
    """
    options = _parser(prog).parse_args(arguments)
    source = find(options.model)
    model = _model(options, source)
    budget = _budget(options, source)
    question = Question(
        shape=model.shape,
        dtype=model.dtype,
        item_bytes=DTYPES[model.dtype].bits // 8,
        memory_bytes=budget.memory_bytes,
        max_seq_len=model.shape.max_seq_len,
        device=options.device,
        order=options.order,
        max_batch_size=options.max_batch_size,
        lengths=_lengths(options, model.shape.max_seq_len),
        max_map_count=_max_map_count(),
    )
    sizes = [_page_bytes(text) for text in options.page_bytes]
    fits = compare(question, tuple(sizes) or PAGE_SIZES)
    result = report.Report(question=question, fits=tuple(fits), notes=(*model.notes, *budget.notes))
    if options.json:
        report.print_json(result)
    else:
        report.print_text(result)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What a model's KV cache needs, by layout and page size, and what fits.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="CONFIG.json|ID",
        help="a config.json, a folder with one, an ID of the Hugging Face Hub, or one of "
        + ", ".join(MODELS),
    )
    parser.add_argument(
        "--dtype", help="of the cache, such as bfloat16 or fp8; by default the model's"
    )
    parser.add_argument(
        "--tp", type=_count, default=1, metavar="N", help="devices that the heads are divided over"
    )
    parser.add_argument(
        "--max-seq-len", type=_count, metavar="N", help="longest request (default: the model's)"
    )
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument(
        "--gpu-memory", metavar="SIZE", help="of one device, such as 80GiB, for everything"
    )
    memory.add_argument("--memory", metavar="SIZE", help="for keys and values alone")
    parser.add_argument(
        "--weights",
        metavar="SIZE",
        help="on one device, taken from --gpu-memory (default: the files beside config.json)",
    )
    parser.add_argument(
        "--reserve",
        metavar="SIZE|PERCENT",
        help="for activations and everything else, taken from --gpu-memory (default: 10%%)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--order", choices=("NHD", "HND"), default="NHD")
    parser.add_argument(
        "--page-bytes",
        action="append",
        default=[],
        metavar="SIZE",
        help="only this page size; may be repeated",
    )
    parser.add_argument("--max-batch-size", type=_count, metavar="N", help="rows")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--lengths", type=Path, metavar="TRACE", help="requests, in any format of vattn replay"
    )
    lengths.add_argument("--length-distribution", metavar="D", help=SPECIFICATIONS)
    lengths.add_argument(
        "--mean-tokens", type=_count, metavar="N", help="where nothing but the mean is known"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {number}, expected at least 1")
    return number


def _model(options: argparse.Namespace, source: Source) -> Model:
    notes: list[str] = []
    dtype = options.dtype and SHORT_DTYPES.get(options.dtype, options.dtype)
    if source.config is not None:
        read = read_config(source.config, name=source.name, max_seq_len=options.max_seq_len)
        whole = read.shape
        notes += read.notes
        dtype = dtype or read.dtype
        if dtype is None:
            raise ValueError(
                "the configuration names no dtype; say --dtype, such as --dtype bfloat16"
            )
    else:
        assert source.shape is not None
        whole = source.shape
        if dtype is None:
            dtype = DEFAULT_DTYPE
            notes.append(f"--dtype is not given: {dtype}")
    shape = whole.split(options.tp)
    notes += _notes_about_split(whole, options.tp)
    if options.max_seq_len is not None and source.shape is not None:
        shape = replace(shape, max_seq_len=options.max_seq_len)
    return Model(shape=shape, dtype=dtype_name(dtype), notes=tuple(notes))


def _notes_about_split(whole: ModelShape, devices: int) -> list[str]:
    if devices == 1:
        return []
    notes = []
    for group in whole.layer_groups:
        if group.v_head_dim == 0:
            notes.append(f"--tp {devices}: each device has the whole latent stripe (MLA)")
        elif group.num_kv_heads < devices:
            copies = devices // group.num_kv_heads
            notes.append(
                f"--tp {devices}: more devices than the {group.num_kv_heads} KV heads, so each "
                f"head is kept {copies} times"
            )
    return list(dict.fromkeys([*notes, "all figures are those of one device"]))


def _budget(options: argparse.Namespace, source: Source) -> Budget:
    if options.memory is not None:
        for name in ("weights", "reserve"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name} is taken from --gpu-memory, but --memory is given, which is for "
                    f"keys and values alone; leave --{name} out"
                )
        return Budget(memory_bytes=parse_bytes(options.memory, "--memory"), notes=())
    total = parse_bytes(options.gpu_memory, "--gpu-memory")
    weights, note = _weights(options, source)
    reserve = _reserve(options.reserve or "10%", total)
    left = total - weights - reserve
    parts = [f"{report.size(weights)} of weights", f"{report.size(reserve)} reserved"]
    sums = " - ".join([report.size(total), *parts])
    if left < 1:
        raise ValueError(
            f"nothing is left for keys and values: {sums}; raise --gpu-memory or --tp, or lower "
            "--reserve"
        )
    return Budget(
        memory_bytes=left, notes=(f"{sums} = {report.size(left)} for keys and values", note)
    )


def _weights(options: argparse.Namespace, source: Source) -> tuple[int, str]:
    """Bytes of weights on one device, and where the figure is from."""
    if options.weights is not None:
        return parse_bytes(options.weights, "--weights"), "weights as --weights says"
    if source.weight_bytes is not None:
        note = f"weights as large as their files, {report.size(source.weight_bytes)}"
        if options.tp > 1:
            note += f", divided by {options.tp}"
        return -(-source.weight_bytes // options.tp), note
    return (
        0,
        "NO WEIGHTS SUBTRACTED: their files are not beside the configuration; say --weights 16GB",
    )


def _reserve(text: str, total: int) -> int:
    if not text.endswith("%"):
        return 0 if text.strip() in ("0", "0B") else parse_bytes(text, "--reserve")
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 100:
        raise ValueError(f"--reserve is {text!r}, expected a size or 0% to 99%")
    return int(total * percent / 100)


def _page_bytes(text: str) -> int:
    size = parse_bytes(text, "--page-bytes")
    if size < 4096 or size & (size - 1):
        raise ValueError(f"--page-bytes is {text!r}, expected a power of two of at least 4KiB")
    return size


def _lengths(options: argparse.Namespace, max_seq_len: int) -> Lengths | MeanOnly | None:
    if options.lengths is not None:
        return read_lengths(options.lengths, max_seq_len)
    if options.length_distribution is not None:
        return parse_lengths(options.length_distribution, max_seq_len)
    if options.mean_tokens is not None:
        if options.mean_tokens > max_seq_len:
            raise ValueError(
                f"--mean-tokens is {options.mean_tokens}, beyond max_seq_len = {max_seq_len}; "
                "lower it, or raise --max-seq-len"
            )
        return MeanOnly(
            name="only the mean is known",
            mean_tokens=options.mean_tokens,
            max_seq_len=max_seq_len,
        )
    return None


def _max_map_count() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65_530  # what Linux has unless it is told otherwise
