"""Traces are read as they are published, and a broken line is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vattn.replay.synthetic import make_synthetic, poisson_arrivals
from vattn.replay.trace import MAX_TOKENS, Trace, make_trace, read_trace

VATTENTION = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = '{"timestamp": %s, "input_length": %s, "output_length": %s, "hash_ids": [0, 1]}\n'


def read(tmp_path: Path, text: str, name: str = "some_trace.csv") -> Trace:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_trace(path)


def refusal(tmp_path: Path, text: str) -> str:
    """Read what cannot be read; returns the message."""
    with pytest.raises(ValueError, match=r"some_trace\.csv") as raised:
        read(tmp_path, text)
    return str(raised.value)


def test_vattention_csv_has_lengths_and_no_arrivals(tmp_path: Path) -> None:
    trace = read(tmp_path, VATTENTION + "1724,862,2586,2.0\n7564.0,192.0,7756.0,39.4\n")
    assert (trace.name, trace.source, len(trace)) == ("some_trace", "vAttention CSV", 2)
    assert trace.prompt_tokens.tolist() == [1724, 7564]
    assert trace.generated_tokens.tolist() == [862, 192]
    assert trace.prompt_tokens.dtype == trace.generated_tokens.dtype == np.int64
    assert trace.arrival_s is None


def test_azure_csv_has_arrivals_to_a_tenth_of_a_microsecond(tmp_path: Path) -> None:
    lines = "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
    trace = read(tmp_path, AZURE.replace("\n", "\r\n") + lines)
    assert trace.source == "Azure CSV"
    assert trace.arrival_s is not None
    assert trace.arrival_s == pytest.approx([0, 4.314579], abs=1e-6)
    assert trace.generated_tokens.tolist() == [44, 109]


def test_mooncake_jsonl_counts_in_milliseconds(tmp_path: Path) -> None:
    trace = read(tmp_path, MOONCAKE % (3000, 6758, 500) + "\n" + MOONCAKE % (4500, 7322, 490))
    assert trace.source == "Mooncake JSONL"
    assert trace.arrival_s is not None
    assert trace.arrival_s.tolist() == [0, 1.5]
    assert trace.prompt_tokens.tolist() == [6758, 7322]


def test_columns_are_found_by_name_and_others_ignored(tmp_path: Path) -> None:
    header = "\ufeffGeneratedTokens, TIMESTAMP ,model,ContextTokens\n"
    trace = read(tmp_path, header + "7,2023-11-16 00:00:00,x,5\n\n8,2023-11-16 00:00:01,x,6")
    assert trace.prompt_tokens.tolist() == [5, 6]
    assert trace.generated_tokens.tolist() == [7, 8]


def test_requests_come_in_the_order_of_arrival(tmp_path: Path) -> None:
    lines = [MOONCAKE % (at, length, 1) for at, length in ((20, 1), (10, 2), (20, 3))]
    trace = read(tmp_path, "".join(lines))
    assert trace.prompt_tokens.tolist() == [2, 1, 3]
    assert trace.arrival_s is not None
    assert trace.arrival_s.tolist() == [0, 0.01, 0.01]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (VATTENTION + "5,6,11,1\n5,six,11,1\n", ["line 3", "num_decode_tokens", "'six'", "whole"]),
        (VATTENTION + "0,6,6,1\n", ["line 2", "num_prefill_tokens", "'0'", "1 to"]),
        (VATTENTION + "5.5,6,6,1\n", ["line 2", "'5.5'", "whole number"]),
        (VATTENTION + "5,-1,6,1\n", ["line 2", "'-1'", "0 to"]),
        (VATTENTION + "nan,1,6,1\n", ["line 2", "'nan'", "whole number"]),
        (VATTENTION + "1e300,1,6,1\n", ["line 2", "'1e300'", str(MAX_TOKENS)]),
        (VATTENTION + "5,6\n", ["line 2", "'5,6'", "2 values", "expected 4"]),
        (AZURE + "yesterday,5,6\n", ["line 2", "TIMESTAMP", "'yesterday'", "a time"]),
        (MOONCAKE % (0, 5, 6) + "{oops\n", ["line 2", "'{oops'", "not JSON"]),
        (MOONCAKE % (0, 5, 6) + '{"timestamp": 0}\n', ["line 2", "input_length, output_length"]),
        (MOONCAKE % (0, 5, 6) + "7\n", ["line 2", "'7'", "lacks"]),
        (MOONCAKE % ("null", 5, 6), ["line 1", "timestamp", "None"]),
        (MOONCAKE % (0, "[1]", 6), ["line 1", "input_length", "[1]"]),
        ("a,b,c\n1,2,3\n", ["line 1", "'a,b,c'", "num_prefill_tokens", "ContextTokens"]),
        ("", ["line 1", "''", "Mooncake JSONL"]),
        (VATTENTION, ["no requests"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refusal(tmp_path, text)
    assert all(word in message for word in words), message


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(ValueError, match=r"picture\.png is not text"):
        read_trace(path)


def test_the_head_of_a_trace_keeps_everything_else() -> None:
    trace = make_trace("t", "by hand", [1, 2, 3], [4, 5, 6], [0, 1, 2])
    head = trace.head(2)
    assert head.prompt_tokens.tolist() == [1, 2]
    assert head.arrival_s is not None
    assert head.arrival_s.tolist() == [0, 1]
    assert (head.name, len(head), len(trace.head(9))) == ("t", 2, 3)


def test_synthetic_traces_repeat_with_the_seed() -> None:
    one, same, other = (make_synthetic(200, seed=seed, qps=4) for seed in (1, 1, 2))
    assert one.prompt_tokens.tolist() == same.prompt_tokens.tolist()
    assert one.prompt_tokens.tolist() != other.prompt_tokens.tolist()
    assert one.prompt_tokens.min() >= 1
    assert one.generated_tokens.min() >= 1
    assert one.arrival_s is not None
    assert one.arrival_s[0] == 0
    assert (np.diff(one.arrival_s) > 0).all()
    assert make_synthetic(3).arrival_s is None


def test_poisson_arrivals_have_the_rate_that_was_asked_for() -> None:
    arrivals = poisson_arrivals(20_000, 5, np.random.default_rng(0))
    assert arrivals[-1] == pytest.approx(4000, rel=0.05)
    with pytest.raises(ValueError, match="qps is 0"):
        poisson_arrivals(1, 0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="has 0 requests"):
        make_synthetic(0)
