"""The one training loop, and what a run needs around it. It knows no task: the loss is an argument.

    LossFn = Callable[[GPT, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]    # loss SUM, count, metric SUMS

Losses are sums over a micro-batch. The loop adds them up and divides once, by the count over the whole step and all
processes, so one micro-batch of 8 rows equals eight of 1, two processes equal one, and micro-batches with nothing to
learn from add zero. A step is `batch_size` rows in an order fixed by (seed, epoch), whatever the hardware; dropout is
fixed by (seed, step, micro-batch, rank). Randomness is thus a function of position, never of history: nothing random
is saved, and a run that is resumed equals one that was never interrupted, bit for bit.

A stage uses Settings, Run, begin, train and finish. A reader of the mathematics may stop at "A run".
`uv run train.py runs/sft runs/dpo` compares finished runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import ClassVar, Literal

import tyro
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from safetensors import SafetensorError

import data
from data import is_out_of_memory, lazy, option, remove, run_script, sync, write_file, written_whole

np = lazy("numpy")
torch = lazy("torch")
state_dicts = lazy("torch.distributed.checkpoint.state_dict")
safetensors = lazy("safetensors.torch")
filelock = lazy("filelock")
model = lazy("model")
lora = lazy("lora")


# ---- settings ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Settings(data.Reading):
    """What every stage can be told; a stage's own Config adds the rest and comes first."""

    adapter: str = ""  # a PEFT folder with LoRA adapters of --model: the run starts from the two, merged
    # JSONL of questions and the facts a good reply contains, scored before and after; auto: the sample's, for its data
    checks: str = "auto"
    # conversations answered before, during and after training; " | " separates the turns of one
    prompts: tuple[str, ...] = ("What does a data scientist do? | What about a machine learning engineer?", "Hello!")
    val_rows: int = 256  # rows of an evaluation at most

    micro_batch_tokens: int = 2048  # tokens computed at once: memory depends on it, and results only by dropout
    warmup: float = 0.05  # share of the steps in which the rate rises from 0 to --lr
    final_lr: float = 0.1  # the cosine's end, as a share of --lr
    weight_decay: float = 0.01  # AdamW's, on matrices only
    beta2: float = 0.99  # AdamW's memory of squared gradients
    clip: float = 1.0  # the gradient's norm at most
    dropout: float = 0.0  # GPT-2's own, in embeddings, attention and both branches
    lora_alpha: float = 16.0  # the adapters' strength: their output is scaled by alpha / rank
    lora_dropout: float = 0.0  # on the adapters' input
    lora_targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")  # layers that get an adapter, by the end of their name
    rslora: bool = False  # scale by alpha / sqrt(rank) instead: for high ranks

    eval_every: int = 100  # steps between evaluations (0: only before the first step and after the last)
    save_every: int = 100  # steps between checkpoints (0: only after the last step and when interrupted)
    log_every: int = 1  # steps between lines of metrics.jsonl
    keep: int = 2  # checkpoints kept, 2 or more, besides the one with the best validation loss
    reply_tokens: int = 96  # tokens of a shown or checked reply at most
    tracker: Literal["none", "wandb", "tensorboard", "trackio"] = "none"  # where metrics also go: an optional extra

    device: str = "auto"  # cuda, mps or cpu; auto takes the first there is
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device computes in it, else fp32
    compile: bool = False  # torch.compile every block: slow to start, 1 to 2 % faster on the CPU measured
    recompute: bool = False  # gradient checkpointing: a third more time, a fraction of the activations' memory
    fsdp: bool = False  # with torchrun: shard the model over the processes (FSDP2) instead of copying it (DDP)
    config: str = ""  # a run.json whose settings are taken as defaults: repeats a run
    overwrite: bool = False  # start anew in a folder that holds another run
    debug: bool = False  # show the traceback of an error

    groups: ClassVar[dict[str, tuple[str, ...]]] = {  # the boxes of --help, see data.grouped
        "first": ("preset", "model", "data", "out", "steps", "batch_size", "lr", "lora_rank"),
        "loss": (),  # a stage's own
        "data": ("context", "val_fraction", "language", "bad_rows", "seed"),
        "showing": ("prompts", "checks", "reply_tokens", "val_rows", "eval_every", "log_every", "tracker"),
        "optimiser": ("warmup", "final_lr", "weight_decay", "beta2", "clip", "dropout"),
        "adapter": ("adapter", "lora_alpha", "lora_dropout", "lora_targets", "rslora"),
        "machine": ("device", "precision", "micro_batch_tokens", "recompute", "compile", "fsdp"),
        "run": ("save_every", "keep", "config", "overwrite", "debug")}

    def limits(self) -> dict[str, tuple[bool, str]]:
        return super().limits() | data.bounds(
            self, ("1 or more", ("steps", "batch_size", "micro_batch_tokens", "log_every", "reply_tokens"),
                   lambda value: value >= 1),
            ("2 or more", ("keep",), lambda value: value >= 2),
            ("0 or more", ("val_rows", "eval_every", "save_every", "lora_rank", "weight_decay"),
             lambda value: 0 <= value < math.inf),
            ("above 0 and finite", ("lr", "clip", "lora_alpha"), lambda value: 0 < value < math.inf),
            ("from 0 to 1", ("warmup", "final_lr"), lambda value: 0 <= value <= 1),
            ("0 or more and below 1", ("dropout", "lora_dropout", "beta2"), lambda value: 0 <= value < 1),
            ("the ends of layers' names", ("lora_targets",), bool))

    def look(self) -> None:
        """Refuse what can be seen to fail, before anything is read, computed or written."""
        data.check_limits(self)
        model.check_model(self.model)
        data.check_specs(self.data, "preferences" if self.row_name == "pairs" else "conversations")


# Settings that may differ when a run is resumed, because the result does not depend on them.
MAY_DIFFER = {"overwrite", "debug", "config", "preset", "tracker", "save_every", "keep", "out"}
BY_CONTENT = {"data", "model", "adapter"}  # may lie elsewhere: it is their sha256 that has to be the same


# ---- the loop ------------------------------------------------------------------------------------


