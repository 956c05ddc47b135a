"""What the default pipeline teaches, examined for several seeds: the README's table.

    uv run tests/benchmarks/pipeline.py --seeds 0 1 2
    uv run tests/benchmarks/pipeline.py --precision bf16

The questions are those of sample/exam.jsonl, which served to choose nothing. Each is answered greedily, and `--draws`
times as chat.py answers by default, on the CPU and with at most 96 tokens.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import chat  # noqa: E402 - the project's scripts lie two folders up
import data  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

GROUPS = ("seen, single", "seen, follow-up", "held-out, single", "held-out, follow-up", "everyday")
REPLY_TOKENS = 96


@dataclass
class Config:
    seeds: tuple[int, ...] = (0, 1, 2)  # of the order of the rows, the split and LoRA's first values
    precision: str = "auto"  # of the training and of the replies: fp32, bf16, or what the scripts choose by themselves
    draws: int = 3  # replies to each question at chat.py's own temperature
    exam: str = str(ROOT / "sample" / "exam.jsonl")
    out: str = "runs/pipeline"  # where the runs go


def run_stages(seed: int, out: Path, precision: str = "auto") -> dict[str, dict]:
    """`sft.py` and `dpo.py` with no options but seed, precision, folders: their run.json, and the seconds of each."""
    sft, dpo = out / f"sft-{seed}", out / f"dpo-{seed}"
    found = {}
    for stage, folder, more in (("sft", sft, []), ("dpo", dpo, ["--model", str(sft)])):
        began = time.perf_counter()
        subprocess.run([sys.executable, f"{stage}.py", "--seed", str(seed), "--out", str(folder), "--overwrite",
                        "--precision", precision, *more], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found[stage] = json.loads((folder / "run.json").read_text()) | {"wall": time.perf_counter() - began}
    return found


def examine(folder: str | Path, exam: str | Path, draws: int, precision: str = "auto") -> dict[str, dict]:
    """The scores of a model's likeliest replies to an exam, and of some that chat.py draws."""
    checks, precision = data.read_checks(exam), model.pick_precision(precision, model.pick_device("cpu"), small=True)
    gpt = model.for_generation(model.GPT.from_pretrained(folder), precision).eval()
    greedy = train.answer(gpt, [check.messages for check in checks], REPLY_TOKENS)
    verdicts = [data.judge(check, *reply) for check, reply in zip(checks, greedy, strict=True)]
    settings = chat.Config(max_new_tokens=REPLY_TOKENS)
    drawn = [(check, "".join(chat.reply(gpt, check.messages, settings, seed=seed)))
             for seed in range(draws) for check in checks]
    return {"greedy": data.tally(verdicts), "drawn": data.tally(data.judge(*reply, ended=True) for reply in drawn)}


def examine_stages(seed: int, out: Path, exam: str | Path, draws: int, precision: str = "auto",
                   base: bool = True) -> dict[str, dict]:
    """{model: its scores} of what `run_stages` left, and of the base model, which is not asked to draw."""
    folders = {"base": ROOT / "sample" / "model"} if base else {}
    folders |= {"SFT": out / f"sft-{seed}", "DPO": out / f"dpo-{seed}"}
    return {name: examine(folder, exam, 0 if name == "base" else draws, precision) for name, folder in folders.items()}


def rows(seed: int, found: dict[str, dict], examined: dict[str, dict]) -> list[list[str]]:
    """A line each for the base model, the SFT model and the DPO model."""
    lines = []
    for name, scores in examined.items():
        greedy, drawn, stage = scores["greedy"], scores["drawn"]["all"], name.lower()
        lines.append([str(seed) if name != "base" else "", name, *(f"{greedy[g]['correct']:.1%}" for g in GROUPS),
                      f"{greedy['all']['twice']:.1%}", f"{greedy['all']['good']:.1%}",
                      f"{drawn['good']:.1%}" if drawn["n"] else "-", f"{greedy['all']['facts']:.2f}",
                      f"{greedy['all']['words']:.1f}", f"{greedy['all']['ended']:.1%}",
                      f"{found['dpo']['metrics']['val_reward_accuracy']:.1%}" if name == "DPO" else "-",
                      f"{found[stage]['wall']:.0f} s" if stage in found else "-"])
    return lines


HEAD = ("seed", "model", *(f"correct: {group}" for group in GROUPS), "say a thing twice", "correct and said once",
        "the same as chat.py draws", "facts per reply", "words per reply", "end by themselves",
        "reward accuracy, held-out pairs", "time")


def table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(HEAD), ["---"] * len(HEAD), *lines])


def main(cfg: Config) -> None:
    out, lines = ROOT / cfg.out, []
    for seed in cfg.seeds:
        found = run_stages(seed, out, cfg.precision)
        lines += rows(seed, found, examine_stages(seed, out, cfg.exam, cfg.draws, cfg.precision, base=not lines))
    print(table(lines))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
