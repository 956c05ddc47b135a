"""chat.py as a person meets it: its pure parts, then the real program in a pseudo-terminal, in pipes, and failing.

The models here recite: their next token depends on the position alone, so every reply is known. Starting the program
costs seconds of importing torch, so a few programs are started once, together, and asked many things.
"""

import gzip
import io
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import terminals
from readback import messages_of
from terminals import pexpect

import chat
import data

ROOT = Path(__file__).parent.parent
NUMBERS = " one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
HOSTILE = " red \x1b[31m bell \x07 turned \u202e smile \U0001f600 wide 漢字漢字 tab\there line\nnext\r end"


# ---- models and programs -------------------------------------------------------------------------


def recite(folder: Path, text: str, end_every: int = 0) -> None:
    """A GPT-2 that says `text` round and round, and nothing else, ending where the position is a multiple."""
    import torch

    import model

    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(n_embd=64, n_layer=2, n_head=2))
    ids = data.tokenizer().encode_ordinary(text)
    with torch.no_grad():
        gpt.wte.weight.copy_(torch.nn.functional.normalize(torch.randn(50257, 64), dim=-1))
        for block in gpt.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        said = [data.EOT if end_every and p % end_every == 0 else ids[p % len(ids)] for p in range(1024)]
        gpt.wpe.weight.copy_(1000 * gpt.wte.weight[said])  # drowns out the token: only the position counts
        gpt.ln_f.weight.fill_(10)  # and makes the right token certain
    gpt.save_pretrained(folder, dtype=torch.float16)


@pytest.fixture(autouse=True)
def one_thread():
    """With models as small as these, threads only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with runs/sft, runs/dpo (the newer) and three more models."""
    import torch

    import model

    folder = tmp_path_factory.mktemp("chat")
    recite(folder / "runs/sft", NUMBERS + ".", end_every=60)
    recite(folder / "runs/dpo", NUMBERS + "!", end_every=40)
    recite(folder / "endless", NUMBERS)
    recite(folder / "hostile", HOSTILE, end_every=97)
    torch.manual_seed(0)
    model.GPT(model.GPTConfig(n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder / "random")
    for name, origin, about in (("sft", "sample", {"data": ["sample"]}), ("dpo", "runs/sft", {"data": ["mine.jsonl"],
                                                                                           "beta": 0.5})):
        (folder / "runs" / name / "run.json").write_text(json.dumps({
            "stage": name, "model": {"name": origin}, "config": about, "data": {"system_messages": 0}}))
    for file in ("run.json", "model.safetensors"):
        os.utime(folder / "runs/sft" / file, (1, 1))
    (folder / "runs/begun").mkdir()
    (folder / "runs/begun/run.json").write_text(json.dumps({
        "stage": "sft", "model": {"name": "gpt2"}, "config": {"data": ["a"]}, "data": {}}))
    (folder / "damaged").mkdir()
    (folder / "damaged/config.json").write_bytes((folder / "random/config.json").read_bytes())
    (folder / "damaged/model.safetensors").write_bytes(b"not a model")
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    editor = folder / "editor"
    editor.write_text("#!/bin/sh\necho 'from the editor' > $1\n")
    editor.chmod(0o700)
    return terminals.environment(**{"XDG_STATE_HOME": str(folder / "state"), "VISUAL": str(editor)} | more)


CHAT = [sys.executable, str(ROOT / "chat.py")]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>78]|\x1b\][^\x07]*\x07")
COLOURS = re.compile(r"\x1b\[[0-9;]*[1-9][0-9;]*m")
PROMPT = r"\x1b\[\?2004h\x1b[^\r\n]*?>[ \x08]"  # a space, or a step over it
DUMB_PROMPT = r"(\n|\x1b\[\?25h)> "


class Terminal:
    """The program in a terminal of 80 columns; what it shows can be had with escape sequences or without."""

    def __init__(self, folder: Path, *args: str, columns: int = 80, prompt: str = PROMPT, **env: str):
        self.folder, self.prompt, self.raw = folder, prompt, ""
        self.said: set[str] = set()  # commands, so that what they changed can be set back
        terminals.need_pexpect()
        self.child = pexpect.spawn(CHAT[0], [*CHAT[1:], *args], cwd=folder, env=environment(folder, **env), timeout=60,
                                   dimensions=(24, columns), encoding="utf-8", codec_errors="replace")
        self.child.delaybeforesend = None

    def see(self, pattern: str, timeout: float = 60) -> str:
        """Everything shown up to the pattern, without escapes."""
        self.child.expect(pattern, timeout=timeout)
        self.raw = self.child.before + self.child.after
        return ESCAPES.sub("", self.raw).replace("\r", "")

    def press(self, keys: str) -> None:
        self.child.send(keys)

    def say(self, text: str) -> str:
        """Type a line; what is shown until the next prompt."""
        self.said.add(text.split(" ")[0])
        self.press(text + "\r")
        return self.see(self.prompt)

    def resize(self, columns: int) -> None:
        """Change the window while the prompt waits, which draws it anew."""
        if self.child.getwinsize() != (24, columns):
            self.child.setwinsize(24, columns)
            self.see(self.prompt)

    def leave(self) -> int:
        self.child.expect(pexpect.EOF)
        self.raw = self.child.before
        self.child.close()
        return self.child.exitstatus

    def messages(self) -> list[dict]:
        """The conversation as the program itself saves it; what it says instead if there is none."""
        file = self.folder / "seen.jsonl"
        file.unlink(missing_ok=True)
        shown = self.say(f"/save {file}")
        return json.loads(file.read_text().splitlines()[0])["messages"] if file.exists() else shown


@pytest.fixture(scope="session")
def programs(folder):
    """The programs that tests talk to, started side by side."""
    talk = [{"role": "user", "content": "Unsaved \x1b[2J?"}, {"role": "assistant", "content": "Offered back."}]
    (folder / "left/gpt2-chat").mkdir(parents=True)
    (folder / "left/gpt2-chat/unsaved-3.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    started = {
        "main": Terminal(folder, "--temperature", "0"),
        "plain": Terminal(folder, "--model", "hostile", "--max-new-tokens", "90", columns=40, NO_COLOR="1"),
        "ascii": Terminal(folder, "--model", "hostile", "--max-new-tokens", "90", LC_ALL="POSIX", PYTHONUTF8="0",
                          PYTHONCOERCECLOCALE="0"),
        "dumb": Terminal(folder, "--compare", "runs/sft", "runs/dpo", prompt=DUMB_PROMPT, TERM="dumb"),
        "damaged": Terminal(folder, "--model", "damaged"),
        "blind": Terminal(folder, "--blind", "runs/sft", "runs/dpo", "--preferences", "blind.jsonl", columns=60,
                          XDG_STATE_HOME=str(folder / "left")),
    }
    yield started
    for terminal in started.values():
        terminal.child.close(force=True)


@pytest.fixture(scope="session")
def greeting(programs):
    return programs["main"].see(PROMPT)


@pytest.fixture(scope="session")
def plain(programs):
    """The program without colour, when it has greeted."""
    programs["plain"].greeting = programs["plain"].see(PROMPT)
    return programs["plain"]


@pytest.fixture
def terminal(programs, greeting):
    """The main program, as if it had just been started."""
    terminal = programs["main"]
    terminal.resize(80)
    settings = ("temperature 0", "min_p 0.05", "max_new_tokens 256", "seed none", "verbose off")
    back = {"/model": ["/model runs/dpo"], "/compare": ["/compare"], "/system": ["/system -"],
            "/set": [f"/set {setting}" for setting in settings]}
    (terminal.folder / "preferences.jsonl").unlink(missing_ok=True)
    for line in ["/new", *(line for command in terminal.said & set(back) for line in back[command])]:
        terminal.say(line)
    terminal.said.clear()
    return terminal


