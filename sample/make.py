"""Make the bundled sample: documents, a base model that has read them, conversations, checks and an exam.

    uv run sample/make.py               everything anew, in an hour and a half
    uv run sample/make.py --no-model    conversations, checks and exam only
    uv run sample/make.py --show 5      print five documents of the kind that the base model reads
    uv run sample/make.py --quick       a tiny version of everything, in seconds, into runs/quick

world.json knows 216 occupations, phrases.toml knows how such things are said, and this script brings the two together:

    documents            encyclopedia entries, adverts, diaries, riddles, questions with answers ... on all occupations,
                         never in the chat template. The base model (sample/model/) reads them and nothing else: first
                         all kinds, then mostly questions, in more words, as people type them.
    conversations.jsonl.gz   threads with ranked replies, as OpenAssistant exports its trees, on four fifths of the
                         occupations. What a chat model says of the other fifth, it learnt before SFT.
    checks.jsonl         questions with the facts that a good reply contains, for `--checks` of sft.py and dpo.py.
    exam.jsonl           other questions in other wordings, which served to choose nothing: the README's table

All of it is a function of the seed; the model's last bits are one of the processor's too. Pre-training reads 31 million
tokens, then 10 million more: an hour and 20 minutes in bf16 on two idle cores of an AMD EPYC with avx512_bf16.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import random
import re
import sys
import tomllib
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402 - the project's scripts lie beside this folder
from data import lazy, run_script  # noqa: E402
from train import (  # noqa: E402
    REPLACED,
    Run,
    Settings,
    begin,
    discard,
    step_batches,
    train,
    validation_batches,
    weights_sha256,
)

torch = lazy("torch")
model = lazy("model")


@dataclass(kw_only=True)
class Config(Settings):
    to: str = str(HERE)  # folder that gets conversations.jsonl.gz, checks.jsonl, exam.jsonl and model/
    out: str = "runs/base"  # run folder of the pre-training; the same command again goes on where it stopped
    model: bool = True  # pre-train the base model
    quick: bool = False  # a tiny world, model and everything, into runs/quick
    show: int = 0  # print so many documents and do nothing else

    trees: int = 6500  # conversation trees
    questions: int = 100  # checks in each of the four groups made from the world; the exam has twice as many
    occupations: int = 1000  # of the world's, at most so many
    n_layer: int = 6  # 6 layers of 128 and GPT-2's 50,257 words are 7.8 million parameters, 16 MB in fp16
    n_embd: int = 128
    n_head: int = 4
    row: int = 256  # tokens of documents in a row
    steps: int = 15_000  # optimiser steps
    batch_size: int = 8  # rows a step: facts are learnt by being met often, so small steps and many of them
    lr: float = 3e-3  # highest learning rate
    more_steps: int = 5000  # of the second reading
    more_lr: float = 2e-3
    start: str = ""  # a model that has done the first reading: only the second is done
    init_scale: float = 4.0  # first weights, as a multiple of GPT-2's, which suit its widths: 0.08 is about 1/sqrt(128)
    weight_decay: float = 0.1
    beta2: float = 0.98
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 20
    lora_rank: int = 0
    prompts: tuple[str, ...] = ()  # a base model does not answer

    data: ClassVar[tuple[str, ...]] = ("documents",)
    row_name: ClassVar[str] = "rows"

    def limits(self) -> dict[str, tuple[bool, str]]:
        def divides(value: int) -> bool:
            return value > 0 and value % max(1, self.n_head) == 0

        return super().limits() | data.bounds(
            self, ("1 or more", ("trees", "questions", "occupations", "n_layer", "n_head", "more_steps"),
                   lambda value: value >= 1),
            ("above 0 and finite", ("more_lr",), lambda value: 0 < value < math.inf),
            ("0 or more", ("show",), lambda value: value >= 0), ("a multiple of --n-head", ("n_embd",), divides),
            ("from 2 to 1024", ("row",), range(2, 1025).__contains__))

    def again(self) -> Config:
        """The settings of the second reading."""
        return replace(self, out=f"{self.out}-again", steps=self.more_steps, lr=self.more_lr)

    def look(self) -> None:
        """Refuse what can be seen to fail; among this, somebody else's files that have the names of this script's."""
        data.check_limits(self)
        if self.start:
            model.check_model(self.start)
        others = [path for path in Path(self.to, "model").glob("*")
                  if path.name not in ("config.json", "generation_config.json", "model.safetensors")]
        for name in ("conversations.jsonl.gz", "checks.jsonl", "exam.jsonl"):
            path = Path(self.to, name)
            first = None if path.exists() else {"subject": ""}
            with suppress(ValueError, OSError):  # of another kind of file
                first = first or next((row for _, _, row in data.file_rows(path)), None)
            known = isinstance(first, dict) and (str(first.get("message_tree_id")).startswith("sample-")
                                                 or ("subject" in first and "messages" not in first))
            others += [] if known else [path]
        if others:
            raise ValueError(f"--to {self.to}: {others[0]} is none that this script wrote, so all is left alone.\n"
                             "Give another folder: --to")


QUICK = {"to": "runs/quick", "out": "runs/quick/base", "trees": 60, "questions": 5, "occupations": 12, "n_layer": 2,
         "n_embd": 32, "n_head": 2, "row": 64, "steps": 40, "more_steps": 40, "eval_every": 20, "save_every": 40}

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "James", "Kate", "Leo", "Mary",
         "Nora", "Oliver", "Paul", "Ruth", "Sam", "Tom", "Vera")
TOWNS = ("London", "Leeds", "York", "Bristol", "Oxford", "Cardiff", "Glasgow", "Dublin", "Bath", "Derby")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


# ---- English -------------------------------------------------------------------------------------

# Verbs of world.json that double their last letter: planning, but opening.
DOUBLING = re.compile("bed|chat|chip|clip|control|counsel|cut|dig|dip|fit|label|log|map|model|patrol|plan|plot|pin|"
                      "program|put|refer|rerun|reset|run|scan|set|sit|skim|snap|split|spot|stop|strip|submit|swap|tag|"
                      "tap|thin|trim|wrap")


def plural(noun: str) -> str:
    if noun.endswith("man"):
        return noun[:-2] + "en"
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return re.sub(r"(?<=[^aeiou])y$", "ie", noun) + "s"


def third_person(deed: str) -> str:
    """knead dough -> kneads dough"""
    verb, rest = deed.split(" ", 1)
    return f"{plural(verb)} {rest}"


def gerund(deed: str) -> str:
    """knead dough -> kneading dough"""
    verb, rest = deed.split(" ", 1)
    if DOUBLING.fullmatch(verb):
        verb += verb[-1]
    stem = re.sub(r"(?<=[^eoy])e$", "", re.sub(r"ie$", "y", verb))
    return f"{stem}ing {rest}"


def shortened(deed: str) -> str:
    """knead dough for crusty loaves -> knead dough"""
    return re.sub(r"^(\S+ \S+.*?) (above|about|across|after|along|around|at|before|behind|between|by|during|for|from|"
                  r"in|inside|into|of|on|onto|through|to|under|with|without) .*", r"\1", deed)


def with_article(noun: str) -> str:
    return ("an " if re.match(r"[aeio]|u(?!n?i|s)", noun) else "a ") + noun


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# ---- the world and its wordings ------------------------------------------------------------------


def read_world(path: Path = HERE / "world.json") -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_phrases(path: Path = HERE / "phrases.toml"):
    """phrases.toml with every block of text as the list of its lines."""

    def lines(node):
        if isinstance(node, dict):
            return {key: lines(value) for key, value in node.items()}
        return [line.replace(r"\n", "\n") for line in node.splitlines() if line]

    return lines(tomllib.loads(path.read_text(encoding="utf-8")))


def with_more(phrases, more=None):
    """The phrases, each list with the wordings that the part "more" has for it: what people ask, in more words."""
    more = phrases["more"] if more is None else more
    if isinstance(phrases, list):
        return phrases + more
    return {key: with_more(node, more[key]) if key in more else node for key, node in phrases.items()}


def held_out(world: list[dict]) -> set[str]:
    """Every fifth occupation in an order that nobody chose: these occur in documents only."""
    names = sorted((e["name"] for e in world if e["name"] not in ("data scientist", "machine learning engineer")),
                   key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(names[:len(world) // 5])


def mentions(text: str, names: set[str]) -> bool:
    return any(f" {form} " in f" {text} " for name in names for form in (name, plural(name)))


FACTS = {"do": ("does", str), "does": ("does", third_person), "doing": ("does", gerund), "tool": ("tools", str),
         "skill": ("skills", str), "partner": ("works_with", str)}  # slot: (list of world.json, form)
LISTS = {"tools": "tools", "skills": "skills", "partners": "works_with"}  # slot for all that a list holds


class Teller(dict):
    """Fills templates with what is true of one occupation, and of another where a template speaks of two.

    Facts go round: a text begins with any of them (or with that of number `first`), and after each comes the one that
    world.json names next. So no sentence says a thing twice, and what to say next can be learnt.
    """

    def __init__(self, entry: dict, rng: random.Random, other: dict | None = None, person: str = "I",
                 first: int | None = None, words: dict[str, list[str]] | None = None):
        name, kin = entry["name"], entry["related"]
        super().__init__(a=with_article(name), the=f"the {name}", n=name, s=plural(name), place=entry["workplace"],
                         kin=kin, a_kin=with_article(kin), the_kin=f"the {kin}", kins=plural(kin), field=entry["field"],
                         i=person, my={"I": "my", "you": "your"}[person],
                         who=rng.choice(NAMES), town=rng.choice(TOWNS), day=rng.choice(DAYS),
                         x=self, y=other and Teller(other, rng, first=first))
        self.entry, self.rng, self.first, self.words, self.told = entry, rng, first, words or {}, {}

    def tell(self, template: str) -> str:
        for teller in filter(None, (self, self["y"])):
            teller.told = {}
        return capital(template.format_map(self))

    def fact(self, which: str, again: bool = False) -> str:
        """The next fact of a list, or once more the one before."""
        facts = self.entry[which]
        last = self.told.get(which, (self.rng.randrange(len(facts)) if self.first is None else self.first) - 1)
        self.told[which] = last + (not again)
        return facts[self.told[which] % len(facts)]

    def __missing__(self, slot: str) -> str:
        bare = slot.removeprefix("same_")
        if bare in FACTS:
            which, form = FACTS[bare]
            return form(self.fact(which, again=bare != slot))
        if slot in LISTS:
            return listing([self.fact(LISTS[slot]) for _ in self.entry[LISTS[slot]]])
        if slot in ("called", "called_s", "a_called"):
            called = nickname(self.entry, self.rng)
            return {"called": called, "called_s": plural(called), "a_called": with_article(called)}[slot]
        if slot in self.words:
            return self.rng.choice(self.words[slot])
        if slot == slot.lower():
            raise KeyError(f"phrases.toml has a slot {{{slot}}} that make.py does not know")
        return capital(self[slot[0].lower() + slot[1:]])

    __getattr__ = dict.__getitem__  # so that {x.a} finds what {a} finds


# ---- as people type ------------------------------------------------------------------------------

SOUNDS = ("ph f", "c k", "k c", "s c", "y i", "ie ei", "ei ie", "er or", "or er", "er ar", "tion sion", "ian ion",
          "ch sh", "x ks", "ch k", "qu kw", "au o", "ou u", "ea ee", "ai ay", "ll l", "tt t", "ss s", "mb mm")


def misspelt(word: str, rng: random.Random) -> str:
    """The word with a slip: two letters swapped, one left out, one doubled, a wrong vowel, or written by its sound."""
    at = rng.randrange(1, len(word) - 1)
    sounds = [pair.split() for pair in SOUNDS if pair.split()[0] in word[1:]]
    vowels = [i for i in range(1, len(word)) if word[i] in "aeiou"]
    slips = [word[:at] + word[at + 1] + word[at] + word[at + 2:], word[:at] + word[at + 1:], word[:at + 1] + word[at:]]
    if vowels:
        i = rng.choice(vowels)
        slips.append(word[:i] + rng.choice("aeiou") + word[i + 1:])
    if sounds:
        old, new = rng.choice(sounds)
        slips += 2 * [word[0] + word[1:].replace(old, new, 1)]
    return rng.choice(slips)


def with_slip(text: str, rng: random.Random) -> str:
    """The text with one of its longer words misspelt, if it has any."""
    long = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", text)]
    if not long:
        return text
    start, end = rng.choice(long)
    return text[:start] + misspelt(text[start:end], rng) + text[end:]


def written_large(text: str, rng: random.Random) -> str:
    return rng.choice((text.upper(), text.title(), capital(text)))


def nickname(entry: dict, rng: random.Random) -> str:
    """Another word for the occupation, or its name misspelt."""
    return rng.choice(entry["also"]) if entry["also"] and rng.random() < 0.5 else with_slip(entry["name"], rng)


def typed(text: str, rng: random.Random, habits: dict[str, list[str]], haste: float = 0.5) -> str:
    """A question as people type it: a share `haste` of them short, polite, misspelt or in capitals."""
    if rng.random() < 1 - haste:
        return text
    if rng.random() < 0.2:
        before = rng.choice(habits["before"])
        text = f"{before} {text if before[-1] in '!.' else text[:1].lower() + text[1:]}"
    if rng.random() < 0.1:
        text = f"{text} {rng.choice(habits['after'])}"
    for way in habits["ways"] if rng.random() < 0.6 * haste else ():
        usual, others = way.split(" = ")
        if rng.random() < 0.7:
            text = re.sub(rf"\b{usual}\b", rng.choice(others.split(", ")), text, count=1, flags=re.IGNORECASE)
    if rng.random() < 0.3:
        text = with_slip(text, rng)
    text = rng.choices((text, text.lower(), text.upper(), text.title()), (0.3, 0.6, 0.08 * haste, 0.12 * haste))[0]
    return text.rstrip("?.!") or text if rng.random() < 0.5 else text


# ---- documents -----------------------------------------------------------------------------------

class Reading(NamedTuple):
    """What the base model reads."""

    name: str
    kinds: dict[str, float]  # how often each kind of document
    asked: dict[str, float]  # how often each kind of question, in documents that have answers
    haste: float             # with which people type what they ask, see typed()
    slips: float             # how often they misspell a name, or write it large


FIRST = Reading(
    "documents", haste=0.5, slips=0,
    kinds={"encyclopedia": 5, "advert": 2, "diary": 2, "interview": 2, "story": 3, "card": 3, "riddle": 2,
           "comparison": 5, "letter": 0.6, "quiz": 3, "meanings": 4, "questions": 2, "answers": 12},
    asked={"ask": 5, "then": 6, "other": 6, "who": 1, "whether": 1.5, "compare": 0.5})
# Mostly questions, in the words of phrases.toml's part "more" too. What a model reads last it keeps best
SECOND = Reading(
    "questions", haste=0.8, slips=0.15,
    kinds={"encyclopedia": 2, "story": 0.5, "card": 1, "riddle": 0.5, "comparison": 1.5, "letter": 0.5, "quiz": 1,
           "meanings": 1, "questions": 1, "answers": 18},
    asked={**FIRST.asked, "whether": 2.5, "talk": 6, "unknown": 5, "strange": 1, "beyond": 1})


def neighbours(world: list[dict]) -> dict[str, list[dict]]:
    """The occupations that each is easily confused with: related, of the same field, or sharing a word of the name."""
    return {x["name"]: [y for y in world if y is not x and (y["field"] == x["field"] or y["name"] == x["related"] or
                                                            set(x["name"].split()) & set(y["name"].split()))]
            for x in world}


def documents(world: list[dict], phrases: dict, rng: random.Random, kept_back: Set[str] = frozenset(),
              reading: Reading = FIRST) -> Iterator[str]:
    """Texts without end, each on one occupation, comparing two, or with another one in every line.

    No question of those in `kept_back` is answered in them.
    """
    talk = Talk(world, phrases, rng, haste=reading.haste, slips=reading.slips)
    while True:
        [kind] = rng.choices(list(reading.kinds), list(reading.kinds.values()))
        x = talk.occupation()
        y = talk.occupation(unlike=x)
        if rng.random() < 0.15:
            x = x | {"name": nickname(x, rng)}
        teller = Teller(x, rng, y, "you" if kind == "advert" else "I")
        if kind == "letter":
            yield teller.tell(rng.choice(phrases["letters"]["lines"]))
            continue
        about = phrases["kinds"][kind]
        between = "\n" if kind in ("questions", "answers", "card", "riddle", "quiz", "meanings") else " "
        sentences = [teller.tell(rng.choice(about["open"]))]
        if kind == "questions":
            sentences += [talk.overheard() for _ in range(8)]
        elif kind == "answers":
            before = None
            for _ in range(rng.randint(3, 6)):
                question, good, _, before = talk.asked(reading.asked, before, kept_back)
                sentences += [f"Q: {question}", f"A: {rng.choice(good)}"]
        elif kind in ("quiz", "meanings"):
            for _ in range(8):
                x = talk.occupation()
                sentences.append(Teller(x, rng, talk.occupation(unlike=x)).tell(
                    rng.choice(phrases[about["voice"][0]]["lines"])))
        else:
            bank = phrases[about["voice"][0]]
            if "lines" in bank:
                middle = rng.sample(bank["lines"], rng.randint(3, 5))
            else:  # tasks twice as often as the rest, for there are more of them
                aspects = [*bank, "does"]
                middle = [rng.choice(bank[a]) for a in rng.sample(aspects, min(len(aspects), rng.randint(4, 6)))]
            sentences += map(teller.tell, middle)
        if about["close"] and rng.random() < 0.4:
            sentences.append(teller.tell(rng.choice(about["close"])))
        text = between.join(sentences).replace("\n\n" + between, "\n\n").replace("\n\n\n", "\n\n")
        yield text.lower() if rng.random() < 0.08 else text


# ---- conversations -------------------------------------------------------------------------------

OFTEN = {"does": 8, "tools": 5, "place": 7, "skills": 4, "partners": 3, "kin": 4, "about": 3}  # how often asked for
SINGLE = ("place", "kin", "who_place")  # there is but one thing to say
# How often a bad reply answers something else, by the kind of question
ASIDE = {"talk": 0.8, "unknown": 0.8, "ask": 0.2, "other": 0.2, "then": 0.1, "who": 0.1, "whether": 0.1}


def conversed(world: list[dict]) -> list[dict]:
    """Four fifths of the world, with no word of the rest: what conversations may speak of."""
    hidden = held_out(world)
    return [entry | {"works_with": [p for p in entry["works_with"] if not mentions(p, hidden)],
                     "related": "" if entry["related"] in hidden else entry["related"]}
            for entry in world if entry["name"] not in hidden]


def letters_of(text: str) -> str:
    """What makes two questions the same: letters and digits."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


