"""The questions, in the order in which they are asked."""

from __future__ import annotations

from benchmarks.gpu_questions import (
    dlpack_over_unmapped,
    flash_attention,
    graph_replay,
    map_while_running,
    partial_handle,
    torch_attention,
    unmap_waits,
    unmapped_read,
)
from benchmarks.gpu_questions.answers import Question

_ASKED = (
    Question(
        "dlpack_over_unmapped",
        "Do tensors over addresses that are not, or only partly, mapped pass through DLPack?",
        dlpack_over_unmapped.ask,
    ),
    Question(
        "graph_replay_across_remaps",
        "Does a CUDA graph give right results after its memory was mapped again?",
        graph_replay.ask,
    ),
    Question(
        "varlen_and_sdpa",
        "Are varlen_attn and SDPA's flash kernel right over rows that are mapped in part?",
        torch_attention.ask,
    ),
    Question(
        "flash_attn_with_kvcache",
        "Is flash_attn_with_kvcache(cache_batch_idx=...) right over vattn's tensors?",
        flash_attention.ask,
        needs_module="flash_attn",
    ),
    Question(
        "unmap_waits",
        "Does cuMemUnmap wait for kernels that run over other memory?",
        unmap_waits.ask,
    ),
    Question(
        "map_while_running",
        "Can a second thread map memory while kernels run?",
        map_while_running.ask,
    ),
    Question(
        "partial_handle",
        "Can only the first part of a physical handle be mapped?",
        partial_handle.ask,
    ),
    # Last: it breaks the device's context, if only that of its own process.
    Question(
        "unmapped_read",
        "Is reading an unmapped token an error, and not just wrong?",
        unmapped_read.ask,
        limit_s=25,
    ),
)
QUESTIONS = {question.name: question for question in _ASKED}