@pytest.fixture(scope="session")
def piped(folder):
    """Runs without a terminal, started side by side: {name: (exit code, standard output, standard error)}."""
    def start(*args, given=None, cwd=folder, closed="", **env):
        through = ["sh", "-c", f'exec "$0" "$@" {closed}'] * bool(closed)
        process = subprocess.Popen([*through, *CHAT, *args], cwd=cwd, env=environment(folder, **env),
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if given is not None:
            process.stdin.write(given)
            process.stdin.close()
        return process

    (folder / "empty").mkdir()
    (folder / "asked.txt").write_bytes("\ufeffOne?\n\n  Two \x1b[31m?\r\nThree\x07?\nFour?\n".encode())
    (folder / "asked.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (turns(2), turns(1))))
    (folder / "long.txt").write_text("word " * 1500 + "\nOne?\n")
    processes = {
        "prompt": start("--prompt", "Hello", "--model", "runs/sft"),  # its standard input stays open: it must not wait
        "pipe": start("--model", "hostile", given="\ufeffhällo\nzwei\n".encode(), LC_ALL="POSIX", PYTHONUTF8="0",
                      PYTHONCOERCECLOCALE="0"),
        "compare": start("--compare", "runs/sft", "runs/dpo", "--max-new-tokens", "3", "--prompt", "Hello"),
        "empty pipe": start(given=b" \n"),
        "no model": start("--prompt", "Hello", cwd=folder / "empty"),
        "wrong model": start("--prompt", "Hello", "--model", "runs/sfd"),
        "setting": start("--prompt", "Hello", "--top-p", "2"),
        "words": start("What", "is", "this?", "--model", "runs/sft", "--verbose", given=b"\xef\xbb\xbfA note.\n"),
        "blind": start("--blind", "runs/sft", "runs/dpo", "--prompts", "asked.txt", "--preferences", "piped.jsonl",
                       "--max-new-tokens", "50", given=b"left\nr\nNEITHER\n"),
        "no vote": start("--blind", "runs/sft", "runs/dpo", "--prompts", "asked.jsonl", "--preferences", "no.jsonl",
                         "--max-new-tokens", "50", given=b"left\nboth\nright\n"),
        "long question": start("--blind", "runs/sft", "runs/dpo", "--prompts", "long.txt", "--preferences",
                               "votes-of-long.jsonl", "--max-new-tokens", "50", given=b"left\n"),
        "no one to vote": start("--blind", "runs/sft", "runs/dpo", "--prompts", "asked.txt", closed="<&-"),
        "no output": start("Hello", "--model", "runs/sft", closed=">&-", given=b""),
        "blind to one, twice": start("--blind", "runs/sft", "runs/sft/", "--prompts", "asked.txt", given=b"left\n"),
        "votes of another kind": start("--blind", "runs/sft", "runs/dpo", "--prompts", "asked.txt", "--preferences",
                                       "asked.jsonl", given=b"left\n"),
        "votes into a folder": start("--blind", "runs/sft", "runs/dpo", "--prompts", "asked.txt", "--preferences",
                                     "runs", given=b"left\n"),
        "words behind": start("--compare", "runs/sft", "runs/dpo", "Hello", given=b""),
        "words and --prompt": start("--prompt", "Hello", "What", "now"),
        "blind alone": start("--blind", "runs/sft", "runs/dpo", given=b"Hello"),
        "blind to one": start("--blind", "runs/sft", "runs/sft"),
        "no folder": start("--prompt", "Hello", "--preferences", "no/such/pairs.jsonl"),
        "no questions": start("--blind", "runs/sft", "runs/dpo", "--prompts", "nothing.txt"),
        "a model as a word": start("runs/sft"),
    }
    results = {}
    for name, process in processes.items():
        out, err = process.stdout.read(), process.stderr.read()
        results[name] = (process.wait(timeout=60), out.decode(), err.decode())
    return results


# ---- pure parts ----------------------------------------------------------------------------------


def wrapped(pieces, width):
    out = []
    wrap = chat.Wrap(out.append, (lambda: width) if isinstance(width, int) else width)
    for piece in pieces:
        wrap.feed(piece)
    wrap.end()
    return "".join(out)


def test_wrapping_does_not_depend_on_where_the_pieces_are_cut():
    text = "The quick brown fox\n\n  indented words here\njumps over 漢字漢字漢字 the lazy dog, " + "x" * 50 + " end"
    for width in (1, 2, 7, 20, 80):
        whole = wrapped([text], width)
        assert whole == wrapped(text, width)
        assert all(chat.cell_len(line) <= max(width, 2) for line in whole.split("\n"))
        assert re.sub(r"\s", "", whole) == re.sub(r"\s", "", text)


def test_wrapping_keeps_words_whole_and_lines_as_they_are():
    assert wrapped(["one two three"], 9) == "one two\nthree\n"
    assert wrapped(["a\n\n    b  c\n"], 80) == "a\n\n    b  c\n"
    assert wrapped(["abcdefghij"], 4) == "abcd\nefgh\nij\n"
    assert wrapped(["exactly ten"], 11) == "exactly ten\n"
    assert wrapped([], 10) == wrapped(["  "], 10) == ""


def test_wrapping_follows_the_window():
    widths = iter([20] * 24 + [10] * 100)
    lines = wrapped("one two three four five six seven eight nine ten", lambda: next(widths)).split("\n")
    assert len(lines[0]) > 10 and all(len(line) <= 10 for line in lines[2:])


def test_columns():
    assert [chat.cell_len(text) for text in ("abc", "漢字", "e\u0301", "\U0001f600", "")] == [3, 4, 1, 2, 0]


def turns(count, words=10):
    return [m for i in range(count) for m in ({"role": "user", "content": f"q{i}" + " word" * words},
                                              {"role": "assistant", "content": f"a{i}" + " word" * words})]


def test_whole_oldest_exchanges_go_and_the_system_message_stays():
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "And now?"}
    ids, left_out = chat.fit([system, *turns(50), question], 1024, 256)
    assert len(ids) <= 1024 - 256 and left_out % 2 == 0 and left_out > 0
    kept = messages_of(ids)
    assert kept[0] == system and kept[1]["role"] == "user" and kept[-2]["content"] == "And now?"
    assert len(kept) == 1 + 100 - left_out + 2  # and the opening of the reply
    assert chat.fit([system, *turns(5), question], 1024, 256)[1] == 0


def test_a_message_that_cannot_fit_is_refused_with_its_size():
    long = [{"role": "user", "content": "word " * 1200}]
    with pytest.raises(ValueError, match=r"1,20\d tokens.* reads 1,024 at once"):
        chat.fit(long, 1024, 256)
    assert len(chat.fit([{"role": "user", "content": "word " * 980}], 1024, 256)[0]) > 980  # takes the reply's room
    assert chat.fit([{"role": "user", "content": "a"}], 1024, 5000)[1] == 0


def test_exchanges_begin_where_the_person_speaks():
    a, b, c = ({"role": role, "content": role} for role in ("assistant", "user", "assistant"))
    assert chat.exchanges([]) == []
    assert chat.exchanges([a, b, c, b, b, c]) == [[a], [b, c], [b, b, c]]


def answer(folder, name, **settings):
    import model

    gpt = model.GPT.from_pretrained(folder / name)
    stats = chat.Stats()
    cfg = chat.Config(**{"temperature": 0.0, **settings})
    pieces = list(chat.reply(gpt, [{"role": "user", "content": "Hello"}], cfg, seed=cfg.seed, stats=stats))
    return pieces, stats


def test_a_reply_is_its_pieces(folder):
    pieces, stats = answer(folder, "runs/sft", max_new_tokens=5)
    assert len(pieces) == stats.written == 5 and stats.cut_off == "cut off: max_new_tokens is 5"
    text = "".join(pieces)
    assert text == text.strip() and text in NUMBERS + "." + NUMBERS
    assert answer(folder, "runs/sft")[1].cut_off == ""


def test_it_talks_to_a_model_with_somebodys_adapter(tiny_model, somebodys_adapter, folder, capsys, monkeypatch):
    """The reply is PEFT's; without --model, the adapter says which one it belongs to."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), somebodys_adapter).eval()
    ids = data.render([{"role": "user", "content": "Hello"}], reply=True)[0].tolist()
    wanted = theirs.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=data.EOT)
    said = []
    for more in ({}, {"model": str(tiny_model)}, {"model": str(tiny_model), "adapter": ""}):
        cfg = {"adapter": str(somebodys_adapter), "temperature": 0.0, "max_new_tokens": 6, "prompt": "Hello",
               "precision": "fp32"} | more
        capsys.readouterr()
        chat.main(chat.Config(**cfg))
        said.append(capsys.readouterr().out.strip())
    assert said[0] == said[1] == data.visible(data.text_of(wanted[0, len(ids):])).strip() != said[2]
    with pytest.raises(ValueError, match="this model needs"):
        chat.main(chat.Config(model=str(folder / "random"), adapter=str(somebodys_adapter), prompt="Hello"))


def test_a_foreign_vocabulary_is_refused_and_a_foreign_template_is_said(folder, tmp_path, capsys):
    for name in ("words", "template"):
        (tmp_path / name).mkdir()
        for file in (folder / "random").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "words" / "vocab.json").write_text('{"Bäcker": 0}')
    with pytest.raises(ValueError, match=r"other words than GPT-2: in its vocab\.json, '!' has the number none"):
        chat.main(chat.Config(model=str(tmp_path / "words"), prompt="Hello"))
    foreign = "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}"
    (tmp_path / "template" / "chat_template.jinja").write_text(foreign)
    chat.main(chat.Config(model=str(tmp_path / "template"), prompt="Hello", max_new_tokens=1))
    said = capsys.readouterr()
    assert "chat template of its own" in said.err and "template" not in said.out


def test_characters_are_never_split_and_controls_come_visible(folder):
    pieces, stats = answer(folder, "hostile")
    text = "".join(pieces)
    assert len(pieces) == stats.written and "" in pieces  # half a character waits
    assert ("smile \U0001f600 wide 漢字漢字 tab\there line\nnext\r end red \x1b[31m bell \x07 turned \u202e smile"
            in text)
    shown = "smile \U0001f600 wide 漢字漢字 tab\there line\nnext␍ end red ␛[31m bell ␇ turned <U+202E> smile"
    assert shown in wrapped(pieces, None)
    assert "\N{REPLACEMENT CHARACTER}" not in text


def test_seeds_repeat_and_differ(folder):
    draws = [answer(folder, "random", temperature=1.0, top_p=1.0, seed=seed, max_new_tokens=20)[0]
             for seed in (1, 1, 2, None, None)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 4


def test_a_kept_cache_changes_nothing_but_the_work(folder):
    import model

    gpt = model.GPT.from_pretrained(folder / "random")
    cache, messages, cfg = model.KVCache(gpt), [], chat.Config(temperature=0.0, max_new_tokens=8)
    for turn in range(4):
        messages.append({"role": "user", "content": f"Question {turn}"})
        stats = chat.Stats()
        kept = "".join(chat.reply(gpt, messages, cfg, cache=cache, stats=stats))
        assert kept == "".join(chat.reply(gpt, messages, cfg))
        assert stats.known > 0 or turn == 0
        messages.append({"role": "assistant", "content": kept})


def session(folder, monkeypatch, *lines, **settings):
    """A conversation without a terminal, after these lines."""
    monkeypatch.chdir(folder)
    cfg = {"temperature": 1.0, "min_p": 0.0, "max_new_tokens": 8, "seed": 7} | settings
    talk = chat.Session(chat.Config(**cfg), chat.Screen(), ["random"])
    talk.unsaved = SimpleNamespace(saved="", offered=[], make_room=lambda *_: None)
    for line in lines:
        talk.handle(line)
    return talk


def said(talk, *lines):
    """What is answered to the last of these lines."""
    for line in lines:
        talk.handle(line)
    return talk.chats[0].messages[-1]["content"]


def test_the_same_seed_and_messages_give_the_same_reply_whatever_happened_before(folder, monkeypatch, tmp_path):
    talk = session(folder, monkeypatch, "Hello", "More")
    first, second = (m["content"] for m in talk.chats[0].messages[1::2])
    third = said(talk, f"/save {tmp_path / 'talk.jsonl'}", "And?")
    again = said(talk, "/retry")
    assert len({first, second, third, again}) == 4
    assert said(talk, "/undo", "And?") == third
    assert said(talk, "/undo", "Something else", "/undo", "And?") == third
    assert said(talk, "/retry") == again and said(talk, "/undo", "/undo", "More") == second
    assert said(talk, "/undo", "/undo", "Hello") == first and said(talk, "More") == second
    assert said(talk, f"/load {tmp_path / 'talk.jsonl'}", "And?") == third
    assert said(session(folder, monkeypatch, f"/load {tmp_path / 'talk.jsonl'}"), "And?") == third
    assert said(talk, "/new", "Hello") == first
    assert said(talk, "/set seed 8", "/new", "Hello") != first
    assert said(talk, "/set seed 7", "/new", "Hello") == first


@pytest.mark.parametrize("before", [b"", b"\n", b" \r\n\n", b"\xef\xbb\xbf\n"])
def test_save_goes_into_an_empty_file_with_whatever_lines(folder, monkeypatch, tmp_path, before):
    file = tmp_path / "chats.jsonl"
    file.write_bytes(before)
    talk = session(folder, monkeypatch, "Hello", f"/save {file}", f"/save {file}")
    assert chat.read_conversations(file) == [talk.chats[0].messages] * 2
    assert file.read_bytes().startswith(before)


def test_a_save_that_fails_leaves_the_file_as_it_was(folder, monkeypatch, tmp_path):
    file = tmp_path / "chats.jsonl"
    talk = session(folder, monkeypatch, "Hello", f"/save {file}")
    before = file.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        talk.handle(f"/save {file}")
    assert file.read_bytes() == before


def test_somebody_without_a_home_has_no_history(monkeypatch):
    """As in a container whose user has no entry in /etc/passwd."""
    without = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    script = ("import pwd; pwd.getpwuid = {}.__getitem__; import data, chat; assert data.load_rows(['sample']).train; "
              "assert not data.KEPT.exists()")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=without, timeout=60)
    import pwd

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert chat.history_file() is None


@pytest.mark.parametrize("setting", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
                                     {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"max_new_tokens": 0},
                                     {"seed": -1}, {"seed": 2**64}, {"temperature": float("inf")}])
def test_senseless_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is"):
        chat.check(chat.Config(**setting))


def test_the_newest_model_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"uv run sft\.py"):
        chat.newest_model()
    for time_made, name in enumerate(("runs/dpo", "runs/sft"), 1):
        Path(name).mkdir(parents=True)
        Path(name, "model.safetensors").touch()
        os.utime(Path(name, "model.safetensors"), (time_made, time_made))
    assert chat.newest_model() == "runs/sft"
    Path("runs/dpo/run.json").touch()
    assert chat.newest_model() == "runs/dpo"
    Path("runs/dpo/model.safetensors").unlink()  # a run that has only begun
    assert chat.newest_model() == "runs/sft"


def test_history_is_for_its_owner(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "gpt2-chat").mkdir()
    (tmp_path / "gpt2-chat/history").touch(0o644)
    assert stat.S_IMODE(chat.history_file().stat().st_mode) == 0o600
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert chat.history_file() is None


def test_every_command_is_documented():
    for name in chat.COMMANDS:
        synopsis, line, _ = chat.usage(name)
        assert synopsis.startswith(name) and len(synopsis) <= 21 and 10 < len(line) <= 58


def test_a_terminal_is_told_nothing_but_text(monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    chat.Screen().say("a\x1b[2J\u202eb\x9bc")
    assert out.getvalue() == "a␛[2J<U+202E>b<U+009B>c\n"


@pytest.mark.parametrize(("votes", "wanted"), [
    ((3, 0, 0), (1.0, 0.4385, 1.0)), ((0, 10, 0), (0.0, 0.0, 0.2775)), ((5, 5, 0), (0.5, 0.2366, 0.7634)),
    ((4, 4, 2), (0.5, 0.2366, 0.7634)), ((81, 182, 0), (0.3080, 0.2553, 0.3662))])
def test_the_win_rate_and_wilsons_interval(votes, wanted):
    """By hand, and as Newcombe 1998 (Statistics in Medicine 17, table I) prints them for 81 of 263."""
    assert chat.win_rate(*votes) == pytest.approx(wanted, abs=1e-4)


def test_what_a_model_makes_of_a_reply_adds_up_to_its_log_probability(folder):
    import torch

    import model

    gpt = model.GPT.from_pretrained(folder / "random")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A 漢 \x1b[2J smile 😀"}]
    words = chat.judged(gpt, messages, 1024)
    assert "".join(word.text for word in words) == messages[1]["content"] + data.EOT_TEXT
    ids, mask = data.render(messages)
    with torch.no_grad():
        plain = gpt(torch.tensor([ids.tolist()]))[0].log_softmax(-1)
    learnt = [t for t in range(len(ids)) if mask[t]]
    assert sum(word.logp for word in words) == pytest.approx(sum(float(plain[t - 1, ids[t]]) for t in learnt), abs=1e-3)
    (first, second, third), place = words[0].nearly, plain[learnt[0] - 1]
    best = [i for i in place.argsort(descending=True).tolist() if i != ids[learnt[0]]][:3]
    assert [text for text, _ in (first, second, third)] == [data.text_of([i]) for i in best]
    assert first[1] == pytest.approx(float(place[best[0]]), abs=1e-4)


def test_a_long_conversation_is_judged_without_its_oldest_exchanges(folder):
    import model

    gpt = model.GPT.from_pretrained(folder / "runs/sft")
    long = chat.judged(gpt, turns(60), 1024)
    assert "".join(word.text for word in long) == turns(60)[-1]["content"] + data.EOT_TEXT
    with pytest.raises(ValueError, match=r"take 2,\d\d\d tokens.* reads 1,024"):
        chat.judged(gpt, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 2000}], 1024)


def test_questions_are_lines_or_conversations_that_end_with_one(tmp_path):
    def ask(name, content):
        (tmp_path / name).write_bytes(content)
        return chat.questions(tmp_path / name)

    assert ask("q.txt", "\ufeffOne?\r\n\n [two] \n".encode()) == [[{"role": "user", "content": "One?"}],
                                                                [{"role": "user", "content": "[two]"}]]
    talk = json.dumps({"messages": turns(2)}).encode()
    for name, content in (("q.jsonl", talk + b"\n" + talk), ("q", b"\n" + talk), ("q.jsonl.gz", gzip.compress(talk))):
        assert all(asked == turns(2)[:3] for asked in ask(name, content))
    for content in (b"", b"\n \n"):
        with pytest.raises(ValueError, match=r"empty\.txt' asks nothing"):
            ask("empty.txt", content)
    with pytest.raises(ValueError, match=r"bad\.jsonl:1 is no conversation"):
        ask("bad.jsonl", b'{"question": "One?"}')


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{", b"\xff", b"[" * 5000, b'{"stage": "dpo"}', b'{"stage": 1, "model": [], "config": {}, "data": 0}',
    b'{"stage": 1, "model": {"name": "a"}, "config": {"data": ["sample"], "beta": "much"}, "data": {}}'])
def test_a_run_json_of_another_kind_tells_nothing(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert chat.ancestry(str(tmp_path)) == ([], str(tmp_path))


def test_a_model_is_of_the_sample_if_one_of_its_runs_was(tmp_path):
    def run(name, origin, data_, systems=0):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({
            "stage": "sft", "model": {"name": str(origin)}, "config": {"data": data_}, "data": {
                "system_messages": systems}}))
        return str(tmp_path / name)

    first = run("first", "sample", ["mine.jsonl"])
    second = run("second", first, ["mine.jsonl"], systems=3)
    large, foreign = run("large", "gpt2", ["oasst1", "sample@0.5"]), run("foreign", tmp_path / "x", ["sample.jsonl"])
    loop = run("loop", tmp_path / "loop", ["a"])
    assert [chat.of_the_sample(name) for name in (first, second, large, foreign, loop, "sample", "gpt2")] == [
        True, True, True, False, False, True, False]
    assert [chat.never_had_system(name) for name in (first, second, large, foreign, loop, "sample")] == [
        True, False, True, False, False, True]


def test_lines_are_added_whole_or_not_at_all(tmp_path, monkeypatch):
    """On a full disk a file is as it was; two programs that add to it lose nothing of each other's."""
    path, row = tmp_path / "chats.jsonl", json.dumps({"messages": turns(1)}) + "\n"
    path.write_text("\ufeff\n \n")  # which holds nothing yet
    count = [chat.add_lines(path, row, lambda: len(chat.read_conversations(path))) for _ in range(3)]
    assert count == [1, 2, 3]
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, content):
            return super().write(content[:10])

    usual = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *rest, **more: (
        Full(self, mode) if mode == "ab" else usual(self, mode, *rest, **more)))
    with pytest.raises(OSError, match="No space left"):
        chat.add_lines(path, row, lambda: len(chat.read_conversations(path)))
    assert path.read_bytes() == before


