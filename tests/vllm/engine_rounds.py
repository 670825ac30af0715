"""A vLLM engine in a process of its own, which serves rounds of requests and reports on each.

:func:`serve` starts this file as a program. The engine's core and its worker are in that one
process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so a budget can be changed at a step that the test
chooses, and what the scheduler believes can be compared with what the worker has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTED = "engine started"
ENGINE_TIMEOUT_S = 400.0
IDLE_TIMEOUT_S = 20.0
GATE_TIMEOUT_S = 200.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """Requests that come at the same time, decoded greedily, and what happens meanwhile."""

    prompts: list[list[int]]
    max_tokens: list[int]
    n: int = 1  # answers to each prompt, all the same one
    budget: int | None = None  # set before, bytes
    change_at: int | None = None  # after so many steps the budget becomes change_to bytes
    change_to: int = 0
    abort_at: int | None = None  # after so many steps every second request is aborted
    wait_for: str = ""  # path of a file: the round begins when it is there
    until: str = ""  # path of a file: as long as it is not there, requests that ended come again
    forget: bool = False  # the prefix cache before the round
    wait_idle: bool = False  # after the round, until the engine has shrunk


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a round did: the tokens of each prompt's answers, one answer after the other.

    ``again`` has the tokens of requests that came again, with the number of the prompt. Memory is
    None where vattn is not in use.
    """

    tokens: list[list[int]]
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    again: list[tuple[int, list[int]]] = field(default_factory=list)
    mapped_pages: int | None = None
    unmapped_pages: int | None = None
    peak_bytes: int | None = None
    peak_before_change: int | None = None  # of the budget, bytes
    end_bytes: int | None = None
    floor_bytes: int | None = None
    idle_bytes: int | None = None
    disagreements: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the process ended; one report for each round that it got through."""

    returncode: int
    output: str
    reports: list[Report]
    sockets: list[str]  # that it left


def environment(**more: str) -> dict[str, str]:
    """What vLLM needs on a small CPU machine without a network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def transfer_config(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Write ``--kv-transfer-config`` for vattn with these options of its own."""
    return {
        "kv_connector": "VattnConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
        **more,
    }


def serve(
    model: Path,
    rounds: list[Round],
    options: dict[str, Any] | None,
    *,
    folder: Path,
    runtime: Path | None = None,
    sabotage: str = "",
    transfer: dict[str, Any] | None = None,
    **engine: Any,
) -> Outcome:
    """Run an engine over rounds of requests.

    Parameters
    ----------
    options : dict, optional
        vattn's, as ``kv_connector_extra_config``; None: stock vLLM.
    folder : Path
        An empty one, for files, and for the sockets.
    runtime : Path, optional
        Where the sockets are instead, so that several engines have them in one place.
    sabotage : str
        Statements that the process executes before it makes the engine.
    transfer : dict, optional
        What else ``--kv-transfer-config`` says.
    engine
        Arguments of ``vllm.LLM``.
    """
    if options is not None:
        engine["kv_transfer_config"] = transfer_config(options, **(transfer or {}))
    job = {
        "model": str(model),
        "engine": engine,
        "rounds": [asdict(r) for r in rounds],
        "sabotage": sabotage,
    }
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", XDG_RUNTIME_DIR=str(runtime or folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ENGINE_TIMEOUT_S,
        check=False,
    )
    written = folder / "reports.jsonl"
    lines = written.read_text().splitlines() if written.exists() else []
    return Outcome(
        returncode=done.returncode,
        output=done.stdout,
        reports=[Report(**json.loads(line)) for line in lines],
        sockets=[path.name for path in folder.rglob("*.sock")],
    )


# What follows runs in the engine's process.


class Engine:
    """A ``vllm.LLM`` that is driven step by step."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            distributed_executor_backend="uni",
            **{"max_model_len": 512, "block_size": 32, "max_num_seqs": 16, "seed": 0, **options},
        )
        core: Any = self.llm.llm_engine.engine_core
        scheduler = core.engine_core.scheduler
        connector = scheduler.connector
        self.memory = None if connector is None else connector._engine

    def play(self, plan: Round) -> Report:
        """Serve one round."""
        if plan.forget:
            assert self.llm.reset_prefix_cache()
        if plan.budget is not None:
            self._set_budget(plan.budget)
        before = self._totals()
        found: dict[tuple[str, int], list[int]] = {}
        for i in range(len(plan.prompts)):
            self._submit(plan, i)
        steps = peak = peak_before = 0
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                for answer in output.outputs:
                    found[output.request_id, answer.index] = list(answer.token_ids)
                if output.finished and plan.until and not Path(plan.until).exists():
                    number, _, turn = output.request_id.partition(".")
                    self._submit(plan, int(number), int(turn or 0) + 1)
            steps += 1
            peak = max(peak, self._mapped_bytes())
            if steps == plan.abort_at:
                aborted = [str(i) for i in range(0, len(plan.prompts), 2)]
                self.llm.llm_engine.abort_request(aborted)
            if steps == plan.change_at:
                peak_before = peak
                # As another program does it, while a step may be under way.
                other = threading.Thread(target=self._set_budget, args=(plan.change_to,))
                other.start()
                other.join()
        after = self._totals()
        change = {key: after[key] - before[key] for key in after}
        memory: dict[str, Any] = {}
        if self.memory is not None:
            memory = self._describe(wait_idle=plan.wait_idle)
            memory |= {"peak_bytes": peak, "peak_before_change": peak_before}
        answers = [(str(i), answer) for i in range(len(plan.prompts)) for answer in range(plan.n)]
        return Report(
            tokens=[found.get(key, []) for key in answers],
            again=[(int(k.partition(".")[0]), found[k, i]) for k, i in found if "." in k],
            **change,
            **memory,
        )

    def _set_budget(self, size: int) -> None:
        from vattn.integrations.vllm import set_budget

        set_budget(size, name=self.memory.name)

    def _submit(self, plan: Round, number: int, turn: int = 0) -> None:
        from vllm import SamplingParams

        # vLLM refuses several greedy answers; the best of one token is the same.
        chosen = {"temperature": 0} if plan.n == 1 else {"temperature": 1, "top_k": 1}
        sampling = SamplingParams(
            **chosen,
            n=plan.n,
            max_tokens=plan.max_tokens[number],
            ignore_eos=True,
            detokenize=False,
        )
        name = f"{number}.{turn}" if turn else str(number)
        prompt = {"prompt_token_ids": plan.prompts[number]}
        self.llm.llm_engine.add_request(name, prompt, sampling)

    def _totals(self) -> dict[str, int]:
        seen = {metric.name: metric for metric in self.llm.get_metrics()}
        names = {
            "preemptions": "vllm:num_preemptions",
            "prefix_queries": "vllm:prefix_cache_queries",
            "prefix_hits": "vllm:prefix_cache_hits",
        }
        totals = {key: int(getattr(seen[name], "value", 0)) for key, name in names.items()}
        if self.memory is not None:
            counters = self.memory.ledger.counters
            totals["mapped_pages"] = counters.mapped_pages
            totals["unmapped_pages"] = counters.unmapped_pages
        return totals

    def _mapped_bytes(self) -> int:
        return 0 if self.memory is None else self.memory.status()["mapped_bytes"]

    def _describe(self, *, wait_idle: bool) -> dict[str, Any]:
        from vattn.integrations.vllm import status

        end = status(self.memory.name)
        if wait_idle:
            give_up = time.monotonic() + IDLE_TIMEOUT_S
            while self._mapped_bytes() > end.floor_bytes and time.monotonic() < give_up:
                time.sleep(0.05)
        return {
            "end_bytes": end.mapped_bytes,
            "floor_bytes": end.floor_bytes,
            "idle_bytes": self._mapped_bytes() if wait_idle else None,
            "disagreements": self._disagreements(),
        }

    def _disagreements(self) -> list[str]:
        """Where the scheduler's account differs from the worker's memory."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group()
        pages, ledger = worker._worker.pages, self.memory.ledger
        pages.check()
        wrong = []
        if pages.mapped_pages != ledger.mapped_pages:
            wrong.append(f"{pages.mapped_pages} pages mapped, {ledger.mapped_pages} accounted for")
        wrong += [
            f"page {page}: {ledger._frames_on[page]} frames have it"
            for page in range(ledger.geometry.n_pages)
            if pages.is_mapped(page) != (ledger._frames_on[page] > 0)
        ]
        return wrong[:10]


def main(folder: Path) -> None:
    """Do the job that lies in a folder."""
    job = json.loads((folder / "job.json").read_text())
    exec(job["sabotage"], {})  # a break that a test planted
    engine = Engine(job["model"], job["engine"])
    print(STARTED, flush=True)
    with open(folder / "reports.jsonl", "w") as reports:
        for plan in [Round(**described) for described in job["rounds"]]:
            _wait_for(Path(plan.wait_for))
            print(json.dumps(asdict(engine.play(plan))), file=reports, flush=True)


def _wait_for(path: Path) -> None:
    give_up = time.monotonic() + GATE_TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < give_up, f"{path} did not come"
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
