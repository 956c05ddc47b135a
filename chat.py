"""Talk to models in the terminal: what is said, corrected and preferred becomes data that sft.py and dpo.py read.

    uv run chat.py                                  the newest of runs/dpo and runs/sft
    uv run chat.py "What does a tailor do?"         one answer, then out
    uv run chat.py --compare runs/sft runs/dpo      two models side by side; --blind: unnamed until you have voted

`main` tells a terminal from a pipe, `Session` is the conversation, `reply` turns messages into a stream of text, and
`judged` says how likely a model finds a text. A reader may stop at "The terminal": `COMMANDS` holds a small function
for everything a person can do besides talking, `Screen` and `Wrap` put text on a terminal, and `prompt_reader` reads
what is typed.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, takewhile, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import tyro
from rich.cells import cell_len, chop_cells, set_cell_size

import data
from data import exchanges, lazy, run_script

# they import torch, which takes two seconds: neither --help nor the first prompt waits for that
model, lora = lazy("model"), lazy("lora")
filelock = lazy("filelock")


# ---- settings ------------------------------------------------------------------------------------


@dataclass
class Config:
    # answer this, with what comes through a pipe, and leave; it stands before --compare, which takes all that follows
    words: tyro.conf.Positional[tuple[str, ...]] = ()
    model: str = ""  # sample, gpt2, gpt2-medium, ... or a model's folder; by default the newest of runs/dpo, runs/sft
    adapter: str = ""  # a PEFT folder with LoRA adapters of --model, which it names itself where --model is not given
    compare: tuple[str, ...] = ()  # models that all answer every message, such as runs/sft runs/dpo sample
    blind: tuple[str, ...] = ()  # two models that answer unnamed, left and right by chance, until you have voted
    prompts: str = ""  # a file of questions for --blind: a line each, or JSONL with messages
    preferences: str = "preferences.jsonl"  # where /prefer, /correct and --blind add pairs of replies for dpo.py
    prompt: str | None = None  # answer this and leave; a prompt can also come through a pipe
    system: str = ""  # a system message: it opens every conversation
    temperature: float = 0.7  # 0 always takes the likeliest token, 1 draws from the model's own distribution
    top_k: int = 0  # draw only from this many likeliest tokens; 0 from all
    top_p: float = 1.0  # draw only from the likeliest tokens that together have this probability; 1 from all
    min_p: float = 0.05  # draw only tokens at least this many times as likely as the likeliest; 0 any
    # above 1, tokens already in the conversation become less likely, the end of a reply excepted: a logit is divided by
    # it, or multiplied where it is negative, as in transformers; so a model whose logits lie far below 0 feels it more
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256  # tokens of a reply at most
    seed: int | None = None  # the same seed, settings and messages give the same replies; None: others every time
    verbose: bool = False  # say after each reply how fast it came
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    # auto: bf16 where the device computes in it, else fp32; int8: rounded weights, faster replies of the largest models
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    debug: bool = False  # show the traceback of an error


SETTINGS = {"temperature": (0, 100), "top_k": (0, math.inf), "top_p": (0.001, 1), "min_p": (0, 1),  # from, to
            "repetition_penalty": (0.01, 100), "max_new_tokens": (1, math.inf), "seed": (0, 2**62), "verbose": (0, 1)}


def check(cfg: Config) -> None:
    """Refuse settings that mean nothing."""
    for name, (low, high) in SETTINGS.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            upwards = f" to {high}" if high < 2**62 else " or more" + ", and at most 2^62" * (high == 2**62)
            raise ValueError(f"{name} is {value}; it has to be {low}{upwards}")
    if cfg.blind and (len(set(map(Path, cfg.blind))) != 2 or cfg.model or cfg.compare):
        raise ValueError("--blind takes two models and stands for --model: --blind runs/sft runs/dpo")
    if cfg.prompts and not cfg.blind:
        raise ValueError("--prompts has the questions of a blind comparison: --blind runs/sft runs/dpo --prompts FILE")
    if cfg.prompt is not None and cfg.words:
        raise ValueError(f"--prompt is asked alone: leave out the words {shlex.join(cfg.words)[:80]}, or --prompt")
    if not (folder := Path(os.path.expanduser(cfg.preferences)).parent).is_dir():
        raise ValueError(f"--preferences {cfg.preferences}: there is no folder {folder}")
    if len(cfg.words) == 1 and Path(cfg.words[0], "config.json").is_file():
        raise ValueError(f"'{cfg.words[0]}' is a model: uv run chat.py --model {shlex.quote(cfg.words[0])}")


# ---- the conversation ----------------------------------------------------------------------------


def main(cfg: Config) -> None:
    check(cfg)
    cfg, screen = replace(cfg, system=os.fsencode(cfg.system).decode("utf-8", "replace")), Screen()
    first = cfg.model or (lora.base_of(cfg.adapter) if cfg.adapter else "")
    names = [*filter(None, [first]), *cfg.compare, *cfg.blind] or [newest_model()]
    if cfg.blind:  # before a vote is asked for that could not be kept
        what_stands_in(path := file_named(cfg.preferences), partial(pairs_in, path))
    if cfg.prompts:
        return examine(Session(cfg, screen, names), questions(Path(cfg.prompts)))
    if cfg.prompt is None and not cfg.words and sys.stdin.isatty() and screen.terminal:
        session = Session(cfg, screen, names)
        found = names[0] + ", the newest model here" if not (first or len(names) > 1) else ", ".join(names)
        found += f" (the first with {cfg.adapter})" if cfg.adapter else ""
        screen.say(f"{found}. /help lists the commands, Ctrl-D leaves.", "note")
        return session.run()
    if cfg.blind:
        raise ValueError("--blind asks what is typed at a terminal, or what stands in --prompts FILE")
    if not (text := single_prompt(cfg)):
        raise ValueError("there is nothing to answer: the prompt is empty"
                         + " (words stand before --compare)" * bool(cfg.compare))
    Session(cfg, screen, names).answer_once(text)


def single_prompt(cfg: Config) -> str:
    """--prompt alone; or the words of the command line, and behind them what a pipe brings."""
    parts = [os.fsencode(" ".join(cfg.words) if cfg.prompt is None else cfg.prompt)]  # the locale may not be UTF-8
    typing = sys.stdin.isatty()
    if cfg.prompt is None and not (typing and cfg.words):
        if typing:
            print("Type the prompt, then Ctrl-D.", file=sys.stderr)  # as the reply goes to a file or a pipe
        parts.append(sys.stdin.buffer.read())
    return "\n\n".join(filter(None, (part.decode("utf-8-sig", "replace").strip() for part in parts)))


class Session:
    """What was said, to which models, with which settings."""

    def __init__(self, cfg: Config, screen: Screen, names: list[str]):
        self.cfg, self.screen = cfg, screen
        self.system = [{"role": "system", "content": cfg.system}] if cfg.system.strip() else []
        names = list(dict.fromkeys(str(Path(name)) for name in names))
        self.chats = [Chat(name, cfg, adapter=cfg.adapter if name == names[0] else "") for name in names]
        self.draft = ""  # what already stands in the next prompt
        self.then = self.ask  # what is done with the next message
        self.blind = tuple(chat.name for chat in self.chats) if cfg.blind else ()
        self.hidden = False  # whether names are, because a blind vote is due
        self.luck = random.Random(cfg.seed)  # deals out left and right
        self.choice: list[data.Conversation] = []  # what /prefer chooses from
        self.authors: list[str] = []  # who wrote the replies to choose from
        self.author = ""  # who wrote the last reply, where one model answers
        self.reference: Chat | None = None  # another model, which /why asks
        self.told_of_overflow = False

    @property
    def last_question(self) -> str:
        if not (asked := up_to_question(self.chats[0].messages)):
            raise ValueError("Nothing has been said yet.")
        return asked[-1]["content"]

    def must_have_voted(self) -> None:
        """Refuse what would tell which model is which, as its size does."""
        if self.hidden:
            raise ValueError("Vote first: /prefer left, right or neither.")

    def begin(self, messages: data.Conversation) -> None:
        """Go on from these messages instead."""
        self.author, self.hidden = "a saved conversation", False
        self.system = list(takewhile(lambda message: message["role"] == "system", messages))
        for chat in self.chats:
            chat.messages, chat.stats, chat.retries = messages[len(self.system):], Stats(), 0
        self.told_of_overflow = False

    def take_back(self) -> None:
        """Forget the last exchange."""
        for chat in self.chats:
            chat.messages = [message for turn in exchanges(chat.messages)[:-1] for message in turn]

    def ask(self, text: str, instead: bool = False) -> None:
        """Say this to every model, `instead` of the last message; if none answers, nothing was said."""
        if self.blind:
            self.luck.shuffle(self.chats)
        before, again, answered = [c.messages for c in self.chats], instead and text == self.last_question, False
        try:
            if instead:
                self.take_back()
            for chat in self.chats:
                chat.messages = [*chat.messages, {"role": "user", "content": text}]
                chat.retries = chat.retries + 1 if again else 0
            self.hidden = bool(self.blind)
            answered = self.answer()
        finally:
            for chat, messages in zip(self.chats, before, strict=True):
                chat.messages = chat.messages if answered else messages
            self.hidden = self.hidden and answered
        if answered:
            beside_it = again and len(before) == 1
            self.choice = [*before[:beside_it], *(chat.messages for chat in self.chats)]
            self.authors = [*[self.author][:beside_it], *(chat.name for chat in self.chats)]
            self.author = self.chats[0].name
            self.draft = "/prefer " if self.hidden else ""

    def answer(self) -> bool:
        if not all(chat.loading.done() for chat in self.chats):
            self.screen.say("(still loading the model)", "note")
        fits = [fit(self.system + chat.messages, chat.gpt.config.n_positions, self.cfg.max_new_tokens)
                for chat in self.chats]  # refuses what is too long before any model speaks
        if any(left_out for _, left_out in fits) and not self.told_of_overflow:
            self.told_of_overflow = True
            self.screen.say(f"(the conversation has outgrown the {self.chats[0].gpt.config.n_positions:,} tokens that "
                            "the model reads at once: it no longer sees the oldest exchanges)", "note")
        cfg = replace(self.cfg, verbose=self.cfg.verbose and not self.hidden)  # speed tells which model it is
        with reply_in_progress(self.screen) as stopped:
            texts = show_replies(self.screen, list(map(self.title, self.chats)),
                                 [(chat.reply(self.system, cfg), chat) for chat in self.chats], stopped)
        for chat, text in zip(self.chats, texts, strict=True):
            chat.messages = [*chat.messages, {"role": "assistant", "content": text}]
        if not any(texts):
            self.screen.say("(no answer, so the message is taken back; Up brings it to the prompt)", "note")
        return any(texts)

    def title(self, chat: Chat) -> str:
        """What stands above a model's reply: its name, or its side while a vote is due."""
        return SIDES[self.chats.index(chat)] if self.hidden else data.visible(chat.name)

    def answer_once(self, text: str) -> None:
        """Every model's reply to a single prompt, and nothing else on standard output."""
        for i, chat in enumerate(self.chats):
            if chat.warning:
                print(f"({data.visible(chat.warning)})", file=sys.stderr)
            if len(self.chats) > 1:
                self.screen.write("\n" * (i > 0) + f"[{data.visible(chat.name)}]\n")
            chat.messages = [{"role": "user", "content": text}]
            answer = Reply(self.screen.wrap(), chat.reply(self.system, self.cfg), chat)
            try:
                while answer.going:
                    answer.step()
            finally:
                answer.wrap.end()
            if note := answer.note():
                print(f"({note})", file=sys.stderr)

    def lines(self) -> str:
        """The conversation as training data: for every model a line {"messages": [...]} of what it has answered."""
        lines = ""
        for chat in self.chats:
            answered = [message for turn in exchanges(chat.messages)
                        if any(m["role"] == "assistant" and m["content"] for m in turn) for message in turn]
            if answered:
                lines += as_line(self.system + answered)
        return lines

    def show(self) -> None:
        """The conversation so far, looking as it did when it was had."""
        looks = {"system": ("note", "System message: ", ""), "user": ("you", "> ", ""), "assistant": ("", "", "\n")}
        for message in self.system + self.chats[0].messages:
            style, before, after = looks[message["role"]]
            self.screen.say(before + message["content"] + after, style)

    def run(self) -> None:
        """Read, answer, repeat."""
        self.unsaved = Unsaved()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of prompt_toolkit, which resets the terminal
        if any(of_the_sample(chat.name) for chat in self.chats):
            self.screen.say("Made from the bundled sample, which is about occupations and little else. "
                            "Try: What does a tailor do?", "note")
        if self.blind:
            self.screen.say("The two answer unnamed, left and right by chance, until you say which is better.", "note")
        if self.unsaved.offered:
            turns = len(exchanges(self.unsaved.offered[0]))
            self.screen.say(f"(exchanges that were not saved: {turns}; /load goes on with them)", "note")
        read, leaving = prompt_reader(self), False
        for warning in (chat.warning for chat in self.chats if chat.warning):
            self.screen.say(f"({warning})", "note")
        while True:
            try:
                self.unsaved.keep(self.lines())
                text = read()
                leaving = False
                self.handle(text)
            except EOFError:
                break
            except KeyboardInterrupt:
                if leaving:
                    break
                leaving, self.then = True, self.ask
                self.screen.say("(Ctrl-C again leaves, as do Ctrl-D and /exit)", "note")
            except Exception as problem:
                if self.cfg.debug or any(c.loading.done() and c.loading.exception() for c in self.chats):
                    raise  # without a model there is nothing to go on with
                if isinstance(problem, OSError) and problem.strerror:  # whose number says nothing to a person
                    problem = problem.strerror + (f": '{problem.filename}'" if problem.filename else "")
                self.screen.say(str(problem) or repr(problem), "error")
        self.unsaved.keep(self.lines())
        if self.unsaved.kept:
            self.screen.say("(not saved; the next chat offers it back)", "note")

    def handle(self, text: str) -> None:
        """One input: a command or a message."""
        name, argument = re.fullmatch(r"(\S*)\s*(.*)", text.strip(), re.DOTALL).groups()
        name, then, self.then = ALIASES.get(name, name), self.then, self.ask
        if name in COMMANDS:
            if argument and usage(name)[0] == name:
                raise ValueError(f"{name} stands alone; nothing was done, as it came with '{data.excerpt(argument)}'.")
            COMMANDS[name](self, unquoted(argument))
        elif re.fullmatch(r"/\w+", name):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            raise ValueError(f"There is no command {name}{f'; did you mean {close[0]}?' if close else '.'} "
                             "All of them: /help. A message that begins with / can begin with // instead.")
        elif text.strip():
            then(unquoted(re.sub(r"^/(?=/+\w)", "", text.strip())))


