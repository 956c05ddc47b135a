"""Direct preference optimisation: the model learns from pairs of replies which one people prefer.

Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290) show that the policy which maximises a learnt reward, held near
a reference by beta * KL, has the reward  r(x, y) = beta log pi(y|x) / pi_ref(y|x)  up to a term of x alone. So reward
model and reinforcement learning fall away: raise r(chosen) over r(rejected), as in the classification of pairs.

    uv run dpo.py                                   on runs/sft and the bundled sample's ranked replies
    uv run dpo.py --preset gpt2-medium              on runs/sft and UltraFeedback, HH-RLHF and OASST's ranks
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterator
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

    # sigmoid is DPO; the others are its relatives
    loss: Literal["sigmoid", "ipo", "cdpo", "robust", "length-normalised", "simpo", "apo-zero", "apo-down", "dpop",
                  "orpo", "hinge"] = "sigmoid"
    beta: float | None = None  # how strongly the policy is held to the reference; by default what suits the loss
    label_smoothing: float = 0.1  # share of preferences assumed to be wrong (cdpo and robust only)
    simpo_margin: float = 1.25  # by how much a chosen reply should win (simpo only)
    dpop_lambda: float = 50.0  # how hard a chosen reply that becomes unlikelier is punished (dpop only)
    nll: float = 0.0  # weight of an added cross-entropy on the chosen reply, which keeps it from becoming unlikely

    row_name: ClassVar[str] = "pairs"
    groups = Settings.groups | {
        "loss": ("loss", "beta", "label_smoothing", "simpo_margin", "dpop_lambda", "nll")}

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"--loss is {self.loss}; it has to be one of {', '.join(LOSSES)}")
        self.beta = BETAS.get(self.loss, 0.1) if self.beta is None else self.beta

    @property
    def has_reference(self) -> bool:
        return self.loss not in REFERENCE_FREE

    def limits(self) -> dict[str, tuple[bool, str]]:
        return super().limits() | {
            "dropout": (self.dropout == 0, "0: DPO compares the model with itself before training"),
            "beta": (0 < self.beta < math.inf, "above 0 and finite"),
            "nll": (0 <= self.nll < math.inf, "0 or more and finite"),
            "dpop_lambda": (0 <= self.dpop_lambda < math.inf, "0 or more and finite"),
            "simpo_margin": (math.isfinite(self.simpo_margin), "finite"),
            "label_smoothing": (0 <= self.label_smoothing < 0.5, "0 or more and below 0.5: most preferences are right")}


# Where the numbers are from; nobody has run these presets yet, but the sample's (see sft.py for memory and hours):
#   [S] SmolLM2 135M and 360M: https://github.com/huggingface/alignment-handbook, recipes/smollm2/dpo/config_smol.yaml
#   [K] the project that this one follows, GPT-2 355M: https://github.com/hemmokarja/Conversational-GPT-SFT-DPO, dpo.py
#   [P] Pang et al. 2024, https://arxiv.org/abs/2404.19733: the cross-entropy on chosen replies, with a weight of 1
#   [D] GPT-2 with LoRA: https://github.com/linfeng-du/direct-preference-optimization, cc/run_dpo_lora.sh
#   [L] Schulman et al. 2025, LoRA Without Regret, https://thinkingmachines.ai/blog/lora: ten times the rate for LoRA
# [S] and [K] differ by ten in the rate and fifty in beta. [S] is taken, rate, beta and batch together: at a small beta
# GPT-2s are reported to repeat themselves, as the bundled one did. DPO nudges: a large step destroys what SFT taught.
REAL = {"data": ("ultrafeedback", "oasst1", "hh-rlhf@0.1"),  # [S], and people's own ranks; [K] took hh-rlhf by half
        "batch_size": 128, "steps": 960,  # [S]: 2 epochs of 61,000 pairs; [K]: 124,000 pairs in batches of 128
        "lr": 1e-6, "beta": 0.5, "nll": 1.0,  # [S], [S], [P]
        "prompts": ("What does a Data Scientist do? | What about a machine learning engineer?",
                    "Explain photosynthesis to a child.", "Write a short poem about the sea."),
        "reply_tokens": 160, "lora_rank": 0, "eval_every": 100, "save_every": 100, "log_every": 5}
PRESETS = {
    # a small model falls into repetitions at this rate: beta and the cross-entropy on chosen replies hold it
    "sample": {"steps": 240, "batch_size": 48, "lr": 5e-4, "lora_rank": 32, "lora_alpha": 64.0, "beta": 0.8,
               "nll": 1.0, "reply_tokens": 64, "eval_every": 60, "save_every": 60},
    # a laptop (2.2 GB in fp32): OASST's ranks, 3,200 pairs in 3 hours on two cores. Rate: [D]; steps: to be measured
    "gpt2": REAL | {"data": ("oasst1",), "steps": 200, "batch_size": 16, "lr": 5e-5, "lora_rank": 16, "context": 512,
                    "eval_every": 50, "save_every": 50, "log_every": 1},
    "gpt2-medium": REAL | {"micro_batch_tokens": 8192},  # one 24 GB GPU: 16 GB, an hour or two
    # one 24 GB GPU: 774M and AdamW leave little room, adapters leave enough: 11 GB, 2 hours. Rate: [S] by [L]
    "gpt2-large": REAL | {"lr": 1e-5, "lora_rank": 32, "micro_batch_tokens": 4096},
    "gpt2-xl": REAL | {"micro_batch_tokens": 8192},  # one 80 GB GPU: 58 GB, 3 hours. Rate: [S], of smaller models
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


def apo_zero(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """1 - sigmoid(beta logratio_w) + sigmoid(beta logratio_l): the chosen reply likelier, the rejected one unlikelier.

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, equation 7: for chosen replies better than the model's.
    """
    return 1 - torch.sigmoid(cfg.beta * chosen.logratio) + torch.sigmoid(cfg.beta * rejected.logratio)


def apo_down(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """sigmoid(beta logratio_w) + 1 - sigmoid(beta (logratio_w - logratio_l)): both unlikelier, the rejected one more.

    D'Oosterlinck et al. 2024, equation 8: for a model whose own replies are better than the chosen ones.
    """
    apart = torch.sigmoid(cfg.beta * (chosen.logratio - rejected.logratio))
    return torch.sigmoid(cfg.beta * chosen.logratio) + 1 - apart


def dpop(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """- log sigmoid(beta (logratio_w - logratio_l - lambda max(0, -logratio_w))): the chosen reply must not fall.

    Pal et al. 2024 (Smaug), https://arxiv.org/abs/2402.13228, their DPO-Positive.
    """
    fall = torch.relu(-chosen.logratio)
    return -logsigmoid(cfg.beta * (chosen.logratio - rejected.logratio - cfg.dpop_lambda * fall))


def orpo(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """- m_w - beta log sigmoid(log odds_w - log odds_l), where m = log pi / |y| and odds = e^m / (1 - e^m).

    SFT on the chosen reply and a penalty on the rejected one, from a base model and in one stage: no reference in it.
    Hong et al. 2024, https://arxiv.org/abs/2403.07691, equations 3, 4, 6 and 7, whose lambda is beta here.
    """
    means = [side.logp / side.length for side in (chosen, rejected)]
    # a reply that is certain has infinite odds
    odds = [mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6))) for mean in means]
    return -means[0] - cfg.beta * logsigmoid(odds[0] - odds[1])


def hinge(chosen: Replies, rejected: Replies, cfg: Config) -> torch.Tensor:
    """max(0, 1 - beta (logratio_w - logratio_l)): a reward margin of 1, and nothing to learn from pairs beyond.

    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, their hinge-norm: SLiC's loss on DPO's log-ratios.
    """
    return torch.relu(1 - cfg.beta * (chosen.logratio - rejected.logratio))


LOSSES = {"sigmoid": dpo, "ipo": ipo, "cdpo": cdpo, "robust": robust, "length-normalised": length_normalised,
          "simpo": simpo, "apo-zero": apo_zero, "apo-down": apo_down, "dpop": dpop, "orpo": orpo, "hinge": hinge}
REFERENCE_FREE = {"simpo", "orpo"}  # in these a reward is beta times the mean log-probability of a reply's tokens
# Which beta suits a loss depends on what it multiplies: a difference of sums, a hundred nats, or of means, one nat.
# With too small a beta a loss is a straight line, and no pair ever teaches less: tests/benchmarks/losses.py draws it.
BETAS = {
    "sigmoid": 0.1, "cdpo": 0.1, "robust": 0.1,  # Rafailov et al. 2023, appendix B
    "ipo": 1.0,  # a target of half a nat a token: a sum of 50 over 100 tokens, where DPO's loss is all but satisfied
    "length-normalised": 5.0,  # Lambert et al. 2024 (Tulu 3), its table of hyperparameters
    "simpo": 2.5,  # Meng et al. 2024 took 2 to 2.5, and a margin of half of it (https://github.com/princeton-nlp/SimPO)
    "apo-zero": 0.1, "apo-down": 0.1,  # D'Oosterlinck et al. 2024, section 5.2
    "dpop": 0.3,  # Pal et al. 2024, with a lambda of 50
    "orpo": 0.1,  # Hong et al. 2024: the lambda of their Mistral
    "hinge": 0.1,  # TRL's default, which is a margin of 10 nats; to be measured
}


Logprobs = tuple["torch.Tensor", "torch.Tensor"]  # of the tokens of a pair's chosen and rejected reply


def dpo_loss(gpt, batch, reference: dict[int, Logprobs], cfg: Config) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The chosen loss over a batch of pairs, and the implicit rewards; `reference[row]` is the pair's log pi_ref.

    Each reply's tokens are summed up, then each pair's two replies are looked up: one may be in several pairs.
    """
    logprobs = gpt.target_logprobs(batch)                                      # (M,) over all tokens of all replies
    ref_logprobs = torch.zeros_like(logprobs)                                  # (M,), and so they stay without one
    if cfg.has_reference:
        ref_logprobs = torch.cat([torch.empty(0), *by_span(reference, batch)]).to(logprobs)
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
    if not cfg.has_reference:
        up, down = (cfg.beta * (side.logp / side.length).detach() for side in (chosen, rejected))
        return rewards(up, down)
    up, down = cfg.beta * chosen.logratio.detach(), cfg.beta * rejected.logratio.detach()
    k2 = (logprobs - ref_logprobs) ** 2 / 2                                    # (M,)
    k2 = k2.new_zeros(len(batch.spans)).index_add(0, batch.target_span, k2)    # (spans,)
    kl = k2[batch.pairs].sum(1) / (chosen.length + rejected.length)
    return rewards(up, down) | {"kl": kl.sum()}


