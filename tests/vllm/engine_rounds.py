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


@dataclass(frozen=True, kw_only=True)
class Round:
    """Requests that come at the same time, decoded greedily, and what happens meanwhile."""

    prompts: list[list[int]]
    max_tokens: list[int]
    budget: int | None = None  # set before, bytes
    cut_at: int | None = None  # after so many steps the budget becomes cut_to bytes
    cut_to: int = 0
    abort_at: int | None = None  # after so many steps every second request is aborted
    forget: bool = False  # the prefix cache before the round
    wait_idle: bool = False  # after the round, until the engine has shrunk


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a round did. Memory is None where vattn is not in use."""

    tokens: list[list[int]]
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    mapped_pages: int | None = None
    unmapped_pages: int | None = None
    peak_bytes: int | None = None
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
        An empty one, for sockets and files.
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
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", XDG_RUNTIME_DIR=str(folder)),
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
        from vattn.integrations.vllm import set_budget

        if plan.forget:
            assert self.llm.reset_prefix_cache()
        if plan.budget is not None:
            set_budget(plan.budget)
        before = self._totals()
        found: dict[str, list[int]] = {}
        self._submit(plan)
        steps = peak = 0
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
            peak = max(peak, self._mapped_bytes())
            if steps == plan.abort_at:
                aborted = [str(i) for i in range(0, len(plan.prompts), 2)]
                self.llm.llm_engine.abort_request(aborted)
            if steps == plan.cut_at:
                # As another program does it, while a step may be under way.
                other = threading.Thread(target=set_budget, args=(plan.cut_to,))
                other.start()
                other.join()
        after = self._totals()
        change = {key: after[key] - before[key] for key in after}
        memory = {} if self.memory is None else self._describe(peak, wait_idle=plan.wait_idle)
        return Report(
            tokens=[found.get(str(i), []) for i in range(len(plan.prompts))], **change, **memory
        )

    def _submit(self, plan: Round) -> None:
        from vllm import SamplingParams

        for i, (prompt, most) in enumerate(zip(plan.prompts, plan.max_tokens, strict=True)):
            sampling = SamplingParams(
                temperature=0, max_tokens=most, ignore_eos=True, detokenize=False
            )
            self.llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)

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

    def _describe(self, peak: int, *, wait_idle: bool) -> dict[str, Any]:
        from vattn.integrations.vllm import status

        end = status()
        if wait_idle:
            give_up = time.monotonic() + IDLE_TIMEOUT_S
            while status().mapped_bytes > status().floor_bytes and time.monotonic() < give_up:
                time.sleep(0.05)
        return {
            "peak_bytes": peak,
            "end_bytes": end.mapped_bytes,
            "floor_bytes": end.floor_bytes,
            "idle_bytes": status().mapped_bytes if wait_idle else None,
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
        for plan in job["rounds"]:
            print(json.dumps(asdict(engine.play(Round(**plan)))), file=reports, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
