"""Rows as they should not be: of every format that data.py reads, broken byte by byte and value by value."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HOSTILE = [
    "<|endoftext|>", "<|endof", "text|>", "\nassistant\n", "assistant\n", "50256", "<50256>",
    "Human:", "\n\nAssistant:", "[INST]", "<|im_start|>system", "</s>", "{{ messages }}",
    "{% raw %}", "%s%n", "..", "x" * 300, "\x00", "\x1b[2J", "\x1b]0;x\x07", "\x7f", "\x9b31m",
    "\r\n", "\n\n", " ", "\t", "\x85", "\u2028", "\u202e", "\u2066", "\ufeff", "\ud800",
    "\udfff\ud800", "\\ud83d", "\U0010ffff", "\U0001f469\u200d\U0001f4bb", "é", "e\u0301", "０",
    "ﬁ", "܀",
]
VALUES = [b"[" * 5000, b'{"a":' * 3000, b"1e999", b"NaN", b"-", b"9" * 5000, b"\\ud800", b"null", b"\xef\xbb\xbf",
          b"\x00", b"\r", b"\x1f\x8b", b"\xff\xfe"]


def hostile_string(rng: random.Random) -> str:
    return "".join(rng.choice((rng.choice(HOSTILE), chr(rng.choice((rng.randrange(32), rng.randrange(0x250),
                                                                    rng.randrange(0x110000))))))
                   for _ in range(rng.randrange(1, 9)))


def _messages(rng: random.Random) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"words {rng.randrange(1000)}"}
            for i in range(2 * rng.randrange(1, 3))]


def chat(rng: random.Random) -> dict:
    return {"messages": _messages(rng)}


def tree(rng: random.Random) -> dict:
    def node(depth: int) -> dict:
        replies = [node(depth + 1) for _ in range(rng.randrange(3))] if depth < 4 else []
        return {"message_id": f"m{rng.random()}", "parent_id": None, "text": f"words {rng.randrange(1000)}",
                "role": ("prompter", "assistant")[depth % 2], "lang": "en", "review_result": True, "deleted": False,
                "rank": rng.choice((None, 0, 1, 2)), "labels": {"spam": {"value": 0.1}}, "replies": replies}
    return {"message_tree_id": f"t{rng.random()}", "tree_state": "ready_for_export", "prompt": node(0)}


def flat(rng: random.Random) -> dict:
    i = rng.randrange(60)
    parent = None if i % 12 == 0 else f"m{i - 1 - rng.randrange(2)}"
    return {"message_id": f"m{i}", "parent_id": parent, "text": f"words {rng.randrange(1000)}", "lang": "en",
            "role": ("prompter", "assistant")[i % 2], "rank": rng.choice((None, 0, 1)), "review_result": True,
            "deleted": False, "labels": {"name": ["spam", "quality"], "value": [0.0, 0.9]},
            "tree_state": "ready_for_export"}


def comparison(rng: random.Random) -> dict:
    if rng.random() < 0.5:
        return {"prompt": f"words {rng.randrange(1000)}", "chosen": f"good {rng.random()}", "rejected": "bad"}
    prompt = _messages(rng)[:1]
    return {"prompt": prompt, "chosen": [{"role": "assistant", "content": f"good {rng.random()}"}],
            "rejected": [{"role": "assistant", "content": "bad"}]}


def transcripts(rng: random.Random) -> dict:
    opening = f"\n\nHuman: words {rng.randrange(1000)}\n\nAssistant:"
    return {"chosen": f"{opening} good {rng.random()}", "rejected": f"{opening} bad"}


def ratings(rng: random.Random) -> dict:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {"instruction": f"words {rng.randrange(1000)}", "completions": [
        {"response": f"reply {rng.random()}",
         "annotations": {aspect: {"Rating": rng.choice(("1", "3", "5", "N/A"))} for aspect in aspects}}
        for _ in range(4)]}


def check(rng: random.Random) -> dict:
    return {"messages": _messages(rng)[:1], "facts": [f"fact {rng.randrange(9)}", ["one", "other"]],
            "forbidden": ["never"], "subject": f"baker {rng.randrange(9)}", "group": "a"}


@dataclass(frozen=True)
class Format:
    """A reader: how a good row of its file looks, the prefix of its SPEC, and what it is read as."""

    make: Callable[[random.Random], dict]
    spec: str
    what: str       # conversations, preferences or checks


FORMATS = {
    "chats": Format(chat, "", "conversations"),
    "smoltalk": Format(chat, "smoltalk:", "conversations"),
    "oasst trees": Format(tree, "oasst1:", "conversations"),
    "oasst messages": Format(flat, "oasst2:", "conversations"),
    "oasst tree pairs": Format(tree, "oasst1:", "preferences"),
    "oasst message pairs": Format(flat, "oasst2:", "preferences"),
    "pairs": Format(comparison, "", "preferences"),
    "hh-rlhf": Format(transcripts, "hh-rlhf:", "preferences"),
    "ultrafeedback": Format(ratings, "ultrafeedback:", "preferences"),
    "checks": Format(check, "", "checks"),
}


def sound(make: Callable, n: int) -> tuple[list[dict], tuple[str, str, str]]:
    """Rows with nothing wrong in them, and what they hold: a question, a good reply and a worse one."""
    q, good, bad = texts = f"question {n}", f"good reply {n}", f"worse reply {n}"

    def node(text: str, role: str, rank: int | None, *replies: dict) -> dict:
        return {"message_id": text, "parent_id": None, "text": text, "role": role, "lang": "en", "rank": rank,
                "review_result": True, "deleted": False, "tree_state": "ready_for_export", "replies": list(replies)}

    def rated(text: str, rating: str) -> dict:
        aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        return {"response": text, "annotations": {aspect: {"Rating": rating} for aspect in aspects}}

    whole = node(q, "prompter", None, node(good, "assistant", 0), node(bad, "assistant", 1))
    return {
        chat: [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": good}]}],
        tree: [{"message_tree_id": q, "tree_state": "ready_for_export", "prompt": whole}],
        flat: [whole | {"replies": []}, *(reply | {"parent_id": q} for reply in whole["replies"])],
        comparison: [{"prompt": q, "chosen": good, "rejected": bad}],
        transcripts: [{"chosen": f"\n\nHuman: {q}\n\nAssistant: {good}", "rejected":
                       f"\n\nHuman: {q}\n\nAssistant: {bad}"}],
        ratings: [{"instruction": q, "completions": [rated(bad, "1"), rated(good, "5")]}],
        check: [{"messages": [{"role": "user", "content": q}], "facts": [good], "forbidden": [bad]}],
    }[make], texts


def row(make: Callable, rng: random.Random, value: Callable[[], object]) -> bytes:
    """One line, without its end, of which something is wrong in most cases; `value()` gives any JSON value."""
    good = make(rng)
    for _ in range(rng.choice((0, 1, 1, 2))):
        good = _with_wrong_value(good, rng, value)
    line = json.dumps(good, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice((0, 0, 1, 1, 3))):
        line = _with_wrong_bytes(line, rng)
    return line.replace(b"\n", b" ")


def _with_wrong_value(good, rng: random.Random, value: Callable[[], object]):
    places = list(_places(good))
    if not places:
        return copy.deepcopy(value())
    holder, key = rng.choice(places)
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]] * rng.randrange(3)
        case 2:
            holder[key] = hostile_string(rng)
        case 3 if isinstance(holder, dict):
            holder[hostile_string(rng)] = holder.pop(key)
        case _:
            holder[key] = copy.deepcopy(value())  # a later change must not reach other rows
    return good


def _places(value) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _with_wrong_bytes(line: bytes, rng: random.Random) -> bytes:
    at, until = sorted(rng.randrange(len(line) + 1) for _ in range(2))
    match rng.randrange(9):
        case 0:
            return line[:at]
        case 1:
            return line[:at] + line[until:]
        case 2:
            return line[:until] + line[at:]
        case 3 if line:
            at = rng.randrange(len(line))
            return line[:at] + bytes([line[at] ^ 1 << rng.randrange(8)]) + line[at + 1:]
        case 4:
            return line[:at] + rng.choice(HOSTILE).encode("utf-8", "surrogatepass") + line[at:]
        case 5:
            return line[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(9))) + line[at:]
        case 6:
            return line[:at] + rng.choice(VALUES) + line[at:]
        case 7:
            before, after = (b"", b"\xef\xbb\xbf", b" \t", b"\r"), (b"", b",", b"\r", b"}", b"\x00")
            return rng.choice(before) + line + rng.choice(after)
        case _:
            return line


def write(path: Path, lines: list[bytes], rng: random.Random) -> None:
    path.write_bytes(b"".join(line + rng.choice((b"\n", b"\n", b"\r\n")) for line in lines))
