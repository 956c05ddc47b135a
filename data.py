"""Data: from conversations on disk or on the Hub to the token ids of a batch.

A row's way through this file: a reader (a function and one line in `DATA_SETS`) turns a file's rows into `Thread`s
or `Preference`s, `render` turns messages into ids and a mask of what is learnt, `load_rows` and `load_pairs` drop,
shorten, split and count, `Order` says which rows a step has, and `pack` lays them end to end. The file begins with
the tokens and goes back to the files. A reader of the mathematics may stop at "From files to rows".

`uv run data.py SPEC` shows what a data set becomes. A SPEC is NAME, NAME:PATH or PATH, each with an optional #SPLIT
and then an optional @WEIGHT: `oasst1`, `oasst1:trees.jsonl.gz`, `chats.jsonl`, `smoltalk@0.5`, `FOLDER#train_prefs`.
PATH is a file or a folder that `datasets.load_dataset` reads: with NAME in that data set's own format, alone in any of
`CONVERSATIONS` or `PREFERENCES`, which are told apart by their keys. @0.5 takes every second conversation, by a hash.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import glob
import gzip
import hashlib
import heapq
import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import unicodedata
import warnings
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache, lru_cache, partial
from itertools import chain, combinations, islice, pairwise, product
from operator import attrgetter
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, get_type_hints

import tiktoken
import tiktoken.load
import tyro


class lazy:
    """`torch = lazy("torch")` imports torch when it is first used: --help must not wait two seconds for it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


np = lazy("numpy")
# before torch: MKL's products are then the same, bit for bit, from one thread and from two, and no slower
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

HERE = Path(__file__).parent
EOT = 50256                              # <|endoftext|>, the one control token
EOT_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
Conversation = list[dict]    # {"role": "system" | "user" | "assistant", "content": str}, and "weight": 0 if not learnt


# ---- the tokenizer -------------------------------------------------------------------------------

