"""The loop's laws, worked by hand on a model of two weights and checked on a real one; the run folder; the trouble."""

import contextlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chat
import data
import dpo
import lora
import model
import sft
import train

ROOT = Path(__file__).parent.parent


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Twelve conversations of different lengths, one in three with two turns."""
    rows = []
    for i in range(12):
        messages = [{"role": "user", "content": f"What is {i} plus {i}?"},
                    {"role": "assistant", "content": f"It is {2 * i}" + ", as everyone can count" * (i % 4) + "."}]
        if i % 3 == 0:
            messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Quite sure."}]
        rows.append({"messages": messages})
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def settings(tiny_model, chats):
    """sft.Config for runs of seconds; its keywords change settings."""
    def make(**more):
        return sft.Config(**{"model": str(tiny_model), "data": (chats,), "checks": "", "prompts": (), "reply_tokens": 4,
                             "steps": 4, "batch_size": 4, "val_fraction": 0.2, "eval_every": 2, "save_every": 2} | more)
    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The settings of a finished run, with dropout in it and checks before and after."""
    folder = tmp_path_factory.mktemp("finished")
    checks = write_jsonl(folder / "checks.jsonl", [
        {"messages": [{"role": "user", "content": "What is 2 plus 2?"}], "facts": ["4"], "group": "sums [/b]"}])
    cfg = settings(out=str(folder / "run"), dropout=0.1, prompts=("Is [/b] a tag? | Sure?",), checks=checks)
    sft.main(cfg)
    return cfg


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def untimed(found):
    """Metrics without what differs from run to run: speed and memory."""
    return [{k: v for k, v in record.items() if not k.endswith("_per_second") and k != "peak_memory_bytes"}
            for record in found]


# ---- the loop, by hand ---------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """One matrix and one bias."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([[1.0]]))
        self.b = torch.nn.Parameter(torch.tensor([1.0]))


def toy_loss(toy, batch):
    """The gradient of the mean is (0.3, 0.4) times the mean of the tokens."""
    losses = batch.tokens * (0.3 * toy.w[0, 0] + 0.4 * toy.b[0])
    return losses.sum(), torch.tensor(len(losses)), {"largest": batch.tokens.sum()}


def batch_of(*tokens):
    return data.pack([data.Row(np.array(tokens, np.int32), np.ones(len(tokens), bool))], [0])


def run_toy(tmp_path, steps, val=(), loss=toy_loss, toy=None, **more):
    """Train on the micro-batches of `steps`; the toy, its logged steps and what `train` returned."""
    toy = toy or Toy()
    cfg = sft.Config(**{"out": str(tmp_path / "run"), "steps": len(steps), "prompts": (), "lr": 0.1, "warmup": 0.0,
                        "final_lr": 1.0, "weight_decay": 0.0, "eval_every": 0, "save_every": 0} | more)
    with train.Run("toy", cfg) as run:
        run.about["before"] = {}
        last = train.train(toy, loss, lambda step, budget: steps[step], list(val), cfg, run)
    return toy, records(tmp_path / "run"), last


def test_two_steps_by_hand(tmp_path):
    """Mean over the step, clipping, AdamW, decay of the matrix only, and the log."""
    toy, log, last = run_toy(tmp_path, [[batch_of(20), batch_of(4, 8, 8)], [batch_of(1)]], weight_decay=0.5, clip=1.0,
                             beta2=0.99)
    # step 1: the four tokens' mean is 10 (the mean of the micro-batches' means would be 13.3), so the loss is 10 * 0.7
    # and the gradient (3, 4), of norm 5, clipped to (0.6, 0.8). AdamW's first step is lr * sign: w = 0.85 and b = 0.9
    # step 2: loss 0.3 * 0.85 + 0.4 * 0.9, gradient (0.3, 0.4) of norm 0.5. For w, m = (0.054 + 0.03) / 0.19 and
    # v = (0.003564 + 0.0009) / 0.0199, so m / sqrt(v) = 0.9334479; for b the same, all being 4/3 as large
    assert toy.w.item() == pytest.approx(0.85 * 0.95 - 0.09334479, abs=1e-6)
    assert toy.b.item() == pytest.approx(0.9 - 0.09334479, abs=1e-6)
    assert [r["loss"] for r in log] == pytest.approx([7.0, 0.615])
    assert [r["grad_norm"] for r in log] == pytest.approx([5.0, 0.5])
    assert [r["tokens"] for r in log] == [4, 5]
    assert [r["largest"] for r in log] == pytest.approx([10.0, 1.0])  # a metric is divided as the loss is
    assert last == log[-1]


def test_learning_rate_by_hand(settings, tmp_path):
    cfg = settings(lr=2.0, steps=10, warmup=0.2, final_lr=0.1)
    rates = [train.learning_rate(step, cfg) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]  # two steps of warm-up, the first of which is not lost on a rate of 0
    assert rates[6] == pytest.approx(2 * (0.1 + 0.9 / 2))  # the middle of the cosine
    assert rates[9] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(7 * math.pi / 8)) / 2))
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert train.learning_rate(0, settings(lr=2.0, steps=10, warmup=0.0)) == 2.0
    _, log, _ = run_toy(tmp_path, [[batch_of(1)]] * 10, lr=2.0, warmup=0.2, final_lr=0.1)
    assert [r["lr"] for r in log] == rates


