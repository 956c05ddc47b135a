"""Supervised fine-tuning: its loss is transformers', it learns, and what it leaves opens in transformers and PEFT."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import lora
import model
import sft
import train

TALKS = [("What is the capital of France?", "Paris, of course."), ("Who wrote Hamlet?", "Shakespeare did."),
         ("How many legs has a spider?", "Eight, unless it was in a fight."), ("Say hello in Spanish.", "¡Hola!")]


def as_messages(question, reply):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": as_messages(*talk)}) + "\n" for talk in TALKS))
    return str(path)


@pytest.fixture(scope="module")
def settings(tiny_model, chats):
    def make(**more):
        return sft.Config(**{"model": str(tiny_model), "data": (chats,), "checks": "", "prompts": (TALKS[0][0],),
                             "reply_tokens": 12, "batch_size": 4, "val_fraction": 0, "warmup": 0.1} | more)
    return make


@pytest.fixture(scope="module")
def full(settings, tmp_path_factory):
    """A run that trains every weight until it knows its four conversations."""
    cfg = settings(out=str(tmp_path_factory.mktemp("full") / "run"), steps=40, lr=1e-2, eval_every=20)
    sft.main(cfg)
    return Path(cfg.out)


@pytest.fixture(scope="module")
def adapted(settings, tmp_path_factory):
    """A run with LoRA and all that can go wrong in its file: another scale, dropout, fewer targets."""
    cfg = settings(out=str(tmp_path_factory.mktemp("lora") / "run"), steps=6, lr=1e-2, lora_rank=4, lora_alpha=6.0,
                   rslora=True, lora_dropout=0.1, lora_targets=("c_attn", "mlp.c_proj"))
    sft.main(cfg)
    return Path(cfg.out)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logits_of_ours(folder, tokens):
    with torch.no_grad():
        return model.GPT.from_pretrained(folder)(tokens)


TOKENS = torch.tensor([data.render(as_messages(*TALKS[0]) + as_messages(*TALKS[1]))[0].tolist()])


# ---- the loss ------------------------------------------------------------------------------------

SHARED = as_messages("First?", "Not learnt here.") + as_messages("Second question, then?", "Learnt.")
ROWS = [data.render(as_messages(*TALKS[0])), data.render(SHARED), data.render(SHARED, [False, False, False, True]),
        data.render([{"role": "system", "content": "Be brief."}, *as_messages("Why?", "So.")])]


def test_the_loss_is_transformers_loss_with_minus_100_on_the_mask(tiny_model):
    """Of rows laid end to end and of rows padded on the right: total, count, and every gradient."""
    from transformers import GPT2LMHeadModel

    rows = [data.Row(ids, mask) for ids, mask in ROWS]
    gpt = model.GPT.from_pretrained(tiny_model)
    total, count, metrics = sft.sft_loss(gpt, train.to_device(data.pack(rows, range(4)), torch.device("cpu")))
    (total / count).backward()

    theirs = GPT2LMHeadModel.from_pretrained(tiny_model).eval()
    longest = max(len(row) for row in rows)
    tokens, labels = torch.full((4, longest), data.EOT), torch.full((4, longest), -100)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.from_numpy(row.ids)
        labels[i, :len(row)] = torch.from_numpy(row.ids).masked_fill(~torch.from_numpy(row.mask), -100)
    loss = theirs(tokens, labels=labels).loss
    loss.backward()

    assert int(count) == int((labels != -100).sum()) and metrics == {}
    assert float(total.detach() / count) == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, p in gpt.named_parameters():
        conv = p.dim() == 2 and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
        grad = wanted[name].t() if conv else wanted[name]
        assert torch.allclose(p.grad, grad, atol=2e-5 * float(grad.abs().max())), name


def test_what_is_not_supervised_gives_no_gradient_of_its_own(tiny_model):
    """Other tokens after the last target change nothing; other targets do."""
    ids, mask = data.render(SHARED, [False, True, False, False])
    after = int(mask.nonzero()[0][-1]) + 1

    def loss(ids):
        gpt = model.GPT.from_pretrained(tiny_model)
        batch = train.to_device(data.pack([data.Row(ids, mask)], [0]), torch.device("cpu"))
        with torch.no_grad():
            return float(sft.sft_loss(gpt, batch)[0])

    other, target = ids.copy(), ids.copy()
    other[after:], target[after - 2] = 11, 11
    assert loss(other) == loss(ids) != loss(target)


# ---- in bf16 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_in_bf16_trains_answers_and_exports(settings, tmp_path, rank):
    """Where the hardware has bf16 it is the default: frozen weights are rounded for training, and not on disk."""
    cfg = settings(out=str(tmp_path / "run"), steps=8, lr=1e-2, lora_rank=rank, precision="bf16", device="cpu")
    sft.main(cfg)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 1
    if rank:
        base, merged = model.GPT.from_pretrained(cfg.model), model.GPT.from_pretrained(tmp_path / "run")
        lora.load_adapters(base, tmp_path / "run" / "adapter")
        for name, weight in lora.merged_weights(base).items():
            assert torch.equal(weight, merged.state_dict()[name]), name


def test_rounded_weights_are_exported_into_the_model_that_they_were_rounded_from(settings, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    gpt = model.GPT.from_pretrained(tiny_model)
    with torch.no_grad():
        gpt.h[0].mlp.c_fc.bias[0] += 1
    cfg = settings(model=str(tmp_path / "model"), out=str(tmp_path / "run"), steps=2, lora_rank=2, precision="bf16",
                   device="cpu")
    save = train.save_checkpoint

    def and_meanwhile(*args):
        save(*args)
        gpt.save_pretrained(tmp_path / "model")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="other weights now"):
        patch.setattr(train, "save_checkpoint", and_meanwhile)
        sft.main(cfg)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    model.GPT.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    sft.main(cfg)  # as it says
    assert (tmp_path / "run" / "model.safetensors").exists()


# ---- what it learns ------------------------------------------------------------------------------


def test_training_loss_falls_and_the_replies_are_learnt(full):
    found = losses(full)
    assert found[0] > 5 and found[-1] < 0.3
    gpt = model.GPT.from_pretrained(full)
    answers = train.answer(gpt, [as_messages(question, "")[:1] for question, _ in TALKS], 20)
    assert answers == [(reply, True) for _, reply in TALKS]  # and each ends by itself
    assert train.converse(gpt, (" | ".join(q for q, _ in TALKS[:1]),), 20) == [as_messages(*TALKS[0])]


def test_samples_show_that_it_learnt(full):
    lines = (full / "samples.md").read_text().splitlines()
    before, after = ([line[part] for line in lines] for part in (slice(45), slice(45, None)))
    assert TALKS[0][1] in after and TALKS[0][1] not in before
    at = before.index("========== user ==========".ljust(45))
    wanted = ["========== user ==========", TALKS[0][0], "", "========== assistant ==========", TALKS[0][1]]
    assert [line for line in after[at:at + 6] if line] == [line for line in wanted if line]


def test_answers_do_not_depend_on_their_company(full):
    """Many at once, padded on the left, as one alone; a prompt that leaves no room is cut from the front."""
    gpt = model.GPT.from_pretrained(full)
    asked = [as_messages(question, "")[:1] for question in ("Hm?", "Who is it? " * 40, TALKS[0][0])]
    assert train.answer(gpt, asked, 8) == [train.answer(gpt, [one], 8)[0] for one in asked]
    small = model.GPT(model.GPTConfig(n_positions=24, n_embd=8, n_layer=1, n_head=1))
    for room in (8, 24, 40):
        [(text, ended)] = train.answer(small, [as_messages("word " * 60, "")[:1]], room)
        assert isinstance(text, str) and isinstance(ended, bool)


# ---- what it leaves ------------------------------------------------------------------------------


def test_a_finished_run_opens_in_transformers(full):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(full).eval(), AutoTokenizer.from_pretrained(full)
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS).logits, logits_of_ours(full, TOKENS), atol=1e-4)
    question = as_messages(*TALKS[2])[:1]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert prompt == data.render(question, reply=True)[0].tolist()
    talk = as_messages(*TALKS[2])
    marked = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True,
                                           chat_template=(full / "chat_template_training.jinja").read_text())
    ids, mask = data.render(talk)
    assert (marked["input_ids"], marked["assistant_masks"]) == (ids.tolist(), mask.astype(int).tolist())
    reply = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt):]  # ends at EOT
    assert tokenizer.decode(reply, skip_special_tokens=True) == TALKS[2][1] and reply[-1] == data.EOT
    chat = pipeline("text-generation", str(full))(question, max_new_tokens=20, do_sample=False)
    assert chat[0]["generated_text"] == talk
    assert tokenizer.model_max_length == theirs.config.n_positions


def test_an_adapter_on_its_base_is_the_merged_model(adapted, tiny_model):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    merged = logits_of_ours(adapted, TOKENS)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        untouched = base(TOKENS).logits
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(adapted).eval()(TOKENS).logits, merged, atol=1e-4)
        peft = PeftModel.from_pretrained(base, adapted / "adapter").eval()
        assert torch.allclose(peft(TOKENS).logits, merged, atol=1e-4)
        alone = AutoPeftModelForCausalLM.from_pretrained(adapted / "adapter").eval()  # it knows its base
        assert torch.allclose(alone(TOKENS).logits, merged, atol=1e-4)
        assert (untouched - merged).abs().max() > 0.1
        assert torch.allclose(peft.merge_and_unload()(TOKENS).logits, merged, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_starts_from_a_model_and_somebodys_adapter(settings, tiny_model, somebodys_adapter, tmp_path, precision):
    """Merged before the first step; what the run leaves as its adapter is the sum of both, and belongs to the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def peft(folder):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder).eval()

    cfg = settings(out=str(tmp_path / "run"), adapter=str(somebodys_adapter), steps=2, lora_rank=3, lr=1e-2,
                   lora_targets=("c_attn", "c_fc"), precision=precision, val_fraction=0.5)
    sft.main(cfg)
    with torch.no_grad():
        start, merged = peft(somebodys_adapter), logits_of_ours(tmp_path / "run", TOKENS)
        assert (start(TOKENS).logits - merged).abs().max() > 0.1
        assert torch.allclose(peft(tmp_path / "run" / "adapter")(TOKENS).logits, merged, atol=1e-4)
        whole = start.merge_and_unload()
        whole.save_pretrained(tmp_path / "start")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["model"]["adapter"] == str(somebodys_adapter)
    again = sft.main(replace(cfg, model=str(tmp_path / "start"), adapter="", out=str(tmp_path / "again")))
    before = json.loads((tmp_path / "again" / "run.json").read_text())["before"]["val_loss"]
    assert about["before"]["val_loss"] == pytest.approx(before, rel=1e-5 if precision == "fp32" else 1e-2)
    assert again["val_loss"] == pytest.approx(about["metrics"]["val_loss"], rel=1e-4 if precision == "fp32" else 1e-2)
    with pytest.raises(ValueError, match="would replace --adapter"):
        sft.main(replace(cfg, out=str(somebodys_adapter.parent)))


