"""A run's folder opens in other people's tools, and each gives the reply that chat.py gives.

The tools that need nothing but this project's packages, or a package that uv lays over them, run with `-m full`. Two
need more, which variables name: LLAMA_CPP, a folder with llama.cpp's convert_hf_to_gguf.py, and VLLM, the python of an
environment with vLLM. (uv compiles llama-cpp-python at its first call, for minutes; LLAMA names a python that has it.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import chat
import data
import model
import sft

pytestmark = pytest.mark.full
HERE = Path(__file__).parent
TALKS = [[{"role": "user", "content": "What does a baker do?"}], [{"role": "user", "content": "Who kneads dough?"}],
         [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hello! \n"}],
         [{"role": "user", "content": "What does a data scientist do?"},
          {"role": "assistant", "content": "A data scientist builds statistical models."},
          {"role": "user", "content": "What about a machine learning engineer?"}]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with LoRA on the bundled sample."""
    folder = tmp_path_factory.mktemp("elsewhere") / "run"
    cfg = sft.Config(model="sample", data=("sample",), steps=60, lr=1e-3, lora_rank=16, checks="", prompts=(),
                     precision="fp32", out=str(folder))
    sft.main(cfg)
    return folder


@pytest.fixture(scope="module")
def replies(run):
    gpt, cfg = model.GPT.from_pretrained(run), chat.Config(temperature=0.0, max_new_tokens=60)
    found = ["".join(chat.reply(gpt, talk, cfg)) for talk in TALKS]
    assert len(set(found)) >= 3 and min(len(found.split()) for found in found) >= 3
    return found


@pytest.fixture(scope="module")
def gguf(run):
    """The folder with model.gguf in it, as llama.cpp's own script makes it."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
    converter = Path(os.environ["LLAMA_CPP"]).resolve() / "convert_hf_to_gguf.py"
    command(*laid_over("gguf"), converter, run, "--outfile", run / "model.gguf", "--outtype", "f16")
    return run


def laid_over(*packages):
    """This project's python with packages that it does not need itself."""
    return ["uv", "run", "--frozen", *(word for package in packages for word in ("--with", package)), "python"]


def command(*words, given=""):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run([str(word) for word in words], cwd=data.HERE, input=given, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def replies_of(tool, folder, python=(sys.executable,)):
    found = command(*python, HERE / "elsewhere.py", tool, folder, given=json.dumps(TALKS))
    [line] = [line for line in found.splitlines() if line.startswith('["')]  # a tool's own processes talk too
    return [reply.strip() for reply in json.loads(line)]


@pytest.mark.parametrize("tool", ["pipeline", "apply_chat_template", "peft"])
def test_transformers_and_peft(tool, run, replies):
    assert replies_of(tool, run) == replies


def test_ctranslate2(run, replies):
    assert replies_of("ctranslate2", run, laid_over("ctranslate2")) == replies


def test_llama_cpp(gguf, replies):
    own = os.environ.get("LLAMA")
    assert replies_of("llama_cpp", gguf, [own] if own else laid_over("llama-cpp-python")) == replies


def test_transformers_on_llama_cpps_file(gguf, replies):
    assert replies_of("gguf_file", gguf, laid_over("gguf")) == replies


@pytest.mark.skipif("VLLM" not in os.environ, reason="VLLM names no python of an environment with vLLM")
def test_vllm(run, replies):
    assert replies_of("vllm", run, [os.environ["VLLM"]]) == replies