def test_decay_is_for_matrices_only(settings, tiny_model):
    gpt = model.GPT.from_pretrained(tiny_model)
    names = {id(p): name for name, p in gpt.named_parameters()}
    decayed, plain = train.make_optimizer(gpt, settings(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    block = [f"h.{i}.{layer}" for i in (0, 1) for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    matrices = {f"{layer}.weight" for layer in ("wte", "wpe", *block)}
    assert {names[id(p)] for p in decayed["params"]} == matrices
    assert {names[id(p)] for p in plain["params"]} == set(names.values()) - matrices
    lora.add_adapters(gpt, 2)
    [adapters] = train.make_optimizer(gpt, settings(weight_decay=0.3)).param_groups  # nothing frozen is in it
    assert adapters["weight_decay"] == 0.3 and len(adapters["params"]) == 2 * 8


def test_evaluation_is_total_over_count(tmp_path):
    """Four tokens of mean 2.5 in uneven batches; val_loss stands where it was measured and nowhere else."""
    val = [batch_of(1), batch_of(2, 3, 4)]
    toy, log, last = run_toy(tmp_path, [[batch_of(0)]] * 5, val, eval_every=2, log_every=3)
    assert (toy.w.item(), toy.b.item()) == (1.0, 1.0)  # tokens of 0: nothing is learnt
    assert {r["step"]: r.get("val_loss") for r in log} == pytest.approx({2: 1.75, 3: None, 4: 1.75, 5: 1.75})
    assert last["val_largest"] == pytest.approx(2.5)


# ---- the loop, on a real model -------------------------------------------------------------------


def train_gpt(folder, settings, batches=None, wide=True, **more):
    """The weights and the log after a few steps on the chats, in fp64 so that equal means equal."""
    cfg = settings(out=str(folder), eval_every=0, save_every=0, **more)
    rows = data.load_rows(cfg.data, data.Reading(val_fraction=cfg.val_fraction, seed=cfg.seed))
    with train.Run("test", cfg) as run:
        gpt = run.load(cfg.model)
        gpt = gpt.double() if wide else gpt
        run.about["before"] = {}
        make = train.step_batches(rows, cfg, run)
        train.train(gpt, sft.sft_loss, batches(make, rows) if batches else make, [], cfg, run)
    return gpt, records(folder)


def equal(one, other, tolerance=1e-9):
    theirs = dict(other.named_parameters())
    return all(torch.allclose(p, theirs[name], rtol=0, atol=tolerance) for name, p in one.named_parameters())


def test_micro_batches_change_nothing(settings, tmp_path):
    """1 x 8 = 8 x 1, and any cut between: losses, gradient norms and weights after four steps."""
    count = {}

    def counted(budget):
        def batches(make, rows):
            def of(step, token_budget):
                found = make(step, token_budget)
                count.setdefault(budget, []).append(len(found))
                return found
            return of
        return batches

    runs = {budget: train_gpt(tmp_path / str(budget), settings, counted(budget), batch_size=8, weight_decay=0.1,
                              micro_batch_tokens=budget, precision="fp32") for budget in (10**6, 120, 1)}
    assert count[10**6] == [1] * 4 and count[1] == [8] * 4 and all(1 < n < 8 for n in count[120])
    gpt, log = runs[10**6]
    for budget in (120, 1):
        other, other_log = runs[budget]
        for key in ("loss", "grad_norm", "tokens"):
            assert [r[key] for r in other_log] == pytest.approx([r[key] for r in log], rel=1e-9)
        assert equal(gpt, other)
    assert not equal(gpt, model.GPT.from_pretrained(settings().model).double(), 1e-4)  # and they did learn


def test_the_norm_of_a_large_gradient_is_exact():
    """To the last digits of fp32, where torch's own norm on a CPU is 1e-5 off already."""
    torch.manual_seed(0)
    grads = [torch.randn(50257, 8), torch.randn(3), torch.empty(0, 8)]
    exact = float(torch.cat([grad.flatten().double() for grad in grads]).norm())
    assert train.gradient_norm(grads, None) == pytest.approx(exact, rel=5e-7)
    assert train.gradient_norm([], None) == 0


def test_a_masked_micro_batch_adds_zero(settings, tmp_path):
    def with_masked(make, rows):
        masked = data.pack([data.Row(rows.train[0].ids, np.zeros(len(rows.train[0]), bool))], [0])
        return lambda step, budget: [masked, *make(step, budget), masked]

    gpt, log = train_gpt(tmp_path / "a", settings, steps=2)
    other, other_log = train_gpt(tmp_path / "b", settings, with_masked, steps=2)
    assert [r["loss"] for r in other_log] == [r["loss"] for r in log]
    assert equal(gpt, other, 0)


def test_a_step_without_targets_is_no_nan(settings, tmp_path):
    def only_masked(make, rows):
        masked = data.pack([data.Row(rows.train[0].ids, np.zeros(len(rows.train[0]), bool))], [0])
        return lambda step, budget: [masked]

    gpt, log = train_gpt(tmp_path / "a", settings, only_masked, steps=2, weight_decay=0.0)
    assert [(r["loss"], r["grad_norm"]) for r in log] == [(0.0, 0.0)] * 2
    assert equal(gpt, model.GPT.from_pretrained(settings().model).double(), 0)


def test_dropout_depends_on_position_not_on_history(settings, tmp_path):
    torch.manual_seed(1)
    one, log = train_gpt(tmp_path / "a", settings, dropout=0.2, wide=False)
    torch.manual_seed(2)
    other, other_log = train_gpt(tmp_path / "b", settings, dropout=0.2, wide=False)
    assert equal(one, other, 0) and untimed(log) == untimed(other_log)
    without, _ = train_gpt(tmp_path / "c", settings, wide=False)
    assert not equal(one, without, 1e-4)
    reseeded = [train.seed_at(*position) for position in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))]
    assert len(set(reseeded)) == 4


def test_lora_starts_the_same_whatever_came_before(settings, tmp_path):
    torch.manual_seed(1)
    one, _ = train_gpt(tmp_path / "a", settings, lora_rank=2, lora_dropout=0.3, wide=False)
    torch.manual_seed(2)
    other, _ = train_gpt(tmp_path / "b", settings, lora_rank=2, lora_dropout=0.3, wide=False)
    assert equal(one, other, 0)


def test_recomputed_activations_give_the_same_gradient(settings, tmp_path):
    """Dropout too must fall the same way in the second pass."""
    one, log = train_gpt(tmp_path / "a", settings, dropout=0.1, steps=2)
    other, other_log = train_gpt(tmp_path / "b", settings, dropout=0.1, steps=2, recompute=True)
    assert equal(one, other) and [r["loss"] for r in log] == pytest.approx([r["loss"] for r in other_log], rel=1e-12)


def test_rows_of_a_step_depend_on_seed_and_epoch_alone(settings):
    rows = data.load_rows(settings().data, data.Reading(val_fraction=0, seed=0))

    def visited(steps, budget=10**6, **more):
        cfg = settings(**{"batch_size": 6} | more)
        make = train.step_batches(rows, cfg, train.Run("test", cfg))
        return {step: sorted(int(row) for batch in make(step, budget) for row in batch.rows) for step in steps}

    found = visited(range(6))
    for epoch in range(3):  # 12 rows, 6 a step: two steps visit every row once
        assert sorted(found[2 * epoch] + found[2 * epoch + 1]) == list(range(12))
    assert found[0] != found[2] or found[2] != found[4]
    assert visited(reversed(range(6)), budget=1) == found
    assert visited(range(6), seed=1) != found
    assert visited([0], batch_size=12)[0] == list(range(12))


def test_perplexity_is_the_exponential_of_total_over_tokens(settings, tmp_path):
    """val_loss in uneven batches equals transformers' mean over all supervised tokens at once."""
    from transformers import GPT2LMHeadModel

    cfg = settings(out=str(tmp_path), val_fraction=0.5, micro_batch_tokens=60, precision="fp32")
    rows = data.load_rows(cfg.data, data.Reading(val_fraction=cfg.val_fraction))
    with train.Run("test", cfg) as run:
        gpt = run.load(cfg.model)
        batches = train.validation_batches(rows, cfg, run)
        found = train.evaluate(train.parallelise(gpt, sft.sft_loss, cfg, run), batches, run)
    assert len({len(batch.targets) for batch in batches}) > 1
    theirs, total, count = GPT2LMHeadModel.from_pretrained(cfg.model).eval(), 0.0, 0
    for row in rows.val:
        with torch.no_grad():
            logits = theirs(torch.from_numpy(row.ids[None]).long()).logits[0, :-1].double()
        wanted = torch.from_numpy(row.mask[1:])
        logp = logits.log_softmax(-1).gather(1, torch.from_numpy(row.ids[1:, None]).long())[:, 0]
        total, count = total - logp[wanted].sum().item(), count + int(wanted.sum())
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


# ---- what must not go on -------------------------------------------------------------------------


def test_an_infinite_loss_stops_before_the_step(tmp_path):
    """It names step, rows, rate and norm; the weights are those of the step before, and nothing of it is saved."""
    toy = Toy()
    steps = [[batch_of(1)], [batch_of(1)], [replace(batch_of(1), rows=np.array([41, 7]))]]

    def loss(toy, batch):
        total, count, metrics = toy_loss(toy, batch)
        return total * (math.inf if len(batch.rows) == 2 else 1), count, metrics

    with pytest.raises(FloatingPointError, match=r"3: loss inf, gradient norm (inf|nan), rate 1.00e-01; rows 7, 41"):
        run_toy(tmp_path, steps, loss=loss, toy=toy, save_every=1)
    assert toy.w.item() == pytest.approx(0.8, abs=1e-6) and toy.b.item() == pytest.approx(0.8, abs=1e-6)
    assert [path.name for path in train.checkpoint_folders(tmp_path / "run")] == ["step-00000002", "step-00000001"]
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2]


def test_either_of_loss_and_gradient_is_enough(tmp_path):
    def steep(toy, batch):
        return (batch.tokens * (toy.w[0, 0] - 1).abs().sqrt()).sum(), torch.tensor(1), {}  # 0, of slope inf, at w = 1

    def high(toy, batch):
        return toy_loss(toy, batch)[0] + math.inf, torch.tensor(1), {}

    for loss, said in ((steep, r"step 1: loss 0, gradient norm (inf|nan)"),
                       (high, r"step 1: loss inf, gradient norm 0\.5")):
        with pytest.raises(FloatingPointError, match=said):
            run_toy(tmp_path, [[batch_of(1)]], loss=loss)


def test_a_model_that_computes_nothing_is_not_exported(settings, tmp_path):
    """The only step is fine, what comes of it is not: no model is left, and no NaN in the metrics' JSON."""
    with pytest.raises(FloatingPointError, match="validation"):
        sft.main(settings(out=str(tmp_path / "run"), steps=1, lr=1e30, warmup=0.0))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


# ---- the run folder ------------------------------------------------------------------------------

FIXED = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes"}


def test_metrics_have_the_fixed_keys(finished):
    log = records(finished.out)
    assert [r["step"] for r in log] == [1, 2, 3, 4]
    for record in log:
        measured = {"val_loss"} if record["step"] in (2, 4) else set()
        assert set(record) == FIXED | measured | {"conversations_per_second"}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in record.values())
        assert record["tokens_per_second"] > 0
        assert 10**7 < record["peak_memory_bytes"] < 10**11  # bytes, not kilobytes
    assert [r["tokens"] for r in log] == sorted(r["tokens"] for r in log)


def test_run_json_says_what_was_run(finished):
    about = json.loads((Path(finished.out) / "run.json").read_text())
    assert about["config"] == json.loads(json.dumps(asdict(finished)))
    assert about["stage"] == "sft" and about["finished"] and about["versions"]["torch"] == torch.__version__
    assert about["data"]["train"] + about["data"]["val"] == about["data"]["kept"] == 12
    assert about["metrics"]["val_loss"] == records(finished.out)[-1]["val_loss"]
    assert {"replies", "checks", "val_loss"} <= set(about["before"]) and {"replies", "checks"} <= set(about["after"])


