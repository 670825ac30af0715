"""The index of the prefix cache, with literals: which row it finds, and what it forgets."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from vattn import prefix_index
from vattn.prefix_index import Entry, PrefixIndex, Prompt, common_ids, pack_ids, pack_salt

BLOCK = 4


class Rows:
    """An index, and what the core would say of its rows."""

    def __init__(self, block_tokens=BLOCK):
        self.index = PrefixIndex(block_tokens)
        self.kept = [(0, 0)] * 64
        self.idle = set()
        self.is_idle = self.idle.__contains__
        self.lives = 0

    def insert(self, row, ids, salt=None, *, idle=False):
        prompt = Prompt(pack_ids(ids), pack_salt(salt))
        self.lives += 1
        digests = self.index.digests(prompt, row)
        self.index.put(row, Entry(prompt.ids, prompt.salt, self.lives, digests))
        self.kept[row] = self.lives, len(ids)
        self.idle.discard(row)
        if idle:
            self.idle.add(row)

    def lose(self, row, intact):
        self.kept[row] = self.kept[row][0], intact

    def find(self, ids, salt=None, skip=()):
        prompt = Prompt(pack_ids(ids), pack_salt(salt))
        digests = self.index.known_digests(prompt)
        best = self.index.best(prompt, digests, self.kept, self.is_idle, skip)
        return None if best is None else (best.row, best.n_tokens)


@pytest.fixture
def rows():
    return Rows()


def test_the_row_with_most_of_the_tokens_is_found(rows):
    rows.insert(0, range_list(0, 8))
    rows.insert(1, range_list(0, 20))
    rows.insert(2, [*range_list(0, 12), 99, 99, 99, 99])
    assert rows.find(range_list(0, 30)) == (1, 20)
    assert rows.find([*range_list(0, 13), 77, 77, 77]) == (1, 13)
    assert rows.find([*range_list(0, 12), 99, 99, 77, 77]) == (2, 14)
    assert rows.find(range_list(1, 30)) is None


def range_list(start, stop):
    return list(range(start, stop))


def test_the_last_token_of_a_request_is_left_to_be_computed(rows):
    rows.insert(0, range_list(0, 20))
    assert rows.find(range_list(0, 8)) == (0, 7)
    assert rows.find(range_list(0, 20)) == (0, 19)
    assert rows.find(range_list(0, 4)) == (0, 3)


def test_less_than_a_block_is_not_found(rows):
    rows.insert(0, range_list(0, 3))
    assert rows.find(range_list(0, 9)) is None
    rows.insert(0, range_list(0, 9))
    assert rows.find([0, 1, 2, 99, 99]) is None


def test_an_idle_row_that_is_wholly_continued_is_worth_a_block_more(rows):
    rows.insert(0, range_list(0, 9), idle=True)
    rows.insert(1, [*range_list(0, 12), 99])
    rows.insert(2, [*range_list(0, 12), 98])
    assert rows.find(range_list(0, 30)) == (0, 9)
    rows.insert(1, [*range_list(0, 14), 99])
    assert rows.find(range_list(0, 30)) == (1, 14)
    rows.insert(3, range_list(0, 9))  # as row 0, but active
    rows.insert(1, [*range_list(0, 10), 99])
    assert rows.find(range_list(0, 11), skip=[0, 2]) == (1, 10)
    rows.insert(4, [*range_list(0, 9), 97], idle=True)  # of which only a part is continued
    assert rows.find(range_list(0, 11), skip=[0, 2]) == (1, 10)


def test_of_two_idle_rows_that_are_continued_the_longer_one_is_found(rows):
    rows.insert(0, range_list(0, 10), idle=True)
    rows.insert(1, range_list(0, 11), idle=True)
    rows.insert(2, range_list(0, 9), idle=True)
    assert rows.find(range_list(0, 30)) == (1, 11)
    assert rows.find(range_list(0, 30), skip=[1]) == (0, 10)
    assert rows.find(range_list(0, 30), skip=[0, 1]) == (2, 9)
    assert rows.find(range_list(0, 30), skip=[0, 1, 2]) is None


def test_a_row_that_lost_its_end_is_found_for_the_rest(rows):
    rows.insert(0, range_list(0, 20))
    rows.insert(1, range_list(0, 12))
    rows.lose(0, 9)
    assert rows.find(range_list(0, 30)) == (1, 12)
    assert rows.index.n_blocks == 3
    assert rows.find(range_list(0, 30), skip=[1]) == (0, 9)
    rows.kept[0] = rows.kept[0][0], 20  # what is forgotten does not come back
    assert rows.find(range_list(0, 30), skip=[1]) == (0, 9)


@pytest.mark.parametrize("kept", [(99, 20), (0, 0), (1, 0)])
def test_a_row_whose_life_is_over_is_forgotten_when_it_is_met(rows, kept):
    rows.insert(0, range_list(0, 20))
    rows.kept[0] = kept
    assert rows.find(range_list(0, 30)) is None
    assert rows.index.entries == {}
    assert rows.index.n_blocks == 0


def test_a_row_has_one_entry(rows):
    rows.insert(0, range_list(0, 20))
    rows.insert(0, range_list(100, 108))
    assert rows.find(range_list(0, 30)) is None
    assert rows.find(range_list(100, 130)) == (0, 8)
    assert (len(rows.index.entries), rows.index.n_blocks) == (1, 2)
    rows.index.put(0, None)
    rows.index.put(0, None)
    assert (len(rows.index.entries), rows.index.n_blocks) == (0, 0)


def test_blocks_that_rows_share_are_counted_once(rows):
    rows.insert(0, range_list(0, 20))
    rows.insert(1, [*range_list(0, 12), 99, 99, 99, 99])
    assert rows.index.n_blocks == 6
    rows.index.put(0, None)
    assert rows.index.n_blocks == 4
    assert rows.find(range_list(0, 30)) == (1, 12)


@pytest.fixture
def hashed(monkeypatch):
    """What was hashed so far."""
    parts = []
    digest = prefix_index.digest
    monkeypatch.setattr(prefix_index, "digest", lambda *part: parts.append(part) or digest(*part))
    return parts


def test_extending_an_entry_hashes_the_new_blocks_only(rows, hashed):
    rows.insert(0, range_list(0, 18))
    assert len(hashed) == 5  # the salt and four blocks
    rows.insert(0, range_list(0, 29))
    assert len(hashed) == 8
    rows.insert(0, [*range_list(0, 9), *range_list(50, 60)])  # two blocks agree
    assert len(hashed) == 10
    rows.insert(0, range_list(0, 8))
    assert len(hashed) == 10
    rows.insert(0, range_list(0, 8), "salt")
    assert len(hashed) == 13
    fresh = Rows()
    fresh.insert(0, range_list(0, 8), "salt")
    assert fresh.index.entries[0].digests == rows.index.entries[0].digests


def test_a_request_is_hashed_as_far_as_it_is_known(rows, hashed):
    rows.insert(0, range_list(0, 8))
    hashed.clear()
    rows.find([*range_list(0, 8), *range_list(50, 80)])
    assert len(hashed) == 4  # the salt, two blocks, and one that nobody has


def test_a_hash_is_of_all_that_came_before_and_of_the_salt(rows):
    rows.insert(0, range_list(0, 12))
    rows.insert(1, [99, *range_list(1, 12)])
    assert rows.index.n_blocks == 6
    rows.insert(2, range_list(0, 12), "salt")
    assert rows.index.n_blocks == 9


@pytest.mark.parametrize("digest", [lambda *_: b"", lambda _, block: block[:8]])
def test_a_collision_finds_nothing_that_is_not_there(rows, monkeypatch, digest):
    monkeypatch.setattr(prefix_index, "digest", digest)
    rows.insert(0, range_list(0, 20), "mine")
    rows.insert(1, [0, 1, 2, 3, 99, 99, 99, 99], "yours")
    assert rows.find(range_list(50, 70), "mine") is None
    assert rows.find(range_list(0, 20), "yours") == (1, 4)
    assert rows.find([0, 5, 5, 5, 5], "mine") == (0, 1)  # true, if less than a block
    assert rows.find(range_list(0, 20)) is None
    rows.index.put(0, None)
    rows.index.put(1, None)
    assert rows.index.n_blocks == 0


def test_many_rows_with_the_same_tokens_are_not_all_looked_at(rows):
    looked_at = []
    rows.is_idle = lambda row: bool(looked_at.append(row))  # asked of rows that have no more
    for row in range(60):
        rows.insert(row, range_list(0, 4))
    assert rows.find(range_list(0, 30)) == (59, 4)  # the newest, which loses its memory last
    assert looked_at == list(range(59, 59 - prefix_index.MAX_ROWS_PER_LEVEL, -1))
    assert rows.find(range_list(0, 30), skip=range(1, 64)) == (0, 4)
    looked_at.clear()
    rows.insert(60, range_list(0, 16))
    assert rows.find(range_list(0, 30)) == (60, 16)  # nobody else can have more than 8 and a bonus
    assert looked_at == [60]


@pytest.mark.parametrize("salt", [None, "a", "", b"a", b"", 1, 0, "1", "None"])
def test_only_an_equal_salt_finds(rows, salt):
    rows.insert(0, range_list(0, 20), salt)
    for other in [None, "a", "", b"a", b"", 1, 0, "1", "None", -1, "A"]:
        same = other == salt and type(other) is type(salt)
        assert rows.find(range_list(0, 30), other) == ((0, 20) if same else None)


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        lambda ids: np.array(ids, dtype=np.int64),
        lambda ids: np.array(ids, dtype=np.int32),
        lambda ids: np.array(ids, dtype=np.uint16),
        lambda ids: np.array(ids, dtype=np.uint64),
        lambda ids: np.repeat(np.array(ids), 2)[::2],
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: torch.tensor(ids).repeat_interleave(2)[::2],
        lambda ids: [np.int64(token) for token in ids],
        lambda ids: array("l", ids),
    ],
)
def test_ids_come_in_every_usual_form(form):
    assert pack_ids(form([7, 300, 0])) == pack_ids([7, 300, 0])


BAD_IDS = [
    ([1, -5], ValueError, r"token_ids\[1\] is -5, expected at least 0; leave padding out"),
    (np.array([1, -5]), ValueError, r"token_ids\[1\] is -5"),
    ([1, 2.0], TypeError, r"token_ids\[1\] is 2.0, expected an int"),
    ([1, None], TypeError, r"token_ids\[1\] is None, expected an int"),
    ([[1, 2]], TypeError, r"token_ids\[0\] is \[1, 2\], expected an int"),
    ([0, 2**63], ValueError, r"token_ids\[1\] is 9223372036854775808, expected 0 to 2\*\*63 - 1"),
    (np.array([2**63], dtype=np.uint64), ValueError, r"token_ids\[0\] is 9223372036854775808"),
    (np.zeros(3), TypeError, "token_ids has elements of type 'd', expected a list"),
    (np.zeros(3, dtype=bool), TypeError, r"elements of type '\?'"),
    (np.zeros(3, dtype=">i8"), TypeError, "elements of type '>q'"),
    (torch.zeros(3), TypeError, "elements of type 'f'"),
    (np.zeros((1, 3), dtype=np.int64), ValueError, r"2 dimensions, expected shape \(tokens,\)"),
    (torch.tensor(5), ValueError, "0 dimensions"),
    ("12", TypeError, "token_ids is a str, expected a list, a tuple"),
    (None, TypeError, "token_ids is a NoneType"),
    (5, TypeError, "token_ids is a int"),
    ({1, 2}, TypeError, "token_ids is a set"),
]


@pytest.mark.parametrize(("ids", "error", "message"), BAD_IDS)
def test_bad_ids_are_named(ids, error, message):
    with pytest.raises(error, match=message):
        pack_ids(ids)


@pytest.mark.parametrize("salt", [1.5, ["a"], bytearray(b"a")])
def test_a_salt_of_another_type_is_refused_without_showing_it(salt):
    with pytest.raises(TypeError, match=r"salt is a \w+, expected None, a str, bytes or an int"):
        pack_salt(salt)


def test_common_ids_is_exact_to_the_token():
    ids = pack_ids(range_list(0, 1000))
    for differs_at in [0, 1, 2, 499, 500, 998, 999]:
        other = range_list(0, 1000)
        other[differs_at] = 5000
        assert common_ids(ids, pack_ids(other), limit=1000) == differs_at
        assert common_ids(ids, pack_ids(other), limit=differs_at) == differs_at
    assert common_ids(ids, ids, limit=1000) == 1000
    assert common_ids(ids, ids, limit=0) == 0