def test_what_was_not_saved_is_kept_for_the_next_chat_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    lines, other = (json.dumps({"messages": turns(n)}) + "\n" for n in (1, 2))
    first, second = chat.Unsaved(), chat.Unsaved()  # at the same time
    first.keep(lines)
    second.keep(other)
    kept = sorted((tmp_path / "gpt2-chat").glob("unsaved-*.jsonl"))
    assert len(kept) == 2 and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in kept)
    assert not chat.Unsaved().offered  # both are running
    del first, second  # as when a process ends
    offered = [chat.Unsaved(), chat.Unsaved()]
    assert sorted(talk.offered for talk in offered) == [[turns(1)], [turns(2)]]
    offered[0].keep("")
    assert len([*(tmp_path / "gpt2-chat").glob("unsaved-*.jsonl")]) == 2  # it stays until there is something newer
    offered[0].keep(other)
    offered[0].saved = other
    offered[0].keep(other)
    assert len([*(tmp_path / "gpt2-chat").glob("unsaved-*.jsonl")]) == 1
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    chat.Unsaved().keep(lines)  # nothing can be written, and nothing goes wrong


def test_load_loses_nothing_of_what_is_not_saved(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = chat.Unsaved()
    before.keep(chat.as_line(turns(1)) + chat.as_line(turns(2)))  # two models had answered
    del before
    talk = session(folder, monkeypatch, "Important\u2028")
    talk.unsaved = chat.Unsaved()
    said = [talk.chats[0].messages]
    for _ in range(3):  # round
        talk.handle("/load")
        said.append(talk.chats[0].messages)
        talk.unsaved.keep(talk.lines())
    assert said == [said[3], turns(1), turns(2), said[3]]
    file, = (tmp_path / "gpt2-chat").glob("unsaved-*.jsonl")
    assert chat.read_conversations(file) == [said[3], turns(1), turns(2)]
    talk.unsaved = None  # as when the process ends
    assert chat.Unsaved().offered == [said[3], turns(1), turns(2)]


def test_an_exchange_before_a_system_message_is_saved_too(folder, monkeypatch, tmp_path):
    messages = [*turns(1), {"role": "system", "content": "Be brief."}, *turns(1)]
    (file := tmp_path / "talk.jsonl").write_text(chat.as_line(messages))
    talk = session(folder, monkeypatch, f"/load {file}")
    assert json.loads(talk.lines())["messages"] == messages
    for line in ("0", "9" * 5000):  # no line of a file
        with pytest.raises((ValueError, OSError), match=r"talk.jsonl 0|File name too long"):
            talk.handle(f"/load {file} {line}")


def test_nobodys_home(folder, monkeypatch):
    with pytest.raises(ValueError, match="there is no folder ~nobody-of-this-name"):
        chat.check(chat.Config(preferences="~nobody-of-this-name/votes.jsonl"))


def test_cells_that_have_become_too_wide_are_broken_and_not_cut(capsys):
    class Narrowed(chat.Screen):
        def column(self, columns):
            return 6

    class Written(SimpleNamespace):
        def step(self, stopped):
            self.going = False

    sides = [Written(going=True, lines=lines) for lines in (["abcdefgh", ""], ["漢字漢字", "x"])]
    chat.show_columns(Narrowed(), ["a", "b"], sides, lambda: False)
    shown = capsys.readouterr().out
    assert "".join(re.findall("[a-h]", shown.partition("\n")[2])) == "abcdefgh"
    assert shown.count("漢") == shown.count("字") == 2


def test_a_home_is_not_needed(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert chat.state_folder() is None and chat.history_file() is None


# ---- in a terminal -------------------------------------------------------------------------------


def test_says_which_model_it_found(greeting):
    assert "runs/dpo, the newest model here" in greeting and "/help" in greeting


def test_answers(terminal):
    shown = terminal.say("Hello")
    assert re.search(r"\n(\w+ ){3}.*seventeen!", shown)
    assert COLOURS.search(terminal.raw)


def test_follow_ups_see_what_came_before(terminal):
    terminal.say("What does a baker do?")
    terminal.say("Where?")
    assert [m["role"] for m in terminal.messages()] == ["user", "assistant"] * 2
    assert re.search(r"of which [1-9]\d* were known from before", terminal.say("/stats"))


@pytest.fixture
def endless(terminal):
    """The main program with a second model, whose replies never end."""
    terminal.say("/compare endless")
    terminal.say("/set max_new_tokens 400")
    return terminal


def test_streams(endless):
    endless.press("Hello\r")
    endless.see(r"\[endless\]")
    arrivals = 0
    for _ in range(5):
        endless.see("seventeen")
        arrivals += endless.child.expect([pexpect.TIMEOUT, PROMPT], timeout=0) == 0
    assert arrivals == 5  # five times round, and the reply was still going on
    endless.press("\x03")
    endless.see(r"\(stopped\)")
    endless.see(PROMPT)


def test_ctrl_c_stops_the_reply_and_keeps_what_there_is(endless):
    endless.press("Hello\r")
    endless.see(r"\[endless\]")
    endless.see("seventeen")
    endless.press("\x03")
    shown = endless.see(PROMPT)
    assert "(stopped)" in shown and "^C" not in shown
    file = endless.folder / "stopped.jsonl"
    endless.say(f"/save {file.name}")
    kept = json.loads(file.read_text().splitlines()[1])["messages"][-1]
    assert kept["role"] == "assistant" and 5 < len(kept["content"].split()) < 390
    assert "(stopped)" not in endless.say("/stats")  # it goes on


def test_ctrl_c_stops_all_of_several_models(terminal):
    terminal.say("/compare endless random")
    terminal.say("/set max_new_tokens 900")
    terminal.press("Hello\r")
    terminal.see(r"\[endless\]")
    terminal.see("seventeen")
    terminal.press("\x03")
    assert terminal.see(PROMPT).count("(stopped)") == 3


def test_keys_typed_during_a_reply_wait_for_the_prompt(endless):
    endless.say("/set max_new_tokens 150")
    endless.press("Hello\r")
    endless.see(r"\[endless\]")
    endless.press("a thought meanwhile")
    assert "thought" not in endless.see("seventeen") + endless.see("seventeen")
    endless.see(PROMPT)
    endless.see("meanwhile")
    endless.press("\x03")


def test_lines_pasted_during_a_reply_stay_together(endless):
    endless.say("/set max_new_tokens 150")
    endless.press("Hello\r")
    endless.see(r"\[endless\]")
    endless.press("\x1b[200~first\rsecond\rthird\x1b[201~")
    endless.see(PROMPT)
    endless.see("third")
    endless.say("/compare")  # goes behind the pasted lines, into the same message
    assert endless.messages()[-2]["content"] == "first\nsecond\nthird/compare"


def test_ten_pasted_lines_are_one_message(terminal):
    lines = [f"line {i}" for i in range(10)]
    terminal.press("\x1b[200~" + "\r".join(lines) + "\x1b[201~")
    terminal.see("line 9")
    terminal.say("")
    assert [m["content"] for m in terminal.messages() if m["role"] == "user"] == ["\n".join(lines)]


def test_alt_enter_begins_a_new_line(terminal):
    terminal.press("one\x1b\rtwo")
    terminal.say("")
    assert terminal.messages()[0]["content"] == "one\ntwo"


def test_a_backslash_begins_a_new_line(terminal):
    terminal.press("one\\\r")
    terminal.say("two")
    assert terminal.messages()[0]["content"] == "one\ntwo"


def test_a_backslash_stays_where_it_was_not_typed_before_enter(terminal):
    terminal.press("\x1b[200~run \\\n  // all\x1b[201~")
    terminal.say(" of it")
    assert terminal.messages()[0]["content"] == "run \\\n  // all of it"


def test_a_line_feed_sends_too(terminal):
    terminal.press("/stats\n")
    assert "3.4M parameters" in terminal.see(PROMPT)


def test_ctrl_c_clears_the_line_and_up_brings_it_back(terminal):
    terminal.press("half a thought")
    terminal.see("thought")
    terminal.press("\x03")
    for _ in range(60):  # the history is read anew, beside the typing
        terminal.press("\x1b[A")
        if terminal.child.expect(["half a thought", pexpect.TIMEOUT], timeout=1) == 0:
            break
    else:
        pytest.fail("Up did not bring it back")
    terminal.press("\x03")
    assert "There is nothing to save" in terminal.messages()


def test_ctrl_r_searches_what_was_typed(terminal):
    terminal.say("an unusual question")
    terminal.press("\x12unusual")
    terminal.see("search backward")
    terminal.press("\x03")  # leaves the search, not the program
    terminal.see("or /help")
    terminal.press("\x12unusual")
    terminal.see("question")
    terminal.press("\r")
    terminal.say("")
    assert [m["content"] for m in terminal.messages()[::2]] == ["an unusual question"] * 2


def test_ctrl_x_ctrl_e_opens_an_editor(terminal):
    terminal.press("\x18\x05")
    terminal.see("from the editor")  # which is sent when the editor is left, as in a shell
    terminal.see("seventeen")
    terminal.see(PROMPT)
    assert terminal.messages()[0]["content"] == "from the editor"


def test_ctrl_c_at_an_empty_prompt_asks_first(terminal):
    terminal.press("\x03")
    assert "Ctrl-C again leaves" in terminal.see(PROMPT)
    terminal.say("/stats")
    terminal.press("\x03")  # not twice in a row: still here
    assert "Ctrl-C again leaves" in terminal.see(PROMPT)


def test_an_empty_line_does_nothing(terminal):
    terminal.say("   ")
    assert "There is nothing to save" in terminal.messages()


def test_help_lists_every_command(terminal):
    shown = terminal.say("/help")
    assert all(f"\n{name} " in shown for name in chat.COMMANDS) and "Alt-Enter" in shown


def test_help_on_one_command(terminal):
    assert "repetition_penalty, max_new_tokens and seed" in " ".join(terminal.say("/help set").split())
    assert "Also: /bye" in terminal.say("/help exit")
    assert "There is no command /what" in terminal.say("/help what")


def test_a_misspelt_command_gets_a_suggestion(terminal):
    assert "did you mean /retry?" in terminal.say("/rety")
    assert "There is no command /zzz." in terminal.say("/zzz")


def test_a_message_may_begin_with_a_slash(terminal):
    terminal.say("//help")
    terminal.say("/usr/bin is what?")
    terminal.say("// is a comment")
    assert [m["content"] for m in terminal.messages()[::2]] == ["/help", "/usr/bin is what?", "// is a comment"]
    terminal.say("/edit")
    terminal.see("comment")
    terminal.say("!")
    assert terminal.messages()[4]["content"] == "// is a comment!"


def test_new_forgets(terminal):
    terminal.say("Hello")
    terminal.say("/clear")  # its name elsewhere
    assert "There is nothing to save" in terminal.messages()


def test_system(terminal):
    assert "none" in terminal.say("/system")
    assert "(system message: Be brief.)" in terminal.say("/system Be brief.")
    terminal.say("Hello")
    assert terminal.messages()[0] == {"role": "system", "content": "Be brief."}
    terminal.press("\x1b[200~/system " + "word " * 1200 + "\x1b[201~")
    assert "takes 1,20" in terminal.say("")
    assert "Be brief." in terminal.say("/system")
    terminal.say("/system -")
    assert terminal.messages()[0]["role"] == "user"


def test_retry(terminal):
    assert "Nothing has been said" in terminal.say("/retry")
    terminal.say("Hello")
    before = terminal.messages()
    terminal.say("/set max_new_tokens 4")
    terminal.say("/retry")
    after = terminal.messages()
    assert len(after) == 2 and before[0] == after[0] and before[1]["content"].startswith(after[1]["content"])
    assert len(after[1]["content"]) < len(before[1]["content"])


def test_undo(terminal):
    terminal.say("First")
    terminal.say("Second")
    assert "(taken back: Second)" in terminal.say("/undo")
    assert [m["content"] for m in terminal.messages()[::2]] == ["First"]
    terminal.say("/undo")
    assert "Nothing has been said" in terminal.say("/undo")


def test_edit_replaces_the_last_exchange(terminal):
    terminal.say("First")
    terminal.say("Secund")
    terminal.say("/edit")
    terminal.see("Secund")
    terminal.say("\x7f\x7f\x7fond")
    assert [m["content"] for m in terminal.messages()[::2]] == ["First", "Second"]


def test_an_abandoned_edit_leaves_all_as_it_was(terminal):
    terminal.say("First")
    terminal.say("/edit")
    terminal.see("First")
    terminal.press("\x15")  # empties the line
    terminal.say("")
    terminal.say("Second")
    assert [m["content"] for m in terminal.messages()[::2]] == ["First", "Second"]


def test_ctrl_c_abandons_an_edit(terminal):
    terminal.say("First")
    terminal.say("/edit")
    terminal.see("First")
    terminal.press("\x03")
    terminal.say("Second")
    assert [m["content"] for m in terminal.messages()[::2]] == ["First", "Second"]


def test_a_command_ends_an_edit(terminal):
    terminal.say("First")
    terminal.say("/edit")
    terminal.see("First")
    terminal.say("\x15/stats")
    terminal.say("Second")
    assert [m["content"] for m in terminal.messages()[::2]] == ["First", "Second"]


def test_set(terminal):
    assert all(name in terminal.say("/set") for name in chat.SETTINGS)
    assert "(top_k 40)" in terminal.say("/set top-k 40")
    assert "(top_k 0)" in terminal.say("/set top_k 0")
    terminal.say("/set max_new_tokens 3")
    terminal.say("Hello")
    assert len(terminal.messages()[1]["content"].split()) <= 3


@pytest.mark.parametrize(("typed", "said"), [
    ("temperature hot", "is a number, not 'hot'"), ("top_k 1.5", "whole number"), ("top_p 7", "has to be 0.001 to 1"),
    ("tempo 1", "There is no setting tempo"), ("seed -4", "has to be 0 or more"), ("temperature", "not ''")])
def test_set_refuses(terminal, typed, said):
    assert said in " ".join(terminal.say("/set " + typed).split())
    assert "temperature         0.0" in terminal.say("/set")


def test_seeds_make_replies_repeatable(terminal):
    def three():
        terminal.say("/set seed 7")
        terminal.say("/new")
        said = []
        for line in ("Hello", "/retry", "More"):
            terminal.say(line)
            said.append(json.loads(save().read_text().splitlines()[-1])["messages"][-1]["content"])
        return said

    def save():
        file = terminal.folder / "seeds.jsonl"
        file.unlink(missing_ok=True)
        terminal.say(f"/save {file.name}")
        return file

    for line in ("/compare random", "/set temperature 1", "/set min_p 0", "/set max_new_tokens 12"):
        terminal.say(line)
    first = three()
    assert first == three() and first[0] != first[1]


def test_the_same_seed_and_messages_give_the_same_reply_however_one_came_there(terminal):
    def last():
        return terminal.messages()[-1]["content"]

    for line in ("/model random", "/set temperature 1", "/set min_p 0", "/set max_new_tokens 12", "/set seed 7",
                 "Hello", "More"):
        terminal.say(line)
    (terminal.folder / "seeded.jsonl").write_text(json.dumps({"messages": terminal.messages()}))
    said = last()
    terminal.say("/retry")
    again = last()
    assert again != said
    terminal.say("/undo")
    terminal.say("More")
    assert last() == said
    terminal.say("/retry")
    assert last() == again
    for line in ("/new", "/load seeded.jsonl", "/undo", "More"):
        terminal.say(line)
    assert last() == said


def test_save_and_load(terminal):
    file = terminal.folder / "my chats.jsonl"
    terminal.say("/system Be brief.")
    terminal.say("Hällo, 漢字!")
    shown = terminal.say(f"/save {file.name}")
    assert ": 1; to learn from them: " in " ".join(shown.split())
    terminal.say("Another")
    assert ": 2; to learn" in " ".join(terminal.say(f"/save {file.name}").split())
    terminal.say("/new")
    shown = terminal.say(f"/load {file.name} 1")
    assert "System message: Be brief." in shown and "> Hällo, 漢字!" in shown and "seventeen" in shown
    assert [m["content"] for m in terminal.messages()[:2]] == ["Be brief.", "Hällo, 漢字!"]
    terminal.say(f"/load {file.name}")
    assert len(terminal.messages()) == 5
    terminal.say("Goes on")
    assert len(terminal.messages()) == 7
    assert "has no more than 2" in terminal.say(f"/load {file.name} 3")

    loaded = data.load_rows([str(file)], data.Reading(val_fraction=0))  # what is saved can be learnt
    assert len(loaded.train) == 2
    assert messages_of(loaded.train[0].ids)[0] == {"role": "system", "content": "Be brief."}


def test_save_spoils_no_other_file(terminal):
    file = terminal.folder / "notes.txt"
    file.write_text("precious")
    terminal.say("Hello")
    assert "notes.txt:1 is no conversation" in terminal.say("/save notes.txt")
    assert file.read_text() == "precious"
    assert "is not a file" in terminal.say("/save .")
    assert "Name a file" in terminal.say("/save")
    assert "No such file or directory" in terminal.say("/save no/such/folder.jsonl")
    file.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}')
    assert "notes.txt: 2" in terminal.say("/save notes.txt")  # its last line had no end
    for name, content in (("one.json", f"[{file.read_text().splitlines()[0]}]".encode()),
                          ("lines.jsonl.gz", gzip.compress(file.read_bytes()))):
        (terminal.folder / name).write_bytes(content)
        assert "name a .jsonl file" in terminal.say(f"/save {name}")
        assert (terminal.folder / name).read_bytes() == content
        terminal.say(f"/load {name}")


def test_save_names_a_command_that_goes_on_from_this_model(terminal):
    terminal.say("Hello")
    shown = " ".join(terminal.say("/save my chats.jsonl").split())
    assert re.search(r"uv run sft\.py --model runs/\w+ --data 'my chats\.jsonl' --out runs/mine", shown)
    cfg = command_shown(shown, "sft")
    rows = len((terminal.folder / "my chats.jsonl").read_text().splitlines())
    assert cfg.lora_rank > 0 and cfg.data == ("my chats.jsonl",) and 0 <= cfg.steps * cfg.batch_size - 3 * rows < 4


def test_load_of_an_empty_list(terminal):
    (terminal.folder / "none.json").write_text("[]")
    assert "none.json has no more than 0" in terminal.say("/load none.json")


@pytest.mark.parametrize("text", [
    "", "nonsense", '{"messages": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}', "[" * 5000, "\x00",
    '{"messages": [{"role": "king", "content": "a"}]}', '"\\ud800"', '{"prompt": "a", "chosen": "b", "rejected": "c"}'])
def test_load_refuses_what_is_no_conversation(terminal, text):
    (terminal.folder / "bad.jsonl").write_text(text)
    shown = " ".join(terminal.say("/load bad.jsonl").split())
    assert re.search(r"bad\.jsonl(:1)? (is (no conversation|empty)|begins as a JSON list and is none)", shown)
    assert "Traceback" not in terminal.raw


def test_load_says_what_is_missing(terminal):
    assert "No such file or directory: 'nowhere.jsonl'" in terminal.say("/load nowhere.jsonl")
    assert "Name a file" in terminal.say("/load")


def test_loaded_text_cannot_command_the_terminal(terminal):
    evil = [{"role": "user", "content": "a\x1b]0;title\x07"}, {"role": "assistant", "content": "b\x1b[2J\u202e"}]
    (terminal.folder / "evil.jsonl").write_text(json.dumps({"messages": evil}))
    shown = terminal.say("/load evil.jsonl")
    assert "a␛]0;title␇" in shown and "b␛[2J<U+202E>" in shown
    assert "\x1b]0" not in terminal.raw and "\x1b[2J\u202e" not in terminal.raw


def test_stats(terminal):
    terminal.say("Hello")
    shown = terminal.say("/stats")
    assert "[runs/dpo]" in shown and "2 layers, 64 wide" in shown and re.search(r"(fp32|bf16) on cpu", shown)
    assert re.search(r"exchanges: 1, in the context: \d+ of 1,024 tokens", shown)
    assert re.search(r"last reply: \d+ tokens in", shown)


def test_compare(terminal):
    terminal.say("Hello")
    assert "(answering: runs/dpo, runs/sft)" in terminal.say("/compare runs/sft")
    shown = terminal.say("Again")
    labels, *rows = shown[shown.index("[runs/dpo]"):shown.rindex("\n\n")].split("\n")
    assert re.fullmatch(r"\[runs/dpo\] {27} \| \[runs/sft\]", labels)  # 80 // 2 - 3 = 37 columns each
    left, right = (" ".join(cells).split() for cells in zip(*(row.ljust(40).split(" | ") for row in rows), strict=True))
    assert "seventeen!" in left and "seventeen." in right and not {"seventeen!", "|"} & set(right)
    file = terminal.folder / "both.jsonl"
    terminal.say(f"/save {file.name}")
    saved = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert len(saved) == 2 and saved[0][:3] == saved[1][:3] and saved[0][3] != saved[1][3]
    assert "(answering: runs/dpo)" in terminal.say("/compare")


def test_compare_in_a_narrow_terminal_is_one_below_the_other(terminal):
    terminal.say("/compare runs/sft")
    terminal.resize(30)
    shown = terminal.say("Hello")
    assert re.search(r"\[runs/dpo\]\n.*seventeen!.*\n\[runs/sft\]\n.*seventeen\.", shown, re.S) and "|" not in shown


def test_compare_refuses_what_is_no_model(terminal):
    terminal.say("Hello")
    assert "no model in 'runs/nothing'" in terminal.say("/compare runs/sft runs/nothing")
    assert "damaged" in terminal.say("/compare damaged")
    assert len(terminal.messages()) == 2
    assert "[runs/sft]" not in terminal.say("Again")


# ---- votes and corrections -----------------------------------------------------------------------


def preferences(terminal, name="preferences.jsonl"):
    return [json.loads(line) for line in (terminal.folder / name).read_text().splitlines()]


def command_shown(shown, stage):
    """The command that is suggested, as its script understands it."""
    import dpo
    import sft

    script = {"dpo": dpo, "sft": sft}[stage]
    words = re.search(rf"uv run {stage}\.py (.*?)\)", " ".join(shown.split()))[1]
    return data.command_line(script.Config, script.PRESETS, shlex.split(words))


def test_prefer_after_compare(terminal):
    import dpo

    terminal.say("/compare runs/sft")
    terminal.say("Hello")
    shown = " ".join(terminal.say("/prefer right").split())
    assert "(preferred: right; left is runs/dpo, right is runs/sft)" in shown
    assert "runs/sft against runs/dpo: 1 won, 0 lost, 0 tied; win rate 100%, 95% interval 21% to 100%" in shown
    row, = preferences(terminal)
    assert row["prompt"] == [{"role": "user", "content": "Hello"}]
    assert "seventeen." in row["chosen"][0]["content"] and "seventeen!" in row["rejected"][0]["content"]
    assert (row["models"], row["vote"], row["blind"]) == (["runs/sft", "runs/dpo"], "right", False)
    cfg = command_shown(shown, "dpo")
    assert (cfg.model, cfg.data, cfg.steps * cfg.batch_size) == ("runs/dpo", ("preferences.jsonl",), 4)
    assert cfg.lora_rank > 0 and cfg.lr < dpo.PRESETS["sample"]["lr"] and cfg.val_fraction > 0
    assert not (terminal.folder / cfg.out).exists()

    terminal.say("More")  # all go on from the reply that was preferred
    terminal.say("/prefer l")
    assert preferences(terminal)[1]["prompt"] == [*row["prompt"], *row["chosen"], {"role": "user", "content": "More"}]
    assert [m["content"] for m in terminal.messages()[1::2]] == [
        row["chosen"][0]["content"], preferences(terminal)[1]["chosen"][0]["content"]]
    loaded = data.load_pairs([str(terminal.folder / "preferences.jsonl")], data.Reading(val_fraction=0))
    assert len(loaded.train) == 2


def test_prefer_alone_shows_both_and_asks(terminal):
    terminal.say("/compare runs/sft")
    terminal.say("Hello")
    shown = terminal.say("/prefer")
    assert re.search(r"\[runs/dpo\] {27} \| \[runs/sft\]\n", shown) and "left, right or neither?" in shown
    assert "(preferred: neither; left is runs/dpo, right is runs/sft)" in terminal.say("nei")  # behind "/prefer "
    row, = preferences(terminal)
    assert row["chosen"] == row["rejected"] and row["other"] != row["chosen"] and row["vote"] == "neither"
    with pytest.raises(ValueError, match=r"no preferences are left of .*: identical replies 1"):
        data.load_pairs([str(terminal.folder / "preferences.jsonl")])
    terminal.say("Hello")
    terminal.say("/prefer")
    assert "(preferred: neither" in terminal.say("/prefer nei"), "typed once more, behind the one that stands there"


def test_prefer_after_retry_shows_both_again(terminal):
    terminal.say("Hello")
    before = terminal.messages()[1]
    terminal.say("/set max_new_tokens 4")
    terminal.say("/retry")
    now = terminal.messages()[1]
    shown = terminal.say("/prefer left")
    assert re.search(r"\[left: before\] +\| \[right: now\]\n", shown) and "(preferred: left)" in shown
    row, = preferences(terminal)
    assert (row["chosen"], row["rejected"], row["models"]) == ([before], [now], ["runs/dpo"] * 2)
    assert terminal.messages()[1] == before  # the conversation goes on from it
    assert "against" not in shown


def test_prefer_needs_two_replies_to_one_conversation(terminal):
    nothing = "There are no two replies to choose from"
    assert nothing in terminal.say("/prefer left")
    terminal.say("Hello")
    assert nothing in terminal.say("/prefer left")
    terminal.say("/retry")
    assert "'both' is no vote; it is left, right or neither." in terminal.say("/prefer both")
    terminal.say("/undo")
    assert nothing in terminal.say("/prefer left")
    terminal.say("/compare runs/sft random")
    terminal.say("/set max_new_tokens 20")
    terminal.say("Hello")
    assert nothing in terminal.say("/prefer left")  # of three
    terminal.say("/compare runs/sft")
    terminal.say("/new")
    terminal.say("One")
    terminal.say("Two")
    assert "went different ways" in " ".join(terminal.say("/prefer left").split())
    terminal.say("/system Be brief.")
    assert nothing in terminal.say("/prefer left")
    assert not (terminal.folder / "preferences.jsonl").exists()


def test_of_two_equal_replies_none_wins(terminal):
    terminal.say("/compare runs/sft")
    terminal.say("/set max_new_tokens 5")
    terminal.say("Hello")
    shown = " ".join(terminal.say("/prefer right").split())
    assert "(preferred: neither, they are the same;" in shown and "0 won, 0 lost, 1 tied" in shown


def test_a_command_ends_at_any_white_space_and_takes_what_it_says(terminal):
    terminal.say("/set\x1b\rmax_new_tokens 4")
    assert "max_new_tokens 4" in " ".join(terminal.say("/set").split()).replace("  ", " ")
    terminal.say("Hello")
    before = terminal.messages()
    for line in ("/new What is this?", "/undo 2", "/retry shorter", "/bye now"):
        assert "stands alone; nothing was done" in " ".join(terminal.say(line).split())
    assert terminal.messages() == before
    file = terminal.folder / "zero.jsonl"
    file.write_text(json.dumps({"messages": turns(1)}) + "\n")
    assert f"{file} 0" in "".join(terminal.say(f"/load {file} 0").split("\n")) and terminal.messages() == before


def test_prefer_spoils_no_other_file(terminal):
    path = terminal.folder / "preferences.jsonl"
    for content in ("precious", json.dumps({"messages": turns(1)})):
        path.write_text(content)
        terminal.say("Hello")
        terminal.say("/retry")
        assert "preferences.jsonl:1: " in terminal.say("/prefer left")
        assert path.read_text() == content
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))  # somebody else's, without an end
    assert "pairs in preferences.jsonl: 1;" in terminal.say("/prefer left")  # the retry said the same again
    assert len(preferences(terminal)) == 2