class Talk:
    """Questions about the occupations of `world`, and ranked replies to them."""

    def __init__(self, world: list[dict], phrases: dict, rng: random.Random, informative: float = 0.42,
                 by_other_names: float = 0.25, haste: float = 0.5, slips: float = 0.0):
        self.world, self.phrases, self.rng = world, phrases, rng
        self.haste, self.slips = haste, slips  # of those who ask: see typed(), and how often names are misspelt
        self.informative = informative        # share of the questions that have a good reply with several facts
        self.by_other_names = by_other_names  # how often an occupation is called what it also is
        self.near = neighbours(world)

    def line(self, *path: str) -> str:
        """A line of phrases.toml, found by its path."""
        lines = self.phrases
        for step in path:
            lines = lines[step]
        return self.rng.choice(lines["lines"] if isinstance(lines, dict) else lines)

    def say(self, *path: str, about: dict | None = None, other: dict | None = None, first: int | None = None) -> str:
        """A line of phrases.toml, filled with facts of `about`, and of `other` where it speaks of two."""
        teller = Teller(about or self.occupation(), self.rng, other, first=first, words=self.phrases["fill"])
        return teller.tell(self.line(*path))

    def occupation(self, unlike: dict | None = None) -> dict:
        """Any occupation, or one that could be confused with `unlike`."""
        near = self.near.get(unlike["name"], []) if unlike else []
        return self.rng.choice(near if near and self.rng.random() < 0.5 else
                               [e for e in self.world if e is not unlike])

    def known(self, entry: dict) -> list[str]:
        """What there is to say of an occupation: those it works with and is related to may all be hidden."""
        return [a for a in OFTEN if entry[{"partners": "works_with", "kin": "related"}.get(a, "does")]]

    def aspect(self, entry: dict, unlike: str = "") -> str:
        aspects = [a for a in self.known(entry) if a != unlike]
        return self.rng.choices(aspects, [OFTEN[a] for a in aspects])[0]

    def ask(self, aspect: str, about: dict | None = None, kind: str = "ask", bank: str = "") -> str:
        """A question or, with `kind` "then", a follow-up on the same occupation: direct, or in a polite phrase.

        `bank` names the part of phrases.toml that has the wordings, if it is not the one of conversations.
        """
        own = (bank,) if bank else ()
        if self.rng.random() < 0.3 and aspect in self.phrases["indirect"][kind]:
            phrase = self.line(*own, "polite").replace("{q}", self.line("indirect", kind, aspect))
        else:
            phrase = self.line(*own, kind, aspect)
        return Teller(about or self.occupation(), self.rng).tell(phrase)

    def overheard(self) -> str:
        """Something that people may say to begin with or to go on."""
        x, rng = self.occupation(), self.rng
        section = rng.choices(("ask", "then", "other", "whether", "who", "talk"), (8, 3, 2, 2, 2, 4))[0]
        if section in ("ask", "then"):
            text = self.ask(rng.choice(list(self.phrases[section])), self.by_any_name(x), section)
        elif section == "talk":
            text = self.say("talk", rng.choice(list(self.phrases["talk"])), "ask")
        elif section == "other":
            text = self.say("other", about=self.by_any_name(x))
        else:
            x, y = (self.in_short(self.occupation()) for _ in range(2))
            text = self.say(section, rng.choice(list(self.phrases[section])), about=x, other=y)
        return typed(text, rng, self.phrases["typed"], self.haste)

    def by_any_name(self, x: dict) -> dict:
        """The occupation as people may call it, and write it."""
        if self.slips and self.rng.random() < self.slips:
            return x | {"name": self.rng.choice((with_slip, written_large))(x["name"], self.rng)}
        return x | {"name": self.rng.choice(x["also"])} if x["also"] and self.rng.random() < self.by_other_names else x

    def in_short(self, x: dict) -> dict:
        """The occupation as somebody speaks of it who does not say all of a deed."""
        return x | {"does": [shortened(deed) for deed in x["does"]]} if self.rng.random() < 0.4 else x

    def replies(self, x: dict, aspect: str, first: int | None = None) -> tuple[list[str], list[str]]:
        """Good replies and bad ones, best first.

        Good: informative, plain. Bad: saying a thing twice, with a fact of another occupation in it or nothing but
        such, off the subject, bare, vague. What a model has to be kept from most comes in most forms.
        """
        rng, say = self.rng, self.say
        y, z = self.occupation(unlike=x), self.occupation(unlike=x)
        good = [say("plain", aspect, about=x, first=first)]
        several = aspect not in SINGLE and not (aspect == "partners" and len(x["works_with"]) < 2)
        if several and rng.random() < self.informative:
            good.insert(0, say("full", aspect, about=x, first=first))
        wrong = [say(how, aspect, about=impostor(x, y, whole=True), first=first) for how in ("plain", "full")]
        other = say(rng.choice(("plain", "full")), aspect if aspect in self.known(y) else "does", about=y)
        weak = [say("plain", self.aspect(x, unlike=aspect), about=x), say("vague", about=x)]
        if aspect in self.phrases["bare"]:
            weak.append(say("bare", aspect, about=x))
        bad = [*wrong, other, *weak]
        if several:
            bad = [say("full", aspect, about=repetitive(x, rng, first), first=0),
                   say("full", aspect, about=impostor(x, z), first=first), *bad]
        bad = [text for text in dict.fromkeys(bad) if text not in good]
        count = 1 if not several else 2
        return good, [bad[i] for i in sorted(rng.sample(range(len(bad)), count))]

    def beside_the_point(self, kind: str, good: list[str]) -> str:
        """A reply that answers something else: other small talk or, to what is known, that one does not know it."""
        if kind not in ("talk", "unknown"):
            return self.say("strange", "reply")
        others = [group for group, texts in self.phrases["talk"].items() if set(texts["plain"]).isdisjoint(good)]
        return self.say("talk", self.rng.choice(others), self.rng.choice(("full", "plain")))

    def kind(self, kinds: dict[str, float], before: tuple | None) -> str:
        """One of the kinds, by their weights; none that goes on from a turn before where there was none."""
        weights = [0 if kind in ("then", "other") and not before else weight for kind, weight in kinds.items()]
        return self.rng.choices(list(kinds), weights)[0]

    def asked(self, kinds: dict[str, float], before: tuple | None, kept_back: Set[str]) -> tuple:
        """An exchange of one of the kinds, with its question as people type it."""
        while True:
            question, *others = self.exchange(self.kind(kinds, before), before)
            question = typed(question, self.rng, self.phrases["typed"], self.haste)
            if letters_of(question) not in kept_back:
                return question, *others

    def exchange(self, kind: str, before: tuple | None) -> tuple[str, list[str], list[str], tuple | None]:
        """One question with its good and bad replies, and what is spoken of then: (occupation, aspect) or None."""
        rng, say, x = self.rng, self.say, self.occupation()
        if kind == "talk":
            group = rng.choices(list(self.phrases["talk"]), [len(g["ask"]) for g in self.phrases["talk"].values()])[0]
            good = [say("talk", group, "full", about=x), say("talk", group, "plain")]
            return say("talk", group, "ask"), good, [say("vague")], before
        if kind == "unknown":
            return say("unknown", "ask"), [say("unknown", "reply", about=x)], [
                rng.choice((say("unknown", "bare"), say("plain", "does")))], before
        if kind == "beyond":
            return say("beyond", "ask", about=self.by_any_name(x), other=self.occupation(unlike=x)), [
                say("beyond", "reply", about=x)], [say("plain", self.aspect(x), about=x)], None
        if kind == "strange":  # an occupation that is none of the world's
            aspect = self.aspect(x)
            stranger = x | {"name": self.line("fill", "job")}
            question = say("other", about=stranger) if before and rng.random() < 0.5 else self.ask(aspect, stranger)
            return question, [say("strange", "reply", about=x)], [say("plain", aspect, about=stranger)], before
        if kind == "compare":
            y, z = self.occupation(unlike=x), self.occupation(unlike=x)
            good = [say("full", "compare", about=x, other=y), say("plain", "compare", about=x, other=y)]
            bad = [say("full", "compare", about=impostor(x, z), other=y), say("plain", "does", about=x)]
            return say("compare", "ask", about=x, other=y), good, bad, None
        if kind == "who":
            what, first = rng.choice(("does", "place")), rng.randrange(len(x["does"]))
            question = say("who", what, about=self.in_short(x), first=first)
            return question, *self.replies(x, f"who_{what}", first), (x, what)
        if kind == "whether":
            what, first, y = rng.choice(("does", "does", "tools", "place")), rng.randrange(3), self.occupation(unlike=x)
            if not set(x["tools"]).isdisjoint(y["tools"]):
                what = "does"
            no = rng.random() < 0.5
            question = say("whether", what, about=self.by_any_name(x), other=self.in_short(y if no else x), first=first)
            good = [say("no" if no else "yes", how, what, about=x, other=y, first=first) for how in ("full", "plain")]
            believed = impostor(x, y, whole=True) if no else x
            bad = [say("yes" if no else "no", "plain", what, about=believed, other=y, first=first),
                   say("vague", about=x)]
            return question, list(dict.fromkeys(good)), bad, None
        if kind == "ask":
            aspect = self.aspect(x)
            question = self.ask(aspect, self.by_any_name(x))
        elif kind == "then":  # the occupation of the turn before
            x = before[0]
            aspect = self.aspect(x, unlike=before[1])
            question = self.ask(aspect, kind="then")
        else:  # the question of the turn before
            aspect = before[1]
            x = next(e for e in iter(lambda: self.occupation(unlike=before[0]), None) if aspect in self.known(e))
            question = say("other", about=self.by_any_name(x))
        return question, *self.replies(x, aspect), (x, aspect)