@dataclass
class State:
    """What the loop remembers besides weights and optimiser; all of it is in a checkpoint."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # that the loop took for it, over all resumptions
    budget: int = 0  # micro-batch tokens, halved when memory ran out
    record: dict = field(default_factory=dict)  # what the step measured; it is logged after the step's evaluation


def train(gpt: model.GPT, loss_fn, train_batches, val_batches: list[data.Batch], cfg: Settings, run: Run) -> dict:
    """Train in place, from the newest checkpoint of the run's folder if there is one; returns the last metrics.

    train_batches(step, token_budget) gives the micro-batches of a step, val_batches are always the same.
    Raises FloatingPointError before a step whose loss or gradient is not finite.
    """
    with run.busy("making the optimiser"):
        loss = parallelise(gpt, loss_fn, cfg, run)
        optimizer = make_optimizer(gpt, cfg)
        state = load_checkpoint(gpt, optimizer, run) or State(budget=cfg.micro_batch_tokens)
    if run.world > 1:  # rows are dealt out by the budget, and DPO knows the reference of those dealt by this one
        state.budget = cfg.micro_batch_tokens
    gpt.train()
    saved, began = state.step, time.perf_counter() - state.seconds

    def save() -> None:
        nonlocal saved
        if state.step > saved:
            if run.seen_finite < state.step:  # the step may have broken what it was taken from
                refuse_nan("loss", evaluate(loss, val_batches[:1] or run.last_batch, run)["loss"], state, cfg, run)
            save_checkpoint(gpt, optimizer, state, cfg, run)
            saved = state.step

    with contextlib.closing(Log(run, state)) as log, run.stoppable(log, state, save):
        measured = measure(gpt, loss, val_batches, state, log, cfg, run)  # of a checkpoint's step too, when resumed
        while state.step < cfg.steps:
            state.record = step(loss, optimizer, train_batches, state, cfg, run)
            state.seconds = time.perf_counter() - began
            log.advance(state.step)
            measured = measure(gpt, loss, val_batches, state, log, cfg, run)
            if state.step == cfg.steps or (cfg.save_every and state.step % cfg.save_every == 0):
                save()
            run.stop_point()
    run.note(seconds=round(time.perf_counter() - began, 1))
    return state.record | measured


def step(loss, optimizer, train_batches, state: State, cfg: Settings, run: Run) -> dict:
    """One update of the weights; returns what to log of it."""
    began, lr = time.perf_counter(), learning_rate(state.step, cfg)
    batches, totals = with_less_memory(accumulate, loss, optimizer, train_batches, state, cfg, run)

    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    averaged = run.world if isinstance(loss, torch.nn.parallel.DistributedDataParallel) else 1  # DDP took the mean
    scale = averaged / max(totals["count"], 1.0)
    norm = scale * gradient_norm(grads, run)
    if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
        raise not_finite(batches, totals, norm, lr, state, cfg)

    for grad in grads:
        grad.mul_(scale * min(1.0, cfg.clip / max(norm, 1e-12)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    run.updating = True
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    run.last_batch = batches[:1]
    state.step += 1
    state.tokens += int(totals["row_tokens"])
    run.updating = False
    seconds = time.perf_counter() - began
    return {"step": state.step, "lr": lr, "grad_norm": norm, "tokens": state.tokens,
            "tokens_per_second": totals["row_tokens"] / seconds,
            f"{cfg.row_name}_per_second": cfg.batch_size / seconds,
            "peak_memory_bytes": model.peak_memory(run.device), **means(totals)}


def accumulate(loss, train_batches, state: State, cfg: Settings, run: Run) -> tuple[list, dict[str, float]]:
    """Forward and backward over the step's micro-batches: these, and the totals of all processes.

    Gradients of the sum of all losses are left where the optimiser looks for them.
    """
    batches, sums = train_batches(state.step, state.budget), Sums()
    for i, batch in enumerate(batches):
        if i:
            run.stop_point(together=False)
        torch.manual_seed(seed_at(cfg.seed, state.step, i, run.rank))
        with synchronised(loss, last=i == len(batches) - 1):
            with run.autocast():
                total, count, metrics = loss(to_device(batch, run.device))
            total.backward()
        sums.add(total, count, metrics | {"row_tokens": torch.tensor(float(batch.row_tokens))})
    return batches, sums.totals(run)


def measure(gpt: model.GPT, loss, val_batches: list[data.Batch], state: State, log: Log, cfg: Settings,
            run: Run) -> dict[str, float]:
    """What there is to know after a step: it is evaluated if that is due, logged, and some replies are shown."""
    due = state.step in (0, cfg.steps) or (cfg.eval_every and state.step % cfg.eval_every == 0)
    found = evaluate(loss, val_batches, run) if due else {}
    measured = {f"val_{name}": value for name, value in found.items()}
    if found:
        refuse_nan("validation loss", found["loss"], state, cfg, run)
    if state.step == 0:
        run.note(before=run.about["before"] | measured)
        run.say(f"before the first step: {summary(measured) or 'no validation rows'}")
    elif due or state.step % cfg.log_every == 0:
        log.write(state.record | measured)
    if due and 0 < state.step < cfg.steps:
        whole = whole_model(gpt, run)
        if run.is_main:
            with run.progress("prompts", turns(cfg.prompts)) as advance:
                talks = converse(whole, cfg.prompts, cfg.reply_tokens, advance)
            show(f"after step {state.step}", talks, run)
    return measured


def evaluate(loss, batches: list[data.Batch], run: Run) -> dict[str, float]:
    """Mean loss and metrics over all batches and processes: total / count, so that perplexity is exp(loss).

    `loss` is a module from `parallelise`.
    """
    if not batches:
        return {}
    sums, loss = Sums(), getattr(loss, "module", loss)  # DDP has nothing to synchronise here
    loss.eval()
    with torch.no_grad(), run.autocast(), run.progress("validation", len(batches)) as advance:
        for i, batch in enumerate(batches):
            if i:
                run.stop_point(together=False)
            sums.add(*loss(to_device(batch, run.device)))
            advance(1)
    loss.train()
    return means(sums.totals(run))


class Sums:
    """Loss, count and metric sums, added up over micro-batches and then over processes; divided once."""

    def __init__(self):
        self.values: dict[str, torch.Tensor] = {}

    def add(self, loss, count, metrics: dict) -> None:
        for key, value in {"loss": loss, "count": count, **metrics}.items():
            wide = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has no fp64
            self.values[key] = self.values.get(key, 0.0) + value.detach().to(wide)

    def totals(self, run: Run) -> dict[str, float]:
        keys = list(self.values)
        return dict(zip(keys, run.reduce(torch.stack([self.values[k].cpu() for k in keys])).tolist(), strict=True))


def means(totals: dict[str, float]) -> dict[str, float]:
    count = max(totals["count"], 1.0)
    return {key: value / count for key, value in totals.items() if key not in ("count", "row_tokens")}


# ---- optimiser and schedule ----------------------------------------------------------------------


def make_optimizer(gpt: model.GPT, cfg: Settings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, since a bias or a norm's gain near zero is not simpler."""
    params = [p for p in gpt.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    for p in params:  # its moments, now: made in the first step, they could run out of memory in the midst of it
        optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device)} | {
            moment: torch.zeros_like(p) for moment in ("exp_avg", "exp_avg_sq")}
    return optimizer


def learning_rate(step: int, cfg: Settings) -> float:
    """Linear warm-up, then half a cosine from lr down to final_lr * lr; `step` counts from 0."""
    warmup = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * (1 + math.cos(math.pi * done)) / 2)


def gradient_norm(grads: list[torch.Tensor], run: Run) -> float:
    """The norm of all gradients together, and of all shards of them.

    Row by row: torch's norm of a matrix is one long fp32 sum on a CPU, and 0.3 % too small for GPT-2's embedding. The
    rows are summed up by numpy, in one order whatever the number of threads.
    """
    sharded = any(hasattr(grad, "to_local") for grad in grads)
    shards = [grad.to_local() for grad in grads] if sharded else grads
    norms = [torch.linalg.vector_norm(shard, dim=-1).flatten() for shard in shards] or [torch.zeros(1)]
    squares = torch.tensor(np.square(torch.cat(norms).double().cpu().numpy()).sum())
    return math.sqrt(run.reduce(squares) if sharded else squares)


def seed_at(*position: int) -> int:
    """A seed that depends on a position and on nothing before it."""
    return int.from_bytes(hashlib.sha256(repr(position).encode()).digest()[:8], "little") >> 1


# ---- the rows of a step --------------------------------------------------------------------------


def step_batches(rows: data.Data, cfg: Settings, run: Run):
    """batches(step, budget): this process's micro-batches of a step, which depends on (seed, step) alone.

    batches.rows(step): the rows that are in them.
    """
    order = data.Order(rows.train, cfg.batch_size, cfg.seed)

    def batches(step: int, budget: int) -> list[data.Batch]:
        return _own_batches(rows.train, order(step), budget, cfg, run)

    def own_rows(step: int) -> Iterable[int]:
        if run.world == 1:
            return order(step)
        parts = data.divide(rows.train, order(step), cfg.micro_batch_tokens)
        return chain.from_iterable(members for _, members in parts[run.rank::run.world])

    batches.rows = own_rows
    return batches


def validation_batches(rows: data.Data, cfg: Settings, run: Run) -> list[data.Batch]:
    """This process's share of the validation rows, which are numbered on from the training rows."""
    first, count = len(rows.train), min(len(rows.val), cfg.val_rows)
    if not count:
        return []
    chosen = first + data.Order(rows.val, count, cfg.seed)(step=0)
    return _own_batches(rows.train + rows.val, chosen, cfg.micro_batch_tokens, cfg, run)


def _own_batches(rows: list, indices, budget: int, cfg: Settings, run: Run) -> list[data.Batch]:
    """This process's micro-batches: one at least, and under FSDP, whose gathers are collective, as many as any has."""
    parts = data.divide(rows, indices, budget)
    batches = {rank: data.into_batches(rows, parts[rank::run.world], budget)
               for rank in (range(run.world) if cfg.fsdp else [run.rank])}
    missing = max(1, *map(len, batches.values())) - len(batches[run.rank])
    return batches[run.rank] + [without_targets(data.pack(rows, parts[-1][1][:1]))] * missing


def without_targets(batch: data.Batch) -> data.Batch:
    """The batch with nothing to learn from: what a process computes while others are busy with more."""
    nothing = {name: getattr(batch, name)[:0] for name in ("index", "targets", "target_span", "rows", "pairs")}
    return replace(batch, **nothing, row_tokens=0)


def to_device(batch: data.Batch, device: torch.device) -> data.Batch:
    """The batch with its numpy arrays as tensors on the device, but for `rows`, which name what lies on the CPU."""
    arrays = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "rows"}
    return replace(batch, **{k: torch.from_numpy(v).to(device, non_blocking=True)
                             for k, v in arrays.items() if hasattr(v, "dtype")})


# ======== A run: everything around the loop. A reader of the mathematics may stop here. ===========

# ---- when a step cannot be taken -----------------------------------------------------------------


def with_less_memory(accumulate, loss, optimizer, train_batches, state: State, cfg: Settings, run: Run):
    """accumulate(...); where memory runs out in the first steps, with half the micro-batches and the same gradient."""
    while True:
        try:
            return accumulate(loss, train_batches, state, cfg, run)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            optimizer.zero_grad(set_to_none=True)
            if state.step >= 3 or run.world > 1 or state.budget <= 128:
                raise MemoryError(
                    f"out of memory in step {state.step + 1} with micro-batches of {state.budget} tokens.\n"
                    f"If another program took it, {run.again}: it goes on from the last checkpoint.\n"
                    f"Else --overwrite and --micro-batch-tokens {state.budget // 2}, --recompute, --lora-rank 8 or "
                    "--model.") from None
            state.budget //= 2
            run.say(f"out of memory: going on with micro-batches of {state.budget} tokens, for the same gradient")


def not_finite(batches: list[data.Batch], totals: dict, norm: float, lr: float, state: State,
               cfg: Settings) -> FloatingPointError:
    rows = sorted({int(r) for batch in batches for r in batch.rows})
    return FloatingPointError(
        f"step {state.step + 1}: loss {totals['loss'] / max(totals['count'], 1):g}, gradient norm {norm:g}, "
        f"rate {lr:.2e}; rows {', '.join(map(str, rows[:12]))}{' ...' if len(rows) > 12 else ''}.\n"
        "The step was not taken and nothing of it was saved.\n" + advice(cfg, rows[0] if rows else None))


