"""Data: from conversations on disk or on the Hub to the token ids of a batch.

A row's way through this file: a reader (a function and one line in `DATA_SETS`) turns a file's rows into `Thread`s
or `Preference`s, `render` turns messages into ids and a mask of what is learnt, `load_rows` and `load_pairs` drop,
shorten, split and count, `pack` lays a step's rows end to end. `uv run data.py SPEC` shows what a data set becomes.

A SPEC is NAME, NAME:PATH or PATH, each with an optional @WEIGHT: `oasst1`, `oasst1:trees.jsonl.gz`, `chats.jsonl`,
`smoltalk@0.5`. PATH is a file in that data set's own format or a folder that `datasets.load_dataset` reads.
"""

from __future__ import annotations

import base64
import difflib
import gzip
import hashlib
import heapq
import importlib
import json
import math
import os
import re
import sys
import textwrap
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain, combinations, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tiktoken
import tyro


class lazy:
    """`torch = lazy("torch")` imports torch when it is first used: --help must not wait two seconds for it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


np = lazy("numpy")

HERE = Path(__file__).parent
EOT = 50256                              # <|endoftext|>, the one control token
EOT_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
Conversation = list[dict]                # {"role": "system" | "user" | "assistant", "content": str}


# ---- the tokenizer -------------------------------------------------------------------------------

RANKS = HERE / "sample" / "gpt2.tiktoken"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@cache
def tokenizer() -> tiktoken.Encoding:
    """GPT-2's byte-pair encoding, from the ranks that ship with the project, so that nothing is downloaded."""
    ranks = RANKS.read_bytes() if RANKS.is_file() else b""
    if hashlib.sha256(ranks).hexdigest() != RANKS_SHA256:
        raise FileNotFoundError(f"{RANKS}, the tokenizer's ranks, is {'damaged' if ranks else 'missing'}\n"
                                f"Restore it:  git checkout {RANKS.relative_to(HERE)}")
    pairs = (line.split() for line in ranks.splitlines())
    return tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, special_tokens={EOT_TEXT: EOT},
                             mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs})


def clean(text: str) -> str:
    """Without white space at both ends, and without lone surrogates, which no encoding can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.strip()


def encode_all(texts: Iterable[str]) -> dict[str, list[int]]:
    """{text: its ids}, each text encoded once however often it occurs, on all cores. No id is a control id."""
    unique = list(dict.fromkeys(texts))
    return dict(zip(unique, tokenizer().encode_ordinary_batch(unique, num_threads=os.cpu_count() or 1), strict=True))


def text_of(ids: Iterable[int]) -> str:
    """The text of ids, control token included. Ids that are none of GPT-2's, and split characters, become U+FFFD."""
    tokens = tokenizer()
    unknown = "\N{REPLACEMENT CHARACTER}".encode()
    return b"".join(tokens.decode_single_token_bytes(int(i)) if 0 <= i <= EOT else unknown for i in ids).decode(
        errors="replace")


