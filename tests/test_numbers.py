"""What rounding may not change: a number added to all logits, large values in the stream, the number of threads.

The bundled model's logits lie between -11 and 16. OpenAI's lie around -100, where bf16 steps by 0.5, and its stream
has a few values hundreds of times as large as the others. So the bundled model is made like that here: `moved` takes
100 from every logit, `stretched` adds to two dimensions of the stream. Neither changes what the model says.
"""

import copy
import gzip
import itertools
import json
from types import SimpleNamespace

import psutil
import pytest
import torch

import chat
import data
import dpo
import lora
import model
import sft
import train

QUESTIONS = ("What does a baker do?", "What does a data scientist do?", "Where does a judge work?", "Hello!")


def asked(question):
    return data.render([{"role": "user", "content": question}], reply=True)[0].tolist()


@torch.no_grad()
def moved(by: float) -> model.GPT:
    """The bundled model with `by` added to all logits; one dimension of the stream is given up to hold the number."""
    gpt = model.GPT.from_pretrained("sample")
    spare = int((gpt.wte.weight.std(0) * gpt.ln_f.weight.abs()).argmin())
    gpt.wpe.weight[:, spare] += gpt.wte.weight[:, spare].mean() - 1
    gpt.wte.weight[:, spare], gpt.ln_f.weight[spare], gpt.ln_f.bias[spare] = 1, 0, by
    return gpt.eval()


