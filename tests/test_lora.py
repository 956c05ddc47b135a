"""lora.py: what an adapter may and may not change, and its agreement with PEFT in numbers and in files."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lora import (
    APPLIED,
    PLAIN,
    TARGETS,
    WITHOUT_EFFECT,
    LoRALinear,
    adapters,
    adapters_disabled,
    add_adapters,
    base_of,
    check_base,
    load_adapters,
    merge,
    merge_adapters,
    merged_weights,
    save_adapters,
)
from model import GPT, GPTConfig, Linear

SMALL = GPTConfig(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2)
TOKENS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))


def random_gpt(config: GPTConfig = SMALL) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(config)
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return gpt


def train_adapters(model: nn.Module, seed: int = 0) -> None:
    """What training would do, in one stroke: B is no longer zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def adapted_gpt(rank: int = 4, alpha: float = 8.0, **settings) -> GPT:
    gpt = random_gpt()
    add_adapters(gpt, rank, alpha, **settings)
    train_adapters(gpt)
    return gpt


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- one layer -----------------------------------------------------------------------------------


def hand_layer(alpha: float, rslora: bool = False) -> LoRALinear:
    """W x + b = (x1 + 2 x2, 3 x2 + 1);  A x = (x1 + x2, x1 - x2, 0, 0);  B picks the first and twice the second."""
    base = nn.Linear(2, 2)
    layer = LoRALinear(base, rank=4, alpha=alpha, rslora=rslora)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        base.bias.copy_(torch.tensor([0.0, 1.0]))
        layer.lora_A.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]))
    return layer


@pytest.mark.parametrize(("alpha", "rslora", "scale"), [(4, False, 1), (8, False, 2), (4, True, 2), (3, True, 1.5)])
def test_a_layer_worked_by_hand(alpha, rslora, scale):
    """At x = (5, 1): W x + b = (7, 4) and B A x = (6, 8); the scale is alpha / 4, or alpha / 2 as rsLoRA."""
    layer = hand_layer(alpha, rslora)
    assert layer.scale == scale
    assert layer(torch.tensor([5.0, 1.0])).tolist() == [7 + 6 * scale, 4 + 8 * scale]
    merged = layer.merged(layer.base.weight, layer.lora_A, layer.lora_B)
    assert merged.tolist() == [[1 + scale, 2 + scale], [2 * scale, 3 - 2 * scale]]


def test_a_new_layer_starts_as_the_paper_says():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 100), rank=8, alpha=16)
    assert layer.lora_A.shape == (8, 400)
    assert layer.lora_B.shape == (100, 8)
    assert (layer.lora_B == 0).all()
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = sqrt(5), as nn.Linear's own weights and PEFT's
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert layer.scale == 2


def test_dropout_acts_on_the_adapters_input_only():
    layer = hand_layer(alpha=8)
    layer.dropout = 0.5
    x = torch.randn(64, 2)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    expected = layer.base(x) + 2 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.manual_seed(5)
    close(layer.train()(x), expected)
    assert (expected - layer.eval()(x)).abs().max() > 0.1
    close(layer(x), layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T)  # and not at all in evaluation
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer.train()(x), layer.base(x))


def test_a_layer_wrapped_in_evaluation_does_not_drop():
    gpt = random_gpt().eval()
    add_adapters(gpt, dropout=0.5)
    train_adapters(gpt)
    assert torch.equal(gpt(TOKENS), gpt(TOKENS))
    gpt.train()
    assert not torch.equal(gpt(TOKENS), gpt(TOKENS))


def test_a_layer_without_bias():
    model = nn.Sequential()
    model.add_module("only", nn.Linear(3, 2, bias=False))
    add_adapters(model, 2, targets=("only",))
    train_adapters(model)
    x = torch.randn(4, 3)
    weights = merged_weights(model)
    assert list(weights) == ["only.weight"]
    close(x @ weights["only.weight"].T, model(x))


