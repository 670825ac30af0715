"""The OpenAI server with vattn: its answers, what it tells, and how it ends, killed or not."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import token_rule
from engine_cases import MIB, TIGHT, requests
from engine_rounds import Report
from openai import APIError, OpenAI
from openai_server import MODEL, Server, traces_of_vattn, wait_until
from tiny_models import word

from vattn.integrations.vllm import InstanceStatus

# A machine that does other things as well needs minutes to start an engine.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS, MAX_TOKENS = requests()
STREAMS = 8
IDLE_S = 1.0
PAGE_BYTES = 64 * 2**10
END_S = 60.0  # a server whose worker was killed has ended by then


@pytest.fixture(scope="module")
def make_server(llama: Path, new_folder: Callable[[], Path]) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(mode: str) -> Server:
        options = {"mode": mode, "budget": TIGHT, "idle_seconds": IDLE_S, "name": mode}
        made.append(Server(llama, options, new_folder()))
        return made[-1]

    yield make
    for server in made:
        server.kill()


# The tests of a server run in order; the last one is about its end.


@pytest.fixture(scope="module", params=["elastic", "contiguous"])
def server(request: pytest.FixtureRequest, make_server: Callable[..., Server]) -> Server:
    return make_server(request.param)


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def stream(
    server: Server, prompt: list[int], max_tokens: int, on_token: threading.Event
) -> list[int]:
    """Tokens of one request, as they come."""
    found: list[int] = []
    with (
        client(server) as api,
        api.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        ) as chunks,
    ):
        for chunk in chunks:
            found += chunk.choices[0].model_extra["token_ids"]
            on_token.set()
    return found


def stream_all(
    server: Server, meanwhile: Callable[[], object] = lambda: None
) -> list[tuple[int, list[int]]]:
    """Stream all requests, of which several are under way at any time.

    They come again until ``meanwhile`` is over. Returns the number of each, and its tokens.
    """
    begun, over = threading.Event(), threading.Event()
    turns = count()

    def lane() -> list[tuple[int, list[int]]]:
        found = []
        while (turn := next(turns)) < len(PROMPTS) or not over.is_set():
            i = turn % len(PROMPTS)
            found.append((i, stream(server, PROMPTS[i], MAX_TOKENS[i], begun)))
        return found

    with ThreadPoolExecutor(STREAMS) as pool:
        lanes = [pool.submit(lane) for _ in range(STREAMS)]
        try:
            assert begun.wait(60)
            meanwhile()
        finally:
            over.set()
        found = [one for running in lanes for one in running.result()]
    assert {i for i, _ in found} == set(range(len(PROMPTS)))
    return found


def metrics(server: Server) -> dict[str, float]:
    """vattn's metrics, each of which has one set of labels."""
    found = re.findall(r"^(vattn:\w+)\{.*\} (\S+)$", server.get("/metrics"), re.MULTILINE)
    names = [name for name, _ in found]
    assert len(set(names)) == len(names), names
    # When a counter was made is another metric, by the client's own rules.
    return {name: float(value) for name, value in found if not name.endswith("_created")}


def documented_metrics() -> set[str]:
    """Names in the table of the documentation."""
    page = Path(__file__).parents[2] / "docs" / "vllm.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `vattn:")]
    return {name for row in rows for name in re.findall(r"`(vattn:\w+)`", row)}


def wait_for_the_floor(server: Server) -> None:
    wait_until(
        lambda: server.status().mapped_bytes == server.status().floor_bytes,
        IDLE_S + 20,
        server.status,
    )


def test_streams_have_the_tokens_of_stock(
    server: Server, stock: Report, logits: token_rule.Logits
) -> None:
    found = stream_all(server)
    token_rule.assert_same_again(PROMPTS, stock.tokens, found, logits)


def test_metrics_say_what_the_memory_did(server: Server) -> None:
    wait_for_the_floor(server)
    wait_until(lambda: metrics(server)["vattn:kv_mapped_bytes"] < TIGHT, 5, server.status)
    told = metrics(server)
    assert told.keys() == documented_metrics()
    floor = told["vattn:kv_floor_bytes"]
    assert floor == server.status().floor_bytes > 0
    assert told["vattn:kv_mapped_bytes"] == floor
    assert told["vattn:kv_budget_bytes"] == TIGHT
    # As the last step left it: the engine has shrunk since.
    mapped, unmapped = told["vattn:kv_mapped_pages_total"], told["vattn:kv_unmapped_pages_total"]
    assert floor < floor + (mapped - unmapped) * PAGE_BYTES <= TIGHT
    assert told["vattn:kv_budget_waits_total"] > 0
    assert told["vattn:kv_refusals_total"] == 0