def test_correct(terminal):
    assert "There is no reply yet." in terminal.say("/correct")
    terminal.say("Hello")
    wrong = terminal.messages()[1]
    terminal.say("/correct")
    terminal.see("seventeen!")
    shown = terminal.say("\x15It is right.")  # Ctrl-U empties the line
    assert terminal.messages()[1]["content"] == "It is right."
    row, = preferences(terminal)
    assert row["chosen"] == [terminal.messages()[1]] and row["rejected"] == [wrong]
    assert row["models"] == ["you", "runs/dpo"] and row["vote"] == "correction" and "against" not in shown
    assert command_shown(shown, "dpo").data == ("preferences.jsonl",)
    terminal.say("/retry")
    terminal.say("/prefer left")
    assert preferences(terminal)[1]["models"] == ["you", "runs/dpo"] and terminal.messages()[1] == row["chosen"][0]
    for line in ("Hello", "/model runs/sft", "/retry", "/prefer left"):
        terminal.say(line)
    assert preferences(terminal)[2]["models"] == ["runs/dpo", "runs/sft"]


def test_a_correction_given_up_leaves_all_as_it_was(terminal):
    terminal.say("Hello")
    before = terminal.messages()
    for keys in ("", "\x03"):
        terminal.say("/correct")
        terminal.see("seventeen!")
        terminal.press(keys)
        terminal.say("" if not keys else "/stats")  # sent as it is; or emptied, and something else
    assert terminal.messages() == before and not (terminal.folder / "preferences.jsonl").exists()


