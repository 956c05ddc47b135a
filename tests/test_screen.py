"""Training as a person sees it: the real scripts in a pseudo-terminal, with pyte as the terminal, and in a pipe.

Starting a script costs seconds of importing torch, so a few are started once, all together, and looked at many times.
"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyte
import pytest
from terminals import environment, need_pexpect, pexpect

ROOT = Path(__file__).parents[1]
COLOURS = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38|9[0-7])(?:;\d+)*m")
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"
CHATS = [[{"role": "user", "content": f"What is {i} and {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]
         for i in range(24)]


class Terminal:
    """A script in a terminal of so many rows that nothing scrolls away; `raw` has every byte that came."""

    def __init__(self, *command: str, columns: int = 80, rows: int = 200, cwd: Path, **env: str):
        need_pexpect()
        self.raw = ""
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.Stream(self.screen)
        self.child = pexpect.spawn(sys.executable, [str(ROOT / command[0]), *command[1:]], cwd=cwd, timeout=120,
                                   env=environment(**env), dimensions=(rows, columns), encoding="utf-8",
                                   codec_errors="replace")

    def see(self, pattern) -> None:
        self.child.expect(pattern)
        self._take(self.child.before + (self.child.after if isinstance(self.child.after, str) else ""))

    def _take(self, text: str) -> None:
        self.raw += text
        self.stream.feed(text)

    def resize(self, columns: int) -> None:
        self.screen.resize(columns=columns)
        self.child.setwinsize(self.screen.lines, columns)

    def leave(self) -> int:
        """Wait for the end; the exit code."""
        self.see(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    @property
    def words(self) -> str:
        """The text as if no line had been broken."""
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A folder with conversations, preferences and checks."""
    folder = tmp_path_factory.mktemp("screen")
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    (folder / "pairs.jsonl").write_text("".join(json.dumps({
        "prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": "No idea."}]}) + "\n"
        for chat in CHATS))
    (folder / "checks.jsonl").write_text(json.dumps({"messages": CHATS[3][:1], "facts": ["6"], "group": "sums"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def scenes(place, tiny_model):
    """All scripts that are looked at, started together: {name: Terminal}, each run to its end."""
    args = ("--model", str(tiny_model), "--batch-size", "4", "--steps", "6", "--eval-every", "3", "--save-every", "3",
            "--lr", "1e-2", "--val-fraction", "0.2", "--reply-tokens", "8", "--lora-rank", "2")
    sft = ("sft.py", *args, "--data", "chats.jsonl", "--checks", "checks.jsonl", "--prompts", "What is 3 and 3?")
    dpo = ("dpo.py", *args, "--data", "pairs.jsonl", "--prompts", "What is 3 and 3? | And 4 and 4?")
    long = (*sft[:sft.index("--steps")], "--steps", "100000", *sft[sft.index("--steps") + 2:])
    scenes = {
        "plain": Terminal(*sft, "--out", "plain", cwd=place),
        "narrow": Terminal(*sft, "--out", "narrow", columns=40, cwd=place, NO_COLOR="1", LC_ALL="C", PYTHONUTF8="0",
                           PYTHONCOERCECLOCALE="0"),
        "dumb": Terminal(*sft, "--out", "dumb", cwd=place, TERM="dumb"),
        "preferences": Terminal(*dpo, "--out", "preferences", columns=132, cwd=place),
        "of 60": Terminal(*dpo, "--out", "of 60", columns=60, cwd=place),
        "of 120": Terminal(*dpo, "--out", "of 120", columns=120, cwd=place),
        "stopped": Terminal(*long, "--out", "stopped", cwd=place),
    }
    scenes["stopped"].see("after step 3")
    scenes["stopped"].see("loss")
    scenes["stopped"].resize(60)
    scenes["stopped"].see("after step 6")
    scenes["stopped"].child.sendintr()
    codes = {name: scene.leave() for name, scene in scenes.items()}
    assert codes == dict.fromkeys(scenes, 0) | {"stopped": 130}, \
        "\n".join(scene.text for scene in scenes.values())
    return scenes


@pytest.fixture(scope="module")
def piped(place, tiny_model):
    """Lines of standard output, and of standard error, of a run whose output goes into a pipe."""
    command = [sys.executable, str(ROOT / "sft.py"), "--model", str(tiny_model), "--data", "chats.jsonl",
               "--out", "piped", "--steps", "6", "--log-every", "2", "--eval-every", "3", "--batch-size", "4",
               "--reply-tokens", "8"]
    done = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# ---- before the first step -----------------------------------------------------------------------


def test_the_table_says_what_is_about_to_happen(scenes):
    table = scenes["plain"].words.partition("answering prompts")[0]
    for wanted in (r"model .*parameters, [\d,]+ trained", r"data chats.jsonl: \d+ conversations to train on, \d+ to v",
                   r"steps 6 of 4 conversations, [\d.]+ times the data", r"device \w+, (float32|bfloat16), 1 process",
                   r"memory about [\d.]+ GB at the peak, [\d.]+ GB free", r"folder plain", r"--lora-rank 2",
                   r"--prompts 'What is 3 and 3\?'"):
        assert re.search(wanted, table), f"{wanted} is not in\n{table}"


def test_it_says_something_before_it_loads_anything(scenes):
    assert scenes["plain"].text.startswith("loading ")


def test_the_prompts_are_answered_before_during_and_after(scenes):
    """What is shown at step 6 are the replies after training: they are not answered twice."""
    text = scenes["plain"].text
    places = [text.index(heading) for heading in ("before training:", "after step 3:", "after training:")]
    assert places == sorted(places) and text.count("\nWhat is 3 and 3?") == 3 and "after step 6:" not in text
    assert text.count("========== assistant ==========") == 3


@pytest.mark.parametrize("name, columns", [("narrow", 40), ("of 60", 60), ("plain", 80), ("of 120", 120),
                                           ("preferences", 132)])
def test_nothing_is_wider_than_the_window(name, columns, scenes):
    """Replies too are wrapped once, at words, and for the window; the terminal itself has nothing to break."""
    raw = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", scenes[name].raw.rpartition("after training")[2])
    assert max(len(line) for line in re.split(r"[\r\n]+", raw)) <= columns


def test_the_words_that_became_likelier_are_shaded_or_numbered(scenes):
    for name in ("plain", "preferences"):
        shown = scenes[name].raw.rpartition("made likelier")[2]
        assert re.search(r"\x1b\[38;5;16;48;5;\d+m", shown) and "over 10 times as likely" in scenes[name].words
    numbered = scenes["narrow"].words.rpartition("made likelier")[2]
    assert re.search(r"\([+-]\d+\.\d\d\)", numbered) and "a half" in numbered


# ---- while it trains -----------------------------------------------------------------------------


def test_the_bar_moves_in_place_and_holds_all_that_matters(scenes):
    bars = [line for line in scenes["plain"].text.splitlines() if re.search(r"step +\d+/6", line)]
    assert len(bars) == 1, "one bar, drawn over and over"
    shown = scenes["plain"].words.partition("step 6/6 ")[2].partition("after training")[0]
    for wanted in (r"loss \d", r"val \d", r"lr \d", r"tok/s"):
        assert re.search(wanted, shown), f"{wanted} is not in\n{shown}"


def test_the_bar_of_preferences_has_their_rewards(scenes):
    shown = scenes["preferences"].words
    for wanted in (r"accuracy \d+%", r"margin [+-]\d", r"chosen [+-]\d", r"rejected [+-]\d", r"pairs/s"):
        assert re.search(wanted, shown), f"{wanted} is not in\n{shown}"
    assert "chosen reward may fall below zero" in shown and "Worry when" in shown
    assert "before the first step: val 0.6931" in shown, shown


@pytest.mark.parametrize("name", ["plain", "narrow", "preferences"])
def test_the_bar_fits_the_window(name, scenes):
    """A line of the bar that is wider than the window could not be drawn over: its rests would pile up."""
    assert len(re.findall(r"step +\d+/", scenes[name].text)) == 1, scenes[name].text


def test_the_bar_goes_on_in_another_width(scenes):
    """After the window has shrunk to 60 columns no line is wider."""
    _, _, after = scenes["stopped"].text.partition("after step 6:")
    assert re.search(r"step +\d+/100000", after)
    assert max(map(len, after.splitlines())) <= 60
    assert after.count("/100000") <= 2, "besides the bar, what the terminal's own echo of ^C pushed up"


@pytest.mark.parametrize("name", ["plain", "narrow", "preferences", "stopped"])
def test_the_cursor_comes_back(name, scenes):
    raw = scenes[name].raw
    assert raw.rindex(SHOW_CURSOR) > raw.rindex(HIDE_CURSOR)


# ---- colour, width, locale -----------------------------------------------------------------------


def test_a_terminal_gets_colour(scenes):
    assert COLOURS.search(scenes["plain"].raw)


@pytest.mark.parametrize("name", ["narrow", "dumb"])
def test_no_colour_where_none_is_wanted(name, scenes):
    assert not COLOURS.search(scenes[name].raw)


def test_a_dumb_terminal_gets_no_escapes_at_all(scenes):
    assert "\x1b" not in scenes["dumb"].raw and "trained in" in scenes["dumb"].text


def test_a_narrow_window_breaks_no_word_of_the_last_lines(scenes):
    """And a locale without UTF-8 ends nothing."""
    text = scenes["narrow"].text
    for wanted in ("sums", "validation loss", "next: uv run dpo.py"):
        assert wanted in text, text


# ---- when it is stopped, when it is done ---------------------------------------------------------


def test_ctrl_c_saves_says_so_and_the_same_command_goes_on(scenes, place):
    text = scenes["stopped"].words
    assert "SIGINT: stopping as soon as a checkpoint is saved" in text
    assert (last := re.search(r"stopped after step (\d+) of 100000; run the same command again to go on", text)), text
    assert (place / "stopped" / "checkpoints" / f"step-{int(last[1]):08d}" / "manifest.json").is_file()


@pytest.mark.parametrize("after", [0, 0.3, 0.6])
def test_ctrl_c_outside_the_loop_ends_at_once(place, tiny_model, after):
    """While it loads, PyTorch too: nothing to save, no traceback, and the folder can be used again."""
    scene = Terminal("sft.py", "--model", str(tiny_model), "--data", "chats.jsonl", "--out", "early", cwd=place)
    scene.see("loading PyTorch")
    time.sleep(after)
    scene.child.kill(signal.SIGINT)
    assert scene.leave() == 130 and "Traceback" not in scene.text
    assert not (place / "early" / "checkpoints").exists()


def test_the_last_lines_name_folder_best_figures_and_next_command(scenes):
    for name, following in (("plain", "next: uv run dpo.py"), ("preferences", "next: uv run chat.py --compare")):
        text = scenes[name].words.rpartition("trained in")[2]
        assert re.search(r"\d+ s, [\d.]+ s a step", text), text
        assert re.search(r"validation loss [\d.]+(, reward accuracy [\d.]+%)? \(lowest: [\d.]+ after step \d of 6\)",
                         text), text
        assert ("reward accuracy" in text) == (name == "preferences")
        assert f"in {name}: the model as it was after the last step, curves.png, samples.md, run.json" in text, text
        assert following in text, text


def test_the_checks_are_shown_before_and_after(scenes):
    assert re.search(r"sums +1 +\d+% -> \d+%", scenes["plain"].text)


# ---- in a pipe -----------------------------------------------------------------------------------


def test_a_pipe_gets_one_plain_line_a_logged_step(piped):
    out, err = piped
    assert "\x1b" not in out and "\r" not in out and err == ""
    steps = [line for line in out.splitlines() if re.match(r"step +\d+/6 ", line)]
    assert [int(line.split("/")[0].split()[1]) for line in steps] == [2, 3, 4, 6]
    assert ["val " in line for line in steps] == [False, True, False, True]


def test_the_reader_of_a_pipe_may_leave(place, tiny_model):
    """As `uv run sft.py | head -1` does: no traceback."""
    with subprocess.Popen([sys.executable, str(ROOT / "sft.py"), "--model", str(tiny_model), "--data", "chats.jsonl",
                           "--out", "left", "--steps", "2", "--reply-tokens", "8"], cwd=place, env=environment(),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline().startswith("loading")
        run.stdout.close()
        _, said = run.communicate(timeout=120)
    assert run.returncode in (1, 141) and "Traceback" not in said, said  # rich, or the script, meets the closed pipe
