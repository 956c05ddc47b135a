"""What the tests share: no network, two threads, laws that hold on every machine, and small random GPT-2 folders."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: so before anything else
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # one test per core: threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

import data  # before torch, for what it puts into the environment

import torch  # isort: skip

torch.set_num_threads(min(2, torch.get_num_threads()))  # the tests have two cores; OMP_NUM_THREADS=1 is obeyed
settings.register_profile("laws", deadline=None, derandomize=True, database=None)  # the same examples for everyone
settings.load_profile("laws")


@pytest.fixture(scope="session", autouse=True)
def kept_rows(tmp_path_factory):
    """No test writes into a person's cache."""
    data.KEPT = tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A function that lets transformers write a random GPT-2 into a new folder.

    `gpt2_folder(n_embd=32, n_head=2, ...)` takes GPT2Config's settings. Every parameter is random, biases and layer
    norms too, and larger than at a real start: a bias that is left out or two weights that change places then show in
    the first digits, and the likeliest next token is likeliest by far.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(seed=0, spread=0.1, **config):
        torch.manual_seed(seed)
        theirs = GPT2LMHeadModel(GPT2Config(**config))
        with torch.no_grad():
            for weight in theirs.transformer.parameters():
                weight.add_(torch.randn_like(weight) * spread)
        folder = tmp_path_factory.mktemp("gpt2")
        theirs.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def somebodys_adapter(tiny_model, tmp_path_factory):
    """An adapter of the tiny model as PEFT leaves it, not fresh, of two ranks."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    theirs = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_model), LoraConfig(
        r=4, lora_alpha=6, target_modules=["c_attn", "mlp.c_proj"], rank_pattern={"c_attn": 2}, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    theirs.save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return folder


@pytest.fixture(scope="session")
def tiny_model(gpt2_folder):
    """The folder of a random GPT-2 with the real vocabulary and context but 32 wide: 1.6 million parameters.

    Shared by all tests: read it, never write into it.
    """
    return gpt2_folder(n_embd=32, n_layer=2, n_head=2, vocab_size=50257, n_positions=1024)