def test_a_frozen_base_in_half_precision_keeps_its_adapter_in_fp32():
    """Under autocast the frozen weights may be bf16, once and for all; what learns, and what is merged, is fp32."""
    layer = LoRALinear(nn.Linear(8, 8).to(torch.bfloat16), rank=2, alpha=2)
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {torch.float32}
    train_adapters(layer)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    weight = layer.merged(layer.base.weight, layer.lora_A, layer.lora_B)
    assert weight.dtype == torch.float32
    close(y.float(), x @ weight.T + layer.base.bias.float(), 0.05)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_is_at_least_one(rank):
    with pytest.raises(ValueError, match=f"rank is at least 1, got {rank}"):
        add_adapters(random_gpt(), rank)


# ---- a whole model -------------------------------------------------------------------------------


def test_fresh_adapters_change_nothing():
    gpt = random_gpt()
    before = gpt(TOKENS)
    add_adapters(gpt, dropout=0.5)
    assert torch.equal(gpt.train()(TOKENS), before)
    train_adapters(gpt)
    assert (gpt.eval()(TOKENS) - before).abs().max() > 0.1


def test_all_four_projections_of_every_block_are_wrapped():
    gpt = random_gpt()
    add_adapters(gpt)
    assert sorted(adapters(gpt)) == sorted(
        f"h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))


@pytest.mark.parametrize(("targets", "wrapped"), [
    (("c_attn",), ["h.0.attn.c_attn", "h.1.attn.c_attn"]),
    (("mlp.c_proj",), ["h.0.mlp.c_proj", "h.1.mlp.c_proj"]),
    (("h.1.attn.c_attn",), ["h.1.attn.c_attn"]),
    (("c_attn", "h.0.attn.c_attn"), ["h.0.attn.c_attn", "h.1.attn.c_attn"]),  # named twice, wrapped once
])
def test_targets_choose_layers_by_the_end_of_their_names(targets, wrapped):
    gpt = random_gpt()
    add_adapters(gpt, targets=targets)
    assert sorted(adapters(gpt)) == wrapped


def test_a_target_is_a_whole_name():
    """h.1 is not h.11, and proj is not c_proj."""
    gpt = random_gpt(replace(SMALL, n_layer=12))
    add_adapters(gpt, targets=("h.1.mlp.c_fc",))
    assert list(adapters(gpt)) == ["h.1.mlp.c_fc"]
    with pytest.raises(ValueError, match="'proj'"):
        add_adapters(random_gpt(), targets=("proj",))


@pytest.mark.parametrize("target", ["q_proj", "ln_1", "wte", "attn"])
def test_a_target_that_matches_nothing_is_refused_and_nothing_is_touched(target):
    gpt = random_gpt()
    with pytest.raises(ValueError, match=rf"'{target}' matches no nn\.Linear.*c_attn, c_fc, c_proj"):
        add_adapters(gpt, targets=("c_attn", target))
    assert not adapters(gpt)
    assert all(p.requires_grad for p in gpt.parameters())


def test_a_second_wrapping_is_refused():
    gpt = adapted_gpt(targets=("c_attn",))
    before = gpt(TOKENS)
    with pytest.raises(ValueError, match=r"already.*merge"):
        add_adapters(gpt, targets=("c_fc",))
    assert torch.equal(gpt(TOKENS), before)
    merge(gpt)
    add_adapters(gpt, targets=("c_fc",))
    close(gpt(TOKENS), before)


def test_only_adapters_learn():
    gpt = adapted_gpt()
    before = {name: p.clone() for name, p in gpt.state_dict().items()}
    learning = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    assert set(learning) == {f"{name}.{part}" for name in adapters(gpt) for part in ("lora_A", "lora_B")}
    gpt(TOKENS).logsumexp(-1).sum().backward()
    assert {name for name, p in gpt.named_parameters() if p.grad is not None} == set(learning)
    assert all(p.grad.abs().max() > 0 for p in learning.values())
    torch.optim.AdamW(gpt.parameters(), lr=0.1, weight_decay=0.1).step()
    for name, p in gpt.state_dict().items():
        assert torch.equal(p, before[name]) == (name not in learning), name


def test_disabled_adapters_give_the_model_from_before():
    gpt = random_gpt()
    base = gpt(TOKENS)
    add_adapters(gpt)
    train_adapters(gpt)
    adapted = gpt(TOKENS)
    with adapters_disabled(gpt):
        assert torch.equal(gpt(TOKENS), base)
        with adapters_disabled(gpt):
            assert torch.equal(gpt(TOKENS), base)
        assert torch.equal(gpt(TOKENS), base)  # leaving the inner one does not switch them on
    assert torch.equal(gpt(TOKENS), adapted)
    with pytest.raises(KeyError), adapters_disabled(gpt):
        raise KeyError
    assert torch.equal(gpt(TOKENS), adapted)


def test_disabling_needs_no_adapters():
    gpt = random_gpt()
    with adapters_disabled(gpt):
        gpt(TOKENS)


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged(rslora):
    gpt = adapted_gpt(rslora=rslora)
    adapted, names = gpt(TOKENS), list(random_gpt().state_dict())
    merge(gpt)
    close(gpt(TOKENS), adapted)
    assert not adapters(gpt)
    assert list(gpt.state_dict()) == names
    assert all(type(m) is Linear for n, m in gpt.named_modules() if n.endswith(TARGETS))


def test_merged_weights_leave_the_model_as_it_is():
    gpt, plain = adapted_gpt(), random_gpt()
    adapted, before = gpt(TOKENS), {name: p.clone() for name, p in gpt.state_dict().items()}
    weights = merged_weights(gpt)
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    close(plain(TOKENS), adapted)
    assert torch.equal(gpt(TOKENS), adapted)
    assert gpt.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in gpt.state_dict().items())
    assert not any(p.requires_grad for p in weights.values())
    merge(gpt)
    assert all(torch.equal(p, weights[name]) for name, p in gpt.state_dict().items())