TOKENIZER = HERE / "sample" / "tokenizer"   # OpenAI's two files, by the names that Hugging Face gave them
SHA256 = {"merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
          "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@cache
def tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding, from the files that ship with the project, so that nothing is downloaded."""
    for name, wanted in SHA256.items():
        content = (TOKENIZER / name).read_bytes() if (TOKENIZER / name).is_file() else b""
        if hashlib.sha256(content).hexdigest() != wanted:
            raise FileNotFoundError(f"{TOKENIZER / name}, of the tokenizer, is {'damaged' if content else 'missing'}\n"
                                    f"Restore it:  git checkout {(TOKENIZER / name).relative_to(HERE)}")
    # tiktoken keeps a copy in the temporary folder, which it checks against the same sums
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*(str(TOKENIZER / name) for name in SHA256),
                                                          *SHA256.values())
    return tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, special_tokens={EOT_TEXT: EOT}, mergeable_ranks=ranks)


def clean(text: str) -> str:
    """Without white space at both ends, and without lone surrogates, which no encoding can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.strip()


def encode_all(texts: Iterable[str]) -> dict[str, np.ndarray]:
    """{text: its ids (n,) uint16}, each text encoded once however often it occurs, on all cores. No id is a control id.

    In parts: a task for every text takes two thirds as long again. What spells the control token is encoded by itself,
    for in a part the control token stands between the texts.
    """
    unique = list(dict.fromkeys(texts))
    parts = [unique[i:i + 256] for i in range(0, len(unique), 256)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {text: ids for part in pool.map(_encode_part, parts) for text, ids in part}


def _encode_part(texts: list[str]) -> list[tuple[str, np.ndarray]]:
    tokens = tokenizer()
    plain = [text for text in texts if EOT_TEXT not in text]
    ids = tokens.encode_to_numpy(EOT_TEXT.join(plain), allowed_special={EOT_TEXT}).astype(np.uint16)
    ends = [-1, *np.flatnonzero(ids == EOT), len(ids)]
    found = [(text, ids[a + 1:b]) for text, a, b in zip(plain, ends, ends[1:], strict=False)]
    return found + [(text, np.array(tokens.encode_ordinary(text), np.uint16)) for text in texts if EOT_TEXT in text]


def text_of(ids: Iterable[int]) -> str:
    """The text of ids, control token included. Ids that are none of GPT-2's, and split characters, become U+FFFD."""
    return b"".join(map(bytes_of, ids)).decode(errors="replace")


def bytes_of(token: int) -> bytes:
    """A token's bytes, which may be part of a character only."""
    known = 0 <= token <= EOT   # a vocabulary may be padded to a rounder number than GPT-2's
    return tokenizer().decode_single_token_bytes(int(token)) if known else "\N{REPLACEMENT CHARACTER}".encode()


def pieces(ids: Iterable[int]) -> list[tuple[str, int]]:
    """The text of ids as (piece, its tokens): a token each, or several where they share a character."""
    decoder, found, text, count = codecs.getincrementaldecoder("utf-8")("replace"), [], "", 0
    for token in ids:
        text, count = text + decoder.decode(bytes_of(token)), count + 1
        if not decoder.getstate()[0]:   # no bytes wait for the rest of their character
            found.append((text, count))
            text, count = "", 0
    return found + [(text + decoder.decode(b"", final=True), count)] * bool(count)


# ---- the chat template ---------------------------------------------------------------------------


def render(messages: Conversation, supervise: Sequence[bool] | None = None, reply: bool = False,
           encoded: dict[str, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """THE chat template: (ids int32 (T,), mask bool (T,)), where mask[t] says that ids[t] is to be learnt.

        ids   <|endoftext|> user \\n Two and two ? <|endoftext|> assistant \\n Four . <|endoftext|>
        mask        0         0   0  0   0   0  0        0           0      0   1  1       1

    <|endoftext|> opens every message and closes the conversation; that which follows a supervised message belongs to
    it, for a reply learns to end. Content never starts with white space, so a message's ids are those of its header
    and those of its content, and contents can be encoded apart (`encoded`, from `encode_all`).
    supervise: which messages are learnt, by default every assistant message. reply: end with the opening of an
    assistant message, which is what a model that is to reply is fed.
    """
    if supervise is None:
        supervise = [is_learnt(message) for message in messages]
    ids, mask, learnt = [], [], False   # learnt: whether the message before is, with the <|endoftext|> behind it
    for message, learn in zip(messages, supervise, strict=True):
        header, content = _header(message["role"]), _content(message["content"], encoded)
        ids += [header, content]
        mask += [(learnt, 1), (False, len(header) - 1), (learn, len(content))]
        learnt = learn
    tail = _header("assistant") if reply else [EOT]
    ids, mask = [*ids, tail], [*mask, (learnt, 1), (False, len(tail) - 1)]
    values, runs = zip(*mask, strict=True)
    return np.concatenate(ids, dtype=np.int32), np.repeat(np.array(values, bool), runs)


def is_learnt(message: dict) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


@cache
def _header(role: str) -> list[int]:
    """The ids that open a message of `role`, the control token included."""
    if role not in ROLES:
        raise ValueError(f"unknown role {visible(str(role))[:80]!r}, wanted one of {', '.join(ROLES)}")
    return [EOT, *tokenizer().encode_ordinary(f"{role}\n")]


def _content(text: str, encoded: dict[str, np.ndarray] | None) -> np.ndarray:
    """The ids of a message's content."""
    text = clean(text)
    return encoded[text] if encoded and text in encoded else np.array(tokenizer().encode_ordinary(text), np.uint16)


def exchanges(messages: Conversation) -> list[Conversation]:
    """The messages in exchanges: one begins where the user speaks after someone else did."""
    found: list[Conversation] = []
    for message in messages:
        if not found or message["role"] == "user" != found[-1][-1]["role"]:
            found.append([])
        found[-1].append(message)
    return found


def without_oldest(messages: Conversation, room: int, reply: bool = False,
                   encoded: dict[str, np.ndarray] | None = None) -> Conversation:
    """The conversation less its oldest whole exchanges, so that `render` gives at most `room` ids.

    Opening system messages stay, and so does the last exchange, be it too long or not.
    """
    opening = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    system, turns = messages[:opening], exchanges(messages[opening:])
    tail = len(_header("assistant")) if reply else 1
    system_size, *sizes = (sum(len(_header(message["role"])) + len(_content(message["content"], encoded))
                               for message in part) for part in (system, *turns))
    while len(turns) > 1 and system_size + sum(sizes) + tail > room:
        turns, sizes = turns[1:], sizes[1:]
    return [*system, *chain.from_iterable(turns)]


# ---- rows ----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """What would be computed by itself: a conversation, or a pair's prompt with one of its replies."""

    ids: np.ndarray         # (T,)
    targets: np.ndarray     # which of them are predicted
    key: object = None      # texts with the same key are computed once; None is no other's


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One conversation to learn from, at most `context` tokens of it."""

    ids: np.ndarray         # (T,) int32
    mask: np.ndarray        # (T,) bool: ids[t] is a target
    family: object = None   # the same for rows that begin alike: the threads of one tree

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learnt(self) -> int:
        return int(self.mask.sum())

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.ids, self.mask

    def texts(self) -> list[Text]:
        return [Text(self.ids, np.flatnonzero(self.mask[1:]) + 1)]      # nothing predicts a row's first token


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """One prompt and two replies of which the first was preferred; prompt and either reply fit the context together."""

    prompt: np.ndarray      # (P,) int32, ends with the opening of an assistant message
    chosen: np.ndarray      # (C,) int32, ends with EOT, as does
    rejected: np.ndarray    # (R,) int32

    def __len__(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def family(self) -> object:
        """The same for pairs of one prompt."""
        return self.prompt.tobytes()

    @property
    def learnt(self) -> int:
        return len(self.chosen) + len(self.rejected)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.prompt, self.chosen, self.rejected

    def texts(self) -> Iterator[Text]:
        """Of the chosen and of the rejected reply; the same reply in another pair is the same text."""
        for reply in (self.chosen, self.rejected):
            ids = np.concatenate([self.prompt, reply])
            yield Text(ids, np.arange(len(self.prompt), len(ids)), key=(ids.tobytes(), len(reply)))


class Rows(Sequence):
    """Rows (or pairs) that lie in a few flat arrays, three bytes a token; each is made when it is asked for.

    `store` has all rows of a load, read or mapped from the disk; `which` says which of them these are, in order:
        ids       (N,) uint16       all tokens
        mask      (N,) bool         of conversations
        ends      (R, k) int64      where a row's k arrays of tokens end: one of a conversation, three of a pair
        families  (R,) int32        the same for rows that begin alike; -1 is no other's
        learnt    (R,) int32        how many tokens are predicted
    """

    def __init__(self, store: dict[str, np.ndarray], which: np.ndarray):
        self.store, self.which = store, which

    @classmethod
    def of(cls, rows: Iterable[Row | Pair]) -> Rows:
        """All of these, laid down one after another: of many, no two are there as objects at a time."""
        (ids, mask, ends, families, learnt), numbers = (array(kind) for kind in "HBqii"), {}
        for row in rows:
            for part in row.arrays():
                if part.dtype == bool:
                    mask.frombytes(part.tobytes())
                else:
                    ids.frombytes(part.astype(np.uint16).tobytes())
                    ends.append(len(ids))
            name = digest_of(repr(row.family))
            families.append(-1 if row.family is None else numbers.setdefault(name, len(numbers)))
            learnt.append(row.learnt)
        store = {"ids": np.frombuffer(ids, np.uint16), "mask": np.frombuffer(mask, bool),
                 "ends": np.frombuffer(ends, np.int64).reshape(len(families), -1 if families else 1),
                 "families": np.frombuffer(families, np.int32), "learnt": np.frombuffer(learnt, np.int32)}
        return cls(store, np.arange(len(families)))

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self.store, self.which[i])
        n, ends = int(self.which[i]), self.store["ends"]
        cuts = [int(ends[n - 1, -1]) if n else 0, *map(int, ends[n])]
        parts = [self.store["ids"][a:b].astype(np.int32) for a, b in pairwise(cuts)]
        if len(parts) > 1:
            return Pair(*parts)
        family = int(self.store["families"][n])
        return Row(parts[0], np.array(self.store["mask"][cuts[0]:cuts[1]]), None if family < 0 else family)

    def __add__(self, others: Rows) -> Rows:
        return Rows(self.store, np.concatenate([self.which, others.which]))

    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each."""
        return np.diff(self.store["ends"][:, -1], prepend=0)[self.which]

    def learnt(self) -> int:
        """Tokens that are predicted, in all of them."""
        return int(self.store["learnt"][self.which].sum())

    def opened_by(self, role: str) -> int:
        """How many begin with a message of this role."""
        starts = np.append(0, self.store["ends"][:-1, -1])[self.which]
        return int((self.store["ids"][starts + 1] == _header(role)[1]).sum())


# ---- batches -------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Some of a batch's tokens, which attend causally to one another and wholly to the prefix before them."""

    tokens: int
    prefix: tuple[tuple[int, int], ...]     # ((n, k), ..): the first k tokens of the batch's span n, and so on


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows laid end to end, N tokens without padding, with M targets; what texts share from their start is here once.

    Two replies A and B to one prompt P, of 3, 2 and 2 tokens:

        tokens        P P P A A | B B       N = 7 and not 10
        positions     0 1 2 3 4 | 3 4       in the text that a token is of
        spans         Span(5, ())           P and A, which attend causally to themselves
                      Span(2, ((0, 3),))    B, which attends to itself and to the first 3 tokens of span 0
        targets       A A | B B             M = 4
        index         2 3 | 2 5             the token after which each target comes: B's first comes after P's last
        target_span   0 0 | 1 1
        pairs         [[0, 1]]              the chosen reply is in span 0, the rejected one in span 1

    Texts that share nothing are laid one behind the other. A reply that is in several pairs is one text for all.
    """

    tokens: np.ndarray          # (N,) int64
    positions: np.ndarray       # (N,) int64
    spans: tuple[Span, ...]     # a text's own end, each
    index: np.ndarray           # (M,) int64
    targets: np.ndarray         # (M,) int64, span by span
    target_span: np.ndarray     # (M,) int64: the span of the text that targets[m] is in
    pairs: np.ndarray           # (R, 2) int64: the spans of a pair's chosen and rejected reply; (0, 2) of conversations
    rows: np.ndarray            # (R,) int64: which rows of the data set these are
    row_tokens: int             # in all these rows, what they share counted for each


def pack(rows: Sequence[Row | Pair], indices: Iterable[int]) -> Batch:
    """The rows of these indices as one batch."""
    indices = [int(i) for i in indices]
    texts, members = different_texts(rows[i] for i in indices)
    tokens, positions, spans, index, targets, target_span, span_of = [], [], [], [], [], [], {}
    # of the text before: where in the batch each of its tokens is, and of which spans' tokens it is made
    place, made_of, start = np.zeros(0, np.int64), (), 0
    for n, shared in shared_beginnings([text.ids for text in texts]):
        ids, predicted, _ = texts[n]
        span_of[n], own = len(spans), len(ids) - shared
        spans.append(Span(own, first_tokens(shared, made_of)))
        made_of = (*spans[-1].prefix, (span_of[n], own))
        place = np.concatenate([place[:shared], np.arange(start, start + own)])
        start += own
        tokens.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        index.append(place[predicted - 1])
        targets.append(ids[predicted])
        target_span.append(np.full(len(predicted), span_of[n]))
    flat = [np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
            for parts in (tokens, positions, index, targets, target_span)]
    pairs = [[span_of[n] for n in both] for both in members if len(both) == 2]
    return Batch(flat[0], flat[1], tuple(spans), *flat[2:], np.array(pairs, np.int64).reshape(-1, 2),
                 np.array(indices, np.int64), sum(len(rows[i]) for i in indices))


WORTH_SHARING = 16  # tokens: less than that is computed sooner than split off


def shared_beginnings(texts: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """(which text, how many of its first tokens the text before it has too), in an order that makes these many.

    Sorted by their bytes, texts that begin alike lie side by side. One token at least is a text's own.
    """
    before = np.zeros(0, np.int32)
    for n in sorted(range(len(texts)), key=lambda n: texts[n].tobytes()):
        length = min(len(before), len(texts[n]) - 1)
        differing = np.flatnonzero(texts[n][:length] != before[:length])
        shared = int(differing[0]) if len(differing) else length
        yield n, shared if shared >= WORTH_SHARING else 0
        before = texts[n]


def different_texts(rows: Iterable[Row | Pair]) -> tuple[list[Text], list[list[int]]]:
    """The texts of these rows, and which of them each row has.

    A reply that several pairs have is one text. A conversation that is there twice is two, for its loss counts twice.
    """
    texts, places, members = [], {}, []
    for row in rows:
        members.append([])
        for text in row.texts():
            n = len(texts) if text.key is None else places.setdefault(text.key, len(texts))
            if n == len(texts):
                texts.append(text)
            members[-1].append(n)
    return texts, members


def first_tokens(count: int, spans: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The first `count` tokens of these (span, tokens)."""
    kept = []
    for n, length in spans:
        if count > 0:
            kept.append((n, min(length, count)))
        count -= length
    return tuple(kept)


# ---- the rows of a step --------------------------------------------------------------------------


def three_passes(rows: int) -> tuple[int, int]:
    """(batch size, steps) to go three times over so few rows: enough to learn from them, too little to recite them."""
    batch_size = min(max(2, rows // 12), 32)
    return batch_size, math.ceil(3 * rows / batch_size)


class Order:
    """The rows of each step, by seed and step alone: nothing has to be saved to resume.

    An endless stream of epochs, each of which visits every row once; steps may cross epochs. An epoch shuffles the
    families, so that rows that begin alike come one after another and what they share is computed once. Ouyang et al.
    2022 (https://arxiv.org/abs/2203.02155, section 3.5) keep all comparisons of a prompt together for the same reason.
    But a large family is dealt out in parts of `TOGETHER`: everybody's data has its hundred trees that begin with "Hi",
    and a step of nothing else would be a jump in the curves.
    """

    TOGETHER = 8  # of real trees that many at a time share nearly as much as all

    def __init__(self, rows: Sequence[Row | Pair], batch_size: int, seed: int):
        self.families, self.batch_size, self.seed = families(rows), batch_size, seed

    # a step has rows of one epoch or of two; and an order lives as long as its run
    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, number: int) -> np.ndarray:
        """(rows,) indices: parts of families in random turn, and the rows of each family in random order."""
        rng, rows = np.random.default_rng((self.seed, number)), len(self.families)
        order = np.lexsort((rng.random(rows), self.families))
        family = self.families[order]
        nth = np.arange(rows) - np.searchsorted(family, family)                # of its family
        part = np.cumsum(nth % self.TOGETHER == 0) - 1
        turn = rng.permutation(part[-1] + 1)
        return order[np.argsort(turn[part], kind="stable")]

    def __call__(self, step: int) -> np.ndarray:
        """(batch_size,) indices."""
        rows, at = len(self.families), range(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self.epoch(p // rows)[p % rows] for p in at], np.int64)


def families(rows: Sequence[Row | Pair]) -> np.ndarray:
    """(rows,) numbers from 0, the same for rows that begin alike: the threads of one tree, the pairs of one prompt."""
    numbers = {}
    known = rows.store["families"][rows.which].tolist() if isinstance(rows, Rows) else [row.family for row in rows]
    names = ((n,) if family in (None, -1) else family for n, family in enumerate(known))
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def micro_batches(rows: Sequence[Row | Pair], indices: Iterable[int], token_budget: int) -> list[Batch]:
    """These rows in batches of at most `token_budget` tokens each (a single row may have more)."""
    return into_batches(rows, divide(rows, indices, token_budget), token_budget)


def divide(rows: Sequence[Row | Pair], indices: Iterable[int], token_budget: int) -> list[tuple[int, list[int]]]:
    """(tokens, rows) that are computed together, largest first: families, halved until they fit the budget."""
    indices, found, parts = [int(i) for i in indices], defaultdict(list), []
    for i, family in zip(indices, families([rows[i] for i in indices]).tolist(), strict=True):
        found[family].append(i)
    todo = list(found.values())
    for members in todo:    # which grows as it goes
        size, half = tokens_computed(rows[i] for i in members), len(members) // 2
        if half and size > token_budget:
            todo += [members[:half], members[half:]]
        else:
            parts.append((size, members))
    return sorted(parts, key=lambda part: -part[0])


def into_batches(rows: Sequence[Row | Pair], largest_first: list[tuple[int, list[int]]],
                 token_budget: int) -> list[Batch]:
    """The parts that `divide` gives, in as few and as even batches as can be had cheaply.

    Largest parts first, each into the batch that has the fewest tokens; again with more batches if that overflows.
    """
    total = sum(min(size, token_budget) for size, _ in largest_first)
    count = max(math.ceil(total / token_budget), sum(size > token_budget / 2 for size, _ in largest_first))
    while largest_first:
        bins = [(0, b, []) for b in range(count)]      # a heap: the emptiest comes first
        for size, members in largest_first:
            filled, b, others = bins[0]
            heapq.heapreplace(bins, (filled + size, b, others + members))
        if all(size <= token_budget or len(members) == 1 for size, _, members in bins):
            return [pack(rows, members) for _, _, members in sorted(bins, key=lambda bin: bin[1]) if members]
        count += 1 + count // 32
    return []


def tokens_computed(rows: Iterable[Row | Pair]) -> int:
    """The tokens of a batch of these rows."""
    texts = [text.ids for text in different_texts(rows)[0]]
    return sum(len(texts[n]) - shared for n, shared in shared_beginnings(texts))


# ======== From files to rows. A reader of the mathematics may stop here. ==========================

# ---- from conversations to rows ------------------------------------------------------------------


@dataclass(kw_only=True)
class Reading:
    """How data sets are read: settings that sft.py, dpo.py and data.py have in common."""

    context: int = 1024  # tokens of a row at most; longer conversations lose their oldest exchanges
    val_fraction: float = 0.05  # share of the conversation trees held out for validation
    seed: int = 0  # order of the rows, split, dropout and LoRA's first values
    bad_rows: Literal["error", "skip"] = "error"  # what a malformed row of a data file does
    language: str = "en"  # which of OASST's

    def limits(self) -> dict[str, tuple[bool, str]]:
        """{setting: (whether it makes sense, what does)}"""
        return bounds(self, ("1 or more", ("context",), lambda value: value >= 1),
                      ("0 or more and below 1", ("val_fraction",), lambda value: 0 <= value < 1),
                      ("0 or more and below 2^63", ("seed",), lambda value: 0 <= value < 2**63))


@dataclass
class Data:
    """What training needs of its data. Rows of one conversation tree are all in train or all in val."""

    train: Sequence[Row] | Sequence[Pair]
    val: Sequence[Row] | Sequence[Pair]
    counts: list[Count] # what became of the rows, by SPEC
    fingerprint: str    # sha256 over all ids and masks in order: a resumed run must see the same data

    @property
    def report(self) -> Count:
        """What became of the rows of all SPECs."""
        return Count(" ".join(count.spec for count in self.counts), kept=sum(count.kept for count in self.counts),
                     dropped=sum((count.dropped for count in self.counts), Counter()),
                     notes=sum((count.notes for count in self.counts), Counter()),
                     unused=sum((count.unused for count in self.counts), Counter()))

    def report_json(self) -> dict:
        """The counts, and what the rows are like: lengths in tokens (of a pair, both replies and the prompt once)."""
        rows = self.train + self.val
        rows = rows if isinstance(rows, Rows) else Rows.of(rows)
        lengths, learnt = rows.lengths(), rows.learnt()
        tokens, longest = int(lengths.sum()), int(lengths.max())
        return self.report.as_json() | {
            "train": len(self.train), "val": len(self.val), "tokens": tokens, "supervised_tokens": learnt,
            "supervised_share": round(learnt / tokens, 4), "system_messages": rows.opened_by("system"),
            "length": {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 25, 50, 75, 95)} | {"max": longest},
            "specs": [count.as_json() for count in self.counts], "fingerprint": self.fingerprint}


def load_rows(specs: Sequence[str], reading: Reading | None = None) -> Data:
    """The conversations of all SPECs as rows."""
    return kept_or_read(specs, "conversations", build_row, reading or Reading())


def load_pairs(specs: Sequence[str], reading: Reading | None = None) -> Data:
    """The preferences of all SPECs as pairs."""
    return kept_or_read(specs, "preferences", build_pair, reading or Reading())


def read_rows(specs: Sequence[str], what: str, build: Callable, reading: Reading) -> Data:
    """Read each SPEC, build its rows, and split them by their trees."""
    counts, seen, sides, copies = [], set(), array("d"), array("i")

    def built() -> Iterator[Row | Pair]:
        for spec in specs:
            counts.append(count := Count(visible(spec), reading.bad_rows))
            for candidate, encoded, side, times in candidates(spec, what, count, reading):
                try:
                    yield build(candidate, encoded, count, reading.context, seen)
                    sides.append(side)
                    copies.append(times)
                    count.kept += 1
                except Drop as drop:
                    count.drop(drop.args[0])
            count.notes = +count.notes      # less those that are zero

    rows = Rows.of(built())
    if not sides:
        reasons = sum((count.dropped for count in counts), Counter()).most_common(5)
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in reasons) or "it has none"
        first = next((f"\nfor example  {c.first_bad}" for c in counts if c.first_bad), "")
        raise ValueError(f"no {what} are left of {excerpt(' '.join(specs))}: {reasons}{first}")
    # however small the data set, there is a tree to validate on and one to train on
    several = np.unique(sides := np.array(sides))
    threshold = max(reading.val_fraction, several[0] + 2**-53) if reading.val_fraction and len(several) > 1 else 0.0
    threshold = min(threshold, several[-1])
    train, val = np.flatnonzero(sides >= threshold), np.flatnonzero(sides < threshold)
    train, val = Rows(rows.store, np.repeat(train, np.array(copies)[train])), Rows(rows.store, val)
    return Data(train, val, counts, rows_sha256(train, val))


def candidates(spec: str, what: str, count: Count,
               reading: Reading) -> Iterator[tuple[Thread | Preference, dict[str, np.ndarray], float, int]]:
    """What a SPEC's weight takes, each with the ids of its texts, the side of its tree, and how often it is taken."""
    name, path, weight = parse_spec(spec)
    reader = reader_of(name, what)
    found = iter(reader(open_spec(name, path, count.notes), count, reading.language))
    while chunk := list(islice(found, 4096)):      # bounded, for a data set may have a million
        copies = [int(weight) + (luck(reading.seed, c.content) < weight % 1) for c in chunk]
        taken = [(c, n) for c, n in zip(chunk, copies, strict=True) if n]
        count.drop("left out by its weight", len(chunk) - len(taken))
        encoded = encode_all(text for candidate, _ in taken for text in candidate.texts())
        yield from ((candidate, encoded, luck(reading.seed, first_question(candidate.messages)), n)
                    for candidate, n in taken)


def first_question(messages: Conversation) -> str:
    """What decides a tree's side: trees whose users ask the same first are one, in whatever data sets they are."""
    first = next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])
    return " ".join(first.casefold().split())


def build_row(thread: Thread, encoded: dict, count: Count, context: int, seen: set) -> Row:
    """Too long a thread loses its oldest exchanges before it loses the end of its last reply, and with that the EOT.

    `seen` holds the messages that are learnt in rows before this one, for a turn that threads share is learnt once, and
    the conversations without names for their messages.
    """
    if thread.keys is None:
        first_time(thread.content, "conversation", seen)
    messages = without_oldest(thread.messages, context, encoded=encoded)
    keys = thread.keys and thread.keys[-len(messages):]     # OASST has no system messages: what is lost was in front
    learn = [is_learnt(m) and not (keys and keys[i] in seen) for i, m in enumerate(messages)]
    if not any(learn):
        raise Drop(thread.cut or "every reply is learnt in another row")
    ids, mask = render(messages, learn, encoded=encoded)
    row = Row(ids[:context], mask[:context], keys[0] if keys else None)
    if not row.mask.any():
        raise Drop("no reply within the context")
    seen.update(key for key, used in zip(keys or (), learn, strict=False) if used)
    count.notes["lost its oldest exchanges"] += len(messages) < len(thread.messages)
    count.notes["lost the end of its last reply"] += len(ids) > context
    count.notes["cut at the last good reply"] += thread.cut is not None
    return row


def build_pair(pair: Preference, encoded: dict, count: Count, context: int, seen: set) -> Pair:
    """Too long a prompt loses its oldest exchanges, then the start of its last message. Both replies stay whole."""
    first_time(pair.key or pair.content, "pair", seen)
    chosen, rejected = (np.append(encoded[reply], EOT).astype(np.int32) for reply in (pair.chosen, pair.rejected))
    room = context - max(len(chosen), len(rejected))
    messages = without_oldest(pair.messages, room, reply=True, encoded=encoded)
    prompt, _ = render(messages, reply=True, encoded=encoded)
    if len(prompt) > room:
        last = len(encoded[messages[-1]["content"]])
        if len(prompt) - room >= last:
            raise Drop("replies too long for the context")
        start = len(prompt) - len(_header("assistant")) - last
        prompt = np.delete(prompt, slice(start, start + len(prompt) - room))
        count.notes["lost the start of its prompt's last message"] += 1
    count.notes["lost its oldest exchanges"] += len(messages) < len(pair.messages)
    return Pair(prompt, chosen, rejected)


def first_time(content: Any, what: str, seen: set) -> None:
    """What several files, or several splits of a data set, have counts once."""
    if (name := digest_of(repr(content))) in seen:
        raise Drop(f"the same {what} was read before")
    seen.add(name)


def luck(seed: int, text: str) -> float:
    """A number in [0, 1), as good as drawn at random, and for the same text always the same."""
    return (int.from_bytes(digest_of(f"{seed}\0{text}")[:8], "big") >> 11) / 2**53


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def rows_sha256(*sides: Sequence[Row | Pair]) -> str:
    digest = hashlib.sha256()
    for rows in sides:
        digest.update(len(rows).to_bytes(8, "big"))
        for row in rows:
            for part in row.arrays():
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part.tobytes())
    return digest.hexdigest()


# ---- rows that are kept --------------------------------------------------------------------------

HOME = os.path.expanduser("~")  # "~" of somebody without one, for whom nothing can be kept
KEPT = Path(os.environ.get("XDG_CACHE_HOME") or (os.devnull if HOME == "~" else f"{HOME}/.cache"), "gpt2-chat", "rows")
KEPT_AFTER = 5.0            # seconds of reading, from which the rows are kept for the next run
KEPT_BYTES = 8 << 30        # of all that is kept; what was used longest ago goes first


def kept_or_read(specs: Sequence[str], what: str, build: Callable, reading: Reading) -> Data:
    """The rows that an earlier run made of the same files with the same settings and code; else read anew, and kept.

    Of several processes one reads, and the others wait for it. Where nothing can be kept, every run reads anew.
    """
    from filelock import FileLock, Timeout

    check_limits(reading)
    specs = [specs] if isinstance(specs, str) else list(specs)
    began, several = time.monotonic(), int(os.environ.get("WORLD_SIZE", 1)) > 1
    lock, name = FileLock(KEPT / ".lock"), rows_name(specs, what, reading)
    with ExitStack() as stack:
        if several:
            with suppress(OSError):
                stack.enter_context(lock)
        if name and (kept := _kept(KEPT / name)):
            return kept
        found, now = read_rows(specs, what, build, reading), rows_name(specs, what, reading)
        worth_it = several or time.monotonic() - began >= KEPT_AFTER
        if worth_it and now and name in (None, now):
            with suppress(OSError, Timeout), lock.acquire(timeout=0):
                _keep(found, now)
                return _kept(KEPT / now) or found
        return found


def rows_name(specs: Sequence[str], what: str, reading: Reading) -> str | None:
    """A name for the rows of these SPECs, by all that they depend on; None where that is not known.

    Files are known by size, times and number, as make and git know them: to read them for a sum would take half of the
    time that is saved, and a file that changes without its ctime takes another clock. Readers are known by this file.
    """
    files = []
    for name, path, _ in map(parse_spec, specs):
        if DATA_SETS[name] is not SHIPPED.get(name):
            return None
        with suppress(OSError, ValueError):     # reading says what is wrong with them
            place = find_rows(name, path)[0] or hub_folder(DATA_SETS[name])
            if place is None:
                return None
            for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
                about = file.stat()
                files.append((file.name, about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino))
    settings = {f.name: getattr(reading, f.name) for f in fields(Reading)}
    return digest_of(repr((list(specs), what, settings, files, file_sha256(Path(__file__))))).hex()


def _keep(found: Data, name: str) -> None:
    """Write the rows down, and make room for them."""
    arrays = found.train.store | {"train": found.train.which, "val": found.val.which}
    size = sum(array.nbytes for array in arrays.values())
    for leftover in KEPT.glob(".*.tmp"):    # of a process that was killed
        remove(leftover)
    taken = sum(file.stat().st_size for file in KEPT.glob("*/*"))
    for oldest in (path.parent for path in sorted(KEPT.glob("*/about.json"), key=os.path.getmtime)):
        if oldest.name != name and taken + size > KEPT_BYTES:
            taken -= sum(file.stat().st_size for file in oldest.iterdir())
            remove(oldest)
    if taken + size > KEPT_BYTES or shutil.disk_usage(KEPT).free < 2 * size:
        return
    remove(KEPT / name)
    with written_whole(KEPT / name) as temporary:
        temporary.mkdir()
        for key, values in arrays.items():
            np.save(temporary / f"{key}.npy", values)
        about = {"counts": list(map(vars, found.counts)), "fingerprint": found.fingerprint,
                 "files": {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}}
        seal = digest_of(json.dumps(about)).hex()
        (temporary / "about.json").write_text(json.dumps([about, seal]), encoding="utf-8")


def _kept(folder: Path) -> Data | None:
    """The rows in a folder, mapped from the disk, if every file is as it was written."""
    try:
        about, seal = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        sums = {name: file_sha256(folder / name) for name in about["files"]}
        if (seal, sums) != (digest_of(json.dumps(about)).hex(), about["files"]):
            return None
        arrays = {Path(name).stem: np.load(folder / name, mmap_mode="r") for name in about["files"]}
        which = [Rows(arrays, np.array(arrays.pop(side))) for side in ("train", "val")]
        counts = [Count(**{key: Counter(value) if isinstance(value, dict) else value for key, value in count.items()})
                  for count in about["counts"]]
        with suppress(OSError):
            os.utime(folder / "about.json")     # used now
        return Data(*which, counts, about["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- what readers give ---------------------------------------------------------------------------


@dataclass(slots=True)
class Thread:
    """A conversation that ends with an assistant's message."""

    messages: Conversation
    keys: list[str] | None = None       # a name for each message, by which one in several threads is learnt once
    cut: str | None = None              # why the thread does not go on, if something that followed was dropped

    @property
    def content(self) -> str:
        return repr(self.messages)

    def texts(self) -> list[str]:
        return [message["content"] for message in self.messages]


@dataclass(slots=True)
class Preference:
    """Two replies to one conversation so far."""

    messages: Conversation
    chosen: str
    rejected: str
    key: tuple[str, str] | None = None

    @property
    def content(self) -> str:
        return repr((self.messages, self.chosen, self.rejected))

    def texts(self) -> list[str]:
        return [*(message["content"] for message in self.messages), self.chosen, self.rejected]


class Drop(Exception):
    """A row that is well formed and is not used. Its argument is the reason under which it is counted."""


class BadRow(Drop):
    """A row that breaks its format: an error, or with --bad-rows skip a drop. Arguments: reason, what is wrong."""


# ---- what a reader may use -----------------------------------------------------------------------


@dataclass
class Count:
    """What became of the rows of one SPEC: kept + dropped = read.

    What is counted are the conversations (or pairs) that could have come out. A row of a file is one, readable or not.
    Of an OASST tree each path from the first message to a leaf is one, or as far as the first message that is dropped;
    for pairs each two ranked siblings, and each reply that is not compared. Orphans and cycles count by the message.
    """

    spec: str
    bad_rows: Literal["error", "skip", ""] = "error"    # "": an error, and no skipping is offered
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)     # what was done to rows that were kept, and other remarks
    unused: Counter = field(default_factory=Counter)    # keys of the rows that have no meaning here
    first_bad: str = ""

    def drop(self, reason: str, times: int = 1) -> None:
        if times:
            self.dropped[reason] += times

    def as_json(self) -> dict:
        return {"spec": self.spec, "kept": self.kept, "dropped": dict(self.dropped.most_common()),
                "read": self.kept + self.dropped.total(), "notes": dict(self.notes.most_common()),
                "unused": dict(self.unused.most_common(20))}


FileRow = tuple[str, Any, Any]      # the place (file:line), the row as it stands there, the row read or a BadRow
Reader = Callable[[Iterable[FileRow], Count, str], Iterator[Thread] | Iterator[Preference]]


def rows_read(rows: Iterable[FileRow], read_one: Callable[[dict], Any], count: Count) -> Iterator[Any]:
    """read_one(row) of every row; what it refuses is counted, or raised where bad rows are errors."""
    for place, raw, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            yield read_one(row)
        except BadRow as bad:
            reason, wrong = bad.args
            what = f"{place}: {wrong}\n  the row: {excerpt(raw)}"
            if count.bad_rows != "skip":
                skip = ", or leave such rows out with --bad-rows skip" if count.bad_rows else ""
                raise ValueError(f"{what}\nMend it{skip}") from None
            count.first_bad = count.first_bad or what
            count.drop(f"bad row: {reason}")
        except Drop as drop:
            count.drop(drop.args[0])


def row_by_row(read_one: Callable[[dict], Thread | Preference]) -> Reader:
    """A reader for data sets of which every row stands alone."""
    return lambda rows, count, language: rows_read(rows, read_one, count)


LONGEST_TEXT = 1_000_000        # characters of one message: some 250,000 tokens, far beyond any context
LONGEST_LINE = 1 << 26          # bytes of one line of a file, 64 MiB
LONGEST_FILE = 1 << 30          # bytes of a file that is read at once, since it is one JSON list: 1 GiB
DEEPEST = 200                   # messages from the first to the last of a conversation tree
MOST_SIBLINGS = 32              # ranked replies to one message that are compared, each with each


def want(row: Any, *keys: str) -> list:
    """The values of these keys."""
    if not isinstance(row, dict):
        raise BadRow("not an object", f"found {kind(row)}, wanted an object with the keys {', '.join(keys)}")
    if any(key not in row for key in keys):
        raise wrong_keys(row, ", ".join(keys))
    return [row[key] for key in keys]


def wrong_keys(row: dict, wanted: str) -> BadRow:
    found = ", ".join(excerpt(key)[:40] for key in sorted(row)[:12]) or "none"
    return BadRow("wrong keys", f"keys found: {found}; keys wanted: {wanted}")


# who speaks, in whatever words; "tool" is whatever is no talk between two
SPEAKERS = {name: role for role, names in {
    "system": "system developer", "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bing bard model bot chatbot",
    "tool": "tool function observation function_call function_response tool_call tool_response"}.items()
    for name in names.split()}


def as_messages(value: Any, key: str) -> Conversation:
    """A list of {"role", "content"}, or ShareGPT's {"from", "value"}, checked.

    Empty messages are left in, but for empty system messages. Only text is learnt here: tools and images are not.
    """
    if not isinstance(value, list) or not value:
        raise BadRow("wrong type", f"{key} is {kind(value) if value != [] else 'empty'}, wanted a list of messages")
    messages = []
    for message in value:
        who, what = ("from", "value") if isinstance(message, dict) and message.get("from") else ("role", "content")
        speaker = message.get(who) if isinstance(message, dict) else None
        role = SPEAKERS.get(speaker.casefold()) if isinstance(speaker, str) else None
        if role == "tool" or (role and (message.get("tool_calls") or message.get("function_call"))):
            raise Drop("tool calls")
        _, content = want(message, who, what)
        if role is None:
            raise BadRow("unknown role", f"{key} has the role {excerpt(speaker)!r}, wanted one of {', '.join(ROLES)}")
        content = as_text(joined_parts(content), "content")
        if content or role != "system":
            messages.append({"role": role, "content": content} | ({} if is_yes(message, "weight") else {"weight": 0}))
    return messages


def joined_parts(content: Any) -> Any:
    """Content as the APIs write it: null is no text, and of a list of parts the text is taken."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return "" if content is None else content
    for part in content:
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise Drop("content that is no text")
        of_type(*want(part, "text"), "a part's text", str)
    return "".join(part["text"] for part in content)


def as_text(value: Any, key: str) -> str:
    if len(of_type(value, key, str)) > LONGEST_TEXT:
        raise Drop(f"a message over {LONGEST_TEXT:,} characters")
    return clean(value)


def is_yes(row: dict, key: str) -> bool:
    """What a label or a weight says; where there is none, yes."""
    value = row.get(key)
    if value is None:
        return True
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise BadRow(f"no such {key}", f"{key} is {excerpt(value)}, wanted 0 or 1, false or true")


def until_last_reply(messages: Conversation) -> Conversation:
    """The conversation up to the last assistant message that is to be learnt, before anything empty."""
    empty = next((i for i, m in enumerate(messages) if not m["content"]), len(messages))
    end = next((i for i in range(empty, 0, -1) if is_learnt(messages[i - 1])), 0)
    if not end:
        raise Drop("empty message" if empty < len(messages) else
                   "no reply has a weight" if any(m["role"] == "assistant" for m in messages) else "no reply")
    return messages[:end]


def preference(better: Conversation, worse: Conversation) -> Preference:
    """Two conversations that differ in nothing but the assistant's last reply."""
    if not better or not worse or better[-1]["role"] != "assistant" or worse[-1]["role"] != "assistant":
        raise Drop("no reply at the end")
    if better[:-1] != worse[:-1]:
        raise Drop("the sides differ before the last reply")
    return comparison(better[:-1], better[-1]["content"], worse[-1]["content"])


def comparison(prompt: Conversation, chosen: str, rejected: str, key: tuple[str, str] | None = None) -> Preference:
    if not any(message["role"] == "user" and message["content"] for message in prompt):
        raise Drop("no prompt")
    if not all(message["content"] for message in prompt):
        raise Drop("empty message")
    if not chosen or not rejected:
        raise Drop("empty reply")
    if chosen == rejected:
        raise Drop("identical replies")
    return Preference(prompt, chosen, rejected, key)


JSON_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
              float: "a number", type(None): "null"}     # as JSON calls them


def kind(value: Any) -> str:
    return JSON_NAMES.get(type(value), type(value).__name__)


def of_type(value: Any, key: str, wanted: type) -> Any:
    """The value, if it is of this type."""
    if not isinstance(value, wanted):
        raise BadRow("wrong type", f"{key} is {kind(value)}, wanted {JSON_NAMES[wanted]}")
    return value


def excerpt(raw: Any) -> str:
    """The first 80 characters of a row, fit to be shown."""
    try:
        raw = raw[:400].decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)[:400]
    except RecursionError:
        raw = kind(raw)
    return visible(" ".join(raw.split()))[:80]


# ---- what people have, told by its keys -----------------------------------------------------------

# Layouts by the names that the report gives them: a conversation, or a prompt and its reply; a prompt and two replies.
CONVERSATIONS = {
    "messages": ("messages",), "ShareGPT": ("conversations",), "conversation": ("conversation",),
    "prompt, completion": ("prompt", "completion"), "prompt, response": ("prompt", "response"),
    "Alpaca": ("instruction", "output"), "Dolly": ("instruction", "response"),
    "question, answer": ("question", "answer"), "question, response": ("question", "response")}
PREFERENCES = {
    **{f"{name}, chosen, rejected": (key, "chosen", "rejected") for name, key in
       (("prompt", "prompt"), ("ShareGPT", "conversations"), ("Alpaca", "instruction"), ("question", "question"))},
    "chosen, rejected": ("chosen", "rejected"),
    "OpenAI's preferences": ("input", "preferred_output", "non_preferred_output")}
LABELLED = {f"{name} with labels (KTO)": (*keys, "label") for name, keys in CONVERSATIONS.items()}
OURS = ("messages", "prompt, chosen, rejected", "chosen, rejected")     # which nobody needs to be told of
SYSTEM, MORE = ("system", "system_prompt"), ("input", "context")    # columns of a system message; of more of a question
IN_MESSAGES = {"role", "content", "from", "value", "weight", "tool_calls", "function_call", "messages"}
EMPTY = (None, "", [], {})      # values that say nothing
HINTS = {"message_tree_id": "OASST? write oasst1:PATH", "completions": "UltraFeedback? write ultrafeedback:PATH",
         "chosen": "preferences? add --pairs, or use dpo.py", "preferred_output": "preferences? use dpo.py"}


def layout_of(row: dict, layouts: dict[str, tuple[str, ...]]) -> str | None:
    """The first of these whose keys the row has, not null if that can be: a table has all its columns in every row."""
    keys_there = {key for key, value in row.items() if value is not None}, set(row)
    return next((name for there in keys_there for name, keys in layouts.items() if there.issuperset(keys)), None)


def read_layout(row: dict, layouts: dict[str, tuple[str, ...]], count: Count) -> list[Conversation]:
    """The conversation of a row, or both of a pair. Which layout it has, and what is not used of it, is counted."""
    if not isinstance(row, dict):
        want(row, *next(iter(layouts.values())))
    if (name := layout_of(row, layouts)) is None:
        wanted = ", or ".join(" and ".join(keys) for keys in layouts.values() if "label" not in keys)
        hints = [hint for key, hint in HINTS.items() if key in row and key not in chain(*layouts.values())]
        if layout_of(row, CONVERSATIONS):
            hints.append("conversations? use sft.py, and PATH alone")
        raise wrong_keys(row, wanted + "".join(f"  ({hint})" for hint in hints[:1]))
    keys = ["prompt"] * (name == "chosen, rejected") + [key for key in layouts[name] if key != "label"]
    count.notes[f"read as {name}"] += name not in OURS
    more = MORE if isinstance(row.get(keys[0]), str) else ()
    label = () if name in PREFERENCES else ("label",)
    count.unused.update(unused(row, {*keys, *more, *label, *SYSTEM, "weight"}))
    if not is_yes(row, "weight"):
        raise Drop("its weight is 0")
    if len(keys) == 1:
        talks = [as_messages(row[keys[0]], keys[0])]
    else:
        prompt, replies = answered(row, *keys)
        # a prompt is not learnt, even where the assistant speaks in it: so it is in TRL
        prompt = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
        talks = [prompt + reply for reply in replies]
    system = [{"role": "system", "content": as_text(row[key], key)} for key in SYSTEM if row.get(key) not in EMPTY]
    return [[m for m in system if m["content"] and m not in talk] + talk for talk in talks]


def unused(row: dict, known: set[str]) -> set[str]:
    """The keys of a row, and of the messages in it, that have no meaning here."""
    inner = [row.get(key) for key in known]
    for value in inner:     # which grows as it goes
        inner += value if isinstance(value, list) else [value.get("messages")] if isinstance(value, dict) else []
    parts = [(row, known, ""), *((m, IN_MESSAGES, " of a message") for m in inner if isinstance(m, dict))]
    return {f"{excerpt(key)[:40]}{where}" for part, known, where in parts
            for key, value in part.items() if key not in known and value not in EMPTY}


def answered(row: dict, ask: str, *replies: str) -> tuple[Conversation, list[Conversation]]:
    """A row's prompt, and each of its replies: text, transcripts in HH-RLHF's manner, or messages.

    Replies may repeat the prompt, or be whole conversations, of which a prompt that is text is part.
    """
    prompt, texts = row.get(ask), [row[key] for key in replies]
    if prompt is None and len(replies) == 1:
        prompt = ""     # what is asked may stand in `input` alone
    if isinstance(prompt, str):
        prompt = "\n\n".join(as_text(row[key], key) for key in dict.fromkeys((ask, *MORE)) if row.get(key) not in EMPTY)
        again = re.compile(re.escape(prompt) + r"\s")     # of three words at least: "Hi there" may be a reply to "Hi"
        if len(prompt.split()) > 2 and all(isinstance(text, str) and again.match(text.lstrip()) for text in texts):
            texts = [text.lstrip()[len(prompt):] for text in texts]
    sides = [as_turns(text, key, "assistant") for text, key in zip(texts, replies, strict=True)]
    if prompt is None and not any(message["role"] == "user" for side in sides for message in side):
        raise wrong_keys(row, f"{ask} too, for these are no transcripts (Human: ... Assistant: ...)")
    before = [] if prompt is None else as_turns(prompt, ask, "user")
    if before and before[-1] == {"role": "assistant", "content": ""}:
        before.pop()                    # a transcript that ends with "Assistant:"
    if isinstance(prompt, str) and all(side and side[0]["role"] != "assistant" for side in sides):
        before = []
    elif all(side[:len(before)] == before for side in sides):
        sides = [side[len(before):] for side in sides]
    return before, sides


def as_turns(value: Any, key: str, role: str) -> Conversation:
    """Messages, also in an object as OpenAI has them; one message; a transcript; or a text of this role."""
    if isinstance(value, dict):
        value = value.get("messages", [value])
    if isinstance(value, list):
        return as_messages(value, key)
    text = as_text("" if value is None else value, key)
    opening, turns = turns_of(text)
    return turns if not opening and len({turn["role"] for turn in turns}) == 2 else [{"role": role, "content": text}]


def turns_of(transcript: str) -> tuple[str, Conversation]:
    """What stands before the first turn, and the turns, which open with a blank line and Human: or Assistant:"""
    opening, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript)
    return opening.strip(), [{"role": "user" if who == "Human" else "assistant", "content": clean(said)}
                             for who, said in zip(turns[::2], turns[1::2], strict=True)]