def save_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer and its chat template into `folder`, as transformers (and what reads its files) wants them.

    tiktoken keeps ranks where transformers keeps merges. A rank's merge is found by encoding its bytes with the
    lower ranks only: exactly two parts are left.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    names = {rank: "".join(letters[b] for b in token) for token, rank in tokenizer()._mergeable_ranks.items()}
    vocab = {names[rank]: rank for rank in range(EOT)} | {EOT_TEXT: EOT}
    merges = [tuple("".join(letters[b] for b in part) for part in pair) for pair in _merges()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    control = {"content": EOT_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    files = {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [{"id": EOT, **control, "special": True}],
            "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                      "merges": merges}},
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, "add_prefix_space": False,
            "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
            "bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT, "pad_token": EOT_TEXT},
        "vocab.json": vocab,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _byte_letters() -> list[str]:
    """The printable letter by which GPT-2's files name each byte: itself where it prints, else from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + n) for n in range(256))
    return [chr(b) if b in printable else next(others) for b in range(256)]


@cache
def _merges() -> list[tuple[bytes, bytes]]:
    ranks = tokenizer()._mergeable_ranks
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


# ---- the chat template ---------------------------------------------------------------------------

# The template of `render` for transformers. There, text and control tokens go through one string, so content that
# spells the control token is spelt otherwise first; here, `render` inserts the id and encodes content as mere text.
# `generation` marks what transformers' return_assistant_tokens_mask gives: the mask of `render`.
CHAT_TEMPLATE = (
    "<|endoftext|>{% for message in messages %}{{ message['role'] }}\n"
    "{% set content = message['content'] | trim | replace('<|endoftext|>', '<|end of text|>') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content }}<|endoftext|>{% endgeneration %}"
    "{% else %}{{ content }}<|endoftext|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)


@cache
def _header(role: str) -> list[int]:
    """The ids that open a message of `role`, the control token included."""
    if role not in ROLES:
        raise ValueError(f"unknown role {visible(str(role))[:80]!r}, wanted one of {', '.join(ROLES)}")
    return [EOT, *tokenizer().encode_ordinary(f"{role}\n")]


def render(messages: Conversation, supervise: Sequence[bool] | None = None, reply: bool = False,
           encoded: dict[str, list[int]] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """THE chat template: (ids int32 (T,), mask bool (T,)), where mask[t] says that ids[t] is to be learnt.

    <|endoftext|> opens every message and closes the conversation; that which follows a supervised message belongs to
    it, for a reply learns to end. Content never starts with white space, so a message's ids are those of its header
    and those of its content, and contents can be encoded apart (`encoded`, from `encode_all`).
    supervise: which messages are learnt, by default every assistant message. reply: end with the opening of an
    assistant message, which is what a model that is to reply is fed.
    """
    if supervise is None:
        supervise = [message["role"] == "assistant" for message in messages]
    ids, mask, learnt = [], [], False
    for message, learn in zip(messages, supervise, strict=True):
        header, content = _header(message["role"]), clean(message["content"])
        content = encoded[content] if encoded and content in encoded else tokenizer().encode_ordinary(content)
        ids += header + content
        mask += [learnt] + [False] * (len(header) - 1) + [learn] * len(content)
        learnt = learn
    tail = _header("assistant") if reply else [EOT]
    ids += tail
    mask += [learnt] + [False] * (len(tail) - 1)
    return np.array(ids, np.int32), np.array(mask, bool)


def messages_of(ids: Iterable[int]) -> Conversation:
    """The conversation that `render` turned into ids; of a shortened one, what is left."""
    messages, ids = [], [int(i) for i in ids]
    starts = [t for t, i in enumerate(ids) if i == EOT]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        role = next((role for role in ROLES if ids[start:start + len(_header(role))] == _header(role)), None)
        if role:  # the last <|endoftext|> opens nothing
            messages.append({"role": role, "content": text_of(ids[start + len(_header(role)):end])})
    return messages


def without_oldest(messages: Conversation, room: int, reply: bool = False,
                   encoded: dict[str, list[int]] | None = None) -> Conversation:
    """The conversation less its oldest whole exchanges, so that `render` gives at most `room` ids.

    Opening system messages stay, and so does the last exchange, be it too long or not. An exchange starts where
    the user speaks after someone else did.
    """
    encoded = encoded or {}
    roles = [message["role"] for message in messages]
    contents = [clean(message["content"]) for message in messages]
    lengths = [len(_header(role)) + len(encoded[text] if text in encoded else tokenizer().encode_ordinary(text))
               for role, text in zip(roles, contents, strict=True)]
    head = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    starts = [head] + [i for i in range(head + 1, len(roles)) if roles[i] == "user" != roles[i - 1]]
    tail = len(_header("assistant")) if reply else 1
    before, total = np.cumsum([0, *lengths]), sum(lengths) + tail
    start = next((s for s in starts if total - (before[s] - before[head]) <= room), starts[-1])
    return messages[:head] + messages[start:]


# ---- rows and batches ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One conversation to learn from, at most `context` tokens of it."""

    ids: np.ndarray             # (T,) int32
    mask: np.ndarray            # (T,) bool: ids[t] is a target
    opening: str | None = None  # the name of its first message, if it is a thread of a conversation tree

    def __len__(self) -> int:
        return len(self.ids)

    def texts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(tokens, which of them are targets)]: what is to be computed."""
        return [(self.ids, np.flatnonzero(self.mask[1:]) + 1)]      # nothing predicts a row's first token


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """One prompt and two replies of which the first was preferred; prompt and either reply fit the context together."""

    prompt: np.ndarray      # (P,) int32, ends with the opening of an assistant message
    chosen: np.ndarray      # (C,) int32, ends with EOT, as does
    rejected: np.ndarray    # (R,) int32

    def __len__(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    def texts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(tokens, which of them are targets)] of the chosen and of the rejected reply, each after the prompt."""
        return [(np.concatenate([self.prompt, reply]), np.arange(len(self.prompt), len(self.prompt) + len(reply)))
                for reply in (self.chosen, self.rejected)]


class Span(NamedTuple):
    """Some of a batch's tokens, which attend causally to one another and wholly to the prefix before them."""

    tokens: int
    prefix: tuple[tuple[int, int], ...]     # ((n, k), ..): the first k tokens of the batch's span n, and so on


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows laid end to end, N tokens without padding, with M targets.

    A text is what would be computed by itself: a conversation, or a pair's prompt with one of its replies. What texts
    have in common from their start is here once: a prompt for all its replies, the beginning of a tree for all its
    threads. Each text has a span, its own end, and finds what it shares in the prefix. A reply is one text for all the
    pairs that it is in.
    """

    tokens: np.ndarray      # (N,) int64
    positions: np.ndarray   # (N,) int64: in the token's own row
    spans: tuple[Span, ...]
    index: np.ndarray       # (M,) int64: the token after which targets[m] comes
    targets: np.ndarray     # (M,) int64, span by span
    span: np.ndarray        # (M,) int64: the span of the text that targets[m] is in
    pairs: np.ndarray       # (R, 2) int64: the spans of each pair's chosen and rejected reply; (0, 2) if rows are none
    rows: np.ndarray        # (R,) int64: which rows of the data set these are
    row_tokens: int         # in all these rows, what they share counted for each


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


def different_texts(rows: Iterable[Row | Pair]) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[list[int]]]:
    """The texts of these rows, and which of them each row has.

    A reply that several pairs have is one text. A conversation that is there twice is two, for its loss counts twice.
    """
    texts, numbers, members = [], {}, []
    for row in rows:
        members.append([])
        for ids, learnt in row.texts():
            key = (ids.tobytes(), len(learnt)) if isinstance(row, Pair) else len(texts)
            members[-1].append(numbers.setdefault(key, len(texts)))
            if members[-1][-1] == len(texts):
                texts.append((ids, learnt))
    return texts, members


def pack(rows: Sequence[Row | Pair], indices: Iterable[int]) -> Batch:
    """The rows of these indices as one batch."""
    indices = [int(i) for i in indices]
    texts, members = different_texts(rows[i] for i in indices)
    tokens, positions, spans, index, targets, span, number = [], [], [], [], [], [], {}
    place, prefix, start = np.zeros(0, np.int64), (), 0     # of the text before: where each of its tokens is
    for n, shared in shared_beginnings([ids for ids, _ in texts]):
        ids, learnt = texts[n]
        number[n], own = len(spans), len(ids) - shared
        spans.append(Span(own, first(shared, prefix)))
        prefix = (*spans[-1].prefix, (number[n], own))
        place = np.concatenate([place[:shared], np.arange(start, start + own)])
        start += own
        tokens.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        index.append(place[learnt - 1])
        targets.append(ids[learnt])
        span.append(np.full(len(learnt), number[n]))
    flat = [np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
            for parts in (tokens, positions, index, targets, span)]
    pairs = [[number[n] for n in both] for both in members if len(both) == 2]
    return Batch(flat[0], flat[1], tuple(spans), *flat[2:], np.array(pairs, np.int64).reshape(-1, 2),
                 np.array(indices, np.int64), sum(len(rows[i]) for i in indices))


def first(tokens: int, spans: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The first so many tokens of these spans."""
    kept = []
    for n, length in spans:
        if tokens > 0:
            kept.append((n, min(length, tokens)))
        tokens -= length
    return tuple(kept)


def computed(rows: Iterable[Row | Pair]) -> int:
    """The tokens of a batch of these rows."""
    texts = [ids for ids, _ in different_texts(rows)[0]]
    return sum(len(texts[n]) - shared for n, shared in shared_beginnings(texts))


def families(rows: Sequence[Row | Pair]) -> np.ndarray:
    """(rows,) numbers from 0, the same for rows that begin alike: the threads of one tree, the pairs of one prompt."""
    numbers = {}
    keys = (row.prompt.tobytes() if isinstance(row, Pair) else row.opening or n for n, row in enumerate(rows))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def groups(rows: Sequence[Row | Pair], indices: Iterable[int], token_budget: int) -> list[tuple[int, list[int]]]:
    """(tokens, rows) that are computed together, largest first: families, halved until they fit the budget."""
    indices, found, parts = [int(i) for i in indices], defaultdict(list), []
    for i, family in zip(indices, families([rows[i] for i in indices]).tolist(), strict=True):
        found[family].append(i)
    todo = list(found.values())
    for members in todo:    # which grows as it goes
        size, half = computed(rows[i] for i in members), len(members) // 2
        if half and size > token_budget:
            todo += [members[:half], members[half:]]
        else:
            parts.append((size, members))
    return sorted(parts, key=lambda part: -part[0])


def micro_batches(rows: Sequence[Row | Pair], indices: Iterable[int], token_budget: int) -> list[Batch]:
    """These rows in batches of at most `token_budget` tokens each (a single row may have more)."""
    return fill(rows, groups(rows, indices, token_budget), token_budget)


def fill(rows: Sequence[Row | Pair], largest_first: list[tuple[int, list[int]]], token_budget: int) -> list[Batch]:
    """Batches of these groups.

    As few and as even as can be had cheaply: largest groups first, each into the batch that has the fewest tokens, and
    again with more batches if that overflows.
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


class Order:
    """The rows of each step, by seed and step alone: nothing has to be saved to resume.

    An endless stream of epochs, each of which visits every row once; steps may cross epochs. An epoch shuffles the
    families, so that rows that begin alike come one after another and what they share is computed once. Ouyang et al.
    2022 (https://arxiv.org/abs/2203.02155, section 3.5) keep all comparisons of a prompt together for the same reason.
    """

    def __init__(self, rows: Sequence[Row | Pair], batch_size: int, seed: int):
        self.families, self.batch_size, self.seed = families(rows), batch_size, seed
        self.epoch = lru_cache(maxsize=2)(self.shuffled)

    def shuffled(self, epoch: int) -> np.ndarray:
        """(rows,) indices: the families in random turn, and the rows of each in random order."""
        rng, rows = np.random.default_rng((self.seed, epoch)), len(self.families)
        turn = rng.permutation(self.families.max() + 1)
        return np.lexsort((rng.random(rows), turn[self.families]))

    def __call__(self, step: int) -> np.ndarray:
        """(batch_size,) indices."""
        rows, at = len(self.families), range(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([self.epoch(p // rows)[p % rows] for p in at], np.int64)


# ---- what readers read and how they refuse -------------------------------------------------------

LONGEST_TEXT = 1_000_000        # characters of one message: some 250,000 tokens, far beyond any context
LONGEST_LINE = 1 << 26          # bytes of one line of a file, 64 MiB
DEEPEST = 200                   # messages from the first to the last of a conversation tree
MOST_SIBLINGS = 32              # ranked replies to one message that are compared, each with each


class Drop(Exception):
    """A row that is well formed and is not used. Its argument is the reason under which it is counted."""


class BadRow(Drop):
    """A row that breaks its format: an error, or with --bad-rows skip a drop. Arguments: reason, what is wrong."""


@dataclass(slots=True)
class Thread:
    """A conversation that ends with an assistant's message."""

    messages: Conversation
    keys: list[str] | None = None       # a name for each message, by which one in several threads is learnt once
    cut: str | None = None              # why the thread does not go on, if something that followed was dropped


@dataclass(slots=True)
class Preference:
    """Two replies to one conversation so far."""

    prompt: Conversation
    chosen: str
    rejected: str
    key: tuple[str, str] | None = None


@dataclass
class Count:
    """What became of the rows of one SPEC: kept + dropped = read.

    What is counted are the conversations (or pairs) that could have come out. A row of a file is one. Of an OASST
    tree each path from the first message to a leaf is one, or as far as the first message that is dropped; for pairs
    each two ranked siblings, and each reply that is not compared. Orphans and cycles count message by message.
    A row that cannot be read counts one.
    """

    spec: str
    bad_rows: Literal["error", "skip", ""] = "error"    # "": an error, and no skipping is offered
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)     # what was done to rows that were kept, and other remarks
    first_bad: str = ""

    def drop(self, reason: str, times: int = 1) -> None:
        if times:
            self.dropped[reason] += times

    def as_json(self) -> dict:
        return {"spec": self.spec, "kept": self.kept, "dropped": dict(self.dropped.most_common()),
                "read": self.kept + self.dropped.total(), "notes": dict(self.notes.most_common())}

    def each(self, rows: Iterable[FileRow], read_one: Callable[[dict], Any]) -> Iterator[Any]:
        """read_one(row) of every row; what it refuses is counted, or raised where bad rows are errors."""
        for place, raw, row in rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                result = read_one(row)
            except BadRow as bad:
                reason, wrong = bad.args
                what = f"{place}: {wrong}\n  the row: {excerpt(raw)}"
                if self.bad_rows != "skip":
                    skip = ", or leave such rows out with --bad-rows skip" if self.bad_rows else ""
                    raise ValueError(f"{what}\nMend it{skip}") from None
                self.first_bad = self.first_bad or what
                self.drop(f"bad row: {reason}")
            except Drop as drop:
                self.drop(drop.args[0])
            else:
                yield result


FileRow = tuple[str, Any, Any]      # the place (file:line), the row as it stands there, the row read or a BadRow
Reader = Callable[[Iterable[FileRow], Count, str], Iterator[Thread] | Iterator[Preference]]


def row_by_row(read_one: Callable[[dict], Thread | Preference]) -> Reader:
    """A reader for data sets of which every row stands alone."""
    def reader(rows, count, language):
        return count.each(rows, read_one)
    return reader


def excerpt(raw: Any) -> str:
    """The first 80 characters of a row, fit to be shown."""
    try:
        raw = raw[:400].decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)[:400]
    except RecursionError:
        raw = kind(raw)
    return visible(" ".join(raw.split()))[:80]


def kind(value: Any) -> str:
    """What JSON calls a value of this type."""
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
            float: "a number", type(None): "null"}.get(type(value), type(value).__name__)


