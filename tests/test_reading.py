"""The text as a reader meets it: the marked lines, the reading order, names that exist, and two ways told in README."""

import ast
import builtins
import io
import json
import re
import sys
import tokenize
from pathlib import Path

import pytest

import chat
import sft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ("sft", "data", "model", "lora", "dpo", "train", "chat")
SOURCE = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FILES}
TREES = {name: ast.parse(text) for name, text in SOURCE.items()}


def lines_of(name: str) -> dict[str, int]:
    """{name in a file, methods as Class.method: the line where it is defined}"""
    found = {}
    for node in TREES[name].body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.lineno
            found |= {f"{node.name}.{part.name}": part.lineno for part in node.body
                      if isinstance(node, ast.ClassDef) and isinstance(part, ast.FunctionDef)}
    return found


LINES = {name: lines_of(name) for name in FILES}


def stop_of(name: str) -> int | None:
    """The line at which a reader may stop."""
    return next((i for i, line in enumerate(SOURCE[name].splitlines(), 1) if line.startswith("# ======== ")), None)


@pytest.mark.parametrize("name", ["model", "data", "train", "chat"])
def test_the_marked_line_stands_where_the_docstring_says(name):
    section = re.search(r'may stop at "([^"]+)"', ast.get_docstring(TREES[name]))[1]
    [mark] = re.findall(r"^# ======== (.*)$", SOURCE[name], re.MULTILINE)
    assert mark.startswith(section) and "may stop here" in mark


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the README."""
    part = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in part.splitlines() if line.startswith("|")]
    return rows[2:]


def test_the_reading_order_is_that_of_the_files():
    """Names of the table stand in their file in the order of the table, and before the line to stop at."""
    rows = table("Read the code in this order")
    assert [row[0].strip("`") for row in rows] == [f"{name}.py" for name in FILES]
    for name, row in zip(FILES, rows, strict=True):
        names = re.findall(r"`([^`]+)`", row[1])
        places = [LINES[name][found] for found in names]
        assert len(names) >= 2 and places == sorted(places), (name, names, places)
        assert places[-1] < (stop_of(name) or sys.maxsize)


def told(name: str):
    """The docstrings and comments of a file: (line, text)."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text
    for token in tokenize.generate_tokens(io.StringIO(SOURCE[name]).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def known_names() -> set[str]:
    """All that has a name in the seven files: definitions, parameters, attributes, keys; and Python's own."""
    found = {*dir(builtins), *dir(SystemExit), *FILES}
    for tree in TREES.values():
        for node in ast.walk(tree):
            for key in ("name", "id", "arg", "attr", "asname", "value"):
                if isinstance(value := getattr(node, key, None), str):
                    found.add(value)
    return found


def test_names_in_docstrings_and_comments_exist():
    known, wrong = known_names(), []
    for name in FILES:
        for line, text in told(name):
            for module, found in re.findall(rf"\b({'|'.join(FILES)})\.([A-Za-z_]\w*(?:\.\w+)*)", text):
                if found not in ("py", "safetensors") and found not in LINES[module]:
                    wrong.append(f"{name}.py:{line}: {module}.{found}")
            for found in re.findall(r"`([A-Za-z_]\w*)`", text):
                if found not in known:
                    wrong.append(f"{name}.py:{line}: {found}")
    assert not wrong


def test_every_test_file_says_what_it_states():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)) == sorted(
        path.name for path in (ROOT / "tests").glob("*.py"))


# ---- the two ways --------------------------------------------------------------------------------


def calls(run) -> list[tuple[str, str]]:
    """(file, qualified name) of every function of ours that `run` calls on this thread, in order."""
    found, names = [], {str(ROOT / f"{name}.py"): name for name in FILES}

    def watch(frame, event, _):
        if event == "call" and (name := names.get(frame.f_code.co_filename)):
            found.append((name, frame.f_code.co_qualname))

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def way(heading: str) -> list[tuple[str, str]]:
    """The functions of a numbered list in the README, in order."""
    part = README.split(f"### {heading}\n")[1].split("\n#")[0]
    steps = [line for line in part.splitlines() if re.match(r"\d+\. ", line)]
    return [tuple(name.split(".", 1)) for line in steps for name in re.findall(r"`(\w+\.[\w.]+)`", line)]


def assert_walked(names, found):
    """These were called, each after the one before it."""
    assert len(names) > 6 and len({file for file, _ in names}) <= 5
    rest = iter(found)
    for file, name in names:
        assert name in LINES[file], f"{file}.{name} does not exist"
        assert any(where == file and f"{called}.".startswith(f"{name}.") for where, called in rest), (
            f"{file}.{name} is not called after those before it")


def test_a_rows_way_to_the_gradient(tiny_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "A number."}]}
            for i in range(6)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = sft.Config(model=str(tiny_model), data=(str(chats),), out=str(tmp_path / "run"), steps=1, batch_size=2,
                        context=64, val_fraction=0.0, checks="", prompts=(), device="cpu", precision="fp32")
    assert_walked(way("A row's way to the gradient"), calls(lambda: sft.main(config)))


def test_a_messages_way_to_the_screen(tiny_model, capsys):
    cfg = chat.Config(device="cpu", precision="fp32", max_new_tokens=3, seed=0)
    session = chat.Session(cfg, chat.Screen(), [str(tiny_model)])
    assert_walked(way("A message's way to the screen"), calls(lambda: session.handle("Hello")))
    assert capsys.readouterr().out