def test_merged_weights_of_another_state_dict():
    gpt, other = adapted_gpt(), adapted_gpt()
    train_adapters(other, seed=1)
    given = dict(other.state_dict())
    weights = merged_weights(gpt, given)
    assert given.keys() == other.state_dict().keys()  # the caller's dict is not emptied
    expected = merged_weights(other)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_model_without_adapters_is_merged_already():
    gpt = random_gpt()
    weights = merged_weights(gpt)
    assert all(torch.equal(p, weights[name]) for name, p in gpt.state_dict().items())


def test_a_merged_model_is_a_folder_for_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    gpt = adapted_gpt()
    gpt.save_pretrained(tmp_path, merged_weights(gpt))
    close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(TOKENS).logits, gpt(TOKENS), 1e-4)


# ---- PEFT ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(gpt2_folder):
    """Twelve layers, so that h.1 and h.11 are there."""
    return gpt2_folder(n_embd=16, n_head=2, n_layer=12, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0)


def peft_model(base_folder, **settings):
    """transformers' GPT-2 with PEFT's trained adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), **settings}
    theirs = get_peft_model(GPT2LMHeadModel.from_pretrained(base_folder),
                            LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings))
    train_adapters(theirs)
    return theirs.eval()


PATTERNS = {"rank_pattern": {"c_attn": 2, r"h\.1\.mlp\.c_fc": 7, r"h\.\d+\.mlp\.c_fc": 3},
            "alpha_pattern": {"^transformer.h.11.attn.c_attn": 20, "mlp.c_proj": 1}}
CASES = [{}, {"use_rslora": True}, {"target_modules": ["c_attn"], "r": 1, "lora_alpha": 32},
         {"target_modules": ["h.1.attn.c_proj", "h.11.mlp.c_fc"], "use_rslora": True},
         PATTERNS, PATTERNS | {"use_rslora": True}, {"target_modules": r".*\.h\.[13]\..*c_(fc|proj)"},
         {"target_modules": "all-linear", "exclude_modules": ["c_fc"]},
         {"target_modules": ["c_attn"], "layers_to_transform": [1, 11], "layers_pattern": "h"},
         *({"init_lora_weights": name} for name in (False, "gaussian", "orthogonal"))]


@pytest.mark.parametrize("settings", CASES)
def test_adapters_made_by_peft_give_the_same_here(base_folder, settings, tmp_path):
    theirs = peft_model(base_folder, **settings)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(base_folder).eval()
    base = ours(TOKENS)
    load_adapters(ours, tmp_path)
    close(ours(TOKENS), theirs(TOKENS).logits, 1e-4)
    assert (ours(TOKENS) - base).abs().max() > 0.1

    for gpt in (ours, theirs):  # and the same gradients, of A and of B
        out = gpt(TOKENS)
        (out if gpt is ours else out.logits).logsumexp(-1).sum().backward()
    peers = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(peers) == 2 * len(adapters(ours))
    for name, layer in adapters(ours).items():
        for part in ("lora_A", "lora_B"):
            close(getattr(layer, part).grad, peers[f"base_model.model.transformer.{name}.{part}.default.weight"], 1e-3)

    merge(ours)
    close(ours(TOKENS), theirs.merge_and_unload()(TOKENS).logits, 1e-4)


def test_patterns_of_a_bare_gpt2_model_match_its_own_names(base_folder, tmp_path):
    """Without the head its layers are h.0 ..., and so PEFT anchors patterns there."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Model

    theirs = get_peft_model(GPT2Model.from_pretrained(base_folder), LoraConfig(
        r=4, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, rank_pattern={"^h.1.attn.c_attn": 2},
        alpha_pattern={"^h.3.attn.c_attn": 50}))
    train_adapters(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = GPT.from_pretrained(base_folder).eval()
    load_adapters(ours, tmp_path)
    hidden = theirs(TOKENS).last_hidden_state
    close(ours(TOKENS), hidden @ ours.wte.weight.T, 1e-4)


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"targets": ("c_attn",), "rank": 1, "dropout": 0.25},
                                      {"targets": ("h.1.attn.c_proj", "h.11.mlp.c_fc"), "rank": 3, "rslora": True}])
