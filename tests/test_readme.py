"""Every command of the two READMEs parses, every Python block in them runs."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import data
import dpo
import lora
import model

ROOT = Path(__file__).parents[1]
README = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "tests/benchmarks/README.md"))
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line and line[0] != "#"]
COMMANDS = list(dict.fromkeys(COMMANDS + re.findall(r"`(uv run [^`]+)`", README)))  # those inside a sentence too
SNIPPETS = [block for kind, block in BLOCKS if kind == "python"]


def test_the_readme_has_what_is_tested_here():
    assert len(COMMANDS) >= 15 and len(SNIPPETS) >= 4
    for wanted in ("uv run sft.py", "uv run dpo.py", "uv run chat.py"):
        assert any(command.startswith(wanted) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, monkeypatch, tmp_path):
    words = shlex.split(command, comments=True)
    assert words[:2] == ["uv", "run"]
    place = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "pytest")
    if words[place] == "pytest":
        selected = subprocess.run([sys.executable, "-m", *words[place:], "--collect-only", "-q", "-n", "0"], cwd=ROOT,
                                  capture_output=True, text=True, stdin=subprocess.DEVNULL)
        chosen = re.search(r"test_\w+\.py: [1-9]", selected.stdout)
        assert selected.returncode == 0 and chosen, selected.stdout + selected.stderr
        return
    script, args = ROOT / words[place], words[place + 1:]
    assert script.is_file(), f"{script} does not exist"
    if "torchrun" in words:
        from torch.distributed.run import parse_args

        assert parse_args(words[words.index("torchrun") + 1:]).training_script == words[place]
    monkeypatch.syspath_prepend(str(script.parent))
    module = importlib.import_module(script.stem)
    if script.stem in ("sft", "dpo", "chat", "train", "make", "data"):
        config = module.Compare if script.stem == "train" else module.Config
        if "--config" in args:  # of a run that was made
            monkeypatch.chdir(tmp_path)
            saved = Path(args[args.index("--config") + 1])
            saved.parent.mkdir(parents=True)
            saved.write_text(json.dumps({"config": dataclasses.asdict(config())}))
        data.command_line(config, getattr(module, "PRESETS", None), args)
    else:
        tyro.cli(module.Config, args=args)
    sys.modules.pop("run", None)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_snippet_runs(snippet, tmp_path, monkeypatch, tiny_model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DATA_SETS", dict(data.DATA_SETS))
    monkeypatch.setattr(dpo, "LOSSES", dict(dpo.LOSSES))
    for stage in ("sft", "dpo"):
        shutil.copytree(tiny_model, tmp_path / "runs" / stage)
        data.save_tokenizer(tmp_path / "runs" / stage)
    adapted = model.GPT.from_pretrained("runs/sft")
    lora.add_adapters(adapted, rank=2)
    lora.save_adapters(adapted, tmp_path / "runs" / "dpo" / "adapter", "runs/sft")
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "read_dialogs" in names:  # the data set that it adds can be read
        (tmp_path / "d.jsonl").write_text('{"turns": ["Hi", "Hello!"]}\n{"turns": ["Bye", "See you."]}\n')
        rows = data.load_rows(["dialogs:d.jsonl"], data.Reading(val_fraction=0.0)).train
        assert "Hello!" in data.text_of(rows[0].ids) + data.text_of(rows[1].ids)
    if "narrow" in names:
        assert model.GPT.from_pretrained("runs/narrow").config == names["narrow"]
    if "exponential" in names:
        import torch

        side = dpo.Replies(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([1.0]))
        assert dpo.LOSSES.pop("exponential")(side, side, dpo.Config()).item() == 1.0
