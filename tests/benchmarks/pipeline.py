"""What the default pipeline teaches, counted on the sample's checks, for several seeds: the README's table.

    uv run tests/benchmarks/pipeline.py --seeds 0 1 2
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)  # of the order of the rows, the split and LoRA's first values
    out: str = "runs/pipeline"  # where the runs go


def run_stages(seed: int, out: Path) -> dict[str, dict]:
    """`sft.py` and `dpo.py` with no options but the seed and the folders; their run.json, and the seconds each took."""
    sft, dpo = out / f"sft-{seed}", out / f"dpo-{seed}"
    found = {}
    for stage, folder, more in (("sft", sft, []), ("dpo", dpo, ["--model", str(sft)])):
        began = time.perf_counter()
        subprocess.run([sys.executable, f"{stage}.py", "--seed", str(seed), "--out", str(folder), "--overwrite", *more],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found[stage] = json.loads((folder / "run.json").read_text()) | {"wall": time.perf_counter() - began}
    return found


GROUPS = ("seen, single", "seen, follow-up", "held-out, single", "held-out, follow-up")


def rows(found: dict[str, dict]) -> list[list[str]]:
    """A line each for the base model, the SFT model and the DPO model."""
    lines = []
    for name, stage, when in (("base", "sft", "before"), ("SFT", "sft", "after"), ("DPO", "dpo", "after")):
        checks = found[stage][when]["checks"]
        accuracy = f"{found['dpo']['metrics']['val_reward_accuracy']:.1%}" if name == "DPO" else "-"
        lines.append([name, *(f"{checks[g]['correct']:.0%}" for g in GROUPS), f"{checks['all']['facts']:.2f}",
                      f"{checks['all']['ended']:.1%}", f"{checks['all']['words']:.1f}", accuracy,
                      "-" if name == "base" else f"{found[stage]['wall']:.0f} s"])
    return lines


def main(cfg: Config) -> None:
    print("| seed | model | correct: " + " | ".join(GROUPS)
          + " | facts per reply | end by themselves | words per reply | reward accuracy, held-out pairs | time |")
    print("|---" * 11 + "|")
    for seed in cfg.seeds:
        for line in rows(run_stages(seed, ROOT / cfg.out)):
            print("| " + " | ".join([str(seed), *line]) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
