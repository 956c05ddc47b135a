"""Supervised fine-tuning: a base model learns to converse by continuing conversations it is shown.

    uv run sft.py                                   the bundled sample: minutes on a laptop's CPU, no network
    uv run sft.py --preset gpt2-medium              OpenAI's GPT-2 355M on smol-smoltalk, OASST and more
    uv run sft.py --preset gpt2 --data my_chats.jsonl --out runs/mine
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import ClassVar, Literal

import data
from data import lazy, run_script
from train import Run, Settings, begin, finish, step_batches, train, validation_batches

torch = lazy("torch")


@dataclass(kw_only=True)
class Config(Settings):
    # settings for a model's size; with neither --preset nor --data: sample
    preset: Literal["none", "sample", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "none"
    model: str = "sample"  # sample, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder in transformers' format
    data: tuple[str, ...] = ("sample",)  # conversations: NAME, NAME:PATH or PATH, each with an optional @WEIGHT
    out: str = "runs/sft"  # run folder; the same command again goes on where it stopped
    steps: int = 300  # optimiser steps
    batch_size: int = 32  # conversations a step, over all processes
    lr: float = 1e-4  # highest learning rate
    lora_rank: int = 0  # rank of the LoRA adapters; 0 trains all weights

    row_name: ClassVar[str] = "conversations"


# What people have: a laptop (gpt2), one 24 GB GPU (gpt2-medium and -large), one 80 GB GPU (gpt2-xl). All but gpt2 train
# every weight: LoRA needs less memory, but full fine-tuning teaches a 2019 model to converse better.
#
# Where the numbers are from; nobody has run these presets yet:
#   [K] the project that this one follows, GPT-2 355M: https://github.com/hemmokarja/Conversational-GPT-SFT-DPO, sft.py
#   [S] SmolLM2 135M and 360M: https://github.com/huggingface/alignment-handbook, recipes/smollm2/sft/config_smol.yaml
#   [B] Brown et al. 2020 (GPT-3), https://arxiv.org/abs/2005.14165, table 2.1: which rate for which size
#   [L] Schulman et al. 2025, LoRA Without Regret, https://thinkingmachines.ai/blog/lora: ten times the rate for LoRA
# Memory is `model.memory_estimate`'s, in bf16 but for gpt2. Hours are estimates: 650 tokens a conversation, at 40 % of
# an RTX 4090's or A100's bf16 rate, which is assumed; for gpt2 at the rate measured on two cores.
REAL = {
    # [S]: made for models under 1B; half of it beside OASST [K], and the greetings that it lacks: about 295,000 in all
    "data": ("smol-smoltalk@0.5", "oasst1", "oasst2", "everyday-conversations"),
    "batch_size": 128,  # [K], [S]
    "steps": 2200,  # [K]: 280,000 conversations, an epoch; [S] took 920,000, of other models
    "prompts": ("What does a Data Scientist do? | What about a machine learning engineer?",
                "Explain photosynthesis to a child.", "Write a short poem about the sea."),
    "reply_tokens": 160, "eval_every": 200, "save_every": 200, "log_every": 5}
PRESETS = {
    # adapters: twice as fast where the vocabulary is most of the model, and what the base model knows of occupations
    # that no conversation mentions survives them better than training all weights; all its numbers were measured here
    "sample": {"steps": 900, "batch_size": 14, "lr": 2e-3, "lora_rank": 32, "lora_alpha": 64.0, "reply_tokens": 64},
    # a laptop: LoRA takes two thirds of time and memory. Rate: [K] by [L]. An epoch of OASST1's some 20,000 English
    # threads, in steps of 16, for LoRA likes large ones less [L]: 16 hours on two cores. Rank: to be measured
    "gpt2": REAL | {"model": "gpt2", "lr": 1e-3, "lora_rank": 16, "batch_size": 16, "steps": 1400,
                    "data": ("oasst1", "everyday-conversations"), "context": 512, "eval_every": 100, "save_every": 50,
                    "log_every": 1},
    # 355M: 16 GB, 2 hours. Rate: [K], which is of this very model; [S] took ten times as much: the first number to tune
    "gpt2-medium": REAL | {"model": "gpt2-medium", "lr": 1e-4, "micro_batch_tokens": 8192},
    # 774M: 19 GB, 12 of them before the first activation; 4 hours. Rate: gpt2-medium's times 2.5 / 3, as in [B]
    "gpt2-large": REAL | {"model": "gpt2-large", "lr": 8e-5, "micro_batch_tokens": 2048},
    # 1,558M: 58 GB, 4 hours. Rate: gpt2-medium's times 2 / 3, as in [B]
    "gpt2-xl": REAL | {"model": "gpt2-xl", "lr": 6e-5, "micro_batch_tokens": 8192},
}


def sft_loss(gpt, batch) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Cross-entropy over the assistant's tokens: - sum over t of log p(token_t | all tokens before t).

    A sum and a count: the loop divides once. In three lines,

        logits = gpt(ids)                                                      # (T, V), see model.GPT.target_logprobs
        logprobs = logits.log_softmax(-1)[t, ids[t + 1]]                       # (T,), see model.logprobs
        loss = -logprobs[mask].sum()                                           # mask: what data.render says is learnt
    """
    return -gpt.total_logprob(batch), torch.tensor(len(batch.targets)), {}     # over all M supervised tokens


def next_commands(cfg: Config) -> str:
    how = {"sample": "", "none": " --data PAIRS.jsonl"}.get(cfg.preset, f" --preset {cfg.preset}")
    model = shlex.join(["--model", cfg.out])
    return f"uv run dpo.py{how} {model}, or uv run chat.py {model}"


def main(cfg: Config) -> dict:
    with Run("sft", cfg) as run:
        gpt = run.load(cfg.model)
        chats = data.load_rows(cfg.data, cfg)
        if not begin(gpt, chats, cfg, run):
            return run.about["metrics"]
        metrics = train(gpt, sft_loss, step_batches(chats, cfg, run), validation_batches(chats, cfg, run), cfg, run)
        return finish(gpt, metrics, cfg, run, next_command=next_commands(cfg))


if __name__ == "__main__":
    run_script(main, Config, PRESETS)
