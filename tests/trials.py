"""Trials: training runs in processes that are killed, signalled or starved, cheap enough for hundreds of them.

A fork server imports torch once and runs nothing; every run is a fork of it, which costs hundredths of a second where
a new process costs three. The runs are real ones (`data.run_script` with sft.main or dpo.main), of a GPT-2 that is
8 wide, and write what `uv run sft.py` writes. Only two things are replaced: the picture of the curves, which takes as
long as all the rest, and the tokenizer's files, which are copied instead of made.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMES = {"tokens_per_second", "conversations_per_second", "pairs_per_second", "peak_memory_bytes", "seconds"}


# ---- what is trained -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A run to be made: the script's name, and its settings beside those of all trials."""

    script: str
    settings: tuple[tuple[str, object], ...]
    data: str

    def config(self, folder: str | Path, **more):
        usual = {"data": (f"{self.data}/{self.script}.jsonl",), "model": f"{self.data}/model", "context": 96,
                 "prompts": ("Hi",), "reply_tokens": 2, "checks": "", "device": "cpu", "precision": "fp32",
                 "steps": 8, "batch_size": 6, "micro_batch_tokens": 48, "val_fraction": 0.2,
                 "dropout": 0.1 if self.script == "sft" else 0.0,
                 "eval_every": 3, "save_every": 1, "lr": 1e-2}
        return importlib.import_module(self.script).Config(out=str(folder), **(usual | dict(self.settings) | more))

    def but(self, **settings) -> "Job":
        return replace(self, settings=tuple((dict(self.settings) | settings).items()))


def make_data(folder: Path) -> None:
    """Two random models 8 wide, 37 conversations and 29 pairs: steps of 6 cross the ends of epochs.

    In one, for LoRA, most words share a row of the head, as in the bundled model: those are computed once.
    """
    import torch

    import data
    import model

    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(n_positions=96, n_embd=8, n_layer=2, n_head=2))
    gpt.save_pretrained(folder / "model")
    with torch.no_grad():
        gpt.wte.weight[10_000:-1] = gpt.wte.weight[10_000].clone()
    gpt.save_pretrained(folder / "equal-rows")
    data.save_tokenizer(folder / "tokenizer")
    chats = [{"messages": [{"role": "user", "content": f"question {i}" + " word" * (i % 9)},
                           {"role": "assistant", "content": f"reply {i % 7}"}]} for i in range(37)]
    pairs = [{"prompt": f"question {i}" + " word" * (i % 9), "chosen": f"good {i % 7}", "rejected": f"bad {i % 3} no"}
             for i in range(29)]
    for name, rows in (("sft", chats), ("dpo", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def all_jobs(folder: Path) -> dict[str, Job]:
    """SFT and DPO, all weights and LoRA; dropout is on, and a step has several micro-batches."""
    lora = (("model", f"{folder}/equal-rows"), ("lora_rank", 2), ("lora_dropout", 0.1))
    return {f"{script} {name}": Job(script, settings, str(folder)) for script in ("sft", "dpo")
            for name, settings in (("full", (("lora_rank", 0),)), ("lora", lora))}


# ---- processes -----------------------------------------------------------------------------------


class Server:
    """Forks runs, at most two at a time as long as `many` is used to start them."""

    def __init__(self, scratch: Path):
        self.scratch, self.count = scratch, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["trials"])
        wanted = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                  "OPENBLAS_NUM_THREADS": "1", "TRIALS_PRELOAD": "1"}
        before = {key: os.environ.get(key) for key in wanted}
        os.environ.update(wanted)  # which the server inherits
        try:
            self.data = scratch / "data"
            self.call(make_data, self.data)
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        self.jobs = all_jobs(self.data)

    def new_folder(self) -> Path:
        self.count += 1
        return self.scratch / f"run-{self.count:05d}"

    def start(self, function: Callable, *args, log: Path | None = None) -> multiprocessing.Process:
        log = log or self.scratch / "log.txt"
        process = self.context.Process(target=_quietly, args=(str(log), function, *args))
        process.start()
        # else the next start(), in another thread, asks how this one ended, and of two who ask at once one is told 255
        multiprocessing.process._children.discard(process)
        return process

    def call(self, function: Callable, *args) -> None:
        log = self.scratch / "call.txt"
        process = self.start(function, *args, log=log)
        process.join()
        assert process.exitcode == 0, log.read_text()

    def begin(self, job: Job, folder: Path, prepare: Callable | None = None, **more) -> multiprocessing.Process:
        """Start a run; `prepare()` is called in its process before anything else."""
        return self.start(_run, job, str(folder), prepare, more, log=log_of(folder))

    def run(self, job: Job, folder: Path, prepare: Callable | None = None, **more) -> int:
        """A run to its end, whatever that is; its exit code, negative if it was killed."""
        process = self.begin(job, folder, prepare, **more)
        process.join(400)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"a run hangs: {tail(folder)}")
        return process.exitcode


