"""Draw every preference loss and its slope against the margin, at the beta that suits it and at one for all.

    uv run tests/benchmarks/losses.py                   (to pictures/losses.png)

The two replies have as many tokens, and the margin grows by halves: the chosen reply's log-ratio rises as far as the
rejected one's falls. A slope is told as a share of what it is at margin 0, where training begins.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import dpo


@dataclass
class Config:
    out: str = "pictures/losses.png"  # where the picture goes
    tokens: int = 100  # of either reply
    base: float = -2.5  # the reference's mean log-probability of a token; SimPO and ORPO begin here too
    beta: float = 0.1  # the one for all


def curve(loss: str, margin: torch.Tensor, tokens: int, base: float,
          beta: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss at margins in nats a token, and how fast it falls there."""
    margin = margin.double().clone().requires_grad_(True)
    length = torch.full_like(margin, tokens)
    chosen, rejected = (dpo.Replies(tokens * (base + sign * margin / 2), tokens * torch.full_like(margin, base), length)
                        for sign in (1, -1))
    values = dpo.LOSSES[loss](chosen, rejected, dpo.Config(loss=loss, beta=beta))
    [slopes] = torch.autograd.grad(values.sum(), margin)
    return values.detach(), -slopes


def main(cfg: Config) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    margin = torch.linspace(-0.5, 1.5, 401)
    start = int(margin.abs().argmin())
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2))
    colours = pyplot.get_cmap("tab20")
    for i, loss in enumerate(dpo.LOSSES):
        look = {"color": colours(2 * i % 20), "linewidth": 1.3, "linestyle": "-" if i < 10 else "--"}
        own = dpo.Config(loss=loss).beta
        values, slopes = curve(loss, margin, cfg.tokens, cfg.base)
        axes[0].plot(margin, values - values[start], label=f"{loss}, {own:g}", **look)
        axes[1].plot(margin, slopes / slopes[start], **look)
        slopes = curve(loss, margin, cfg.tokens, cfg.base, cfg.beta)[1]
        axes[2].plot(margin, slopes / slopes[start], **look)
    axes[0].set(title="loss less its value at margin 0 (loss, its beta)", ylim=(-3, 4))
    axes[1].set(title="slope as a share of that at margin 0", ylim=(-1.1, 2.1))
    axes[2].set(title=f"the same with a beta of {cfg.beta:g} for all", ylim=(-1.1, 2.1))
    for axis in axes:
        axis.set_xlabel("margin, nats a token")
        axis.axvline(0, color="grey", linewidth=0.5)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize="x-small", ncols=2, loc="upper right")
    figure.tight_layout()
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cfg.out, dpi=80)
    print(f"picture: {cfg.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
