"""Prefix cache: a request that starts with the tokens of another reads the KV that is there."""

from __future__ import annotations

import operator
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vattn.config import _check_int
from vattn.errors import OutOfRowsError
from vattn.prefix_index import Candidate, Entry, PrefixIndex, Prompt, pack_ids, pack_salt
from vattn.streams import stream_handle

if TYPE_CHECKING:
    from vattn.cache import KVCache

# A default block is about a page, between these: smaller ones cost a hash each, and of a hit less
# than a block is found only behind a whole one.
MIN_BLOCK_TOKENS, MAX_BLOCK_TOKENS = 16, 64


class PrefixMatch(NamedTuple):
    """What :meth:`PrefixCache.match` found.

    Attributes
    ----------
    row : int
        An active row for the request, as from :meth:`vattn.KVCache.alloc`.
    n_cached : int
        Its length: the KV of so many first tokens is there already. 0: nothing was found.
    """

    row: int
    n_cached: int


@dataclass(frozen=True, kw_only=True)
class PrefixStats:
    """What a prefix cache has done so far, and what it knows now.

    Attributes
    ----------
    lookups, hits : int
        Calls of ``match`` that returned a row, and how many of them found tokens.
    adopted, forked : int
        Hits that took over an idle row, and that share the memory of another row.
    lookup_tokens, hit_tokens : int
        Tokens that were looked up, and how many of them were found.
    entries : int
        Rows whose tokens are known. Some may have lost them since: that is noticed when they are
        met.
    indexed_blocks : int
        Different blocks of tokens in the index.
    """

    lookups: int = 0
    hits: int = 0
    adopted: int = 0
    forked: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    entries: int = 0
    indexed_blocks: int = 0

    @property
    def hit_rate(self) -> float:
        """``hit_tokens / lookup_tokens``; 0 before the first lookup."""
        return self.hit_tokens / self.lookup_tokens if self.lookup_tokens else 0.0


