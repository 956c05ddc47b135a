"""Talk to a model in the terminal; a conversation can be saved and goes back into training.

`main` tells a terminal from a pipe, `Session` is the conversation, and `reply` turns messages into a stream of text. A
reader may stop at "The terminal": `COMMANDS` holds a small function for everything a person can do besides talking,
`Screen` and `Wrap` put text on a terminal, and `prompt_reader` reads what is typed.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

from rich.cells import cell_len, set_cell_size

import data
from data import exchanges, lazy, run_script

# they import torch, which takes two seconds: neither --help nor the first prompt waits for that
model, lora = lazy("model"), lazy("lora")


# ---- settings ------------------------------------------------------------------------------------


@dataclass
class Config:
    model: str = ""  # sample, gpt2, gpt2-medium, ... or a model's folder; by default the newest of runs/dpo, runs/sft
    adapter: str = ""  # a PEFT folder with LoRA adapters of --model, which it names itself where --model is not given
    compare: tuple[str, ...] = ()  # models that all answer every message, such as runs/sft runs/dpo sample
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
    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    # auto: bf16 where the device computes in it, else fp32; int8: rounded weights, faster replies of the largest models
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    debug: bool = False  # show the traceback of an error


SETTINGS = {"temperature": (0, 100), "top_k": (0, math.inf), "top_p": (0.001, 1), "min_p": (0, 1),  # from, to
            "repetition_penalty": (0.01, 100), "max_new_tokens": (1, math.inf), "seed": (0, 2**62)}


def check(cfg: Config) -> None:
    """Refuse settings that mean nothing."""
    for name, (low, high) in SETTINGS.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}; it has to be {low}{f' to {high}' if high < 2**62 else ' or more'}")


# ---- the conversation ----------------------------------------------------------------------------


def main(cfg: Config) -> None:
    check(cfg)
    cfg = replace(cfg, system=os.fsencode(cfg.system).decode("utf-8", "replace"))
    first = cfg.model or (lora.base_of(cfg.adapter) if cfg.adapter else "")
    names, screen = [*filter(None, [first]), *cfg.compare] or [newest_model()], Screen()
    if cfg.prompt is None and sys.stdin and sys.stdin.isatty() and screen.terminal:
        session = Session(cfg, screen, names)
        found = names[0] + ", the newest model here" if not (first or cfg.compare) else ", ".join(names)
        found += f" (the first with {cfg.adapter})" if cfg.adapter else ""
        screen.say(f"{found}. /help lists the commands, Ctrl-D leaves.", "note")
        return session.run()
    if cfg.prompt is None and sys.stdin and sys.stdin.isatty():
        print("Type the prompt, then Ctrl-D.", file=sys.stderr)  # as the reply goes to a file or a pipe
    given = sys.stdin.buffer.read() if cfg.prompt is None and sys.stdin else os.fsencode(cfg.prompt or "")
    text = given.decode("utf-8-sig", "replace")  # from bytes, for the locale may not be UTF-8
    if not text.strip():
        raise ValueError("there is nothing to answer: the prompt is empty")
    Session(cfg, screen, names).answer_once(text)


class Session:
    """What was said, to which models, with which settings."""

    def __init__(self, cfg: Config, screen: Screen, names: list[str]):
        self.cfg, self.screen = cfg, screen
        self.system = [{"role": "system", "content": cfg.system}] if cfg.system.strip() else []
        self.chats = [Chat(name, cfg, adapter=cfg.adapter if name == names[0] else "") for name in dict.fromkeys(names)]
        self.draft = ""  # what already stands in the next prompt
        self.replacing = False  # whether the next message replaces the last exchange
        self.told_of_overflow = False

    @property
    def last_question(self) -> str:
        questions = [m["content"] for m in self.chats[0].messages if m["role"] == "user"]
        if not questions:
            raise ValueError("Nothing has been said yet.")
        return questions[-1]

    def begin(self, messages: data.Conversation) -> None:
        """Go on from these messages instead."""
        for chat in self.chats:
            chat.messages, chat.stats, chat.replies = list(messages), Stats(), 0
        self.told_of_overflow = self.replacing = False

    def take_back(self) -> None:
        """Forget the last exchange."""
        for chat in self.chats:
            chat.messages = [message for turn in exchanges(chat.messages)[:-1] for message in turn]

    def ask(self, text: str) -> None:
        """Say this to every model and show what it answers; if there is no answer, nothing was said."""
        before, answered = [chat.messages for chat in self.chats], False
        try:
            if self.replacing:
                self.take_back()
            for chat in self.chats:
                chat.messages = [*chat.messages, {"role": "user", "content": text}]
            answered = self.answer()
        finally:
            self.replacing = False
            for chat, messages in zip(self.chats, before, strict=True):
                chat.messages = chat.messages if answered else messages

    def answer(self) -> bool:
        if not all(chat.loading.done() for chat in self.chats):
            self.screen.say("(still loading the model)", "note")
        fits = [fit(self.system + chat.messages, chat.gpt.config.n_positions, self.cfg.max_new_tokens)
                for chat in self.chats]  # refuses what is too long before any model speaks
        if any(left_out for _, left_out in fits) and not self.told_of_overflow:
            self.told_of_overflow = True
            self.screen.say(f"(the conversation has outgrown the {self.chats[0].gpt.config.n_positions:,} tokens that "
                            "the model reads at once: it no longer sees the oldest exchanges)", "note")
        with reply_in_progress(self.screen) as stopped:
            if len(self.chats) > 1 and self.screen.terminal and self.column_width() >= 20:
                texts = self.answers_side_by_side(stopped)
            else:
                texts = [self.answer_of(chat, stopped) for chat in self.chats]
        for chat, text in zip(self.chats, texts, strict=True):
            chat.messages = [*chat.messages, {"role": "assistant", "content": text}]
        if not any(texts):
            self.screen.say("(no answer, so the message is taken back; Up brings it to the prompt)", "note")
        return any(texts)

    def answer_of(self, chat: Chat, stopped: Callable[[], bool]) -> str:
        """Show one model's reply as it comes; what there is of it when Ctrl-C is pressed counts."""
        if stopped():
            return ""
        if len(self.chats) > 1:
            self.screen.say(f"[{chat.name}]", "label")
        answer = Reply(chat, self.screen.wrap(), chat.reply(self.system, self.cfg))
        with suppress(KeyboardInterrupt):  # what there is of a reply counts
            while answer.going:
                answer.step(stopped)
        answer.wrap.end()
        if note := answer.note(stopped):
            self.screen.say(f"({note})", "note")
        self.screen.write("\n")
        return answer.text

    def column_width(self) -> int:
        """What the window, as wide as it is now, gives to each of the models."""
        return max(1, self.screen.width() // len(self.chats) - len(BETWEEN))

    def answers_side_by_side(self, stopped: Callable[[], bool]) -> list[str]:
        """Show all models' replies in columns; they take turns, token by token.

        A line is printed when every column has it, and never moves after that.
        """
        sides = [Column(chat, self.column_width, chat.reply(self.system, self.cfg)) for chat in self.chats]
        names = [f"[{data.visible(side.chat.name)}]"[:self.column_width()] for side in sides]
        self.screen.write(self.screen.paint(self.beside(names), "label") + "\n")
        shown = 0
        with suppress(KeyboardInterrupt):
            while going := [side for side in sides if side.going]:
                for side in going:
                    side.step(stopped)
                ready = min((len(side.lines) - 1 for side in sides if side.going),
                            default=max(len(side.lines) for side in sides))
                for row in range(shown, ready):
                    cells = (side.lines[row] if row < len(side.lines) else "" for side in sides)
                    self.screen.write(self.beside(cells) + "\n")
                shown = max(shown, ready)
        self.screen.write("\n")
        return [side.text for side in sides]

    def beside(self, cells: Iterable[str]) -> str:
        """One line of all columns."""
        width = self.column_width()
        return BETWEEN.join(set_cell_size(cell, width) for cell in cells).rstrip(" ")

    def answer_once(self, text: str) -> None:
        """Every model's reply to a single prompt, and nothing else on standard output."""
        for i, chat in enumerate(self.chats):
            if chat.remark:
                print(f"({data.visible(chat.remark)})", file=sys.stderr)
            if len(self.chats) > 1:
                self.screen.write("\n" * (i > 0) + f"[{data.visible(chat.name)}]\n")
            chat.messages = [{"role": "user", "content": text}]
            answer = Reply(chat, self.screen.wrap(), chat.reply(self.system, self.cfg))
            try:
                while answer.going:
                    answer.step()
            finally:
                answer.wrap.end()
            if chat.stats.cut_off:
                print(f"({chat.stats.cut_off})", file=sys.stderr)

    def show(self) -> None:
        """The conversation so far, looking as it did when it was had."""
        looks = {"system": ("note", "System message: ", ""), "user": ("you", "> ", ""), "assistant": ("", "", "\n")}
        for message in self.system + self.chats[0].messages:
            style, before, after = looks[message["role"]]
            self.screen.say(before + message["content"] + after, style)

    def run(self) -> None:
        """Read, answer, repeat."""
        read, leaving = prompt_reader(self), False
        for remark in (chat.remark for chat in self.chats if chat.remark):
            self.screen.say(f"({remark})", "note")
        while True:
            try:
                text = read()
                leaving = False
                self.handle(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                if leaving:
                    return
                leaving, self.replacing = True, False
                self.screen.say("(Ctrl-C again leaves, as do Ctrl-D and /exit)", "note")
            except Exception as problem:
                if self.cfg.debug or any(c.loading.done() and c.loading.exception() for c in self.chats):
                    raise  # without a model there is nothing to go on with
                self.screen.say(str(problem) or repr(problem), "error")

    def handle(self, text: str) -> None:
        """One input: a command or a message."""
        name, _, argument = text.strip().partition(" ")
        name = ALIASES.get(name, name)
        if name in COMMANDS:
            self.replacing = False
            COMMANDS[name](self, argument.strip())
        elif re.fullmatch(r"/\w+", name):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            raise ValueError(f"There is no command {name}{f'; did you mean {close[0]}?' if close else '.'} "
                             "All of them: /help. A message that begins with / can begin with // instead.")
        elif text.strip():
            self.ask(re.sub(r"^/(?=/+\w)", "", text.strip()))
        else:
            self.replacing = False


# ---- from messages to a stream of text -----------------------------------------------------------


class Chat:
    """A model, loaded in the background, and its side of the conversation (without the system message)."""

    loader = ThreadPoolExecutor(max_workers=1)

    def __init__(self, name: str, cfg: Config, messages: data.Conversation = (), adapter: str = ""):
        self.name, self.messages = name, list(messages)
        if not (here := Path(name, "config.json").is_file()):
            model.check_model(name)
        remarks = [data.check_tokenizer(folder) for folder in (name, adapter) if folder]
        self.remark = ". ".join(filter(None, remarks))

        def load():
            device = model.pick_device(cfg.device)
            gpt = model.GPT.from_pretrained(name)
            if adapter:
                lora.merge_adapters(gpt, adapter)
            gpt.to(device)
            self.parameters = sum(weight.numel() for weight in gpt.parameters())
            self.precision = model.pick_precision(cfg.precision, device, small=gpt.config.n_embd < 512)
            gpt = model.for_generation(gpt, self.precision)
            return gpt

        if here:
            self.loading: Future = self.loader.submit(load)
        else:  # a download is waited for: its progress needs the screen, and Ctrl-C has to end it
            self.loading = Future()
            self.loading.set_result(load())
        self.cache, self.stats, self.replies = None, Stats(), 0

    @property
    def gpt(self):
        """The model, as soon as it is loaded."""
        return self.loading.result()

    @property
    def used(self) -> str:
        used = self.stats.read + self.stats.written
        return f"{used:,} of {self.gpt.config.n_positions:,} tokens"

    def reply(self, system: data.Conversation, cfg: Config) -> Iterator[str]:
        """Its next reply; each has a seed of its own, so that /retry says something new that can yet be repeated."""
        self.cache = self.cache or model.KVCache(self.gpt)
        self.stats = Stats()
        seed = None if cfg.seed is None else cfg.seed + self.replies
        self.replies += 1
        try:
            yield from reply(self.gpt, system + self.messages, cfg, cache=self.cache, seed=seed, stats=self.stats)
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
    try:
        for token in model.generate(gpt, ids, limit, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                                    min_p=cfg.min_p, repetition_penalty=cfg.repetition_penalty, seed=seed,
                                    cache=cache):
            stats.written += 1
            stats.first = stats.first or time.perf_counter() - began
            known = token < data.EOT  # a vocabulary may be padded to a rounder number than GPT-2's
            code = data.tokenizer().decode_single_token_bytes(token) if known else "\N{REPLACEMENT CHARACTER}".encode()
            text = space + decoder.decode(code)
            if not begun:
                text = text.lstrip()  # content begins with no white space
            piece = text.rstrip()
            begun, space = begun or bool(text), text[len(piece):]  # it may end with none: space waits for what comes
            paused = time.perf_counter()
            yield piece
            began += time.perf_counter() - paused  # meanwhile another model may have spoken: that is not its time
        if stats.written == limit:
            full = limit < cfg.max_new_tokens
            stats.cut_off = "cut off: the context is full" if full else f"cut off: max_new_tokens is {limit}"
    finally:
        stats.seconds = time.perf_counter() - began


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

    def __init__(self, chat: Chat, wrap: Wrap, coming: Iterator[str]):
        self.chat, self.wrap, self.coming = chat, wrap, coming
        self.pieces: list[str] = []
        self.going = True

    @property
    def text(self) -> str:
        return "".join(self.pieces).rstrip()

    def step(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Show the next token, if there is one."""
        piece = None if stopped() else next(self.coming, None)
        self.going = piece is not None
        if self.going:
            self.pieces.append(piece)
            self.wrap.feed(piece)

    def note(self, stopped: Callable[[], bool]) -> str:
        """Why it ended before its end, if it did."""
        return "stopped" if stopped() else self.chat.stats.cut_off


@dataclass
class Stats:
    """What a reply cost: tokens, and seconds since it was asked for."""
    read: int = 0  # tokens before the reply
    known: int = 0  # those of them that the cache still held from the turn before
    written: int = 0  # tokens of the reply
    first: float = 0.0  # seconds until the first of them
    seconds: float = 0.0
    cut_off: str = ""  # why the reply ended before its end, if it did


def newest_model(candidates: tuple[str, ...] = ("runs/dpo", "runs/sft")) -> str:
    """The run that finished last."""
    finished = {name: max(file.stat().st_mtime for file in Path(name).iterdir() if file.name in
                          ("run.json", "model.safetensors"))
                for name in candidates if Path(name, "model.safetensors").is_file()}
    if not finished:
        raise FileNotFoundError(f"no trained model in {' or '.join(candidates)} (looked in {Path.cwd()})\n"
                                "Train one:         uv run sft.py\n"
                                "Use another:       uv run chat.py --model FOLDER\n"
                                "The untrained one: uv run chat.py --model sample")
    return max(finished, key=finished.get)


# ======== The terminal. A reader may stop here. ===================================================

# ---- commands: the docstring is the help; what stands before its colon, the argument -------------

COMMANDS: dict[str, Callable[[Session, str], None]] = {}
ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit", "/clear": "/new", "/regen": "/retry"}  # known elsewhere
KEYS = """Enter sends. Alt-Enter, or a backslash before Enter, begins a new line; pasted lines stay together.
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
    say, width = session.screen.say, session.screen.width()
    if argument:
        name = ALIASES.get(argument, "/" + argument.lstrip("/"))
        if name not in COMMANDS:
            raise ValueError(f"There is no command {name}; the commands are {' '.join(COMMANDS)}.")
        synopsis, line, more = usage(name)
        also = "".join(f"\nAlso: {alias}" for alias, target in ALIASES.items() if target == name)
        return say(f"{synopsis}\n{line}\n{more}".rstrip() + also)
    for synopsis, line, _ in map(usage, COMMANDS):
        say(textwrap.fill(f"{synopsis:21} {line}", width, subsequent_indent=" " * (22 if width > 60 else 4)))
    say("\n" + KEYS, "note")


@command
def new(session: Session, argument: str) -> None:
    """begin a new conversation, with the same system message"""
    session.begin([])
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
    session.screen.say(f"(system message: {session.system[0]['content'] if session.system else 'none'})", "note")


@command
def retry(session: Session, argument: str) -> None:
    """have the last message answered again"""
    question, session.replacing = session.last_question, True
    session.ask(question)


@command
def undo(session: Session, argument: str) -> None:
    """take back the last message and its answer"""
    question = session.last_question
    session.take_back()
    session.screen.say(f"(taken back: {textwrap.shorten(question, 60, placeholder=' ...')})", "note")


@command
def edit(session: Session, argument: str) -> None:
    """change the last message and have it answered instead

    It appears in the prompt. Sent, it replaces the last exchange; emptied, it leaves everything as it was.
    """
    question = session.last_question
    session.draft, session.replacing = re.sub(r"^(?=/+\w)", "/", question), True  # so that it is no command


@command
def set_(session: Session, argument: str) -> None:
    """[NAME VALUE]: change how replies are drawn (alone, show it)

    The names are temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens and seed (which can be none);
    uv run chat.py --help explains them.
    """
    name, _, value = argument.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        return session.screen.say("\n".join(f"{name:20}{getattr(session.cfg, name)}" for name in SETTINGS))
    if name not in SETTINGS:
        raise ValueError(f"There is no setting {name}; the settings are {', '.join(SETTINGS)}.")
    kind = float if isinstance(getattr(Config, name), float) else int
    try:
        changed = replace(session.cfg, **{name: None if (name, value.lower()) == ("seed", "none") else kind(value)})
    except ValueError:
        raise ValueError(f"{name} is a {'whole ' if kind is int else ''}number, not '{value}'.") from None
    check(changed)
    session.cfg = changed
    for chat in session.chats:
        chat.replies = 0 if name == "seed" else chat.replies
    session.screen.say(f"({name} {getattr(changed, name)})", "note")


@command
def save(session: Session, argument: str) -> None:
    """FILE: add the conversation to a file of training data

    It becomes a line {"messages": [...]}; with several models, a line for each. What stands in FILE stays.
    To learn from it: uv run sft.py --model MODEL --data FILE --out runs/mine
    """
    path, lines = file_named(argument), ""
    for chat in session.chats:
        turns = [turn for turn in exchanges(chat.messages) if turn[-1]["role"] == "assistant" and turn[-1]["content"]]
        if turns:
            messages = session.system + [message for turn in turns for message in turn]
            lines += json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    if not lines:
        raise ValueError("There is nothing to save yet.")
    if path.exists() and path.stat().st_size:
        if path.suffix == ".json" or data.is_gzip(path):
            raise ValueError(f"{path} takes no further lines; name a .jsonl file.")
        read_conversations(path)  # raises, rather than adding to a file of another kind
        lines = lines if path.read_bytes().endswith(b"\n") else "\n" + lines
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
    adapter = ["--adapter", session.cfg.adapter] if session.cfg.adapter else []
    flags = shlex.join(["--model", session.chats[0].name, *adapter, "--data", str(path), "--out", "runs/mine"])
    session.screen.say(f"(conversations in {path}: {len(read_conversations(path)):,}; to learn from them: "
                       f"uv run sft.py {flags})", "note")


@command
def load(session: Session, argument: str) -> None:
    """FILE [LINE]: go on with a saved conversation (the last, or a line's)"""
    name, _, line = argument.rpartition(" ")
    name, line = (name, int(line)) if name and line.isdecimal() else (argument, 0)
    found = read_conversations(file_named(name))
    if not found or line > len(found):
        raise ValueError(f"{name} has no more than {len(found):,}.")
    messages = found[line - 1]
    session.system = list(takewhile(lambda message: message["role"] == "system", messages))
    session.begin(messages[len(session.system):])
    session.show()


@command
def stats(session: Session, argument: str) -> None:
    """show the model, how full its context is, and its speed"""
    for chat in session.chats:
        gpt, s = chat.gpt, chat.stats
        about = [f"{chat.parameters / 1e6:,.1f}M parameters ({gpt.config.n_layer} layers, {gpt.config.n_embd} wide), "
                 f"{chat.precision} on {gpt.device}",
                 f"exchanges: {len(exchanges(chat.messages))}, in the context: {chat.used}"]
        if s.written:
            about += [f"last reply: {s.written:,} tokens in {s.seconds:.2f} s, {s.written / s.seconds:,.0f} a second, "
                      f"the first after {s.first:.2f} s",
                      f"read for it: {s.read:,} tokens, of which {s.known:,} were known from before"]
        session.screen.say(f"[{chat.name}]", "label")
        session.screen.say("\n".join(about))


@command
def compare(session: Session, argument: str) -> None:
    """[FOLDER...]: let more models answer (alone, only the first)

    They join the conversation as it is. Then everything is said to all of them, and each goes on from its own answers.
    """
    first = session.chats[0]
    others = [Chat(name, session.cfg, first.messages) for name in dict.fromkeys(argument.split()) if name != first.name]
    for chat in others:
        chat.loading.result()  # raises what is wrong with a model before it takes part
    session.chats = [first, *others]
    remarks = "".join(f"; {chat.remark}" for chat in others if chat.remark)
    session.screen.say(f"(answering: {', '.join(chat.name for chat in session.chats)}{remarks})", "note")


@command
def exit_(session: Session, argument: str) -> None:
    """leave, as Ctrl-D does"""
    raise EOFError


def file_named(argument: str) -> Path:
    if not argument:
        raise ValueError("Name a file, such as chats.jsonl")
    path = Path(argument).expanduser()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file.")
    return path


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


# ---- text on a terminal --------------------------------------------------------------------------


class Screen:
    """Standard output: wrapped on a terminal, in colour where that is wanted, plain text anywhere else."""

    def __init__(self):
        self.out = sys.stdout
        self.terminal = self.out.isatty()
        self.ansi = self.terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self.colour = self.ansi and not os.environ.get("NO_COLOR")  # https://no-color.org
        self.styles = {"note": "2", "error": "31", "label": "1;36", "you": "1;32"}  # dim, red, bold cyan and green

    def width(self) -> int:
        with suppress(OSError):
            return os.get_terminal_size(self.out.fileno()).columns or 80
        return 80

    def paint(self, text: str, style: str = "") -> str:
        return f"\x1b[{self.styles[style]}m{text}\x1b[0m" if style and self.colour else text

    def write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def wrap(self) -> Wrap:
        return Wrap(self.write, self.width if self.terminal else None)

    def say(self, text: str, style: str = "") -> None:
        """Print a text, wherever it comes from, wrapped and harmless."""
        lines: list[str] = []
        wrap = Wrap(lines.append, self.width)
        wrap.feed(text)
        wrap.flush()
        self.write(self.paint("".join(lines), style) + "\n")


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
                silent = saved[3] & ~(termios.ECHO | termios.ICANON)
                termios.tcsetattr(sys.stdin, termios.TCSANOW, [*saved[:3], silent, *saved[4:]])
                screen.write("\x1b[?2004h")
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, handler)
        if saved:
            screen.write("\x1b[?2004l")
            termios.tcsetattr(sys.stdin, termios.TCSANOW, saved)


# ---- side by side --------------------------------------------------------------------------------

BETWEEN = " | "  # stands between columns


class Column(Reply):
    """A reply that grows in a column of its own, as lines that are not printed yet."""

    def __init__(self, chat: Chat, width: Callable[[], int], coming: Iterator[str]):
        super().__init__(chat, Wrap(self.write, width), coming)
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
    from prompt_toolkit.output import ColorDepth, create_output

    class Completions(Completer):
        def get_completions(self, document, event):
            name, space, argument = document.text_before_cursor.partition(" ")
            if not space and name.startswith("/"):
                for known in COMMANDS:
                    if known.startswith(name):
                        yield Completion(known, -len(name), display_meta=usage(known)[1])
            elif name in ("/set", "/help"):
                for known in SETTINGS if name == "/set" else COMMANDS:
                    if known.startswith(argument):
                        yield Completion(known, -len(argument))
            elif name in ("/save", "/load", "/compare"):
                typed = argument.rpartition(" ")[2] if name == "/compare" else argument
                yield from PathCompleter(expanduser=True).get_completions(Document(typed), event)

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk must not end the conversation
                super().store_string(string)

    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)  # Ctrl-R's search has an Enter and a Ctrl-C of its own
    def _(event):
        if event.current_buffer.document.text_before_cursor.endswith("\\"):
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
            session.replacing = False
        else:
            event.app.exit(exception=KeyboardInterrupt)

    def placeholder():
        hidden = get_app().is_done or is_searching() or not session.screen.colour
        hint = f"Message, or /help{f' ({session.chats[0].used})' if session.chats[0].stats.written else ''}"
        return ANSI("" if hidden or len(hint) > session.screen.width() - 3 else session.screen.paint(hint, "note"))

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
        draft, session.draft = session.draft, ""
        text = prompt.prompt(default=draft)
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are not UTF-8

    return read


def history_file() -> Path | None:
    """Where typed lines are remembered, for their owner's eyes only; None where nothing can be written."""
    file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "gpt2-chat" / "history"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        file.chmod(0o600)  # whatever it was before
        return file
    return None


if __name__ == "__main__":
    run_script(main, Config)
