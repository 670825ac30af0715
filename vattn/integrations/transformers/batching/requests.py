"""Requests, and how they come from prompts and generation configurations."""

from __future__ import annotations

import copy
import logging
import operator
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from transformers import GenerationConfig, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching import RequestStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from vattn.integrations.transformers.batching.sampling import GREEDY, Sampler
from vattn.integrations.transformers.batching.scheduler import Task
from vattn.integrations.transformers.batching.support import max_seq_len

_LOG = logging.getLogger(__name__)

# Settings that change the tokens, or what is returned besides them, and that are not served.
_NOT_SERVED = (
    "token_healing",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


@dataclass(eq=False, kw_only=True)
class Request(Task):
    """One prompt, what was generated for it so far, and what ends it.

    Parameters
    ----------
    request_id : str
        Names it in outputs.
    prompt_ids : list of int
        The prompt; ``tokens`` starts with it.
    sampler : Sampler
        Chooses its tokens.
    eos_token_ids : frozenset of int
        Tokens that end it.
    stop_strings : StopStringCriteria, optional
        Texts that end it.
    max_time : float, optional
        Seconds after its start that end it.
    timestamps : list of float, optional
        When each token was there; None: not wanted.
    """

    request_id: str
    prompt_ids: list[int]
    sampler: Sampler
    eos_token_ids: frozenset[int] = frozenset()
    stop_strings: StopStringCriteria | None = None
    max_time: float | None = None
    timestamps: list[float] | None = None
    error: str | None = None
    created_time: float = field(default_factory=time.perf_counter)
    started_time: float = -1.0
    ended_time: float = -1.0

    @property
    def status(self) -> RequestStatus:
        """Where it is, in the words of transformers."""
        if self.error is not None:
            return RequestStatus.FAILED
        if self.ended_time >= 0:
            return RequestStatus.FINISHED
        if self.row is None:
            return RequestStatus.PENDING
        return RequestStatus.DECODING if self.missing == 1 else RequestStatus.PREFILLING

    def start(self) -> None:
        """Take note that it is waiting no more."""
        if self.started_time < 0:
            self.started_time = time.perf_counter()

    def append(self, token: int) -> None:
        """Take the next token, which may be the last one."""
        now = time.perf_counter()
        self.tokens.append(token)
        if self.timestamps is not None:
            self.timestamps.append(now)
        if (
            token in self.eos_token_ids
            or len(self.tokens) >= self.max_length
            or (self.max_time is not None and now - self.started_time > self.max_time)
            or self._ends_with_stop_string()
        ):
            self.ended_time = now

    def fail(self, error: str) -> None:
        """End without success."""
        self.error, self.ended_time = error, time.perf_counter()

    def _ends_with_stop_string(self) -> bool:
        if self.stop_strings is None:
            return False
        return bool(self.stop_strings(torch.tensor([self.tokens]), None)[0])

    def output(self) -> GenerationOutput:
        """Return what there is at this moment."""
        return GenerationOutput(
            request_id=self.request_id,
            prompt_ids=self.prompt_ids,
            generated_tokens=self.tokens[len(self.prompt_ids) :],
            error=self.error,
            status=self.status,
            created_time=self.created_time,
            lifespan=(self.started_time, self.ended_time),
            timestamps=None if self.timestamps is None else list(self.timestamps),
        )


class Recipe:
    """A generation configuration, ready to make requests of prompts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its ``generation_config`` has what is not set here.
    config : GenerationConfig, optional
        Not changed.
    settings : dict
        Take precedence over ``config``.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed for ``stop_strings``.
    record_timestamps : bool
        Whether outputs say when each token was there.

    Raises
    ------
    NotImplementedError, ValueError
        A setting that is not served, or not known.
    """

    def __init__(
        self,
        model: Any,
        config: GenerationConfig | None,
        settings: dict[str, Any],
        *,
        tokenizer: Any,
        record_timestamps: bool,
    ) -> None:
        self._model = model
        self._record_timestamps = record_timestamps
        self._limit = max_seq_len(model)
        self._vocab_size: int = model.get_input_embeddings().weight.shape[0]
        merged: Any = copy.deepcopy(config)
        if merged is None:
            merged = GenerationConfig()  # type: ignore[no-untyped-call]
        unknown = merged.update(**settings)
        # Asked before the defaults are filled in, as generate() does.
        self._has_default = {
            name: getattr(merged, name) is None and getattr(model.generation_config, name) is None
            for name in ("max_length", "min_length")
        }
        self._config, _ = model._prepare_generation_config(merged)
        _check_settings(self._config, unknown)
        model._prepare_special_tokens(self._config, device=model.device)
        eos = self._config._eos_token_tensor
        self._eos_token_ids = frozenset() if eos is None else frozenset(eos.tolist())
        self._stop_strings = _stop_strings(self._config, tokenizer)
        self._shared_sampler: Sampler | None = None
        self._was_cut = False

    def requests(self, prompt: Iterable[SupportsIndex], request_id: str) -> list[Request]:
        """Make as many requests of a prompt as ``num_return_sequences`` says.

        Parameters
        ----------
        prompt : iterable of int
            Tokens.
        request_id : str
            Of the first one. The others are its children, as transformers calls them.

        Raises
        ------
        ValueError
            The prompt is empty or too long, has a token that the model does not know, or leaves no
            token to generate.
        """
        prompt_ids = self._check_prompt(prompt, request_id)
        config = self._with_lengths(prompt_ids, request_id)
        children = range((config.num_return_sequences or 1) - 1)
        names = [request_id, *(f"{request_id}__child#{i}" for i in children)]
        family: list[Request] = []
        family += [self._request(config, prompt_ids, name, family) for name in names]
        return family

    def _request(
        self, config: Any, prompt_ids: list[int], request_id: str, family: list[Request]
    ) -> Request:
        return Request(
            tokens=list(prompt_ids),
            max_length=config.max_length,
            family=family,
            # With one token to generate the first is gone before anybody could take over.
            shared=len(prompt_ids) - 1 if config.max_length > len(prompt_ids) + 1 else 0,
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampler=self._sampler(config, prompt_ids),
            eos_token_ids=self._eos_token_ids,
            stop_strings=self._stop_strings,
            max_time=config.max_time,
            timestamps=[] if self._record_timestamps else None,
        )

    def _check_prompt(self, prompt: Any, request_id: str) -> list[int]:
        if isinstance(prompt, str):
            raise TypeError(f"the prompt of {request_id} is text; pass the tokens of a tokenizer")
        prompt_ids = [operator.index(token) for token in prompt]
        if not prompt_ids:
            raise ValueError(f"the prompt of {request_id} is empty; give it at least one token")
        if len(prompt_ids) >= self._limit:
            raise ValueError(
                f"the prompt of {request_id} has {len(prompt_ids)} tokens, the model takes "
                f"{self._limit} (max_position_embeddings) with at least one to generate; shorten it"
            )
        lowest, highest = min(prompt_ids), max(prompt_ids)
        if lowest < 0 or highest >= self._vocab_size:
            raise ValueError(
                f"the prompt of {request_id} has the token {lowest if lowest < 0 else highest}, "
                f"the model knows 0 to {self._vocab_size - 1}; is it the right tokenizer?"
            )
        return prompt_ids

    def _with_lengths(self, prompt_ids: list[int], request_id: str) -> Any:
        config = copy.copy(self._config)
        self._model._prepare_generated_length(
            generation_config=config,
            has_default_max_length=self._has_default["max_length"],
            has_default_min_length=self._has_default["min_length"],
            model_input_name="input_ids",
            input_ids_length=len(prompt_ids),
            inputs_tensor=None,
        )
        if config.max_length <= len(prompt_ids):
            raise ValueError(
                f"the prompt of {request_id} has {len(prompt_ids)} tokens and max_length is "
                f"{config.max_length}, so that nothing can be generated; raise it, or set "
                "max_new_tokens instead"
            )
        if config.max_length > self._limit:
            if not self._was_cut:
                _LOG.warning(
                    "vattn: %s may have %d tokens with what it generates, the model takes %d "
                    "(max_position_embeddings): it ends there, and so do others like it",
                    request_id,
                    config.max_length,
                    self._limit,
                )
            self._was_cut = True
            config.max_length = self._limit
        return config

    def _sampler(self, config: Any, prompt_ids: list[int]) -> Sampler:
        processors = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt_ids),
            encoder_input_ids=torch.tensor([prompt_ids], device=self._model.device),
            device=self._model.device,
            model_kwargs={},
        )
        if not processors and not config.do_sample:
            return GREEDY
        sampler = Sampler(processors, do_sample=bool(config.do_sample))
        if not sampler.is_shareable:
            return sampler
        if self._shared_sampler is None:
            self._shared_sampler = sampler
        return self._shared_sampler


def _check_settings(config: Any, unknown: dict[str, Any]) -> None:
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: no such setting of GenerationConfig; a continuous "
            "batch takes no others, neither those of forward nor objects like logits_processor"
        )
    mode = config.get_generation_mode(None)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotImplementedError(
            f"the settings ask for {mode.value}; a continuous batch does greedy search and "
            "sampling (num_beams=1, no assistant, no prompt lookup), use model.generate()"
        )
    if config.guidance_scale not in (None, 1, 1.0):
        raise NotImplementedError(
            f"guidance_scale is {config.guidance_scale}, which takes a second forward for each "
            "token; a continuous batch does not serve that, use model.generate()"
        )
    for name in _NOT_SERVED:
        if getattr(config, name, None):
            raise NotImplementedError(
                f"{name} is {getattr(config, name)}; a continuous batch returns tokens only and "
                "takes prompts as they are, leave it out or use model.generate()"
            )


def _stop_strings(config: Any, tokenizer: Any) -> StopStringCriteria | None:
    if config.stop_strings is None:
        return None
    if tokenizer is None:
        raise ValueError(
            f"stop_strings is {config.stop_strings!r}, but there is no tokenizer to find them "
            "with; pass tokenizer"
        )
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings)