def test_adapters_saved_here_give_the_same_in_peft(base_folder, settings, tmp_path):
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    ours = GPT.from_pretrained(base_folder).eval()
    add_adapters(ours, **{"rank": 4, "alpha": 6.0, **settings})
    train_adapters(ours)
    save_adapters(ours, tmp_path / "new" / "adapter", base_folder)
    base = GPT2LMHeadModel.from_pretrained(base_folder)
    theirs = PeftModel.from_pretrained(base, tmp_path / "new" / "adapter").eval()
    close(theirs(TOKENS).logits, ours(TOKENS), 1e-4)
    about = theirs.peft_config["default"]
    assert (about.base_model_name_or_path, about.r) == (str(base_folder), {**{"rank": 4}, **settings}["rank"])
    assert about.lora_dropout == settings.get("dropout", 0.0)
    wrapped = [n for n, m in theirs.base_model.model.transformer.named_modules() if hasattr(m, "lora_A")]
    assert sorted(wrapped) == sorted(adapters(ours))

    again = GPT.from_pretrained(base_folder).eval()
    load_adapters(again, tmp_path / "new" / "adapter")
    assert all(torch.equal(p, ours.state_dict()[name]) for name, p in again.state_dict().items())
    close(again(TOKENS), ours(TOKENS))
    assert {layer.dropout for layer in adapters(again).values()} == {settings.get("dropout", 0.0)}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in ours.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [PATTERNS, {"init_lora_weights": "mica"}])
def test_adapters_on_merged_adapters_are_one_adapter_of_the_base(base_folder, settings, tmp_path):
    """[s B, s' B'] [A; A'] = s B A + s' B' A', whatever their layers and ranks; and one goes on from the sum."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    peft_model(base_folder, target_modules=["c_attn", "c_fc"], **settings).save_pretrained(tmp_path / "theirs")
    gpt = GPT.from_pretrained(base_folder).eval()
    merged = merge_adapters(gpt, tmp_path / "theirs")
    start = gpt(TOKENS)
    assert not adapters(gpt) and len(merged) == 24
    add_adapters(gpt, rank=3, alpha=5.0, targets=("c_attn", "mlp.c_proj"))
    train_adapters(gpt, seed=1)
    with adapters_disabled(gpt):
        assert torch.equal(gpt(TOKENS), start)
    save_adapters(gpt, tmp_path / "sum", base_folder, merged=merged)
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base_folder), tmp_path / "sum").eval()
    again = GPT.from_pretrained(base_folder).eval()
    load_adapters(again, tmp_path / "sum")
    assert len(adapters(again)) == 36
    for other in (theirs(TOKENS).logits, again(TOKENS)):
        close(other, gpt(TOKENS), 1e-4)
        assert (other - start).abs().max() > 0.1
    save_adapters(again, tmp_path / "copy", base_folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "sum" / name).read_bytes()


def test_what_peft_writes_today_is_known(tmp_path):
    """Each setting of the installed PEFT at its default, and each one's meaning here."""
    import dataclasses

    from peft import LoraConfig

    LoraConfig(target_modules=["c_attn"]).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    on = {key for key, value in about.items() if value}
    assert on <= APPLIED | WITHOUT_EFFECT | set(PLAIN)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert APPLIED | WITHOUT_EFFECT | set(PLAIN) <= known