def refuse_nan(what: str, value: float, state: State, cfg: Settings, run: Run) -> None:
    """Note that the model computes numbers after this step; raises FloatingPointError if it does not."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} after step {state.step} is {value:g}.\n" + (
            f"That step is not saved.\n{advice(cfg)}" if state.step
            else f"The weights of {cfg.model} are not fit to train from."))
    run.seen_finite = state.step


def advice(cfg: Settings, row: int | None = None) -> str:
    return f"Try a lower rate: --lr {cfg.lr / 3:.1e} --overwrite\nor look at the data: {look_at(cfg, row)}"


def look_at(cfg: Settings, row: int | None = None) -> str:
    """The command that shows what the data of a run becomes, or one row of it."""
    changed = [f"{option(f.name)} {shlex.quote(str(getattr(cfg, f.name)))}" for f in fields(data.Reading)
               if getattr(cfg, f.name) != f.default]
    changed += [f"--row {row}"] * (row is not None)
    return " ".join(["uv run data.py", shlex.join(cfg.data), *["--pairs"] * (cfg.row_name == "pairs"), *changed])


# ---- a run: folder, signals, screen --------------------------------------------------------------


class Run:
    """One run: its processes, its device, its folder, and how it is stopped.

    Used as `with Run("sft", cfg) as run`. Holds the folder's lock, so that two runs cannot share it. The first SIGTERM
    or Ctrl-C in the training loop stops it at the next safe point. A second one, and any outside the loop, ends the
    process on the spot: the folder is whole at every moment, and to raise in the midst of anything is not.
    """

    def __init__(self, stage: str, cfg: Settings):
        self.stage, self.cfg, self.folder = stage, cfg, Path(cfg.out)
        self.rank, self.world = place_among_processes()
        self.is_main = self.rank == 0
        # words wrap in a window, and nothing does in a pipe; names and replies are text, brackets or not
        terminal = sys.stdout.isatty()
        self.console = Console(soft_wrap=not terminal, width=None if terminal else 200, markup=False, emoji=False)
        self.signal = 0
        self.training = False  # in the loop
        with self.loading_torch() if "torch" not in sys.modules else contextlib.nullcontext():
            self.device = model.pick_device(cfg.device)
        self.dtype = torch.bfloat16 if model.pick_precision(cfg.precision, self.device) == "bf16" else torch.float32
        self.again = "run the same command again" + ", without --overwrite," * cfg.overwrite  # which would begin anew
        self.checks: list[data.Check] = []
        self.updating = False  # the weights are between two steps, of which neither can be saved
        self.seen_finite = -1  # the step after which the model was last seen to compute numbers
        self.last_batch: list[data.Batch] = []  # one of the last step's, to see that with where there is no other
        self.verified: set[str] = set()  # names of checkpoints
        self.bar = None  # the rich.progress.Progress that is on the screen
        self.at_work = ""  # what it says instead of the last step's figures
        self.model_folder = Path()  # where the model to train is, on this disk: the Hub is asked once
        # run.json: stage, config, versions, model, data, trainable, before, seconds, after, metrics, best, finished
        self.about: dict = {"stage": stage, "config": asdict(cfg), "versions": versions(self.device)}

    @contextlib.contextmanager
    def loading_torch(self):
        """Ctrl-C as elsewhere outside the loop: what PyTorch imports may take a KeyboardInterrupt for its own."""
        handler = signal.signal(signal.SIGINT, self._on_signal)
        try:
            with self.busy("loading PyTorch"):
                yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def look(self) -> None:
        """Refuse what can be seen to fail; nothing is written yet."""
        self.cfg.look()
        if self.device.type == "mps" and self.cfg.recompute and (self.cfg.dropout or self.cfg.lora_dropout):
            raise ValueError("--recompute on MPS would drop others the second time: leave out dropout, or --recompute")
        if self.cfg.batch_size < self.world:
            raise ValueError(f"--batch-size {self.cfg.batch_size} is too few for {self.world} processes")
        tracker_package(self.cfg.tracker)
        sample = str(data.HERE / "sample" / "checks.jsonl") if self.cfg.data == ("sample",) else ""
        if path := sample if self.cfg.checks == "auto" else self.cfg.checks:
            self.checks = data.read_checks(path)
        out = self.folder.resolve()
        for setting in ("adapter", "model"):
            name = str(getattr(self.cfg, setting, ""))
            source = Path(name).resolve()
            if name and (source == out or (source.exists() and source.is_relative_to(out))):
                raise ValueError(f"--out {self.folder} would replace {option(setting)} {name}, which the run needs to "
                                 "its end.\nGive another folder: --out")
        look_at_folder(self.folder)

    def __enter__(self) -> Run:
        self.look()
        if "RANK" in os.environ and not torch.distributed.is_initialized():
            store, rank, world = next(torch.distributed.rendezvous("env://"))
            # torchrun's own store outlives a restart, and what dead processes left in it would be read as addresses; a
            # store of rank 0's is new, and a machine that came back counts its restarts from 0
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = torch.distributed.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            torch.distributed.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                timeout=timedelta(hours=2))  # the others wait while rank 0 answers prompts and checks
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        if self.is_main:
            try:
                self.lock.acquire()
            except filelock.Timeout:
                raise BlockingIOError(f"{self.folder} is in use by another process.\n"
                                      "Wait for it, or give another folder: --out") from None
            tidy(self.folder)
        self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.lock.release()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if torch.distributed.is_initialized() and kind is None:
            torch.distributed.destroy_process_group()

    def _on_signal(self, number: int, frame) -> None:
        if self.signal or not self.training:
            if self.console.is_terminal:
                os.write(1, b"\x1b[?25h")  # the progress bar had hidden the cursor
            os._exit(128 + number)
        self.signal = number
        if self.is_main and not self.bar:  # which says it itself
            with contextlib.suppress(OSError):  # not print: that may be what the signal interrupted
                os.write(2, f"\n{self.stopping}\n".encode())

    @property
    def stopping(self) -> str:
        """What a first signal is answered with; "" before it."""
        return (f"{signal.Signals(self.signal).name}: stopping as soon as a checkpoint is saved (again to stop at once)"
                if self.signal else "")

    @contextlib.contextmanager
    def stoppable(self, log: Log, state: State, save):
        """The loop, from which a signal leaves with a checkpoint of the last whole step; so does a lack of memory."""
        self.training = True
        try:
            yield
        except (Interrupted, RuntimeError, MemoryError) as stop:
            asked = isinstance(stop, Interrupted)
            if not asked and (self.updating or self.world > 1 or not is_out_of_memory(stop)):
                raise
            log.close()  # the bar ends above what is said now
            save()
            if asked:
                self.say(f"stopped after step {state.step} of {self.cfg.steps}; {self.again} to go on")
            raise stop from None
        finally:
            self.training = False

    @contextlib.contextmanager
    def leavable(self, save):
        """Long work outside the loop, by each process alone. Gives a function to call between its parts.

        That calls save() every minute, and when a signal has come, which then ends the run.
        """
        saved = time.monotonic()

        def leave() -> None:
            nonlocal saved
            if self.signal or time.monotonic() - saved > 60:
                save()
                saved = time.monotonic()
            if self.signal:
                raise Interrupted(128 + self.signal)

        self.training = True
        try:
            yield leave
        except Interrupted:
            self.say(f"stopped, and what was computed is saved; {self.again} to go on")
            raise
        finally:
            self.training = False

    def busy(self, what: str):
        """What takes seconds of which no share is known: a line that turns, on a terminal, until it is done."""
        terminal = self.is_main and self.console.is_terminal
        return self.console.status(what, spinner="line") if terminal else contextlib.nullcontext()

    @contextlib.contextmanager
    def progress(self, what: str, total: float):
        """data.progress; while the loop's own bar is on the screen, a share of the total in its last column."""
        if not self.bar:
            with data.progress(what, total) as advance:
                yield advance
            return
        done = 0.0

        def advance(more: float) -> None:
            nonlocal done
            done += more
            self.at_work = f"{what} {done / max(total, 1):.0%}"

        try:
            advance(0)
            yield advance
        finally:
            self.at_work = ""

    def stop_point(self, together: bool = True) -> None:
        """Raise Interrupted if a signal has come; several processes decide together, or not at all."""
        if self.world > 1:
            if not together:
                return
            self.signal = int(self.reduce(torch.tensor(float(self.signal)), "MAX"))
        if self.signal:
            raise Interrupted(128 + self.signal)

    def reduce(self, value: torch.Tensor, how: str = "SUM") -> torch.Tensor:
        """The sum (or MAX) of a small tensor over all processes, in fp64 on the CPU."""
        value = value.detach().to("cpu", torch.float64)
        if self.world > 1:
            value = value.to(self.device if self.device.type == "cuda" else "cpu")
            torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, how))
        return value.cpu()

    def shared(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]

    def note(self, **facts) -> None:
        """Write down in run.json what is now known of the run."""
        self.about |= facts
        if self.is_main:
            with writing(self.folder / "run.json"):
                write_file(self.folder / "run.json", json.dumps(self.about, indent=1))

    def say(self, text: str = "") -> None:
        if self.is_main:
            self.console.print(data.visible(text), markup=False, highlight=False)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def load(self, spec: str) -> model.GPT:
        """The model to train, on the device, with fresh adapters if the run has any."""
        cfg, folder = self.cfg, model.find_model(spec)
        self.model_folder = folder
        for part in [folder, Path(cfg.adapter)] if cfg.adapter else [folder]:
            if remark := data.check_tokenizer(part):
                self.say(f"note: {remark}.")
        if cfg.adapter and (remark := lora.check_base(cfg.adapter, spec)):
            self.say(f"note: {remark}.")
        self.say(f"loading {spec} ...")
        with self.busy("reading the weights"):
            gpt = self.start_model()
        if (words := gpt.config.vocab_size) <= data.EOT:
            raise ValueError(f"{spec} knows {words:,} words: it has another tokenizer than GPT-2's of {data.EOT + 1:,}")
        if cfg.context > gpt.config.n_positions:
            raise ValueError(f"--context {cfg.context} is more than the {gpt.config.n_positions} positions of {spec}")
        stage = {"stage": self.stage, "model": spec, "adapter": cfg.adapter, "data": list(cfg.data)}
        self.about["lineage"] = [*lineage_of(folder), stage]
        self.about["model"] = {"name": spec, "adapter": cfg.adapter,
                               "parameters": sum(p.numel() for p in gpt.parameters()),
                               "sha256": weights_sha256(gpt.state_dict())}
        if cfg.lora_rank:
            torch.manual_seed(cfg.seed)
            lora.add_adapters(gpt, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.rslora, cfg.lora_targets)
            model.share_equal_rows(gpt)
            if self.dtype == torch.bfloat16 and not cfg.fsdp:  # autocast would cast the frozen weights in every step
                for layer in lora.adapters(gpt).values():
                    layer.base.to(self.dtype)
        gpt.dropout, gpt.recompute_activations = cfg.dropout, cfg.recompute
        return gpt.to(self.device)

    def start_model(self) -> model.GPT:
        """The model as the run finds it, with the adapters that were given merged in."""
        gpt = model.read_model(self.model_folder)
        self.merged = lora.merge_adapters(gpt, self.cfg.adapter) if self.cfg.adapter else {}
        return gpt