def read_conversations(rows: Iterable[FileRow], count: Count, language: str,
                       layouts: dict[str, tuple[str, ...]] = CONVERSATIONS) -> Iterator[Thread]:
    def read_one(row):
        [messages] = read_layout(row, layouts, count)
        if not is_yes(row, "label"):
            raise Drop("its label is false: a reply that was not wanted")
        kept = until_last_reply(messages)
        return Thread(kept, cut=None if kept[-1] is messages[-1] else "no reply")
    return rows_read(rows, read_one, count)


read_messages = partial(read_conversations, layouts={"messages": CONVERSATIONS["messages"]})


def read_preferences(rows: Iterable[FileRow], count: Count, language: str) -> Iterator[Preference]:
    """Pairs; of labelled replies (KTO), each wanted one against each unwanted one to the same prompt."""
    labelled = defaultdict(lambda: ([], []))        # a prompt as JSON: its unwanted and its wanted replies

    def read_one(row):
        talk, *worse = read_layout(row, PREFERENCES | LABELLED, count)
        if worse:
            return preference(talk, *worse)
        if row["label"] is None:
            raise Drop("no label")
        if not talk or talk[-1]["role"] != "assistant":
            raise Drop("no reply at the end")
        labelled[json.dumps(talk[:-1])][is_yes(row, "label")].append(talk[-1]["content"])

    yield from filter(None, rows_read(rows, read_one, count))
    for prompt, sides in labelled.items():
        if not all(sides):
            count.drop("no reply of the other label to its prompt", sum(map(len, sides)))
        else:
            count.drop(f"beyond {MOST_SIBLINGS} replies of a label", sum(len(side[MOST_SIBLINGS:]) for side in sides))
        for worse, better in product(*(side[:MOST_SIBLINGS] for side in sides)):
            try:
                yield comparison(json.loads(prompt), better, worse)
            except Drop as drop:
                count.drop(drop.args[0])


