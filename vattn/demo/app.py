"""The demo: arguments, the order of things, and what is said about them."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vattn.demo import measure, picture, report
from vattn.demo.measure import Difference, Run
from vattn.demo.model import Subject, load, prompts

_CONSOLE = Console()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vattn.demo",
        description="Generate text with a vattn KV cache and with the stock one of transformers, "
        "compare the two, and draw what memory did.",
    )
    parser.add_argument("--model", metavar="ID_OR_PATH", help="default: random weights")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out/demo"))
    parser.add_argument("--max-new-tokens", metavar="N", type=int)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few seconds")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--memory", help="budget of the cache, like 4GiB; default: a share")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads; default: measured")
    arguments = parser.parse_args(argv)
    if arguments.smoke and arguments.model:
        parser.error("--smoke and --model are both given; leave one out")
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = 24 if arguments.smoke else 32
    for name in ("max_new_tokens", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Returns
    -------
    int
        0; 1 if the caches gave different tokens, other than by a tie in rounding.
    """
    arguments = _arguments(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        _set_threads(arguments.threads)
    with _CONSOLE.status("Loading the model"):
        subject = load(arguments.model, device, tiny=arguments.smoke)
    _introduce(subject, device)
    texts = prompts()
    inputs = {name: tensor.to(device) for name, tensor in subject.tokenizer.encode(texts).items()}
    stock, ours = _run_both(subject, inputs, arguments)
    difference = measure.compare(ours, stock, subject.model.dtype)
    _show_text(subject, texts, ours)
    # The logits of a token compare as long as what came before it is the same.
    same = stock.tokens.shape[1] if difference is None else difference.token + 1
    logits_apart = measure.max_logit_difference(ours, stock, same)
    _CONSOLE.print(report.make_table(ours, stock, difference, logits_apart))
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = [*picture.draw(ours, subject.max_seq_len, arguments.out), arguments.out / "run.json"]
    report.write_json(
        files[-1],
        subject=subject,
        inputs=inputs,
        runs=[stock, ours],
        difference=difference,
        max_logit_difference=logits_apart,
    )
    _CONSOLE.print("Wrote " + ", ".join(str(path) for path in files), soft_wrap=True)
    return _verdict(difference)


def _run_both(
    subject: Subject, inputs: dict[str, torch.Tensor], arguments: argparse.Namespace
) -> tuple[Run, Run]:
    n_tokens = arguments.max_new_tokens
    with _CONSOLE.status("Warming up"):
        short = {name: tensor[:, -4:] for name, tensor in inputs.items()}
        measure.run_stock(subject, short, 2, lambda: None)
    runs: dict[str, Run] = {}

    def run(name: str) -> None:
        task = progress.add_task(name, total=n_tokens)

        def on_token() -> None:
            progress.advance(task)

        if name == "DynamicCache":
            new = measure.run_stock(subject, inputs, n_tokens, on_token)
        else:
            new = measure.run_vattn(subject, inputs, n_tokens, on_token, arguments.memory)
        runs[name] = runs[name].with_best_times(new) if name in runs else new

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=_CONSOLE) as progress:
        # There and back, so that neither has the better place; of each the faster run counts.
        for name in ("DynamicCache", "VAttnCache", "VAttnCache", "DynamicCache"):
            run(name)
    return runs["DynamicCache"], runs["VAttnCache"]


def _introduce(subject: Subject, device: torch.device) -> None:
    millions = subject.model.num_parameters() / 1e6
    dtype = str(subject.model.dtype).removeprefix("torch.")
    _CONSOLE.print(f"Model: {escape(subject.name)}, {millions:.0f} M parameters, {dtype}, {device}")
    if not subject.trained:
        _CONSOLE.print(
            "The weights are random, so the text is meaningless; the memory and the work are those "
            "of a real model of this shape. For text that means something pass --model, such as "
            "--model Qwen/Qwen3-0.6B or a folder."
        )


def _show_text(subject: Subject, texts: list[str], run: Run) -> None:
    for text, tokens in zip(texts, run.tokens.tolist(), strict=True):
        shown = subject.tokenizer.decode(tokens)
        printable = "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in shown)
        _CONSOLE.print(f"[dim]...{escape(text[-40:])}[/dim]{escape(printable)}")


def _verdict(difference: Difference | None) -> int:
    if difference is None:
        return 0
    where = f"row {difference.row}, token {difference.token}, by a logit {difference.logit_gap:.3g}"
    if difference.is_tie:
        _CONSOLE.print(f"The tokens part at {where}: a tie in rounding, either is right.")
        return 0
    _CONSOLE.print(f"FAILED: the tokens differ at {where}, which is more than rounding.")
    return 1


def _set_threads(wanted: int | None) -> None:
    """Use the threads asked for, or one where more are slower, as on a busy machine."""
    most = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif most > 1 and _matmul_s(1) < _matmul_s(most):
        torch.set_num_threads(1)
        _CONSOLE.print(f"Using 1 thread: {most} are slower now, so the machine is busy.")


def _matmul_s(threads: int) -> float:
    """Time what a decode step mostly does."""
    torch.set_num_threads(threads)
    x, weight = torch.ones(4, 1024), torch.ones(3072, 1024)
    torch.nn.functional.linear(x, weight)
    start = time.perf_counter()
    for _ in range(20):
        torch.nn.functional.linear(x, weight)
    return time.perf_counter() - start
