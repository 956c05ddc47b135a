"""Compare with TRL + PEFT, transformers and CTranslate2, on the same data, model, precision and threads.

    uv run --group bench tests/benchmarks/run.py --data oasst1            (or oasst1:trees.jsonl, a local copy)
    uv run tests/benchmarks/run.py --tasks busy                           the sample beside a program on one core

Every measurement is a process of its own (worker.py); the systems alternate within one run, because machines are
noisy, and the medians of their repeats are compared. Models are GPT-2s with random weights, made by transformers:
speed and memory do not depend on what the weights are.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import psutil
import torch
import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import data  # noqa: E402
import model  # noqa: E402


@dataclass
class Config:
    data: str = "oasst1"  # conversations with ranks: oasst1, or oasst1:PATH
    work: str = "runs/bench"  # where models and runs go
    # what to measure
    tasks: tuple[str, ...] = ("sft-full", "sft-lora", "dpo-lora", "decode", "lengths", "data", "sizes", "busy")
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of all systems in training; auto: what sft.py takes here
    repeats: int = 3  # processes of each system; medians are reported
    steps: int = 16  # optimiser steps a process: of 100 trees, so many are as padded and as alike as a whole epoch
    new: int = 120  # tokens decoded
    threads: int = os.cpu_count() or 1  # threads of every system


TRAINING = {"sft-full": 8, "sft-lora": 8, "dpo-lora": 4}  # conversations or pairs in a step


def make_model(name: str, work: Path) -> Path:
    """A GPT-2 of this size with random weights, as transformers reads it, and its tokenizer."""
    folder = work / f"model-{name}"
    if not (folder / "config.json").is_file():
        model.GPT(model.SIZES[name]).save_pretrained(folder)
        data.save_tokenizer(folder)
    return folder


def measure(cfg: Config, system: str, task: str, folder: Path, **options) -> dict:
    options = {"threads": cfg.threads, "steps": cfg.steps, "batch": 8, "rank": 8, "micro_batch_tokens": 2048,
               "length": 512, "precision": cfg.precision, "device": "cpu"} | options
    out = Path(cfg.work, f"{system}-{task}-{options['precision']}")
    command = [sys.executable, HERE / "worker.py", system, task, folder, cfg.data, out, json.dumps(options)]
    threads = {} if options.get("alone") else {"OMP_NUM_THREADS": str(cfg.threads)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | threads)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
    raise SystemExit(f"{system} {task} failed")


def row(*cells) -> None:
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def header(*cells) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def medians(results: list[dict]) -> dict:
    return {key: median(r[key] for r in results) for key in results[0]}


def alternating(cfg: Config, systems: dict[str, tuple[str, dict]], task: str, folder: Path) -> dict[str, dict]:
    """{label: medians} of {label: (system, options)}, which take turns."""
    results: dict[str, list] = {label: [] for label in systems}
    for _ in range(cfg.repeats):
        for label, (system, options) in systems.items():
            results[label].append(measure(cfg, system, task, folder, **options))
    return {label: medians(found) for label, found in results.items()}


def training(cfg: Config, folder: Path, rate: float) -> None:
    header(f"training, {cfg.precision}", "unit", "ours", "TRL + PEFT", "ratio", "peak GB, ours", "peak GB, TRL",
           "ratio", "ours, of the machine's matrix products")
    for task, batch in TRAINING.items():
        if task not in cfg.tasks:
            continue
        found = alternating(cfg, {s: (s, {"batch": batch}) for s in ("ours", "trl")}, task, folder)
        ours, trl = found["ours"], found["trl"]
        unit = "pairs_per_second" if task == "dpo-lora" else "tokens_per_second"
        share = ours["operations_per_second"] / 1e9 / rate
        row(task, unit.replace("_per_second", "/s"), f"{ours[unit]:.3g}", f"{trl[unit]:.3g}",
            f"{ours[unit] / trl[unit]:.2f}", f"{ours['peak'] / 1e9:.2f}", f"{trl['peak'] / 1e9:.2f}",
            f"{ours['peak'] / trl['peak']:.2f}", f"{share:.0%}")


def decoding(cfg: Config, folder: Path) -> None:
    contexts = {"contexts": [64, 1020 - cfg.new], "new": cfg.new}
    systems = {"ours": ("fp32", "bf16", "int8"), "transformers": ("fp32", "bf16"), "ctranslate2": ("fp32", "int8")}
    kinds = {f"{system}, {precision}": (system, contexts | {"precision": precision})
             for system, precisions in systems.items() for precision in precisions
             if precision != "bf16" or cfg.precision == "bf16"}
    found = alternating(cfg, kinds, "decode", folder)
    short, long = contexts["contexts"]
    header("decoding", *(f"{what}, {context}" for context in (short, long)
                                           for what in ("first token (ms)", "tokens/s")), "peak GB")
    for kind, m in found.items():
        row(kind, f"{m[f'first_{short}'] * 1e3:.0f}", f"{m[f'decode_{short}']:.1f}", f"{m[f'first_{long}'] * 1e3:.0f}",
            f"{m[f'decode_{long}']:.1f}", f"{m['peak'] / 1e9:.2f}")


def sizes(cfg: Config, folder: Path) -> None:
    header(f"LoRA SFT by size, {cfg.precision}", "tokens/s", "peak GB")
    for name in model.SIZES:
        found = measure(cfg, "ours", "sft-lora", make_model(name, folder.parent), steps=2, batch=2,
                        micro_batch_tokens=1024, recompute=name == "gpt2-xl")
        row(name + (", recomputing activations" if name == "gpt2-xl" else ""), f"{found['tokens_per_second']:.3g}",
            f"{found['peak'] / 1e9:.2f}")


def lengths(cfg: Config, folder: Path) -> None:
    header(f"LoRA SFT by length of the rows, {cfg.precision}", "tokens/s", "peak GB")
    for length in (128, 256, 512, 1024):
        found = measure(cfg, "ours", "sft-lora", folder, steps=3, length=length, batch=2048 // length, full_rows=True)
        row(length, f"{found['tokens_per_second']:.3g}", f"{found['peak'] / 1e9:.2f}")


def busy(cfg: Config, folder: Path) -> None:
    """The sample's stages, idle and beside a program that keeps one core busy; threads are left to the scripts."""
    work = Path(cfg.work, "busy")
    alone = ["--eval-every", "0", "--save-every", "0", "--log-every", "1", "--overwrite"]
    silent = [*alone, "--prompts", "--checks", ""]
    sft, base = str(work / "sft"), str(work / "base")
    stages = {"sft.py": (["sft.py", *silent, "--steps", "60", "--out", sft], sft),
              "dpo.py": (["dpo.py", *silent, "--steps", "20", "--model", sft, "--out", f"{work}/dpo"], work / "dpo"),
              "make.py": (["sample/make.py", *alone, "--steps", "30", "--more-steps", "10", "--to", str(work / "to"),
                           "--out", base], base)}
    found: dict[str, dict] = {name: {"idle": [], "busy": []} for name in [*stages, "chat"]}
    for _ in range(cfg.repeats):
        for state in ("idle", "busy"):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if state == "busy" else None
            try:
                for name, (command, out) in stages.items():
                    subprocess.run([sys.executable, *command], cwd=HERE.parents[1], check=True, capture_output=True)
                    records = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()][5:]
                    found[name][state].append(len(records) / sum(1 / r["tokens_per_second"] for r in records))
                decoded = measure(cfg, "ours", "decode", Path(sft), contexts=[64], new=800, alone=True)
                found["chat"][state].append(decoded["decode_64"])
            finally:
                if other:
                    other.kill()
                    other.wait()
    header("sample, tokens/s", "idle", "beside one busy core", "ratio")
    for name, rates in found.items():
        idle, beside = median(rates["idle"]), median(rates["busy"])
        row(name, f"{idle:,.0f}", f"{beside:,.0f}", f"{beside / idle:.2f}")


