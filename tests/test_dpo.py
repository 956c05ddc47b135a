"""Preference optimisation: the losses by hand, against the naive form and TRL; the reference; and that it learns."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import dpo
import lora
import model
import sft
import train

CPU = torch.device("cpu")


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


PAIRS = [(user("Is water wet?"), "Yes, it is.", "No."),
         (user("Hi") + assistant("Hello!") + user("How old are you?"), "I have no age.", "Forty-two, and a half."),
         (user("Name a colour, please, and explain at length why you chose it."), "Blue.", "Seven blue elephants"),
         (user("Count to three."), "One, two, three, and that is all there is to it.", "1 2 3")]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [{"prompt": p, "chosen": assistant(c), "rejected": assistant(r)} for p, c, r in PAIRS]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def other_model(gpt2_folder):
    """A second random model: where there is a policy and a reference, they differ."""
    return gpt2_folder(seed=1, n_embd=32, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def settings(tiny_model, pairs):
    def make(**more):
        return dpo.Config(**{"model": str(tiny_model), "data": (pairs,), "checks": "", "prompts": (), "reply_tokens": 4,
                             "steps": 4, "batch_size": 3, "val_fraction": 0.2, "eval_every": 2, "save_every": 2,
                             "lr": 1e-3} | more)
    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """A run's curves take longer to draw than its few steps; test_train.py looks at them."""
    monkeypatch.setattr(train, "plot_curves", lambda folders, path: None)


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def untimed(found):
    return [{k: v for k, v in record.items() if not k.endswith("_per_second") and k != "peak_memory_bytes"}
            for record in found]


# ---- the losses, by hand -------------------------------------------------------------------------

# a chosen reply of 4 tokens whose log-ratio is 2, and a rejected one of 2 tokens whose log-ratio is -1
CHOSEN = dpo.Replies(torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([4.0]))
REJECTED = dpo.Replies(torch.tensor([-9.0]), torch.tensor([-8.0]), torch.tensor([2.0]))
BY_HAND = {
    "sigmoid": 0.554355,            # log(1 + e^-0.3): beta times 3
    "cdpo": 0.584355,               # 0.9 * 0.554355 + 0.1 * log(1 + e^0.3), which is 0.854355
    "robust": 0.516855,             # (0.9 * 0.554355 - 0.1 * 0.854355) / 0.8
    "ipo": 16.0,                    # (2/4 + 1/2 - 5)^2
    "length-normalised": 0.644397,  # log(1 + e^-0.1): beta times 2/4 + 1/2
    "simpo": 0.854355,              # -10/4 + 9/2 = 2; 0.1 * 2 - 0.5 = -0.3; log(1 + e^0.3)
    "apo-zero": 0.925187,           # 1 - s(0.2) + s(-0.1), with s the logistic function: 1 - 0.549834 + 0.475021
    "apo-down": 0.975391,           # s(0.2) + 1 - s(0.3): 0.549834 + 1 - 0.574443
    "dpop": 0.554355,               # DPO's, for the chosen reply has become likelier
    # 10/4 - 0.1 log s(d): the odds of e^-2.5 and e^-4.5 are e^-2.414350 and e^-4.488829, so d = 2.074479
    "orpo": 2.511834,
    "hinge": 0.7,                   # 1 - 0.3
}


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_a_loss_by_hand(name):
    cfg = dpo.Config(loss=name, beta=0.1, label_smoothing=0.1, simpo_margin=0.5)
    assert dpo.LOSSES[name](CHOSEN, REJECTED, cfg).tolist() == pytest.approx([BY_HAND[name]], abs=1e-6)


def test_dpop_punishes_a_chosen_reply_that_becomes_unlikelier():
    """By 2, with a lambda of 5: beta (-2 - (-5) - 5 * 2) = -0.7."""
    cfg, down = dpo.Config(loss="dpop", beta=0.1, dpop_lambda=5.0), CHOSEN._replace(logp=torch.tensor([-14.0]))
    further = REJECTED._replace(logp=torch.tensor([-13.0]))
    assert dpo.dpop(down, further, cfg).item() == pytest.approx(math.log(1 + math.exp(0.7)), abs=1e-6)
    assert dpo.dpop(down, further, replace(cfg, dpop_lambda=0.0)).item() == dpo.dpo(down, further, cfg).item()


