"""Make the bundled sample: documents, a base model that has read them, conversations, and checks.

    uv run sample/make.py               everything anew; pre-training takes most of the time
    uv run sample/make.py --no-model    conversations and checks only
    uv run sample/make.py --show 5      print five of the documents that the base model reads
    uv run sample/make.py --quick       a tiny version of everything, in seconds, into runs/quick

world.json knows 216 occupations, phrases.toml knows how such things are said, and this script brings the two together:

    documents            encyclopedia entries, adverts, diaries, riddles ... on all occupations, never a conversation.
                         The base model (sample/model/) reads them and nothing else.
    conversations.jsonl.gz   threads with ranked replies, as OpenAssistant exports its trees, on four fifths of the
                         occupations. What a chat model says of the other fifth, it learnt before SFT.
    checks.jsonl         questions with the facts that a good reply contains, for `--checks` of sft.py and dpo.py.

All of it is a function of the seed. (The model in the repository is older than some wordings of the conversations;
they use no word that it has not met: a test sees to that.)
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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

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
    to: str = str(HERE)  # folder that gets conversations.jsonl.gz, checks.jsonl and model/
    out: str = "runs/base"  # run folder of the pre-training; the same command again goes on where it stopped
    model: bool = True  # pre-train the base model
    quick: bool = False  # a tiny world, model and everything, into runs/quick
    show: int = 0  # print so many documents and do nothing else

    trees: int = 3600  # conversation trees
    questions: int = 100  # checks in each of the four groups
    occupations: int = 1000  # of the world's, at most so many
    n_layer: int = 6  # 6 layers of 128 and GPT-2's 50,257 words are 7.8 million parameters, 16 MB in fp16
    n_embd: int = 128
    n_head: int = 4
    row: int = 256  # tokens of documents in a row
    steps: int = 4000  # optimiser steps
    batch_size: int = 8  # rows a step: facts are learnt by being met often, so small steps and many of them
    lr: float = 3e-3  # highest learning rate
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
            self, ("1 or more", ("trees", "questions", "occupations", "n_layer", "n_head"), lambda value: value >= 1),
            ("0 or more", ("show",), lambda value: value >= 0), ("a multiple of --n-head", ("n_embd",), divides),
            ("from 2 to 1024", ("row",), range(2, 1025).__contains__))

    def look(self) -> None:
        """Refuse what can be seen to fail; among this, somebody else's files that have the names of this script's."""
        data.check_limits(self)
        others = [path for path in Path(self.to, "model").glob("*")
                  if path.name not in ("config.json", "generation_config.json", "model.safetensors")]
        for name in ("conversations.jsonl.gz", "checks.jsonl"):
            path = Path(self.to, name)
            first = next((row for _, _, row in data.file_rows(path)), None) if path.is_file() else {"subject": ""}
            known = isinstance(first, dict) and (str(first.get("message_tree_id")).startswith("sample-")
                                                 or ("subject" in first and "messages" not in first))
            others += [] if known else [path]
        if others:
            raise ValueError(f"--to {self.to}: {others[0]} is none that this script wrote, so all is left alone.\n"
                             "Give another folder: --to")


QUICK = {"to": "runs/quick", "out": "runs/quick/base", "trees": 60, "questions": 5, "occupations": 12, "n_layer": 2,
         "n_embd": 32, "n_head": 2, "row": 64, "steps": 40, "eval_every": 20, "save_every": 40}

ASPECTS = ("does", "tools", "place", "skills", "partners", "kin")
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


def held_out(world: list[dict]) -> set[str]:
    """Every fifth occupation in an order that nobody chose: these occur in documents only."""
    names = sorted((e["name"] for e in world if e["name"] not in ("data scientist", "machine learning engineer")),
                   key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(names[:len(world) // 5])


def mentions(text: str, names: set[str]) -> bool:
    return any(f" {form} " in f" {text} " for name in names for form in (name, plural(name)))


class Teller(dict):
    """Fills templates with what is true of one occupation, and of another where a template speaks of two.

    Facts come in an order drawn anew for each text and go round, so that no sentence says the same thing twice.
    """

    def __init__(self, entry: dict, rng: random.Random, other: dict | None = None, person: str = "I"):
        name, kin = entry["name"], entry["related"]
        super().__init__(a=with_article(name), the=f"the {name}", n=name, s=plural(name), place=entry["workplace"],
                         kin=kin, a_kin=with_article(kin), the_kin=f"the {kin}", kins=plural(kin), field=entry["field"],
                         i=person, my={"I": "my", "you": "your"}[person],
                         who=rng.choice(NAMES), town=rng.choice(TOWNS), day=rng.choice(DAYS),
                         x=self, y=other and Teller(other, rng))
        tasks, tools, skills, partners = (itertools.cycle(rng.sample(entry[key], len(entry[key])))
                                          for key in ("does", "tools", "skills", "works_with"))
        self.deal = {"do": lambda: next(tasks), "does": lambda: third_person(next(tasks)),
                     "doing": lambda: gerund(next(tasks)),
                     "tool": lambda: next(tools), "tools": lambda: listing([next(tools) for _ in entry["tools"]]),
                     "skill": lambda: next(skills), "skills": lambda: listing([next(skills) for _ in entry["skills"]]),
                     "partner": lambda: next(partners),
                     "partners": lambda: listing([next(partners) for _ in entry["works_with"]])}

    def __missing__(self, slot: str) -> str:
        if slot in self.deal:
            return self.deal[slot]()
        if slot == slot.lower():
            raise KeyError(f"phrases.toml has a slot {{{slot}}} that make.py does not know")
        return capital(self[slot[0].lower() + slot[1:]])

    __getattr__ = dict.__getitem__  # so that {x.a} finds what {a} finds

    def tell(self, template: str) -> str:
        return capital(template.format_map(self))


# ---- documents -----------------------------------------------------------------------------------

KINDS = {"encyclopedia": 5, "advert": 2, "diary": 2, "interview": 2, "story": 3, "questions": 1, "card": 3, "riddle": 2,
         "comparison": 5, "letter": 0.6}


def neighbours(world: list[dict]) -> dict[str, list[dict]]:
    """The occupations that each is easily confused with: related, of the same field, or sharing a word of the name."""
    return {x["name"]: [y for y in world if y is not x and (y["field"] == x["field"] or y["name"] == x["related"] or
                                                            set(x["name"].split()) & set(y["name"].split()))]
            for x in world}


def documents(world: list[dict], phrases: dict, rng: random.Random) -> Iterator[str]:
    """Texts without end, each on one occupation or comparing two."""
    near = neighbours(world)
    while True:
        [kind] = rng.choices(list(KINDS), list(KINDS.values()))
        x = rng.choice(world)
        y = rng.choice(near[x["name"]] if near[x["name"]] and rng.random() < 0.5 else world)
        teller = Teller(x, rng, y, "you" if kind == "advert" else "I")
        if kind == "letter":
            yield teller.tell(rng.choice(phrases["letters"]["lines"]))
            continue
        about = phrases["kinds"][kind]
        bank, between = phrases[about["voice"][0]], "\n" if kind in ("questions", "card", "riddle") else " "
        if "lines" in bank:
            middle = rng.sample(bank["lines"], rng.randint(3, 5))
        else:  # tasks twice as often as the rest, for there are more of them
            aspects = list(bank) + ["does"] * (kind != "questions")
            middle = [rng.choice(bank[aspect]) for aspect in rng.sample(aspects, min(len(aspects), rng.randint(4, 6)))]
        sentences = [rng.choice(about["open"]), *middle]
        if about["close"] and rng.random() < 0.4:
            sentences.append(rng.choice(about["close"]))
        yield between.join(map(teller.tell, sentences)).replace("\n\n" + between, "\n\n").replace("\n\n\n", "\n\n")


# ---- conversations -------------------------------------------------------------------------------

OFTEN = {"does": 8, "tools": 5, "place": 7, "skills": 4, "partners": 3, "kin": 4, "about": 2}  # how often asked for
INFORMATIVE = 0.42  # share of the questions that have a reply with several facts among their ranked ones


def conversed(world: list[dict]) -> list[dict]:
    """Four fifths of the world, with no word of the rest: what conversations may speak of."""
    hidden = held_out(world)
    return [entry | {"works_with": [p for p in entry["works_with"] if not mentions(p, hidden)],
                     "related": "" if entry["related"] in hidden else entry["related"]}
            for entry in world if entry["name"] not in hidden]


class Talk:
    """Questions about the occupations of `world`, and ranked replies to them."""

    def __init__(self, world: list[dict], phrases: dict, rng: random.Random):
        self.world, self.phrases, self.rng = world, phrases, rng
        self.near = neighbours(world)

    def say(self, *path: str, about: dict | None = None, other: dict | None = None) -> str:
        """A line of phrases.toml, found by its path, filled with facts of `about`."""
        lines = self.phrases
        for step in (*path, "lines") if "lines" in lines[path[0]] else path:
            lines = lines[step]
        return Teller(about or self.occupation(), self.rng, other).tell(self.rng.choice(lines))

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

    def replies(self, x: dict, aspect: str) -> tuple[list[str], list[str]]:
        """Good replies and bad ones, best first: informative, plain; bare, vague, off the subject, wrong.

        Half of the bad ones are wrong: another occupation's facts are what a model has to be kept from most.
        """
        rng, stranger = self.rng, self.occupation(unlike=x)
        wrong = "full" if rng.random() < 0.5 else "plain"
        good = [self.say("plain", aspect, about=x)]
        several = {"place": False, "kin": False, "partners": len(x["works_with"]) > 1}.get(aspect, True)
        if several and rng.random() < INFORMATIVE:
            good.insert(0, self.say("full", aspect, about=x))
        impostors = [x | {key: other[key] for key in x if key != "name" and other[key]}
                     for other in (stranger, self.occupation(unlike=x))]
        bad = [self.say("bare", aspect, about=x),
               self.say("vague", about=x),
               self.say("plain", self.aspect(x, unlike=aspect), about=x),
               self.say(wrong, aspect if aspect in self.known(stranger) else "does", about=stranger),
               *(self.say(wrong, aspect, about=impostor) for impostor in impostors)]
        bad = [text for text in dict.fromkeys(bad) if text not in good]
        count = 1 if not several else rng.choice((1, 2)) if len(good) > 1 else rng.choice((0, 0, 1))
        return good, [bad[i] for i in sorted(rng.sample(range(len(bad)), count))]

    def exchange(self, kind: str, before: tuple | None):
        """One question with its good and bad replies, and what it was about: (occupation, aspect) or None."""
        rng, x = self.rng, self.occupation()
        if kind in ("talk", "thanks", "unknown"):
            question, reply = self.say(kind, about=x).split(" | ")
            return question, [reply], [self.say("vague", about=x), self.say("plain", "does", about=x)][:1], None
        if kind == "compare":
            y = self.occupation(unlike=x)
            good = [self.say("compare", "plain", about=x, other=y)]
            if rng.random() < INFORMATIVE:
                good.insert(0, self.say("compare", "full", about=x, other=y))
            impostor = x | {"does": self.occupation(unlike=x)["does"]}
            bad = [self.say("plain", "does", about=x), self.say("compare", "full", about=impostor, other=y)]
            return self.say("compare", "ask", about=x, other=y), good, bad, None
        if kind == "ask":
            aspect = self.aspect(x)
            question = self.say("ask", aspect, about=x)
        elif kind == "then":  # the occupation of the turn before
            x = before[0]
            aspect = next(a for a in iter(lambda: self.aspect(x, unlike=before[1]), None) if a != "about")
            question = self.say("then", aspect)
        else:  # the question of the turn before
            aspect = before[1]
            x = next(e for e in iter(lambda: self.occupation(unlike=before[0]), None) if aspect in self.known(e))
            question = self.say("other", about=x)
        return question, *self.replies(x, aspect), (x, aspect)


def conversations(world: list[dict], phrases: dict, rng: random.Random, count: int) -> Iterator[dict]:
    """Message trees as OpenAssistant exports them.

    A tree is one conversation with other replies beside its own. Bad ones failed their review, so a reader of threads
    leaves them out as it does in OpenAssistant's data; but they are ranked, and so they serve preference pairs. A
    conversation goes on from a plain reply more often than from an informative one: SFT learns to be right, and leaves
    it to DPO to say more.
    """
    talk = Talk(conversed(world), phrases, rng)
    for number in range(count):
        root = last = before = None
        for turn in range(turns := rng.choices((1, 2, 3, 4), (1, 3, 4, 2))[0]):
            kinds = {"ask": 3, "then": 8 * bool(before), "other": 7 * bool(before), "compare": 0.6, "unknown": 0.6,
                     "talk": 1 * (turn == 0), "thanks": 1 * (turn > 0 and turn == turns - 1)}
            question, good, bad, before = talk.exchange(rng.choices(list(kinds), list(kinds.values()))[0], before)
            prompt = message("prompter", question)
            prompt["replies"] = [message("assistant", text, review_result=text in good, rank=rank)
                                 for rank, text in enumerate(good + bad)]
            root = root or prompt
            if last:
                last["replies"].append(prompt)
            last = prompt["replies"][0 if rng.random() < 0.3 else len(good) - 1]
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


def checks(world: list[dict], phrases: dict, rng: random.Random, count: int) -> Iterator[dict]:
    """Questions for `--checks`: `count` of each of four groups, and what is true of every occupation.

    Half of the single questions and a third of the follow-ups are in words that no conversation has.
    """
    for entry in world:  # its name too: a reply about another occupation should not speak of this one
        yield {"subject": entry["name"], "facts": [[entry["name"], plural(entry["name"])], *facts(entry)]}
    hidden = held_out(world)
    seen = Talk([e for e in world if e["name"] not in hidden], phrases, rng)
    unseen = Talk([e for e in world if e["name"] in hidden], phrases, rng)
    for group, talk in (("seen", seen), ("held-out", unseen)):
        for i in range(2 * count):
            x = talk.occupation()
            aspect, follow_up = talk.aspect(x), i % 2
            earlier = []
            if not follow_up:
                question = talk.say("ask_new" if rng.random() < 0.5 and aspect in phrases["ask_new"] else "ask", aspect,
                                    about=x)
            elif rng.random() < 0.5:  # the occupation is in the turn before
                first, aspect = aspect, rng.choice([a for a in ASPECTS if a not in (aspect, "kin")])
                earlier = [talk.say("ask", first, about=x), talk.say("plain", first, about=x)]
                question = talk.say("then_new" if rng.random() < 1 / 3 else "then", aspect)
            else:  # the question is in the turn before
                y = seen.occupation(unlike=x)
                earlier = [talk.say("ask", aspect, about=y), talk.say("plain", aspect, about=y)]
                question = talk.say("other_new" if rng.random() < 1 / 3 else "other", about=x)
            messages = [{"role": role, "content": text}
                        for role, text in zip(("user", "assistant", "user"), [*earlier, question], strict=False)]
            yield {"messages": messages, "facts": facts(x, aspect), "subject": x["name"],
                   "group": f"{group}, {'follow-up' if follow_up else 'single'}"}


def write_lines(path: Path, objects) -> None:
    """JSONL, zipped if the name says so; the same bytes every time."""
    text = "".join(json.dumps(o) + "\n" for o in objects)
    with data.written_whole(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


# ---- pre-training --------------------------------------------------------------------------------


def read_documents(world: list[dict], phrases: dict, others: Path, cfg: Config) -> tuple[data.Data, np.ndarray]:
    """Enough documents for all steps, end to end and cut into rows, in ids of a vocabulary of their own.

    Returns the rows and `vocabulary`, the GPT-2 ids that occur: those of the documents, and those of the conversations,
    so that the words of questions differ from one another before SFT. Id i of the rows is vocabulary[i].
    """
    tokens, texts = data.tokenizer(), documents(world, phrases, random.Random(f"documents {cfg.seed}"))
    count, wanted, parts = 0, (cfg.steps * cfg.batch_size + 64) * cfg.row, []
    while count < wanted:
        parts += [[data.EOT, *tokens.encode_ordinary(text)] for text in itertools.islice(texts, 1000)]
        count += sum(map(len, parts[-1000:]))
    stream = np.concatenate(parts)[:wanted].astype(np.int64)
    chats = data.load_rows([f"sample:{others}"], data.Reading(val_fraction=0.0)).train
    vocabulary = np.unique(np.concatenate([stream, *(row.ids for row in chats)]))
    ids = np.searchsorted(vocabulary, stream).astype(np.int32).reshape(-1, cfg.row)
    rows = [data.Row(row, np.ones(cfg.row, bool)) for row in ids]
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
    logits = torch.nn.functional.linear(hidden, gpt.wte.weight)                                        # (M, words + 1)
    logits[:, -1] += math.log(unused)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
    return loss, torch.tensor(len(batch.targets)), {}


def with_all_words(gpt, vocabulary: np.ndarray):
    """The model in GPT-2's own vocabulary: each word that occurs has its row, all others have the one they shared."""
    whole = model.GPT(replace(gpt.config, vocab_size=data.EOT + 1))
    weights = gpt.state_dict()
    rows = torch.full((data.EOT + 1,), len(vocabulary))
    rows[torch.from_numpy(vocabulary)] = torch.arange(len(vocabulary))
    whole.load_state_dict(weights | {"wte.weight": weights["wte.weight"][rows]})
    return whole