def want(row: Any, *keys: str) -> list:
    """The values of these keys."""
    if not isinstance(row, dict):
        raise BadRow("not an object", f"found {kind(row)}, wanted an object with the keys {', '.join(keys)}")
    if any(key not in row for key in keys):
        hint = ("  (OASST? write oasst1:PATH)" if "message_tree_id" in row else
                "  (preferences? add --pairs, or use dpo.py)" if "chosen" in row and "messages" in keys else "")
        found = ", ".join(excerpt(key)[:40] for key in sorted(row)[:12]) or "none"
        raise BadRow("wrong keys", f"keys found: {found}; keys wanted: {', '.join(keys)}{hint}")
    return [row[key] for key in keys]


def as_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{key} is {kind(value)}, wanted a string")
    if len(value) > LONGEST_TEXT:
        raise Drop(f"a message over {LONGEST_TEXT:,} characters")
    return clean(value)


def as_messages(value: Any, key: str) -> Conversation:
    """A list of {"role", "content"}, checked; empty messages are left in."""
    if not isinstance(value, list) or not value:
        raise BadRow("wrong type", f"{key} is {kind(value) if value != [] else 'empty'}, wanted a list of messages")
    messages = []
    for message in value:
        role, content = want(message, "role", "content")
        if role not in ROLES:
            raise BadRow("unknown role", f"{key} has the role {excerpt(role)!r}, wanted one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": as_text(content, "content")})
    return messages


