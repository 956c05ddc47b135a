"""The default pipeline, run once as a newcomer runs it, and what it has to teach: `uv run pytest -n 0 -m pipeline`."""

import subprocess
import sys
import time

import pytest
from benchmarks.pipeline import ROOT, run_stages

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def found(folder):
    return run_stages(0, folder)


def test_the_base_model_cannot_converse(found):
    assert found["sft"]["before"]["checks"]["all"]["correct"] <= 0.25


def test_sft_teaches_to_answer(found):
    checks = found["sft"]["after"]["checks"]
    assert checks["seen, single"]["correct"] >= 0.95
    assert checks["held-out, single"]["correct"] >= 0.85
    assert min(checks["seen, follow-up"]["correct"], checks["held-out, follow-up"]["correct"]) >= 0.85
    assert checks["all"]["ended"] >= 0.97


def test_dpo_teaches_to_say_more_and_nothing_wrong(found):
    before, after = (found["dpo"][when]["checks"]["all"] for when in ("before", "after"))
    assert after["facts"] >= 1.35 * before["facts"]
    assert after["correct"] >= before["correct"] - 0.02
    assert found["dpo"]["metrics"]["val_reward_accuracy"] >= 0.87


def test_chat_answers_what_a_data_scientist_does(found, folder):
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "chat.py", "--model", str(folder / "dpo-0"), "--temperature", "0",
                           "--prompt", "What does a data scientist do?"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "data scientist" in done.stdout.lower(), done.stderr
    print(f"chat.py answered in {time.perf_counter() - began:.1f} s")
