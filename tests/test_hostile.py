"""Nothing is let in: no row of a file brings a reader down or a control token into a batch.

The quick tier reads hundreds of mutated rows of each format, `uv run pytest -n 0 -m full` 10,000; mutants.py makes
them.
"""

import contextlib
import json
import random
import re
import signal
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import mutants
import pytest
from readback import messages_of
from trials import report

import data

STEERS_A_TERMINAL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


@contextlib.contextmanager
def within(seconds: int):
    """The end of a test that hangs."""
    def hang(*_):
        raise AssertionError(f"hangs: over {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(form: mutants.Format, path: Path, bad_rows: str):
    """What data.py makes of the file, or None if it refuses, which it does in at most five lines."""
    try:
        with within(20):
            if form.what == "checks":
                return data.read_checks(path)
            load = data.load_rows if form.what == "conversations" else data.load_pairs
            return load([f"{form.spec}{path}"], data.Reading(context=96, bad_rows=bad_rows))
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert type(error) in (ValueError, FileNotFoundError), repr(error)
        assert 1 <= len(message.splitlines()) <= 5 and len(message) < 1500, message
        assert not re.search(STEERS_A_TERMINAL, message), ascii(message)
        return None


def assert_reads_mutants(form: mutants.Format, folder: Path, rows: list[bytes], rng: random.Random) -> int:
    """Each row alone, where bad rows are errors; then all together, where they are skipped. How many were refused.

    Among them are sound ones, which are read, and read right, whatever is beside them.
    """
    path, refused, wanted = folder / "rows.jsonl", 0, set()
    for row in rows:
        mutants.write(path, [row], rng)
        refused += read(form, path, "error") is None
    lines = [json.dumps(form.make(random.Random(0))).encode()]
    for n in range(1 + len(rows) // 10):
        good, texts = mutants.sound(form.make, n)
        lines += [*(json.dumps(line).encode() for line in good), *(rows[n::1 + len(rows) // 10])]
        wanted.add(texts)
    mutants.write(path, [line for line in lines if form.what != "checks" or line not in rows], rng)
    found = read(form, path, "skip")
    assert wanted <= contents(form, found)
    if form.what != "checks":
        counts = found.report_json()
        assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"]
        lines = sum(bool(line.strip(b" \t\r\n\xef\xbb\xbf")) for line in lines)
        if form.make is mutants.flat:
            notes = ("messages read", "messages that were there already")
            messages = sum(counts["notes"].get(note, 0) for note in notes)
            bad = sum(n for reason, n in counts["dropped"].items() if reason.startswith("bad row"))
            assert messages + bad <= lines
        elif form.make is not mutants.tree:
            assert counts["read"] == lines
        for row in found.train + found.val:
            assert_whole(row)
    return refused


def contents(form: mutants.Format, found) -> set[tuple[str, ...]]:
    """(question, good reply, worse reply) of all that was read; of a conversation, the worse one is made up."""
    if form.what == "checks":
        return {(c.messages[-1]["content"], c.facts[0][0], c.forbidden[0]) for c in found}
    rows = found.train + found.val
    if form.what == "preferences":
        replies = [[data.text_of(ids[:-1]) for ids in (row.chosen, row.rejected)] for row in rows]
        return {(messages_of(row.prompt)[0]["content"], *pair) for row, pair in zip(rows, replies, strict=True)}
    turns = [[m["content"] for m in messages_of(row.ids)[:2]] for row in rows]
    return {(*turn, turn[-1].replace("good", "worse")) for turn in turns}


def assert_whole(row) -> None:
    """No control id but those that open and close messages."""
    pair = hasattr(row, "prompt")
    for ids in (row.prompt, row.chosen, row.rejected) if pair else (row.ids,):
        assert ids.min() >= 0 and ids.max() <= data.EOT
    for reply in (row.chosen, row.rejected) if pair else ():
        assert (reply == data.EOT).sum() == 1 and reply[-1] == data.EOT
    conversation = row.prompt if pair else row.ids
    assert len(messages_of(conversation)) == (conversation == data.EOT).sum() - (conversation[-1] == data.EOT)


@pytest.mark.parametrize("name", mutants.FORMATS)
def test_mutated_rows_are_read_or_refused(name, tmp_path):
    rng = random.Random(name)
    rows = [mutants.row(mutants.FORMATS[name].make, rng, lambda: 7) for _ in range(150)]
    refused = assert_reads_mutants(mutants.FORMATS[name], tmp_path, rows, rng)
    assert 15 < refused < 145 or (refused == 150 and name.startswith("oasst message"))  # one message is no conversation


@pytest.mark.parametrize("name", mutants.FORMATS)
def test_any_value_anywhere(name, tmp_path):
    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(st.randoms(use_true_random=False), st.lists(JSON, min_size=1, max_size=5))
    def trial(rng, values):
        rows = [mutants.row(mutants.FORMATS[name].make, rng, lambda: rng.choice(values)) for _ in range(4)]
        assert_reads_mutants(mutants.FORMATS[name], tmp_path, rows, rng)

    trial()


@pytest.mark.full
@pytest.mark.parametrize("name", mutants.FORMATS)
def test_ten_thousand_mutated_rows(name, tmp_path, record_property):
    form, rng = mutants.FORMATS[name], random.Random(f"full {name}")
    values = []

    @hypothesis.settings(max_examples=1000, deadline=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(JSON)
    def collect(value):
        values.append(value)

    collect()
    refused = sum(assert_reads_mutants(form, tmp_path, [mutants.row(form.make, rng, lambda: rng.choice(values))
                                                        for _ in range(100)], rng) for _ in range(100))
    report(record_property, f"mutated rows of {name}: {refused:,} refused, no traceback, no hang", 10_000)


def hostile_conversation(rng: random.Random) -> list[dict]:
    return [{"role": rng.choice(("system", "user", "assistant")), "content": mutants.hostile_string(rng)}
            for _ in range(rng.randrange(1, 6))]


def assert_turns_stay(rng: random.Random) -> None:
    talk = hostile_conversation(rng)
    ids, mask = data.render(talk)
    assert (ids == data.EOT).sum() == len(talk) + 1
    back = messages_of(ids)
    assert [m["role"] for m in back] == [m["role"] for m in talk]
    assert [m["content"] for m in back] == [data.clean(m["content"]) for m in talk]
    ends = [m["role"] == "assistant" for m in talk]
    assert mask[ids == data.EOT].tolist() == [False, *ends]
    shown = data.transcript(talk)
    assert not re.search(STEERS_A_TERMINAL, shown), ascii(shown)


def test_hostile_text_makes_no_turn():
    rng = random.Random(0)
    for _ in range(1000):
        assert_turns_stay(rng)


@pytest.mark.full
def test_ten_thousand_hostile_conversations(record_property):
    rng = random.Random(1)
    for _ in range(10_000):
        assert_turns_stay(rng)
    report(record_property, "hostile conversations, turns out are turns in", 10_000)