@torch.no_grad()
def stretched(times: float) -> model.GPT:
    """The bundled model with two dimensions of the stream so many times as large; norms make up for the deviation."""
    gpt, plain, dims = model.GPT.from_pretrained("sample"), model.GPT.from_pretrained("sample"), [5, 77]
    others = torch.ones(gpt.config.n_embd, dtype=torch.bool).index_fill(0, torch.tensor(dims), False)
    tokens = torch.tensor([asked(question)[:9] for question in QUESTIONS[:3]])
    gpt.wpe.weight[:, dims] += torch.tensor([times, -times]) * (gpt.wte(tokens) + gpt.wpe.weight[:9]).std()
    deviation = {}

    def note(name):
        return lambda norm, given, out: deviation.__setitem__(name, given[0].std(-1).mean())

    for name, norm in plain.named_modules():
        if isinstance(norm, torch.nn.LayerNorm):
            norm.register_forward_hook(note(name))
    plain(tokens)
    for name, norm in gpt.named_modules():  # in the order in which the stream passes them
        if isinstance(norm, torch.nn.LayerNorm):
            before = deviation[name]
            handle = norm.register_forward_hook(note(name))
            gpt(tokens)
            handle.remove()
            norm.weight[others] *= deviation[name] / before
            norm.weight[dims] = 0
    return gpt.eval()


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Some of the bundled conversation trees."""
    path = tmp_path_factory.mktemp("few") / "trees.jsonl"
    with gzip.open(data.DATA_SETS["sample"].file, "rt") as trees:
        path.write_text("".join(itertools.islice(trees, 40)))
    return path


@pytest.fixture(scope="module")
def chats(few):
    return data.load_rows([f"oasst1:{few}"], data.Reading(val_fraction=0)).train


@pytest.fixture(scope="module")
def batch(chats):
    return train.to_device(data.pack(chats, range(12)), torch.device("cpu"))


def logprobs(gpt, batch, precision="fp32"):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return gpt.target_logprobs(batch)


def rms(difference):
    return difference.detach().square().mean().sqrt().item()


# ---- a number added to all logits ----------------------------------------------------------------


def test_the_moved_model_is_moved(batch):
    near, far = (moved(by)(batch.tokens[None, :30]) for by in (0, -100))
    torch.testing.assert_close(far, near - 100, rtol=0, atol=5e-4)


def test_training_sees_the_same_numbers_and_gradients_in_fp32(batch):
    near, far = moved(0), moved(-100)
    ours, theirs = logprobs(far, batch), logprobs(near, batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(far.total_logprob(batch) / len(ours), near.total_logprob(batch) / len(ours),
                               rtol=0, atol=1e-4)
    ours.mean().backward()
    theirs.mean().backward()
    theirs, others = dict(near.named_parameters()), far.ln_f.bias == near.ln_f.bias  # the one that holds the number
    for name, weight in far.named_parameters():
        found, wanted = weight.grad, theirs[name].grad
        if name == "wte.weight":
            found, wanted = found[:, others], wanted[:, others]
        assert (found - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5, name


@pytest.mark.parametrize("adapted", [False, True])
def test_training_in_bf16_rounds_as_if_nothing_had_moved(batch, adapted):
    found = {}
    for by in (0, -100):
        gpt = moved(by)
        exact = logprobs(gpt, batch)
        if adapted:
            lora.add_adapters(gpt, rank=4)
            model.share_equal_rows(gpt)
        with torch.autocast("cpu", torch.bfloat16):
            total = gpt.total_logprob(batch)
        found[by] = rms(logprobs(gpt, batch, "bf16") - exact)
        assert total.item() / len(exact) == pytest.approx(exact.mean().item(), abs=0.02)
    assert 0 < found[-100] <= 2 * found[0] and found[0] < 0.12, found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_replies_are_drawn_from_the_same_probabilities(precision):
    """In the prompt and token by token; and so most of the 50 likeliest tokens have logits of their own."""
    error = {}
    for by in (0, -100):
        gpt, exact = model.for_generation(moved(by), precision), moved(by)
        ids = asked(QUESTIONS[0])
        cache, known = model.KVCache(gpt), model.KVCache(exact)
        errors, fed = [], ids
        for _ in range(12):
            ours, theirs = cache.continue_from(gpt, fed)[0].float(), known.continue_from(exact, fed)[0]
            p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
            errors.append((p.exp() * (p - q)).sum().item())
            fed = [*fed, int(theirs.argmax())]
        assert len(set(ours.topk(50).values.tolist())) >= 30
        assert ours.max() == pytest.approx(theirs.max(), abs=1)  # logits are what they are, for transformers' penalty
        error[by] = sum(errors) / len(errors)
    assert error[-100] <= (1e-6 if precision == "fp32" else 2 * error[0] + 1e-5) and error[0] < 0.02, error


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_replies_are_the_same(precision):
    near, far = (model.for_generation(moved(by), precision) for by in (0, -100))
    same = 0
    for seed, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        for temperature in (0.0, 0.7):
            cfg = chat.Config(temperature=temperature, max_new_tokens=24)
            ours, theirs = ("".join(chat.reply(gpt, messages, cfg, seed=seed)) for gpt in (far, near))
            same += ours == theirs
    assert same >= (8 if precision == "fp32" else 6)  # rounding may turn a close choice


def test_to_stop_is_no_repetition():
    """However low the logits lie, a penalty for repetition does not keep a reply from its end."""
    logits = torch.tensor([-100.0, -100.5, -101.0])  # the end is the likeliest, and has been there before
    generator = torch.Generator().manual_seed(0)
    assert model.choose(logits, [0, 1], 0, 0, 1, 0, 1.2, generator, stop=0) == 0
    assert model.choose(logits, [0, 1], 0, 0, 1, 0, 1.2, generator, stop=None) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pipeline_that_starts_moved_ends_moved(precision, few, tmp_path, monkeypatch):
    """SFT, then DPO: losses, rewards and what is left on the disk."""
    monkeypatch.setattr(train, "plot_curves", lambda folders, path: None)
    how = {"data": (f"oasst1:{few}",), "checks": "", "prompts": (), "precision": precision, "steps": 2, "batch_size": 4,
           "eval_every": 0, "save_every": 0, "lr": 1e-3, "lora_rank": 4, "val_fraction": 0.1}
    found = {}
    for by in (0, -100):
        base, *runs = (str(tmp_path / f"{name}{by}") for name in ("base", "sft", "dpo"))
        moved(by).save_pretrained(base)
        first, second = (script.Config(model=start, out=out, **how)
                         for script, start, out in ((sft, base, runs[0]), (dpo, runs[0], runs[1])))
        found[by] = [sft.main(first), dpo.main(second)]
        found[by].append(model.GPT.from_pretrained(second.out)(torch.tensor([asked(QUESTIONS[0])])))
    digits = 1e-3 if precision == "fp32" else 0.03
    for near, far in zip(found[0][:2], found[-100][:2], strict=True):
        for key in ("loss", "val_loss", "reward_margin", "chosen_reward", "val_reward_margin"):
            assert near.get(key, 0.0) == pytest.approx(far.get(key, 0.0), abs=digits), key
    near, far = (found[by][2].log_softmax(-1) for by in (0, -100))
    likely = near > -6
    assert rms(far[likely] - near[likely]) < (0.01 if precision == "fp32" else 0.2)


# ---- large values in the stream ------------------------------------------------------------------


def test_large_values_in_the_stream_cost_no_digits(batch):
    """In training (bf16, LoRA) and in generation (bf16, int8): at most twice the rounding of the plain model."""
    errors = {}
    for times in (0, 300):
        gpt = stretched(times)
        exact = logprobs(gpt, batch).detach()
        found = [rms(logprobs(gpt, batch, "bf16") - exact)]
        adapted = copy.deepcopy(gpt)
        lora.add_adapters(adapted, rank=4)
        for layer in lora.adapters(adapted).values():
            layer.base.to(torch.bfloat16)
        found.append(rms(logprobs(adapted, batch, "bf16") - exact))
        for precision in ("bf16", "int8"):
            rounded = model.for_generation(copy.deepcopy(gpt), precision)
            found.append(rms(logprobs_of_logits(rounded, batch) - logprobs_of_logits(gpt, batch)))
        errors[times] = found
    stream = (stretched(300).wte(batch.tokens) + stretched(300).wpe(batch.positions)).abs()
    assert stream.max() > 100 * stream.median()
    assert all(0 < far <= 2 * near + 1e-3 for near, far in zip(errors[0], errors[300], strict=True)), errors


@torch.no_grad()
def logprobs_of_logits(gpt, batch):
    ids = batch.tokens[None, :batch.spans[0].tokens]
    return model.logprobs(gpt(ids)[:, :-1], ids[:, 1:])


# ---- the number of threads -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapted", [False, True])
def test_one_thread_and_two_give_the_same_gradients_bit_for_bit(precision, adapted, chats, few):
    threads, found = torch.get_num_threads(), []
    pairs = data.load_pairs([f"oasst1:{few}"], data.Reading(val_fraction=0)).train
    batches = [train.to_device(data.pack(rows, range(6)), torch.device("cpu")) for rows in (chats, pairs)]
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            gpt = model.GPT.from_pretrained("sample")
            if adapted:
                lora.add_adapters(gpt, rank=4)
                model.share_equal_rows(gpt)
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = (gpt.target_logprobs(batch) * torch.linspace(-1, 1, len(batch.targets))).sum()
                    loss = loss + gpt.total_logprob(batch)
                loss.backward()
            grads = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
            grads["norm"] = torch.tensor(train.gradient_norm(list(grads.values()), SimpleNamespace()))
            found.append(grads)
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) > 20
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


@pytest.fixture
def machine(monkeypatch):
    """Four cores, and a function that lets time pass in which others use so many of them, and we so many."""
    clock = SimpleNamespace(now=100.0, idle=0.0, own=0.0, threads=4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(model.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(model.time, "process_time", lambda: clock.own)
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(idle=clock.idle, iowait=0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: clock.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(clock, "threads", count))
    for name in ("most", "looked", "idle", "own"):
        monkeypatch.setattr(model.Cores, name, 0)

    def passes(seconds, others, ours):
        clock.now, clock.own = clock.now + seconds, clock.own + seconds * ours
        clock.idle += seconds * (4 - others - ours)
        model.leave_busy_cores()
        return clock.threads

    model.leave_busy_cores()
    return passes


def test_cores_that_others_use_are_left_to_them(machine):
    assert machine(1, others=0.1, ours=4) == 4
    assert machine(1, others=1, ours=3) == 3
    assert machine(0.1, others=0, ours=0.1) == 3  # too soon to look again
    assert machine(1, others=4, ours=0) == 1  # never none
    assert machine(1, others=2.1, ours=1) == 2
    assert machine(1, others=0, ours=1) == 4


def test_a_number_of_threads_that_was_asked_for_is_kept(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert machine(1, others=3, ours=1) == 4


# ---- which precision -----------------------------------------------------------------------------


def test_auto_takes_what_the_hardware_multiplies_in(monkeypatch):
    cpu = torch.device("cpu")
    for units in ("0", "1"):
        monkeypatch.setenv("GPT2_CHAT_BF16", units)
        assert model.pick_precision("auto", cpu) == ("bf16" if units == "1" else "fp32")
        assert model.pick_precision("auto", cpu, small=True) == "fp32"
        assert [model.pick_precision(p, cpu) for p in ("fp32", "bf16", "int8")] == ["fp32", "bf16", "int8"]
    monkeypatch.delenv("GPT2_CHAT_BF16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for units in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda units=units: units)
        assert model.pick_precision("auto", cpu) == ("bf16" if units else "fp32")


def test_a_whole_run_says_which_it_took(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("GPT2_CHAT_BF16", "1")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"},
                                             {"role": "assistant", "content": "Hello!"}]}))
    with train.Run("test", sft.Config(model=str(tiny_model), out=str(tmp_path / "run"), data=(str(path),))) as run:
        assert run.dtype == torch.bfloat16
