"""Many prompts in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.utils.logging import tqdm

from vattn.integrations.transformers.batching.batch import BatchOptions, ContinuousBatch
from vattn.integrations.transformers.batching.requests import Recipe, Request
from vattn.integrations.transformers.batching.support import check_model


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    tokenizer: Any = None,
    memory: int | str | None = None,
    max_batch_size: int = 32,
    max_batch_tokens: int = 512,
    record_timestamps: bool = False,
    progress_bar: bool = True,
    **kwargs: Any,
) -> dict[str, GenerationOutput]:
    """Generate for many prompts, without padding and without waiting for the longest of them.

    Like ``model.generate_batch``, with the memory of :class:`ContinuousBatch`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder whose layers have full attention, or a sliding window.
    inputs : sequence of sequence of int
        Tokens of each prompt.
    generation_config : GenerationConfig or sequence of them, optional
        For all prompts, or one for each. Default: the model's.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed for ``stop_strings``.
    memory : int or str, optional
        Budget of physical memory for keys and values, in bytes or as "4GiB"; used page by page, not
        taken at once. Default: half of the memory available on the CPU, 80 % of what is free on
        CUDA.
    max_batch_size : int
        Requests that run at a time.
    max_batch_tokens : int
        Tokens in one forward.
    record_timestamps : bool
        Whether outputs say when each token was there.
    progress_bar : bool
        Whether to show how many requests have ended, where stderr is a terminal.
    **kwargs
        Settings of ``GenerationConfig``, like ``max_new_tokens``; take precedence over the others.

    Returns
    -------
    dict of str to GenerationOutput
        In the order of the prompts, as "req_0", "req_1" and so on. With ``num_return_sequences``
        above 1 those of the first prompt are "req_0", "req_0__child#0" and so on. A request that
        does not fit into the memory even alone has an ``error``; the others do not suffer from it.

    Raises
    ------
    NotImplementedError
        The model, or a setting like ``num_beams``, is not served. Nothing has run.
    ValueError
        A prompt, a size or a setting makes no sense. Nothing has run.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, max_position_embeddings=256, eos_token_id=None)).eval()
    >>> outputs = generate_batch(model, [[1, 2, 3], [4, 5, 6, 7, 8]], memory="16MiB",
    ...                          max_new_tokens=4, do_sample=False)
    >>> [(name, len(output.generated_tokens)) for name, output in outputs.items()]
    [('req_0', 4), ('req_1', 4)]
    """
    requests = _make_requests(
        model, inputs, generation_config, kwargs, tokenizer, record_timestamps=record_timestamps
    )
    options = BatchOptions(
        memory=memory, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens
    )
    done = {
        output.request_id: output
        for output in _run(model, requests, options, progress_bar=progress_bar)
        if _has_ended(output)
    }
    return {request.request_id: done[request.request_id] for request in requests}


def stream_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    tokenizer: Any = None,
    memory: int | str | None = None,
    max_batch_size: int = 32,
    max_batch_tokens: int = 512,
    record_timestamps: bool = False,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Iterator[GenerationOutput]:
    """Generate for many prompts, and give each token when it is there.

    The arguments and errors are those of :func:`generate_batch`. Errors are raised by the call
    itself; the model is in use from the first output to the last one, or until the iterator is
    closed.

    Yields
    ------
    GenerationOutput
        All that a request has so far, each time it gets a token; ``is_finished()`` in the last one.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=2, max_position_embeddings=256, eos_token_id=None)).eval()
    >>> for output in stream_batch(model, [[1, 2, 3]], memory="16MiB", max_new_tokens=2,
    ...                            do_sample=False):
    ...     print(output.request_id, len(output.generated_tokens), output.is_finished())
    req_0 1 False
    req_0 2 True
    """
    requests = _make_requests(
        model, inputs, generation_config, kwargs, tokenizer, record_timestamps=record_timestamps
    )
    options = BatchOptions(
        memory=memory, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens
    )
    return _run(model, requests, options, progress_bar=progress_bar)


def _make_requests(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: GenerationConfig | Sequence[GenerationConfig] | None,
    settings: dict[str, Any],
    tokenizer: Any,
    *,
    record_timestamps: bool,
) -> list[Request]:
    check_model(model)
    if generation_config is None or isinstance(generation_config, GenerationConfig):
        configs: list[GenerationConfig | None] = [generation_config] * len(inputs)
    else:
        configs = list(generation_config)
    if len(configs) != len(inputs):
        raise ValueError(
            f"there are {len(configs)} generation configurations for {len(inputs)} inputs; pass "
            "one for all, or one for each"
        )
    recipes: dict[int, Recipe] = {}
    requests: list[Request] = []
    for index, (prompt, config) in enumerate(zip(inputs, configs, strict=True)):
        if id(config) not in recipes:
            recipes[id(config)] = Recipe(
                model, config, settings, tokenizer=tokenizer, record_timestamps=record_timestamps
            )
        requests += recipes[id(config)].requests(prompt, f"req_{index}")
    return requests


def _run(
    model: Any, requests: list[Request], options: BatchOptions, *, progress_bar: bool
) -> Iterator[GenerationOutput]:
    if not requests:
        return
    bar = tqdm(
        total=len(requests),
        desc=f"Solving {len(requests)} requests",
        unit="request",
        disable=None if progress_bar else True,  # None: where stderr is a terminal
    )
    with bar, ContinuousBatch(model, **asdict(options)) as batch:
        batch.add(requests)
        while batch.has_work:
            for output in batch.step():
                bar.update(int(_has_ended(output)))
                yield output


def _has_ended(output: GenerationOutput) -> bool:
    # is_finished() is False for failed ones in transformers 5.9.
    return output.status in (RequestStatus.FINISHED, RequestStatus.FAILED)
