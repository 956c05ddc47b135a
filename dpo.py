"""Direct preference optimisation: the model learns from pairs of replies which one people prefer.

Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290) show that the policy which maximises a learnt reward, held near
a reference by beta * KL, has the reward  r(x, y) = beta log pi(y|x) / pi_ref(y|x)  up to a term of x alone. So reward
model and reinforcement learning fall away: raise r(chosen) over r(rejected), as in the classification of pairs.

    uv run dpo.py                                   on runs/sft and the bundled sample's ranked replies
    uv run dpo.py --preset gpt2-medium              on runs/sft and UltraFeedback, HH-RLHF and OASST's ranks
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import data
from data import lazy, run_script, written_whole
from train import (
    Run,
    Settings,
    begin,
    finish,
    step_batches,
    to_device,
    train,
    validation_batches,
    weights_sha256,
    writing,
)

torch = lazy("torch")
lora = lazy("lora")


@dataclass(kw_only=True)
class Config(Settings):
    # settings for a model's size; with neither --preset nor --data: sample
    preset: Literal["none", "sample", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "none"
    model: str = "runs/sft"  # the model to start from, which is also the reference: a folder, as sft.py leaves it
    data: tuple[str, ...] = ("sample",)  # preferences: NAME, NAME:PATH or PATH, each with an optional @WEIGHT
    out: str = "runs/dpo"  # run folder; the same command again goes on where it stopped
    steps: int = 150  # optimiser steps
    batch_size: int = 32  # pairs a step, over all processes
    lr: float = 1e-4  # highest learning rate
    lora_rank: int = 16  # rank of the LoRA adapters; 0 trains all weights
    dropout: float = 0.0  # always 0: noise that the reference lacks would count as reward; see --lora-dropout

    loss: Literal["sigmoid", "ipo", "cdpo", "robust", "length-normalised", "simpo"] = "sigmoid"  # DPO or a relative
    beta: float = 0.1  # how strongly the policy is held to the reference
    label_smoothing: float = 0.1  # share of preferences assumed to be wrong (cdpo and robust only)
    simpo_margin: float = 0.5  # by how much a chosen reply should win (simpo only)
    nll: float = 0.0  # weight of an added cross-entropy on the chosen reply, which keeps it from becoming unlikely

    row_name: ClassVar[str] = "pairs"

    def limits(self) -> dict[str, tuple[bool, str]]:
        return super().limits() | {
            "dropout": (self.dropout == 0, "0: DPO compares the model with itself before training"),
            "beta": (self.beta > 0, "above 0"), "nll": (self.nll >= 0, "0 or more"),
            "label_smoothing": (0 <= self.label_smoothing < 0.5, "0 or more and below 0.5: most preferences are right")}


# The rate is a tenth of SFT's and less: DPO nudges, and a large step destroys what SFT taught.
REAL = {"data": ("ultrafeedback", "oasst1", "hh-rlhf@0.1"), "steps": 1000, "batch_size": 32,
        "prompts": ("What does a Data Scientist do? | What about a machine learning engineer?",
                    "Explain photosynthesis to a child.", "Write a short poem about the sea."),
        "reply_tokens": 160, "lr": 5e-6, "lora_rank": 0, "eval_every": 100, "save_every": 100, "log_every": 5}
PRESETS = {
    # a small model falls into repetitions at this rate: beta and the cross-entropy on chosen replies hold it
    "sample": {"steps": 120, "batch_size": 48, "lr": 5e-4, "lora_rank": 32, "lora_alpha": 64.0, "beta": 0.3,
               "nll": 2.0, "reply_tokens": 64, "eval_every": 50, "save_every": 50},
    # a laptop: OASST's ranks alone, 200 steps of 16
    "gpt2": REAL | {"data": ("oasst1",), "steps": 200, "batch_size": 16, "lr": 5e-5, "lora_rank": 16, "context": 512,
                    "eval_every": 50, "save_every": 50, "log_every": 1},
    "gpt2-medium": REAL | {"micro_batch_tokens": 8192},  # one 24 GB GPU: about 16 GB
    # one 24 GB GPU: 774M and AdamW leave little room, adapters leave enough: about 12 GB
    "gpt2-large": REAL | {"lr": 2e-5, "lora_rank": 32, "micro_batch_tokens": 4096},
    "gpt2-xl": REAL | {"lr": 2e-6, "micro_batch_tokens": 8192},  # one 80 GB GPU: about 58 GB
}


# ---- the losses ----------------------------------------------------------------------------------


class Replies(NamedTuple):
    """One side of the pairs; each (pairs,)."""

    logp: torch.Tensor      # log pi(y|x): summed over the reply's tokens
    ref_logp: torch.Tensor  # log pi_ref(y|x)
    length: torch.Tensor    # tokens of the reply

    @property
    def logratio(self) -> torch.Tensor:
        return self.logp - self.ref_logp


def logsigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.logsigmoid(x)


def dpo(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """- log sigmoid(beta (logratio_w - logratio_l)): DPO, equation 7."""
    return -logsigmoid(cfg.beta * (chosen.logratio - rejected.logratio))


def cdpo(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """DPO when a share e of the preferences is flipped: (1 - e) loss(w, l) + e loss(l, w).

    Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3.
    """
    e = cfg.label_smoothing
    return (1 - e) * dpo(chosen, rejected, cfg) + e * dpo(rejected, chosen, cfg)


def robust(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """((1 - e) loss(w, l) - e loss(l, w)) / (1 - 2e): DPO's loss, estimated without bias when a share e is flipped.

    Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, equation 8.
    """
    e = cfg.label_smoothing
    return ((1 - e) * dpo(chosen, rejected, cfg) - e * dpo(rejected, chosen, cfg)) / (1 - 2 * e)


def ipo(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """(logratio_w - logratio_l - 1 / (2 beta))^2 with log-ratios averaged over tokens: a margin to meet, not to grow.

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17; averaging as its authors advised since.
    """
    margin = chosen.logratio / chosen.length - rejected.logratio / rejected.length
    return (margin - 1 / (2 * cfg.beta)) ** 2


def length_normalised(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """DPO on log-ratios averaged over tokens, so that a longer reply is not rewarded for its length.

    Lambert et al. 2024 (Tulu 3), https://arxiv.org/abs/2411.15124, equation 6.
    """
    return -logsigmoid(cfg.beta * (chosen.logratio / chosen.length - rejected.logratio / rejected.length))


def simpo(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """- log sigmoid(beta (log pi_w / |w| - log pi_l / |l|) - margin): no reference in it.

    Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6.
    """
    margin = chosen.logp / chosen.length - rejected.logp / rejected.length
    return -logsigmoid(cfg.beta * margin - cfg.simpo_margin)


LOSSES = {"sigmoid": dpo, "ipo": ipo, "cdpo": cdpo, "robust": robust, "length-normalised": length_normalised,
          "simpo": simpo}


Logprobs = tuple["torch.Tensor", "torch.Tensor"]  # of the tokens of a pair's chosen and rejected reply


def dpo_loss(gpt, batch, reference: dict[int, Logprobs], cfg: Config) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The chosen loss over a batch of pairs, and the implicit rewards; `reference[row]` is the pair's log pi_ref.

    Each reply's tokens are summed up, then each pair's two replies are looked up: one may be in several pairs.
    """
    logprobs = gpt.target_logprobs(batch)                                      # (M,) over all tokens of all replies
    ref_logprobs = torch.cat([torch.empty(0), *by_span(reference, batch)]).to(logprobs)               # (M,)
    of_tokens = torch.stack([logprobs, ref_logprobs, torch.ones_like(logprobs)])                      # (3, M)
    of_replies = of_tokens.new_zeros(3, len(batch.spans)).index_add(1, batch.target_span, of_tokens)  # (3, spans)
    chosen, rejected = (Replies(*of_replies[:, side]) for side in batch.pairs.T)                      # each (pairs,)
    loss = LOSSES[cfg.loss](chosen, rejected, cfg)                             # (pairs,)
    if cfg.nll:  # Pang et al. 2024, https://arxiv.org/abs/2404.19733, equation 1
        loss = loss - cfg.nll * chosen.logp / chosen.length
    return loss.sum(), torch.tensor(len(loss)), metrics(logprobs.detach(), ref_logprobs, batch, chosen, rejected, cfg)