def until_last_reply(messages: Conversation) -> Conversation:
    """The conversation up to its last assistant message before anything empty. An empty system message just goes."""
    messages = [m for m in messages if m["content"] or m["role"] != "system"]
    empty = next((i for i, m in enumerate(messages) if not m["content"]), len(messages))
    end = next((i for i in range(empty, 0, -1) if messages[i - 1]["role"] == "assistant"), 0)
    if not end:
        raise Drop("empty message" if empty < len(messages) else "no reply")
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
    if not chosen or not rejected:
        raise Drop("empty reply")
    if chosen == rejected:
        raise Drop("identical replies")
    return Preference(prompt, chosen, rejected, key)


# ---- the readers ---------------------------------------------------------------------------------


@row_by_row
def read_messages(row: dict) -> Thread:
    """{"messages": [{"role", "content"}, ...]}: SmolTalk, saved chats, anyone's JSONL."""
    messages = as_messages(*want(row, "messages"), "messages")
    kept = until_last_reply(messages)
    return Thread(kept, cut=None if kept[-1] is messages[-1] else "no reply")


@row_by_row
def read_preferences(row: dict) -> Preference:
    """{"prompt", "chosen", "rejected"}: lists of messages or plain strings; without a prompt, what the two lists share.

    Lists may also repeat the prompt, as in ultrafeedback_binarized. Two strings without one are transcripts in
    HH-RLHF's manner.
    """
    chosen, rejected = want(row, "chosen", "rejected")
    prompt = row.get("prompt")
    if prompt is None and isinstance(chosen, str):
        return hh_preference(row)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    prompt = [] if prompt is None else as_messages(prompt, "prompt")
    sides = [[{"role": "assistant", "content": as_text(side, key)}] if isinstance(side, str) else as_messages(side, key)
             for key, side in (("chosen", chosen), ("rejected", rejected))]
    if sides[0][:len(prompt)] == prompt or (isinstance(row["prompt"], str) and sides[0][0]["role"] != "assistant"):
        prompt = []
    return preference(prompt + sides[0], prompt + sides[1])


def hh_preference(row: dict) -> Preference:
    """HH-RLHF: {"chosen", "rejected"}, each a transcript whose turns open with a blank line and Human: or Assistant:"""
    sides = []
    for key, transcript in zip(("chosen", "rejected"), want(row, "chosen", "rejected"), strict=True):
        opening, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + as_text(transcript, key))
        if opening.strip() or not turns:
            raise Drop("text before the first turn" if opening.strip() else "empty transcript")
        sides.append([{"role": "user" if who == "Human" else "assistant", "content": clean(said)}
                      for who, said in zip(turns[::2], turns[1::2], strict=True)])
    return preference(*sides)


read_hh = row_by_row(hh_preference)
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


@row_by_row
def read_ultrafeedback(row: dict) -> Preference:
    """UltraFeedback: the completion with the highest mean rating against that with the lowest.

    The mean is over the four aspects as far as they were rated; not `overall_score`, whose tens are partly ones.
    """
    instruction, completions = want(row, "instruction", "completions")
    if not isinstance(completions, list):
        raise BadRow("wrong type", f"completions is {kind(completions)}, wanted a list")
    rated = []
    for completion in completions:
        response, annotations = want(completion, "response", "annotations")
        if not isinstance(annotations, dict):
            raise BadRow("wrong type", f"annotations is {kind(annotations)}, wanted an object")
        given = [annotations.get(aspect) for aspect in ASPECTS]
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


@dataclass(slots=True)
class Message:
    """A message of an OASST tree. `defect` says why it is not used, if it is not."""

    id: str
    parent: str | None
    role: str
    text: str
    rank: int | None
    defect: str | None

    def as_dict(self) -> dict:
        return {"role": self.role, "content": self.text}


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
        defect = ("tree given up" if row.get("tree_state") in ("aborted_low_grade", "halted_by_moderator") else
                  "deleted" if raw.get("deleted") else
                  "failed review" if raw.get("review_result") is False else
                  "spam" if spam(raw.get("labels")) >= 0.5 else
                  "other language" if (raw.get("lang") or language) != language else
                  "empty message" if not text else None)
        rank = None if rank != rank else rank      # pandas writes NaN for null
        messages.append(Message(name, parent, "user" if role == "prompter" else role, text, rank, defect))
        todo += [(reply, name) for reply in replies]
    return messages


def spam(labels: Any) -> float:
    """The share of reviewers who called a message spam.

    Trees keep {"spam": {"value"}}, the Hub {"name": [...], "value": [...]} or a list of {"name", "value"}.
    """
    match labels:
        case {"spam": {"value": share}}:
            shares = [share]
        case {"name": list(names), "value": list(values)}:
            shares = [value for name, value in zip(names, values, strict=False) if name == "spam"]
        case [*items]:
            shares = [item.get("value") for item in items if isinstance(item, dict) and item.get("name") == "spam"]
        case _:
            shares = []
    return max((share for share in shares if isinstance(share, int | float)), default=0.0)


def oasst_forest(rows: Iterable[FileRow], count: Count,
                 language: str) -> tuple[list[Message], dict[str, list[Message]]]:
    """(first messages by id, {message id: its replies by rank, unranked ones last, and id}), every message once."""
    messages: dict[str, Message] = {}
    for message in chain.from_iterable(count.each(rows, lambda row: oasst_messages(row, language))):
        if messages.setdefault(message.id, message) is not message:
            count.notes["messages that were there already"] += 1
    count.notes["messages read"] += len(messages)
    replies = defaultdict(list)
    for message in sorted(messages.values(), key=lambda m: (m.rank is None, m.rank or 0, m.id)):
        replies[message.parent].append(message)

    def below(tops: list[Message]) -> int:
        seen, todo = 0, list(tops)
        while todo:
            seen += 1
            todo.extend(replies.get(todo.pop().id, ()))
        return seen

    roots = replies.pop(None, [])
    orphans = below([m for m in messages.values() if m.parent is not None and m.parent not in messages])
    cycles = len(messages) - orphans - below(roots)
    count.drop("orphan", orphans)
    count.drop("cycle", cycles)
    return sorted(roots, key=lambda m: m.id), replies


