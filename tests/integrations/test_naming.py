"""The argument that takes the cache has another name from transformers 5.24 on; both work."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from families import GREEDY, cache_in, given, left_padded, make_model, vattn_cache

from vattn.integrations.transformers import enabled, generate_batch
from vattn.integrations.transformers.naming import CACHE_ARGUMENT, cache_argument

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def llama() -> Any:
    return make_model("llama")


def test_no_name_that_warns_is_used(llama: Any, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.warning_once.cache_clear()
    # Those that come by way of torch, as all of a forward do, are not errors in these tests.
    with warnings.catch_warnings(record=True) as caught, vattn_cache(llama) as cache:
        warnings.simplefilter("always")
        generate_batch(llama, [PROMPT], max_new_tokens=3)
        llama.generate(**left_padded(5), **given(cache), **GREEDY, max_new_tokens=3)
        with enabled(memory="64MiB"):
            llama.generate(**left_padded(5), **GREEDY, max_new_tokens=3)
        with torch.no_grad():
            cache_in(llama(**left_padded(5), **given(vattn_cache(llama))))
    assert not [str(each.message) for each in caught if "past_key_values" in str(each.message)]
    assert "past_key_values" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["past_key_values", CACHE_ARGUMENT])
def test_generate_takes_both_names(llama: Any, name: str) -> None:
    with vattn_cache(llama) as cache:
        llama.generate(**left_padded(9), **{name: cache}, **GREEDY, max_new_tokens=4)
        assert cache.get_seq_length() == 12


def test_a_forward_of_ones_own_may_keep_the_old_name(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = generate_batch(llama, [PROMPT], max_new_tokens=6)
    forward = llama.forward

    def own(input_ids: Any, position_ids: Any, past_key_values: Any = None, **options: Any) -> Any:
        return forward(input_ids, position_ids=position_ids, **given(past_key_values), **options)

    assert cache_argument(llama) == CACHE_ARGUMENT
    monkeypatch.setattr(llama, "forward", own)
    assert cache_argument(llama) == "past_key_values"
    ours = generate_batch(llama, [PROMPT], max_new_tokens=6)
    said = [[each.generated_tokens for each in result.values()] for result in (ours, stock)]
    assert said[0] == said[1]
    assert len(said[0][0]) == 6