def test_a_blind_vote(programs):
    """Until the vote nothing names a model; what an earlier chat had not saved is offered at the start."""
    blind = programs["blind"]
    shown = " ".join(blind.see(PROMPT).split())
    assert "The two answer unnamed" in shown and "exchanges that were not saved: 1; /load" in shown
    assert "Offered back." in blind.say("/load") and "\x1b[2J?" not in blind.raw
    blind.say("/new")
    blind.say("/set temperature 0")
    blind.say("/set verbose on")
    shown = blind.say("Hello") + blind.say("\x15/stats") + blind.say("/prefer") + blind.say("\x15/why")
    assert re.search(r"\[left\] +\| \[right\]", shown) and shown.count("Vote first") == 2
    assert "runs/" not in shown and "parameters" not in shown and "a second" not in shown
    shown = " ".join(blind.say("/prefer right").split())
    row, = preferences(blind, "blind.jsonl")
    mark = {"runs/sft": "seventeen.", "runs/dpo": "seventeen!"}
    assert row["blind"] is True and mark[row["models"][0]] in row["chosen"][0]["content"]
    assert f"left is {row['models'][1]}, right is {row['models'][0]}" in shown
    assert re.search(r"runs/dpo against runs/sft: [01] won, [01] lost, 0 tied", shown)
    assert command_shown(shown, "dpo").model == "runs/dpo"
    sides = []
    for _ in range(12):
        blind.say("/new")
        blind.say("Hello")
        blind.say("l")
        sides.append(tuple(preferences(blind, "blind.jsonl")[-1]["models"]))
    assert len(set(sides)) == 2  # dealt out anew each time: 1 in 2,000 that they are all alike
    assert "(answering: runs/sft)" in blind.say("/model runs/sft")
    assert "[left]" not in blind.say("Hello")