def place_among_processes() -> tuple[int, int]:
    """(rank, processes) as torchrun and its like tell them, by RANK; without that there is one process."""
    if "RANK" not in os.environ:
        return 0, 1
    told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if not all(told) or not all(map(str.isdecimal, told[:2])) or int(told[0]) >= int(told[1]):
        raise ValueError(f"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are {told} in the environment.\n"
                         "For several processes start them with torchrun, which sets all; for one:  unset RANK")
    return int(told[0]), int(told[1])


class Interrupted(SystemExit):
    """A signal asked the run to stop; `code` is the conventional exit code."""


def weights_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names and values: a run that is resumed must start from the same model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def versions(device: torch.device) -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


# ---- several processes ---------------------------------------------------------------------------


def parallelise(gpt: model.GPT, loss_fn, cfg: Settings, run: Run):
    """loss_fn as the forward of a module, which is where DDP and FSDP2 hook in, and that module made parallel."""

    class Loss(torch.nn.Module):
        def forward(self, batch):
            return loss_fn(self.gpt, batch)

    if cfg.compile:
        for attend in (model.Packed, model.KVCache):  # their shapes never repeat: compiling for each would never end
            attend.__call__ = torch.compiler.disable(attend.__call__)
        for block in gpt.h:
            block.compile()  # in place: the weights keep their names
    loss = Loss()
    loss.gpt = gpt
    if run.world > 1 and cfg.fsdp:
        from torch.distributed.fsdp import fully_shard

        for part in (*gpt.h, loss):
            fully_shard(part)
            part.set_gradient_divide_factor(1.0)  # the loop divides by the count
            part.set_force_sum_reduction_for_comms(True)  # so sums, on every backend (pytorch issue 162338)
    elif run.world > 1:
        ids = [run.device.index] if run.device.type == "cuda" else None
        parallel = torch.nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(parallel).parameters  # PyTorch renamed it
        loss = parallel(loss, device_ids=ids, gradient_as_bucket_view=True,  # buffers are the same everywhere
                        **{"forward_sync_buffers" if newer else "broadcast_buffers": False})
    return loss


def synchronised(loss, last: bool):
    """DDP's gradients travel in a step's last micro-batch only, FSDP's in each: it never keeps whole ones."""
    waits = isinstance(loss, torch.nn.parallel.DistributedDataParallel) and not last
    return loss.no_sync() if waits else contextlib.nullcontext()


def whole_weights(gpt: model.GPT) -> dict[str, torch.Tensor]:
    """The model's weights in one piece on rank 0, however they are spread."""
    weights = state_dicts.get_model_state_dict(gpt, options=_state_options())
    return {name: w.detach().contiguous() for name, w in weights.items()}


def whole_model(gpt: model.GPT, run: Run) -> model.GPT:
    """On rank 0, a model that can answer on its own: the one in training, or under FSDP a merged copy of it."""
    if not any(hasattr(part, "unshard") for part in gpt.modules()):  # which FSDP2 adds
        return gpt
    weights = whole_weights(gpt)
    if not run.is_main:
        return gpt  # which is never asked: rank 0 alone answers
    with torch.device("meta"):
        copy = model.GPT(gpt.config)
    copy.load_state_dict(lora.merged_weights(gpt, weights), assign=True)
    return copy.to(run.device)


def _state_options(**more):
    return state_dicts.StateDictOptions(**{"full_state_dict": True, "cpu_offload": True} | more)


# ---- before and after ----------------------------------------------------------------------------


