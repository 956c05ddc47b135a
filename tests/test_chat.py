"""chat.py as a person meets it: its pure parts, then the real program in a pseudo-terminal, in pipes, and failing.

The models here recite: their next token depends on the position alone, so every reply is known. Starting the program
costs seconds of importing torch, so a few programs are started once, together, and asked many things.
"""

import gzip
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import terminals
from readback import messages_of

import chat
import data

pexpect = pytest.importorskip("pexpect", reason="pseudo-terminals need Unix")
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
    os.utime(folder / "runs/sft/model.safetensors", (1, 1))
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
    started = {
        "main": Terminal(folder, "--temperature", "0"),
        "plain": Terminal(folder, "--model", "hostile", "--max-new-tokens", "90", columns=40, NO_COLOR="1"),
        "ascii": Terminal(folder, "--model", "hostile", "--max-new-tokens", "90", LC_ALL="POSIX", PYTHONUTF8="0",
                          PYTHONCOERCECLOCALE="0"),
        "dumb": Terminal(folder, "--compare", "runs/sft", "runs/dpo", prompt=DUMB_PROMPT, TERM="dumb"),
        "damaged": Terminal(folder, "--model", "damaged"),
    }
    yield started
    for terminal in started.values():
        terminal.child.close(force=True)


@pytest.fixture(scope="session")
def greeting(programs):
    return programs["main"].see(PROMPT)


@pytest.fixture
def terminal(programs, greeting):
    """The main program, as if it had just been started."""
    terminal = programs["main"]
    terminal.resize(80)
    settings = ("temperature 0", "min_p 0.05", "max_new_tokens 256", "seed none")
    back = {"/compare": ["/compare"], "/system": ["/system -"], "/set": [f"/set {setting}" for setting in settings]}
    for line in ["/new", *(line for command in terminal.said & set(back) for line in back[command])]:
        terminal.say(line)
    terminal.said.clear()
    return terminal


@pytest.fixture(scope="session")
def piped(folder):
    """Runs without a terminal, started side by side: {name: (exit code, standard output, standard error)}."""
    def start(*args, given=None, cwd=folder, **env):
        process = subprocess.Popen([*CHAT, *args], cwd=cwd, env=environment(folder, **env), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if given is not None:
            process.stdin.write(given)
            process.stdin.close()
        return process

    (folder / "empty").mkdir()
    processes = {
        "prompt": start("--prompt", "Hello", "--model", "runs/sft"),  # its standard input stays open: it must not wait
        "pipe": start("--model", "hostile", given="\ufeffhällo\nzwei\n".encode(), LC_ALL="POSIX", PYTHONUTF8="0",
                      PYTHONCOERCECLOCALE="0"),
        "compare": start("--compare", "runs/sft", "runs/dpo", "--max-new-tokens", "3", "--prompt", "Hello"),
        "empty pipe": start(given=b" \n"),
        "no model": start("--prompt", "Hello", cwd=folder / "empty"),
        "wrong model": start("--prompt", "Hello", "--model", "runs/sfd"),
        "setting": start("--prompt", "Hello", "--top-p", "2"),
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
    return [m for i in range(count) for m in ({"role": "user", "content": f"q{i} " + "word " * words},
                                              {"role": "assistant", "content": f"a{i} " + "word " * words})]


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


@pytest.mark.parametrize("setting", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0},
                                     {"top_p": 1.1}, {"min_p": 2}, {"repetition_penalty": 0}, {"max_new_tokens": 0},
                                     {"seed": -1}])
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


def test_load_of_an_empty_list(terminal):
    (terminal.folder / "none.json").write_text("[]")
    assert "none.json has no more than 0" in terminal.say("/load none.json")


@pytest.mark.parametrize("text", [
    "", "nonsense", '{"messages": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}', "[" * 5000, "\x00",
    '{"messages": [{"role": "king", "content": "a"}]}', '"\\ud800"', '{"prompt": "a", "chosen": "b", "rejected": "c"}'])
def test_load_refuses_what_is_no_conversation(terminal, text):
    (terminal.folder / "bad.jsonl").write_text(text)
    assert re.search(r"bad\.jsonl(:1)? is (no conversation|empty)", " ".join(terminal.say("/load bad.jsonl").split()))
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


def test_no_colour_where_none_is_wanted(programs):
    terminal = programs["plain"]
    assert "hostile. /help" in terminal.see(PROMPT) and not COLOURS.search(terminal.raw)
    for line in ("Hello", "/help", "/zzz", "/load evil.jsonl"):
        terminal.say(line)
        assert not COLOURS.search(terminal.raw)


def test_a_narrow_terminal_and_hostile_text(programs):
    terminal = programs["plain"]
    terminal.say("/new")
    shown = terminal.say("Hi").split("Hi", 1)[1]
    lines = shown.splitlines()
    assert max(map(chat.cell_len, lines)) <= 40 and any("漢字" in line for line in lines)
    said = terminal.raw.replace("\x1b[?2004h", "").split("\x1b[?2004l")[1]
    assert not set(re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", said))
    assert "␛[31m bell ␇ turned" in " ".join(said.split())


def test_a_very_narrow_terminal(programs):
    terminal = programs["plain"]
    terminal.resize(12)
    shown = terminal.say("Hi").split("Hi", 1)[1]
    assert max(map(chat.cell_len, shown.splitlines())) <= 12
    terminal.resize(40)


def test_ctrl_c_twice_leaves(programs):
    terminal = programs["plain"]
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
    terminal.press("\x04")
    assert terminal.leave() == 0


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


@pytest.mark.parametrize(("run", "said"), [("no model", "uv run sft.py"), ("wrong model", "no model in 'runs/sfd'"),
                                           ("empty pipe", "nothing to answer"), ("setting", "top_p is 2.0")])
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


def test_help_needs_no_torch():
    code = ("import sys; sys.argv = ['chat.py', '--help']; import chat, data\n"
            "try: data.run_script(chat.main, chat.Config)\n"
            "except SystemExit: print('torch' in sys.modules, 'prompt_toolkit' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False False\n") and all(f"--{name.replace('_', '-')}" in shown for name in chat.SETTINGS)