# ---- HH-RLHF, UltraFeedback ----------------------------------------------------------------------


@row_by_row
def read_hh(row: dict) -> Preference:
    """HH-RLHF: {"chosen", "rejected"}, each a transcript."""
    sides = []
    for key, transcript in zip(("chosen", "rejected"), want(row, "chosen", "rejected"), strict=True):
        opening, turns = turns_of(as_text(transcript, key))
        if opening or not turns:
            raise Drop("text before the first turn" if opening else "empty transcript")
        sides.append(turns)
    return preference(*sides)


ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


@row_by_row
def read_ultrafeedback(row: dict) -> Preference:
    """UltraFeedback: the completion with the highest mean rating against that with the lowest.

    The mean is over the four aspects as far as they were rated; not its overall score, whose tens are partly ones.
    """
    instruction, completions = want(row, "instruction", "completions")
    rated = []
    for completion in of_type(completions, "completions", list):
        response, annotations = want(completion, "response", "annotations")
        given = map(of_type(annotations, "annotations", dict).get, ASPECTS)
        ratings = [aspect.get("Rating") for aspect in given if isinstance(aspect, dict)]
        scores = [float(rating) for rating in ratings      # strings as a rule, some of them "N/A"
                  if isinstance(rating, str | int | float) and re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", str(rating))]
        if scores and (reply := as_text(response, "response")):
            rated.append((sum(scores) / len(scores), reply))
    if len(rated) < 2:
        raise Drop("fewer than two rated replies")
    best, worst = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
    if best[0] == worst[0]:
        raise Drop("tied ratings")
    return comparison([{"role": "user", "content": as_text(instruction, "instruction")}], best[1], worst[1])


# ---- OASST ---------------------------------------------------------------------------------------

BAD = "bad replies, which only preferences use"  # they failed their review, but people ranked them too: last, rightly


@dataclass(slots=True)
class Message:
    """A message of an OASST tree. `defect` says why it is not used, if it is not."""

    id: str
    parent: str | None
    role: str
    text: str
    rank: int | None
    defect: str | None
    replies: list[Message] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {"role": self.role, "content": self.text}


def read_oasst(rows: Iterable[FileRow], count: Count, language: str) -> Iterator[Thread]:
    """OASST conversations. A path that ends in something dropped is cut at its last good assistant message.

    Whole paths come first, and longer cut ones before shorter: where every reply of a cut path is part of a path
    before it, `build_row` finds nothing left to learn and drops it, for the reason of the cut.
    """
    for root in oasst_trees(rows, count, language):
        whole, shortened = [], []       # (path, why it is cut, if it is)
        for path, defect in oasst_walk(root):
            if defect or not path[-1].replies:
                unanswered = len(path) % 2      # for the two take turns
                cut = defect or ("no reply" if unanswered else None)
                (shortened if cut else whole).append((path[:len(path) - unanswered], cut))
        for path, cut in whole + sorted(shortened, key=lambda end: -len(end[0])):
            if path:
                yield Thread([m.as_dict() for m in path], [m.id for m in path], cut)
            else:
                count.drop(cut)


def read_oasst_pairs(rows: Iterable[FileRow], count: Count, language: str) -> Iterator[Preference]:
    """OASST ranks: of two ranked siblings the one of lower rank is better; the conversation so far is the prompt.

    A reply that failed its review may be the worse one, never the better.
    """
    for path, defect in chain.from_iterable(map(oasst_walk, oasst_trees(rows, count, language))):
        count.drop(defect, defect not in (None, BAD))
        if defect or path[-1].role == "assistant":
            continue
        siblings = [m for m in path[-1].replies
                    if m.role == "assistant" and m.defect in (None, BAD, "failed review")]
        ranked = [m for m in siblings if m.rank is not None]
        count.drop("no rank", len(siblings) - len(ranked))
        count.drop("nothing to compare with", len(ranked) == 1)
        count.drop(f"beyond the best {MOST_SIBLINGS} siblings", max(0, len(ranked) - MOST_SIBLINGS))
        for better, worse in combinations(ranked[:MOST_SIBLINGS], 2):
            try:
                if better.rank == worse.rank:
                    raise Drop("tied ranks")
                if better.defect:
                    raise Drop("both replies bad" if worse.defect else "better reply failed review")
                yield comparison([m.as_dict() for m in path], better.text, worse.text, (better.id, worse.id))
            except Drop as drop:
                count.drop(drop.args[0])


def oasst_walk(root: Message) -> Iterator[tuple[tuple[Message, ...], str | None]]:
    """Down a tree, best replies first: (path to a good message, None), or (path before a bad one, what it suffers)."""
    todo = [(root, ())]
    while todo:
        message, path = todo.pop()
        speaker = path[-1].role if path else "assistant"
        defect = message.defect or ("out of turn" if message.role == speaker else None)
        if len(path) == DEEPEST:
            defect = f"deeper than {DEEPEST} messages"
        if not defect:
            path = (*path, message)
            todo += [(reply, path) for reply in reversed(message.replies)]
        yield path, defect


def oasst_trees(rows: Iterable[FileRow], count: Count, language: str) -> list[Message]:
    """First messages by id, with their replies by rank (unranked ones last) and id; every message once."""
    messages: dict[str, Message] = {}
    for message in chain.from_iterable(rows_read(rows, lambda row: oasst_messages(row, language), count)):
        if messages.setdefault(message.id, message) is not message:
            count.notes["messages that were there already"] += 1
    count.notes["messages read"] += len(messages)
    roots, orphans = [], []
    for message in sorted(messages.values(), key=lambda m: (m.rank is None, m.rank or 0, m.id)):
        parent = messages.get(message.parent)
        (roots if message.parent is None else parent.replies if parent else orphans).append(message)

    def below(tops: list[Message]) -> int:
        found = list(tops)
        for message in found:   # which grows as it goes
            found += message.replies
        return len(found)

    lost = below(orphans)
    count.drop("orphan", lost)
    count.drop("cycle", len(messages) - lost - below(roots))
    return sorted(roots, key=lambda m: m.id)


def oasst_messages(row: dict, language: str) -> list[Message]:
    """The messages of one row: of a nested tree {"message_tree_id", "prompt": {..., "replies"}} all, else the one."""
    nested = isinstance(row, dict) and isinstance(row.get("prompt"), dict)
    todo = [(row["prompt"] if nested else row, None)]
    messages = []
    while todo:
        raw, parent = todo.pop()
        text, role = want(raw, "text", "role", *(() if nested else ("message_id", "parent_id")))[:2]
        if role not in ("prompter", "assistant"):
            raise BadRow("unknown role", f"role is {excerpt(role)!r}, wanted prompter or assistant")
        text, rank = as_text(text, "text"), raw.get("rank")
        parent = parent if nested else raw["parent_id"]
        name = raw.get("message_id") or hashlib.sha256(repr((parent, role, text)).encode()).hexdigest()
        replies = (raw.get("replies") or []) if nested else []
        if not (isinstance(name, str) and isinstance(parent, str | None) and isinstance(rank, int | float | None)
                and isinstance(replies, list)):
            raise BadRow("wrong type", "wanted strings as message_id and parent_id, a number or null as rank, "
                                       "a list of replies")
        rank = None if rank != rank else rank      # pandas writes NaN for null
        failed = BAD if role == "assistant" and rank is not None else "failed review"
        defect = ("tree given up" if row.get("tree_state") in ("aborted_low_grade", "halted_by_moderator") else
                  "deleted" if raw.get("deleted") else
                  failed if raw.get("review_result") is False else
                  "spam" if spam(raw.get("labels")) >= 0.5 else
                  "other language" if (raw.get("lang") or language) != language else
                  "empty message" if not text else None)
        messages.append(Message(name, parent, "user" if role == "prompter" else role, text, rank, defect))
        todo += [(reply, name) for reply in replies]
    return messages


def spam(labels: Any) -> float:
    """The share of reviewers who called a message spam: in trees, and in the two ways in which the Hub has it."""
    shares = []
    match labels:
        case {"spam": {"value": share}}:
            shares = [share]
        case {"name": list(names), "value": list(values)}:
            shares = [value for name, value in zip(names, values, strict=False) if name == "spam"]
        case [*items]:
            shares = [item.get("value") for item in items if isinstance(item, dict) and item.get("name") == "spam"]
    return max((share for share in shares if isinstance(share, int | float)), default=0.0)


# ---- data sets and where they are ----------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    conversations: Reader | None = None
    preferences: Reader | None = None
    licence: str = ""                       # as the Hub has it
    file: Path | None = None                # where it is, if it came with the project
    hub: str | None = None                  # and if not
    files: tuple[str, ...] = ("data/*.parquet",)    # which of the Hub's files
    config: str | None = None
    columns: tuple[str, ...] | None = None  # the Hub's columns that are read, where the others are many


OASST_COLUMNS = ("message_id", "parent_id", "text", "role", "lang", "review_result", "deleted", "rank", "labels",
                 "tree_state")
DATA_SETS = {
    "sample": DataSet(read_oasst, read_oasst_pairs, "mit", file=HERE / "sample" / "conversations.jsonl.gz"),
    "oasst1": DataSet(read_oasst, read_oasst_pairs, "apache-2.0", hub="OpenAssistant/oasst1", columns=OASST_COLUMNS),
    "oasst2": DataSet(read_oasst, read_oasst_pairs, "apache-2.0", hub="OpenAssistant/oasst2", columns=OASST_COLUMNS),
    "smoltalk": DataSet(read_messages, None, "apache-2.0", hub="HuggingFaceTB/smoltalk",
                        files=("data/all/*.parquet",), config="all"),
    "smol-smoltalk": DataSet(read_messages, None, "apache-2.0", hub="HuggingFaceTB/smol-smoltalk",
                             columns=("messages",)),
    "everyday-conversations": DataSet(read_messages, None, "apache-2.0",
                                      hub="HuggingFaceTB/everyday-conversations-llama3.1-2k", columns=("messages",)),
    "hh-rlhf": DataSet(None, read_hh, "mit", hub="Anthropic/hh-rlhf", files=("*/train.jsonl.gz", "*/test.jsonl.gz")),
    "ultrafeedback": DataSet(None, read_ultrafeedback, "mit", hub="openbmb/UltraFeedback", files=("*.jsonl",),
                             columns=("instruction", "completions")),
    "jsonl": DataSet(read_conversations, read_preferences),     # what a PATH without a NAME is
}
SHIPPED = dict(DATA_SETS)   # without those that others add
TABLES = (".parquet", ".arrow", ".csv")     # the files that load_dataset reads here one by one
BLANK = b" \t\r\n\xef\xbb\xbf"              # of a line; the mark that Windows puts first, too
PATIENCE = 10                               # seconds that the Hub has to answer the first question


def parse_spec(spec: str) -> tuple[str, Path | None, float]:
    """NAME, NAME:PATH or PATH, with an optional #SPLIT and @WEIGHT -> (name, path with its split or None, weight)."""
    source, weight = spec, 1.0
    if (match := re.fullmatch(r"(.+)@(\d{1,9}(?:\.\d{,9})?)", spec, re.DOTALL)) and not os.path.exists(spec):
        source, weight = match[1], float(match[2])
        if not 0 < weight <= 100:
            raise ValueError(f"the weight of {excerpt(spec)!r} must be a number above 0 and at most 100")
    name, mark, path = re.fullmatch(r"([^:#]*)([:#]?)(.*)", source, re.DOTALL).groups()
    if name in DATA_SETS and (path or source == name) and source.partition("#")[0] != "jsonl":
        return name, Path(mark.strip(":") + path) if path else None, weight
    hub, mark, split = source.partition("#")
    with suppress(OSError, ValueError):     # what stands here goes before what the Hub has
        for name, data_set in DATA_SETS.items():
            if data_set.hub == hub and not Path(hub).exists():
                return name, Path(mark + split) if split else None, weight
    return "jsonl", Path(source), weight


def check_specs(specs: Sequence[str], what: str) -> None:
    """Refuse SPECs that can be seen to hold no conversations (or preferences); reads no row and asks no network."""
    if not specs:
        raise ValueError("--data names no data set")
    for name, path, _ in map(parse_spec, specs):
        reader_of(name, what)
        find_rows(name, path)


def reader_of(name: str, what: str) -> Reader:
    reader = getattr(DATA_SETS[name], what)
    if reader is None:
        able = ", ".join(n for n, data_set in DATA_SETS.items() if getattr(data_set, what) and n != "jsonl")
        raise ValueError(f"{name} holds no {what}\nThese do: {able}, or your own PATH.jsonl")
    return reader


def open_spec(name: str, path: Path | None, notes: Counter) -> Iterator[FileRow]:
    """The rows of a data set, from wherever it is; which of several splits they are is noted."""
    (path, split), data_set = find_rows(name, path), DATA_SETS[name]
    if path is None:
        return hub_rows(name, data_set, split, notes)
    if path.is_dir() or path.suffix.lower() in TABLES:
        return folder_rows(path, data_set, split, notes)
    return watched(file_rows(path), f"reading {visible(str(path))[:200]}", size_unpacked(path),
                   lambda row: len(row[1]) if isinstance(row[1], bytes) else 0)


def find_rows(name: str, path: Path | None) -> tuple[Path | None, str]:
    """The file or folder of a data set, None if that is the Hub's, and the split that is asked for."""
    split, folder, file = "", False, False
    with suppress(OSError, ValueError):     # a name that no file can have
        if path and "#" in path.name and not path.exists():
            whole, _, split = str(path).rpartition("#")
            path = Path(whole) if whole or name == "jsonl" else None
        path = path or DATA_SETS[name].file
        if path is None:
            return None, split
        folder, file = path.is_dir() and path != Path(), path.is_file()
    shown = visible(str(path))[:200]
    if file and split and path.suffix.lower() not in TABLES:
        raise ValueError(f"{shown} is a file and has no splits, so #{visible(split)[:80]} means nothing")
    if folder or file:
        return path, split
    if name == "jsonl":
        raise not_found(path)
    makes = "\nMake it:  uv run sample/make.py" if name == "sample" else ""
    raise FileNotFoundError(f"{name}: there is no file or folder {shown!r} (in {Path.cwd()}){makes}")


def not_found(path: Path) -> FileNotFoundError:
    """What is wrong with a PATH that is none: its file, the NAME before its colon, or the NAME it was meant for."""
    shown, (name, colon, rest), near, makes = visible(str(path))[:200], str(path).partition(":"), [], ""
    known = "Known names: " + ", ".join(n for n in DATA_SETS if n != "jsonl")
    with suppress(OSError, ValueError):
        near = [str(path.with_name(n)) for n in difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)]
    if colon and rest and re.fullmatch(r"[\w-]{2,}", name):
        what, near = f"no data set is called {name!r}", difflib.get_close_matches(name, DATA_SETS, n=1)
        near = [f"{n}:{rest}" for n in near]
    elif path.suffix or len(path.parts) != 1:
        what = f"no file is called {shown!r} (in {Path.cwd()})"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            makes = ("\nData sets of the Hub are read from a folder: uv run hf download --repo-type dataset "
                     f"{path} --local-dir data/{path.name}")
    else:
        what = f"no data set and no file is called {shown!r} (in {Path.cwd()})"
        near = difflib.get_close_matches(str(path), DATA_SETS, n=1) or near
    means = "".join(f"Did you mean {n}?  " for n in near if n != str(path))     # which a broken link is
    return FileNotFoundError(f"{what}\n{means}{known}{makes}")