# ---- from messages to a stream of text -----------------------------------------------------------


class Chat:
    """A model, loaded in the background, and its side of the conversation (without the system message)."""

    loader = ThreadPoolExecutor(max_workers=1)

    def __init__(self, name: str, cfg: Config, messages: data.Conversation = (), adapter: str = ""):
        self.name, self.messages = name, list(messages)
        if not (here := Path(name, "config.json").is_file()):
            model.check_model(name)
        remarks = [data.check_tokenizer(folder) for folder in (name, adapter) if folder]
        remarks += [lora.check_base(adapter, name)] if adapter else []
        self.warning = ". ".join(filter(None, remarks))

        def load():
            device = model.pick_device(cfg.device)
            gpt = model.GPT.from_pretrained(name)
            if adapter:
                lora.merge_adapters(gpt, adapter)
            gpt.to(device)
            self.parameters = sum(weight.numel() for weight in gpt.parameters())
            self.precision = model.pick_precision(cfg.precision, device, small=gpt.config.n_embd < 512)
            return model.for_generation(gpt, self.precision)

        if here:
            self.loading: Future = self.loader.submit(load)
        else:  # a download is waited for: its progress needs the screen, and Ctrl-C has to end it
            self.loading = Future()
            self.loading.set_result(load())
        self.cache, self.stats, self.retries = None, Stats(), 0
        self.remark = ""  # what is to be said below the last reply: why it ended before its end, and how fast it came

    @property
    def gpt(self):
        """The model, as soon as it is loaded."""
        return self.loading.result()

    @property
    def last_reply(self) -> str:
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[-1]["content"]
        raise ValueError("There is no reply yet.")

    def used(self, system: data.Conversation) -> str:
        """How much of what the model reads at once the conversation fills."""
        positions = self.gpt.config.n_positions
        kept = data.without_oldest(system + self.messages, positions)
        return f"{len(data.render(kept)[0]):,} of {positions:,} tokens"

    def reply(self, system: data.Conversation, cfg: Config) -> Iterator[str]:
        """Its next reply; each has a seed of its own, so that /retry says something new that can yet be repeated."""
        self.cache = self.cache or model.KVCache(self.gpt)
        self.stats, self.remark = Stats(), ""
        seed = None if cfg.seed is None else cfg.seed + len(self.messages) + 1000 * self.retries
        try:
            yield from reply(self.gpt, system + self.messages, cfg, cache=self.cache, seed=seed, stats=self.stats)
            self.remark = "; ".join(filter(None, [self.stats.cut_off, self.stats.speed * cfg.verbose]))
        except KeyboardInterrupt:
            self.cache = None  # its bookkeeping may be half done
            raise