def log_of(folder: Path) -> Path:
    """Where the runs of a folder say what they have to say: not on the disk that they fill."""
    return folder.parent.parent / f"{folder.parent.name}-{folder.name}.log"


def tail(folder: Path) -> str:
    return log_of(folder).read_text(errors="replace")[-1500:]


def many(function: Callable, items: Iterable) -> list:
    """function(item) of all items, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def _quietly(log: str, function: Callable, *args) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    function(*args)


def _run(job: Job, folder: str, prepare: Callable | None, more: dict) -> None:
    import data
    import train

    sys.argv = [f"{job.script}.py"]
    cfg = job.config(folder, **more)
    data.command_line = lambda *_: cfg
    train.plot_curves = lambda folders, path: data.write_file(path, "a picture")
    data.save_tokenizer = lambda out, positions: shutil.copytree(f"{job.data}/tokenizer", out, dirs_exist_ok=True)
    if prepare:
        prepare()
    print("started", flush=True)
    code = 0
    try:
        data.run_script(importlib.import_module(job.script).main, type(cfg))
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        code = 99
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


# ---- what a run left behind ----------------------------------------------------------------------


def verified(folder: Path) -> list[int]:
    """The steps of the checkpoints that can be trusted, newest first."""
    import train

    return [int(path.name[5:]) for path in train.checkpoint_folders(folder) if not train.verify_checkpoint(path)]


def outcome(folder: Path) -> dict[str, object]:
    """All that a finished run must have in common with one that was never interrupted, byte for byte."""
    newest = max(p for p in (folder / "checkpoints").iterdir() if p.name.startswith("step-"))
    found: dict[str, object] = {"newest": newest.name}
    for path in (*newest.glob("*.safetensors"), newest / "state.json", folder / "model.safetensors",
                 folder / "samples.md", *(folder / "adapter").glob("*.safetensors")):
        found[str(path.relative_to(folder))] = path.read_bytes().replace(str(folder).encode(), b"")
    found[f"checkpoints/{newest.name}/state.json"] = timeless(json.loads((newest / "state.json").read_text()))
    found["metrics.jsonl"] = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").open()]
    about = json.loads((folder / "run.json").read_text())
    found["run.json"] = timeless({key: about[key] for key in ("before", "after", "metrics", "finished")})
    return found


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return value


def differences(found: dict, wanted: dict) -> list[str]:
    return [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def report(record_property, what: str, number: int) -> None:
    """Keep a measured number with the test's result, and show it with -s."""
    record_property(what, number)
    print(f"\n{number:>6,}  {what}")


# ---- what the server imports, once ---------------------------------------------------------------

if os.environ.get("TRIALS_PRELOAD"):
    import filelock  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch._dynamo  # the optimiser imports it at its first use
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    from rich import progress, table  # noqa: F401

    import data
    import dpo  # noqa: F401
    import lora  # noqa: F401
    import sft  # noqa: F401

    torch.set_num_threads(1)
    data.tokenizer()