def oasst_walk(root: Message, replies: dict[str, list[Message]]) -> Iterator[tuple[tuple[Message, ...], str | None]]:
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
            todo += [(reply, path) for reply in reversed(replies.get(message.id, ()))]
        yield path, defect


def read_oasst(rows: Iterable[FileRow], count: Count, language: str) -> Iterator[Thread]:
    """OASST conversations. A path that ends in something dropped is cut at its last good assistant message.

    Whole paths come first and longer ones before shorter ones, so that a cut path whose every reply is part of
    another one has nothing left to teach and is dropped, for the reason of the cut, when the rows are built.
    """
    roots, replies = oasst_forest(rows, count, language)
    for root in roots:
        ends = []
        for path, defect in oasst_walk(root, replies):
            if defect or not replies.get(path[-1].id):
                unanswered = len(path) % 2      # for the two take turns
                ends.append((path[:len(path) - unanswered], defect or ("no reply" if unanswered else None)))
        for path, cut in sorted(ends, key=lambda end: (end[1] is not None, -len(end[0]) if end[1] else 0)):
            if path:
                yield Thread([m.as_dict() for m in path], [m.id for m in path], cut)
            else:
                count.drop(cut)


def read_oasst_pairs(rows: Iterable[FileRow], count: Count, language: str) -> Iterator[Preference]:
    """OASST ranks: of two ranked siblings the one of lower rank is better; the conversation so far is the prompt.

    A reply that failed its review may be the worse one, never the better.
    """
    roots, replies = oasst_forest(rows, count, language)
    for path, defect in chain.from_iterable(oasst_walk(root, replies) for root in roots):
        count.drop(defect, defect is not None)
        if defect or path[-1].role == "assistant":
            continue
        siblings = [m for m in replies.get(path[-1].id, ()) if m.role == "assistant"
                    and m.defect in (None, "failed review")]    # people ranked those too: last, and rightly
        ranked = [m for m in siblings if m.rank is not None]
        count.drop("no rank", len(siblings) - len(ranked))
        count.drop("nothing to compare with", len(ranked) == 1)
        count.drop(f"beyond the best {MOST_SIBLINGS} siblings", max(0, len(ranked) - MOST_SIBLINGS))
        for better, worse in combinations(ranked[:MOST_SIBLINGS], 2):
            try:
                if better.rank == worse.rank:
                    raise Drop("tied ranks")
                if better.defect:
                    raise Drop(better.defect)
                yield comparison([m.as_dict() for m in path], better.text, worse.text, (better.id, worse.id))
            except Drop as drop:
                count.drop(drop.args[0])


# ---- files, folders and the Hub ------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    conversations: Reader | None = None
    preferences: Reader | None = None
    file: Path | None = None                # where it is, if it came with the project
    hub: str | None = None                  # and if not
    config: str | None = None
    columns: tuple[str, ...] | None = None  # the Hub's columns that are read, where the others are many


OASST_COLUMNS = ("message_id", "parent_id", "text", "role", "lang", "review_result", "deleted", "rank", "labels",
                 "tree_state")
DATA_SETS = {
    "sample": DataSet(read_oasst, read_oasst_pairs, file=HERE / "sample" / "conversations.jsonl.gz"),
    "oasst1": DataSet(read_oasst, read_oasst_pairs, hub="OpenAssistant/oasst1", columns=OASST_COLUMNS),
    "oasst2": DataSet(read_oasst, read_oasst_pairs, hub="OpenAssistant/oasst2", columns=OASST_COLUMNS),
    "smoltalk": DataSet(read_messages, None, hub="HuggingFaceTB/smoltalk", config="all"),
    "hh-rlhf": DataSet(None, read_hh, hub="Anthropic/hh-rlhf"),
    "ultrafeedback": DataSet(None, read_ultrafeedback, hub="openbmb/UltraFeedback",
                             columns=("instruction", "completions")),
    "jsonl": DataSet(read_messages, read_preferences),      # what a PATH without a NAME is
}


def parse_spec(spec: str) -> tuple[str, Path | None, float]:
    """NAME, NAME:PATH or PATH, with an optional @WEIGHT -> (name, path or None, weight)."""
    source, weight = spec, 1.0
    if match := re.fullmatch(r"(.+)@(\d{1,9}(?:\.\d{,9})?)", spec, re.DOTALL):
        source, weight = match[1], float(match[2])
        if not 0 < weight <= 100:
            raise ValueError(f"the weight of {excerpt(spec)!r} must be a number above 0 and at most 100")
    name, _, path = source.partition(":")
    if name in DATA_SETS and (path or source == name != "jsonl"):
        return name, Path(path) if path else None, weight
    return "jsonl", Path(source), weight


def open_spec(name: str, path: Path | None) -> Iterator[FileRow]:
    """The rows of a data set, from wherever it is."""
    data_set = DATA_SETS[name]
    path = path or data_set.file
    if path is None:
        return hub_rows(name, data_set)
    shown = visible(str(path))[:200]
    folder = file = False
    with suppress(OSError, ValueError):     # a name that no file can have
        folder, file = path.is_dir() and path != Path(), path.is_file()
    if folder or (file and path.suffix == ".parquet"):
        return folder_rows(path, data_set)
    if file:
        return file_rows(path)
    if name == "jsonl":
        close = difflib.get_close_matches(str(path), DATA_SETS, n=1)
        known = ", ".join(n for n in DATA_SETS if n != "jsonl")
        raise FileNotFoundError(f"no data set and no file is called {shown!r} (in {Path.cwd()})\n"
                                + (f"Did you mean {close[0]}?  " if close else "") + f"Known names: {known}")
    makes = "\nMake it:  uv run sample/make.py" if name == "sample" else ""
    raise FileNotFoundError(f"{name}: there is no file or folder {shown!r} (in {Path.cwd()}){makes}")


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def file_rows(path: Path) -> Iterator[FileRow]:
    """The rows of a .jsonl, .jsonl.gz or .json file, each line by itself, whatever it holds."""
    shown, zipped = visible(str(path))[:200], is_gzip(path)
    if path.suffix == ".json" and not zipped and path.stat().st_size < LONGEST_LINE:
        whole = parse_json(path.read_bytes())
        if not isinstance(whole, BadRow):   # otherwise it may be JSONL by another name
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"{shown}[{i}]", row, row) for i, row in enumerate(rows))
            return
    number = rows = 0
    with gzip.open(path) if zipped else open(path, "rb") as file:
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
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                rows += 1
                yield f"{shown}:{number}", line, parse_json(line)
    if not rows:
        raise ValueError(f"{shown} is empty; wanted one JSON object a line")


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