def rewards(up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"reward_accuracy": (up > down).sum(), "reward_margin": (up - down).sum(), "chosen_reward": up.sum(),
            "rejected_reward": down.sum()}


# ---- the reference -------------------------------------------------------------------------------


def reference_logprobs(gpt, pairs: data.Data, training, validation, cfg: Config, run: Run) -> dict[int, Logprobs]:
    """log pi_ref of every target of the pairs this process will see, computed once and before the loop.

    The reference is the model before training: adapters off, dropout off, no second model in memory. A run that is
    resumed comes here with the SFT model's weights, before the checkpoint is loaded, and finds its own file again. That
    is written every minute: what was computed is not computed again, and the batches are the same, to the bit.
    """
    rows = pairs.train + pairs.val
    seen = {int(row) for batch in validation for row in batch.rows}
    seen = sorted(seen.union(*(map(int, training.rows(step)) for step in range(cfg.steps))))
    key = repr((run.about["model"]["sha256"], pairs.fingerprint, seen, run.dtype, run.rank))
    path = run.folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    table = read_table(path)
    if missing := len(seen) - len(table):
        run.say(f"reference log-probabilities of {missing:,} pairs ...")
        gpt.eval()
        with (run.leavable(lambda: write_table(table, path)) as leave, data.progress("reference", len(seen)) as advance,
              torch.no_grad(), lora.adapters_disabled(gpt), run.autocast()):
            for batch in in_parts(rows, seen, cfg.micro_batch_tokens):
                if not all(str(row) in table for row in batch.rows):
                    leave()
                    batch = to_device(batch, run.device)
                    replies = by_pair(gpt.target_logprobs(batch).float(), batch)
                    table |= {str(row): torch.cat(pair).cpu() for row, pair in zip(batch.rows, replies, strict=True)}
                advance(len(batch.rows))
        write_table(table, path)
    return {int(row): both.split([len(rows[int(row)].chosen), len(rows[int(row)].rejected)])
            for row, both in table.items()}