def test_a_model_is_found_by_what_its_adapter_says(tmp_path, monkeypatch):
    gpt = adapted_gpt()
    (tmp_path / "project" / "runs" / "sft").mkdir(parents=True)
    (tmp_path / "project" / "runs" / "sft" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for base, found in (("runs/sft", str(tmp_path / "project" / "runs" / "sft")), ("openai-community/gpt2", "gpt2"),
                        ("project/runs/sft", "project/runs/sft"), ("of/somebody", "of/somebody")):
        save_adapters(gpt, tmp_path / "project" / "runs" / "dpo" / "adapter", base)
        assert base_of("project/runs/dpo/adapter") == found
        assert check_base("project/runs/dpo/adapter", found) == ""
        assert f"names {found} as the model" in check_base("project/runs/dpo/adapter", "sample")


def test_other_weights_can_be_saved_in_a_models_place(tmp_path):
    gpt, other = adapted_gpt(), adapted_gpt()
    train_adapters(other, seed=1)
    save_adapters(gpt, tmp_path, "base", other.state_dict())
    again = random_gpt()
    load_adapters(again, tmp_path)
    close(again(TOKENS), other(TOKENS))


def test_a_model_without_adapters_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapters"):
        save_adapters(random_gpt(), tmp_path, "base")


@pytest.fixture
def folder(tmp_path):
    """Good adapters of the small model, to damage."""
    save_adapters(adapted_gpt(), tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def refused(folder, kind, message: str) -> None:
    """The load fails in these words, and the model is as it was."""
    gpt = random_gpt()
    with pytest.raises(kind, match=message) as error:
        load_adapters(gpt, folder)
    assert "adapter" in str(error.value)
    assert len(str(error.value).splitlines()) <= 5
    assert not adapters(gpt)
    assert all(p.requires_grad for p in gpt.parameters())


def edit_config(folder, **settings) -> None:
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | settings))


def edit_weights(folder, change) -> None:
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("settings", [
    {"peft_type": "LOHA"}, {"peft_type": "IA3", "r": None}, {"bias": "all"}, {"use_dora": True},
    {"modules_to_save": ["lm_head"]}, {"lora_bias": True},
    *({"init_lora_weights": name} for name in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")),
    {"trainable_token_indices": [0]}, {"alora_invocation_tokens": [1]}, {"target_parameters": ["wte.weight"]},
    {"layer_replication": [[0, 1]]}, {"use_qalora": True}, {"velora_config": {"rank": 1}}, {"of_next_year": 0.5}])
def test_what_is_not_plain_lora_is_refused(folder, settings):
    edit_config(folder, **settings)
    refused(folder, ValueError, f"{next(iter(settings))} = .* is not plain LoRA")


def test_missing_and_damaged_adapter_files_are_named(folder, tmp_path):
    refused(tmp_path / "adapter2", FileNotFoundError, r"not a PEFT adapter: it has no adapter_config\.json")
    copy = shutil.copytree(folder, tmp_path / "adapter3")
    (copy / "adapter_model.safetensors").unlink()
    refused(copy, FileNotFoundError, r"not a PEFT adapter: it has no adapter_model\.safetensors")
    good = (folder / "adapter_model.safetensors").read_bytes()
    for bad in (b"", good[:50], good[:-4], good + b"more"):
        (folder / "adapter_model.safetensors").write_bytes(bad)
        refused(folder, ValueError, "not a readable PEFT adapter")


def test_pickles_and_pointers_are_called_by_their_names(folder):
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    refused(folder, FileNotFoundError, r"no adapter_model\.safetensors: adapter_model\.bin is a pickle")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(folder, ValueError, r"adapter_model\.safetensors is a git-lfs pointer.*git lfs pull")


def test_an_adapter_of_another_model_names_it(folder):
    edit_config(folder, base_model_name_or_path="somebody/model")
    edit_weights(folder, lambda t: {k: w.repeat(1, 2) if "lora_A" in k else w for k, w in t.items()})
    refused(folder, ValueError, r"(?s)shape \(4, 32\), this model needs \(4, 16\).*trained on somebody/model")


@pytest.mark.parametrize("settings", [{"rank_pattern": {"(": 2}}, {"rank_pattern": {"c_fc": "x"}}, {"rank_pattern": 3},
                                      {"alpha_pattern": {"c_fc": None}}, {"lora_dropout": "much"}])
def test_settings_of_no_meaning_are_refused(folder, settings):
    edit_config(folder, **settings)
    refused(folder, ValueError, "not a readable PEFT adapter")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"{}",
                                  b'{"r": "four", "lora_alpha": 8}', b'{"r": 4, "lora_alpha": null}'])