def impostor(x: dict, y: dict, whole: bool = False) -> dict:
    """`x` with what is true of `y`: with every other of its facts, or with all."""
    swapped = {key: [b if whole or i % 2 else a for i, (a, b) in enumerate(zip(x[key], y[key], strict=False))] or x[key]
               for key in ("does", "tools", "skills", "works_with")}
    return x | swapped | {key: y[key] or x[key] for key in ("workplace", "related")}


def repetitive(x: dict, rng: random.Random, first: int | None = None) -> dict:
    """`x` as somebody tells it from fact 0 on who says a thing twice."""
    told = {}
    for key in ("does", "tools", "skills", "works_with"):
        start = rng.randrange(len(x[key]) or 1) if first is None else first
        facts = x[key][start:] + x[key][:start]
        if len(facts) > 1:
            again = rng.randrange(1, min(3, len(facts)))
            facts[again] = facts[rng.randrange(again)]
        told[key] = facts
    return x | told


def conversations(world: list[dict], phrases: dict, rng: random.Random, count: int,
                  kept_back: Set[str]) -> Iterator[dict]:
    """Message trees as OpenAssistant exports them.

    A tree is one conversation with other replies beside its own. Bad ones failed their review, so a reader of threads
    leaves them out as it does in OpenAssistant's data; but they are ranked, and so they serve preference pairs. A
    conversation goes on from a plain reply more often than from an informative one: SFT learns to be right, and leaves
    it to DPO to say more. No question of the checks in `kept_back` is asked.
    """
    talk = Talk(conversed(world), phrases, rng, informative=0.5, by_other_names=0.4, haste=0.6, slips=0.2)
    for number in range(count):
        root = last = before = None
        for turn in range(turns := rng.choices((1, 2, 3, 4), (1, 3, 4, 2))[0]):
            kinds = {"ask": 5, "then": 8, "other": 7, "who": 0.8, "whether": 1.8, "compare": 0.5, "unknown": 1.2,
                     "strange": 0.35, "beyond": 0.5, "talk": 2 if turn == 0 else 1.5 if turn == turns - 1 else 0.3}
            kind = talk.kind(kinds, before)
            question, good, bad, before = talk.asked({kind: 1}, before, kept_back)
            if rng.random() < ASIDE.get(kind, 0):
                bad = [talk.beside_the_point(kind, good), *bad[:-1]]
            prompt = message("prompter", question)
            bad = bad[:1] if len(set(good)) > 1 else bad  # so that informative over plain is no rare pair
            prompt["replies"] = [message("assistant", text, review_result=text in good, rank=rank)
                                 for rank, text in enumerate(dict.fromkeys(good + bad))]  # bad ones may come out good
            root = root or prompt
            if last:
                last["replies"].append(prompt)
            last = prompt["replies"][0 if rng.random() < 0.3 else len(set(good)) - 1]
        ids = (f"sample-{number:05d}-{i:02d}" for i in itertools.count())
        root = numbered(root, None, ids)
        yield {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def message(role: str, text: str, **more) -> dict:
    return {"text": text, "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False,
            "synthetic": True, **more, "replies": []}


def numbered(node: dict, parent: str | None, ids: Iterator[str]) -> dict:
    """The tree with the ids by which its messages name one another."""
    own = next(ids)
    return {"message_id": own, "parent_id": parent, **node, "replies": [numbered(r, own, ids) for r in node["replies"]]}


# ---- checks --------------------------------------------------------------------------------------


def facts(entry: dict, aspect: str = "about") -> list:
    """What a good reply to a question for this aspect may contain, a task in each of its forms."""
    known = {"does": [[deed, third_person(deed), gerund(deed)] for deed in entry["does"]], "tools": entry["tools"],
             "place": [entry["workplace"]], "skills": entry["skills"], "partners": entry["works_with"],
             "kin": [[entry["related"], plural(entry["related"])]]}
    return known[aspect] if aspect in known else [fact for facts in known.values() for fact in facts]


def checks(world: list[dict], phrases: dict, rng: random.Random, count: int, bank: str) -> Iterator[dict]:
    """Questions for `--checks`: `count` of each of four groups, everyday ones, and what is true of every occupation.

    `bank` is the part of phrases.toml with the wordings: "exam", or "new" for half of the single questions and a third
    of the follow-ups, the others being worded as in conversations.
    """
    for entry in world:  # its name too: a reply about another occupation should not speak of this one
        yield {"subject": entry["name"], "facts": [[entry["name"], plural(entry["name"])], *facts(entry)]}
    hidden = held_out(world)
    seen = Talk([e for e in world if e["name"] not in hidden], phrases, rng)
    unseen = Talk([e for e in world if e["name"] in hidden], phrases, rng)

    def wordings(share: float) -> str:
        return bank if bank == "exam" or rng.random() < share else ""

    for group, talk in (("seen", seen), ("held-out", unseen)):
        for i in range(2 * count):
            x = talk.occupation()
            aspect, follow_up = talk.aspect(x), i % 2
            earlier = []
            if not follow_up:
                question = talk.ask(aspect, x, bank=wordings(1 / 2))
            elif rng.random() < 0.5:  # the occupation is in the turn before
                first, aspect = aspect, rng.choice([a for a in phrases[bank]["then"] if a != aspect])
                earlier = [talk.ask(first, x), talk.say("plain", first, about=x)]
                question = talk.ask(aspect, x, "then", wordings(1 / 3))
            else:  # the question is in the turn before
                y = seen.occupation(unlike=x)
                earlier = [talk.ask(aspect, y), talk.say("plain", aspect, about=y)]
                question = talk.say(*((bank,) if wordings(1 / 3) else ()), "other", about=x)
            messages = [{"role": role, "content": text}
                        for role, text in zip(("user", "assistant", "user"), [*earlier, question], strict=False)]
            yield {"messages": messages, "facts": facts(x, aspect), "subject": x["name"],
                   "group": f"{group}, {'follow-up' if follow_up else 'single'}"}
    by_name = {entry["name"]: entry for entry in world}
    for line in phrases[bank]["everyday"]["lines"]:
        question, right = line.rsplit(" | ", 1)
        name, _, aspect = right.partition(": ")
        if name in by_name or not aspect:
            yield {"messages": [{"role": "user", "content": question}], "group": "everyday"} | (
                {"facts": facts(by_name[name], aspect), "subject": name} if aspect else
                {"facts": [["yes"]], "forbidden": ["no"]} if right == "yes" else
                {"facts": [["no"]], "forbidden": ["yes"]} if right == "no" else
                {"facts": [[words for kind in right.split() for words in phrases["right"][kind]]]})


def write_lines(path: Path, objects) -> None:
    """JSONL, zipped if the name says so; the same bytes every time."""
    text = "".join(json.dumps(o) + "\n" for o in objects)
    with data.written_whole(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


# ---- pre-training --------------------------------------------------------------------------------


RARE = 20  # times that a word has to occur in the documents to be learnt


def read_documents(reading: Reading, world: list[dict], phrases: dict, kept_back: Set[str], known: np.ndarray,
                   cfg: Config) -> tuple[data.Data, np.ndarray]:
    """Enough documents for all steps, end to end and cut into rows, in ids of a vocabulary of their own.

    Returns the rows and `vocabulary`, the GPT-2 ids that occur often enough or are `known`. Id i of the rows is
    vocabulary[i]; the number after the last stands for all other words, which are read and not predicted.
    """
    tokens = data.tokenizer()
    texts = documents(world, phrases, random.Random(f"{reading.name} {cfg.seed}"), kept_back, reading)
    count, wanted, parts = 0, (cfg.steps * cfg.batch_size + 64) * cfg.row, []
    while count < wanted:
        parts += [[data.EOT, *tokens.encode_ordinary(text)] for text in itertools.islice(texts, 1000)]
        count += sum(map(len, parts[-1000:]))
    stream = np.concatenate(parts)[:wanted].astype(np.int64)
    vocabulary = np.union1d(known, np.flatnonzero(np.bincount(stream) >= min(RARE, cfg.steps / 10)))
    numbers = np.full(data.EOT + 1, len(vocabulary), np.int32)
    numbers[vocabulary] = np.arange(len(vocabulary))
    ids = numbers[stream].reshape(-1, cfg.row)
    rows = [data.Row(row, row < len(vocabulary)) for row in ids]
    return data.Data(rows[:-64], rows[-64:], [], hashlib.sha256(ids).hexdigest()), vocabulary


def documents_loss(gpt, batch, unused: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Next-token cross-entropy over the words that occur and, as one more, all those that do not.

    With GPT-2's 50,257 words the head would take most of the time, and nearly all of them never occur. If those share
    one row of the head, its logit plus log(unused) is the sum of them all: the loss is that of the full softmax, at the
    price of the words that occur. As an input that row stands for any word that the model does not know.
    """
    tokens, positions = batch.tokens, batch.positions
    if gpt.training:  # rows are shorter than the context: start each anywhere, so that every position learns
        lengths = torch.tensor([span.tokens for span in batch.spans])
        starts = torch.randint(gpt.config.n_positions - int(positions.max()), lengths.shape)
        starts = starts[[span.prefix[0][0] if span.prefix else n for n, span in enumerate(batch.spans)]]
        positions = positions + starts.repeat_interleave(lengths).to(positions.device)
        tokens = tokens.masked_fill(torch.rand(tokens.shape).to(tokens.device) < 0.01, gpt.config.vocab_size - 1)
    hidden = gpt.hidden(tokens[None], positions[None], model.Packed(batch.spans))[0][batch.index]      # (M, C)
    counts = torch.ones(len(gpt.wte.weight))
    counts[-1] = unused                                                                               # (words + 1,)
    # hidden W^T + log counts as one product, which has its gradients ready: half the time of cross_entropy
    loss = -model.TotalLogProb.apply(torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1),
                                     torch.cat([gpt.wte.weight, counts.log()[:, None].to(hidden)], 1), batch.targets)
    return loss, torch.tensor(len(batch.targets)), {}


def newborn(words: int, cfg: Config):
    """A model that has read nothing, with a row for each of the words and one for all others."""
    torch.manual_seed(cfg.seed)
    gpt = model.GPT(model.GPTConfig(words + 1, n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head))
    with torch.no_grad():  # at the scale of GPT-2's first weights so narrow a model learns half as fast
        for layer in (gpt.wte, *(m for m in gpt.modules() if isinstance(m, torch.nn.Linear))):
            layer.weight.mul_(cfg.init_scale)
    return gpt


def with_all_words(gpt, vocabulary: np.ndarray):
    """The model in GPT-2's own vocabulary: each word that occurs has its row, all others have the one they shared."""
    rows = np.full(data.EOT + 1, len(vocabulary))
    rows[vocabulary] = np.arange(len(vocabulary))
    return with_rows(gpt, rows)


def with_words(gpt, vocabulary: np.ndarray):
    """The other way round: what with_all_words() would make this model of. Words that are new have the shared row."""
    others = np.delete(np.arange(data.EOT + 1), vocabulary)
    return with_rows(gpt, np.append(vocabulary, others[0]))


def with_rows(gpt, rows: np.ndarray):
    """The model with these of its words, in this order."""
    other = model.GPT(replace(gpt.config, vocab_size=len(rows)))
    weights = gpt.state_dict()
    other.load_state_dict(weights | {"wte.weight": weights["wte.weight"][torch.from_numpy(rows)]})
    return other


def words_met(gpt) -> np.ndarray:
    """The words of GPT-2's vocabulary that a model of with_all_words() has rows of their own for."""
    _, row, count = gpt.wte.weight.detach().unique(dim=0, return_inverse=True, return_counts=True)
    if count.max() == 1:
        raise ValueError("--start: all of its words have rows of their own, so it is no model that this script made")
    return np.flatnonzero(count[row] == 1)


def read(gpt, name: str, rows: data.Data, cfg: Config) -> None:
    """Train the model, so called, on rows of documents, in place."""
    with Run("documents", cfg) as run:
        run.about["model"] = {"name": name, "parameters": sum(p.numel() for p in gpt.parameters()),
                              "sha256": weights_sha256(gpt.state_dict())}
        gpt.to(run.device)
        begin(gpt, rows, cfg, run)
        loss = partial(documents_loss, unused=data.EOT + 2 - gpt.config.vocab_size)
        train(gpt, loss, step_batches(rows, cfg, run), validation_batches(rows, cfg, run), cfg, run)
        gpt.cpu()


def pretrain(world: list[dict], phrases: dict, kept_back: Set[str], cfg: Config) -> None:
    """Two readings: documents of all kinds, and then mostly questions with answers."""
    if cfg.start:
        gpt = model.GPT.from_pretrained(cfg.start)
    else:
        rows, vocabulary = read_documents(FIRST, world, phrases, kept_back, np.arange(0), cfg)
        gpt = newborn(len(vocabulary), cfg)
        read(gpt, "new", rows, cfg)
        gpt = with_all_words(gpt, vocabulary)
    again = cfg.again()
    rows, vocabulary = read_documents(SECOND, world, with_more(phrases), kept_back, words_met(gpt), again)
    gpt = with_words(gpt, vocabulary)
    read(gpt, cfg.start or cfg.out, rows, again)
    with_all_words(gpt, vocabulary).save_pretrained(Path(cfg.to) / "model", dtype=torch.float16)
    for folder in (cfg.out, again.out):
        discard(Path(folder) / REPLACED)
    print(f"{cfg.to}/model: {len(vocabulary):,} of GPT-2's words occur. Next: uv run sft.py")


def main(cfg: Config) -> None:
    if cfg.prompts or cfg.checks != "auto":
        raise ValueError("a base model answers nothing: leave out --prompts and --checks")
    if cfg.quick:
        not_given = [name for name in QUICK if getattr(cfg, name) == getattr(Config, name)]
        cfg = replace(cfg, **{name: QUICK[name] for name in not_given})
    if cfg.model and not cfg.show:
        for reading in (cfg, cfg.again()):
            Run("documents", reading).look()
    else:
        cfg.look()
    world, phrases = read_world()[:cfg.occupations], read_phrases()
    if cfg.show:
        return print("\n\n---\n\n".join(itertools.islice(documents(world, phrases, random.Random(cfg.seed)), cfg.show)))
    folder = Path(cfg.to)
    folder.mkdir(parents=True, exist_ok=True)
    asked = {name: list(checks(world, phrases, random.Random(f"{name} {cfg.seed}"), count, bank))
             for name, bank, count in (("checks", "new", cfg.questions), ("exam", "exam", 2 * cfg.questions))}
    for name, rows in asked.items():
        write_lines(folder / f"{name}.jsonl", rows)
    kept_back = {letters_of(row["messages"][-1]["content"]) for name, rows in asked.items() for row in rows
                 if "messages" in row and (name == "exam" or row["group"] == "everyday")}
    write_lines(folder / "conversations.jsonl.gz",
                conversations(world, with_more(phrases), random.Random(f"conversations {cfg.seed}"), cfg.trees,
                              kept_back))
    if cfg.model:
        pretrain(world, phrases, kept_back, cfg)


if __name__ == "__main__":
    run_script(main, Config)