def test_the_same_command_on_a_finished_run_does_nothing(finished, capsys):
    files = {path: path.stat().st_mtime_ns for path in Path(finished.out).rglob("*") if path.name != ".lock"}
    metrics = sft.main(finished)
    assert metrics["val_loss"] == records(finished.out)[-1]["val_loss"]
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path(finished.out).rglob("*") if path.name != ".lock"} == files


def test_another_configuration_is_refused_with_the_difference(finished, tiny_model, tmp_path):
    weights = (Path(finished.out) / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"(?s)holds another run.*--lr: 0\.0001 there, 0\.002 now.*--overwrite"):
        sft.main(replace(finished, lr=0.002))
    changes = {"lr": 0.002, "beta2": 0.9, "warmup": 0.3, "clip": 2.0}
    with pytest.raises(ValueError, match=r"and 2 more") as refusal:
        sft.main(replace(finished, **changes))
    assert len(str(refusal.value).splitlines()) <= 5
    # other rows in the same file, another model in the same folder
    other = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "a"},
                                                                  {"role": "assistant", "content": "b"}]}])
    with pytest.raises(ValueError, match=r"data \(sha256\)"):
        sft.main(replace(finished, data=(other,)))
    gpt = model.GPT.from_pretrained(tiny_model)
    with torch.no_grad():
        gpt.h[0].mlp.c_fc.bias[0] += 1
    gpt.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model \(sha256\)"):
        sft.main(replace(finished, model=str(tmp_path / "model")))
    assert (Path(finished.out) / "model.safetensors").read_bytes() == weights


def test_what_does_not_change_the_result_may_differ(finished):
    sft.main(replace(finished, save_every=1, keep=5, debug=True, preset="gpt2"))
    moved = {f.name for f in fields(sft.Config)} - train.MAY_DIFFER
    assert {"lr", "seed", "steps", "batch_size", "dropout", "micro_batch_tokens", "data", "model"} <= moved


def test_the_same_data_and_model_by_another_path_are_the_same_run(finished, tiny_model, tmp_path, monkeypatch):
    [spec] = finished.data
    shutil.copy(spec, tmp_path / "moved.jsonl")
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for moved in ("moved.jsonl", "./moved.jsonl@1.0", str(tmp_path / "moved.jsonl")):
        assert sft.main(replace(finished, data=(moved,), model="model"))["val_loss"]
    with pytest.raises(ValueError, match=r"data \(sha256\)"):
        sft.main(replace(finished, data=("moved.jsonl@2",)))


def test_a_model_that_no_run_describes_is_not_overwritten(tiny_model, settings, tmp_path):
    model.GPT.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no run\.json describes"):
        sft.main(settings(out=str(tmp_path)))


def test_overwrite_starts_anew(settings, tmp_path):
    cfg = settings(out=str(tmp_path / "run"), steps=2)
    first = sft.main(replace(cfg, lora_rank=2, lr=0.01))
    assert (tmp_path / "run" / "adapter").is_dir()
    sft.main(replace(cfg, overwrite=True))
    assert [r["step"] for r in records(cfg.out)] == [1, 2]
    assert not (tmp_path / "run" / "adapter").exists()  # of the run before: it does not belong to this model
    assert records(cfg.out)[-1]["val_loss"] != first["val_loss"]
    assert {p.name for p in train.checkpoint_folders(tmp_path / "run")} == {"step-00000002"}


def test_overwrite_leaves_nothing_of_the_run_before(finished, settings, tmp_path):
    shutil.copytree(finished.out, tmp_path / "run")
    with train.Run("sft", settings(out=str(tmp_path / "run"), overwrite=True)) as run:
        assert train.open_folder(run, {}) == {}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["overwrite"]
    assert not {"config.json", "model.safetensors", "metrics.jsonl"} & {p.name for p in (tmp_path / "run").iterdir()}