def begin(gpt: model.GPT, rows: data.Data, cfg: Settings, run: Run) -> bool:
    """Claim the folder, say what is about to happen and answer the prompts; False if the run is finished already."""
    if not rows.train:
        raise ValueError(f"--data {' '.join(cfg.data)}: no row is left to train on.\n"
                         f"See what was dropped and why: {look_at(cfg)}")
    learning = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    report = rows.report_json()
    old = open_folder(run, {"data": {"sha256": rows.fingerprint, **report}, "trainable": learning})
    if old.get("finished"):
        out = shlex.quote(str(run.folder))
        run.say(f"{run.folder} is finished. Talk to it: uv run chat.py --model {out}\n"
                f"To train it further: --model {out} --out {out}-2; to train it anew: --overwrite")
        return False
    about = run.about["model"]
    loaded = sum(p.numel() * p.element_size() for p in gpt.parameters())
    taken = max(loaded, model.memory_taken(run.device))  # on a CPU by Python, PyTorch and the data too
    need = taken - loaded + model.memory_estimate(gpt, max(cfg.micro_batch_tokens, cfg.context), cfg.context, run.dtype,
                                                  run.world if cfg.fsdp else 1)  # which has the weights in it
    free = taken + model.memory_free(run.device)
    dropped, unused = ", ".join(f"{n:,} {why}" for why, n in report["dropped"].items()), ", ".join(report["unused"])
    passes = cfg.steps * cfg.batch_size / len(rows.train)
    facts = {
        "model": f"{about['name']}{' with ' + cfg.adapter if cfg.adapter else ''}: {about['parameters']:,} parameters, "
                 f"{learning:,} trained",
        "data": f"{' '.join(cfg.data)}: {len(rows.train):,} {cfg.row_name} to train on, {len(rows.val):,} to validate"
                + (f"; dropped: {dropped}" if dropped else "") + (f"; keys not used: {unused}" if unused else ""),
        "steps": f"{cfg.steps:,} of {cfg.batch_size} {cfg.row_name}, "
                 f"{passes:{'.2g' if passes < 10 else ',.0f'}} times the data",
        "device": f"{run.device.type}, {str(run.dtype).removeprefix('torch.')}, {run.world} "
                  f"{'process' if run.world == 1 else 'processes'}",
        "memory": f"about {need / 1e9:.1f} GB at the peak, {free / 1e9:.1f} GB free",
        "folder": str(run.folder),
    }
    if run.is_main:
        table = Table("", Column(overflow="fold"), show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in facts.items():
            table.add_row(name, data.visible(value))
        table.add_row("settings", data.visible(flags(cfg, besides=("model", "data", "out", "steps", "batch_size"))))
        run.console.print(table)
        if free and need > free:
            run.say(f"This will hardly fit. Try --micro-batch-tokens {max(cfg.context, cfg.micro_batch_tokens // 2)}, "
                    "--recompute, --lora-rank 8, or a smaller --model.")
        if passes > 10:
            batch_size, steps = data.three_passes(len(rows.train))
            run.say(f"Each of the {cfg.row_name} comes {passes:,.0f} times. After some ten times a model says them by "
                    f"heart and forgets\nother things; --batch-size {batch_size} --steps {steps} would be three times.")
    if "before" not in run.about:
        asked = bool(cfg.prompts or run.checks)
        if asked:
            run.say("answering prompts and checks before the first step ...")
        # of the model as it stands on the disk, in fp32: so the last stage's scores after and this one's before are the
        # same. The one in training has frozen weights in bf16, of the base for one stage and merged ones for the next
        run.note(before=assess(run.start_model().to(run.device), cfg, run) if asked and run.is_main else
                 {"replies": []})
    show("before training", run.about["before"]["replies"], run)
    return True


def finish(gpt: model.GPT, metrics: dict, cfg: Settings, run: Run, next_command: str) -> dict:
    """Export the model, answer the prompts again, draw the curves, and name the next command."""
    run.say("\nwriting the model, answering prompts and checks ...")
    with run.busy("writing the model"):
        export(gpt, cfg, run)
    if not run.is_main:
        return metrics
    trained = model.read_model(run.folder).to(run.device)
    after = assess(trained, cfg, run)
    moved = likelier(trained, after["replies"], run)
    before, final = run.about["before"], {k: v for k, v in metrics.items() if k != "step"}
    run.note(after=after)
    with writing(run.folder / "curves.png"), run.busy("drawing the curves"):
        plot_curves([run.folder], run.folder / "curves.png")
        write_file(run.folder / "samples.md", _samples(run, before, after, moved))
        write_file(run.folder / "README.md", card(run, before, after, final))
    best = min((r for r in history(run.folder) if "val_loss" in r), key=lambda r: r["val_loss"], default=None)
    run.note(metrics=final, best=best, finished=True)
    tidy(run.folder)  # the run that this one replaced, if any, may go now
    show("after training", after["replies"], run)
    show_likelier(moved, run)
    if "checks" in after:
        run.console.print(checks_table(before.get("checks", {}), after["checks"]))
    run.say(f"\ntrained in {run.about['seconds']:,.0f} s, {run.about['seconds'] / cfg.steps:,.3g} s a step all told")
    if best:
        accuracy = f", reward accuracy {final['val_reward_accuracy']:.1%}" if "val_reward_accuracy" in final else ""
        run.say(f"validation loss {final['val_loss']:.4f}{accuracy} (lowest: {best['val_loss']:.4f} after step "
                f"{best['step']} of {cfg.steps})")
    run.say(f"in {run.folder}: the model as it was after the last step, curves.png, samples.md, run.json")
    run.say(f"next: {next_command}")
    return metrics


def assess(gpt: model.GPT, cfg: Settings, run: Run) -> dict:
    """What a model answers to the run's prompts and how it does on its checks."""
    with run.progress("prompts and checks", turns(cfg.prompts) + len(run.checks)) as advance:
        found = {"replies": converse(gpt, cfg.prompts, cfg.reply_tokens, advance)}
        said = [m["content"] for talk in found["replies"] for m in talk if m["role"] == "assistant"]
        found["repetition"] = sum(map(data.repetition, said)) / len(said) if said else None
        if run.checks:
            replies = answer(gpt, [check.messages for check in run.checks], cfg.reply_tokens, advance)
            found["checks"] = data.tally([data.judge(check, text, ended)
                                          for check, (text, ended) in zip(run.checks, replies, strict=True)])
    return found


def answer(gpt: model.GPT, conversations: list[data.Conversation], max_new_tokens: int,
           advance=lambda replies: None) -> list[tuple[str, bool]]:
    """The likeliest reply to each conversation, and whether it ended by itself; advance is told how many more are."""
    room = gpt.config.n_positions - min(max_new_tokens, gpt.config.n_positions // 2)
    conversations = [data.without_oldest(c, room, reply=True) for c in conversations]
    prompts = [data.render(c, reply=True)[0].tolist()[-room:] for c in conversations]
    training = gpt.training
    gpt.eval()
    replies = model.generate_batch(gpt, prompts, max_new_tokens, advance=advance)
    gpt.train(training)
    return [(data.text_of([t for t in ids if t != data.EOT]).strip(), data.EOT in ids) for ids in replies]


def turns(prompts: tuple[str, ...]) -> int:
    return sum(len(prompt.split(" | ")) for prompt in prompts)


def converse(gpt: model.GPT, prompts: tuple[str, ...], max_new_tokens: int,
             advance=lambda replies: None) -> list[data.Conversation]:
    """Each prompt's turns (separated by " | ") put to the model one after another."""
    talks: list[data.Conversation] = [[] for _ in prompts]
    for questions in zip_longest(*(prompt.split(" | ") for prompt in prompts)):
        asked = [i for i, question in enumerate(questions) if question is not None]
        for i in asked:
            talks[i].append({"role": "user", "content": questions[i]})
        for i, (text, _) in zip(asked, answer(gpt, [talks[i] for i in asked], max_new_tokens, advance), strict=True):
            talks[i].append({"role": "assistant", "content": text})
    return talks


def show(when: str, talks: list[data.Conversation], run: Run) -> None:
    """What the model answers, with a heading that says when, at the window's width."""
    if talks:
        width = min(88, run.console.width)
        run.say("\n\n".join([f"\n{when}:", *(data.transcript(talk, width) for talk in talks)]))


Words = list[tuple[str, float]]  # pieces of a reply, mostly tokens, and a number for each


def likelier(gpt: model.GPT, talks: list[data.Conversation], run: Run) -> list[list[Words]]:
    """Of each talk's replies, by how much each word is likelier than before the run: log pi - log pi_ref, in nats.

    Nothing where the model that the run began from is another one by now, or a talk is too long.
    """
    found: list[list[Words]] = [[] for _ in talks]
    try:
        reference = run.start_model()
    except (OSError, ValueError):
        return found
    if weights_sha256(reference.state_dict()) != run.about["model"]["sha256"]:
        return found
    reference.to(run.device).eval()
    for talk, replies in zip(talks, found, strict=True):
        ids, mask = data.render(data.without_oldest(talk, gpt.config.n_positions))
        if len(ids) > gpt.config.n_positions:
            continue
        logp, was = (np.pad(model.scores(m.eval(), ids.tolist(), 1)[0].numpy(), (1, 0)) for m in (gpt, reference))
        for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1):
            if mask[part[0]]:
                pieces = data.pieces(ids[part].tolist())
                starts = np.cumsum([0, *(tokens for _, tokens in pieces)])[:-1]
                moves = np.add.reduceat((logp - was)[part], starts).tolist()
                replies.append([(text, move) for (text, _), move in zip(pieces, moves, strict=True)])
    return found


def show_likelier(moved: list[list[Words]], run: Run) -> None:
    """The replies on backgrounds that say which words became likelier; as numbers where there is no colour."""
    if not (replies := list(chain.from_iterable(moved))):
        return
    run.say(f"which words of these {run.stage} made likelier, log pi - log pi before:\n")
    shades = run.console.color_system in ("256", "truecolor") and not run.console.no_color
    for words in replies:
        text, legend = data.shades(words, data.MOVED)
        run.console.print(text if shades else data.shaded(words), end="\n\n")
    run.console.print(legend if shades else data.NATS, highlight=False)
    run.say()


# how the scores of a group of checks are shown, by their headings
SCORES = {"correct": "{correct:.0%}", "said twice": "{twice:.1%}", "correct and said once": "{good:.0%}",
          "facts per reply": "{facts:.2f}", "ended": "{ended:.0%}", "words per reply": "{words:.1f}"}


def checks_table(before: dict, after: dict):
    """The scores of two assessments side by side, as a rich table."""
    table = Table(title="checks, before -> after", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("group", overflow="fold", min_width=min(12, max(map(len, after))))
    for heading in ("asked", *SCORES):
        heading = heading.replace(" per ", "\nper ").replace(" and ", " and\n")
        table.add_column(heading, justify="right", overflow="fold")
    for group, now in after.items():
        table.add_row(Text(data.visible(group)), str(now["n"]), *_changes(before.get(group, now), now))
    return table


def _changes(before: dict, after: dict) -> list[str]:
    before = before if before.keys() >= after.keys() else after  # it may be of an older version
    return [f"{form.format(**before)} -> {form.format(**after)}" for form in SCORES.values()]


def _samples(run: Run, before: dict, after: dict, moved: list[list[Words]]) -> str:
    """The same questions before and after, side by side; below, which words of the answers have become likelier."""
    parts = [f"# {_cell(run.folder)}: the same prompts before and after {run.stage}\n"]
    for was, now, replies in zip(before["replies"], after["replies"], moved, strict=True):
        parts.append(f"## {_cell(data.excerpt(now[0]['content']))}\n")
        parts.append(_fenced(_beside("before", "after") + "\n\n" + "\n".join(
            _beside(*(data.transcript([message], 43) for message in both))
            for both in zip(was, now, strict=True)).rstrip()))
        if replies:
            parts.append(f"Each word of the replies after {run.stage}: log pi - log pi before, "
                         f"{data.NATS.strip('()')}.\n")
            parts.append(_fenced("\n\n".join(textwrap.fill(data.shaded(words), 88) for words in replies)))
    if None not in (before.get("repetition"), after.get("repetition")):
        parts.append(f"Repetition in these replies (rep-4): {before['repetition']:.1%} before, "
                     f"{after['repetition']:.1%} after\n")
    if "checks" in after:
        headings = ["checks", "questions", *SCORES]
        parts += ["## Checks, before -> after\n", _line(headings), "|---" * len(headings) + "|"]
        parts += [_line([group, now["n"], *_changes(before.get("checks", {}).get(group, now), now)])
                  for group, now in after["checks"].items()] + [""]
    return "\n".join(parts)


def _beside(left: str, right: str) -> str:
    """Two texts in columns of 44 characters."""
    lines = zip_longest(left.split("\n"), right.split("\n"), fillvalue="")
    return "\n".join((line + " " * max(1, 45 - cell_len(line)) + other).rstrip() for line, other in lines)


def _fenced(text: str) -> str:
    """A text as a block of Markdown, between fences that are longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}\n"


CARD = """\
---
{metadata}
---

# {title}

{history}. It answers in turns of plain text, for which the tokenizer has the chat template:

```python
from transformers import pipeline

chat = pipeline("text-generation", {name!r})
print(chat([{{"role": "user", "content": {question!r}}}], do_sample=False)[0]["generated_text"][-1]["content"])
```

{talk}More, and the same before training: [samples.md](samples.md). A model of this size is often wrong, and nothing
keeps it from saying harmful things.

{figures}

![curves of the training](curves.png)

Trained in {seconds:,.0f} s on {device} with PyTorch {torch}; settings: {settings}. All of them, and the counts of the
data, are in run.json.
"""


def card(run: Run, before: dict, after: dict, final: dict) -> str:
    """The folder's README.md, with the metadata that the Hugging Face Hub reads.

    A licence is named where those of the first model and of all data are known to allow it.
    """
    about, lineage = run.about, run.about["lineage"]
    base, names = lineage[0]["model"], {data.parse_spec(spec)[0]: None for stage in lineage for spec in stage["data"]}
    sets = [data.DATA_SETS[name] for name in names]
    known = all(found.licence for found in sets) and not any(stage["adapter"] for stage in lineage)
    licence = {"license": "mit"} if known and base in ("sample", *model.SIZES) else {
        "license": "other", "license_name": "to-be-chosen", "license_link": "LICENSE"}
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation", **licence,
                "base_model": f"openai-community/{base}" if base in model.SIZES else None,
                "datasets": [found.hub for found in sets if found.hub], "language": [run.cfg.language] * known,
                "tags": ["gpt2", "conversational", *(stage["stage"] for stage in lineage)]}
    history = f"GPT-2 with {about['model']['parameters'] / 1e6:,.0f} million parameters ({base})" + "".join(
        f"{', with the adapter ' + stage['adapter'] if stage['adapter'] else ''}, then {stage['stage'].upper()} on "
        + ", ".join(stage["data"]) for stage in lineage)
    figures = {name: f"{before[key]:,.4g} -> {final[key]:,.4g}" for name, key in (
        ("validation loss", "val_loss"), ("reward accuracy", "val_reward_accuracy"))
        if None not in (before.get(key), final.get(key))}
    if now := after.get("checks", {}).get("all"):
        changes = _changes(before.get("checks", {}).get("all", now), now)
        figures |= {f"checks: {name}": change for name, change in zip(SCORES, changes, strict=True)}
    settings = flags(run.cfg, besides=("model", "adapter", "data", "out", "overwrite"))
    return CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items() if value),
        title=_cell(run.folder.name), name=run.folder.name, history=_cell(history),
        figures="\n".join(map(_line, [("", "before -> after"), ("---", "---"), *figures.items()])),
        question=after["replies"][0][0]["content"] if after["replies"] else "Hello!",
        talk="".join(f"{_fenced(data.transcript(talk))}\n" for talk in after["replies"][:1]),
        seconds=about["seconds"], **{key: about["versions"][key] for key in ("device", "torch")},
        settings=_cell(settings))


def _line(cells) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(content) -> str:
    """A text on one line of Markdown, in which it opens no column, tag or code."""
    return re.sub(r"[|<`\\]", r"\\\g<0>", " ".join(data.visible(str(content)).split()))


def flags(cfg: Settings, besides: tuple[str, ...] = ()) -> str:
    """The settings that are not the script's defaults, as one would type them."""
    typed, defaults = [], type(cfg)()
    for name, value in asdict(cfg).items():
        if name not in besides and value != getattr(defaults, name):
            typed.append(option(f"no-{name}" if value is False else name))
            if not isinstance(value, bool):
                typed.append(shlex.join(map(str, value if isinstance(value, tuple) else [value])))
    return " ".join(typed) or "the defaults"


# ---- the run folder ------------------------------------------------------------------------------

REPLACED = ".replaced"  # in a run's folder: the run that --overwrite replaces, whole, until the new one is finished
# all that a run writes into its folder, and what would make a folder open as another model than the one written there
WRITTEN = ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
           "vocab.json", "merges.txt", "chat_template*.jinja", "additional_chat_templates", "adapter", "checkpoints",
           "reference-*.safetensors", "metrics.jsonl", "curves.png", "samples.md", "README.md", "tensorboard",
           ".export.tmp", "run.json")
MODELS = ("*.safetensors", "*.index.json", "*.bin", "adapter_*", "tokenizer*", "special_tokens_map.json",
          "added_tokens.json", "chat_template*")


def own_files(folder: Path) -> list[Path]:
    """What a run has written into its folder: config.json, by which a model opens, first, and run.json last."""
    return [path for pattern in WRITTEN for path in sorted(folder.glob(pattern))]


def look_at_folder(folder: Path) -> None:
    """Refuse an --out that is no folder, or one with somebody else's files in the way of a run's."""
    other = "\nGive another folder: --out"
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is not a folder{other}")
    if data.clean(str(folder)) != str(folder).strip():
        raise ValueError(f"--out {folder} is not UTF-8, which the names of models' files have to be{other}")
    try:
        if read_about(folder):
            return
    except ValueError as error:
        raise ValueError(f"{error}{other}") from None
    if strangers := sorted({path.name for pattern in WRITTEN + MODELS for path in folder.glob(pattern)}):
        raise ValueError(f"{folder} holds {', '.join(strangers[:4])}, and no run.json describes a run that wrote it: "
                         f"it is left alone.{other}")


def open_folder(run: Run, about: dict) -> dict:
    """Claim the run folder for this configuration; returns the run.json of the run that is continued, or {}.

    Another configuration or other data in the same folder is refused with the difference shown. All else that can be
    known to fail has been looked at: from here on the folder is another one.
    """
    cfg, old = run.cfg, {}
    about = run.about | about
    if run.is_main:
        old = read_about(run.folder)
        if cfg.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":  # not a run's own restart
            old = {}
            if before := set_aside(run.folder):
                keep = shlex.join(["mv", str(before), f"{run.folder}-before"])
                run.say(f"{before} holds the run that was there, until this one is finished. To keep it: {keep}")
        elif changes := old and _differences(old, about, asdict(type(cfg)())):
            if begun(run.folder):
                shown = changes[:2] + ([f"... and {len(changes) - 2} more"] if len(changes) > 2 else [])
                raise ValueError(f"{run.folder} holds another run:\n" + "\n".join(shown)
                                 + "\nUse another --out, or --overwrite to start anew")
            old = {}  # nothing would be lost: a command that was wrong can be mended
        if not old:
            write_file(run.folder / "run.json", json.dumps(about, indent=1))
        elif old.get("finished") and not (run.folder / "config.json").is_file() and checkpoint_folders(run.folder):
            old["finished"] = False  # its model was deleted, and can be had again
    old = run.shared(old)
    run.about = old or about
    return old


def begun(folder: Path) -> bool:
    return bool(checkpoint_folders(folder)) or (folder / "model.safetensors").is_file()


def set_aside(folder: Path) -> Path | None:
    """Make way for another run; returns where the one that was there lies now, or an older one that is finished.

    An unfinished run that replaced a finished one goes, and so does one without a checkpoint.
    """
    before, there = folder / REPLACED, read_about(folder)
    goes = not there.get("finished") and (read_about(before).get("finished") or not begun(folder))
    if not goes:
        discard(before)
    target = folder / f".{REPLACED}.old" if goes else before
    target.mkdir(exist_ok=True)
    for path in own_files(folder):
        os.replace(path, target / path.name)
        sync(target)
        sync(folder)
    if goes:
        remove(target)
    return before if before.is_dir() else None


def tidy(folder: Path) -> None:
    """Put right what a kill left half moved, and discard what a finished run replaced."""
    before = folder / REPLACED
    remove(folder / f".{REPLACED}.old")
    if before.is_dir() and not (read_about(before) and read_about(folder)):
        for path in reversed(own_files(before)):
            os.replace(path, folder / path.name)
        with contextlib.suppress(OSError):
            before.rmdir()
    elif read_about(folder).get("finished"):
        discard(before)


def discard(folder: Path) -> None:
    """Remove a folder, renamed first: one that is half deleted must not look like a whole one."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old")
        os.replace(folder, doomed)
        remove(doomed)


def _differences(old: dict, new: dict, defaults: dict) -> list[str]:
    new, defaults = json.loads(json.dumps([new, defaults]))  # tuples become lists, as in the file
    before = defaults | old.get("config", {})  # a setting may be younger than the run
    pairs = [(option(k), before[k], v) for k, v in new["config"].items() if k not in MAY_DIFFER | BY_CONTENT]
    pairs.append(("stage", old.get("stage"), new["stage"]))
    pairs += [(f"--{what} (sha256)", *(about.get(what, {}).get("sha256") for about in (old, new)))
              for what in ("data", "model")]
    out = shlex.quote(str(before["out"]))
    longer = f" (to train a finished run further: --model {out} --out {out}-2)" if old.get("finished") else ""
    return [f"  {name}: {_short(was)} there, {_short(now)} now{longer if name == '--steps' else ''}"
            for name, was, now in pairs if was != now]


def _short(value) -> str:
    return repr(value) if not isinstance(value, str) or len(value) < 40 else value[:12] + "..."


def export(gpt: model.GPT, cfg: Settings, run: Run) -> None:
    """Leave the finished model as a folder that transformers and PEFT open as it is."""
    weights = whole_weights(gpt)
    if not run.is_main:
        return
    if any(layer.base.weight.dtype != torch.float32 for layer in lora.adapters(gpt).values()):  # for training only
        exact = run.start_model().state_dict()
        if weights_sha256(exact) != run.about["model"]["sha256"]:
            raise ValueError(f"--model {cfg.model} has other weights now than when this run began, which needs them.\n"
                             "Put them back, then run the same command again: all steps are in the checkpoint.")
        weights |= {f"{name}.base.{part}": exact[f"{name}.{part}"]
                    for name in lora.adapters(gpt) for part in ("weight", "bias")}
    temporary, opens = run.folder / ".export.tmp", "config.json"
    with writing(run.folder / "model.safetensors", 4 * run.about["model"]["parameters"]):
        remove(temporary)
        gpt.save_pretrained(temporary, lora.merged_weights(gpt, weights))
        data.save_tokenizer(temporary, gpt.config.n_positions)
        if cfg.lora_rank:
            lora.save_adapters(gpt, temporary / "adapter", base_name(cfg.model), weights, run.merged)
        for file in temporary.rglob("*"):
            sync(file)
        remove(run.folder / opens)  # until it is there again, last, the folder is no model's: never half of two
        remove(run.folder / "adapter")
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == opens):
            sync(run.folder)
            os.replace(path, run.folder / path.name)
        remove(temporary)
        sync(run.folder)


def base_name(spec: str) -> str:
    """What an adapter calls its base: its name on the Hub, or its path as seen from here, where PEFT looks for it."""
    if (size := model.size_of(spec)) and not Path(spec).is_dir():
        return f"{model.HUB}/{size}"
    folder, here = model.find_model(spec).absolute(), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


# ---- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(gpt: model.GPT, optimizer, state: State, cfg: Settings, run: Run) -> None:
    """Write checkpoints/step-NNNNNNNN so that at every moment a whole one exists: this or the one before.

    Into a temporary folder, everything to the disk, the manifest with sizes and sha256 last, then one rename. Older
    ones go only after the new one has been read back. Raises OSError with the bytes needed and free.
    """
    weights, moments = state_dicts.get_state_dict(gpt, optimizer, options=_state_options(ignore_frozen_params=True))
    if not run.is_main:
        return
    weights = {name: w.detach().contiguous() for name, w in weights.items()}
    tensors = {f"{name}.{kind}": moment.contiguous()
               for name, kinds in moments["state"].items() for kind, moment in kinds.items()}
    folder = run.folder / "checkpoints" / f"step-{state.step:08d}"
    if folder.is_dir() and sound(folder, run):
        return
    with writing(folder, sum(t.numel() * t.element_size() for t in (*weights.values(), *tensors.values()))):
        with written_whole(folder) as temporary:
            temporary.mkdir(parents=True)
            safetensors.save_file(weights, temporary / "model.safetensors")
            safetensors.save_file(tensors, temporary / "optimizer.safetensors")
            rest = {"state": asdict(state), "param_groups": moments["param_groups"]}
            (temporary / "state.json").write_text(json.dumps(rest), encoding="utf-8")
            files = {path.name: {"size": path.stat().st_size, "sha256": data.file_sha256(path)}
                     for path in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(
                sealed({"files": files, "config": asdict(cfg), "versions": versions(run.device)}), encoding="utf-8")
            sync(run.folder / "metrics.jsonl")  # whose lines before this step are not written again
        if why := verify_checkpoint(folder):
            raise OSError(errno.EIO, f"read back, {why}")
    run.verified.add(folder.name)
    with contextlib.suppress(OSError):  # the next save tries again
        _prune_checkpoints(cfg.keep, run)


def load_checkpoint(gpt: model.GPT, optimizer, run: Run) -> State | None:
    """Go on from the newest checkpoint that verifies; says which were skipped and why. None if there is none."""
    weights, moments, state = {}, {}, None
    if run.is_main:  # the others get it from rank 0, which has the run's folder
        for leftover in (run.folder / "checkpoints").glob(".step-*"):
            remove(leftover)
        if folder := next((folder for folder in checkpoint_folders(run.folder) if sound(folder, run)), None):
            saved = json.loads((folder / "state.json").read_text())
            weights, state = safetensors.load_file(folder / "model.safetensors"), State(**saved["state"])
            moments = {"state": defaultdict(dict), "param_groups": saved["param_groups"]}
            for key, moment in safetensors.load_file(folder / "optimizer.safetensors").items():
                name, _, kind = key.rpartition(".")
                moments["state"][name][kind] = moment.clone()  # the loop changes it, and the file stays mapped
            run.say(f"resumed {folder}")
    if state := run.shared(state):
        options = _state_options(cpu_offload=False, broadcast_from_rank0=run.world > 1, strict=False,
                                 ignore_frozen_params=True)
        # one by one: set_state_dict takes the other ranks' empty weights for the wish to have none, and all would wait
        state_dicts.set_optimizer_state_dict(gpt, optimizer, moments, options=options)
        state_dicts.set_model_state_dict(gpt, weights, options=options)
    return state


def sound(folder: Path, run: Run) -> bool:
    """Whether a checkpoint verifies, said once; one that does not is renamed, and counts as none from here on."""
    if folder.name not in run.verified and (why := verify_checkpoint(folder)):
        damaged = folder.with_name(f"damaged-{folder.name}")
        run.say(f"skipped {folder}: {why}")
        with contextlib.suppress(OSError):
            remove(damaged)
            os.replace(folder, damaged)
            run.say(f"it is {damaged} now, and can be deleted")
        return False
    run.verified.add(folder.name)
    return True


def verify_checkpoint(folder: Path) -> str:
    """Why a checkpoint cannot be trusted, or "" if every file is as its manifest says."""
    name = "manifest.json"
    try:
        text = (folder / name).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if text != sealed(manifest):
            return f"{name} is damaged (its sha256 differs)"
        if manifest["files"].keys() != {"model.safetensors", "optimizer.safetensors", "state.json"}:
            return f"{name} is not that of a checkpoint"
        for name, about in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != about["size"]:
                return f"{name} has {size} bytes instead of {about['size']}"
            if data.file_sha256(folder / name) != about["sha256"]:
                return f"{name} is damaged (its sha256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{name} is damaged"
    return ""


def sealed(about: dict) -> str:
    """The text of a manifest, which ends with the sha256 of what is before that."""
    about = {key: value for key, value in about.items() if key != "sha256"}
    return json.dumps(about | {"sha256": hashlib.sha256(json.dumps(about).encode()).hexdigest()}, indent=1)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((folder / "checkpoints").glob("step-[0-9]*"), reverse=True)


def _prune_checkpoints(keep: int, run: Run) -> None:
    """Keep the newest that verify, and the one with the lowest validation loss."""
    losses = {f"step-{r['step']:08d}": r["val_loss"] for r in read_metrics(run.folder) if "val_loss" in r}
    folders = checkpoint_folders(run.folder)
    best = min((p for p in folders if p.name in losses), key=lambda p: losses[p.name], default=None)
    kept = list(islice((folder for folder in folders if sound(folder, run)), keep))
    for path in folders[folders.index(kept[-1]) + 1:] if len(kept) == keep else ():
        if path != best:
            discard(path)


# ---- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(what: Path, size: int = 0):
    """Turn the disk's trouble inside into an OSError that names what could not be written, bytes needed and free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(next(p for p in what.absolute().parents if p.exists())).free
        raise OSError(getattr(error, "errno", None) or errno.EIO,
                      f"{what} could not be written: {getattr(error, 'strerror', None) or error}\n"
                      + (f"It needs {size:,} bytes; " if size else "") + f"{free:,} bytes are free. "
                      "Earlier checkpoints are untouched.\n"
                      "Make room, then run the same command again, without --overwrite: it goes on from the newest "
                      "checkpoint.") from None


# ---- log and curves ------------------------------------------------------------------------------


class Log:
    """metrics.jsonl, the progress on screen, and a tracker if one was asked for."""

    def __init__(self, run: Run, state: State):
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        left = TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True))
        of = "step {task.completed}/{task.total}"

        class Latest(TextColumn):
            def render(self, task) -> Text:
                others = len(of.format(task=task)) + 8 + len(left.render(task)) + 1 + 4  # bar, time, spinner, gaps
                return Text(run.stopping or run.at_work or summary(latest, run.console.width - others))

        self.run, self.path = run, run.folder / "metrics.jsonl"
        self.latest = latest = {}
        if run.is_main:  # the line of the checkpoint's step and those after it will be written again
            records = read_metrics(run.folder) if self.path.is_file() else []
            write_file(self.path, "".join(json.dumps(r) + "\n" for r in records if r["step"] < state.step))
        self.tracker = _tracker(run) if run.is_main else None
        if run.is_main and run.console.is_interactive and sys.stdout.isatty():
            run.bar = Progress(TextColumn(of, table_column=Column(no_wrap=True)), BarColumn(bar_width=8), left,
                               SpinnerColumn("line"), Latest("", table_column=Column(overflow="fold")),
                               console=run.console, speed_estimate_period=3600)  # a step may take a minute
            self.task = run.bar.add_task("", total=run.cfg.steps, completed=state.step)
            run.bar.start()

    def write(self, record: dict) -> None:
        if not self.run.is_main:
            return
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.tracker:
            try:
                self.tracker(record)
            except Exception as error:  # of whatever kind: the run has its own record
                self.tracker = None
                self.run.say(f"--tracker {self.run.cfg.tracker} gets no more (metrics.jsonl does): "
                             + data.excerpt(error))
        self.latest.update(record)  # so that the bar goes on showing the last validation
        if not self.run.bar:
            self.run.say(f"step {record['step']:>5}/{self.run.cfg.steps}  {summary(record)}")

    def advance(self, step: int) -> None:
        if self.run.bar:
            self.run.bar.update(self.task, completed=step)

    def close(self) -> None:
        if self.run.bar:
            self.run.bar.stop()
            self.run.bar = None