def file_rows(path: Path) -> Iterator[FileRow]:
    """The rows of a .jsonl, .jsonl.gz or .json file, each line by itself, whatever it holds; or of one JSON list."""
    refuse_pointers(path)
    shown, zipped = visible(str(path))[:200], is_gzip(path)
    number = rows = 0
    with gzip.open(path) if zipped else open(path, "rb") as file:
        if (listed := one_value(file, shown)) is not None:
            yield from ((f"{shown}[{i}]", row, row) for i, row in enumerate(listed))
            return
        while True:
            number, line = number + 1, b""
            try:
                line = rest = file.readline(LONGEST_LINE)
                while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
                    rest = file.readline(LONGEST_LINE)
            except (OSError, EOFError, zlib.error) as error:
                yield f"{shown}:{number}", line, BadRow("unreadable", f"the file cannot be read on: {error}")
                return
            if not line:
                break
            if line.strip(BLANK):
                rows += 1
                yield f"{shown}:{number}", line, parse_json(line)
    if not rows:
        raise ValueError(f"{shown} is empty; wanted one JSON object a line")


def watched(rows: Iterable[FileRow], what: str, total: int, size: Callable) -> Iterator[FileRow]:
    """The rows, with a bar where they are many; size(row) is what a row is of the total."""
    with progress(what, total) as advance:
        for row in rows:
            yield row
            advance(size(row))


