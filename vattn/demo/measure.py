"""One generation with one cache, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import vattn
from vattn.demo.model import Subject
from vattn.integrations.transformers import VAttnCache
from vattn.integrations.transformers.naming import CACHE_ARGUMENT


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The memory of a cache after one forward."""

    tokens: int
    mapped_bytes: int
    used_bytes: int


@dataclass(kw_only=True)
class Run:
    """What came out of one generation.

    The memory of the process is not in it: of two runs in one process, what the allocator kept from
    the one decides what the other seems to take.
    """

    name: str
    tokens: torch.Tensor
    logits: list[torch.Tensor]
    prefill_s: float
    decode_s: float
    samples: list[Sample]
    details: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows per second, without the prefill."""
        steps = len(self.samples) - 1
        return self.tokens.shape[0] * steps / self.decode_s if steps else 0.0

    def with_best_times(self, other: Run) -> Run:
        """Return this run with the better times of the two; all else is the same in both."""
        return replace(
            self,
            prefill_s=min(self.prefill_s, other.prefill_s),
            decode_s=min(self.decode_s, other.decode_s),
        )

    @property
    def peak_bytes(self) -> int:
        """Most memory that keys and values took."""
        return max(sample.mapped_bytes for sample in self.samples)


class _AfterEachToken(StoppingCriteria):
    """Not a criterion: the one hook of generate() that is called once per token."""

    def __init__(self, sample: Callable[[], Sample], on_token: Callable[[], None]) -> None:
        self._sample = sample
        self._on_token = on_token
        self.times: list[float] = []
        self.samples: list[Sample] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        self.samples.append(self._sample())
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_stock(
    subject: Subject, inputs: dict[str, torch.Tensor], n_tokens: int, on_token: Callable[[], None]
) -> Run:
    """Generate with the DynamicCache of transformers."""
    cache = DynamicCache(config=subject.model.config)

    def sample() -> Sample:
        layers: list[Any] = cache.layers
        live = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return Sample(tokens=cache.get_seq_length(), mapped_bytes=live, used_bytes=live)

    return _generate("DynamicCache", subject, inputs, cache, n_tokens, sample, on_token)


def run_vattn(
    subject: Subject,
    inputs: dict[str, torch.Tensor],
    n_tokens: int,
    on_token: Callable[[], None],
    memory: str | None,
) -> Run:
    """Generate with a VAttnCache."""
    with VAttnCache(subject.model.config, memory=memory) as cache:

        def sample() -> Sample:
            stats = [kv_cache.stats() for kv_cache in cache.kv_caches]
            return Sample(
                tokens=cache.get_seq_length(),
                mapped_bytes=sum(each.mapped_bytes for each in stats),
                used_bytes=sum(each.used_bytes for each in stats),
            )

        run = _generate("VAttnCache", subject, inputs, cache, n_tokens, sample, on_token)
        rows = inputs["input_ids"].shape[0]
        run.details = _details(cache.kv_caches, subject.max_seq_len * rows)
        return run


def _details(kv_caches: Sequence[vattn.KVCache], limit_tokens: int) -> dict[str, Any]:
    """Sum up the caches of all kinds of layers; the calls are those of their one pool."""
    stats = [kv_cache.stats() for kv_cache in kv_caches]
    token_bytes = sum(kv_cache.token_bytes for kv_cache in kv_caches)
    return {
        "page_bytes": stats[0].page_bytes,
        "token_bytes": token_bytes,
        "address_bytes": sum(each.reserved_bytes for each in stats),
        "reserving_bytes": token_bytes * limit_tokens,
        "calls_in_step": stats[0].calls("step"),
        "calls_in_background": stats[0].calls("background"),
        "steps": sum(each.steps for each in stats),
        "steps_with_growth": sum(each.steps_with_growth for each in stats),
    }


def _generate(
    name: str,
    subject: Subject,
    inputs: dict[str, torch.Tensor],
    cache: Any,
    n_tokens: int,
    sample: Callable[[], Sample],
    on_token: Callable[[], None],
) -> Run:
    hook = _AfterEachToken(sample, on_token)
    start = time.perf_counter()
    output = subject.model.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=n_tokens,
        do_sample=False,
        # All rows to the end, so that both caches do the same work.
        eos_token_id=None,
        pad_token_id=subject.tokenizer.pad_id,
        stopping_criteria=StoppingCriteriaList([hook]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    n_prompt = inputs["input_ids"].shape[1]
    return Run(
        name=name,
        tokens=output.sequences[:, n_prompt:].cpu(),
        logits=[step.float().cpu() for step in output.logits],
        prefill_s=hook.times[0] - start,
        decode_s=hook.times[-1] - hook.times[0],
        samples=hook.samples,
    )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two runs first said different things, in the row where that was first."""

    row: int
    token: int
    logit_gap: float
    is_tie: bool


def compare(ours: Run, stock: Run, dtype: torch.dtype) -> Difference | None:
    """Find the first difference in tokens; None if there is none."""
    differs = ours.tokens != stock.tokens
    if not differs.any():
        return None
    token = int(differs.any(dim=0).int().argmax())
    row = int(differs[:, token].int().argmax())
    logits = stock.logits[token][row]
    best = logits[stock.tokens[row, token]]
    gap = float(best - logits[ours.tokens[row, token]])
    # Two values so close are the same but for the order of a sum.
    tie = gap <= 4 * torch.finfo(dtype).eps * max(1.0, abs(float(best)))
    return Difference(row=row, token=token, logit_gap=gap, is_tie=tie)


def max_logit_difference(ours: Run, stock: Run, until: int) -> float:
    """Largest difference of any logit in the first ``until`` tokens, where both saw the same."""
    pairs = list(zip(ours.logits, stock.logits, strict=True))[:until]
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