def test_streams_have_the_tokens_of_stock_while_a_user_raises_and_cuts_the_budget(
    server: Server, stock: Report, logits: token_rule.Logits
) -> None:
    def set_budget(size: str) -> InstanceStatus:
        done = server.vattn("budget", size, "--name", server.status().name, "--json")
        assert done.returncode == 0, done.stderr
        now = InstanceStatus(**json.loads(done.stdout))
        assert now.running_requests > 0
        return now

    def raise_and_cut() -> None:
        assert server.status().mapped_bytes <= TIGHT
        assert set_budget("16MiB").budget_bytes == 16 * MIB
        wait_until(lambda: server.status().mapped_bytes > TIGHT, 20, server.status)
        unmapped = metrics(server)["vattn:kv_unmapped_pages_total"]
        assert set_budget("2MiB").budget_bytes == TIGHT
        wait_until(lambda: server.status().mapped_bytes <= TIGHT, 20, server.status)
        assert server.status().running_requests > 0
        wait_until(lambda: metrics(server)["vattn:kv_unmapped_pages_total"] > unmapped, 20)
        assert server.status().running_requests > 0

    found = stream_all(server, meanwhile=raise_and_cut)
    token_rule.assert_same_again(PROMPTS, stock.tokens, found, logits)
    assert server.status().mapped_bytes <= TIGHT


def test_a_budget_that_is_too_small_is_refused(server: Server) -> None:
    before = server.status().budget_bytes
    refused = server.vattn("budget", "128KiB")
    assert refused.returncode != 0
    assert "one request of the longest length needs" in refused.stderr
    assert server.status().budget_bytes == before


def test_several_answers_to_one_prompt_are_alike(server: Server, stock: Report) -> None:
    # vLLM refuses several greedy answers; the best of one token is the same.
    with client(server) as api:
        answer = api.completions.create(
            model=MODEL,
            prompt=PROMPTS[0],
            max_tokens=12,
            temperature=1,
            n=3,
            extra_body={"return_token_ids": True, "ignore_eos": True, "top_k": 1},
        )
    found = [choice.model_extra["token_ids"] for choice in answer.choices]
    assert found == [stock.tokens[0][:12]] * 3


def test_a_stop_string_ends_a_request(server: Server, stock: Report) -> None:
    expected = [word(token) for token in stock.tokens[1]]
    stop = expected[6]
    with client(server) as api:
        answer = api.completions.create(
            model=MODEL,
            prompt=PROMPTS[1],
            max_tokens=MAX_TOKENS[1],
            temperature=0,
            stop=[stop],
            extra_body={"ignore_eos": True},
        )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text.split() == expected[: expected.index(stop)]


def test_the_memory_of_an_aborted_request_comes_back(server: Server) -> None:
    with (
        client(server) as api,
        api.completions.create(
            model=MODEL,
            prompt=PROMPTS[0],
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as chunks,
    ):
        next(iter(chunks))
        assert server.status().running_requests == 1
    wait_until(lambda: server.status().running_requests == 0, 20, server.status)
    wait_for_the_floor(server)


def test_an_idle_server_is_listed_at_its_floor(server: Server) -> None:
    wait_for_the_floor(server)
    listed = server.vattn("list")
    assert listed.returncode == 0
    name, *_, state = listed.stdout.splitlines()[1].split()
    assert (name, state) == (server.status().mode, "idle")


def test_a_server_that_is_told_to_ends_and_leaves_nothing(server: Server) -> None:
    before = server.sockets()
    assert len(before) == 1
    server.stop()
    wait_until(lambda: not server.alive(), END_S, server.alive)
    assert server.sockets() == []


@pytest.mark.parametrize("title", ["VLLM::Worker", "VLLM::EngineCore"])
def test_a_server_that_is_killed_in_part_ends_and_leaves_nothing(
    title: str, make_server: Callable[..., Server]
) -> None:
    traces = traces_of_vattn()
    server = make_server("contiguous" if title == "VLLM::Worker" else "elastic")
    assert len(server.sockets()) == 1
    victim = server.process_called(title)
    with pytest.raises((APIError, OSError)):
        stream_all(server, meanwhile=victim.kill)
    wait_until(lambda: not server.alive(), END_S, server.alive)
    wait_until(lambda: not server.sockets(), 10, server.sockets)
    assert traces_of_vattn() <= traces