def folder_rows(path: Path, data_set: DataSet) -> Iterator[FileRow]:
    """The rows of a folder (or parquet file), all splits, as `load_dataset` reads it."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if path.is_file():
            splits = datasets.load_dataset("parquet", data_files=str(path))
        else:
            configs = datasets.get_dataset_config_names(str(path))
            splits = datasets.load_dataset(str(path), data_set.config if data_set.config in configs else None)
    except Exception as error:      # anything at all, for anything at all may lie in a folder
        raise ValueError(f"{visible(str(path))[:200]}: load_dataset cannot read it: {excerpt(error)}\n"
                         "Wanted a folder of parquet or JSON files that share their columns") from error
    return dataset_rows(splits, visible(str(path))[:200], data_set)


def hub_rows(name: str, data_set: DataSet) -> Iterator[FileRow]:
    """The rows of a data set of the Hugging Face Hub, all splits, from the local cache if the Hub cannot be reached."""
    if not hub_answers():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")    # or the library asks again and again for half a minute
    import datasets

    try:
        splits = datasets.load_dataset(data_set.hub, data_set.config)
    except Exception as error:
        folder = f"data/{name}"
        raise FileNotFoundError(
            f"{name}: {data_set.hub} is not in {visible(str(datasets.config.HF_DATASETS_CACHE))}\n"
            f"  and the Hub did not give it: {excerpt(error)}\n"
            f"With a network, get it:  uv run hf download --repo-type dataset {data_set.hub} --local-dir {folder}\n"
            f"and name the folder:     {name}:{folder}") from error
    return dataset_rows(splits, data_set.hub, data_set)


def hub_answers() -> bool:
    """Whether the Hub's name can be looked up (where there is a proxy, that is the proxy's business)."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(getproxies() or socket.getaddrinfo(host, 443))
    except OSError:
        return False


def dataset_rows(splits: dict, source: str, data_set: DataSet) -> Iterator[FileRow]:
    for split, table in splits.items():
        columns = [column for column in data_set.columns or () if column in table.column_names]
        table = (table.select_columns(columns) if columns else table).with_format("arrow")
        rows = chain.from_iterable(batch.to_pylist() for batch in table.iter(batch_size=1000))
        yield from ((f"{source} {split} row {number}", row, row) for number, row in enumerate(rows, 1))


# ---- from SPECs to rows --------------------------------------------------------------------------


@dataclass
class Data:
    """What training needs of its data. Rows of one conversation tree are all in train or all in val."""

    train: list[Row] | list[Pair]
    val: list[Row] | list[Pair]
    counts: list[Count] # what became of the rows, by SPEC
    fingerprint: str    # sha256 over all ids and masks in order: a resumed run must see the same data

    @property
    def report(self) -> Count:
        """What became of the rows of all SPECs."""
        return Count("all", kept=sum(count.kept for count in self.counts),
                     dropped=sum((count.dropped for count in self.counts), Counter()),
                     notes=sum((count.notes for count in self.counts), Counter()))

    def report_json(self) -> dict:
        """The counts, and what the rows are like: lengths in tokens (of a pair, both replies and the prompt once)."""
        rows = [*self.train, *self.val]
        lengths = [len(row) for row in rows]
        learnt = sum(len(row) - len(row.prompt) if isinstance(row, Pair) else int(row.mask.sum()) for row in rows)
        return self.report.as_json() | {
            "train": len(self.train), "val": len(self.val), "tokens": sum(lengths), "supervised_tokens": learnt,
            "supervised_share": round(learnt / sum(lengths), 4),
            "length": {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 25, 50, 75, 95)} | {"max": max(lengths)},
            "specs": [count.as_json() for count in self.counts], "fingerprint": self.fingerprint}


def load_rows(specs: Sequence[str], *, context: int = 1024, val_fraction: float = 0.05, seed: int = 0,
              bad_rows: Literal["error", "skip"] = "error", language: str = "en") -> Data:
    """The conversations of all SPECs as rows."""
    seen: set[str] = set()
    return _load(specs, "conversations", lambda *thread: build_row(*thread, context, seen), val_fraction, seed,
                 bad_rows, language)


def load_pairs(specs: Sequence[str], *, context: int = 1024, val_fraction: float = 0.05, seed: int = 0,
               bad_rows: Literal["error", "skip"] = "error", language: str = "en") -> Data:
    """The preferences of all SPECs as pairs."""
    seen: set[tuple[str, str]] = set()
    return _load(specs, "preferences", lambda *pair: build_pair(*pair, context, seen), val_fraction, seed, bad_rows,
                 language)


def reading(cfg) -> dict:
    """What `load_rows` and `load_pairs` can be told, from a Config that has a setting for each."""
    return {name: getattr(cfg, name) for name in ("context", "val_fraction", "seed", "bad_rows", "language")}


def build_row(thread: Thread, encoded: dict, count: Count, context: int, seen: set[str]) -> Row:
    """Too long a thread loses its oldest exchanges before it loses the end of its last reply, and with that the EOT.

    `seen` holds the messages that are learnt in rows before this one: a turn that threads share is learnt once.
    """
    messages = without_oldest(thread.messages, context, encoded=encoded)
    keys = thread.keys and thread.keys[len(thread.keys) - len(messages):]   # OASST has no system messages
    learn = [m["role"] == "assistant" and not (keys and keys[i] in seen) for i, m in enumerate(messages)]
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