def test_orpo_of_a_reply_that_is_certain_is_a_number():
    certain = CHOSEN._replace(logp=torch.zeros(1, requires_grad=True))
    for sides in ((certain, REJECTED), (REJECTED, certain)):
        loss = dpo.orpo(*sides, dpo.Config(loss="orpo"))
        [gradient] = torch.autograd.grad(loss.sum(), certain.logp)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_each_loss_has_its_beta_and_the_flag_overrides_it(settings):
    assert dpo.BETAS.keys() == dpo.LOSSES.keys() > dpo.REFERENCE_FREE
    assert {name: settings(loss=name).beta for name in dpo.LOSSES} == dpo.BETAS
    assert settings(loss="ipo", beta=0.02).beta == 0.02

    def of(*args):
        return data.command_line(dpo.Config, dpo.PRESETS, list(args))

    sample, own = dpo.PRESETS["sample"], ("--data", "my_pairs.jsonl")
    assert (of().beta, of("--loss", "sigmoid").beta) == (sample["beta"], sample["beta"])
    for args in ((), own, ("--preset", "gpt2")):  # a preset's beta is of the preset's loss
        assert of(*args, "--loss", "ipo") == replace(of(*args), loss="ipo", beta=dpo.BETAS["ipo"])
        assert of(*args, "--loss=simpo", "--beta", "7").beta == 7
    with pytest.raises(ValueError, match="--loss is dop; it has to be one of sigmoid, "):
        of("--loss", "dop")
    with pytest.raises(SystemExit):
        data.command_line(sft.Config, sft.PRESETS, ["--loss", "ipo"])