def reply(gpt, messages: data.Conversation, cfg: Config, *, cache=None, seed: int | None = None,
          stats: Stats | None = None) -> Iterator[str]:
    """Stream the assistant's next message: for every token a piece of text, together exactly its content.

    A piece may be empty: bytes wait for the rest of their character, and white space waits for what follows it,
    because content is stripped at both ends. A piece may hold control characters: `Wrap` makes them visible.
    With the same `cache` from turn to turn, only what is new is computed.
    """
    stats, began = stats or Stats(), time.perf_counter()
    ids, _ = fit(messages, gpt.config.n_positions, cfg.max_new_tokens)
    limit = min(cfg.max_new_tokens, gpt.config.n_positions - len(ids))
    stats.read, stats.known = len(ids), cache.shared(ids) if cache else 0
    decoder, begun, space = codecs.getincrementaldecoder("utf-8")("replace"), False, ""
    for token in model.generate(gpt, ids, limit, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                                min_p=cfg.min_p, repetition_penalty=cfg.repetition_penalty, seed=seed, cache=cache):
        stats.written += 1
        text = space + decoder.decode(data.bytes_of(token))
        if not begun:
            text = text.lstrip()  # content begins with no white space
        piece = text.rstrip()
        begun, space = begun or bool(text), text[len(piece):]  # it may end with none: space waits for what comes
        stats.seconds = (paused := time.perf_counter()) - began
        stats.first = stats.first or stats.seconds
        yield piece
        began += time.perf_counter() - paused  # meanwhile another model may have spoken: that is not its time
    if stats.written == limit:
        full = limit < cfg.max_new_tokens
        stats.cut_off = "cut off: the context is full" if full else f"cut off: max_new_tokens is {limit}"


def up_to_question(messages: data.Conversation) -> data.Conversation:
    """The messages up to the user's last."""
    return messages[:max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)]