def test_a_damaged_adapter_configuration_is_refused(folder, text):
    (folder / "adapter_config.json").write_bytes(text)
    refused(folder, ValueError, "not a readable PEFT adapter")


PREFIX = "base_model.model.transformer.h.0.attn.c_attn."


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: {k.replace("h.1.", "h.7."): w for k, w in t.items()}, r"adapts 'h\.7\..*does not have"),
    (lambda t: {k.replace("transformer.", "model."): w for k, w in t.items()}, r"adapts .*does not have"),
    (lambda t: t | {PREFIX + "lora_A.weight": torch.zeros(5, 16)}, r"lora_A has shape \(5, 16\).*\(4, 16\)"),
    (lambda t: t | {PREFIX + "lora_B.weight": torch.zeros(48, 5)}, r"lora_B has shape \(48, 5\).*\(48, 4\)"),
    (lambda t: {k: w for k, w in t.items() if k != PREFIX + "lora_B.weight"}, r"no .*h\.0\.attn\.c_attn\.lora_B"),
    (lambda t: t | {PREFIX + "lora_B.bias": torch.zeros(48)}, r"h\.0\.attn\.c_attn\.lora_B\.bias"),
    (lambda t: t | {PREFIX + "lora_magnitude_vector.weight": torch.zeros(48)}, r"c_attn\.lora_magnitude_vector"),
    (lambda t: {}, r"no .*lora"),
    (lambda t: t | {PREFIX + "lora_A.weight": torch.full((4, 16), float("nan"))}, r"lora_A .*not finite"),
    (lambda t: t | {"base_model.model.transformer.wte.lora_embedding_A": torch.zeros(4, 61)}, r"adapts 'wte'"),
])
def test_tensors_that_do_not_fit_the_model_are_refused(folder, change, message):
    edit_weights(folder, change)
    refused(folder, ValueError, message)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39])
def test_an_adapter_is_finite_as_it_is_applied(folder, alpha):
    edit_config(folder, lora_alpha=alpha)
    refused(folder, ValueError, "adapter has numbers that are not finite")


def test_adapters_are_not_loaded_over_adapters(folder):
    gpt = adapted_gpt()
    before = gpt(TOKENS)
    with pytest.raises(ValueError, match="already"):
        load_adapters(gpt, folder)
    assert torch.equal(gpt(TOKENS), before)


def test_a_model_is_not_saved_with_its_adapters_in_it(tmp_path):
    """transformers would open the folder with new random layers; the two ways out are named, and lead out."""
    gpt = adapted_gpt()
    before = gpt(TOKENS)
    with pytest.raises(ValueError, match=r"lora\.merge\(gpt\), or .*\(folder, lora\.merged_weights\(gpt\)\)"):
        gpt.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    gpt.save_pretrained(tmp_path / "weights", merged_weights(gpt))
    merge(gpt)
    gpt.save_pretrained(tmp_path / "merged")
    for folder in ("weights", "merged"):
        assert (GPT.from_pretrained(tmp_path / folder)(TOKENS) - before).abs().max() < 1e-4