def summary(record: dict, width: int = 1000) -> str:
    """One logged step on one line: in a narrow window what comes first, and the loss in any."""
    parts = [form.format(record[key]) for key, form in {
        "loss": "loss {:.4f}", "val_loss": "val {:.4f}", "reward_accuracy": "accuracy {:.0%}",
        "reward_margin": "margin {:+.3f}", "chosen_reward": "chosen {:+.3f}", "rejected_reward": "rejected {:+.3f}",
        "pairs_per_second": "{:.1f} pairs/s", "tokens_per_second": "{:,.0f} tok/s", "lr": "lr {:.1e}"}.items()
        if key in record and not (key == "tokens_per_second" and "pairs_per_second" in record)]
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def tracker_package(name: str):
    """The module of a tracker, None for none; a folder that Python takes for one (wandb's own is called so) is none."""
    if name == "none":
        return None
    module, called = ("torch.utils.tensorboard", "SummaryWriter") if name == "tensorboard" else (name, "log")
    with contextlib.suppress(ImportError, AttributeError):
        if hasattr(package := importlib.import_module(module), called):
            return package
    raise ValueError(f"--tracker {name} needs a package that is not installed: uv sync --extra {name}")


def _tracker(run: Run):
    if not (package := tracker_package(run.cfg.tracker)):
        return None
    if run.cfg.tracker == "tensorboard":
        writer = package.SummaryWriter(run.folder / "tensorboard")
        return lambda r: ([writer.add_scalar(k, v, r["step"]) for k, v in r.items() if k != "step"], writer.flush())
    try:
        package.init(project="gpt2-chat", name=run.folder.name, config=asdict(run.cfg))
    except Exception as error:  # of whatever kind: nobody is logged in, or there is no network
        raise ValueError(f"--tracker {run.cfg.tracker} cannot begin: {data.excerpt(error)}\n"
                         "Log in to it, or leave out --tracker, which may differ when a run goes on") from None
    return lambda r: package.log({k: v for k, v in r.items() if k != "step"}, step=r["step"])


