"""Continuous batching: requests come, generate together, and go."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

import vattn
from vattn.integrations.transformers.batching.attention import attention_is
from vattn.integrations.transformers.batching.ragged import RaggedBatch, RaggedCache, Segment
from vattn.integrations.transformers.batching.requests import Recipe, Request
from vattn.integrations.transformers.batching.rows import Rows, RowsOptions
from vattn.integrations.transformers.batching.sampling import choose_tokens
from vattn.integrations.transformers.batching.scheduler import Scheduler
from vattn.integrations.transformers.batching.support import (
    check_model,
    max_seq_len,
    probe_layers,
    switch_attention,
)
from vattn.integrations.transformers.naming import cache_argument
from vattn.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Sizes of a continuous batch; see :class:`ContinuousBatch` for the meaning."""

    memory: int | str | None = None
    max_batch_size: int = 32
    max_batch_tokens: int = 512

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size is {self.max_batch_size}, expected at least 1")
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}, fewer than max_batch_size = "
                f"{self.max_batch_size}, each of which generates one at a time; raise the first or "
                "lower the second"
            )
        if self.memory is not None:
            parse_bytes(self.memory, "memory")


class ContinuousBatch:
    """Requests that generate together, each of which may come and go at any time.

    Every iteration is one forward without padding: a token for each request that generates, and
    chunks of the prompts that have come. Each request has a row of a :class:`vattn.KVCache`, whose
    memory grows with it and is free for others at once when it ends. When memory is short, requests
    wait; when those that run have outgrown it, the one that came last is computed again later.

    While it is open, the model serves nothing else: its attention implementation is replaced, and
    put back by ``close``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder whose layers have full attention, or a sliding window.
    generation_config : GenerationConfig, optional
        For requests that bring none. Default: the model's.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed for ``stop_strings``.
    memory : int or str, optional
        Budget of physical memory for keys and values, in bytes or as "4GiB"; used page by page, not
        taken at once. Default: half of the memory available on the CPU, 80 % of what is free on
        CUDA.
    max_batch_size : int
        Requests that run at a time.
    max_batch_tokens : int
        Tokens in one forward. Less makes other requests wait less for a long prompt.
    record_timestamps : bool
        Whether outputs say when each token was there.

    Raises
    ------
    NotImplementedError
        The model, or a setting, is not served.
    ValueError
        A size that makes no sense; a model that is part of another batch.

    Notes
    -----
    Not thread-safe: one thread adds requests and steps. Rotary embeddings that depend on the length
    of the sequence (dynamic NTK, LongRoPE) see the longest one in a forward, as they do in a padded
    batch.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, max_position_embeddings=256, eos_token_id=None)).eval()
    >>> config = GenerationConfig(max_new_tokens=4, do_sample=False)
    >>> with ContinuousBatch(model, config, memory="16MiB") as batch:
    ...     first = batch.add_request([1, 2, 3])
    ...     outputs = batch.step()                       # the first token of the first request
    ...     second = batch.add_request([4, 5, 6, 7, 8])  # joins it
    ...     while batch.has_work:
    ...         outputs += batch.step()
    >>> [(output.request_id, len(output.generated_tokens)) for output in outputs[:3]]
    [('req_0', 1), ('req_0', 2), ('req_1', 1)]
    >>> [output.request_id for output in outputs if output.is_finished()]
    ['req_0', 'req_1']
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig | None = None,
        *,
        tokenizer: Any = None,
        memory: int | str | None = None,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        record_timestamps: bool = False,
    ) -> None:
        options = BatchOptions(
            memory=memory, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens
        )
        check_model(model)
        self._model = model
        self._generation_config = generation_config
        self._tokenizer = tokenizer
        self._record_timestamps = record_timestamps
        self._requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._cache_argument = cache_argument(model)
        self._takes_indices = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._switch_back = switch_attention(model)
        try:
            self._rows = _open_rows(model, options)
            self._cache = RaggedCache(model.config, self._rows)
        except BaseException:
            self._switch_back()
            raise
        self._scheduler: Scheduler[Request] = Scheduler(
            self._rows, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens
        )

    @property
    def kv_cache(self) -> vattn.KVCache:
        """The cache underneath, for ``stats`` and the like."""
        return self._rows.cache

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._requests)

    @property
    def preemptions(self) -> int:
        """How often a request had to go because memory was short, to be computed again later."""
        return self._scheduler.preemptions

    def add_request(
        self,
        prompt_ids: Sequence[int],
        generation_config: GenerationConfig | None = None,
        request_id: str | None = None,
        **settings: Any,
    ) -> str:
        """Put a request at the end of the queue.

        Parameters
        ----------
        prompt_ids : sequence of int
            Tokens of the prompt.
        generation_config : GenerationConfig, optional
            As for ``model.generate``. Default: that of the batch.
        request_id : str, optional
            Names it in outputs. Default: "req_0", "req_1" and so on.
        **settings
            Of ``GenerationConfig``, like ``max_new_tokens``; take precedence over the others.

        Returns
        -------
        str
            ``request_id``. With ``num_return_sequences`` above 1 there are as many requests, of
            which the others have names like "req_0__child#0".

        Raises
        ------
        ValueError
            There is a request of this name; the prompt is empty, or too long for the model; a
            setting is not known.
        NotImplementedError
            A setting is not served, like beam search.
        """
        self._check_open()
        recipe = Recipe(
            self._model,
            self._generation_config if generation_config is None else generation_config,
            settings,
            tokenizer=self._tokenizer,
            record_timestamps=self._record_timestamps,
        )
        if request_id is None:
            request_id = f"req_{next(self._numbers)}"
        self.add(recipe.requests(prompt_ids, request_id))
        return request_id

    def add(self, requests: Sequence[Request]) -> None:
        """Put requests at the end of the queue that were made by a :class:`~.requests.Recipe`."""
        self._check_open()
        for request in requests:
            if request.request_id in self._requests:
                raise ValueError(
                    f"there is a request {request.request_id!r} already; give each one its own "
                    "request_id, or none"
                )
        for request in requests:
            self._requests[request.request_id] = request
            self._scheduler.add(request)

    def cancel_request(self, request_id: str) -> bool:
        """Forget a request, wherever it is. Its memory is free for others at once.

        Parameters
        ----------
        request_id : str
            What ``add_request`` returned.

        Returns
        -------
        bool
            False if there is no such request, for one that has ended.
        """
        self._check_open()
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._scheduler.end(request)
        return True

    @torch.no_grad()
    def step(self) -> list[GenerationOutput]:
        """Run one forward.

        Returns
        -------
        list of GenerationOutput
            The requests that got a token, or that failed because they do not fit into the memory
            even alone; see ``status`` and ``error``. Those that have ended are gone from the batch.

        Raises
        ------
        ValueError
            The batch is closed.
        """
        self._check_open()
        plan = self._scheduler.plan()
        changed = [request for request, _ in plan.failed]
        for request, error in plan.failed:
            del self._requests[request.request_id]
            request.fail(self._no_room(request, error))
        # A stable sort: those with one token come first, as RaggedBatch wants them.
        chunks = sorted(plan.chunks, key=lambda chunk: chunk[1] > 1)
        for request, _ in chunks:
            request.start()
        if chunks:
            changed += self._advance(chunks, self._forward(chunks))
        return [request.output() for request in changed]

    def _forward(self, chunks: Sequence[tuple[Request, int]]) -> torch.Tensor:
        """Return the scores of each chunk's last token, [requests, vocabulary]."""
        tokens: list[int] = []
        segments, last = [], []
        for request, count in chunks:
            assert request.row is not None
            end = request.computed + count
            tokens += request.tokens[request.computed : end]
            segments.append(Segment(request.row, end, count))
            last.append(len(tokens) - 1)
        device = self._model.device
        batch = RaggedBatch(segments, device)
        indices = torch.tensor(last, device=device)
        with attention_is(batch):
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=batch.positions[None],
                use_cache=True,
                return_dict=True,
                **{self._cache_argument: self._cache},
                **({"logits_to_keep": indices} if self._takes_indices else {}),
            ).logits
        return logits[0] if self._takes_indices else logits[0, indices]

    def _advance(
        self, chunks: Sequence[tuple[Request, int]], logits: torch.Tensor
    ) -> list[Request]:
        """Take note of what was computed, and give a token to those that lack no other."""
        ready: list[Request] = []
        indices: list[int] = []
        for index, (request, count) in enumerate(chunks):
            request.computed += count
            if request.missing == 0:
                ready.append(request)
                indices.append(index)
        if not ready:
            return []
        scores = logits if len(ready) == len(chunks) else logits[indices]
        chosen = choose_tokens([r.sampler for r in ready], [r.tokens for r in ready], scores)
        for request, token in zip(ready, chosen, strict=True):
            request.append(token)
            if request.ended_time >= 0:
                del self._requests[request.request_id]
                self._scheduler.end(request)
        return ready

    def _no_room(self, request: Request, error: vattn.OutOfPagesError) -> str:
        cache = self.kv_cache
        return (
            f"{request.request_id} has {len(request.tokens)} tokens and needs {error.needed} more "
            f"pages of {cache.page_bytes} bytes, {error.free} are free of a budget of "
            f"{cache.config.memory_bytes} bytes with no other request running; raise memory, or "
            "shorten the prompt or max_new_tokens"
        )

    def _check_open(self) -> None:
        if self.kv_cache.closed:
            raise ValueError("the batch is closed; make a new ContinuousBatch")

    def close(self) -> None:
        """Drop all requests, give all memory back and let the model use its own attention again.

        Idempotent.
        """
        if self.kv_cache.closed:
            return
        self._switch_back()
        self._requests.clear()
        self._cache.layers.clear()
        self._rows.close()

    def __enter__(self) -> ContinuousBatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@torch.no_grad()
def _open_rows(model: Any, options: BatchOptions) -> Rows:
    layers, dtype, device = probe_layers(model)
    return Rows(
        RowsOptions(
            layers=layers,
            dtype=dtype,
            device=device,
            max_batch_size=options.max_batch_size,
            max_seq_len=max_seq_len(model),
            memory=options.memory,
        )
    )
