"""One engine in a process of its own: answers JSON lines, see ``engines.Engine``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any, TextIO


async def _play(engine: Any, request: dict[str, Any], number: int, start: float) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    await asyncio.sleep(max(0.0, start + request["at_s"] - time.perf_counter()))
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=request["generate"],
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    prompt = {"prompt_token_ids": request["prompt"]}
    sent = time.perf_counter()
    times: list[float] = []
    async for output in engine.generate(prompt, sampling, str(number)):
        now = time.perf_counter()
        times += [now - start] * len(output.outputs[0].token_ids)
    return {"sent_s": sent - start, "token_s": times}


async def _serve(engine: Any, answers: TextIO) -> None:
    loop = asyncio.get_running_loop()
    number = 0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        requests = json.loads(line)
        start = time.perf_counter()
        tasks = [_play(engine, r, number + i, start) for i, r in enumerate(requests)]
        number += len(requests)
        _answer(answers, {"requests": await asyncio.gather(*tasks)})


def _answer(answers: TextIO, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


async def _run(arguments: dict[str, Any], answers: TextIO) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    config = engine.vllm_config.cache_config
    try:
        _answer(answers, {"num_blocks": config.num_gpu_blocks, "block_tokens": config.block_size})
        await _serve(engine, answers)
    finally:
        engine.shutdown()


def main() -> None:
    """Serve until the input ends."""
    arguments = json.loads(sys.stdin.readline())
    # vLLM prints; the answers must stay alone on their pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(_run(arguments, answers))


if __name__ == "__main__":
    main()