def size_unpacked(path: Path) -> int:
    """Bytes; gzip has them at its end, up to 4 GiB."""
    size = path.stat().st_size
    if not is_gzip(path):
        return size
    with open(path, "rb") as file:
        file.seek(max(0, size - 4))
        return int.from_bytes(file.read(), "little")


def one_value(file: IO[bytes], shown: str) -> list | None:
    """The rows of a file that is one JSON list, or one object over many lines; None if it goes by lines."""
    with suppress(OSError, EOFError, zlib.error):   # what cannot be read is told of line by line
        lines = (line for line in iter(lambda: file.readline(LONGEST_LINE), b"") if line.strip(BLANK))
        first = next(lines, b"")
        begin, row = first.lstrip(BLANK)[:1], parse_json(first)
        others = [] if isinstance(row, dict) else [*islice(lines, 3)]
        file.seek(0)
        if isinstance(row, dict) or not first:
            return None
        text = file.read(LONGEST_FILE) if begin in (b"[", b"{") else first
        file.seek(0)
        if len(text) == LONGEST_FILE and begin == b"[":
            raise ValueError(f"{shown} is one JSON list of {LONGEST_FILE >> 20:,} MiB or more. As JSONL it is read:\n"
                             "python -c \"import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]\" "
                             f"< {shown} > {shown}l")
        match parse_json(text):
            case {**value}:
                return [value]
            case [] | [{}, *_] as rows:
                return rows
            case BadRow() as bad if isinstance(row, BadRow) and begin == b"[":
                raise ValueError(f"{shown} begins as a JSON list and is none: {bad.args[1]}\n"
                                 "Mend it, or fetch it once more if a download broke off")
            case BadRow() if all(isinstance(r, BadRow) for r in (row, *map(parse_json, others))) and (
                    others or row.args[0] == "not UTF-8"):  # one line of text may be a row to mend
                raise ValueError(f"{shown}:1: {row.args[1]}\n  the row: {excerpt(first)}\nNor are the next lines. "
                                 "Make it JSONL, also gzipped, or name it what it is: .csv, .parquet or .arrow")
    return None


def refuse_pointers(*files: Path) -> None:
    """git-lfs leaves a few lines of text in the place of a large file until that is fetched."""
    for file in files:
        with suppress(OSError), open(file, "rb") as opened_file:
            if opened_file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{visible(str(file))[:200]} is a git-lfs pointer, not the file itself.\n"
                                 "Fetch that, in its repository:  git lfs pull")


def parse_json(line: bytes) -> Any:
    if len(line) == LONGEST_LINE:
        return BadRow("too long a line", f"the line has {LONGEST_LINE:,} bytes or more")
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"not UTF-8 text (byte {error.start}: 0x{line[error.start]:02x})")
    except RecursionError:
        return BadRow("nested too deeply", "lists and objects are nested too deeply")
    except ValueError as error:
        return BadRow("not JSON", f"not JSON: {str(error)[:100]}")


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def folder_rows(path: Path, data_set: DataSet, split: str, notes: Counter) -> Iterator[FileRow]:
    """The rows of a folder (or of a table's file) as `load_dataset` reads it, of one split or of all."""
    import datasets

    source, files = visible(str(path))[:200], [*path.rglob("*")] if path.is_dir() else [path]
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)   # its errors are told below
    refuse_pointers(*files)
    if path.is_dir() and glob.has_magic(str(path.absolute())):
        raise ValueError(f"{source}: load_dataset takes *, ? and [ in a folder's name for a pattern, so rename it")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if path.is_file():
            kind, words = path.suffix[1:].lower(), {"keep_default_na": False, "na_values": [""]}    # NA, None are words
            splits = datasets.load_dataset(kind, data_files=glob.escape(str(path)), **(words if kind == "csv" else {}))
        else:
            configs = datasets.get_dataset_config_names(str(path))
            splits = datasets.load_dataset(str(path), data_set.config if data_set.config in configs else None)
    except Exception as error:      # anything at all, for anything at all may lie in a folder
        raise ValueError(f"{source}: load_dataset cannot read it.\n"
                         "Wanted parquet or JSON files that share their columns, or the name of one file") from error
    if split and split not in splits:
        raise ValueError(f"{source} has no split {visible(split)[:80]!r}; it has {', '.join(splits)}")
    kind = next(iter(splits.values())).info.builder_name
    notes["files that are not of the folder's main kind, not read"] += sum(
        f.suffix not in (f".{kind}", f".{kind}l") for f in files if f.suffix in (*TABLES, ".json", ".jsonl"))
    for name in [split] if split else splits:
        table = splits[name]
        notes[f"rows of the split {name}"] += len(table) * (len(splits) > 1)    # some have the same in several
        columns = [column for column in data_set.columns or () if column in table.column_names]
        table = (table.select_columns(columns) if columns else table).with_format("arrow")
        mixed = datasets.Features({key: of for key, of in table.features.items() if "Json(" in repr(of)})
        rows = (row for batch in table.iter(batch_size=1000) for row in batch.to_pylist())
        if mixed:   # else their text comes with JSON's quotes
            rows = map(lambda row, of=mixed: row | of.decode_example({key: row[key] for key in of}), rows)
        rows = ((f"{source} {name} row {number}", row, row) for number, row in enumerate(rows, 1))
        yield from watched(rows, f"reading {source} {name}", len(table), lambda row: 1)


def hub_rows(name: str, data_set: DataSet, split: str, notes: Counter) -> Iterator[FileRow]:
    """The rows of one split or of all of a data set of the Hugging Face Hub; what is in its cache is taken unasked."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()   # what goes wrong is told below
    folder = hub_folder(data_set)
    try:
        if folder is None and not constants.HF_HUB_OFFLINE:     # asked once, with an end: the library has none
            print(f"fetching {data_set.hub} from {constants.ENDPOINT} ...", file=sys.stderr, flush=True)
            if not get_hf_file_metadata(hf_hub_url(data_set.hub, "README.md", repo_type="dataset"),
                                        timeout=PATIENCE).commit_hash:
                raise OSError("what answers is not the Hub: a login page or a proxy may be in between")
        if not sys.stderr.isatty():
            disable_progress_bars()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space")  # now, not when the disk is full
            folder = folder or hub_folder(data_set, fetch=True)
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: {data_set.hub} is not in {visible(constants.HF_HUB_CACHE)}, and the Hub did not give it.\n"
            f"With a network, get it:  uv run hf download --repo-type dataset {data_set.hub} --local-dir data/{name}"
            f" --include {shlex.join(data_set.files)}\n"
            f"and name the folder:     {name}:data/{name}") from error
    return fetched_rows(folder, data_set, split, notes)


def fetched_rows(folder: Path, data_set: DataSet, split: str, notes: Counter) -> Iterator[FileRow]:
    """The rows of parquet files or JSONL in the Hub's cache, as they are: `datasets` would write all once more."""
    from pyarrow import parquet

    files = sorted(file for pattern in data_set.files for file in folder.glob(pattern))
    # train-00000-of-00002.parquet, test.jsonl.gz
    splits = {file: re.split("[-.]", file.name)[0] for file in files}
    if split and split not in splits.values():
        known = ", ".join(sorted(set(splits.values())))
        raise ValueError(f"{data_set.hub} has no split {visible(split)[:80]!r}; it has {known}")
    files = [file for file in files if split in ("", splits[file])]
    several = len({splits[file] for file in files}) > 1
    with progress(f"reading {data_set.hub}", len(files)) as advance:
        for file in files:
            shown = f"{data_set.hub} {file.relative_to(folder)}"
            try:
                if file.suffix == ".parquet":
                    table = parquet.ParquetFile(file)
                    columns = [name for name in table.schema_arrow.names if name in (data_set.columns or (name,))]
                    batches = (batch.to_pylist() for batch in table.iter_batches(1000, columns=columns))
                    rows = ((f"{shown} row {n}", row, row) for n, row in enumerate(chain.from_iterable(batches), 1))
                    total, size = table.metadata.num_rows, lambda line: 1
                else:
                    rows, total, size = file_rows(file), size_unpacked(file), len
                for place, line, row in rows:
                    if isinstance(row, BadRow):
                        refuse_damaged(file)
                    notes[f"rows of the split {splits[file]}"] += several
                    yield place, line, row
                    advance(size(line) / total)
            except (OSError, ValueError) as error:
                refuse_damaged(file, error)
                raise


def refuse_damaged(file: Path, error: Exception | None = None) -> None:
    """A large file of the Hub's is named by the sha256 of its content."""
    file = file.resolve()
    if len(file.name) == 64 and file_sha256(file) != file.name:
        raise ValueError("a file in the Hub's cache is damaged.\n"
                         f"Delete it, and it is fetched again: {file}") from error


def hub_folder(data_set: DataSet, fetch: bool = False) -> Path | None:
    """The folder in the Hub's cache with the files of a data set; None if it is not there, or not whole."""
    from huggingface_hub import snapshot_download

    with nullcontext() if fetch else suppress(Exception):
        return Path(snapshot_download(data_set.hub, repo_type="dataset", local_files_only=not fetch,
                                      allow_patterns=list(data_set.files)))
    return None


# ---- the tokenizer for other tools ---------------------------------------------------------------