def data_sizes(cfg: Config, folder: Path) -> None:
    header("reading by size of the data", "conversations", "tokens", "seconds")
    for times in (1, 4, 16):
        found = measure(cfg, "ours", "read", folder, times=times)
        row(f"{times} x", f"{found['rows']:,.0f}", f"{found['tokens']:,.0f}", f"{found['seconds']:.2f}")


def processor() -> str:
    """What the tables were made on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "some processor")
    known = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
    kinds = [kind for kind in known if any(f" {kind}" in line for line in lines)]
    return f"{name}, {psutil.cpu_count(logical=False)} cores ({', '.join(kinds)})"


def main(cfg: Config) -> None:
    work = Path(cfg.work)
    work.mkdir(parents=True, exist_ok=True)
    folder = make_model("gpt2", work)
    if cfg.precision == "auto":
        cfg = replace(cfg, precision=model.pick_precision("auto", torch.device("cpu")))
    before = measure(cfg, "ours", "machine", folder)
    if set(cfg.tasks) & set(TRAINING):
        training(cfg, folder, before[cfg.precision])
    for task, run in (("decode", decoding), ("lengths", lengths), ("data", data_sizes), ("sizes", sizes),
                      ("busy", busy)):
        if task in cfg.tasks:
            run(cfg, folder)
    after = measure(cfg, "ours", "machine", folder)
    units = {"memory": "GB/s", "fp32": "GFLOP/s", "bf16": "GFLOP/s"}
    print(f"\n{processor()}; the machine's own rates, before and after: "
          + ", ".join(f"{name} {before[name]:.3g} and {after[name]:.3g} {units[name]}" for name in before))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