def test_unsaved_talk_is_in_a_private_file_until_it_is_saved(terminal):
    def files():
        return [file for file in (terminal.folder / "state/gpt2-chat").glob("unsaved-*.jsonl")
                if "A secret 漢" in file.read_text()]

    terminal.say("A secret 漢")
    file, = files()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["user", "assistant"]
    terminal.messages()  # saves it
    assert not files()
    terminal.say("More")
    assert files()
    terminal.say("/new")
    assert not files()


# ---- under the bonnet ----------------------------------------------------------------------------


def test_why(terminal):
    assert "There is no reply yet." in terminal.say("/why")
    terminal.say("Hello")
    shown = terminal.say("/why")
    first, second = shown.split("[log pi - log pi_ref, the reference being runs/sft]")
    assert "\x1b[38;5;16;48;5;33m!" in terminal.raw  # what only this model says stands on blue
    assert "\x1b[38;5;16;48;5;208m" in terminal.raw  # and the legend has orange
    assert "[runs/dpo: log pi, how likely it finds each word]" in first and "[end]" in first
    assert first.count("%, nearly ") == 3 and "under 1%" in first
    assert second.count("%, was ") == 3 and "over 10 times as likely" in " ".join(second.split())
    total, beta, again, reward = re.search(
        r"summed up: ([+-][\d.]+); times beta, DPO's implicit reward: ([\d.]+) x (-?[\d.]+) = ([+-][\d.]+)",
        " ".join(second.split())).groups()
    assert float(total) == float(again) and float(beta) == 0.5
    assert float(reward) == pytest.approx(0.5 * float(total), abs=0.01)
    import model

    gpts = [model.GPT.from_pretrained(terminal.folder / "runs" / name) for name in ("dpo", "sft")]
    dpo, sft = (sum(word.logp for word in chat.judged(gpt, terminal.messages(), 1024)) for gpt in gpts)
    assert float(total) == pytest.approx(dpo - sft, rel=0.02)  # the program may compute in bf16


