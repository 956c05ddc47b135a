"""Compare with TRL + PEFT, transformers and CTranslate2, on the same data, model, precision and threads.

    uv run --group bench tests/benchmarks/run.py --data oasst1            (or oasst1:trees.jsonl, a local copy)

Every measurement is a process of its own (worker.py); the systems alternate within one run, because machines are
noisy, and the medians of their repeats are compared. Models are GPT-2s with random weights, made by transformers:
speed and memory do not depend on what the weights are.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import data  # noqa: E402
import model  # noqa: E402


@dataclass
class Config:
    data: str = "oasst1"  # conversations with ranks: oasst1, or oasst1:PATH
    work: str = "runs/bench"  # where models and runs go
    tasks: tuple[str, ...] = ("sft-full", "sft-lora", "dpo-lora", "decode", "growth")  # what to measure
    repeats: int = 3  # processes of each system; medians are reported
    steps: int = 4  # optimiser steps a process; the first is not counted
    new: int = 200  # tokens decoded
    threads: int = os.cpu_count() or 1  # threads of every system


SYSTEMS = {"sft-full": ("ours", "trl"), "sft-lora": ("ours", "trl"), "dpo-lora": ("ours", "trl")}


def make_model(name: str, work: Path) -> Path:
    """A GPT-2 of this size with random weights, as transformers writes it, and its tokenizer."""
    folder = work / f"model-{name}"
    if not (folder / "config.json").is_file():
        model.GPT(model.SIZES[name]).save_pretrained(folder)
        data.save_tokenizer(folder)
    return folder


def measure(cfg: Config, system: str, task: str, folder: Path, **options) -> dict:
    options = {"threads": cfg.threads, "steps": cfg.steps, "batch": 8, "rank": 8, "micro_batch_tokens": 2048} | options
    out = Path(cfg.work, f"{system}-{task}" + ("-int8" if options.get("int8") else ""))
    command = [sys.executable, HERE / "worker.py", system, task, folder, cfg.data, out, json.dumps(options)]
    threads = {"OMP_NUM_THREADS": str(cfg.threads)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | threads)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
    raise SystemExit(f"{system} {task} failed")


def row(*cells) -> None:
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def medians(results: list[dict]) -> dict:
    return {key: median(r[key] for r in results) for key in results[0]}


def training(cfg: Config, folder: Path) -> None:
    row("task", "unit", "ours", "TRL + PEFT", "ratio", "peak GB, ours", "peak GB, TRL", "ratio")
    row(*["---"] * 8)
    for task in (t for t in cfg.tasks if t in SYSTEMS):
        batch = 4 if task == "dpo-lora" else 8
        results: dict[str, list] = {"ours": [], "trl": []}
        for _ in range(cfg.repeats):
            for system, found in results.items():
                found.append(measure(cfg, system, task, folder, batch=batch))
        unit = "pairs_per_second" if task == "dpo-lora" else "tokens_per_second"
        ours, trl = medians(results["ours"]), medians(results["trl"])
        row(task, unit.replace("_per_", "/").replace("second", "s"), f"{ours[unit]:.2f}", f"{trl[unit]:.2f}",
            f"{ours[unit] / trl[unit]:.2f}", f"{ours['peak'] / 1e9:.2f}", f"{trl['peak'] / 1e9:.2f}",
            f"{ours['peak'] / trl['peak']:.2f}")


def decoding(cfg: Config, folder: Path) -> None:
    int8 = {"int8": True}
    kinds = {"ours fp32": ("ours", {}), "transformers fp32": ("transformers", {}),
             "CTranslate2 fp32": ("ctranslate2", {}), "CTranslate2 int8": ("ctranslate2", int8)}
    results: dict[str, list] = {kind: [] for kind in kinds}
    for _ in range(cfg.repeats):
        for kind, (system, options) in kinds.items():
            results[kind].append(measure(cfg, system, "decode", folder, contexts=[64, 800], new=cfg.new, **options))
    row("decoding", "first token, 64 (ms)", "tokens/s, 64", "first token, 800 (ms)", "tokens/s, 800", "peak GB")
    row(*["---"] * 6)
    for kind, found in results.items():
        m = medians(found)
        row(kind, f"{m['first_64'] * 1e3:.0f}", f"{m['decode_64']:.1f}", f"{m['first_800'] * 1e3:.0f}",
            f"{m['decode_800']:.1f}", f"{m['peak'] / 1e9:.2f}")


def growth(cfg: Config, work: Path) -> None:
    row("LoRA SFT, one step", "tokens/s", "peak GB")
    row(*["---"] * 3)
    for name in model.SIZES:
        found = measure(cfg, "ours", "sft-lora", make_model(name, work), steps=2, batch=2, micro_batch_tokens=1024,
                        recompute=name == "gpt2-xl")
        row(name, f"{found['tokens_per_second']:.1f}", f"{found['peak'] / 1e9:.2f}")


def main(cfg: Config) -> None:
    work = Path(cfg.work)
    work.mkdir(parents=True, exist_ok=True)
    folder = make_model("gpt2", work)
    before = measure(cfg, "ours", "matmul", folder)
    if set(cfg.tasks) & set(SYSTEMS):
        training(cfg, folder)
    if "decode" in cfg.tasks:
        decoding(cfg, folder)
    if "growth" in cfg.tasks:
        growth(cfg, work)
    after = measure(cfg, "ours", "matmul", folder)
    print("matrix products, GFLOP/s (before, after): "
          + ", ".join(f"{k} {before[k]:.0f}, {after[k]:.0f}" for k in before))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