def test_a_run_cannot_replace_the_model_that_it_starts_from(tiny_model, settings, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(ValueError, match="would replace --model"):
        sft.main(settings(model=str(tmp_path / "model"), out=str(tmp_path / "." / "model"), overwrite=True))
    assert {path: path.read_bytes() for path in before} == before


# ---- what destroys, looks first ------------------------------------------------------------------


def content(folder):
    """Every file of a folder and below, but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name != ".lock"}


def test_overwrite_destroys_nothing_before_all_is_looked_at(finished, tiny_model, tmp_path, monkeypatch):
    """Whatever the new run is refused for, the finished one is there byte for byte."""
    shutil.copytree(finished.out, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # what Python makes of a folder that is called so
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": 5}])
    model.GPT(model.GPTConfig(n_embd=8, n_layer=1, n_head=1, vocab_size=50)).save_pretrained(tmp_path / "few words")
    before = content("run")
    refused = [{"checks": "nowhere.jsonl"}, {"checks": bad}, {"tracker": "wandb"}, {"seed": -1}, {"seed": 2**64},
               {"lr": math.inf}, {"lora_rank": 2, "lora_alpha": 0.0}, {"lora_rank": 2, "lora_targets": ()},
               {"lora_rank": 2, "lora_targets": ("q_proj",)}, {"model": "nowhere"}, {"model": "few words"},
               {"model": "run"}, {"data": ("nowhere.jsonl",)}, {"data": (bad,)}, {"data": ("ultrafeedback",)},
               {"data": ()}, {"data": ("sample@101",)}, {"device": "meta"}, {"context": 2048}, {"batch_size": 0},
               {"val_fraction": 1.0}, {"clip": math.nan}, {"language": "xx", "data": ("sample",), "checks": "auto"}]
    for change in refused:
        with pytest.raises((ValueError, FileNotFoundError)) as refusal:
            sft.main(replace(finished, **{"out": "run", "steps": 2, "overwrite": True} | change))
        assert len(str(refusal.value).splitlines()) <= 5, refusal.value
        assert content("run") == before, change


def test_a_refused_run_leaves_no_folder(settings, tmp_path):
    for change in ({"checks": "nowhere.jsonl"}, {"model": "nowhere"}, {"data": ("nowhere.jsonl",)}, {"steps": 0}):
        with pytest.raises((ValueError, FileNotFoundError)):
            sft.main(settings(out=str(tmp_path / "run"), **change))
        assert not (tmp_path / "run").exists(), change


@pytest.mark.parametrize("files", [
    ("adapter/adapter_model.safetensors", "config.json"), ("pytorch_model.bin",), ("checkpoints/step-00000001/a",),
    ("model-00001-of-00002.safetensors", "model.safetensors.index.json"), ("tokenizer_config.json",), ("README.md",),
    ("adapter_config.json",), ("run.json",), ("metrics.jsonl",)], ids=str)
def test_somebody_elses_folder_is_left_alone(settings, tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = content(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"(?s)run\.json.*--out"):
            sft.main(settings(out=str(tmp_path), overwrite=overwrite))
        assert content(tmp_path) == before and not (tmp_path / ".lock").exists()


def test_a_run_writes_what_it_is_known_to_write(finished, settings, tmp_path):
    """Else --overwrite would leave some of it, and somebody else's file of that name would not be noticed."""
    (tmp_path / "notes.txt").write_text("mine")
    sft.main(settings(out=str(tmp_path), lora_rank=2, steps=1))
    for folder, besides in ((Path(finished.out), set()), (tmp_path, {"notes.txt"})):
        there = {path.name for path in folder.iterdir()} - {".lock"}  # which filelock removes or not, by its version
        assert there == {p.name for p in train.own_files(folder)} | besides


def fails_in_step(monkeypatch, number):
    step = train.step

    def fail(loss, optimizer, batches, state, *more):
        if state.step == number:
            raise KeyError("died")
        return step(loss, optimizer, batches, state, *more)

    monkeypatch.setattr(train, "step", fail)


def test_what_is_replaced_is_kept_until_its_successor_is_finished(finished, settings, tmp_path, monkeypatch, capsys):
    run, before = tmp_path / "a run", content(finished.out)
    shutil.copytree(finished.out, run)
    (run / "notes.txt").write_text("mine")
    new = settings(out=str(run), steps=2, save_every=1, lr=3e-4, overwrite=True)
    for lr in (3e-4, 4e-4):  # an unfinished successor may be replaced too: it is the finished run that is kept
        with monkeypatch.context() as patch, pytest.raises(KeyError):
            fails_in_step(patch, 1)
            sft.main(replace(new, lr=lr))
        assert content(run / ".replaced") == before
        assert json.loads((run / "run.json").read_text())["config"]["lr"] == lr
        with pytest.raises(FileNotFoundError, match="not finished"):
            model.find_model(str(run))
    assert f"mv '{run}/.replaced' '{run}-before'" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(ValueError, match="would replace --model"):
        sft.main(replace(new, model=str(run / ".replaced")))
    assert torch.equal(model.GPT.from_pretrained(run / ".replaced").wte.weight,
                       model.GPT.from_pretrained(finished.out).wte.weight)
    sft.main(replace(new, lr=4e-4, overwrite=False))
    assert not (run / ".replaced").exists() and (run / "notes.txt").read_text() == "mine"
    assert json.loads((run / "run.json").read_text())["finished"]


class Killed(BaseException):
    """Nothing catches it, and nothing is tidied up after it but what every exception has tidied up."""


def killed_at(monkeypatch, number):
    """os.replace does not come back from its call of this number; [calls so far]."""
    calls, rename = [0], os.replace

    def replace_or_die(*args):
        if calls[0] == number:
            raise Killed
        calls[0] += 1
        rename(*args)

    monkeypatch.setattr(os, "replace", replace_or_die)
    return calls


def test_a_kill_while_a_run_is_set_aside_is_put_right(finished, tmp_path, monkeypatch):
    """At every rename, and again at every rename of the putting right."""
    run, before = tmp_path / "run", content(finished.out)
    shutil.copytree(finished.out, run)
    n, ended = 0, False
    while not ended:
        with monkeypatch.context() as patch:
            killed_at(patch, n)
            try:
                train.set_aside(run)
                ended = True
            except Killed:
                with pytest.raises((ValueError, FileNotFoundError)) if n else contextlib.nullcontext():
                    model.read_model(run)  # neither does half of it open as a model
        if not ended:
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                killed_at(patch, n // 2)
                train.tidy(run)
            train.tidy(run)
            assert content(run) == before, n
        n += 1
    assert n > 10 and content(run / ".replaced") == before and train.own_files(run) == []
    train.tidy(run)  # it had come as far as the new run.json, which was not written
    assert content(run) == before
    assert train.set_aside(run) == run / ".replaced"
    (run / "run.json").write_bytes(before["run.json"])
    train.tidy(run)  # now a finished run stands there
    assert set(content(run)) == {"run.json"}


def test_an_export_that_is_killed_leaves_no_model_or_the_new_one(finished, settings, tmp_path, monkeypatch):
    """Over an older model too, with which no half of it may open."""
    cfg = settings(out=str(tmp_path / "run"), steps=1, lora_rank=2)
    shutil.copytree(finished.out, cfg.out)
    with train.Run("sft", cfg) as run:
        gpt = run.load(cfg.model)
        for layer in lora.adapters(gpt).values():
            torch.nn.init.ones_(layer.lora_B)
        run.folder.joinpath("checkpoints").rename(tmp_path / "elsewhere")
        n, old = 0, train.weights_sha256(model.read_model(run.folder).state_dict())
        while True:
            with monkeypatch.context() as patch:
                calls = killed_at(patch, n)
                try:
                    train.export(gpt, cfg, run)
                    break
                except Killed:
                    if calls[0]:
                        with pytest.raises(FileNotFoundError, match="not finished"):
                            model.find_model(cfg.out)
                    else:
                        model.GPT.from_pretrained(cfg.out)
            n += 1
        assert n > 7 and train.weights_sha256(model.GPT.from_pretrained(cfg.out).state_dict()) != old


def test_a_finished_run_whose_model_was_deleted_is_exported_again(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    (run / "config.json").unlink()
    sft.main(replace(finished, out=str(run)))
    assert (run / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("environment", "place"), [
    ({}, (0, 1)), ({"WORLD_SIZE": "2"}, (0, 1)), ({"RANK": "1"}, None), ({"RANK": "0", "WORLD_SIZE": "2"}, None),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
    ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (1, 2))])
def test_processes_are_those_that_are_told_whole(environment, place, settings, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.nullcontext() if place else pytest.raises(ValueError, match="torchrun"):
        run = train.Run("test", settings(out=str(tmp_path)))
        assert (run.rank, run.world) == place


def test_a_folder_whose_name_no_file_format_can_carry_is_refused_before_training(settings, tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/not \xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        sft.main(settings(out=out))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"a file is not a folder.*\n.*--out"):
        sft.main(settings(out=str(tmp_path / "a file"), overwrite=True))
    with pytest.raises(NotADirectoryError, match=r"a file is not a folder.*\n.*--out"):
        sft.main(settings(out=str(tmp_path / "a file/below/it")))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"finished": true}', "[" * 100_000])
def test_a_run_json_that_is_none_is_named(settings, tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json (is damaged|describes no run).*\nGive another folder: --out"):
        sft.main(settings(out=str(tmp_path)))


def test_a_setting_that_is_younger_than_a_run_stands_at_its_default(finished, settings, tmp_path):
    shutil.copytree(finished.out, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    del about["config"]["language"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    assert sft.main(replace(finished, out=str(tmp_path / "run"))) == about["metrics"]
    with pytest.raises(ValueError, match="--language: 'en' there, 'de' now"):
        sft.main(replace(finished, out=str(tmp_path / "run"), language="de"))


def test_a_model_of_another_vocabulary_is_refused(settings, tmp_path):
    model.GPT(model.GPTConfig(vocab_size=1000, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="knows 1,000 words"):
        sft.main(settings(model=str(tmp_path / "model"), out=str(tmp_path / "run")))


def test_long_replies_leave_room_for_the_question(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(model, "generate_batch",
                        lambda gpt, prompts, most, **more: asked.extend(prompts) or [[data.EOT]])
    question = [{"role": "user", "content": "What does a baker do?"}]
    train.answer(model.GPT.from_pretrained(tiny_model), [question], 5000)
    assert asked == [data.render(question, reply=True)[0].tolist()]


def test_weights_are_gathered_on_the_cpu_wherever_the_model_is():
    assert train._state_options().cpu_offload and train._state_options().full_state_dict


def test_config_repeats_a_run_bit_for_bit(finished, tmp_path):
    args = ["--config", f"{finished.out}/run.json", "--out", str(tmp_path / "again")]
    cfg = data.command_line(sft.Config, sft.PRESETS, args)
    assert replace(cfg, out=finished.out, config="") == finished
    sft.main(cfg)
    for name in ("model.safetensors", "tokenizer.json", "checkpoints/step-00000004/optimizer.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (Path(finished.out) / name).read_bytes(), name
    assert untimed(records(cfg.out)) == untimed(records(finished.out))


def test_config_can_be_changed_by_flags_and_is_checked(finished, tmp_path):
    saved = f"{finished.out}/run.json"
    assert data.command_line(sft.Config, sft.PRESETS, ["--lr", "0.5", "--config", saved]).lr == 0.5
    for content in ("{}", "nonsense", '{"config": {"no_such": 1}}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"--config .*run\.json"):
            data.command_line(sft.Config, sft.PRESETS, ["--config", str(tmp_path / "run.json")])


# ---- what is shown -------------------------------------------------------------------------------


def test_the_card_is_one_that_the_hub_reads(finished):
    """Metadata, links to what is there, a snippet that is Python; a licence is named where all are known."""
    from huggingface_hub import ModelCard

    folder = Path(finished.out)
    found = ModelCard.load(folder / "README.md")
    assert found.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "other",
        "license_name": "to-be-chosen", "license_link": "LICENSE", "tags": ["gpt2", "conversational", "sft"]}
    assert all((folder / name).is_file() for name in re.findall(r"\]\((\S+)\)", found.text))
    compile(re.search(r"```python\n(.*?)```", found.text, re.DOTALL)[1], "README.md", "exec")
    about = json.loads((folder / "run.json").read_text())
    loss = f"{about['before']['val_loss']:.4g} -> {about['metrics']['val_loss']:.4g}"
    assert f"| validation loss | {loss} |" in found.text
    assert "Is [/b] a tag?" in found.text and "--dropout 0.1" in found.text

    lineage = [{"stage": "sft", "model": "gpt2", "adapter": "", "data": ["oasst1", "smoltalk@0.02"]},
               {"stage": "dpo", "model": "runs/sft", "adapter": "", "data": ["ultrafeedback", "oasst1"]}]
    run = SimpleNamespace(about=about | {"lineage": lineage}, cfg=finished, folder=folder)
    real = ModelCard(train.card(run, about["before"], about["after"], about["metrics"])).data
    assert (real.license, real.base_model, real.language) == ("mit", "openai-community/gpt2", ["en"])
    assert real.datasets == ["OpenAssistant/oasst1", "HuggingFaceTB/smoltalk", "openbmb/UltraFeedback"]
    lineage[1]["adapter"] = "somebody/adapter"
    assert ModelCard(train.card(run, about["before"], about["after"], about["metrics"])).data.license == "other"


def test_samples_have_before_and_after_side_by_side(finished):
    """A question's lines are there twice, a reply's before and after begin on one line, and the scores in one table."""
    text = (Path(finished.out) / "samples.md").read_text()
    about = json.loads((Path(finished.out) / "run.json").read_text())
    [was], [now] = about["before"]["replies"], about["after"]["replies"]
    assert [m["role"] for m in now] == ["user", "assistant"] * 2 and was != now
    assert [m["content"] for m in now][::2] == ["Is [/b] a tag?", "Sure?"]
    lines = text.splitlines()
    for both in zip(was, now, strict=True):
        left, right = (data.transcript([message], 43).split("\n")[:2] for message in both)
        at = next(i for i, line in enumerate(lines) if line.startswith(left[0]) and lines[i + 1].startswith(left[1]))
        assert [line[45:] for line in lines[at:at + 2]] == right
    assert "## Is [/b] a tag?" in text and max(map(len, lines)) <= 120
    assert re.search(r"\| sums \[/b\] \| 1 \| \d+% -> \d+% \|", text)


def test_which_words_became_likelier(finished, tiny_model):
    """The pieces of a reply are its text with its end, and their numbers add up to log pi - log pi_ref of it."""
    def logp(folder, ids, mask):
        logits = model.GPT.from_pretrained(folder)(torch.tensor([ids.tolist()]))[0, :-1]
        return model.logprobs(logits, torch.tensor(ids[1:]).long())[torch.tensor(mask[1:])].sum().item()

    about = train.read_about(finished.out)
    run = SimpleNamespace(about=about, device=torch.device("cpu"), stage="sft",
                          start_model=lambda: model.GPT.from_pretrained(tiny_model))
    talks, gpt = about["after"]["replies"], model.GPT.from_pretrained(finished.out)
    [replies] = train.likelier(gpt, talks, run)
    assert ["".join(text for text, _ in words) for words in replies] == [
        m["content"] + data.EOT_TEXT for m in talks[0][1::2]]
    ids, mask = data.render(talks[0])
    expected = logp(finished.out, ids, mask) - logp(tiny_model, ids, mask)
    assert sum(value for words in replies for _, value in words) == pytest.approx(expected, abs=1e-3)
    assert abs(expected) > 0.1
    assert train.likelier(gpt, [[{"role": "user", "content": "a " * 2000}, *talks[0][1:2]]], run) == [[]]
    run.about = about | {"model": {"sha256": "of another"}}
    assert train.likelier(gpt, talks, run) == [[]]


def test_the_bar_says_what_is_at_work():
    """Whatever lasts while the loop's bar is shown is a share in it; without that bar it has one of its own."""
    run = train.Run("sft", sft.Config(device="cpu"))
    with run.progress("validation", 4) as advance:
        advance(1)
        assert run.at_work == ""
    run.bar = object()
    with pytest.raises(KeyError), run.progress("validation", 4) as advance:
        assert run.at_work == "validation 0%"
        advance(1)
        assert run.at_work == "validation 25%"
        raise KeyError
    assert run.at_work == ""


def test_the_status_line_fits_its_window():
    """What is needed least goes first, and the loss never does."""
    record = {"loss": 0.61234, "val_loss": 0.71234, "reward_accuracy": 0.934, "reward_margin": 1.2345,
              "chosen_reward": -0.5, "rejected_reward": -1.7345, "pairs_per_second": 12.34, "lr": 5e-4,
              "tokens_per_second": 12345.6}
    assert train.summary(record) == ("loss 0.6123  val 0.7123  accuracy 93%  margin +1.234  chosen -0.500  "
                                     "rejected -1.734  12.3 pairs/s  lr 5.0e-04")
    assert train.summary(record, 51) == "loss 0.6123  val 0.7123  accuracy 93%  margin +1.234"[:51].rpartition("  ")[0]
    assert train.summary(record, 52) == "loss 0.6123  val 0.7123  accuracy 93%  margin +1.234"
    assert train.summary(record, 5) == "loss 0.6123"
    short = {k: record[k] for k in ("loss", "lr", "tokens_per_second")}
    assert train.summary(short, 25) == "loss 0.6123  12,346 tok/s"


def test_the_score_after_a_stage_is_the_next_ones_before(finished, tmp_path, monkeypatch):
    """Adapters and bf16 in training, and yet one model answers at a run's end and at the next one's start."""
    assess, asked = train.assess, []

    def watched(gpt, cfg, run):
        asked.append(train.weights_sha256(gpt.state_dict()))
        return assess(gpt, cfg, run)

    monkeypatch.setattr(train, "assess", watched)
    monkeypatch.setattr(train, "plot_curves", lambda folders, path: None)
    both = [replace(finished, out=str(tmp_path / name), model=start, lora_rank=2, precision="bf16", dropout=0.0)
            for name, start in (("one", finished.model), ("two", str(tmp_path / "one")))]
    for cfg in both:
        sft.main(cfg)
    base, first, second = (train.weights_sha256(model.GPT.from_pretrained(folder).state_dict())
                           for folder in (finished.model, both[0].out, both[1].out))
    assert asked == [base, first, first, second]
    one, two = (train.read_about(cfg.out) for cfg in both)
    assert one["after"] == {key: two["before"][key] for key in ("replies", "repetition", "checks")}


def test_generation_tells_how_far_it_is(tiny_model):
    told, gpt = [], model.GPT.from_pretrained(tiny_model)
    prompts = [[1], [2, 3], [4]]
    stop = model.generate_batch(gpt, prompts, 1)[0][0]
    for end, rows in ((-1, 2), (stop, 1)):
        told.clear()
        model.generate_batch(gpt, prompts, 5, stop=end, rows=rows, advance=told.append)
        assert sum(told) == pytest.approx(3) and len(told) > 3


def test_what_is_said_is_plain_text(settings, tmp_path, capsys):
    """Brackets in a setting are no markup, and one line a step goes to a pipe, without escape codes."""
    cfg = settings(out=str(tmp_path / "[red]run[/red]"), steps=2, prompts=("[/b] \x1b[31m?",))
    sft.main(cfg)
    out = capsys.readouterr().out
    assert "[red]run[/red]" in out.replace("\n", "") and "\x1b" not in out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert "loss" in lines[0] and "val" in lines[1]


def test_memory_that_ends_between_micro_batches_leaves_nothing_of_the_first(tmp_path):
    """The step that is taken with less memory has the gradient of one that never failed."""
    steps, calls = [[batch_of(2, 3), batch_of(5)], [batch_of(1)]], itertools.count()

    def scarce(gpt, batch):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return toy_loss(gpt, batch)

    wanted, log, _ = run_toy(tmp_path / "a", steps)
    toy, found, _ = run_toy(tmp_path / "b", steps, loss=scarce)
    assert next(calls) == 2 + 2 + 1 + 1  # two, two again, the second step's, and that of the save
    assert [r["grad_norm"] for r in found] == [r["grad_norm"] for r in log] and torch.equal(toy.w, wanted.w)


def test_what_is_resumed_is_in_memory_before_the_first_step(tmp_path):
    """AdamW's moments are there from the beginning, and no longer those of a checkpoint's file once it is read."""
    run_toy(tmp_path, [[batch_of(1)]] * 2, save_every=1)
    toy, cfg = Toy(), sft.Config(out=str(tmp_path / "run"), prompts=())
    with train.Run("toy", cfg) as run:
        optimizer = train.make_optimizer(toy, cfg)
        assert all(not moment.any() for p in toy.parameters() for moment in optimizer.state[p].values())
        assert [len(optimizer.state[p]) for p in toy.parameters()] == [3, 3]
        assert train.load_checkpoint(toy, optimizer, run).step == 2
    held = [*toy.parameters(), *(moment for p in toy.parameters() for moment in optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in held]
    for file in (tmp_path / "run" / "checkpoints").glob("*/*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert all(tensor.any() and torch.equal(tensor, was) for tensor, was in zip(held, before, strict=True))


def test_the_way_on_is_not_the_way_back(settings, tmp_path):
    """After --overwrite the same command would begin anew."""
    for overwrite in (False, True):
        run = train.Run("sft", settings(out=str(tmp_path), overwrite=overwrite))
        assert ("without --overwrite" in run.again) == overwrite


def test_a_damaged_checkpoint_is_not_one_of_those_that_are_kept(tmp_path):
    """Also where it is not the newest, so that resuming did not meet it."""
    steps, folder = [[batch_of(1)]] * 6, tmp_path / "run" / "checkpoints"
    run_toy(tmp_path, steps[:5], save_every=1, keep=4)
    (folder / "step-00000004" / "state.json").write_text("{}")
    run_toy(tmp_path, steps, save_every=1, keep=3)
    assert {path.name for path in folder.iterdir()} == {f"step-0000000{n}" for n in (6, 5, 3)} | {
        "damaged-step-00000004"}


def test_what_strangers_wrote_is_shown_as_text(settings, tmp_path, capsys):
    """A manifest's file name, a check's group and a reply: none steers the terminal or opens anything in Markdown."""
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(train.sealed({"files": {"a\x1b[2J": {"size": 1, "sha256": ""}}}))
    with train.Run("sft", settings(out=str(tmp_path / "b\x1b[1m"))) as run:
        assert not train.sound(folder, run)
        run.say("c\x1b[0m")
        out = capsys.readouterr().out
        assert "step-00000001" in out and "c␛[0m" in out and "\x1b" not in out
        score = {"n": 1, "correct": 1.0, "twice": 0.0, "good": 1.0, "facts": 1.0, "ended": 1.0, "words": 1.0}
        talk = [{"role": "user", "content": "````\n# no heading"}]
        found = {"replies": [talk], "checks": {"x | y\n# z `\x1b[1m": score, "all": score}}
        written = train._samples(run, found, found, [[]])
        run.about |= {"lineage": [{"stage": "sft", "model": "a\n# heading", "adapter": "", "data": ["sample"]}],
                      "seconds": 1.0, "model": {"parameters": 1}}
        card = train.card(run, found, found, {})
    assert "\x1b" not in card and "\n# h" not in card and card.count("\n`````\n") == 2
    assert "\x1b" not in written and r"| x \| y # z \`␛[1m | 1 | 100% -> 100% |" in written
    assert written.count("\n`````\n") == 2 and written.startswith(f"# {tmp_path}/b␛[1m: ")


@pytest.mark.parametrize("stage", [
    5, {"stage": "sft"}, {"stage": "sft", "model": "gpt2", "adapter": "", "data": [5]},
    {"stage": "sft", "model": ["gpt2"], "adapter": "", "data": []},
    {"stage": "sft", "model": "gpt2", "adapter": "", "data": 7}], ids=str)
def test_a_strangers_lineage_does_not_end_a_run_after_its_training(finished, tmp_path, stage):
    """The card is written when all is trained; what it needs is looked at when the model is read."""
    about = json.loads((Path(finished.out) / "run.json").read_text())
    assert train.lineage_of(finished.out) == about["lineage"] != []
    for content in (about | {"lineage": [*about["lineage"], stage]}, about | {"lineage": stage}, [stage]):
        (tmp_path / "run.json").write_text(json.dumps(content))
        assert train.lineage_of(tmp_path) == []


def test_commands_that_are_suggested_can_be_pasted(finished, settings, tmp_path, monkeypatch, capsys):
    run = tmp_path / "a run; ls"
    shutil.copytree(finished.out, run)
    sft.main(replace(finished, out=str(run)))
    cfg = settings(data=("a b.jsonl",), language="e n", out=str(run), model="m n")
    said = capsys.readouterr().out.replace("\n", " ") + " " + sft.next_commands(cfg) + " " + train.advice(cfg, 3)
    shlex.split(said)
    for wanted in (f"--model '{run}'", "'a b.jsonl'", "--language 'e n'"):
        assert wanted in said
    assert said.count(f"--model '{run}'") == 4


def test_curves_are_labelled_and_drawn(finished, tmp_path, monkeypatch):
    from matplotlib import figure, image

    shown = []
    monkeypatch.setattr(figure.Figure, "tight_layout", lambda drawn: shown.append(drawn))
    train.plot_curves([finished.out], tmp_path / "one.png")
    panels = {axis.get_title(): axis for axis in shown[0].axes}
    assert {"loss", "throughput", "gradient norm", "checks"} == set(panels)
    title = shown[0].get_suptitle()
    assert f"{finished.out}: sft of {finished.model}" in title and "--steps 4 --batch-size 4 --lr 0.0001" in title
    scores = [train.read_about(finished.out)[when]["checks"] for when in ("before", "after")]
    assert [bar.get_width() for bar in panels["checks"].patches] == [
        group["correct"] for score in scores for group in score.values()]
    assert panels["throughput"].get_ylabel() == "tokens / s" and panels["loss"].get_xlabel() == "step"
    drawn = {line.get_label(): line.get_ydata() for line in panels["loss"].lines}
    assert list(drawn["loss"]) == [r["loss"] for r in records(finished.out)]
    measured = train.history(finished.out)
    assert list(drawn["val_loss"]) == [r["val_loss"] for r in measured if "val_loss" in r] and len(measured) > 2
    assert "val_loss" in measured[0], "what was measured before the first step is the curve's first point"
    picture = image.imread(tmp_path / "one.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05
    assert (Path(finished.out) / "curves.png").read_bytes().startswith(b"\x89PNG")


def fake_run(folder, loss, **more):
    folder.mkdir(parents=True)
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "loss": loss, "lr": 0.1, "tokens_per_second": 10.0} | more])
    return str(folder)


def test_compare_makes_a_table_and_a_picture(finished, tmp_path, capsys, monkeypatch):
    """Every number in full where it goes to a pipe; runs of one name in two places stay apart."""
    from matplotlib import figure

    shown = []
    monkeypatch.setattr(figure.Figure, "tight_layout", lambda drawn: shown.append(drawn))
    folders = [finished.out, fake_run(tmp_path / "a" / "run", 3.25, reward_accuracy=0.5, val_reward_accuracy=0.75),
               fake_run(tmp_path / "b" / "run", 4.5)]
    train.compare(train.Compare(runs=tuple(folders), out=str(tmp_path / "new" / "compare.png")))
    out = capsys.readouterr().out
    mine, first, second = (next(line for line in out.splitlines() if folder in line) for folder in folders)
    last = records(finished.out)[-1]
    assert f"{last['loss']:.4f}" in mine and f"{last['val_loss']:.4f}" in mine
    assert "3.2500" in first and "75.0%" in first and "4.5000" in second
    assert (tmp_path / "new" / "compare.png").is_file()
    losses = shown[0].axes[0].lines
    assert {tuple(line.get_ydata()) for line in losses} >= {(3.25,), (4.5,)}
    labels = {line.get_label() for line in losses}
    assert len(labels) == len(losses) and max(map(len, labels)) < 60


def test_compare_replaces_only_pictures_of_its_own(finished, tmp_path, monkeypatch):
    from matplotlib import figure

    folder = fake_run(tmp_path / "$a_{b", 3.25)  # which would be a formula
    cfg = train.Compare(runs=(finished.out, folder), out=str(tmp_path / "compare.png"))
    for name, mine in (("run", "run.json"), ("notes", "notes.txt"), ("photo", "photo.png")):
        (tmp_path / name).mkdir()
        (tmp_path / name / mine).write_bytes(b"\x89PNG or whatever")
        for out in (tmp_path / name / mine, tmp_path / name):
            with pytest.raises(ValueError, match=r"left alone.*\n.*--out"):
                train.compare(replace(cfg, out=str(out)))
        assert (tmp_path / name / mine).read_bytes() == b"\x89PNG or whatever"
    train.compare(cfg)
    picture = (tmp_path / "compare.png").read_bytes()
    train.compare(replace(cfg, runs=(folder,)))
    assert picture.startswith(b"\x89PNG") and (tmp_path / "compare.png").read_bytes() not in (picture, b"")

    def full(self, file, **more):
        file.write_bytes(b"half")
        raise OSError("no space")

    before = content(tmp_path)
    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        train.compare(cfg)
    assert content(tmp_path) == before


def test_a_strangers_metrics_are_numbers_or_nothing(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": "\x1b[2J"}\n{"step": "2", "loss": 2.0}\n\xff\n[1]\n'
                                             + b"[" * 100_000 + b'\n{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert train.read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]
    (tmp_path / "run.json").write_text('{"stage": 1, "config": {}, "after": {"checks": {"all": {"correct": "much"}}}}')
    with pytest.raises(ValueError, match=r"run\.json"):
        train.compare(train.Compare(runs=(str(tmp_path),), out=str(tmp_path / "x.png")))


def test_checks_table_shows_before_and_after(capsys):
    from rich.console import Console

    score = {"n": 4, "correct": 0.25, "twice": 0.75, "good": 0.0, "facts": 0.5, "ended": 1.0, "words": 9.0}
    before, after = {"all": score | {"correct": 0.0}}, {"all": score, "[/x]\x1b[1m": score}
    Console(width=120).print(train.checks_table(before, after))
    out = capsys.readouterr().out
    assert "0% -> 25%" in out and "0.50 -> 0.50" in out and "75.0% -> 75.0%" in out and "said once" in out
    assert "[/x]" in out and "\x1b" not in out


def test_a_tracker_gets_what_is_logged_and_is_named_if_missing(tmp_path, monkeypatch):
    got = []
    wandb = SimpleNamespace(init=lambda **about: got.append(about["config"]["steps"]),
                            log=lambda record, step: got.append((step, record["loss"])))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _, log, _ = run_toy(tmp_path, [[batch_of(1)]] * 2, tracker="wandb")
    assert got == [2, *((r["step"], r["loss"]) for r in log)]
    for missing in (None, ModuleType("wandb")):  # the other is what `mkdir wandb` makes
        monkeypatch.setitem(sys.modules, "wandb", missing)
        with pytest.raises(ValueError, match=r"not installed: uv sync --extra wandb"):
            train.Run("sft", sft.Config(tracker="wandb", out=str(tmp_path / "other"))).__enter__()
    assert not (tmp_path / "other").exists()  # it is told before anything takes time
    wandb.init = lambda **settings: 1 / 0  # nobody is logged in
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match=r"--tracker wandb cannot begin: division by zero\n"):
        run_toy(tmp_path / "fourth", [[batch_of(1)]], tracker="wandb")
    wandb.init, wandb.log = lambda **settings: None, lambda record, step: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _, log, _ = run_toy(tmp_path / "third", [[batch_of(1)]] * 2, tracker="wandb")
    assert [r["step"] for r in log] == [1, 2]  # a service's trouble is not the run's


# ---- the command line ----------------------------------------------------------------------------

DESIGNED = {"preset", "model", "data", "out", "steps", "batch_size", "micro_batch_tokens", "lr", "lora_rank",
            "eval_every", "save_every", "checks", "seed"}


@pytest.mark.parametrize("script", [sft, dpo])
def test_presets_construct_and_parse(script):
    assert set(script.PRESETS) == {"sample", *model.SIZES}
    assert set(get_args(get_type_hints(script.Config)["preset"])) == {"none", *script.PRESETS}
    for name, preset in script.PRESETS.items():
        cfg = data.command_line(script.Config, script.PRESETS, ["--preset", name])
        assert cfg == script.Config(**preset | {"preset": name})
        if name != "sample" and script is sft:
            assert cfg.model == name
        changed = data.command_line(script.Config, script.PRESETS, ["--steps", "7", f"--preset={name}"])
        assert changed == replace(cfg, steps=7)
    sample = data.command_line(script.Config, script.PRESETS, ["--preset", "sample"])
    assert data.command_line(script.Config, script.PRESETS, []) == sample  # with no options: the sample
    own = data.command_line(script.Config, script.PRESETS, ["--data", "own.jsonl"])
    assert own == script.Config(data=("own.jsonl",))  # its rates are not for other data


@pytest.mark.parametrize("script", [sft, dpo])
def test_the_designed_flags_are_there(script):
    names = {f.name for f in fields(script.Config)}
    assert names >= DESIGNED and ({"beta", "loss"} <= names) == (script is dpo)
    cfg = data.command_line(script.Config, script.PRESETS, ["--data", "a.jsonl", "oasst1@0.5", "--lora-rank", "0",
                                                             "--checks", "c", "--micro-batch-tokens", "64"])
    assert (cfg.data, cfg.lora_rank, cfg.checks, cfg.micro_batch_tokens) == (("a.jsonl", "oasst1@0.5"), 0, "c", 64)
    assert dpo.Config().model == sft.Config().out  # the one leaves what the other takes


HELP = """
import runpy, sys
class Ban:
    def find_spec(name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "transformers", "datasets", "matplotlib", "model", "lora"), name
sys.meta_path.insert(0, Ban)
sys.argv[:] = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["sft.py", "dpo.py", "train.py", "data.py"])
def test_help_imports_nothing_slow_and_explains_every_flag(script):
    done = subprocess.run([sys.executable, "-c", HELP, script], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "129", "NO_COLOR": "1"})  # wider, boxes stand abreast
    assert done.returncode == 0, done.stderr
    config = {"sft.py": sft.Config, "dpo.py": dpo.Config, "train.py": train.Compare, "data.py": data.Config}[script]
    lines = [line.strip(" │") for line in done.stdout.splitlines()]
    for name in [f.name for f in fields(config) if f.name not in ("runs", "specs")]:
        flag = "--" + name.replace("_", "-")
        at = next(i for i, line in enumerate(lines) if line.startswith(flag + " ") or line.startswith(flag + ","))
        text = " ".join(lines[at:at + 2]) if len(lines[at].split("  ")) == 1 else lines[at]
        explained = re.sub(r"\(default: .*", "", text.partition("  ")[2] or lines[at + 1])
        assert len(explained.split()) > 1, f"{flag} has no help: {text}"
    if not hasattr(config, "groups"):
        return
    opening, _, *boxes = done.stdout.split("╭─ ")  # what one needs first is in the first box; every setting is in one
    flags = [re.findall(r"^│ (--[\w-]+)", box, re.MULTILINE) for box in boxes]
    assert flags[0] == ["--preset", "--model", "--data", "--out", "--steps", "--batch-size", "--lr", "--lora-rank"]
    assert sorted(flag for box in flags for flag in box) == sorted(data.option(f.name) for f in fields(config))
    assert sorted(chain.from_iterable(config.groups.values())) == sorted(f.name for f in fields(config))
    assert f"uv run {script} --preset gpt2-medium" in opening and "r(x, y)" not in opening


@pytest.mark.parametrize("script_, given, ours", [
    ("sft", "--learning-rate", "--lr"), ("dpo", "--learning_rate=1e-5", "--lr"), ("sft", "--max-steps", "--steps"),
    ("sft", "--epochs", "--steps"), ("dpo", "--num-epochs", "--steps"), ("sft", "--num_train_epochs", "--steps"),
    ("sft", "--batch", "--batch-size"), ("sft", "--max-length", "--context"), ("sft", "--output_dir", "--out"),
    ("chat", "--max-length", "--max-new-tokens"), ("chat", "--temp", "--temperature"), ("sft", "--r", "--lora-rank")])
def test_options_of_other_programs_lead_to_ours(script_, given, ours, monkeypatch, capsys):
    module = {"sft": sft, "dpo": dpo, "chat": chat}[script_]
    code, said = script(module, given, "3", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and is_short(said) and f"{given.partition('=')[0]}; here it is {ours} (" in said, said
    assert ("rows / --batch-size" in said) == ("epoch" in given)


def test_no_option_of_ours_is_taken_for_a_foreign_one():
    """Every option that others have leads to one that a script has, and underscores are as good as hyphens."""
    ours = {f.name.replace("_", "-") for config in (sft.Config, dpo.Config, chat.Config) for f in fields(config)}
    assert set(data.FOREIGN) <= ours
    for module in (sft, dpo, chat):
        data.refuse_foreign([data.option(f.name) for f in fields(module.Config)], module.Config)
    assert data.command_line(chat.Config, None, ["--top_k", "3", "--max_new_tokens", "9"]).top_k == 3


def test_training_longer_has_one_way(finished, capsys):
    """A finished run names it, and so does a refusal of more steps."""
    wanted = f"--model {finished.out} --out {finished.out}-2"
    sft.main(finished)
    assert wanted in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(ValueError, match=r"--steps: 4 there, 9 now") as error:
        sft.main(replace(finished, steps=9))
    assert wanted in str(error.value) and len(str(error.value).splitlines()) <= 5


def script(module, *args, monkeypatch, capsys):
    """Run a script's main in this process as `python NAME.py ARGS`; (exit code, what it printed to stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *args])
    main = train.compare if module is train else module.main
    with pytest.raises(SystemExit) as stop:
        data.run_script(main, train.Compare if module is train else module.Config, getattr(module, "PRESETS", None))
    return stop.value.code, capsys.readouterr().err


def is_short(text, lines=5):
    return "Traceback" not in text and 0 < len([line for line in text.splitlines() if re.search(r"\w", line)]) <= lines


def test_the_time_of_a_run_goes_on_over_resumptions(settings, tmp_path, monkeypatch):
    """Two slow steps, then the process dies; the time that the rest takes is added to theirs."""
    cfg, step = settings(out=str(tmp_path), steps=4, save_every=1), train.step

    def slow(loss, optimizer, batches, state, *more):
        if state.step == 2:
            raise KeyError("died")
        time.sleep(0.5)
        return step(loss, optimizer, batches, state, *more)

    monkeypatch.setattr(train, "step", slow)
    with pytest.raises(KeyError):
        sft.main(cfg)
    monkeypatch.setattr(train, "step", step)
    sft.main(cfg)
    assert train.read_about(tmp_path)["seconds"] > 1.0


def test_the_settings_shown_are_those_one_would_type():
    cfg = sft.Config(fsdp=True, prompts=("What now? | And then?", "Hi"), lr=0.5, bad_rows="skip",
                     data=("a b.jsonl", "oasst1"))
    assert data.command_line(sft.Config, None, shlex.split(train.flags(cfg))) == cfg
    assert train.flags(sft.Config()) == "the defaults"
    assert train.flags(cfg, besides=("prompts", "data", "fsdp", "bad_rows")) == "--lr 0.5"


@pytest.mark.parametrize("args, hint", [
    (["--stpes", "5"], "--steps"), (["--batchsize=5"], "--batch-size"), (["--lora_rnak", "5"], "--lora-rank"),
    (["--overwrit"], "--overwrite"), (["--completely-different", "5"], "--help"), (["--no-overwrit"], "--overwrite")])
def test_a_misspelt_flag_gets_a_suggestion(args, hint, monkeypatch, capsys):
    code, said = script(sft, *args, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and hint in said and args[0].partition("=")[0] in said, said
    assert is_short(said, lines=10), said  # tyro's words, in a box


@pytest.mark.parametrize("args, hint", [
    (["--lr", "fast"], "--lr"), (["--precision", "fp8"], "bf16"), (["--preset", "gpt3"], "gpt2-medium"),
    (["--preset=gpt3"], "gpt2-medium"), (["stray"], "stray"), (["--steps"], "--steps")])
def test_a_wrong_value_is_refused(args, hint, monkeypatch, capsys):
    code, said = script(sft, *args, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and hint in said and "Traceback" not in said, said


def failures(folder, tiny_model, chats):
    """Name: (script, arguments, exit code, words that the message must have)."""
    (folder / "empty").mkdir()
    (folder / "pickle").mkdir()
    (folder / "pickle" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"")
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama", "n_embd": 8}')
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}, '
                                      '{"role": "assistant", "content": "Hello"}]}\n{"messages": 5}\n')
    poisoned = folder / "poisoned"
    model.GPT.from_pretrained(tiny_model).save_pretrained(poisoned)
    weights = load_file(poisoned / "model.safetensors")
    save_file(weights | {"transformer.ln_f.weight": torch.full((32,), 3e38)}, poisoned / "model.safetensors")
    shutil.copytree(poisoned, folder / "broken")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 3] = math.nan
    save_file(weights, folder / "broken" / "model.safetensors")
    tiny = ["--model", str(tiny_model), "--data", chats]
    quick = ["--checks", "", "--steps", "5", "--batch-size", "4", "--warmup", "0", "--eval-every", "0", "--prompts"]
    return {
        "no model folder": (sft, ["--model", "runs/nowhere", "--data", chats], 2, ["runs/nowhere", "sample"]),
        "no SFT run": (dpo, ["--data", chats], 2, ["runs/sft", "uv run sft.py"]),
        "an empty folder": (sft, ["--model", str(folder / "empty")], 2, ["empty", "config.json"]),
        "a pickle": (sft, ["--model", str(folder / "pickle")], 2, ["pytorch_model.bin", "pickle", "safetensors"]),
        "another architecture": (sft, ["--model", str(folder / "llama")], 2, ["model_type", "llama"]),
        "no data set": (sft, ["--model", str(tiny_model), "--data", "oast1"], 2, ["oast1", "oasst1"]),
        "the wrong kind": (dpo, ["--model", str(tiny_model), "--data", "smoltalk"], 2, ["smoltalk", "ultrafeedback"]),
        "a bad row": (sft, ["--model", str(tiny_model), "--data", str(folder / "bad.jsonl")], 2,
                      ["bad.jsonl:2", "messages", "--bad-rows skip"]),
        "no checks": (sft, [*tiny, "--checks", "nowhere.jsonl"], 2, ["nowhere.jsonl"]),
        "too high a rate": (sft, [*tiny, *quick, "--lr", "1e30"], 1, ["step 2", "nan", "--lr"]),
        "a weight that is no number": (sft, ["--model", str(folder / "broken"), "--data", chats, *quick], 2,
                                       ["broken", "h.1.mlp.c_fc.weight", "not finite"]),
        "a poisoned weight": (sft, ["--model", str(poisoned), "--data", chats, *quick], 1, ["nan", "weights of"]),
        "not found at once": (sft, ["--model", str(poisoned), "--data", chats, *quick, "--val-fraction", "0"], 1,
                              ["step 1", "nan", "rows"]),
        "too long a context": (sft, [*tiny, "--context", "2048"], 2, ["2048", "1024"]),
        "no LoRA target": (sft, [*tiny, "--lora-rank", "2", "--lora-targets", "q_proj"], 2, ["q_proj", "c_attn"]),
        "no device": (sft, [*tiny, "--device", "mps" if torch.cuda.is_available() else "cuda"], 2, ["--device"]),
        "no rows a step": (sft, [*tiny, "--batch-size", "0"], 2, ["--batch-size"]),
        "no steps": (sft, [*tiny, "--steps", "0"], 2, ["--steps"]),
        "no tokens at once": (sft, [*tiny, "--micro-batch-tokens", "0"], 2, ["--micro-batch-tokens"]),
        "no log": (sft, [*tiny, "--log-every", "0"], 2, ["--log-every"]),
        "all dropped out": (sft, [*tiny, "--dropout", "1"], 2, ["--dropout"]),
        "beta 0": (dpo, [*tiny, "--beta", "0"], 2, ["--beta"]),
        "every second label": (dpo, [*tiny, "--loss", "robust", "--label-smoothing", "0.5"], 2, ["--label-smoothing"]),
        "noise": (dpo, [*tiny, "--dropout", "0.1"], 2, ["--dropout", "has to be 0"]),
        "twice the defaults": (sft, ["--config", "a/run.json", "--preset", "sample"], 2, ["--config", "--preset"]),
        "a bad check": (sft, [*tiny, "--checks", str(folder / "bad.jsonl")], 2, ["bad.jsonl:1", "facts", "Mend it"]),
        "no run.json": (sft, ["--config", "nowhere/run.json"], 2, ["--config", "nowhere/run.json"]),
        "nothing to compare": (train, [str(folder / "empty")], 2, ["metrics.jsonl", "uv run sft.py"]),
        "a run without steps": (train, [str(folder / "begun")], 2, ["begun", "metrics.jsonl"]),
    }


def test_the_commonest_failures_say_what_and_where_and_what_next(tiny_model, chats, tmp_path, monkeypatch, capsys):
    """At most five lines, exit code 2 where something was asked for that cannot be, 1 where a run failed."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    cases = failures(tmp_path, tiny_model, chats)
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, (module, args, code, words) in cases.items():
        out = [] if module is train or "--config" in args else ["--out", f"out {name}"]
        try:
            found, said = script(module, *args, *out, monkeypatch=monkeypatch, capsys=capsys)
        except BaseException as error:  # all cases are reported at once
            found, said = repr(error), capsys.readouterr().err
        if found != code or not is_short(said) or any(word not in said for word in words):
            wrong.append(f"{name}: code {found}, said\n{said}")
    assert not wrong, "\n".join(wrong)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--model", "nowhere", "--debug"])
    with pytest.raises(FileNotFoundError):
        data.run_script(sft.main, sft.Config, sft.PRESETS)


def test_the_hub_cannot_be_reached(tmp_path, chats, monkeypatch, capsys):
    """The model and a data set; conftest.py has set HF_HUB_OFFLINE, and here is an empty cache."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    small = tmp_path / "model"
    model.GPT(model.GPTConfig(n_embd=8, n_layer=1, n_head=1)).save_pretrained(small)
    for name, args in {"a model": ["--model", "gpt2", "--data", chats],
                       "a data set": ["--model", str(small), "--data", "oasst1"]}.items():
        code, said = script(sft, *args, "--out", str(tmp_path / name), monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and is_short(said) and "Hub" in said and "uv run hf download" in said, said


def test_a_busy_folder_is_left_alone(finished, tmp_path, monkeypatch, capsys):
    """Another process holds the lock; when it has gone, the folder is free."""
    hold = (f"import sys, filelock\nwith filelock.FileLock({finished.out + '/.lock'!r}):\n"
            "    print('held', flush=True)\n    sys.stdin.read()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", hold], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        code, said = script(sft, "--config", f"{finished.out}/run.json", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and is_short(said) and "in use by another process" in said and "--out" in said
        other.stdin.close()
    assert sft.main(finished)["val_loss"]


def test_the_real_script_fails_as_shortly(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "sft.py"), "--model", "nowhere"], cwd=tmp_path, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and is_short(done.stderr) and done.stdout == ""