class PrefixCache:
    """Lets requests that start with the same tokens share the KV of these tokens.

    Call ``match`` instead of :meth:`vattn.KVCache.alloc` when a request starts and compute only
    the tokens from ``n_cached`` on; ``insert`` after the prefill, so that requests which run at the
    same time share, and once more with the generated tokens before :meth:`vattn.KVCache.free`.

    Parameters
    ----------
    cache : KVCache
        Without a sliding window, whose rows forget their first tokens. Make one prefix cache of it.
    block_tokens : int, optional
        Tokens of a block of the index. A prefix shorter than a block is not found; above that,
        hits are exact to the token. Default: about what a page of one region holds, but 16 to 64.

    Raises
    ------
    ValueError, TypeError
        The cache has a window, or ``block_tokens`` is not an int of at least 1.

    Notes
    -----
    *How it finds.* Each block of a row has a hash over the salt, its tokens and all before it. A
    request is looked up block by block, the longest match first; then token ids and salt are
    compared, so that a collision of hashes finds nothing that is not there. A salt separates
    tenants: whoever does not know the salt of a prompt cannot learn from the time of a first token
    that somebody else sent it.

    *What it costs.* A request that continues all of an idle row takes that row over: no copy, no
    driver call. Any other shares the memory of the row it was found in: physical memory of whole
    extents is mapped at a second address. An extent that only begins in the common prefix cannot be
    mapped in part: at most its first page is copied, and the hit ends there, so that a row in few
    large extents gives shorter hits. ``max_extent_bytes`` at the bytes that requests share, say
    512 tokens, bounds that loss; smaller extents cost more driver calls when rows grow.

    *What it keeps.* Nothing beyond the rows: an ended request stays until its row or its memory is
    needed. Rows that were not inserted go first, then inserted ones, the one freed first before
    the others, from their end. A page that two rows share stays as long as one of them.

    *Threads and streams.* Any thread may call any method at any time, beside those of the cache.
    ``match`` holds a lock while it takes a row, which may map memory. In a forked child every
    method raises :class:`vattn.DriverError`, as those of the cache. A request's work comes after
    the work so far on the row that it shares, whatever streams the two use: insert a row when the
    work that computes its tokens was submitted to the row's stream.

    *Prior art.* vLLM's automatic prefix caching (https://docs.vllm.ai/en/latest/design/
    prefix_caching.html) has the hash chain over blocks and the salt; SGLang's RadixAttention
    (arXiv 2312.07104) keeps the KV of ended requests in LRU order.

    Examples
    --------
    >>> import vattn
    >>> cache = vattn.init(vattn.CacheConfig(
    ...     num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32",
    ...     max_batch_size=2, max_seq_len=1024, device="cpu", memory="4MiB"))
    >>> prefixes = vattn.PrefixCache(cache)
    >>> prompt = list(range(100))
    >>> row, n_cached = prefixes.match(prompt)
    >>> cache.step({row: 100})  # then the forward pass over tokens n_cached to 99
    >>> prefixes.insert(row, prompt)
    >>> cache.free(row)
    >>> prefixes.match([*prompt, 7, 8, 9])
    PrefixMatch(row=0, n_cached=100)
    >>> prefixes.stats().hit_tokens
    100
    >>> cache.close()
    """

    def __init__(self, cache: KVCache, *, block_tokens: int | None = None) -> None:
        if cache.config.has_window:
            raise ValueError(
                "the cache has a sliding window, whose rows forget their first tokens; "
                "use a cache without window"
            )
        if block_tokens is None:
            # Of regions that differ this takes the mean, which is near enough for an index.
            page_tokens = cache.page_bytes * cache.regions_per_row // cache.token_bytes
            block_tokens = min(max(page_tokens, MIN_BLOCK_TOKENS), MAX_BLOCK_TOKENS)
        _check_int("block_tokens", block_tokens, 1)
        self._cache = cache
        self._core = cache._core
        self._lock = threading.Lock()  # guards what follows; taken before the cache's
        self._index = PrefixIndex(block_tokens)
        self._stats = PrefixStats()

    def match(self, token_ids: Any, *, salt: Any = None, stream: Any = None) -> PrefixMatch:
        """Get a row for a new request, with the KV of as many of its first tokens as there is.

        Parameters
        ----------
        token_ids : list, tuple, numpy array or torch CPU tensor of int, shape (tokens,)
            The prompt, at least one token.
        salt : str, bytes or int, optional
            Only what was inserted with an equal salt is found.
        stream : torch.cuda.Stream or int, optional
            As in :meth:`vattn.KVCache.alloc`: the request's work comes after the work before.

        Returns
        -------
        PrefixMatch
            ``row`` is active in any case and has ``n_cached`` tokens, at most all but the last,
            which must be computed to know what follows it. Continue with
            ``cache.step({row: len(token_ids)})`` and end with ``cache.free(row)``.

        Raises
        ------
        OutOfRowsError
            Every row is active.
        ValueError, TypeError
            No tokens, or more than ``max_seq_len``; ids that are not ints of at least 0 in one
            dimension; a salt of another type.
        DriverError
            The driver failed. Nothing changed.
        """
        prompt = Prompt(pack_ids(token_ids), pack_salt(salt))
        limit = self._cache.config.max_seq_len
        if not 1 <= len(prompt) <= limit:
            raise ValueError(
                f"token_ids has {len(prompt)} entries, expected 1 to max_seq_len = {limit}"
            )
        handle = stream_handle(stream, self._cache.config)
        self._check_process()
        with self._lock:
            found = self._take_cached(prompt, handle)
            if found is None:
                found = PrefixMatch(self._core.alloc(len(prompt), handle), 0)
            self._count(
                lookups=1,
                hits=int(found.n_cached > 0),
                lookup_tokens=len(prompt),
                hit_tokens=found.n_cached,
            )
            return found

    def insert(self, row: int, token_ids: Any, *, salt: Any = None) -> None:
        """Let later requests find the tokens of a row, while it is active and when it is idle.

        Call it when the work that computes these tokens was submitted. Replaces what was known of
        the row; a call with more tokens than before costs only the added ones.

        Parameters
        ----------
        row : int
            An active row.
        token_ids : list, tuple, numpy array or torch CPU tensor of int, shape (tokens,)
            The tokens whose KV the row holds, from its first on, at least one. Not the last sampled
            one, whose KV is not there yet.
        salt : str, bytes or int, optional
            Only a ``match`` with an equal salt finds them.

        Raises
        ------
        ValueError, TypeError
            The row is not active or has fewer tokens; ids or salt as in ``match``. Nothing changed.
        """
        prompt = Prompt(pack_ids(token_ids), pack_salt(salt))
        row = operator.index(row)
        self._check_process()
        with self._lock:
            digests = self._index.digests(prompt, row)
            life = self._core.keep_prefix(row, len(prompt))
            self._index.put(row, Entry(prompt.ids, prompt.salt, life, digests))

    def clear(self) -> None:
        """Forget all: no request finds anything, and idle rows are as any others."""
        self._check_process()
        with self._lock:
            for row, entry in self._index.entries.items():
                self._core.forget_prefix(row, entry.life)
            self._index.clear()

    def stats(self) -> PrefixStats:
        """Hits so far, and the size of the index."""
        self._check_process()
        with self._lock:
            entries, blocks = len(self._index.entries), self._index.n_blocks
            return replace(self._stats, entries=entries, indexed_blocks=blocks)

    def __repr__(self) -> str:
        return f"<vattn.PrefixCache blocks of {self._index.block_tokens} tokens of {self._cache!r}>"

    def _check_process(self) -> None:
        # Raises in a forked child, where another thread's lock would never be released.
        self._core.row_state(0)

    # The lock is held.

    def _take_cached(self, prompt: Prompt, stream: int) -> PrefixMatch | None:
        """Make an active row with tokens of the prompt. None: no row has any."""
        digests = self._index.known_digests(prompt)
        tried: set[int] = set()
        while True:
            # Each time anew: step() and alloc() of other threads take memory from idle rows.
            kept = self._core.kept_prefixes()
            best = self._index.best(prompt, digests, kept, self._is_idle, tried)
            if best is None:
                return None
            found = self._adopt_or_fork(best, stream)
            if found is not None:
                return found
            tried.add(best.row)

    def _adopt_or_fork(self, source: Candidate, stream: int) -> PrefixMatch | None:
        """Make an active row with the tokens of the source. None: it has changed meanwhile."""
        row, life, n = source.row, source.life, source.n_tokens
        if n == source.intact and self._core.adopt_prefix(row, life, n, stream):
            self._count(adopted=1)
            return PrefixMatch(row, n)
        try:
            forked = self._core.fork_prefix(row, life, n, stream)
        except OutOfRowsError:
            # There is no row but the source: alloc() would take it too, without its tokens.
            if not self._core.adopt_prefix(row, life, n, stream):
                return None
            self._count(adopted=1)
            return PrefixMatch(row, n)
        if forked is None:
            return None
        found = PrefixMatch(*forked)
        self._count(forked=int(found.n_cached > 0))
        return found

    def _is_idle(self, row: int) -> bool:
        return self._core.row_state(row) == "idle"

    def _count(self, **added: int) -> None:
        sums = {name: getattr(self._stats, name) + n for name, n in added.items()}
        self._stats = replace(self._stats, **sums)
