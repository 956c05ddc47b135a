"""On one GPU, in one call: is it right there, how fast is it, and how much memory does it take?

    uv run --group bench tests/benchmarks/gpu.py --data oasst1:trees.jsonl
    uv run --group bench tests/benchmarks/gpu.py --data oasst1:trees.jsonl --device cpu --sizes gpt2 --steps 2   # a try

Prints tables: logits and gradients against transformers; a run that is stopped and resumed against one that is not;
training of every size against TRL, with the share of the card's own products and the memory against the estimate that
is printed before the first step; decoding. Packed attention as it is (kernels for each span of a batch) is timed
against one kernel for all of them, `varlen_attn` with gathered keys.
"""

import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from run import HERE, alternating, header, make_model, measure, row

import data
import model
from train import to_device


@dataclass
class Config:
    data: str = "oasst1"  # conversations with ranks: oasst1, or oasst1:PATH
    work: str = "runs/bench-gpu"  # where models and runs go
    device: str = "cuda"
    sizes: tuple[str, ...] = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    tasks: tuple[str, ...] = ("sft-full", "sft-lora", "dpo-lora")
    precision: str = "bf16"
    steps: int = 12
    repeats: int = 1
    new: int = 120
    tokens: int = 16384  # computed at once
    threads: int = 8


def real_batch(cfg: Config) -> data.Batch:
    rows = data.load_rows([cfg.data], data.Reading(context=512, val_fraction=0.0)).train
    return to_device(data.pack(rows, data.Order(rows, 8, seed=0)(0)), torch.device(cfg.device))


def agreement(cfg: Config, folder: Path) -> None:
    """The largest difference of logits and of gradients from transformers', as a share of their largest number."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 50000, (2, 300), generator=torch.Generator().manual_seed(0)).to(cfg.device)
    header("against transformers in fp32", "logits", "gradients")
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    exact.to(cfg.device)
    exact_logits = exact(ids).logits
    torch.nn.functional.cross_entropy(exact_logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {name.removeprefix("transformer."): p.grad for name, p in exact.named_parameters()}
    for precision in ("fp32", "bf16"):
        gpt = model.GPT.from_pretrained(folder).to(cfg.device)
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=precision == "bf16"):
            logits = gpt(ids).float()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        norm = ("wte.weight", "wpe.weight", "ln_f.weight", "h.0.ln_1.weight")  # which both lay out alike
        ours = dict(gpt.named_parameters())
        worst = max(float((ours[n].grad - grads[n]).abs().max() / grads[n].abs().max()) for n in norm)
        row(precision, f"{float((logits - exact_logits).abs().max() / exact_logits.abs().max()):.1e}", f"{worst:.1e}")


def resumption(cfg: Config, folder: Path) -> None:
    """Four steps at once, and two and two: how far apart the weights are."""
    ends = []
    for name, stops in (("whole", [4]), ("halves", [2, 4])):
        out = Path(cfg.work, name)
        shutil.rmtree(out, ignore_errors=True)
        for steps in stops:
            command = ["sft.py", "--model", folder, "--data", cfg.data, "--out", out, "--steps", 4, "--batch-size", 4,
                       "--save-every", 2, "--device", cfg.device, "--checks", "", "--prompts", "--eval-every", 0]
            process = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE.parents[1],
                                       stdout=subprocess.DEVNULL)
            while steps == 2 and process.poll() is None and not (out / "checkpoints" / "step-00000002").is_dir():
                time.sleep(0.05)
            if steps == 2:
                process.kill()
            process.wait()
        ends.append(model.GPT.from_pretrained(out).state_dict())
    apart = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0])
    print(f"\nkilled after step 2 and resumed: the weights are {apart:.1e} apart")


def attention(cfg: Config, folder: Path) -> None:
    """Packed attention's forward and backward pass against one kernel over gathered keys."""
    batch, gpt = real_batch(cfg), model.GPT.from_pretrained(folder).to(cfg.device)
    heads, width = gpt.config.n_head, gpt.config.n_embd // gpt.config.n_head
    q, k, v = (torch.randn(1, heads, len(batch.tokens), width, device=cfg.device, dtype=torch.bfloat16,
                           requires_grad=True) for _ in "qkv")

    def timed(run) -> float:
        for _ in range(3):
            run().sum().backward()
        if q.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            run().sum().backward()
        if q.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / 10 * 1e3

    packed = model.Packed(batch.spans)
    header("attention of a real batch, forward and backward", "ms a layer")
    row("Packed", f"{timed(lambda: packed(0, q, k, v, 0.0)):.2f}")
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        lengths = [span.tokens for span in batch.spans]
        starts = [0, *itertools.accumulate(lengths)]
        sees = [torch.cat([torch.arange(starts[i], starts[i] + count) for i, count in (*span.prefix, (n, span.tokens))])
                for n, span in enumerate(batch.spans)]
        gather = torch.cat(sees).to(cfg.device)
        ends_q = torch.tensor(starts, device=cfg.device).int()
        ends_k = torch.tensor([0, *map(len, sees)], device=cfg.device).cumsum(0).int()
        most_q, most_k = max(lengths), max(map(len, sees))

        def one_kernel():
            flat_q, flat_k, flat_v = (x[0].transpose(0, 1) for x in (q, k, v))
            return varlen_attn(flat_q, flat_k[gather], flat_v[gather], ends_q, ends_k, most_q, most_k,
                               window_size=(-1, 0))

        row("one kernel", f"{timed(one_kernel):.2f}")