def in_parts(rows: data.Rows, indices: list[int], token_budget: int) -> Iterator[data.Batch]:
    """Their micro-batches, a few hundred rows at a time: all of them together would not fit the memory."""
    for start in range(0, len(indices), 512):
        yield from data.micro_batches(rows, indices[start:start + 512], token_budget)


def write_table(table: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with writing(path, sum(4 * len(logprobs) for logprobs in table.values())), written_whole(path) as temporary:
        save_file(table, temporary, metadata={"sha256": weights_sha256(table)})


def read_table(path: Path) -> dict[str, torch.Tensor]:
    """The table as far as it was written; {} the first time, and where a power cut or the disk left something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            # copies: the file stays mapped, and what is written over it later must not reach the run
            table = {row: file.get_tensor(row).clone() for row in file.keys()}  # noqa: SIM118 - it is no dict
            return table if file.metadata() == {"sha256": weights_sha256(table)} else {}
    except (FileNotFoundError, SafetensorError):
        return {}


def main(cfg: Config) -> dict:
    with Run("dpo", cfg) as run:
        gpt = run.load(cfg.model)
        pairs = data.load_pairs(cfg.data, cfg)
        if not begin(gpt, pairs, cfg, run):
            return run.about["metrics"]
        run.say(("The chosen reward may fall below zero: DPO only asks that the rejected one falls further."
                 if cfg.has_reference else f"{cfg.loss} has no reference: a reward is beta log pi(y|x) / tokens of y.")
                + "\nWorry when the margin stops growing, or when the replies shown degrade.")
        training, validation = step_batches(pairs, cfg, run), validation_batches(pairs, cfg, run)
        reference = reference_logprobs(gpt, pairs, training, validation, cfg, run) if cfg.has_reference else {}
        metrics = train(gpt, partial(dpo_loss, reference=reference, cfg=cfg), training, validation, cfg, run)
        command = shlex.join(["uv", "run", "chat.py", "--compare", cfg.model, cfg.out])
        return finish(gpt, metrics, cfg, run, next_command=command)


if __name__ == "__main__":
    run_script(main, Config, PRESETS)
