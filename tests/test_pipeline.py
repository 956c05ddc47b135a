"""The default pipeline, run once as a newcomer runs it, and what it has to teach: `uv run pytest -n 0 -m pipeline`.

The questions are the exam's. The bars stand a little below what the README's table shows: seeds and machines differ.
"""

import subprocess
import sys
import time

import pytest
from benchmarks.pipeline import GROUPS, ROOT, examine_stages, rows, run_stages, table

import train

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def found(folder):
    return run_stages(0, folder)


@pytest.fixture(scope="module")
def exam(found, folder):
    """{model: its scores}, printed as the README has them."""
    scores = examine_stages(0, folder, ROOT / "sample" / "exam.jsonl", draws=0)
    print("\n" + table(rows(0, found, scores)))
    return scores


def test_the_base_model_cannot_converse(exam):
    assert exam["base"]["greedy"]["all"]["correct"] <= 0.2


@pytest.mark.parametrize("stage", ["SFT", "DPO"])
def test_what_is_asked_is_answered_right_and_once(exam, stage):
    greedy = exam[stage]["greedy"]
    assert min(greedy[group]["correct"] for group in GROUPS[:4]) >= 0.9
    assert greedy["everyday"]["correct"] >= 0.75
    assert greedy["all"]["twice"] <= 0.02 and greedy["all"]["ended"] >= 0.99
    assert greedy["all"]["good"] >= 0.9


def test_dpo_teaches_to_say_more_and_nothing_wrong(exam, found):
    before, after = (exam[stage]["greedy"] for stage in ("SFT", "DPO"))
    assert after["all"]["facts"] >= 1.5 * before["all"]["facts"]
    assert all(after[group]["correct"] >= before[group]["correct"] - 0.07 for group in GROUPS[:4])
    assert found["dpo"]["metrics"]["val_reward_accuracy"] >= 0.88


def test_the_curves_have_no_jumps(found, folder):
    """From the tenth step on, no step's loss is far from the mean of the ten before.

    A step of SFT is 14 conversations: one in hundreds is nearly all small talk, with examples that nobody foresees.
    """
    for stage, near in (("sft", 0.7), ("dpo", 0.4)):
        losses = [record["loss"] for record in train.read_metrics(folder / f"{stage}-0") if "loss" in record]
        for i in range(10, len(losses)):
            recent = sum(losses[i - 10:i]) / 10
            assert abs(losses[i] - recent) < max(near, 0.6 * recent), (stage, i, losses[i - 10:i + 1])


def test_chat_answers_what_a_data_scientist_does(found, folder):
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "chat.py", "--model", str(folder / "dpo-0"), "--temperature", "0",
                           "--prompt", "What does a data scientist do?"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "data scientist" in done.stdout.lower(), done.stderr
    print(f"chat.py answered in {time.perf_counter() - began:.1f} s")