# The template of `render` for other tools. There, text and control tokens go through one string, so content that
# spells the control token is spelt otherwise first; here, `render` inserts the id and encodes content as mere text.
# Content may be a list of parts, of which the text is taken, or null.
MESSAGE = "{{ content | trim | replace('<|endoftext|>', '<|end of text|>') }}<|endoftext|>"
CHAT_TEMPLATE = (
    "<|endoftext|>{% for message in messages %}{{ message['role'] }}\n"
    "{% set content = message['content'] if message['content'] is string "
    "else (message['content'] or []) | map(attribute='text') | join %}"
    f"{MESSAGE}"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
# `generation` marks what transformers' return_assistant_tokens_mask gives, the mask of `render`: with it, TRL trains on
# the assistant's tokens alone (chat_template_path and assistant_only_loss). Plain Jinja does not know the word.
TRAINING_TEMPLATE = CHAT_TEMPLATE.replace(
    MESSAGE, "{% if message['role'] == 'assistant' %}{% generation %}" + MESSAGE + "{% endgeneration %}{% else %}"
    + MESSAGE + "{% endif %}")


def save_tokenizer(folder: str | Path, positions: int = 1024) -> None:
    """Write the tokenizer and its chat template as transformers wants them, for a model of so many positions."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": positions, "add_prefix_space": False,
                "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
                "bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT, "pad_token": EOT_TEXT}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    Path(folder, "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    Path(folder, "chat_template_training.jinja").write_text(TRAINING_TEMPLATE, encoding="utf-8")


def check_tokenizer(folder: str | Path) -> str:
    """Refuse a model's folder whose words are not GPT-2's; what there is to say of a chat template that is not ours."""
    for name, words_of in (("tokenizer.json", lambda about: about["model"]["vocab"]), ("vocab.json", dict)):
        file, own = Path(folder, name), TOKENIZER / name
        if not file.is_file() or file.read_bytes() == own.read_bytes():
            continue
        refuse_pointers(file)
        try:
            theirs = dict(words_of(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{file} is no vocabulary of GPT-2's kind ({type(error).__name__}: {error})") from None
        for word, number in words_of(json.loads(own.read_text(encoding="utf-8"))).items():
            if theirs.get(word) != number:
                raise ValueError(f"'{folder}' has other words than GPT-2: in its {name}, {word!r} has the number "
                                 f"{excerpt(theirs.get(word, 'none'))} and not {number}.\n"
                                 "Wanted: a model with GPT-2's own tokenizer, for which all texts here are encoded")
    with suppress(OSError, ValueError, AttributeError):
        file = Path(folder, "chat_template.jinja")
        text = (file.read_text(encoding="utf-8") if file.is_file() else
                json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
        if text and text != CHAT_TEMPLATE and not is_our_template(text):
            return (f"{folder} has a chat template of its own, which is not used: here a turn opens with {EOT_TEXT} "
                    "and the role, and a model that learnt otherwise may answer worse")
    return ""


def is_our_template(text: Any) -> bool:
    """Whether it renders a conversation as `render` does, whatever it looks like."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    talk = [{"role": role, "content": f"a {role}"} for role in (*ROLES, "user")]
    try:
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        shown = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(plain).render(
            messages=talk, bos_token=EOT_TEXT, eos_token=EOT_TEXT, add_generation_prompt=True)
    except Exception:       # whatever a stranger's program may raise
        return False
    return shown == text_of(render(talk, reply=True)[0])


# ---- checks: questions with the facts of a good answer -------------------------------------------


@dataclass
class Check:
    """A conversation to be answered, and what a good answer says and does not say."""

    messages: Conversation
    facts: list[list[str]]                  # each a list of wordings
    forbidden: list[str]
    subject: str | None
    group: str
    # first word -> statement -> {subject: the fact that it words}, of the whole file
    stated: dict[str, dict[tuple[str, ...], dict[str, str]]] = field(repr=False)


@dataclass
class Verdict:
    correct: bool       # about the subject, at least one fact, nothing wrong
    about: bool         # names the subject
    facts: int          # facts of the check that are stated
    wrong: list[str]    # what should not be there: facts of others, and what is forbidden
    twice: list[str]    # what the reply says more than once: facts of its subject, or any four words in a row
    ended: bool         # the reply ended by itself
    words: int
    group: str
    repetition: float   # rep-4: the share of its runs of four words that were there before

    @property
    def good(self) -> bool:
        """Correct, and everything said once."""
        return self.correct and not self.twice


def read_checks(path: str | Path) -> list[Check]:
    """The checks of a JSONL file; its lines without `messages` only state what is true of a subject.

    {"messages": [...], "facts": ["one wording" or ["or", "another"], ...], "forbidden": [...], "subject", "group"}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checks file {visible(str(path))[:200]!r} (in {Path.cwd()})")
    checks, stated = [], defaultdict(lambda: defaultdict(dict))
    for row in rows_read(file_rows(path), read_check, Count(str(path), bad_rows="")):
        messages, facts, forbidden, subject, group = row
        for wordings in facts if subject else ():
            for statement in (tuple(words(wording)) for wording in wordings):
                stated[statement[0]][statement].setdefault(subject.casefold(), wordings[0])
        if messages:
            checks.append(Check(messages, facts, forbidden, subject, group, stated))
    if not checks:
        raise ValueError(f"{visible(str(path))[:200]} has no line with the keys messages and facts")
    return checks


def read_check(row: dict) -> tuple:
    [facts] = want(row, "facts")
    messages = as_messages(row["messages"], "messages") if "messages" in row else None
    if messages and messages[-1]["role"] != "user":
        raise BadRow("no question", "messages must end with one of the user's, which is to be answered")
    subject, group, forbidden = row.get("subject"), row.get("group", "checks"), row.get("forbidden", [])
    if not isinstance(subject, str | None) or not isinstance(group, str) or not isinstance(forbidden, list):
        raise BadRow("wrong type", "subject and group must be strings, forbidden a list of strings")
    if not messages and not subject:
        want(row, "messages")
    facts = [[as_text(wording, "a fact") for wording in (fact if isinstance(fact, list) else [fact])]
             for fact in of_type(facts, "facts", list)]
    forbidden = [as_text(phrase, "forbidden") for phrase in forbidden]
    if any(not words(phrase) for phrase in [*forbidden, *chain.from_iterable(facts)]) or not all(facts):
        raise BadRow("empty fact", "a fact or a forbidden phrase is empty")
    return messages, facts, forbidden, subject and clean(subject), group


def judge(check: Check, reply: str, ended: bool) -> Verdict:
    """A reply's worth. Another subject's fact is wrong unless it is stated of this one too, or is part of what is."""
    text, subject = words(reply), (check.subject or "").casefold()
    wrong = [phrase for phrase in check.forbidden if occurs(words(phrase), text)]
    others: list[tuple[int, int]] = []                      # (start, end) in the reply of what is true of others only,
    own: dict[tuple[int, int], str] = {}                    # and of what is true of this subject: {where: which fact}
    for i, word in enumerate(text if subject else ()):
        for statement, subjects in check.stated.get(word, {}).items():
            if tuple(text[i:i + len(statement)]) == statement:
                if subject in subjects:
                    own[i, i + len(statement)] = subjects[subject]
                else:
                    others.append((i, i + len(statement)))
    wrong += [" ".join(text[i:j]) for i, j in others if not any(a <= i and j <= b for a, b in own)]
    names = plurals(check.subject) if subject else []
    about = not subject or any(occurs(form, text) for form in names)
    facts = sum(any(occurs(words(wording), text) for wording in fact) for fact in check.facts)
    if not subject:
        own = {place: wording for wording in chain.from_iterable(check.facts) for place in places(words(wording), text)}
    twice = said_twice(reply, own, names)
    return Verdict(about and facts >= 1 and not wrong, about, facts, wrong, twice, ended, len(reply.split()),
                   check.group, repetition(reply))


def said_twice(reply: str, stated: dict[tuple[int, int], str], names: list[list[str]]) -> list[str]:
    """The facts stated at two places or more, and the runs of four words that occur again.

    What is part of a longer statement is none of its own, and the subject's name may come as often as it likes.
    """
    whole = [fact for (i, j), fact in stated.items() if words(fact) not in names
             and not any(a <= i and j <= b and (a, b) != (i, j) for a, b in stated)]
    return list(dict.fromkeys(thing for things in (whole, map(" ".join, runs(reply)))
                              for thing, n in Counter(things).items() if n > 1))


def tally(verdicts: Iterable[Verdict]) -> dict[str, dict[str, float]]:
    """By group, and "all": how many, and the means of what verdicts say; "twice" is the share that repeats a thing."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.group].append(verdict)
    groups["all"] = list(chain.from_iterable(groups.values()))
    scores = {name: attrgetter(name) for name in ("correct", "good", "facts", "ended", "words", "repetition")}
    scores["twice"] = lambda verdict: bool(verdict.twice)
    return {group: {"n": len(members)} | {name: sum(map(score, members)) / max(1, len(members))
                                          for name, score in scores.items()}
            for group, members in groups.items()}


def words(text: str) -> list[str]:
    """Case and white space folded; punctuation marks count as words, so that C and C++ differ."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return re.findall(r"\w+|[^\w\s]", text)


def occurs(phrase: list[str], text: list[str]) -> bool:
    return any(places(phrase, text))


def places(phrase: list[str], text: list[str]) -> Iterator[tuple[int, int]]:
    """(start, end) of every place at which the text has the phrase."""
    return ((i, i + len(phrase)) for i, word in enumerate(text)
            if word == phrase[0] and text[i:i + len(phrase)] == phrase)


def runs(text: str, n: int = 4) -> list[tuple[str, ...]]:
    """All n words in a row, without punctuation: A b, c d e. -> (a b c d) (b c d e)"""
    text = [word for word in words(text) if word.isalnum()]
    return [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]


def repetition(text: str, n: int = 4) -> float:
    """rep-n: 1 - distinct n-grams / n-grams; 0 says nothing twice (Welleck et al. 2019, https://arxiv.org/abs/1908.04319).

    One text's share, which the paper calls seq-rep-n; n is 4 there too.
    """
    found = runs(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def plurals(subject: str) -> list[list[str]]:
    """A subject and its plurals as lists of words: baker, bakers; secretary, secretaries; fireman, firemen."""
    *first, last = words(subject) or [""]
    forms = [last, last + "s", last + "es"]
    endings = {"y": "ies", "man": "men", "woman": "women", "person": "people", "fe": "ves"}
    forms += [last.removesuffix(ending) + plural for ending, plural in endings.items() if last.endswith(ending)]
    return [[*first, form] for form in forms]


# ---- on the screen -------------------------------------------------------------------------------

LEADS = os.environ.get("RANK", "0") == "0"  # whether this process is the one that talks
# Control characters have pictures; what else steers a terminal or reorders a line is spelt out by its number.
INVISIBLE = ({c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
             | dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
             | {c: f"<U+{c:04X}>" for c in (*range(0x80, 0xA0), 0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010),
                                            *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF,
                                            *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))})


def visible(text: str) -> str:
    """Text fit for a terminal: nothing in it can move the cursor, change colours or turn the line around."""
    return text.translate(INVISIBLE)


@contextmanager
def progress(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """Gives a function to be told how much more of the total is done, and shows how long the rest will take.

    On a terminal as a bar, once it has taken a second and a half; in a pipe or a file by a line a minute; of several
    processes, one.
    """
    began = said = time.monotonic()
    total, done, bar, task, terminal = max(total, 1), 0.0, None, None, sys.stderr.isatty()

    def advance(more: float) -> None:
        nonlocal done, bar, task, said
        done, now = done + more, time.monotonic()
        if bar:
            bar.update(task, completed=done)
        elif terminal and now - began > 1.5 and done and LEADS:
            from rich import progress as rich
            from rich.console import Console

            bar = rich.Progress(rich.TextColumn("{task.description}"), rich.BarColumn(20), rich.TaskProgressColumn(),
                                rich.TimeRemainingColumn(compact=True), console=Console(stderr=True), transient=True,
                                speed_estimate_period=600)
            task = bar.add_task(what.replace("[", r"\["), total=total, completed=done)
            bar.start()
        elif not terminal and now - said > 60 and done and LEADS:
            said, left = now, round((now - began) * max(0.0, total / done - 1))
            print(f"{what}: {done / total:.0%}, {left // 60}:{left % 60:02} left", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if bar:
            bar.stop()


def transcript(messages: Conversation, width: int = 88) -> str:
    """The conversation as it is shown: a rule with the role, then the content, wrapped."""
    shown = []
    for message in messages:
        lines = visible(message["content"].strip()).split("\n")
        wrapped = [textwrap.fill(line, width, replace_whitespace=False, break_long_words=False, break_on_hyphens=False)
                   if len(line) > width else line for line in lines]
        shown.append(f"========== {visible(message['role'])} ==========\n" + "\n".join(wrapped) + "\n")
    return "\n".join(shown)


# from which value on: the colour of a background among 256, and what it means; orange and blue differ for every eye
MOVED = ((-math.inf, 208, "under 1/10"), (-math.log(10), 215, "1/3"), (-math.log(3), 223, "2/3"),
         (-math.log(1.5), 0, "as before"), (math.log(1.5), 153, "3/2"), (math.log(3), 75, "3"),
         (math.log(10), 33, "over 10 times as likely"))
NATS = "(in nats: -0.69 is a half, -2.30 a tenth, +0.69 twice)"


def shaded(words: Iterable[tuple[str, float]]) -> str:
    """Pieces of a text, each with its value behind it, for where there is no colour."""
    return "".join(f"{_of_reply(text)}({value:+.2f})" for text, value in words)


def shades(words: Iterable[tuple[str, float]], scale: tuple):
    """The same as rich's Text on backgrounds by the values; and, as a second one, what these mean."""
    from rich.text import Text

    def on(text: str, value: float) -> tuple[str, str]:
        colour = [colour for least, colour, _ in scale if least <= value][-1]
        return text.replace("\n", "\u23ce\n"), f"color(16) on color({colour})" if colour else ""

    legend = (part for least, _, meaning in scale for part in (on(f" {meaning} ", least), " "))
    return Text.assemble(*(on(_of_reply(text), value) for text, value in words)), Text.assemble(*legend)


def _of_reply(text: str) -> str:
    return " [end]" if text == EOT_TEXT else visible(text)


def describe(data: Data, what: str) -> str:
    """The report in words."""
    facts = data.report_json()
    lines = []
    for spec in facts["specs"]:
        lines.append(f"{spec['spec']}: {spec['kept']:,} {what} kept, {sum(spec['dropped'].values()):,} dropped")
        lines += [f"  dropped  {n:>9,}  {reason}" for reason, n in spec["dropped"].items()]
        lines += [f"  note     {n:>9,}  {note}" for note, n in spec["notes"].items()]
        lines += [f"  not used            the keys {', '.join(spec['unused'])}"] * bool(spec["unused"])
    length = "  ".join(f"{q} {n:,}" for q, n in facts["length"].items())
    return "\n".join([*lines, f"rows      {facts['train']:,} to train on, {facts['val']:,} to validate on",
                      f"tokens    {facts['tokens']:,}, of which {facts['supervised_share']:.1%} are supervised",
                      f"lengths   {length}"])


def print_example(row: Row | Pair) -> None:
    """The text of a row, with what is learnt (or chosen) and what is rejected in colour, or between «» and ‹›."""
    marks = {"dim": "{}", "bold green": "«{}»", "red": "‹{}›"}
    if isinstance(row, Pair):
        pieces = [(row.prompt, "dim"), (row.chosen, "bold green"), (row.rejected, "red")]
    else:
        edges = [0, *(np.flatnonzero(np.diff(row.mask)) + 1), len(row)]
        pieces = [(row.ids[a:b], "bold green" if row.mask[a] else "dim") for a, b in pairwise(edges)]
    pieces = [(visible(text_of(ids)), style) for ids, style in pieces]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        from rich.console import Console
        from rich.text import Text
        Console().print(Text.assemble(*pieces))
    else:
        print("".join(marks[style].format(text) for text, style in pieces))


# ---- files written whole -------------------------------------------------------------------------


@contextmanager
def written_whole(path: Path):
    """All of a file or folder or nothing: gives a temporary name to write to, which goes to the disk and is renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            sync(file)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        remove(temporary)


def write_file(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError if that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def sync(path: Path) -> None:
    """Have the disk take what was written: of a file its content, of a folder the names in it."""
    if path.is_file() or os.name == "posix":  # Windows syncs no folders
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:  # nor do some file systems; what failed is another matter
            if path.is_file() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
                raise
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---- scripts -------------------------------------------------------------------------------------


def option(setting: str) -> str:
    """The flag of a setting, as one types it."""
    return "--" + setting.replace("_", "-")


def bounds(settings, *table: tuple[str, tuple[str, ...], Callable]) -> dict[str, tuple[bool, str]]:
    """{setting: (whether it makes sense, what does)} of a table of (what does, settings, whether a value does)."""
    return {name: (allowed(getattr(settings, name)), wanted) for wanted, names, allowed in table for name in names}


def check_limits(settings) -> None:
    """Refuse settings that make no sense, before anything is done with them."""
    for name, (fine, wanted) in settings.limits().items():
        if not fine:
            raise ValueError(f"{option(name)} is {getattr(settings, name)}; it has to be {wanted}")


def command_line(config: type, presets: dict[str, dict] | None = None, args: list[str] | None = None):
    """The script's Config from its flags: --preset and --config change the defaults, every other flag one value."""
    args = sys.argv[1:] if args is None else args
    given = {arg.partition("=")[0] for arg in args}
    if presets and not {"--data", "--preset", "--config"} & given:
        args = ["--preset", "sample", *args]
    values = {}
    if hasattr(config, "config"):
        # what decides the defaults of the other flags, and so is read before them
        early = make_dataclass("Early", [(name, str, "") for name in ("preset", "config", "loss")])
        first, _ = tyro.cli(early, args=args, return_unknown_args=True, add_help=False)
        if first.preset and first.config:
            raise ValueError("--preset and --config both say what the defaults are: give one of them")
        if first.preset in (presets or {}):  # tyro refuses others
            values = presets[first.preset] | {"preset": first.preset}
        elif first.config:
            values = _saved_config(first.config, config)
        own = values.get("loss", getattr(config, "loss", first.loss))   # the loss that a preset's or a run's beta is of
        if first.loss not in ("", own):
            values = {k: v for k, v in values.items() if k != "beta"} | {"loss": first.loss}
    refuse_foreign(args, config)
    if not hasattr(config, "groups"):
        return tyro.cli(config, default=config(**values), args=args, description=opening(config))
    found = tyro.cli(grouped(config, config(**values)), args=args, description=opening(config),
                     config=(tyro.conf.OmitArgPrefixes,))
    return config(**{f.name: getattr(part, f.name) for part in vars(found).values() for f in fields(part)})


def opening(config: type) -> str:
    """What --help begins with: what a script is for and how it is called, without what its code is like."""
    first, *others = sys.modules[config.__module__].__doc__.split("\n\n")
    own = "" if (config.__doc__ or "").startswith(f"{config.__name__}(") else config.__doc__  # dataclass makes one
    return "\n\n".join([own or first, *(part for part in others if part.lstrip(" `").startswith("uv run"))])


def grouped(config: type, default) -> type:
    """A dataclass with a part for each of config.groups {its name: its settings}: --help has a box for each."""
    hints, notes = get_type_hints(config, include_extras=True), comments(config)
    settings = {f.name: (f.name, Annotated[hints[f.name], tyro.conf.arg(help=notes[f.name])],
                         field(default=getattr(default, f.name))) for f in fields(config)}
    parts = {group: [settings.pop(name) for name in names if name in settings]
             for group, names in config.groups.items()}
    list(parts.values())[-1].extend(settings.values())  # what no group names is in the last
    made = {group: make_dataclass(group, members, namespace={"__doc__": " "}) for group, members in parts.items()}
    return make_dataclass("Grouped", [(group, part, field(default_factory=part)) for group, part in made.items()])


def comments(config: type) -> dict[str, str]:
    """{field: the comment behind it, or the lines of comment above it}, as tyro takes them for help."""
    found, above = {}, []
    for line in chain.from_iterable(inspect.getsource(part).split("\n") for part in reversed(config.__mro__[:-1])):
        if match := re.match(r" {4}(\w+): (?:.*?  # (.*))?", line):
            found[match[1]] = match[2] or " ".join(above) or found.get(match[1], "")
        above = [*above, line.strip("# ")] if line.startswith("    #") else []
    return found


# {option of ours: what it is elsewhere}
FOREIGN = {
    "lr": "learning-rate", "seed": "random-seed", "loss": "loss-type", "tracker": "report-to",
    "steps": "epochs num-epochs num-train-epochs max-steps num-steps train-steps iterations max-iters",
    "batch-size": "batch bs train-batch-size per-device-train-batch-size global-batch-size",
    "micro-batch-tokens": "micro-batch-size gradient-accumulation-steps grad-accum",
    "model": "model-name-or-path model-name model-path base-model checkpoint",
    "data": "dataset dataset-name datasets train-file train-data data-path",
    "out": "output-dir output save-dir resume resume-from-checkpoint",
    "context": "max-length max-seq-length max-seq-len seq-len block-size",
    "max-new-tokens": "max-length max-tokens num-predict",
    "lora-rank": "rank lora-r r lora", "adapter": "peft lora", "lora-alpha": "alpha", "lora-targets": "target-modules",
    "eval-every": "eval-steps", "save-every": "save-steps", "log-every": "logging-steps", "keep": "save-total-limit",
    "warmup": "warmup-ratio warmup-steps", "weight-decay": "wd", "beta2": "adam-beta2",
    "clip": "grad-clip max-grad-norm", "precision": "dtype bf16 fp16", "recompute": "gradient-checkpointing",
    "compile": "torch-compile", "temperature": "temp", "top-k": "topk", "top-p": "topp",
    "repetition-penalty": "repeat-penalty", "system": "system-prompt"}


def refuse_foreign(args: Sequence[str], config: type) -> None:
    """Lead from an option that other programs have to ours."""
    known = {f.name.replace("_", "-"): f.name for f in fields(config)}
    for given in (arg[2:].partition("=")[0] for arg in args if arg.startswith("--")):
        name = given.replace("_", "-")
        for ours, theirs in FOREIGN.items():
            if ours in known and name not in known and name in theirs.split():
                epoch = "\nAn epoch is rows / --batch-size steps; uv run data.py SPEC counts rows"
                meaning = comments(config)[known[ours]] + ")" + epoch * ("epoch" in name)
                raise ValueError(f"there is no --{visible(given)}; here it is --{ours} ({meaning}")


def _saved_config(path: str, config: type) -> dict:
    try:
        saved = dict(read_json(Path(path))["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--config {path} is not the run.json of a run ({type(error).__name__}: {error})") from None
    if strangers := sorted(set(saved) - {f.name for f in fields(config)}):
        raise ValueError(f"--config {path} has a setting that this script does not know: {strangers[0]}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k not in ("overwrite", "config")}


def run_script(main, config: type, presets: dict[str, dict] | None = None) -> None:
    """Run main(config from the command line); trouble becomes a few clear lines and exit code 2 (input) or 1 (run)."""
    debug = "--debug" in sys.argv
    for name in ("stdin", "stdout", "stderr"):  # one that was closed is None, and its number would become a file's
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a locale that lacks a character must not end a run
    try:
        main(command_line(config, presets))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has gone: nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        refused = isinstance(error, ValueError | FileNotFoundError | FileExistsError | NotADirectoryError
                             | IsADirectoryError | PermissionError | BlockingIOError)
        memory = is_out_of_memory(error)
        if debug or not (refused or memory or isinstance(error, OSError | ArithmeticError | ImportError)):
            raise
        lines = str(error).splitlines()[:5] or [type(error).__name__]
        lines = "\n".join(lines[:1] + ([f"  {cause(error)}"] if error.__cause__ else []) + lines[1:])
        if memory and not isinstance(error, MemoryError):  # torch's own words, from outside a training step
            lines = (f"out of memory ({lines.splitlines()[0][:200]}).\n"
                     "Close other programs, or take a smaller --model; in training, a smaller --micro-batch-tokens")
        print(f"error: {visible(lines)}", file=sys.stderr)
        sys.exit(2 if refused else 1)


def cause(error: BaseException) -> str:
    """What lies at the bottom of an error, in a line: libraries wrap it, and say of all troubles the same."""
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    # the system's own word if there is one, else what a server answered, else the innermost
    told = (next((e for e in reversed(chain) if isinstance(e, OSError) and e.errno), None)
            or next((e for e in chain if hasattr(e, "response")), chain[-1]))
    words = re.sub(r"For more information check: \S+", "", str(told)) or type(told).__name__
    return " ".join(words.split())[:400] + (" (no answer)" if isinstance(told, TimeoutError) else "")


def is_out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of CUDA and MPS, of the CPU, of cuBLAS
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


# ---- uv run data.py ------------------------------------------------------------------------------


@dataclass
class Config(Reading):
    """Show what data sets become: counts, drops by reason, lengths, and one example with its supervised tokens."""

    # NAME, NAME:PATH or PATH, each with an optional @WEIGHT
    specs: tyro.conf.Positional[tuple[str, ...]] = ("sample",)
    pairs: bool = False  # read preferences, as dpo.py does, where there are conversations too
    json: bool = False  # print the counts as one JSON object and nothing else
    row: int | None = None  # show this training row, counted from 0, instead of one of median length
    debug: bool = False  # show the traceback of an error


def only_preferences(spec: str) -> bool:
    """Whether a data set has no other use; of a PATH its first row tells."""
    name, path, _ = parse_spec(spec)
    if name != "jsonl":
        return DATA_SETS[name].conversations is None
    first = next((row for _, _, row in open_spec(name, path, Counter()) if isinstance(row, dict)), {})
    return layout_of(first, PREFERENCES) is not None and layout_of(first, CONVERSATIONS) is None


def main(cfg: Config) -> Data:
    pairs = cfg.pairs or all(map(only_preferences, cfg.specs))
    data = (load_pairs if pairs else load_rows)(cfg.specs, cfg)
    if cfg.json:
        print(json.dumps(data.report_json()))
        return data
    if cfg.row is not None and not 0 <= cfg.row < len(data.train):
        raise ValueError(f"--row is {cfg.row}; there are {len(data.train):,} rows to train on, from 0")
    print(describe(data, "pairs" if pairs else "conversations"))
    rows = sorted(data.train or data.val, key=len)
    shown = f"Row {cfg.row} of those to train on" if cfg.row is not None else "One row, of median length"
    marks = "chosen «» and rejected ‹›" if pairs else "supervised «»"
    print(f"\n{shown}; {marks} (in colour on a terminal):\n")
    print_example(rows[len(rows) // 2] if cfg.row is None else data.train[cfg.row])
    return data


if __name__ == "__main__":
    run_script(main, Config)
