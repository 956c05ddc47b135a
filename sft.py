"""Supervised fine-tuning: a base model learns to converse by continuing conversations it is shown.

    uv run sft.py                                   the bundled sample: minutes on a laptop's CPU, no network
    uv run sft.py --preset gpt2-medium              OpenAI's GPT-2 355M on OASST and SmolTalk
    uv run sft.py --preset gpt2 --data my_chats.jsonl --out runs/mine
"""

from __future__ import annotations

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


# What people have: a laptop (gpt2), one 24 GB GPU (gpt2-medium and -large), one 80 GB GPU (gpt2-xl). All but xl train
# every weight: LoRA needs less memory, but full fine-tuning teaches a 2019 model to converse better.
REAL = {"data": ("oasst1", "oasst2", "smoltalk@0.02"), "steps": 2000, "batch_size": 32,
        "prompts": ("What does a Data Scientist do? | What about a machine learning engineer?",
                    "Explain photosynthesis to a child.", "Write a short poem about the sea."),
        "reply_tokens": 160, "eval_every": 200, "save_every": 200, "log_every": 5}
PRESETS = {
    # adapters: twice as fast where the vocabulary is most of the model, and what the base model knows of occupations
    # that no conversation mentions survives them better than training all weights
    "sample": {"steps": 400, "batch_size": 14, "lr": 2e-3, "lora_rank": 32, "lora_alpha": 64.0, "reply_tokens": 64},
    # a laptop: LoRA halves time and memory, 300 steps of 16 are an evening
    "gpt2": REAL | {"model": "gpt2", "steps": 300, "batch_size": 16, "lr": 3e-4, "lora_rank": 16,
                    "data": ("oasst1",), "context": 512, "eval_every": 50, "save_every": 50, "log_every": 1},
    # 355M: weights, gradients and AdamW take 5.7 GB, with 8,192 tokens at once about 16
    "gpt2-medium": REAL | {"model": "gpt2-medium", "lr": 5e-5, "micro_batch_tokens": 8192},
    # 774M: 12.4 GB before the first activation; with 2,048 tokens at once about 19
    "gpt2-large": REAL | {"model": "gpt2-large", "lr": 3e-5, "micro_batch_tokens": 2048},
    # 1,558M: 25 GB before the first activation, with 8,192 tokens at once about 58
    "gpt2-xl": REAL | {"model": "gpt2-xl", "lr": 2e-5, "micro_batch_tokens": 8192},
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
    return f"uv run dpo.py{how} --model {cfg.out}, or uv run chat.py --model {cfg.out}"


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