def build_pair(pair: Preference, encoded: dict, count: Count, context: int, seen: set[tuple[str, str]]) -> Pair:
    """Too long a prompt loses its oldest exchanges, then the start of its last message. Both replies stay whole."""
    if pair.key in seen:
        raise Drop("the same pair was read before")
    chosen, rejected = (np.array([*encoded[reply], EOT], np.int32) for reply in (pair.chosen, pair.rejected))
    room = context - max(len(chosen), len(rejected))
    messages = without_oldest(pair.prompt, room, reply=True, encoded=encoded)
    prompt, _ = render(messages, reply=True, encoded=encoded)
    if len(prompt) > room:
        last = len(encoded[messages[-1]["content"]])
        if len(prompt) - room >= last:
            raise Drop("replies too long for the context")
        start = len(prompt) - len(_header("assistant")) - last
        prompt = np.delete(prompt, slice(start, start + len(prompt) - room))
        count.notes["lost the start of its prompt's last message"] += 1
    count.notes["lost its oldest exchanges"] += len(messages) < len(pair.prompt)
    if pair.key:
        seen.add(pair.key)
    return Pair(prompt, chosen, rejected)


def tree_hash(seed: int, messages: Conversation) -> tuple[float, float]:
    """Two numbers in [0, 1) for the tree of a conversation: one decides its side, the other whether a weight takes it.

    A tree is known by what its user says first, and so are two trees, in whatever data sets, that ask the same.
    """
    opening = next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])
    opening = " ".join(opening.casefold().split())
    digest = hashlib.blake2b(f"{seed}\0{opening}".encode(), digest_size=16).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53, (int.from_bytes(digest[8:], "big") >> 11) / 2**53


def _load(specs, what, build, val_fraction, seed, bad_rows, language) -> Data:
    """Read, encode in bulk, build, split, weigh."""
    specs = [specs] if isinstance(specs, str) else list(specs)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, wanted at least 0 and less than 1")
    counts, built = [], []      # built: (side, row, its copies if it is trained on)
    for spec in specs:
        name, path, weight = parse_spec(spec)
        reader = getattr(DATA_SETS[name], what)
        if reader is None:
            able = ", ".join(n for n, data_set in DATA_SETS.items() if getattr(data_set, what) and n != "jsonl")
            raise ValueError(f"{name} holds no {what}\nThese do: {able}, or your own PATH.jsonl")
        counts.append(count := Count(visible(spec), bad_rows))
        candidates = iter(reader(open_spec(name, path), count, language))
        while chunk := list(islice(candidates, 4096)):      # bounded, for a data set may have a million
            hashes = [tree_hash(seed, c.messages if isinstance(c, Thread) else c.prompt) for c in chunk]
            copies = [int(weight) + (luck < weight % 1) for _, luck in hashes]
            wanted = [(c, side, n) for c, (side, _), n in zip(chunk, hashes, copies, strict=True) if n]
            if len(wanted) < len(chunk):
                count.drop("left out by its weight", len(chunk) - len(wanted))
            encoded = encode_all(text for candidate, _, _ in wanted for text in texts_of(candidate))
            for candidate, side, n in wanted:
                try:
                    built.append((side, build(candidate, encoded, count), n))
                    count.kept += 1
                except Drop as drop:
                    count.drop(drop.args[0])
        count.notes = +count.notes      # less those that are zero
    if not built:
        reasons = sum((count.dropped for count in counts), Counter()).most_common(5)
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in reasons) or "it has none"
        first = next((f"\nfor example  {c.first_bad}" for c in counts if c.first_bad), "")
        raise ValueError(f"no {what} are left of {excerpt(' '.join(specs))}: {reasons}{first}")
    threshold, sides = val_fraction, sorted({side for side, _, _ in built})
    if val_fraction and len(sides) > 1:     # be the data set ever so small, there is a tree to validate on
        threshold = max(threshold, sides[0] + 2**-53)
    threshold = min(threshold, sides[-1])   # and one to train on
    train = [row for side, row, n in built if side >= threshold for _ in range(n)]
    val = [row for side, row, _ in built if side < threshold]
    return Data(train, val, counts, fingerprint(train, val))


def texts_of(candidate: Thread | Preference) -> list[str]:
    if isinstance(candidate, Thread):
        return [message["content"] for message in candidate.messages]
    return [message["content"] for message in candidate.prompt] + [candidate.chosen, candidate.rejected]


def fingerprint(*sides: Sequence[Row | Pair]) -> str:
    digest = hashlib.sha256()
    for rows in sides:
        digest.update(len(rows).to_bytes(8, "big"))
        for row in rows:
            for array in (row.prompt, row.chosen, row.rejected) if isinstance(row, Pair) else (row.ids, row.mask):
                digest.update(len(array).to_bytes(8, "big"))
                digest.update(array.tobytes())
    return digest.hexdigest()


# ---- checks: questions with the facts of a good answer -------------------------------------------


@dataclass
class Check:
    """A conversation to be answered, and what a good answer says and does not say."""

    messages: Conversation
    facts: list[list[str]]                  # each a list of wordings
    forbidden: list[str]
    subject: str | None
    group: str
    stated: dict[str, dict[tuple[str, ...], set[str]]] = field(repr=False)  # first word -> statement -> its subjects,
                                            # of the whole file, so that a reply is searched for all in one pass


@dataclass
class Verdict:
    correct: bool       # about the subject, at least one fact, nothing wrong
    about: bool         # names the subject
    facts: int          # facts of the check that are stated
    wrong: list[str]    # what should not be there: facts of others, and what is forbidden
    ended: bool         # the reply ended by itself
    words: int
    group: str


def words(text: str) -> list[str]:
    """Case and white space folded; punctuation marks count as words, so that C and C++ differ."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    return re.findall(r"\w+|[^\w\s]", text)


def occurs(phrase: list[str], text: list[str]) -> bool:
    return any(word == phrase[0] and text[i:i + len(phrase)] == phrase for i, word in enumerate(text))


def plurals(subject: str) -> list[list[str]]:
    """A subject and its plurals as lists of words: baker, bakers; secretary, secretaries; fireman, firemen."""
    *first, last = words(subject) or [""]
    forms = [last, last + "s", last + "es"]
    for ending, plural in (("y", "ies"), ("man", "men"), ("woman", "women"), ("person", "people"), ("fe", "ves")):
        if last.endswith(ending):
            forms.append(last.removesuffix(ending) + plural)
    return [[*first, form] for form in forms]


def read_checks(path: str | Path) -> list[Check]:
    """The checks of a JSONL file; its lines without `messages` only state what is true of a subject.

    {"messages": [...], "facts": ["one wording" or ["or", "another"], ...], "forbidden": [...], "subject", "group"}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checks file {visible(str(path))[:200]!r} (in {Path.cwd()})")
    checks, stated = [], defaultdict(lambda: defaultdict(set))
    for row in Count(str(path), bad_rows="").each(file_rows(path), read_check):
        messages, facts, forbidden, subject, group = row
        if subject:
            for statement in (tuple(words(wording)) for fact in facts for wording in fact):
                stated[statement[0]][statement].add(subject.casefold())
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
    if not isinstance(facts, list):
        raise BadRow("wrong type", f"facts is {kind(facts)}, wanted a list")
    facts = [[as_text(wording, "a fact") for wording in (fact if isinstance(fact, list) else [fact])] for fact in facts]
    forbidden = [as_text(phrase, "forbidden") for phrase in forbidden]
    if any(not words(phrase) for phrase in [*forbidden, *chain.from_iterable(facts)]) or not all(facts):
        raise BadRow("empty fact", "a fact or a forbidden phrase is empty")
    return messages, facts, forbidden, subject and clean(subject), group