def fit(messages: data.Conversation, positions: int, max_new_tokens: int) -> tuple[list[int], int]:
    """The ids that a model with so many positions reads in order to answer, and how many messages they leave out.

    Whole oldest exchanges go until the reply has room: its longest length, or a quarter of the context if that is
    less. The system message stays. Raises ValueError if the last message alone is too long.
    """
    kept = data.without_oldest(messages, positions - min(max_new_tokens, positions // 4), reply=True)
    ids, least = data.render(kept, reply=True)[0].tolist(), positions // 32
    if len(ids) > positions - least:
        raise ValueError(f"Not sent: the message takes {len(ids):,} tokens"
                         f"{' with the system message' if kept[0]['role'] == 'system' else ''}, and the model reads "
                         f"{positions:,} at once, of which {least} are kept for its reply.")
    return ids, len(messages) - len(kept)


class Reply:
    """One model's reply while it comes, a token at a time."""

    def __init__(self, wrap: Wrap, coming: Iterator[str], chat: Chat | None = None):
        self.wrap, self.coming, self.chat = wrap, coming, chat
        self.text, self.going = "", True

    def step(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Show the next token, if there is one."""
        piece = None if stopped() else next(self.coming, None)
        self.going = piece is not None
        if self.going:
            self.text += piece
            self.wrap.feed(piece)

    def note(self, stopped: Callable[[], bool] = lambda: False) -> str:
        """What is to be said below it."""
        return "stopped" if stopped() else self.chat.remark if self.chat else ""


@dataclass
class Stats:
    """What a reply cost: tokens, and seconds since it was asked for."""
    read: int = 0  # tokens before the reply
    known: int = 0  # those of them that the cache still held from the turn before
    written: int = 0  # tokens of the reply
    first: float = 0.0  # seconds until the first of them
    seconds: float = 0.0
    cut_off: str = ""  # why the reply ended before its end, if it did

    @property
    def speed(self) -> str:
        rate = self.written / self.seconds if self.seconds else 0.0
        return (f"{self.written:,} tokens in {self.seconds:.2f} s, {rate:,.0f} a second, the first after "
                f"{self.first:.2f} s")


# ---- what a model makes of a text, and people of a model -----------------------------------------


class Word(NamedTuple):
    """A piece of a reply, mostly a token, and what a model makes of it in its place."""

    text: str
    logp: float  # log pi(text | all before it)
    nearly: list[tuple[str, float]]  # what else it might have said there: the likeliest tokens and their log p


def judged(gpt, messages: data.Conversation, positions: int) -> list[Word]:
    """The last message piece by piece, with the <|endoftext|> behind it: their logp add up to log pi(y|x).

    It is read as training reads it, so log pi - log pi_ref, summed up, is what DPO multiplies by beta for its reward.
    """
    kept = data.without_oldest(messages, positions)
    ids, mask = data.render(kept, [message is kept[-1] for message in kept])
    if len(ids) > positions:
        raise ValueError(f"Question and reply take {len(ids):,} tokens, and the model reads {positions:,} at once.")
    start, words, at = int(mask.argmax()), [], 0
    logp, likeliest, their_logp = (scores.tolist() for scores in model.scores(gpt, ids.tolist(), start))
    for text, tokens in data.pieces(ids[start:]):
        others = [(data.text_of([token]), score)
                  for token, score in zip(likeliest[at], their_logp[at], strict=True) if token != ids[start + at]]
        words.append(Word(text, sum(logp[at:at + tokens]), others[:3]))
        at += tokens
    return words


def win_rate(wins: int, losses: int, ties: int) -> tuple[float, float, float]:
    """The share of votes won, a tie being half a win, and the ends of Wilson's interval of 95 % around it.

    Wilson 1927 (https://doi.org/10.1080/01621459.1927.10502953). It holds for few votes too: 3 of 3 are 44 to 100 %.
    """
    n, won, z = wins + losses + ties, wins + ties / 2, 1.96
    middle = (won + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * math.sqrt(won * (n - won) / n + z**2 / 4)
    return won / n, max(0.0, middle - reach), min(1.0, middle + reach)


# ======== The terminal. A reader may stop here. ===================================================

# ---- commands: the docstring is the help; what stands before its colon, the argument -------------

COMMANDS: dict[str, Callable[[Session, str], None]] = {}
ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit", "/clear": "/new", "/regen": "/retry"}  # known elsewhere
SIDES = ("left", "right")
KEYS = """Enter sends. Alt-Enter, or a backslash before Enter, begins a new line; pasted lines stay together.
Between \"\"\" and \"\"\" Enter begins a new line too.
Ctrl-C stops a reply and keeps what there is of it; at an empty prompt, twice, it leaves.
Up and Ctrl-R find earlier messages, Ctrl-X Ctrl-E opens your editor, Tab completes commands."""


def command(function: Callable[[Session, str], None]) -> Callable[[Session, str], None]:
    COMMANDS["/" + function.__name__.rstrip("_")] = function
    return function


def usage(name: str) -> tuple[str, str, str]:
    """A command with its argument, what it does in a line, and what else there is to know."""
    first, _, more = COMMANDS[name].__doc__.strip().partition("\n")
    argument, _, line = first.rpartition(": ")
    return f"{name} {argument}".strip(), line, " ".join(more.split())


@command
def help_(session: Session, argument: str) -> None:
    """[COMMAND]: all commands, or one of them in full"""
    say = session.screen.say
    if argument:
        name = ALIASES.get(argument, "/" + argument.lstrip("/"))
        if name not in COMMANDS:
            raise ValueError(f"There is no command {name}; the commands are {' '.join(COMMANDS)}.")
        synopsis, line, more = usage(name)
        also = "".join(f"\nAlso: {alias}" for alias, target in ALIASES.items() if target == name)
        return say(f"{synopsis}\n{line}\n{more}".rstrip() + also)
    session.screen.table([usage(name)[:2] for name in COMMANDS])
    known = ", ".join(f"{alias} for {name}" for alias, name in ALIASES.items())
    say(f"\n{KEYS}\nKnown too: {known}.", "note")


@command
def new(session: Session, argument: str) -> None:
    """begin a new conversation, with the same system message"""
    session.begin(session.system)
    session.screen.say("(a new conversation)", "note")


@command
def system(session: Session, argument: str) -> None:
    """[TEXT]: tell the model how to behave (alone, show it; -, nothing)

    The text comes before the first message, also of the conversation that is going on.
    """
    message = {"role": "system", "content": argument}
    size, positions = len(data.render([message])[0]), min(chat.gpt.config.n_positions for chat in session.chats)
    if size > positions // 2:
        raise ValueError(f"Not set: it takes {size:,} tokens, more than half of the model's {positions:,}.")
    if argument:
        session.system = [] if argument == "-" else [message]
        session.choice = []  # which had another
    session.screen.say(f"(system message: {session.system[0]['content'] if session.system else 'none'})", "note")
    if deaf := [chat.name for chat in session.chats if session.system and never_had_system(chat.name)]:
        session.screen.say(f"(no conversation that {' or '.join(deaf)} learnt from had one, so little will come of it)",
                           "note")


@command
def retry(session: Session, argument: str) -> None:
    """have the last message answered again"""
    session.ask(session.last_question, instead=True)


@command
def undo(session: Session, argument: str) -> None:
    """take back the last message and its answer"""
    question, session.hidden = session.last_question, False
    session.take_back()
    session.screen.say(f"(taken back: {textwrap.shorten(question, 60, placeholder=' ...')})", "note")


@command
def edit(session: Session, argument: str) -> None:
    """change the last message and have it answered instead

    It appears in the prompt. Sent, it replaces the last exchange; emptied, it leaves everything as it was.
    """
    session.draft, session.then = as_draft(session.last_question), partial(session.ask, instead=True)


@command
def correct(session: Session, argument: str) -> None:
    """put the last reply as you would have wanted it

    It appears in the prompt. Sent, yours takes its place, for /save and for what follows; and as a pair, yours before
    the model's, the two are added to the file of --preferences for dpo.py. Emptied, it leaves everything as it was.
    """
    chat = session.chats[0]

    def keep(text: str) -> None:
        better = [*chat.messages[:-1], {"role": "assistant", "content": text}]
        if better != chat.messages:
            keep_pair(session, better, chat.messages, models=["you", chat.name], vote="correction")
            say_standing(session)

    session.draft, session.then = as_draft(chat.last_reply), keep


@command
def prefer(session: Session, argument: str) -> None:
    """[SIDE]: say which reply is better (left, right, neither)

    After an answer to /compare, or after /retry: then the reply before is left and the one now is right. The pair is
    added to the file of --preferences for dpo.py, with the models' names. All models go on from the better reply.
    """
    both, again = session.choice, len(session.chats) == 1
    argument = argument.removeprefix("/prefer").strip()  # typed once more behind the one that stood in the prompt
    if len(both) != 2 or both[1] is not session.chats[-1].messages:
        raise ValueError("There are no two replies to choose from: /retry, or have two models answer with /compare.")
    if both[0][:-1] != both[1][:-1]:
        raise ValueError("The two went different ways before this question, so their replies cannot be compared. "
                         "Begin with /new, and vote after every answer.")
    if again or not argument:
        titles = ["left: before", "right: now"] if again else list(map(session.title, session.chats))
        show_replies(session.screen, titles, [(iter([talk[-1]["content"]]), None) for talk in both])
    if not argument:
        session.draft = "/prefer "
        return session.screen.say("(left, right or neither?)", "note")
    vote(session, argument)
    say_standing(session)


@command
def why(session: Session, argument: str) -> None:
    """[TEXT]: show how likely each word of the last reply was

    And at the three places where the model was least certain, what else it nearly said. With a second model, the other
    one of /compare or the one that the run began from, it also shows which words are likelier now: log pi - log pi_ref,
    whose sum times beta is DPO's reward. With a TEXT, all this of the text, as if that had been the reply.
    """
    session.must_have_voted()
    policy, reference, beta = judges(session)
    reply = {"role": "assistant", "content": argument or policy.last_reply}
    messages = [*session.system, *up_to_question(policy.messages), reply]
    positions = min(chat.gpt.config.n_positions for chat in (policy, reference) if chat)
    words, screen = judged(policy.gpt, messages, positions), session.screen
    nearly = [", ".join(f"{shown(text)} {percent(logp)}" for text, logp in word.nearly) for word in words]
    views = [(f"[{policy.name}: log pi, how likely it finds each word]", LIKELY, [
        (word.logp, f"{percent(word.logp)}, nearly {others}") for word, others in zip(words, nearly, strict=True)])]
    if reference:
        views.append((f"\n[log pi - log pi_ref, the reference being {reference.name}]", data.MOVED, [
            (word.logp - was.logp, f"{percent(word.logp)}, was {percent(was.logp)}")
            for word, was in zip(words, judged(reference.gpt, messages, positions), strict=True)]))
    for title, scale, values in views:
        screen.say(title, "label")
        screen.shade([(word.text, value) for word, (value, _) in zip(words, values, strict=True)], scale)
        for i in sorted(sorted(range(len(words)), key=lambda i: -abs(values[i][0]))[:3]):  # the farthest from zero
            screen.table([(shown("".join(word.text for word in words[max(0, i - 1):i + 1])), values[i][1])])
    if reference:
        total = sum(value for value, _ in values)
        reward = f"; times beta, DPO's implicit reward: {beta:g} x {total:.2f} = {beta * total:+.2f}" if beta else ""
        screen.say(f"summed up: {total:+.2f}{reward}")


@command
def set_(session: Session, argument: str) -> None:
    """[NAME VALUE]: change how replies are drawn (alone, show it)

    The names are temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens and seed (which can be none), and
    verbose (on or off); uv run chat.py --help explains them.
    """
    name, _, value = argument.partition(" ")
    name, value = name.replace("-", "_"), value.strip().lower()
    if not name:
        return session.screen.say("\n".join(f"{name:20}{setting(session.cfg, name)}" for name in SETTINGS))
    if name not in SETTINGS:
        raise ValueError(f"There is no setting {name}; the settings are {', '.join(SETTINGS)}.")
    kind = type(getattr(Config, name)) if name != "seed" else int
    try:
        given = {"on": True, "": True, "off": False}[value] if kind is bool else (
            None if (name, value) == ("seed", "none") else kind(value))
    except (ValueError, KeyError):
        wanted = {bool: "on or off", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{name} is {wanted}, not '{value}'.") from None
    changed = replace(session.cfg, **{name: given})
    check(changed)
    session.cfg = changed
    for chat in session.chats:
        chat.retries = 0 if name == "seed" else chat.retries
    session.screen.say(f"({name} {setting(changed, name)})", "note")


@command
def save(session: Session, argument: str) -> None:
    """FILE: add the conversation to a file of training data

    It becomes a line {"messages": [...]}; with several models, a line for each. What stands in FILE stays. Then it
    shows the command that learns from it.
    """
    path, lines = file_named(argument), session.lines()
    if not lines:
        raise ValueError("There is nothing to save yet.")
    rows = add_lines(path, lines, lambda: len(read_conversations(path)))
    session.unsaved.saved = lines
    session.screen.say(f"(conversations in {path}: {rows:,}; to learn from them: "
                       f"{to_learn(session, 'sft', path, rows)})", "note")


@command
def load(session: Session, argument: str) -> None:
    """[FILE [LINE]]: go on with a saved conversation

    The last of the file, or that of the line. Alone, with what an earlier chat left unsaved, and again, with the next;
    what is not saved here is then offered in turn.
    """
    name, _, line = argument.rpartition(" ")
    name, line = (name, int(line)) if name and re.fullmatch("[1-9][0-9]{0,8}", line) else (argument, 0)
    lost = session.unsaved.offered[:1] if not argument else []
    found = lost or read_conversations(file_named(name))
    if not found or line > len(found):
        raise ValueError(f"{name} has no more than {len(found):,}.")
    session.unsaved.make_room(session.lines(), lost)
    session.begin(found[line - 1])
    session.unsaved.saved = "" if lost else session.lines()
    session.show()


@command
def read(session: Session, argument: str) -> None:
    """FILE: put a text into the prompt, to ask about it"""
    path, positions = file_named(argument), session.chats[0].gpt.config.n_positions
    if path.stat().st_size > data.LONGEST_TEXT:
        raise ValueError(f"{path} is too long: {path.stat().st_size:,} bytes.")
    text = path.read_bytes().decode("utf-8-sig", "replace").replace("\r\n", "\n").strip()
    if not text:
        raise ValueError(f"{path} has no text in it.")
    if (size := len(data.render([{"role": "user", "content": text}])[0])) > positions:
        raise ValueError(f"{path} is too long: {size:,} tokens, and the model reads {positions:,} at once.")
    session.draft = as_draft(text) + "\n\n"


@command
def stats(session: Session, argument: str) -> None:
    """show the model, how full its context is, and its speed"""
    session.must_have_voted()
    for chat in session.chats:
        gpt, s = chat.gpt, chat.stats
        about = [f"{chat.parameters / 1e6:,.1f}M parameters ({gpt.config.n_layer} layers, {gpt.config.n_embd} wide), "
                 f"{chat.precision} on {gpt.device}",
                 f"exchanges: {len(exchanges(chat.messages))}, in the context: {chat.used(session.system)}"]
        if s.written:
            about += [f"last reply: {s.speed}",
                      f"read for it: {s.read:,} tokens, of which {s.known:,} were known from before"]
        session.screen.say(f"[{session.title(chat)}]", "label")
        session.screen.say("\n".join(about))


@command
def model_(session: Session, argument: str) -> None:
    """[NAME]: go on with another model (alone, say which)"""
    if argument:
        answering(session, [Chat(str(Path(argument)), session.cfg, session.chats[0].messages)])
    session.screen.say(f"(answering: {', '.join(map(session.title, session.chats))})", "note")


@command
def models(session: Session, argument: str) -> None:
    """what there is to talk to, in runs/ and by name"""
    found = sorted({file.parent for name in ("config.json", "run.json") for file in Path("runs").glob(f"*/{name}")})
    rows = []
    for folder in found:
        made = ["{stage} of {model} on ".format(**run) + " ".join(run["data"]) for run in ancestry(str(folder))[0][:1]]
        made += ["not finished"] * (not (folder / "config.json").is_file())
        rows.append((str(folder), ", ".join(made)))
    named = {"sample": "the bundled base model"} | dict.fromkeys(model.SIZES, "OpenAI's, from the Hugging Face Hub")
    session.screen.table([*rows, *named.items()])


@command
def compare(session: Session, argument: str) -> None:
    """[FOLDER...]: let more models answer (alone, only the first)

    They join the conversation as it is. Then everything is said to all of them, and each goes on from its own answers.
    """
    first = session.chats[0]
    others = dict.fromkeys(str(Path(name)) for name in argument.split())
    answering(session, [first, *(Chat(name, session.cfg, first.messages) for name in others if name != first.name)])
    session.screen.say(f"(answering: {', '.join(chat.name for chat in session.chats)}"
                       f"{''.join(f'; {chat.warning}' for chat in session.chats[1:] if chat.warning)})", "note")


@command
def exit_(session: Session, argument: str) -> None:
    """leave; what is not saved is forgotten (Ctrl-D keeps it)"""
    session.unsaved.saved, session.unsaved.aside = session.lines(), ""
    raise EOFError


def answering(session: Session, chats: list[Chat]) -> None:
    """Let these models answer from now on."""
    for chat in chats:
        chat.loading.result()  # raises what is wrong with a model before it takes part
    session.chats, session.blind, session.hidden = chats, (), False


def setting(cfg: Config, name: str) -> str:
    value = getattr(cfg, name)
    return "on" if value is True else "off" if value is False else str(value)


def as_draft(text: str) -> str:
    """A text for the prompt, from where it is sent as it is: what looks like a command gets another slash."""
    return re.sub(r"^(?=/+\w)", "/", text)


def unquoted(text: str) -> str:
    """What stands between three quotes, if that is all."""
    return text[3:-3].strip() if re.fullmatch(r'"""((?!""").)*"""', text, re.DOTALL) else text


# ---- under the bonnet ----------------------------------------------------------------------------

LIKELY = ((-math.inf, 208, "under 1%"), (math.log(0.01), 215, "under 10%"), (math.log(0.1), 223, "under 50%"),
          (math.log(0.5), 0, "more"))  # as data.MOVED


def judges(session: Session) -> tuple[Chat, Chat | None, float]:
    """Whose reply is looked at, what it is compared with, and beta if it is a DPO run that began from just that."""
    def same(name: str, other: str) -> bool:
        return Path(name).absolute() == Path(other).absolute()

    chat, other = [*session.chats, None][:2]
    if other and any(same(run["model"], chat.name) for run in ancestry(other.name)[0][:1]):
        chat, other = other, chat
    for run in ancestry(chat.name)[0][:1]:
        if other:
            return chat, other, run["beta"] * same(run["model"], other.name)
        beside = str(Path(chat.name).parent / Path(run["model"]).name)  # if the runs have moved together
        for name in (run["model"], beside):
            if name == "sample" or Path(name, "config.json").is_file():
                if not (session.reference and session.reference.name == name):
                    session.reference = Chat(name, session.cfg)
                return chat, session.reference, run["beta"]
    return chat, other, 0.0


def shown(text: str) -> str:
    """A piece of text on a line of its own."""
    text = data.visible(text.replace(data.EOT_TEXT, " [end]")).strip(" ")
    return text.replace("\n", "\u23ce") or "space"


def percent(logp: float) -> str:
    return f"{math.exp(logp):.{0 if logp > math.log(0.0995) else 1}%}"


# ---- votes ---------------------------------------------------------------------------------------


def vote(session: Session, word: str) -> None:
    """Keep which reply was better. A tie becomes a pair of twice the same reply: nothing can be learnt from that."""
    if not (side := next((s for s in (*SIDES, "neither") if word.strip() and s.startswith(word.strip().lower())), "")):
        raise ValueError(f"'{word}' is no vote; it is left, right or neither.")
    left, right = session.choice
    side = side if left != right else "neither"
    names = session.authors
    better, worse, in_order = (right, left, names[::-1]) if side == "right" else (left, right, names)
    tie = {"other": right[-1:]} if side == "neither" else {}
    keep_pair(session, better, better if tie else worse, models=in_order, vote=side, blind=session.hidden, **tie)
    who = f"; left is {names[0]}, right is {names[1]}" if len(session.chats) == 2 else ""
    session.screen.say(f"(preferred: {side}{', they are the same' if left == right else ''}{who})", "note")


def keep_pair(session: Session, better: data.Conversation, worse: data.Conversation, **about) -> None:
    """Add a pair of replies, and what else is known of it, to the file of --preferences; all go on from the better."""
    path = file_named(session.cfg.preferences)
    row = {"prompt": session.system + better[:-1], "chosen": better[-1:], "rejected": worse[-1:]} | about
    add_lines(path, json.dumps(row, ensure_ascii=False) + "\n", partial(pairs_in, path))
    for chat in session.chats:
        chat.messages = list(better)
    session.author, session.hidden = about["models"][0], False


def say_standing(session: Session) -> None:
    """What all votes of the file come to, and how to learn from its pairs."""
    path, names = file_named(session.cfg.preferences), session.blind or [chat.name for chat in session.chats]
    if not path.exists():
        return
    found, blind = Counter(), bool(session.blind)
    for _, _, row in data.file_rows(path) if len(names) == 2 else ():
        match row:
            case {"models": [str(better), str(worse)], "vote": "left" | "right" | "neither" as side}:
                if {better, worse} == {*names} and row.get("blind", False) == blind:
                    found[side if side == "neither" else better] += 1
    if found:
        counts = found[names[1]], found[names[0]], found["neither"]
        rate, low, high = win_rate(*counts)
        session.screen.say("({1} against {0}: {2} won, {3} lost, {4} tied; ".format(*names, *counts)
                           + f"win rate {rate:.0%}, 95% interval {low:.0%} to {high:.0%})", "note")
    if pairs := pairs_in(path):
        session.screen.say(f"(pairs in {path}: {pairs:,}; to learn from them: "
                           f"{to_learn(session, 'dpo', path, pairs)})", "note")


def examine(session: Session, asked: list[data.Conversation]) -> None:
    """Have two unnamed models answer each question, and take a vote on it from the terminal or a pipe."""
    system = session.system
    try:
        for number, messages in enumerate(asked, 1):
            session.screen.say(f"{number} of {len(asked)}", "note")
            session.begin(system + messages)
            session.show()
            session.begin(system + messages[:-1])
            try:
                session.ask(messages[-1]["content"])
            except ValueError as problem:  # it is too long; the others are asked
                session.screen.say(str(problem), "error")
            while session.hidden:
                try:
                    alike = session.choice[0] == session.choice[1]
                    vote(session, "neither" if alike else input("left, right or neither? "))
                except ValueError as problem:
                    if not sys.stdin.isatty():
                        raise
                    session.screen.say(str(problem), "error")
    except (EOFError, KeyboardInterrupt):
        session.screen.write("\n")
    say_standing(session)


def questions(path: Path) -> list[data.Conversation]:
    """What a file asks: every line, or of JSONL with messages every conversation up to the user's last message."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of questions '{path}' (in {Path.cwd()})")
    if path.suffix in (".json", ".jsonl", ".gz") or path.read_bytes().lstrip()[:1] == b"{":
        found = [up_to_question(talk) for talk in read_conversations(path)]
    else:
        lines = path.read_bytes().decode("utf-8-sig", "replace").splitlines()
        found = [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]
    if not any(found):
        raise ValueError(f"'{path}' asks nothing")
    return [talk for talk in found if talk]


# ---- files that training reads -------------------------------------------------------------------


def file_named(argument: str) -> Path:
    if not argument:
        raise ValueError("Name a file, such as chats.jsonl")
    path = Path(os.path.expanduser(argument))  # as it is written where that is nobody's home
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file.")
    return path


def what_stands_in(path: Path, count_rows: Callable[[], int]) -> bytes:
    """The content of a file to which lines are to be added; ValueError if it is of another kind."""
    content = path.read_bytes() if path.exists() else b""
    if content.strip(b" \t\r\n\xef\xbb\xbf"):
        if path.suffix == ".json" or data.is_gzip(path):
            raise ValueError(f"{path} takes no further lines; name a .jsonl file.")
        count_rows()  # raises, rather than adding to a file of another kind
    return content


def add_lines(path: Path, lines: str, count_rows: Callable[[], int]) -> int:
    """Add lines to a file of their kind and count its rows; whatever happens, what stands there stays as it is.

    They go to its end in one piece, so that two programs can add to one file; on a full disk, nothing is added.
    """
    content = what_stands_in(path, count_rows)
    added = (lines if content[-1:] in (b"", b"\n") else "\n" + lines).encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(added) < len(added):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    return count_rows()


def as_line(messages: data.Conversation) -> str:
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def read_conversations(path: Path) -> list[data.Conversation]:
    """The conversations of a JSON or JSONL file, or ValueError if it holds anything else."""
    found = []
    for place, _, row in data.file_rows(path):
        try:
            if isinstance(row, data.BadRow):
                raise row
            found.append(data.as_messages(*data.want(row, "messages"), "messages"))
        except data.Drop as bad:
            raise ValueError(f"{place} is no conversation: {bad.args[-1]}") from None
    return found


def pairs_in(path: Path) -> int:
    """How many pairs dpo.py finds in a file; ValueError if it holds anything else."""
    rows = data.DATA_SETS["jsonl"].preferences(data.file_rows(path), data.Count(str(path), bad_rows=""), "en")
    return sum(1 for _ in rows)


def to_learn(session: Session, stage: str, path: Path, rows: int) -> str:
    """The command that learns from so few rows: three passes, with the adapters of a small model's preset."""
    name = session.blind[-1] if session.blind else session.chats[0].name
    out = next(out for n in count(1) if not Path(out := "runs/mine" if n == 1 else f"runs/mine-{n}").exists())
    # a fifth of the presets' rates and less: at those, ten rows cost the sample's model up to a quarter of what it knew
    rates = {"gpt2": {"sft": 6e-5, "dpo": 1e-5}, "sample": {"sft": 3e-4, "dpo": 1e-4}}
    preset = "sample" if of_the_sample(name) else "gpt2"
    batch_size, steps = data.three_passes(rows)
    start = ["--model", name]
    if session.cfg.adapter and name == session.chats[0].name:
        start += ["--adapter", session.cfg.adapter]
    return shlex.join(["uv", "run", f"{stage}.py", *start, "--data", str(path), "--out", out, "--preset", preset,
                       "--lr", f"{rates[preset][stage]:g}", "--batch-size", str(batch_size), "--steps", str(steps)])


class Unsaved:
    """What was said and not saved, in a private file, for the case that the program or a hasty hand ends here.

    A chat locks its file while it runs. What stood there before is offered, until something newer takes its place.
    """

    def __init__(self):
        self.saved = self.kept = ""  # what needs no keeping; what the file holds of this chat
        self.aside = ""  # other conversations that it holds, since /load took one
        self.offered, self.file = [], None
        files = [folder / f"unsaved-{n}.jsonl" for n in range(9)] if (folder := state_folder()) else []
        for file in sorted(files, key=lambda file: not file.exists()):
            with suppress(filelock.Timeout, OSError):
                self.lock = filelock.FileLock(file.with_suffix(".lock"), timeout=0)
                self.lock.acquire()
                self.file = file
                break
        with suppress(OSError, ValueError):
            self.offered = read_conversations(self.file) if self.file and self.file.exists() else []

    def make_room(self, lines: str, taken: list[data.Conversation]) -> None:
        """For one of those that were offered, or of a file: what was said, if it is not saved, is offered in turn."""
        said = [] if lines == self.saved else [json.loads(line)["messages"] for line in lines.split("\n") if line]
        self.offered = self.offered[len(taken):] + said
        self.aside = "".join(map(as_line, self.offered))

    def keep(self, lines: str) -> None:
        """Have the file hold this conversation, unless it is saved."""
        lines = ("" if lines == self.saved else lines) + self.aside
        if not self.file or lines == self.kept:
            return
        with suppress(OSError):  # a full disk must not end the conversation
            if not lines:
                data.remove(self.file)
            else:
                with (data.written_whole(self.file) as temporary,
                      open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as file):
                    file.write(lines)
            self.kept = lines


# ---- where models come from ----------------------------------------------------------------------


def ancestry(name: str) -> tuple[list[dict], str]:
    """The runs that made a model, the last one first, by their run.json; and the model that the first began from.

    Of each: stage, model (which it began from: the reference of a DPO run), data, beta, and how many conversations or
    pairs had a system message, as far as that was counted.
    """
    runs: list[dict] = []
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        while len(runs) < 20:  # for a file may say that a run began from itself
            about = data.read_json(Path(name, "run.json"))
            runs.append({"stage": str(about["stage"]), "model": str(about["model"]["name"]),
                         "data": [str(spec) for spec in about["config"]["data"]],
                         "beta": float(about["config"].get("beta", 0)),
                         "system_messages": about["data"].get("system_messages")})
            name = runs[-1]["model"]
    return runs, name


def of_the_sample(name: str) -> bool:
    """Whether a model learnt from the bundled sample."""
    runs, first = ancestry(name)
    return first == "sample" or any(spec.partition("@")[0] == "sample" for run in runs for spec in run["data"])


def never_had_system(name: str) -> bool:
    """Whether a model is known to have met no system message, in none of its runs."""
    runs, first = ancestry(name)
    return first in ("sample", *model.SIZES) and all(run["system_messages"] == 0 for run in runs)


def newest_model() -> str:
    """The run that finished last."""
    finished = {name: max(file.stat().st_mtime for file in Path(name).iterdir() if file.name in
                          ("run.json", "model.safetensors"))
                for name in ("runs/dpo", "runs/sft") if Path(name, "model.safetensors").is_file()}
    if not finished:
        raise FileNotFoundError(f"no trained model in runs/dpo or runs/sft (looked in {Path.cwd()})\n"
                                "Train one:         uv run sft.py\n"
                                "Use another:       uv run chat.py --model FOLDER\n"
                                "The untrained one: uv run chat.py --model sample")
    return max(finished, key=finished.get)


# ---- text on a terminal --------------------------------------------------------------------------


class Screen:
    """Standard output: wrapped on a terminal, in colour where that is wanted, plain text anywhere else."""

    def __init__(self):
        self.out = sys.stdout
        self.terminal = self.out.isatty()
        self.ansi = self.terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self.colour = self.ansi and not os.environ.get("NO_COLOR")  # https://no-color.org
        self.shades = self.colour and ("256" in os.environ["TERM"] or "COLORTERM" in os.environ)
        self.styles = {"note": "2", "error": "31", "label": "1;36", "you": "1;32"}  # dim, red, bold cyan and green

    def width(self) -> int:
        with suppress(OSError):
            return os.get_terminal_size(self.out.fileno()).columns or 80
        return 80

    def column(self, columns: int) -> int:
        """What the window, as wide as it is now, gives to each of so many columns; 0 where there is no window."""
        return max(1, self.width() // columns - len(BETWEEN)) * self.terminal

    def paint(self, text: str, style: str = "") -> str:
        return f"\x1b[{self.styles[style]}m{text}\x1b[0m" if style and self.colour else text

    def write(self, text: str) -> None:
        print(text, end="", file=self.out, flush=True)

    def wrap(self) -> Wrap:
        return Wrap(self.write, self.width if self.terminal else None)

    def say(self, text: str, style: str = "") -> None:
        """Print a text, wherever it comes from, wrapped and harmless."""
        lines: list[str] = []
        wrap = Wrap(lines.append, self.width)
        wrap.feed(text)
        wrap.flush()
        self.write(self.paint("".join(lines), style) + "\n")

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names, and what is to be said of each."""
        width = self.width()
        for name, text in rows:
            self.say(textwrap.fill(f"{name:21} {text}", width, subsequent_indent=" " * (22 if width > 60 else 4),
                                   break_on_hyphens=False))

    def shade(self, words: list[tuple[str, float]], scale: tuple) -> None:
        """Words on backgrounds by their values, and what these mean; where there are no shades, numbers below words."""
        if self.shades:
            from rich.console import Console

            console = Console(file=self.out, width=self.width(), force_terminal=True, color_system="256")
            return console.print(*data.shades(words, scale), sep="\n")
        self.say(data.shaded(words))
        self.say(data.NATS, "note")


class Wrap:
    """Wraps text at words while it arrives in pieces, at the width that the terminal has at that moment.

    A word is printed when the next begins and never moves after that: no flicker, and a clean scrollback. Only words
    longer than a line are broken. Without a width (a pipe has none) the text goes out as it is.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int] | None):
        self.write, self.width = write, width
        self.space = self.word = ""
        self.column = 0

    def feed(self, text: str) -> None:
        text = data.visible(text)
        if not self.width:
            return self.write(text)
        for character in text.replace("\t", "    "):
            if character == "\n":
                self.flush()
                self.new_line()
            elif character == " ":
                self.flush()
                self.space += " "
            else:
                self.word += character
                if cell_len(character) == 2 or len(self.word) >= self.width():  # no space needs to be waited for
                    self.flush()

    def flush(self) -> None:
        if not self.word:
            return
        width, line = self.width(), ""
        if self.column + len(self.space) + cell_len(self.word) > width:
            if self.column:
                self.new_line()
            self.space = ""
        for character in self.space + self.word:
            if self.column and self.column + cell_len(character) > width:
                line, self.column = line + "\n", 0
            line, self.column = line + character, self.column + cell_len(character)
        self.write(line)
        self.space = self.word = ""

    def new_line(self) -> None:
        self.write("\n")
        self.space, self.column = "", 0

    def end(self) -> None:
        """Print what waits, and leave the line if anything stands on it."""
        self.flush()
        if self.column or not self.width:
            self.new_line()


@contextmanager
def reply_in_progress(screen: Screen) -> Iterator[Callable[[], bool]]:
    """While replies stream, keys stay off the screen and wait for the next prompt; yields whether Ctrl-C was pressed.

    Ctrl-C sets a flag, because an exception could fall into the middle of the cache's bookkeeping; pressed again, for
    a model that takes a minute over a token, it is the usual exception. Bracketed paste stays on, so ten lines pasted
    now are one message at the next prompt.
    """
    pressed: list[int] = []

    def interrupt(number, frame):
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    handler, saved = signal.signal(signal.SIGINT, interrupt), None
    try:
        with suppress(ImportError):  # Windows has no termios
            import termios

            if screen.ansi and sys.stdin.isatty():
                saved = termios.tcgetattr(sys.stdin)
                # NOFLSH: Ctrl-C throws nothing away that was typed before it
                silent = saved[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
                termios.tcsetattr(sys.stdin, termios.TCSANOW, [*saved[:3], silent, *saved[4:]])
                screen.write("\x1b[?2004h")
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, handler)
        if saved:
            screen.write("\x1b[?2004l")
            termios.tcsetattr(sys.stdin, termios.TCSANOW, saved)


# ---- side by side, or one below the other --------------------------------------------------------

BETWEEN = " | "  # stands between columns


def show_replies(screen: Screen, titles: list[str], replies: list[tuple[Iterator[str], Chat | None]],
                 stopped: Callable[[], bool] = lambda: False) -> list[str]:
    """Show replies as they come, or whole texts, side by side if the window is wide enough; returns them.

    What there is of a reply when Ctrl-C is pressed counts.
    """
    if len(replies) > 1 and screen.column(len(replies)) >= 20:
        sides = [Column(screen, len(replies), *coming) for coming in replies]
        show_columns(screen, titles, sides, stopped)
        return [side.text for side in sides]
    answers = [Reply(screen.wrap(), *coming) for coming in replies]
    for title, answer in zip(titles, answers, strict=True):
        if stopped():
            break
        if len(answers) > 1:
            screen.say(f"[{title}]", "label")
        with suppress(KeyboardInterrupt):
            while answer.going:
                answer.step(stopped)
        answer.wrap.end()
        if note := answer.note(stopped):
            screen.say(f"({note})", "note")
        screen.write("\n")
    return [answer.text for answer in answers]


class Column(Reply):
    """A reply that grows in a column of its own, as lines that are not printed yet."""

    def __init__(self, screen: Screen, columns: int, coming: Iterator[str], chat: Chat | None = None):
        super().__init__(Wrap(self.write, lambda: screen.column(columns)), coming, chat)
        self.lines = [""]

    def write(self, text: str) -> None:
        first, *more = text.split("\n")
        self.lines[-1] += first
        self.lines += more

    def step(self, stopped: Callable[[], bool]) -> None:
        super().step(stopped)
        if not self.going:
            self.wrap.feed(f"\n({note})" if (note := self.note(stopped)) else "")
            self.wrap.flush()


def show_columns(screen: Screen, titles: list[str], sides: list[Column], stopped: Callable[[], bool]) -> None:
    """Show replies in columns as they grow; they take turns, token by token.

    A line is printed when every column has it, and never moves after that.
    """
    def beside(cells: Iterable[str]) -> str:
        width = screen.column(len(sides))
        parts = zip_longest(*(chop_cells(cell, width) or [""] for cell in cells), fillvalue="")  # narrower than before?
        return "\n".join(BETWEEN.join(set_cell_size(part, width) for part in row).rstrip(" ") for row in parts)

    screen.write(screen.paint(beside(f"[{title}]"[:screen.column(len(sides))] for title in titles), "label") + "\n")
    lines_shown = 0
    with suppress(KeyboardInterrupt):
        while going := [side for side in sides if side.going]:
            for side in going:
                side.step(stopped)
            ready = min((len(side.lines) - 1 for side in sides if side.going),
                        default=max(len(side.lines) for side in sides))
            for row in range(lines_shown, ready):
                screen.write(beside(side.lines[row] if row < len(side.lines) else "" for side in sides) + "\n")
            lines_shown = max(lines_shown, ready)
    screen.write("\n")


# ---- the prompt ----------------------------------------------------------------------------------


def prompt_reader(session: Session) -> Callable[[], str]:
    """A function that reads one input. Editing, history and completion are prompt_toolkit's, imported only here."""
    from prompt_toolkit import ANSI, PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.filters import Condition, is_searching
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.layout.screen import Char
    from prompt_toolkit.output import ColorDepth, create_output

    class Completions(Completer):
        def get_completions(self, document, event):
            name, space, argument = document.text_before_cursor.partition(" ")
            known = {"/set": SETTINGS, "/help": COMMANDS, "/prefer": (*SIDES, "neither")}.get(name, ())
            if not space and name.startswith("/"):
                yield from (Completion(word, -len(name), display_meta=usage(word)[1])
                            for word in COMMANDS if word.startswith(name))
            elif known:
                yield from (Completion(word, -len(argument)) for word in known if word.startswith(argument))
            elif name in ("/save", "/load", "/read", "/model", "/compare"):
                typed = argument.rpartition(" ")[2] if name == "/compare" else argument
                yield from PathCompleter(expanduser=True).get_completions(Document(typed), event)

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk must not end the conversation
                super().store_string(string)

    keys, used = KeyBindings(), ""

    @keys.add("enter", filter=~is_searching)  # Ctrl-R's search has an Enter and a Ctrl-C of its own
    def _(event):
        text = event.current_buffer.text
        if re.match(r'(/\w+\s+)?"""', text) and text.count('"""') % 2:
            event.current_buffer.newline(copy_margin=False)
        elif event.current_buffer.document.text_before_cursor.endswith("\\"):
            event.current_buffer.delete_before_cursor()
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_searching)
    def _(event):
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=~is_searching)
    def _(event):
        if event.current_buffer.text:
            event.current_buffer.append_to_history()  # Up brings it back
            event.current_buffer.reset()
            session.then = session.ask
        else:
            event.app.exit(exception=KeyboardInterrupt)

    def placeholder():
        hidden = get_app().is_done or is_searching() or not session.screen.colour
        hint = f"Message, or /help{used}"
        return ANSI("" if hidden or len(hint) > session.screen.width() - 3 else session.screen.paint(hint, "note"))

    # what was not typed, such as a reply or a file, must not command the terminal either
    Char.display_mappings.update((chr(c), shown) for c, shown in data.INVISIBLE.items() if isinstance(shown, str))
    output, file = create_output(), history_file()
    output.enable_cpr = False  # do not ask the terminal where the cursor is: answers would mix with what is typed
    if not session.screen.ansi:
        output = None  # prompt_toolkit then sees by itself that it must not move the cursor
    prompt = PromptSession(
        ANSI(session.screen.paint("> ", "you")), prompt_continuation="  ", placeholder=placeholder, multiline=True,
        key_bindings=keys, history=History(file) if file else InMemoryHistory(), completer=Completions(),
        complete_while_typing=Condition(lambda: get_app().current_buffer.text.startswith("/")),
        enable_open_in_editor=True, enable_suspend=True, output=output,
        color_depth=None if session.screen.colour else ColorDepth.MONOCHROME)

    def read() -> str:
        nonlocal used
        chat = session.chats[0]
        used = f" ({chat.used(session.system)})" if chat.messages and chat.loading.done() else ""
        draft, session.draft = session.draft, ""
        text = prompt.prompt(default=draft)
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are not UTF-8

    return read


def state_folder() -> Path | None:
    """Where what a person types is kept, for their eyes only; None where nothing can be written."""
    with suppress(OSError, RuntimeError):  # there may be no home
        folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "gpt2-chat"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder
    return None


def history_file() -> Path | None:
    """The lines typed in earlier chats."""
    with suppress(OSError):
        if folder := state_folder():
            file = folder / "history"
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            file.chmod(0o600)  # whatever it was before
            return file
    return None


if __name__ == "__main__":
    run_script(main, Config)
