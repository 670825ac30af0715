"""Speculative token trees over the cache give what sequential decoding gives.

The model is one attention layer after another with random weights. A token's key has its position
in it, and that is its depth in the tree, not where it lies in the row.
"""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from torch.nn.functional import scaled_dot_product_attention as sdpa

pytestmark = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

LAYERS, HEADS, DIM, VOCABULARY = 2, 2, 64, 50
WIDTH = HEADS * DIM


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on several, and much slower where those are not free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Decoder:
    """Logits of tokens, whose keys and values go to a row of a cache."""

    def __init__(self, cache):
        generator = torch.Generator().manual_seed(5)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float32)

        self.cache = cache
        self.embedding = random(VOCABULARY, WIDTH)
        self.positions = random(4096, WIDTH) / 2
        self.weights = random(LAYERS, 3, WIDTH, WIDTH) / WIDTH**0.5

    def forward(self, row, tokens, positions, mask):
        """Logits of tokens that become the last ones of a row.

        mask[i, j]: whether token i may see token j of the row.
        """
        n_new = len(tokens)
        n = self.cache.seq_lens[row] + n_new
        self.cache.step({row: n})
        x = self.embedding[tokens] + self.positions[positions]
        for layer in range(LAYERS):
            q, new_k, new_v = (
                (x @ w).view(n_new, HEADS, DIM).transpose(0, 1)[None] for w in self.weights[layer]
            )
            k, v = self.cache.kv(layer, rows=row, max_len=n)
            k[:, :, n - n_new :], v[:, :, n - n_new :] = new_k.to(k.device), new_v.to(v.device)
            out = sdpa(q, k.to(q.device), v.to(q.device), attn_mask=mask)
            x = x + out[0].transpose(0, 1).reshape(n_new, WIDTH)
        return x @ self.embedding.T

    def append(self, row, tokens):
        """Logits of tokens that follow those of the row, each seeing all before it."""
        start = self.cache.seq_lens[row]
        positions = torch.arange(start, start + len(tokens))
        mask = torch.arange(start + len(tokens)) <= positions[:, None]
        return self.forward(row, tokens, positions, mask)


def sequential(make_cache, prompt, n_new):
    """(tokens, logits) of greedy decoding, one by one, in a cache of its own."""
    decoder = Decoder(make_cache(order="HND"))
    row = decoder.cache.alloc()
    all_logits = [decoder.append(row, prompt)[-1]]
    tokens = [int(all_logits[0].argmax())]
    for _ in range(n_new - 1):
        all_logits.append(decoder.append(row, tokens[-1:])[-1])
        tokens.append(int(all_logits[-1].argmax()))
    return tokens, torch.stack(all_logits)


def draft_tree(root, correct):
    """Tokens and parents of a tree below the root: along the right path for a while, and astray.

    In the order of their depth, so that the right path is scattered.
    """
    tokens, parents, node = [root], [-1], 0
    for token in correct:
        first = len(tokens)
        tokens += [(token + 7) % VOCABULARY, token, (token + 3) % VOCABULARY]
        parents += [node] * 3
        tokens.append(token)  # right, but below a wrong one
        parents.append(first)
        node = first + 1
    return tokens, parents


def path_to(parents, node):
    """The nodes from the root to this one."""
    path = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


def accepted(tokens, parents, logits):
    """The path that greedy decoding would have taken, from the root on."""
    path = [0]
    while True:
        token = int(logits[path[-1]].argmax())
        following = [n for n in range(len(tokens)) if parents[n] == path[-1] and tokens[n] == token]
        if not following:
            return path
        path.append(following[0])


def by_forks(decoder, row, tokens, parents):
    """A branch for each path of the tree. The row that goes on, the path and its logits."""
    cache = decoder.cache
    leaves = [node for node in range(len(tokens)) if node not in parents]
    logits = torch.empty(len(tokens), VOCABULARY)
    branches = cache.fork(row, n=len(leaves))
    for branch, leaf in zip(branches, leaves, strict=True):
        path = path_to(parents, leaf)
        logits[path] = decoder.append(branch, [tokens[node] for node in path])
    path = accepted(tokens, parents, logits)
    winner = next(
        branch
        for branch, leaf in zip(branches, leaves, strict=True)
        if path_to(parents, leaf)[: len(path)] == path
    )
    cache.truncate(winner, cache.seq_lens[row] + len(path))
    for other in [row, *branches]:
        if other != winner:
            cache.free(other)
    return winner, path, logits[path]


def by_mask(decoder, row, tokens, parents):
    """The whole tree at the end of the row, in one forward pass under a mask."""
    cache = decoder.cache
    start = cache.seq_lens[row]
    mask = torch.zeros(len(tokens), start + len(tokens), dtype=torch.bool)
    mask[:, :start] = True
    for node in range(len(tokens)):
        mask[node, [start + other for other in path_to(parents, node)]] = True
    depths = torch.tensor([len(path_to(parents, node)) for node in range(len(tokens))])
    logits = decoder.forward(row, tokens, start + depths - 1, mask)
    path = accepted(tokens, parents, logits)
    cache.compact(row, [start + node for node in path], start=start)
    return row, path, logits[path]


@pytest.mark.parametrize("verify", [by_forks, by_mask])
def test_a_token_tree_decodes_what_sequential_decoding_does(make_cache, backend, verify):
    n_new, prompt = 20, torch.arange(backend.page_tokens + 11) * 7 % VOCABULARY
    expected, expected_logits = sequential(make_cache, prompt.tolist(), n_new)
    decoder = Decoder(
        make_cache(order="HND", max_extent_bytes=backend.page_bytes, max_batch_size=16)
    )
    cache, row = decoder.cache, decoder.cache.alloc()
    logits = [decoder.append(row, prompt.tolist())[-1:]]
    tokens = [int(logits[0].argmax())]
    (sample,) = cache.fork(row)
    for right in [0, 1, 4, 2, 3, 0, 4]:  # how far the draft model guesses right
        if len(tokens) >= n_new:
            break
        guess = expected[len(tokens) : len(tokens) + right]
        tree, parents = draft_tree(tokens[-1], [*guess, (tokens[-1] + 11) % VOCABULARY])
        before = cache.seq_lens[row]
        row, path, new_logits = verify(decoder, row, tree, parents)
        assert len(path) >= len(guess) + 1
        assert cache.seq_lens[row] == before + len(path)
        logits.append(new_logits)
        tokens += new_logits.argmax(dim=1).tolist()
        cache.check()
    assert len(tokens) >= n_new
    assert tokens[:n_new] == expected
    torch.testing.assert_close(torch.cat(logits)[:n_new], expected_logits, rtol=1e-4, atol=1e-4)
    # Nobody has written to the prompt's pages.
    again = decoder.append(sample, [expected[0]])
    torch.testing.assert_close(again[-1], expected_logits[1], rtol=1e-4, atol=1e-4)