def judge(check: Check, reply: str, ended: bool) -> Verdict:
    """What the reply is worth.

    A fact of another subject is wrong unless it is stated of this one too, or is part of something that is.
    """
    text = words(reply)
    wrong = [phrase for phrase in check.forbidden if occurs(words(phrase), text)]
    own, others = [], []    # (start, end) in the reply of what the file states of this subject, and of others only
    for i, word in enumerate(text if check.subject else ()):
        for statement, subjects in check.stated.get(word, {}).items():
            if tuple(text[i:i + len(statement)]) == statement:
                (own if check.subject.casefold() in subjects else others).append((i, i + len(statement)))
    wrong += [" ".join(text[i:j]) for i, j in others if not any(a <= i and j <= b for a, b in own)]
    about = not check.subject or any(occurs(form, text) for form in plurals(check.subject))
    facts = sum(any(occurs(words(wording), text) for wording in fact) for fact in check.facts)
    return Verdict(about and facts >= 1 and not wrong, about, facts, wrong, ended, len(reply.split()), check.group)


def tally(verdicts: Iterable[Verdict]) -> dict[str, dict[str, float]]:
    """By group, and "all": how many, and the means of correct, facts, ended (shares) and words."""
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        groups[verdict.group].append(verdict)
    groups["all"] = list(chain.from_iterable(groups.values()))
    return {group: {"n": len(members)} | {name: sum(getattr(v, name) for v in members) / max(1, len(members))
                                          for name in ("correct", "facts", "ended", "words")}
            for group, members in groups.items()}


# ---- on the screen -------------------------------------------------------------------------------

# Control characters have pictures; what else steers a terminal or reorders a line is spelt out by its number.
INVISIBLE = ({c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
             | dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
             | {c: f"<U+{c:04X}>" for c in (*range(0x80, 0xA0), 0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010),
                                            *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0xFEFF,
                                            *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))})


def visible(text: str) -> str:
    """Text fit for a terminal: nothing in it can move the cursor, change colours or turn the line around."""
    return text.translate(INVISIBLE)


def transcript(messages: Conversation, width: int = 88) -> str:
    """The conversation as it is shown: a rule with the role, then the content, wrapped."""
    shown = []
    for message in messages:
        lines = visible(message["content"].strip()).split("\n")
        wrapped = [textwrap.fill(line, width, replace_whitespace=False, drop_whitespace=True, break_long_words=False,
                                 break_on_hyphens=False) if len(line) > width else line for line in lines]
        shown.append(f"========== {message['role']} ==========\n" + "\n".join(wrapped) + "\n")
    return "\n".join(shown)


def describe(data: Data, what: str) -> str:
    """The report in words."""
    facts = data.report_json()
    lines = []
    for spec in facts["specs"]:
        lines.append(f"{spec['spec']}: {spec['kept']:,} {what} kept, {sum(spec['dropped'].values()):,} dropped")
        lines += [f"  dropped  {n:>9,}  {reason}" for reason, n in spec["dropped"].items()]
        lines += [f"  note     {n:>9,}  {note}" for note, n in spec["notes"].items()]
    length = "  ".join(f"{q} {n:,}" for q, n in facts["length"].items())
    return "\n".join([*lines, f"rows      {facts['train']:,} to train on, {facts['val']:,} to validate on",
                      f"tokens    {facts['tokens']:,}, of which {facts['supervised_share']:.1%} are supervised",
                      f"lengths   {length}"])


def print_example(row: Row | Pair) -> None:
    """The text of a row, with what is learnt (or chosen) and what is rejected in colour, or between «» and ‹›."""
    if isinstance(row, Pair):
        pieces = [(row.prompt, "dim", "{}"), (row.chosen, "bold green", "«{}»"), (row.rejected, "red", "‹{}›")]
    else:
        edges = [0, *(np.flatnonzero(np.diff(row.mask)) + 1), len(row)]
        pieces = [(row.ids[a:b], "bold green" if row.mask[a] else "dim", "«{}»" if row.mask[a] else "{}")
                  for a, b in pairwise(edges)]
    pieces = [(visible(text_of(ids)), style, marks) for ids, style, marks in pieces]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        from rich.console import Console
        from rich.text import Text
        Console().print(Text.assemble(*((text, style) for text, style, _ in pieces)))
    else:
        print("".join(marks.format(text) for text, _, marks in pieces))


# ---- the command line ----------------------------------------------------------------------------


@dataclass
class Config:
    """Show what data sets become: counts, drops by reason, lengths, and one example with its supervised tokens."""

    # NAME, NAME:PATH or PATH, each with an optional @WEIGHT
    specs: tyro.conf.Positional[tuple[str, ...]] = ("sample",)
    pairs: bool = False  # read preferences, as dpo.py does, where there are conversations too
    json: bool = False  # print the counts as one JSON object and nothing else
    bad_rows: Literal["error", "skip"] = "error"  # what to do about rows that cannot be read
    context: int = 1024  # tokens of the longest row
    val_fraction: float = 0.05  # share of the conversation trees that is kept for validation
    seed: int = 0  # decides which trees these are
    language: str = "en"  # which language of OASST
    row: int | None = None  # show this training row, counted from 0, instead of one of median length
    debug: bool = False  # show the traceback of an error


def only_preferences(spec: str) -> bool:
    """Whether a data set has no other use; of a PATH its first row tells."""
    name, path, _ = parse_spec(spec)
    if name != "jsonl":
        return DATA_SETS[name].conversations is None
    first = next((row for _, _, row in open_spec(name, path) if isinstance(row, dict)), {})
    return "chosen" in first and "messages" not in first


def main(cfg: Config) -> Data:
    pairs = cfg.pairs or all(map(only_preferences, cfg.specs))
    data = (load_pairs if pairs else load_rows)(cfg.specs, **reading(cfg))
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
    from train import run_script

    run_script(main, Config)