def test_why_of_ones_own_text(terminal):
    terminal.say("Hello")
    reply = terminal.messages()
    terminal.press("\x1b[200~/why one \x9b31m\u202e 漢\nfour\x1b[201~")
    terminal.see("four")
    shown = " ".join(terminal.say("").split())
    assert "one <U+009B>31m<U+202E> 漢\u23ce four [end]" in shown
    assert not re.search("[\x9b\u202e]", terminal.raw.partition("log pi")[2])
    assert terminal.messages() == reply


def test_why_compares_what_a_run_has_become_with_what_it_began_from(terminal):
    terminal.say("/model runs/sft")
    terminal.say("/compare runs/dpo")
    terminal.say("Hello")
    shown = " ".join(terminal.say("/why").split())
    assert "[runs/dpo: log pi" in shown and "the reference being runs/sft" in shown and "times beta" in shown
    terminal.say("/compare random")
    shown = " ".join(terminal.say("/why Hello").split())
    assert "[runs/sft: log pi" in shown and "the reference being random" in shown and "times beta" not in shown
    terminal.say("/compare")
    terminal.say("/model endless")
    assert "log pi_ref" not in terminal.say("/why Hello")  # no run here has made it


# ---- other models, other texts -------------------------------------------------------------------


def test_model_goes_on_with_another(terminal):
    terminal.say("Hello")
    assert "(answering: runs/dpo)" in terminal.say("/model")
    assert "(answering: runs/sft)" in terminal.say("/model runs/sft/")
    assert "seventeen." in terminal.say("Again")
    assert len(terminal.messages()) == 4
    assert "no model in 'runs/nothing'" in terminal.say("/model runs/nothing")
    assert "damaged" in terminal.say("/model damaged")
    assert "(answering: runs/sft)" in terminal.say("/model")


def test_models(terminal):
    shown = " ".join(terminal.say("/models").split())
    assert "runs/begun sft of gpt2 on a, not finished runs/dpo dpo of runs/sft on mine.jsonl" in shown
    assert "runs/sft sft of sample on sample sample the bundled base model gpt2 OpenAI's" in shown


def test_verbose(terminal):
    terminal.say("/set verbose")
    assert re.search(r"\(\d+ tokens in [\d.]+ s, [\d,]+ a second, the first after [\d.]+ s\)", terminal.say("Hello"))
    assert "verbose             on" in terminal.say("/set")
    assert "verbose is on or off, not 'loud'." in terminal.say("/set verbose loud")
    terminal.say("/set max_new_tokens 3")
    assert "(cut off: max_new_tokens is 3; 3 tokens in" in terminal.say("Hello")
    terminal.say("/compare runs/sft")
    assert terminal.say("Hello").count("tokens in") == 2
    terminal.say("/set verbose off")
    assert "tokens in" not in terminal.say("Hello")


def test_blocks_in_three_quotes(terminal):
    terminal.press('"""/set seed 1\r')
    terminal.press("two\r")
    terminal.say('"""')
    assert terminal.messages()[0]["content"] == "/set seed 1\ntwo"
    terminal.press('/system """Be\r')
    assert "(system message: Be\nbrief.)" in terminal.say('brief."""')
    terminal.say("/system -")
    terminal.say('What does """ mean?')
    assert terminal.messages()[2]["content"] == 'What does """ mean?'


def test_read_puts_a_file_into_the_prompt(terminal):
    (terminal.folder / "notes.md").write_bytes("\ufeff/etc is a folder.\r\nTurned \u202e \x9b2J.\n".encode())
    terminal.say("/read notes.md")
    terminal.see("Turned")
    terminal.say("What is /etc?")
    assert not re.search("[\u202e\x9b]", terminal.raw)
    assert terminal.messages()[0]["content"] == "/etc is a folder.\nTurned \u202e \x9b2J.\n\nWhat is /etc?"
    (terminal.folder / "long.txt").write_text("word " * 2000)
    (terminal.folder / "longer.txt").write_text("word " * 400_000)
    assert "long.txt is too long: 2,00" in " ".join(terminal.say("/read long.txt").split())
    assert "longer.txt is too long: 2,000,000 bytes" in " ".join(terminal.say("/read longer.txt").split())
    assert "No such file or directory: 'nowhere.md'" in terminal.say("/read nowhere.md")
    (terminal.folder / "blank.txt").write_text(" \n\n")
    assert "blank.txt has no text in it." in terminal.say("/read blank.txt")


def test_what_is_typed_before_ctrl_c_is_not_lost(endless):
    endless.press("Hello\r")
    endless.see(r"\[endless\]")
    endless.see("seventeen")
    endless.press("a thought meanwhile")
    endless.see("seventeen")
    endless.press("\x03")
    endless.see(r"\(stopped\)")
    endless.see(PROMPT)
    endless.see("a thought meanwhile")
    endless.press("\x03")


def test_the_tokens_in_the_prompt_are_those_of_the_conversation(terminal):
    def tokens():
        return int(re.findall(r"\((\d+) of 1,024 tokens\)", ESCAPES.sub("", terminal.raw + terminal.see("tokens")))[-1])

    terminal.press("First\r")
    terminal.see("seventeen")
    terminal.see("or /help ")
    first = int(re.search(r"\((\d+) of", terminal.see("1,024 tokens"))[1])
    assert first == len(data.render(terminal.messages())[0])
    terminal.see("1,024 tokens")
    terminal.say("Second")
    terminal.see("1,024 tokens")
    terminal.press("/undo\r")
    terminal.see("taken back")
    assert int(re.search(r"\((\d+) of", terminal.see("1,024 tokens"))[1]) == first


def test_system_says_so_when_the_model_never_met_one(terminal):
    shown = " ".join(terminal.say("/system Be brief.").split())
    assert "(no conversation that runs/dpo learnt from had one, so little will come of it)" in shown
    terminal.say("/model endless")  # of which nothing is known
    assert "learnt from" not in terminal.say("/system Be brief.")


def test_help_has_the_names_known_elsewhere(terminal):
    shown = " ".join(terminal.say("/help").split())
    assert all(f"{alias} for {name}" in shown for alias, name in chat.ALIASES.items())
    assert "Also: /regen" in terminal.say("/help retry")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_every_screen_fits_the_window(terminal, columns):
    terminal.resize(columns)
    (terminal.folder / "talk.jsonl").write_text(json.dumps({"messages": turns(2)}))
    lines = ["Hello", "/retry", "/prefer left", "/why", "/why " + "words " * 20, "/help", "/help why", "/models",
             "/stats", "/set", "/set verbose", "/system Be brief.", "/model nothing/of/this/name", "/load talk.jsonl",
             "/model", "/compare runs/sft", "Again", "/prefer", "right", "/why", "/save talk.jsonl", "/undo",
             "/read nowhere"]
    for line in lines:
        terminal.say(line)
        behind_the_prompt = terminal.raw.partition("\x1b[?2004l")[2]
        shown = ESCAPES.sub("", behind_the_prompt).replace("\r", "").splitlines()
        assert max(map(chat.cell_len, shown), default=0) <= columns, f"{line}:\n" + "\n".join(shown)


def test_every_screen_is_harmless(terminal):
    """Of a model that says what steers terminals."""
    terminal.say("/model hostile")
    terminal.say("/set max_new_tokens 60")
    for line in ("Hello", "/retry", "/prefer left", "/why", "/correct", " and more", "/compare runs/sft", "Again",
                 "/prefer", "right", "/why"):
        terminal.say(line)
        shown = terminal.raw.partition("\x1b[?2004l")[2]
        assert not re.search("[\x07\x9b\u202e]|\x1b\\[31m bell", shown), line


# ---- typing --------------------------------------------------------------------------------------


def test_a_slash_shows_the_commands(terminal):
    terminal.press("/")
    menu = terminal.see("/system .*tell the model")
    assert "/help" in menu and "all commands" in menu
    terminal.say("\x15")


def test_tab_completes_commands(terminal):
    terminal.press("/ret")
    terminal.see("answered again")
    terminal.press("\t")
    assert "Nothing has been said yet" in terminal.say("")


def test_tab_completes_settings_and_files(terminal):
    terminal.press("/set max")
    terminal.see("max_new_tokens")
    terminal.press("\t")
    assert "(max_new_tokens 250)" in terminal.say(" 250")
    (terminal.folder / "unmistakable.jsonl").write_text("")
    terminal.press("/load unmis")
    terminal.see("unmistakable.jsonl")
    terminal.press("\t")
    assert "unmistakable.jsonl is empty" in terminal.say("")


def test_an_outgrown_context_is_said_once_and_the_chat_goes_on(terminal):
    filler = json.dumps({"messages": turns(40, words=6)})
    (terminal.folder / "long.jsonl").write_text(filler)
    terminal.say("/load long.jsonl")
    shown = " ".join(terminal.say("And now?").split())
    assert "outgrown the 1,024 tokens" in shown and "no longer sees the oldest exchanges" in shown
    assert "outgrown" not in terminal.say("And then?")
    assert len(terminal.messages()) == 84  # what is saved is whole


def test_a_message_too_long_is_refused_and_the_chat_goes_on(terminal):
    terminal.press("\x1b[200~" + "word " * 1200 + "\x1b[201~")
    shown = " ".join(terminal.say("").split())
    assert re.search(r"Not sent: the message takes 1,20\d tokens, and the model reads 1,024 at once", shown)
    terminal.say("Hello")
    assert len(terminal.messages()) == 2


def test_a_resized_window_is_filled(terminal):
    terminal.resize(30)
    narrow = terminal.say("Hello").split("Hello")[-1]
    terminal.resize(120)
    wide = terminal.say("Hello").split("Hello")[-1]
    assert max(map(len, narrow.splitlines())) <= 30 < max(map(len, wide.splitlines())) <= 120