def pretrain(world: list[dict], phrases: dict, cfg: Config) -> None:
    rows, vocabulary = read_documents(world, phrases, Path(cfg.to) / "conversations.jsonl.gz", cfg)
    torch.manual_seed(cfg.seed)
    gpt = model.GPT(model.GPTConfig(len(vocabulary) + 1, n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head))
    with Run("documents", cfg) as run:
        run.about["model"] = {"name": "new", "parameters": sum(p.numel() for p in gpt.parameters()),
                              "sha256": weights_sha256(gpt.state_dict())}
        gpt = gpt.to(run.device)
        begin(gpt, rows, cfg, run)
        loss = partial(documents_loss, unused=data.EOT + 1 - len(vocabulary))
        train(gpt, loss, step_batches(rows, cfg, run), validation_batches(rows, cfg, run), cfg, run)
        with_all_words(gpt.cpu(), vocabulary).save_pretrained(Path(cfg.to) / "model", dtype=torch.float16)
        discard(run.folder / REPLACED)
        run.say(f"{cfg.to}/model: {len(vocabulary):,} of GPT-2's words occur. Next: uv run sft.py")


def main(cfg: Config) -> None:
    if cfg.prompts or cfg.checks != "auto":
        raise ValueError("a base model answers nothing: leave out --prompts and --checks")
    if cfg.quick:
        not_given = [name for name in QUICK if getattr(cfg, name) == getattr(Config, name)]
        cfg = replace(cfg, **{name: QUICK[name] for name in not_given})
    Run("documents", cfg).look() if cfg.model and not cfg.show else cfg.look()
    world, phrases = read_world()[:cfg.occupations], read_phrases()
    if cfg.show:
        return print("\n\n---\n\n".join(itertools.islice(documents(world, phrases, random.Random(cfg.seed)), cfg.show)))
    folder = Path(cfg.to)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "conversations.jsonl.gz",
                conversations(world, phrases, random.Random(f"conversations {cfg.seed}"), cfg.trees))
    write_lines(folder / "checks.jsonl", checks(world, phrases, random.Random(f"checks {cfg.seed}"), cfg.questions))
    if cfg.model:
        pretrain(world, phrases, cfg)


if __name__ == "__main__":
    run_script(main, Config)