def by_span(reference: dict[int, Logprobs], batch) -> list[torch.Tensor]:
    """log pi_ref of the batch's replies as the batch has them: each once."""
    found = {}
    for row, spans in zip(batch.rows, batch.pairs.tolist(), strict=True):
        found |= dict(zip(spans, reference[int(row)], strict=True))
    return [found[span] for span in sorted(found)]


def by_pair(logprobs: torch.Tensor, batch) -> list[Logprobs]:
    """The log-probabilities (M,) of a batch as its pairs have them: a reply for each pair that it is in."""
    replies = logprobs.split(torch.bincount(batch.target_span, minlength=len(batch.spans)).tolist())
    return [(replies[chosen], replies[rejected]) for chosen, rejected in batch.pairs.tolist()]


def metrics(logprobs, ref_logprobs, batch, chosen: Replies, rejected: Replies, cfg: Config) -> dict[str, torch.Tensor]:
    """Sums over the pairs: rewards beta (log pi - log pi_ref), and how far the policy has moved, in nats per token.

    kl is Schulman's k2 estimator (http://joschu.net/blog/kl-approx.html), (log pi - log pi_ref)^2 / 2, taken on the
    replies of the data instead of the policy's own, and averaged over the tokens of each pair. (His k3, of less bias,
    takes the exponential of a log-ratio, and explodes on rejected replies, which the policy would not write.)
    """
    up, down = cfg.beta * chosen.logratio.detach(), cfg.beta * rejected.logratio.detach()
    k2 = (logprobs - ref_logprobs) ** 2 / 2                                    # (M,)
    k2 = k2.new_zeros(len(batch.spans)).index_add(0, batch.target_span, k2)    # (spans,)
    kl = k2[batch.pairs].sum(1) / (chosen.length + rejected.length)
    return {"reward_accuracy": (up > down).sum(), "reward_margin": (up - down).sum(), "chosen_reward": up.sum(),
            "rejected_reward": down.sum(), "kl": kl.sum()}