def test_every_loss_comes_to_an_end_of_what_a_pair_teaches(tmp_path):
    """At a margin of 1 nat a token the slope is below a third of what it was at 0, or turns round; ORPO's is SFT's."""
    losses = import_benchmark("losses")
    for name in dpo.LOSSES.keys() - {"orpo"}:
        at_0, at_1 = losses.curve(name, torch.tensor([0.0, 1.0]), tokens=100, base=-2.5)[1]
        assert at_1 < at_0 / 3, name
        straight = name in ("ipo", "length-normalised", "simpo")    # were beta 0.1 for all
        at_0, at_1 = losses.curve(name, torch.tensor([0.0, 1.0]), tokens=100, base=-2.5, beta=0.1)[1]
        assert (at_1 > 0.79 * at_0) == straight, name
    losses.main(losses.Config(out=str(tmp_path / "losses.png")))
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def import_benchmark(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_relatives_that_meet(settings):
    """cDPO and robust without smoothing are DPO; at beta -> its limits a loss does what its paper says."""
    plain = dpo.dpo(CHOSEN, REJECTED, settings())
    for name in ("cdpo", "robust"):
        assert torch.equal(dpo.LOSSES[name](CHOSEN, REJECTED, settings(label_smoothing=0.0)), plain)
    margin = 1 / (2 * 0.25)  # IPO is content at 1 / (2 beta), here met exactly: a log-ratio of 2 a token
    met = CHOSEN._replace(logp=CHOSEN.ref_logp + 4 * margin)
    assert dpo.ipo(met, REJECTED._replace(logp=REJECTED.ref_logp), settings(beta=0.25)).item() == 0
    far = CHOSEN._replace(logp=torch.tensor([-1e4])), REJECTED._replace(logp=torch.tensor([0.0]))
    assert dpo.dpo(*far, settings()).item() == pytest.approx(0.1 * (1e4 - 12 + 8), rel=1e-5)  # and no infinity


def fixed(*values):
    """A model whose targets have these log-probabilities."""
    return SimpleNamespace(target_logprobs=lambda batch: torch.tensor(values))


def pair_of(chosen, rejected):
    return data.Pair(*(np.array(ids, np.int32) for ids in ([1, 2], chosen, rejected)))


HAND_BATCH = train.to_device(data.pack([pair_of([3, 4, 5, 6], [7, 8]), pair_of([9], [10])], [0, 1]), CPU)
POLICY = fixed(-1.0, -2.0, -3.0, -4.0, -4.0, -5.0, -2.0, -1.0)
REFERENCE = {0: (torch.tensor([-3.0, -3.0, -3.0, -3.0]), torch.tensor([-4.0, -4.0])),
             1: (torch.tensor([-1.0]), torch.tensor([-3.0]))}


def test_the_loss_of_a_batch_by_hand(settings):
    """Log-probabilities are summed over each reply; the second pair is wrong by 3: -0.1 against 0.2."""
    loss, count, found = dpo.dpo_loss(POLICY, HAND_BATCH, REFERENCE, settings(beta=0.1))
    assert (float(loss), int(count)) == (pytest.approx(0.554355 + 0.854355, abs=1e-6), 2)
    assert {k: float(v) for k, v in found.items()} == pytest.approx({
        "reward_accuracy": 1, "chosen_reward": 0.2 - 0.1, "rejected_reward": -0.1 + 0.2, "reward_margin": 0.3 - 0.3,
        # k2 of a token is r^2 / 2 with r = log pi_ref - log pi: r = -2, -1, 0, 1; 0, 1, and then r = 1; -2
        "kl": (2 + 0.5 + 0 + 0.5 + 0 + 0.5) / 6 + (0.5 + 2) / 2}, abs=1e-5)


def test_a_policy_that_is_its_reference_by_hand(settings):
    """ln 2 a pair, no reward, no KL, and no pair told apart: a tie is not right."""
    alike = POLICY.target_logprobs(None)
    alike = {0: (alike[:4], alike[4:6]), 1: (alike[6:7], alike[7:])}
    loss, _, found = dpo.dpo_loss(POLICY, HAND_BATCH, alike, settings())
    assert float(loss) == pytest.approx(2 * math.log(2)) and all(float(value) == 0 for value in found.values())


def test_the_nll_term_by_hand(settings):
    """The chosen replies' mean log-probabilities are -10/4 and -2; the rejected ones do not enter."""
    plain, _, _ = dpo.dpo_loss(POLICY, HAND_BATCH, REFERENCE, settings())
    more, _, _ = dpo.dpo_loss(POLICY, HAND_BATCH, REFERENCE, settings(nll=0.5))
    assert float(more - plain) == pytest.approx(0.5 * (2.5 + 2), abs=1e-6)


@pytest.mark.parametrize("name", ["ipo", "length-normalised", "simpo", "orpo"])
def test_what_averages_does_not_grow_with_length(name, settings):
    """Each reply said twice over: the same loss. DPO's sum doubles."""
    cfg = settings(loss=name, beta=0.1)
    twice = [dpo.Replies(*(2 * part for part in side)) for side in (CHOSEN, REJECTED)]
    assert torch.allclose(dpo.LOSSES[name](*twice, cfg), dpo.LOSSES[name](CHOSEN, REJECTED, cfg))
    assert dpo.dpo(*twice, cfg).item() == pytest.approx(math.log(1 + math.exp(-0.6)), abs=1e-6)


# ---- against the naive form ----------------------------------------------------------------------


def load(pairs):
    return data.load_pairs((pairs,), data.Reading(val_fraction=0)).train


def table(gpt, rows):
    """log pi_ref by row, one row at a time."""
    batches = [train.to_device(data.pack(rows, [i]), CPU) for i in range(len(rows))]
    with torch.no_grad():
        return {i: dpo.by_pair(gpt.target_logprobs(batch), batch)[0] for i, batch in enumerate(batches)}


def reply_logprob(gpt, prompt, reply):
    """log pi(reply | prompt), its tokens' sum, by a forward pass of its own over the whole text."""
    tokens = torch.from_numpy(np.concatenate([prompt, reply])).long()
    logp = gpt(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return logp[len(prompt) - 1:].sum()


def ranked(pairs):
    """The four pairs, and the three of a prompt with three ranked replies."""
    prompt = load(pairs)[0].prompt
    best, middling, worst = (np.array([*data.tokenizer().encode_ordinary(text), data.EOT], np.int32)
                             for text in ("A goose swims.", "A goose swims on and on.", "No."))
    return [*load(pairs), *(data.Pair(np.tile(prompt, 3), *both) for both in combinations((best, middling, worst), 2))]


@pytest.mark.parametrize("name, nll", [*((name, 0.0) for name in dpo.LOSSES), ("sigmoid", 0.7)])
def test_what_pairs_share_equals_two_forward_passes_each(name, nll, tiny_model, other_model, pairs, settings):
    """Loss and all gradients, of pairs packed with every prompt and every reply computed once."""
    rows, cfg = ranked(pairs), settings(loss=name, nll=nll)
    packed, naive, frozen = (model.GPT.from_pretrained(folder) for folder in (tiny_model, tiny_model, other_model))
    batch = train.to_device(data.pack(rows, [2, 4, 0, 3, 6, 1, 5]), CPU)
    assert len(batch.spans) == 11 and sum(bool(span.prefix) for span in batch.spans) > 2
    loss, count, _ = dpo.dpo_loss(packed, batch, table(frozen, rows), cfg)
    (loss / count).backward()

    total = 0.0
    for row in rows:
        with torch.no_grad():
            reference = [reply_logprob(frozen, row.prompt, reply) for reply in (row.chosen, row.rejected)]
        policy = [reply_logprob(naive, row.prompt, reply) for reply in (row.chosen, row.rejected)]
        sides = [dpo.Replies(p, r, torch.tensor(float(len(reply)))) for p, r, reply in
                 zip(policy, reference, (row.chosen, row.rejected), strict=True)]
        total = total + dpo.LOSSES[name](*sides, cfg) - nll * policy[0] / len(row.chosen)
    (total / 7).backward()

    assert int(count) == 7 and loss.item() == pytest.approx(total.item(), rel=1e-4)
    gradients = dict(naive.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in gradients.values())
    assert largest > 1e-4
    for key, p in packed.named_parameters():
        assert torch.allclose(p.grad, gradients[key].grad, atol=1e-4 * largest), key


def test_micro_batches_of_pairs_change_nothing(tiny_model, other_model, pairs, settings):
    rows = ranked(pairs)
    reference = table(model.GPT.from_pretrained(other_model), rows)

    def gradients(budget):
        gpt, sums = model.GPT.from_pretrained(tiny_model), train.Sums()
        batches = data.micro_batches(rows, range(7), budget)
        for batch in batches:
            found = dpo.dpo_loss(gpt, train.to_device(batch, CPU), reference, settings())
            found[0].backward()
            sums.add(*found)
        return len(batches), train.means({k: float(v) for k, v in sums.values.items()}), gpt

    (one, metrics, gpt), (seven, other_metrics, other) = gradients(10**6), gradients(1)
    assert (one, seven) == (1, 7) and other_metrics == pytest.approx(metrics, rel=1e-4)
    for p, q in zip(gpt.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5 * max(1.0, float(p.grad.abs().max())))


# ---- against TRL ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl(tiny_model, other_model, pairs, tmp_path_factory):
    """TRL's DPOTrainer on the same pairs, with a tokenizer as our runs leave it."""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    data.save_tokenizer(folder)
    policy, reference = (GPT2LMHeadModel.from_pretrained(path) for path in (tiny_model, other_model))
    rows = [{"prompt": p, "chosen": assistant(c), "rejected": assistant(r)} for p, c, r in PAIRS]
    args = DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None, beta=0.1,
                     label_smoothing=0.1, gradient_checkpointing=False)
    return DPOTrainer(policy, reference, args, train_dataset=Dataset.from_list(rows),
                      processing_class=AutoTokenizer.from_pretrained(folder))


def theirs(trl, loss, rows):
    """TRL's loss (mean over the pairs), its metrics, and the policy with its gradients."""
    trl.loss_types, trl.loss_weights = [loss], [1.0]
    trl.model.zero_grad()
    trl.model.train()
    trl._metrics["train"].clear()
    found = trl._compute_loss(trl.model, trl.data_collator([trl.train_dataset[i] for i in rows]), False)
    found.backward()
    return found.item(), {k: v[0] for k, v in trl._metrics["train"].items()}, trl.model


def test_trl_reads_the_same_ids(trl, pairs):
    """From messages through the chat template that our runs save."""
    for ours, row in zip(load(pairs), trl.train_dataset, strict=True):
        assert [row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
            ids.tolist() for ids in (ours.prompt, ours.chosen, ours.rejected)]


@pytest.mark.parametrize("name, trl_name", [
    ("sigmoid", "sigmoid"), ("ipo", "ipo"), ("robust", "robust"), ("length-normalised", "sigmoid_norm"),
    ("apo-zero", "apo_zero"), ("apo-down", "apo_down"), ("hinge", "hinge")])
def test_loss_rewards_and_gradients_are_trls(name, trl_name, trl, tiny_model, other_model, pairs, settings):
    rows, gpt = load(pairs), model.GPT.from_pretrained(tiny_model)
    frozen = model.GPT.from_pretrained(other_model)
    batch = train.to_device(data.pack(rows, range(4)), CPU)
    loss, count, found = dpo.dpo_loss(gpt, batch, table(frozen, rows), settings(loss=name, beta=0.1))
    (loss / count).backward()
    wanted, metrics, policy = theirs(trl, trl_name, range(4))
    assert loss.item() / 4 == pytest.approx(wanted, rel=1e-4) and int(count) == 4
    for ours, key in (("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("reward_margin", "margins"),
                      ("reward_accuracy", "accuracies")):
        assert float(found[ours]) / 4 == pytest.approx(metrics[f"rewards/{key}"], rel=1e-4, abs=1e-5)
    gradients = {key.removeprefix("transformer."): p.grad for key, p in policy.named_parameters()}
    for key in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight", "ln_f.bias"):
        ours, grad = gpt.get_parameter(key).grad, gradients[key]
        grad = grad.t() if "c_" in key else grad
        assert torch.allclose(ours, grad, atol=1e-4 * float(grad.abs().max())), key


@pytest.mark.parametrize("row", range(4))
def test_log_probabilities_of_a_reply_are_trls(row, trl, tiny_model, pairs):
    batch = train.to_device(data.pack(load(pairs), [row]), CPU)
    with torch.no_grad():
        logprobs = model.GPT.from_pretrained(tiny_model).target_logprobs(batch)
    _, metrics, _ = theirs(trl, "sigmoid", [row])
    for side, key in enumerate(("logps/chosen", "logps/rejected")):
        assert float(logprobs[batch.target_span == batch.pairs[0, side]].sum()) == pytest.approx(metrics[key], rel=1e-5)


def test_the_nll_term_is_trls(trl, tiny_model, pairs, settings):
    rows, gpt = load(pairs), model.GPT.from_pretrained(tiny_model)
    reference, batch = table(gpt, rows), train.to_device(data.pack(rows, [3]), CPU)
    with torch.no_grad():
        more = dpo.dpo_loss(gpt, batch, reference, settings(nll=1.0))[0] - math.log(2)
    assert float(more) == pytest.approx(theirs(trl, "sft", [3])[0], rel=1e-4)


def test_simpo_and_cdpo_are_trls(monkeypatch, settings):
    """TRL has them in its CPO: SimPO on mean log-probabilities; its smoothed sigmoid is cDPO if given log-ratios."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    def cpo(chosen, rejected, **more):
        stub = {"accelerator": SimpleNamespace(device=CPU), "alpha": 0.0, "label_smoothing": 0.0} | more
        return CPOTrainer.cpo_loss(SimpleNamespace(**stub), chosen, rejected)[0]

    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (dpo.Replies(*(-30 * torch.rand(2, 8, generator=generator)),
                                    torch.randint(1, 20, (8,), generator=generator)) for _ in range(2))
    cfg = settings(beta=2.0, simpo_margin=0.8, label_smoothing=0.2)
    wanted = cpo(chosen.logp / chosen.length, rejected.logp / rejected.length, loss_type="simpo", beta=2.0,
                 simpo_gamma=0.8)
    assert torch.allclose(dpo.simpo(chosen, rejected, cfg), wanted, rtol=1e-5)
    wanted = cpo(chosen.logratio, rejected.logratio, loss_type="sigmoid", beta=2.0, label_smoothing=0.2)
    assert torch.allclose(dpo.cdpo(chosen, rejected, cfg), wanted, rtol=1e-5)


def test_orpo_is_trls(monkeypatch, settings):
    """Its odds ratio on mean log-probabilities, the cross-entropy of the chosen reply, and its rewards."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    cfg, stub = settings(loss="orpo", beta=0.3), SimpleNamespace(accelerator=SimpleNamespace(device=CPU), beta=0.3)
    loss, count, found = dpo.dpo_loss(POLICY, HAND_BATCH, {}, cfg)
    means = torch.tensor([-10 / 4, -2.0]), torch.tensor([-9 / 2, -1.0])
    ratio, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(stub, *means)
    assert float(loss) == pytest.approx(float((-means[0] - ratio).sum()), rel=1e-5) and int(count) == 2
    wanted = {"chosen_reward": chosen.sum(), "rejected_reward": rejected.sum(), "reward_accuracy": 1,
              "reward_margin": (chosen - rejected).sum()}
    assert {k: float(v) for k, v in found.items()} == pytest.approx({k: float(v) for k, v in wanted.items()})


# ---- the reference -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_lora(tiny_model, tmp_path_factory):
    """The folder that an SFT with LoRA leaves."""
    folder = tmp_path_factory.mktemp("sft")
    rows = [{"messages": p + assistant(reply)} for p, c, r in PAIRS for reply in (c, r)]
    chats = write_jsonl(folder / "chats.jsonl", rows)
    sft.main(sft.Config(model=str(tiny_model), data=(chats,), out=str(folder / "run"), checks="", prompts=(),
                        lora_rank=4, steps=4, batch_size=8, lr=1e-2, val_fraction=0))
    return folder / "run"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("start, more", [
    ("base", {"lora_rank": 0}), ("base", {"lora_rank": 4, "lora_dropout": 0.3}), ("sft", {"lora_rank": 0}),
    ("sft", {"lora_rank": 4, "micro_batch_tokens": 1}), ("adapter", {"lora_rank": 0}), ("adapter", {"lora_rank": 4})])
def test_the_loss_at_step_0_is_ln_2(start, more, tiny_model, after_lora, settings, tmp_path, somebodys_adapter):
    if start == "adapter":
        start, more = "base", more | {"adapter": str(somebodys_adapter)}
    cfg = settings(model=str(tiny_model if start == "base" else after_lora), out=str(tmp_path), steps=1, batch_size=3,
                   **more)
    dpo.main(cfg)
    before = json.loads((tmp_path / "run.json").read_text())["before"]
    assert before["val_loss"] == pytest.approx(math.log(2), abs=1e-5)
    [first] = records(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["chosen_reward"] == pytest.approx(0, abs=1e-4) and first["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_is_the_model_without_adapters_and_without_dropout(tiny_model, pairs, settings, tmp_path):
    """However far the adapters have gone, whatever the mode; kept in a file, and found there again."""
    cfg = settings(out=str(tmp_path), lora_rank=4, lora_dropout=0.5, precision="fp32")
    found = data.load_pairs((pairs,), data.Reading(val_fraction=0.2))
    with train.Run("dpo", cfg) as run:
        gpt = run.load(cfg.model)
        for layer in lora.adapters(gpt).values():
            torch.nn.init.normal_(layer.lora_B)
        gpt.train()
        batches = train.step_batches(found, cfg, run), train.validation_batches(found, cfg, run)
        reference = dpo.reference_logprobs(gpt, found, *batches, cfg, run)
        assert len(list(tmp_path.glob("reference-*.safetensors"))) == 1
        again = dpo.reference_logprobs(None, found, *batches, cfg, run)  # it asks no model
    rows = found.train + found.val
    plain = table(model.GPT.from_pretrained(tiny_model), rows)
    assert set(reference) == set(again) == set(range(len(rows)))
    for row, sides in plain.items():
        for logprobs, found, kept in zip(sides, reference[row], again[row], strict=True):
            assert torch.allclose(found, logprobs, atol=1e-4) and torch.equal(found, kept)
    [kept] = tmp_path.glob("reference-*.safetensors")
    content = kept.read_bytes()
    held = dpo.read_table(kept)
    assert held.keys() == set(map(str, again))
    kept.write_bytes(bytes(len(content)))  # what is in memory is what was read
    assert all(torch.equal(both, torch.cat(again[int(row)])) for row, both in held.items())
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-4], content[:20], b""):  # the disk forgets a bit
        kept.write_bytes(damaged)
        assert dpo.read_table(kept) == {}


class Killed(Exception):
    pass


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("more", [{"lora_rank": 0}, {"lora_rank": 4, "lora_dropout": 0.2}])
def test_a_resumed_run_has_the_reference_of_the_first(more, settings, tmp_path, monkeypatch):
    """Killed after step 3 of 4 and its reference lost: it is computed anew, from the SFT model, not from the policy."""
    whole, cut = (settings(out=str(tmp_path / name), eval_every=0, lr=1e-2, **more) for name in ("whole", "cut"))
    dpo.main(whole)
    real, calls = dpo.dpo_loss, []

    def until_killed(gpt, *args, **kwargs):
        calls.append(gpt.training)
        if sum(calls) == 4:
            raise Killed
        return real(gpt, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "dpo_loss", until_killed)
        with pytest.raises(Killed):
            dpo.main(cut)
    assert [p.name for p in train.checkpoint_folders(tmp_path / "cut")] == ["step-00000002"]
    [lost] = (tmp_path / "cut").glob("reference-*.safetensors")
    content = lost.read_bytes()
    lost.unlink()
    dpo.main(cut)
    assert lost.read_bytes() == content
    assert untimed(records(cut.out)) == untimed(records(whole.out))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(after_lora, settings, tmp_path_factory):
    """A run with LoRA on an SFT with LoRA, until every pair is told apart."""
    cfg = settings(model=str(after_lora), out=str(tmp_path_factory.mktemp("dpo") / "run"), steps=16, batch_size=4,
                   lr=1e-2, lora_rank=4, eval_every=8, val_fraction=0.2, prompts=("Is water wet?",), precision="fp32")
    return cfg, dpo.main(cfg)


FIXED = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes",
         "reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "pairs_per_second"}


def test_metrics_have_the_fixed_keys(learnt):
    measured = {"val_loss", "val_reward_accuracy", "val_reward_margin", "val_chosen_reward", "val_rejected_reward",
                "val_kl"}
    for record in records(learnt[0].out):
        assert set(record) == FIXED | {"kl"} | (measured if record["step"] in (8, 16) else set())
        assert record["reward_margin"] == pytest.approx(record["chosen_reward"] - record["rejected_reward"], abs=1e-4)
        assert 0 <= record["reward_accuracy"] <= 1 and record["pairs_per_second"] > 0 and record["kl"] >= 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", sorted(dpo.REFERENCE_FREE))
def test_without_a_reference_none_is_computed_and_rewards_are_of_the_policy_alone(name, tiny_model, settings, tmp_path,
                                                                                 capsys):
    """From the base model in one stage; what is measured is what the folder's model says of the pairs."""
    cfg = settings(loss=name, model=str(tiny_model), out=str(tmp_path), lr=1e-2, steps=6, precision="fp32")
    measured = dpo.main(cfg)
    assert not list(tmp_path.glob("reference-*")) and "no reference" in capsys.readouterr().out
    log = records(tmp_path)
    assert all(set(record) >= FIXED and "kl" not in record for record in log) and log[-1]["loss"] < log[0]["loss"]
    [row], gpt = data.load_pairs(cfg.data, data.Reading(val_fraction=0.2)).val, model.GPT.from_pretrained(tmp_path)
    for key, reply in (("val_chosen_reward", row.chosen), ("val_rejected_reward", row.rejected)):
        mean = float(reply_logprob(gpt, row.prompt, reply).detach()) / len(reply)
        assert measured[key] == pytest.approx(cfg.beta * mean, rel=1e-3)


def test_preferences_are_learnt(learnt):
    log = records(learnt[0].out)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[-1]["loss"] < 0.4
    assert log[-1]["reward_accuracy"] == 1 and log[-1]["reward_margin"] > 1 > 1e-3 > abs(log[0]["reward_margin"])


def test_rewards_are_of_the_policy_against_the_model_it_came_from(learnt):
    """From the folders alone, with transformers: beta times how much likelier the replies have become."""
    from transformers import AutoModelForCausalLM

    cfg, metrics = learnt
    [row] = data.load_pairs(cfg.data, data.Reading(val_fraction=cfg.val_fraction)).val
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (cfg.out, cfg.model))
    for key, reply in (("val_chosen_reward", row.chosen), ("val_rejected_reward", row.rejected)):
        with torch.no_grad():
            now, then = (float(reply_logprob(lambda tokens, m=m: m(tokens).logits, row.prompt, reply))
                         for m in (policy, reference))
        assert metrics[key] == pytest.approx(cfg.beta * (now - then), abs=2e-3)


def test_the_adapter_of_a_dpo_run_belongs_to_the_sft_run(learnt):
    from peft import AutoPeftModelForCausalLM

    cfg, _ = learnt
    tokens = torch.tensor([data.render(PAIRS[0][0], reply=True)[0].tolist()])
    with torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(f"{cfg.out}/adapter").eval()(tokens).logits
        assert torch.allclose(found, model.GPT.from_pretrained(cfg.out)(tokens), atol=1e-4)
    about = json.loads((Path(cfg.out) / "adapter" / "adapter_config.json").read_text())
    assert Path(about["base_model_name_or_path"]) == Path(cfg.model).resolve()


def test_the_curves_of_a_dpo_run_have_rewards_margin_accuracy_and_kl(learnt, tmp_path, monkeypatch):
    from matplotlib import figure

    shown = []
    monkeypatch.setattr(figure.Figure, "tight_layout", lambda drawn: shown.append(drawn))
    train.plot_curves([learnt[0].out], tmp_path / "curves.png")
    panels = {axis.get_title(): axis for axis in shown[0].axes}
    assert len(panels) == 7 and all(axis.get_ylabel() and axis.get_xlabel() for axis in panels.values())
    drawn = {line.get_label(): list(line.get_ydata()) for axis in panels.values() for line in axis.lines}
    log = records(learnt[0].out)
    for key in ("chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy", "kl"):
        assert drawn[key] == [r[key] for r in log], key


@pytest.mark.usefixtures("no_pictures")
def test_the_falling_chosen_reward_is_explained(settings, tmp_path, capsys):
    dpo.main(settings(out=str(tmp_path), steps=1))
    out = capsys.readouterr().out
    assert "chosen reward may fall" in out and "Worry when" in out
    [line] = [line for line in out.splitlines() if line.startswith("step ")]
    for word in ("accuracy", "margin", "chosen", "rejected", "pairs/s"):
        assert word in line


@pytest.mark.parametrize("name", [name for name in dpo.LOSSES if name != "sigmoid"])
def test_every_loss_trains(name, after_lora, pairs, settings):
    """A few steps of plain descent in the loop's own loss: it falls, and the margin grows."""
    rows, cfg = load(pairs), settings(loss=name)
    gpt = model.GPT.from_pretrained(after_lora)
    loss = partial(dpo.dpo_loss, reference=table(gpt, rows), cfg=cfg)
    batch, found = train.to_device(data.pack(rows, range(4)), CPU), []
    optimizer = train.make_optimizer(gpt, replace(cfg, lr=1e-3))
    for _ in range(4):
        total, count, metrics = loss(gpt, batch)
        found.append((float(total / count), float(metrics["reward_margin"])))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert found[-1][0] < found[0][0] and found[-1][1] > found[0][1]


@pytest.mark.usefixtures("no_pictures")
def test_sft_then_dpo_then_the_reply(tiny_model, tmp_path):
    """SFT learns two replies to every question; DPO makes the model say the one that it would not have said."""
    questions = {"Tea or coffee?": ["Tea, please.", "Coffee, black."], "Left or right?": ["Left.", "Right, always."],
                 "Day or night?": ["Day, I think.", "Night."]}

    def answers(folder):
        found = train.answer(model.GPT.from_pretrained(folder), [user(question) for question in questions], 12)
        assert all(ended for _, ended in found)
        return [text for text, _ in found]

    common = {"checks": "", "prompts": (), "val_fraction": 0, "lr": 1e-2}
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": user(question) + assistant(reply)}
                                                   for question, replies in questions.items() for reply in replies])
    sft.main(sft.Config(model=str(tiny_model), data=(chats,), out=str(tmp_path / "sft"), steps=40, batch_size=6,
                        **common))
    first, *_, last = records(tmp_path / "sft")
    assert first["loss"] > 5 and last["loss"] < 0.5  # of some five tokens a reply, one is a coin's toss: ln 2 / 5
    said = answers(tmp_path / "sft")
    wanted = [next(reply for reply in replies if reply != rejected)
              for replies, rejected in zip(questions.values(), said, strict=True)]
    assert all(rejected in replies for replies, rejected in zip(questions.values(), said, strict=True))

    preferences = [{"prompt": question, "chosen": chosen, "rejected": rejected}
                   for question, chosen, rejected in zip(questions, wanted, said, strict=True)]
    dpo.main(dpo.Config(model=str(tmp_path / "sft"), data=(write_jsonl(tmp_path / "pairs.jsonl", preferences),),
                        out=str(tmp_path / "dpo"), steps=12, batch_size=3, lora_rank=4, nll=1.0, **common))
    assert records(tmp_path / "dpo")[-1]["reward_accuracy"] == 1
    assert answers(tmp_path / "dpo") == wanted
