"""What is measured: shapes, lengths and batches, how much memory a case needs, what is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from vattn.config import LAYOUTS
from vattn.models import MODELS, ModelShape, uniform
from vattn.units import DTYPES

KIB, MIB, GIB = 1024, 2**20, 2**30
PHASES = ("decode", "prefill")
DTYPE_NAMES = ("float32", "float16", "bfloat16")
TINY = uniform(
    "tiny", num_layers=4, num_query_heads=4, num_kv_heads=2, head_dim=64, max_seq_len=256
)
SHAPES = {**MODELS, TINY.name: TINY}

# Calls go around so many layers that together they are larger than any cache: when a forward pass
# comes back to a layer, nothing of it is left there either.
COLD_BYTES = 128 * MIB
# Of a row that is reserved in full, half is in use; the vLLM paper found 20% to 38%.
RESERVED = 2
CPU_PAGE = 4 * KIB
GPU_PAGE = 2 * MIB


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of attention: all rows have the same number of tokens."""

    phase: str
    shape: ModelShape
    dtype: str
    tokens: int
    batch: int

    @property
    def name(self) -> str:
        parts = (self.phase, self.shape.name, self.dtype, f"{self.tokens}x{self.batch}")
        return "/".join(("attention", *parts))

    @property
    def queries(self) -> int:
        """Queries of each row."""
        return 1 if self.phase == "decode" else self.tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].bits // 8

    @property
    def kv_heads(self) -> int:
        return self.shape.layer_groups[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.shape.layer_groups[0].head_dim

    @cached_property
    def layer_bytes(self) -> int:
        """K and V of all rows in one layer: what a call has to read."""
        token_bytes = 2 * self.kv_heads * self.head_dim * self.item_bytes
        return token_bytes * self.tokens * self.batch

    @cached_property
    def layers_timed(self) -> int:
        """Layers that calls go around."""
        if self.phase == "prefill":  # reads every key many times, and cold only once
            return min(self.shape.num_layers, 2)
        return min(self.shape.num_layers, max(2, -(-COLD_BYTES // self.layer_bytes)))

    @cached_property
    def work(self) -> int:
        """A guess at how long a call takes, to put cheap cases first: bytes, or as many flops."""
        if self.phase == "decode":
            return self.layer_bytes
        flops = 2 * self.shape.num_query_heads * self.head_dim * self.tokens**2 * self.batch
        return self.layer_bytes + flops // 10

    @property
    def effort(self) -> int:
        """What preparing and checking it takes grows with this; at least that of small cases."""
        return max(GIB, 8 * self.work * self.layers_timed)


@dataclass(frozen=True)
class NotMeasured:
    """A case, or one subject of it, and why there is no figure."""

    name: str
    reason: str


@dataclass(frozen=True)
class Room:
    """Memory of a device, and the unit in which touched memory becomes physical."""

    free_bytes: int
    total_bytes: int
    page_bytes: int


def regions(case: Case, layout: str, order: str) -> int:
    """Contiguous ranges of a row of vattn's, as far as layers are timed."""
    heads = case.kv_heads if order == "HND" else 1
    return heads * (1 if layout == "interleaved" else 2 * case.layers_timed)


def layers_held(case: Case, layout: str) -> int:
    """Layers of a cache of vattn's.

    ``interleaved`` has all layers of the model, because they make up the distance from one token to
    the next; ``per_layer`` has those that are timed, as the others would change nothing.
    """
    return case.shape.num_layers if layout == "interleaved" else case.layers_timed


def mapped_bytes(case: Case, layout: str, order: str, page_bytes: int) -> int:
    """Bytes that a cache of vattn's maps: every region of every row ends with a page."""
    n = case.batch * regions(case, layout, order)
    pages = -(-case.layer_bytes * layers_held(case, layout) // (n * page_bytes))
    return n * pages * page_bytes


def touched_bytes(case: Case, order: str, page_bytes: int) -> int:
    """Physical bytes under an interleaved cache of which only the timed layers are written.

    Of every token, or of every token of a head in order HND, the first layers are touched. With
    pages larger than a token everything is physical.

    >>> case = Case(phase="decode", shape=MODELS["llama-3-8b"], dtype="bfloat16", tokens=32768,
    ...             batch=1)  # goes around 2 of 32 layers: 8 KiB of each token's 128 KiB
    >>> touched_bytes(case, "NHD", CPU_PAGE) // MIB, touched_bytes(case, "NHD", GPU_PAGE) // MIB
    (256, 4096)
    """
    runs = case.tokens * case.batch * (case.kv_heads if order == "HND" else 1)
    stride = case.layer_bytes * case.shape.num_layers // runs
    used = case.layer_bytes * case.layers_timed // runs
    straddled = 0 if stride % page_bytes == 0 else 1
    pages = -(-used // page_bytes) + straddled
    return runs * min(stride, pages * page_bytes)


def memory_bytes(case: Case, page_bytes: int) -> int:
    """Bytes that all subjects of a case take together.

    >>> case = Case(phase="decode", shape=MODELS["llama-3-8b"], dtype="bfloat16", tokens=8192,
    ...             batch=4)
    >>> [round(memory_bytes(case, page) / GIB, 1) for page in (CPU_PAGE, GPU_PAGE)]
    [3.6, 10.4]
    """
    layers = case.layer_bytes * case.layers_timed
    total = 0
    for order in ("NHD", "HND"):
        if page_bytes == GPU_PAGE:
            for layout in LAYOUTS:
                total += mapped_bytes(case, layout, order, page_bytes)
        else:
            total += touched_bytes(case, order, page_bytes) + layers
    # Plain rows in both orders; reserved rows; blocks of two sizes.
    total += (2 + RESERVED + 2) * layers
    # What is written at the moment, in float32 and in its own type; what a gather makes.
    total += 3 * case.layer_bytes
    # Queries and outputs, and what comparing these takes in float32.
    outputs = case.batch * case.queries * case.shape.num_query_heads * case.head_dim
    return total + outputs * (4 * case.item_bytes + 4 * 4)


def refusal(case: Case, room: Room) -> str | None:
    """Why a case cannot be measured in this room; None if it can."""
    needed, allowed = memory_bytes(case, room.page_bytes), room.free_bytes // 2
    if needed > allowed:
        return f"needs {needed / GIB:.1f} GiB, half of the free memory is {allowed / GIB:.1f} GiB"
    budget = case.layer_bytes * case.shape.num_layers
    if budget > room.total_bytes * 9 // 10:
        return (
            f"the KV of all layers is {budget / GIB:.1f} GiB, of {room.total_bytes / GIB:.1f} GiB"
        )
    return None


@dataclass(frozen=True)
class Grid:
    """The sizes of one phase; every combination is a case."""

    models: Sequence[str]
    dtypes: Sequence[str]
    tokens: Sequence[int]
    batches: Sequence[int]

    def cases(self, phase: str) -> list[Case]:
        return [
            Case(phase=phase, shape=SHAPES[model], dtype=dtype, tokens=tokens, batch=batch)
            for model, dtype, tokens, batch in itertools.product(
                self.models, self.dtypes, self.tokens, self.batches
            )
        ]


K = 1024
_CPU_MODELS, _CPU_DTYPES = ("llama-3-8b", "yi-6b"), ("bfloat16", "float32")
DEFAULTS = {
    ("cpu", "decode"): Grid(_CPU_MODELS, _CPU_DTYPES, (1 * K, 8 * K, 32 * K), (1, 4, 16)),
    ("cpu", "prefill"): Grid(_CPU_MODELS, _CPU_DTYPES, (1 * K, 2 * K), (1,)),
    ("cuda", "decode"): Grid(
        tuple(MODELS), ("bfloat16",), (1 * K, 8 * K, 32 * K, 128 * K), (1, 4, 16, 64, 256)
    ),
    ("cuda", "prefill"): Grid(tuple(MODELS), ("bfloat16",), (1 * K, 8 * K, 32 * K), (1,)),
}
QUICK = Grid((TINY.name,), ("float32", "bfloat16"), (40, 64), (1, 2))


def chosen(
    device: str,
    phases: Sequence[str],
    *,
    models: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    quick: bool = False,
) -> list[Case]:
    """List the cases, cheap ones first; what is not given is the default of device and phase."""
    kind = device.partition(":")[0]
    cases: list[Case] = []
    for phase in phases:
        default = QUICK if quick else DEFAULTS[kind, phase]
        grid = Grid(
            models or default.models,
            dtypes or default.dtypes,
            tokens or default.tokens,
            batches or default.batches,
        )
        cases += grid.cases(phase)
    return sorted(cases, key=lambda case: case.work)


def room_of(device: str) -> Room:
    """Ask what memory there is."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return Room(free, total, GPU_PAGE)
    sizes = {
        name: int(value) * KIB
        for name, value in re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text())
    }
    return Room(sizes["MemAvailable"], sizes["MemTotal"], _host_page_bytes())


def _host_page_bytes() -> int:
    try:
        huge = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return CPU_PAGE
    return CPU_PAGE if re.search(r"\[(never|deny)\]", huge) else GPU_PAGE


# What people write on the command line.


def names(text: str, known: Iterable[str], what: str) -> list[str]:
    """Split ``a,b``; every name must be known."""
    known = list(known)
    found = [word.strip() for word in text.split(",")]
    for name in found:
        if name not in known:
            raise ValueError(f"{what} is {name!r}, expected some of {','.join(known)}")
    return list(dict.fromkeys(found))


def counts(text: str, what: str) -> list[int]:
    """Split ``1K,8192``; K is 1,024.

    >>> counts("1K,40", "tokens")
    [1024, 40]
    """
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)([kK]?)\s*", word)
        value = int(match[1]) * (K if match[2] else 1) if match else 0
        if value < 1:
            raise ValueError(f"{what} is {word.strip()!r}, expected numbers like 1K,8192")
        found.append(value)
    return list(dict.fromkeys(found))