def read_metrics(folder: Path) -> list[dict]:
    path, records = Path(folder) / "metrics.jsonl", []
    if not path.is_file():
        raise FileNotFoundError(f"'{folder}' is not a run: it has no metrics.jsonl.\nFinish one first: uv run sft.py")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # the last of a run that was killed while writing it
            record = json.loads(line)
            numbers = isinstance(record, dict) and all(isinstance(value, int | float) for value in record.values())
            if numbers and isinstance(record.get("step"), int):
                records.append(record)
    return records


def read_about(folder: Path) -> dict:
    """A run's run.json; {} if it has none. Raises ValueError for one that no run of these scripts wrote."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        return {}
    about = data.read_json(path)
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict) or "stage" not in about:
        raise ValueError(f"{path} describes no run of sft.py or dpo.py")
    return about


def lineage_of(folder: Path) -> list[dict]:
    """The stages that made the model of a folder, [] where no run of these scripts wrote them down."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OSError):
        stages = read_about(folder).get("lineage", [])
        for stage in stages:
            " ".join([stage["stage"], stage["model"], stage["adapter"], *map(str, map(data.parse_spec, stage["data"]))])
        return stages
    return []


def history(folder: Path) -> list[dict]:
    """All that was measured of a run; what was before the first step is a record of step 0."""
    before = read_about(folder).get("before", {})
    start = {"step": 0} | {key: value for key, value in before.items() if key.startswith("val_")}
    return [start, *read_metrics(folder)]