def test_a_model_of_other_words_is_refused_before_anything_is_computed(settings, tiny_model, tmp_path):
    """Its ids would mean nothing; a folder without a tokenizer, as the tiny model is, is taken for OpenAI's."""
    shutil.copytree(tiny_model, tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.json").write_text('{"Bäcker": 0}')
    with pytest.raises(ValueError, match=r"other words than GPT-2: in its vocab\.json"):
        sft.main(settings(model=str(tmp_path / "theirs"), out=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_an_adapter_calls_its_base_means_something_elsewhere(tiny_model, tmp_path, monkeypatch):
    """Its name on the Hub, or its path as seen from where the run was started, which is where PEFT looks for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "runs/sft")
    assert train.base_name("runs/sft") == train.base_name(str(tmp_path / "runs" / "sft")) == "runs/sft"
    monkeypatch.chdir(data.HERE)
    assert train.base_name("gpt2-medium") == "openai-community/gpt2-medium"
    assert train.base_name("sample") == "sample/model"


def test_lora_trains_its_adapters_and_nothing_else(adapted, tiny_model):
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_model, adapted))
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed == {f"transformer.h.{i}.{part}.weight" for i in (0, 1) for part in ("attn.c_attn", "mlp.c_proj")}
    [newest] = train.checkpoint_folders(adapted)  # small, too: the frozen weights are not in it
    assert len(load_file(newest / "model.safetensors")) == 2 * len(changed)
    about = json.loads((adapted / "run.json").read_text())
    assert about["trainable"] == 2 * 4 * ((32 + 96) + (128 + 32)) < about["model"]["parameters"] / 100
    assert losses(adapted)[-1] < losses(adapted)[0]


def test_a_run_goes_on_from_a_folder_of_ours_as_from_transformers(full, settings, tmp_path):
    """--model takes what sft.py leaves: the loss begins where it ended."""
    sft.main(settings(model=str(full), out=str(tmp_path / "more"), steps=1, batch_size=4, lr=1e-5))
    assert losses(tmp_path / "more")[0] == pytest.approx(losses(full)[-1], abs=0.02)


# ---- before the first step -----------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "steps", "said", "advice"), [
    (4, 10, "10 times the data", None), (4, 11, "11 times the data", "--batch-size 2 --steps 6"),
    (32, 300, "2,400 times the data", "--batch-size 2 --steps 6"), (4, 1, "1 times the data", None)])
def test_a_run_that_goes_often_over_few_rows_says_what_comes_of_it(settings, tmp_path, monkeypatch, capsys, rows, steps,
                                                                  said, advice):
    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    monkeypatch.setattr(sft, "train", stop)
    with pytest.raises(Enough):
        sft.main(settings(out=str(tmp_path / "run"), batch_size=rows, steps=steps, prompts=()))
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert ("says them by heart and forgets other things" in shown) == bool(advice)
    assert advice is None or f"{advice} would be three times" in shown
