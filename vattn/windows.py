"""Views of layers with a sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vattn import _C
from vattn.config import CacheConfig
from vattn.tensors import LayerTensors, as_slice

if TYPE_CHECKING:
    import torch


class WindowViews:
    """The part of :class:`vattn.KVCache` for layers that keep only their last tokens.

    Such a layer has a ring of pages for each row, mapped twice in a row (a "magic ring buffer"), so
    that its window is one contiguous range wherever in the ring it starts.
    """

    config: CacheConfig
    pool: _C.Pool
    _core: _C.KVCache
    _tensors: LayerTensors

    def kv_window(
        self, layer: int, *, rows: int | slice | Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K and V of the last tokens of rows, in a layer with a sliding window, as zero-copy views.

        Call it after ``step``, which moves the window: of rows with ``n`` tokens each, these are
        the tokens ``max(sink, n - window)`` to ``n``. Those that the step added are at the end of
        the view, not written yet: write them there, then let attention read all of it.

        Parameters
        ----------
        layer : int
            Index of a layer with a window.
        rows : int, slice or evenly spaced sequence of int, optional
            Only these rows, in a view with as many. All of the rows must have the same number of
            tokens: the windows of others start elsewhere, which no view can show.

        Returns
        -------
        k, v : torch.Tensor
            [rows, tokens, num_kv_heads, head_dim] in order NHD, [rows, num_kv_heads, tokens,
            head_dim] in order HND; strided, the last dimension contiguous. ``v`` is None for a
            latent stripe (``v_head_dim=0``). No tokens as long as all are in the sink.

        Raises
        ------
        IndexError
            No such layer or row.
        ValueError
            The layer has no window: use ``kv``. Rows with different numbers of tokens, or that are
            not evenly spaced: ask for one row at a time.

        Notes
        -----
        A view is of one moment: the next ``step`` moves the window, and what is written through the
        new view goes over the oldest tokens of the old one. So a chunk of several tokens whose
        first queries attend to older tokens than the window holds after the step needs a copy:
        ``torch.cat`` the window of before the step and the chunk's own keys and values, let the
        chunk attend to that, and write the chunk. Of a chunk or prompt longer than the window only
        the last ``window`` tokens have to be written (and those of the sink, see ``kv_sink``).
        Those before them then never can be: cutting the row to where its window has them fails.

        The start of a view differs from step to step, so a CUDA graph cannot hold it. The ring is
        that of [1]_; the sinks are those of [2]_.

        References
        ----------
        .. [1] "Circular buffer", section "Optimization": one memory mapped twice in a row,
           https://en.wikipedia.org/wiki/Circular_buffer
        .. [2] Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
           https://arxiv.org/abs/2309.17453

        Examples
        --------
        A prompt of 40 tokens, then 200 decode steps. 16 tokens stay readable, in one page.

        >>> import torch, vattn
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> cache = vattn.init(vattn.CacheConfig(
        ...     num_layers=1, num_kv_heads=2, head_dim=64, dtype="float32", order="HND", window=16,
        ...     max_batch_size=2, max_seq_len=4096, device="cpu", memory="1MiB"))
        >>> row = cache.alloc()
        >>> k_new, v_new = torch.randn(2, 1, 2, 40, 64)
        >>> cache.step({row: 40})
        >>> k, v = cache.kv_window(0, rows=row)
        >>> tuple(k.shape)
        (1, 2, 16, 64)
        >>> _ = k.copy_(k_new[:, :, -16:]), v.copy_(v_new[:, :, -16:])
        >>> for n in range(41, 241):
        ...     query, k_new, v_new = torch.randn(3, 1, 2, 1, 64)
        ...     cache.step({row: n})
        ...     k, v = cache.kv_window(0, rows=row)
        ...     k[:, :, -1:], v[:, :, -1:] = k_new, v_new
        ...     out = scaled_dot_product_attention(query, k, v)
        >>> tuple(k.shape), cache.stats().mapped_bytes == 2 * 2 * cache.page_bytes
        ((1, 2, 16, 64), True)
        >>> cache.close()
        """
        chosen, n_tokens = self._rows_of_one_length(rows)
        return self._tensors.window(layer, chosen, n_tokens, self.pool.page_bytes)

    def kv_sink(
        self, layer: int, *, rows: int | slice | Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K and V of the first tokens of rows, in a layer with a sliding window: attention sinks.

        Of rows with ``n`` tokens each, these are the tokens 0 to ``min(sink, n)``. They stay, and
        stay where they are; ``kv_window`` has none of them. Write them here when they are new.

        Parameters
        ----------
        layer, rows
            As for ``kv_window``.

        Returns
        -------
        k, v : torch.Tensor
            As from ``kv_window``; no tokens if the layer has no sink.

        Raises
        ------
        IndexError, ValueError
            As ``kv_window``.

        Examples
        --------
        Attention to the sink and the window, of a row with 100 tokens.

        >>> import torch, vattn
        >>> cache = vattn.init(vattn.CacheConfig(
        ...     num_layers=1, num_kv_heads=2, head_dim=64, dtype="float32", window=16, sink=4,
        ...     max_batch_size=2, max_seq_len=4096, device="cpu", memory="1MiB"))
        >>> row = cache.alloc()
        >>> cache.step({row: 100})
        >>> (k_sink, _), (k, _) = cache.kv_sink(0, rows=row), cache.kv_window(0, rows=row)
        >>> k_new = torch.randn(1, 100, 2, 64)
        >>> _ = k_sink.copy_(k_new[:, :4]), k.copy_(k_new[:, -16:])
        >>> tuple(torch.cat([k_sink, k], dim=1).shape)
        (1, 20, 2, 64)
        >>> cache.close()
        """
        chosen, n_tokens = self._rows_of_one_length(rows)
        return self._tensors.sink(layer, chosen, n_tokens)

    def _rows_of_one_length(self, rows: int | slice | Sequence[int] | None) -> tuple[slice, int]:
        """Return the rows as a slice, and the tokens that each of them has."""
        n_rows = self.config.max_batch_size
        chosen = slice(None) if rows is None else as_slice(rows, n_rows)
        all_lens = self._core.seq_lens()  # raises if the cache is closed
        lens = {row: all_lens[row] for row in range(n_rows)[chosen]}
        first, n_tokens = next(iter(lens.items()), (0, 0))
        for row, n in lens.items():
            if n != n_tokens:
                raise ValueError(
                    f"row {first} has {n_tokens} tokens and row {row} has {n}, so their windows "
                    "start at different places; ask for rows of one length"
                )
        return chosen, n_tokens