PANELS = [("loss", ("loss", "val_loss"), "nats"),
          ("throughput", ("pairs_per_second",), "pairs / s"), ("throughput", ("tokens_per_second",), "tokens / s"),
          ("gradient norm", ("grad_norm",), "norm"),
          ("rewards (beta x log-ratio)", ("chosen_reward", "rejected_reward"), "nats"),
          ("reward margin", ("reward_margin", "val_reward_margin"), "nats"),
          ("reward accuracy", ("reward_accuracy", "val_reward_accuracy"), "share of pairs"),
          ("KL to the reference", ("kl", "val_kl"), "nats / token")]  # none of the rate, which the settings tell
PICTURE = "gpt2-chat: train.plot_curves"  # by which a picture is known as ours


def plot_curves(folders: list[Path], path: Path) -> None:
    """A picture of one or several runs: a panel for each kind of measurement that they hold, and one of the checks."""
    from matplotlib.figure import Figure

    folders = {Path(f).absolute(): Path(f) for f in folders}  # each once, and as it was given
    shared = os.path.commonpath(folders) if len({f.name for f in folders}) < len(folders) else ""
    runs = {os.path.relpath(f, shared) if shared else f.name: history(f) for f in folders}
    held = [{key for record in records for key in record} for records in runs.values()]
    # one panel of throughput: pairs where all the runs have them, else tokens, which all have
    hidden = "tokens_per_second" if all("pairs_per_second" in keys for keys in held) else "pairs_per_second"
    present = set().union(*held) - {hidden}
    panels = [panel for panel in PANELS if present & set(panel[1])]
    times = ("before", "after") if len(runs) == 1 else ("after",)  # of several runs, what became of each
    checked = {name if len(runs) > 1 else when: read_about(folder).get(when, {}).get("checks")
               for folder, name in zip(folders, runs, strict=True) for when in times}
    checked = {name: scores for name, scores in checked.items() if scores}
    count = len(panels) + bool(checked)
    columns = min(4, count) if count != 4 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows))
    axes = [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]
    if checked:
        groups, axis = list(dict.fromkeys(chain.from_iterable(checked.values()))), axes[-1]
        for i, (name, scores) in enumerate(checked.items()):
            places = [place + (i + 0.5) / len(checked) * 0.8 - 0.4 for place in range(len(groups))]
            axis.barh(places, [scores.get(group, {}).get("good", 0) for group in groups], 0.8 / len(checked),
                      label=_plain(name))
        axis.set(title="checks", xlabel="replies that are correct and say all once", ylabel="questions", xlim=(0, 1))
        axis.set_yticks(range(len(groups)), [textwrap.fill(data.visible(group), 14, break_on_hyphens=False)
                                             for group in groups], parse_math=False)
        axis.set_ylim(len(groups) + 0.6, -0.6)  # from the top down, with room for the legend
        axis.legend(fontsize="small", loc="lower left", ncols=len(checked))
    for axis, (title, keys, unit) in zip(axes, panels, strict=False):
        for name, records in runs.items():
            for key in keys:
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                marks = {"marker": "o", "markersize": 3} if key.startswith("val_") else {"linewidth": 1, "alpha": 0.8}
                label = key if len(runs) == 1 else f"{_plain(name)} {key}"
                if points:
                    axis.plot(*zip(*points, strict=True), label=label, **marks)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        if len(keys) > 1 or len(runs) > 1:
            axis.legend(fontsize="small")
    if len(runs) == 1:
        figure.suptitle(_title(*folders.values()), fontsize="medium", parse_math=False)
    figure.tight_layout()
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": PICTURE})


def _plain(name: str) -> str:
    return data.visible(name).replace("$", r"\$")  # which would begin a formula


def _title(folder: Path) -> str:
    """What a run was made of, and the settings that one asks for first."""
    about = read_about(folder)
    cfg = about.get("config", {})
    first = f"{folder}: {about['stage']} of {cfg.get('model')} on {' '.join(cfg.get('data', []))}" if about else folder
    settings = [f"{option(name)} {cfg[name]}" for name in ("steps", "batch_size", "lr", "lora_rank", "loss", "beta",
                                                           "nll") if name in cfg]
    return data.visible(f"{first}\n{' '.join(settings)}")


# ---- uv run train.py RUNS ------------------------------------------------------------------------


@dataclass
class Compare:
    """Compare finished runs in one table and one picture."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs/sft", "runs/dpo")  # run folders
    out: str = "runs/compare.png"  # where the picture goes
    debug: bool = False  # show the traceback of an error


COLUMNS = [("steps", "step", "{:,}"), ("loss", "loss", "{:.4f}"), ("val loss", "val_loss", "{:.4f}"),
           ("reward\naccuracy", "val_reward_accuracy", "{:.1%}"), ("rep-4", "rep", "{:.1%}"),
           ("checks\ncorrect", "correct", "{:.1%}"), ("correct and\nsaid once", "good", "{:.1%}"),
           ("facts\nper reply", "facts", "{:.2f}"), ("tok/s", "tokens_per_second", "{:,.0f}"),
           ("peak GB", "peak_gigabytes", "{:.2f}")]


def compare(cfg: Compare) -> None:
    picture = Path(cfg.out)
    if picture.exists() and not (picture.is_file() and PICTURE.encode() in picture.read_bytes()[:4096]):
        raise ValueError(f"{picture} is no picture that this script made, so it is left alone.\nGive another --out")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for folder in map(Path, cfg.runs):
        records = read_metrics(folder)
        if not records:
            raise ValueError(f"'{folder}' has not come to its first step: its metrics.jsonl holds none")
        newest = {k: v for record in records for k, v in record.items()}
        newest["peak_gigabytes"] = newest.get("peak_memory_bytes", 0) / 1e9
        try:
            after = read_about(folder).get("after", {})
            newest |= {"rep": after["repetition"]} if after.get("repetition") is not None else {}
            newest |= after.get("checks", {}).get("all", {})
            cells = [form.format(newest[key]) if key in newest else "-" for _, key, form in COLUMNS]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'run.json'} is not as a run writes it: {error}") from None
        table.add_row(data.visible(str(folder)), *cells)
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_curves([Path(f) for f in cfg.runs], picture)
    console = Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(data.visible(f"picture: {cfg.out}"))


if __name__ == "__main__":
    run_script(compare, Compare)