# ---- the reference -------------------------------------------------------------------------------


def reference_logprobs(gpt, pairs: data.Data, training, validation, cfg: Config, run: Run) -> dict[int, Logprobs]:
    """log pi_ref of every target of the pairs this process will see, computed once and before the loop.

    The reference is the model before training: adapters off, dropout off, no second model in memory. A run that is
    resumed comes here with the SFT model's weights, before the checkpoint is loaded, and finds its own file again.
    """
    from safetensors.torch import save_file

    rows, seen = pairs.train + pairs.val, set()
    for batches in (validation, *(training(step, cfg.micro_batch_tokens) for step in range(cfg.steps))):
        seen |= {int(row) for batch in batches for row in batch.rows}
    key = repr((run.about["model"]["sha256"], pairs.fingerprint, sorted(seen), run.dtype, run.rank))
    path = run.folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not (table := read_table(path)):
        run.say(f"reference log-probabilities of {len(seen):,} pairs ...")
        gpt.eval()
        with torch.no_grad(), lora.adapters_disabled(gpt), run.autocast():
            for batch in data.micro_batches(rows, sorted(seen), cfg.micro_batch_tokens):
                batch = to_device(batch, run.device)
                replies = by_pair(gpt.target_logprobs(batch).float(), batch)
                table |= {str(row): torch.cat(pair).cpu() for row, pair in zip(batch.rows, replies, strict=True)}
        with writing(path, sum(4 * len(logprobs) for logprobs in table.values())), written_whole(path) as temporary:
            save_file(table, temporary, metadata={"sha256": weights_sha256(table)})
    return {int(row): both.split([len(rows[int(row)].chosen), len(rows[int(row)].rejected)])
            for row, both in table.items()}


def read_table(path: Path) -> dict[str, torch.Tensor]:
    """The table as it was written; {} the first time, and where a power cut or the disk left something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            table = {row: file.get_tensor(row) for row in file.keys()}  # noqa: SIM118 - it is no dict
            return table if file.metadata() == {"sha256": weights_sha256(table)} else {}
    except (FileNotFoundError, SafetensorError):
        return {}


def main(cfg: Config) -> dict:
    with Run("dpo", cfg) as run:
        gpt = run.load(cfg.model)
        pairs = data.load_pairs(cfg.data, cfg)
        if not begin(gpt, pairs, cfg, run):
            return run.about["metrics"]
        run.say("The chosen reward may fall below zero: DPO only asks that the rejected one falls further.\n"
                "Worry when the margin stops growing, or when the replies shown degrade.")
        training, validation = step_batches(pairs, cfg, run), validation_batches(pairs, cfg, run)
        reference = reference_logprobs(gpt, pairs, training, validation, cfg, run)
        metrics = train(gpt, partial(dpo_loss, reference=reference, cfg=cfg), training, validation, cfg, run)
        return finish(gpt, metrics, cfg, run, next_command=f"uv run chat.py --compare {cfg.model} {cfg.out}")


if __name__ == "__main__":
    run_script(main, Config, PRESETS)