def training(cfg: Config, rate: float) -> None:
    header(f"training, {cfg.precision}", "unit", "ours", "TRL + PEFT", "ratio", "of the card's products", "peak GB",
           "estimated", "peak GB, TRL")
    for size in cfg.sizes:
        folder = make_model(size, Path(cfg.work))
        for task in cfg.tasks:
            batch = 8 if task == "dpo-lora" else 16
            options = {"batch": batch, "micro_batch_tokens": cfg.tokens, "device": cfg.device}
            theirs = options | {"packing": task != "dpo-lora"}
            found = alternating(cfg, {"ours": ("ours", options), "trl": ("trl", theirs)}, task, folder)
            ours, trl = found["ours"], found["trl"]
            unit = "pairs_per_second" if task == "dpo-lora" else "tokens_per_second"
            row(f"{size}, {task}", unit.replace("_per_second", "/s"), f"{ours[unit]:.4g}", f"{trl[unit]:.4g}",
                f"{ours[unit] / trl[unit]:.2f}", f"{ours['operations_per_second'] / 1e9 / rate:.0%}",
                f"{ours['peak'] / 1e9:.2f}", f"{ours['estimate'] / 1e9:.2f}", f"{trl['peak'] / 1e9:.2f}")


def decoding(cfg: Config) -> None:
    header("decoding", "tokens/s behind 64", "behind 900")
    for size in cfg.sizes:
        options = {"contexts": [64, 900], "new": cfg.new, "device": cfg.device}
        systems = {f"{size}, {system}, {kind}": (system, options | {"precision": kind})
                   for system in ("ours", "transformers") for kind in ("fp32", "bf16")}
        for label, found in alternating(cfg, systems, "decode", make_model(size, Path(cfg.work))).items():
            row(label, f"{found['decode_64']:.1f}", f"{found['decode_900']:.1f}")


def main(cfg: Config) -> None:
    folder = make_model(cfg.sizes[0], Path(cfg.work))
    rates = measure(cfg, "ours", "machine", folder, device=cfg.device)
    print(json.dumps({"device": torch.cuda.get_device_name() if cfg.device == "cuda" else cfg.device} | rates))
    agreement(cfg, folder)
    resumption(cfg, folder)
    attention(cfg, folder)
    training(cfg, rates[cfg.precision])
    decoding(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
