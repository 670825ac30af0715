"""Can DLPack hand tensors over addresses of which none, or only some, are mapped?"""

from __future__ import annotations

import torch

from benchmarks.gpu_questions.answers import Evidence
from benchmarks.gpu_questions.work import DEVICE, LENS, fill_rows, make_cache


def _views(k: torch.Tensor) -> dict[str, list[int]]:
    """Views of all kinds, without a look at what is there."""
    return {
        "slice": list(k[1:, 100:200].shape),
        "transpose": list(k.transpose(1, 2).stride()),
        "as_strided": list(k.as_strided((2, 3), (1, 1), 7).shape),
        "view as int16": list(k.view(torch.int16).shape),
        "detach": list(k.detach().shape),
    }


def ask(evidence: Evidence) -> tuple[bool | None, str]:
    """Import tensors before anything is mapped, then compute over the mapped part only."""
    for layout in ("interleaved", "per_layer"):
        with make_cache(layout=layout) as cache:
            tensors = [tensor for layer in range(2) for tensor in cache.kv(layer)]
            assert cache.stats().mapped_bytes == 0
            k = tensors[0]
            # It must not have been a copy, which would need all to be mapped.
            again = torch.from_dlpack(k)
            evidence.note(
                **{
                    layout: {
                        "device": str(k.device),
                        "tensors": len(tensors),
                        "reserved_bytes": cache.stats().reserved_bytes,
                        "views": _views(k),
                        "through torch.from_dlpack again": again.data_ptr() == k.data_ptr(),
                    }
                }
            )
            if k.device != torch.device(DEVICE) or again.data_ptr() != k.data_ptr():
                return False, f"{layout}: the tensor is on {k.device} or was copied"
            for layer in range(2):
                right = [
                    torch.equal(cache.kv(layer, rows=row, max_len=LENS[row])[i][0], pair[i])
                    and bool(pair[i].float().abs().sum() > 0)
                    for row, pair in enumerate(fill_rows(cache, layer))
                    for i in range(2)
                ]
                torch.cuda.synchronize()
                stats = cache.stats()
                evidence.note(
                    **{
                        f"{layout} layer {layer}": {
                            "rows right": sum(right),
                            "of": len(right),
                            "mapped_bytes": stats.mapped_bytes,
                        }
                    }
                )
                if not all(right) or stats.mapped_bytes >= stats.reserved_bytes:
                    return False, f"{layout}: layer {layer} does not hold what was written"
    return True, "tensors, their views, and kernels over the mapped part work"