def test_a_window_resized_during_a_reply(endless):
    endless.press("Hello\r")
    endless.see(r"\[endless\]")
    endless.see("seventeen")
    endless.child.setwinsize(24, 40)
    endless.see("seventeen")
    rest = endless.see(PROMPT).splitlines()[2:-3]
    assert len(rest) > 10 and max(map(len, rest)) <= 40


def test_history_file(terminal):
    terminal.say("a question to remember")
    file = terminal.folder / "state/gpt2-chat/history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert "+a question to remember" in file.read_text()


# ---- in other terminals --------------------------------------------------------------------------


def test_no_colour_where_none_is_wanted(plain):
    terminal = plain
    assert "hostile. /help" in terminal.greeting and not COLOURS.search(terminal.raw)
    for line in ("Hello", "/help", "/zzz", "/load evil.jsonl"):
        terminal.say(line)
        assert not COLOURS.search(terminal.raw)


def test_numbers_where_no_colour_is_wanted(plain):
    terminal = plain
    terminal.say("Hi")
    shown = terminal.say("/why")
    assert not COLOURS.search(terminal.raw) and "-0.69 is a half" in " ".join(shown.split())
    assert re.search(r" smile\([+-]\d+\.\d\d\)", " ".join(shown.split()))
    assert max(map(chat.cell_len, shown.splitlines())) <= 40


def test_a_narrow_terminal_and_hostile_text(plain):
    terminal = plain
    terminal.say("/new")
    shown = terminal.say("Hi").split("Hi", 1)[1]
    lines = shown.splitlines()
    assert max(map(chat.cell_len, lines)) <= 40 and any("漢字" in line for line in lines)
    said = terminal.raw.replace("\x1b[?2004h", "").split("\x1b[?2004l")[1]
    assert not set(re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", said))
    assert "␛[31m bell ␇ turned" in " ".join(said.split())


def test_a_very_narrow_terminal(plain):
    terminal = plain
    terminal.resize(12)
    shown = terminal.say("Hi").split("Hi", 1)[1]
    assert max(map(chat.cell_len, shown.splitlines())) <= 12
    terminal.resize(40)


def test_ctrl_c_twice_leaves(plain):
    terminal = plain
    terminal.press("\x03")
    terminal.see(PROMPT)
    terminal.press("\x03")
    assert terminal.leave() == 0


def test_a_locale_without_utf8(programs):
    terminal = programs["ascii"]
    terminal.see(PROMPT)
    shown = terminal.say("Grüße 漢字")
    assert "smile ? wide ???? tab" in shown and "?[31m bell ? turned <U+202E>" in " ".join(shown.split())
    assert terminal.messages()[0]["content"] == "Grüße 漢字"


def test_ctrl_d_leaves(programs):
    terminal = programs["ascii"]
    terminal.say("Hello")
    terminal.press("\x04")
    assert terminal.leave() == 0
    assert "(not saved; the next chat offers it back)" in terminal.raw


def test_a_dumb_terminal_and_compare_from_the_start(programs):
    terminal = programs["dumb"]
    assert "runs/sft, runs/dpo. /help" in terminal.see(DUMB_PROMPT)
    terminal.press("Hello\r")
    shown = terminal.see(r"\[runs/dpo\]") + terminal.see("seventeen!")
    assert "[runs/sft]" in shown
    terminal.press("/bye\r")
    assert terminal.leave() == 0
    assert "\x1b[" not in terminal.raw.replace("\x1b[?7h", "")


def test_a_damaged_model_ends_in_a_few_words(programs):
    terminal = programs["damaged"]
    terminal.press("Hello\r")
    assert terminal.leave() == 2
    assert "damaged" in terminal.raw and "Traceback" not in terminal.raw


# ---- without a terminal --------------------------------------------------------------------------


def test_a_prompt_gives_the_reply_and_nothing_else(piped):
    code, out, err = piped["prompt"]
    assert (code, err) == (0, "") and re.fullmatch(r"(\w+\.? )+\w+\.?\n", out)


def test_a_pipe_is_one_prompt(piped):
    code, out, err = piped["pipe"]
    assert code == 0 and out.endswith("\n") and "?[31m bell ? turned <U+202E>" in out and "\ttab" not in out
    assert "tab\there" in out and err in ("", "(cut off: max_new_tokens is 256)\n")


def test_compare_without_a_terminal(piped):
    code, out, err = piped["compare"]
    assert code == 0 and re.fullmatch(r"\[runs/sft\]\n.+\n\n\[runs/dpo\]\n.+\n", out)
    assert err == "(cut off: max_new_tokens is 3)\n" * 2


def test_words_are_a_prompt_with_what_comes_through_a_pipe(piped, folder):
    code, out, err = piped["words"]
    assert code == 0 and re.fullmatch(r"(\w+\.? )+\w+\.?\n", out)
    assert re.fullmatch(r"\(\d+ tokens in [\d.]+ s, [\d,]+ a second, the first after [\d.]+ s\)\n", err)
    prompt = data.render([{"role": "user", "content": "What is this?\n\nA note."}], reply=True)[0]
    said = len(data.tokenizer().encode_ordinary(" " + out.strip()))
    assert len(prompt) + said == 60 + 1  # it ends in the place of 60, which the token before, at 60, predicts


def test_blind_votes_through_a_pipe(piped, folder):
    code, out, err = piped["blind"]
    assert (code, err) == (0, ""), err
    rows = [json.loads(line) for line in (folder / "piped.jsonl").read_text().splitlines()]
    assert [row["vote"] for row in rows] == ["left", "right", "neither"] and "4 of 4" in out
    assert [row["prompt"][0]["content"] for row in rows] == ["One?", "Two \x1b[31m?", "Three\x07?"]
    parts = re.split(r"\d of 4\n", out)[1:]
    mark = {"runs/sft": ".", "runs/dpo": "!"}
    for row, part in zip(rows, parts, strict=False):
        left, right = row["models"] if row["vote"] != "right" else row["models"][::-1]
        hidden, told = part.split("left, right or neither? ")
        shown = re.search(r"\[left\]\n(.*)\n\n\[right\]\n(.*)\n", hidden, re.DOTALL)
        assert f"seventeen{mark[left]}" in shown[1] and f"seventeen{mark[right]}" in shown[2]
        assert f"left is {left}, right is {right}" in told and "runs/" not in hidden
    won = [row["models"][0] for row in rows[:2]].count("runs/dpo")
    assert f"(runs/dpo against runs/sft: {won} won, {2 - won} lost, 1 tied; win rate " in out.splitlines()[-5:][0] + out
    assert "\x1b" not in out and "\x07" not in out and "Two ␛[31m?" in out
    assert command_shown(out, "dpo").data == ("piped.jsonl",)


def test_a_vote_that_is_none_ends_it_and_keeps_the_others(piped, folder):
    code, out, err = piped["no vote"]
    assert code == 2 and err == "error: 'both' is no vote; it is left, right or neither.\n"
    row, = (json.loads(line) for line in (folder / "no.jsonl").read_text().splitlines())
    assert row["prompt"] == turns(2)[:3]
    assert "> q1 word" in out and "> q0 word" in out  # what was said before is shown


def test_a_question_that_is_too_long_leaves_the_others(piped, folder):
    code, out, err = piped["long question"]
    assert (code, err) == (0, "") and "Not sent: the message takes 1,507 tokens" in out and "2 of 2" in out
    row, = (json.loads(line) for line in (folder / "votes-of-long.jsonl").read_text().splitlines())
    assert row["prompt"] == [{"role": "user", "content": "One?"}] and row["vote"] == "left"


def test_closed_streams_are_empty_ones(piped):
    code, out, err = piped["no one to vote"]
    assert (code, err) == (0, "") and "1 of 4" in out and "2 of 4" not in out
    assert piped["no output"] == (0, "", "")


@pytest.mark.parametrize(("run", "said"), [("no model", "uv run sft.py"), ("wrong model", "no model in 'runs/sfd'"),
                                           ("empty pipe", "nothing to answer"), ("setting", "top_p is 2.0"),
                                           ("blind alone", "--prompts FILE"), ("blind to one", "--blind takes two"),
                                           ("no folder", "there is no folder no/such"),
                                           ("blind to one, twice", "--blind takes two"),
                                           ("votes of another kind", "asked.jsonl:1: keys found: messages"),
                                           ("votes into a folder", "runs is not a file"),
                                           ("words behind", "words stand before --compare"),
                                           ("words and --prompt", "leave out the words What now, or --prompt"),
                                           ("no questions", "no file of questions 'nothing.txt'"),
                                           ("a model as a word", "uv run chat.py --model runs/sft")])
def test_failures_are_short_and_say_what_next(piped, run, said):
    code, out, err = piped[run]
    assert (code, out) == (2, "") and said in err and err.count("\n") <= 5 and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(folder):
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = ['--prompt', 'x', '--model', 'endless']\n"
              "import chat, data; data.run_script(chat.main, chat.Config)")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=environment(folder),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(3)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read().decode() and process.wait(timeout=30) in (0, 141)


def test_interrupting_a_prompt(folder):
    process = subprocess.Popen([*CHAT, "--prompt", "x", "--model", "endless", "--max-new-tokens", "1000"], cwd=folder,
                               env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                               pipesize=4096,  # less than the reply, which so cannot end before it is interrupted
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored after nohup
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out.endswith(b"\n") and b"Traceback" not in err


def test_sigterm_gives_the_terminal_back(folder):
    import termios

    talk = Terminal(folder, "--model", "endless")
    talk.see(PROMPT)
    talk.child.kill(signal.SIGTERM)
    talk.child.expect(pexpect.EOF)
    assert termios.tcgetattr(talk.child.child_fd)[3] & termios.ECHO and "Traceback" not in talk.raw
    talk.child.close()
    assert talk.child.exitstatus == 143


def test_help_needs_no_torch():
    code = ("import sys; sys.argv = ['chat.py', '--help']; import chat, data\n"
            "try: data.run_script(chat.main, chat.Config)\n"
            "except SystemExit: print('torch' in sys.modules, 'prompt_toolkit' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False False\n") and all(f"--{name.replace('_', '-')}" in shown for name in chat.SETTINGS)
