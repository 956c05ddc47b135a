"""model.py: the network, its gradients, generation and sampling, weights in and out.

Where a number can be worked by hand it is; where a peer exists (transformers) its numbers are the standard; and every
short cut (packing, chunks, caches, recomputation) is held against the naive form in fp64, where only rounding differs.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
import train
from data import Span
from model import (
    END_OF_TEXT,
    GPT,
    GPTConfig,
    Int8Linear,
    KVCache,
    LogProbs,
    Packed,
    TotalLogProb,
    choose,
    generate,
    generate_batch,
    share_equal_rows,
    window_start,
)

SMALL = GPTConfig(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2)


def random_gpt(config: GPTConfig = SMALL, seed: int = 0, spread: float = 0.3) -> GPT:
    """A model in fp64 whose every parameter is random and large enough to matter."""
    torch.manual_seed(seed)
    gpt = GPT(config).double()
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.add_(torch.randn_like(weight) * spread)
    return gpt.eval()


def ids_of(*shape: int, seed: int = 0, vocab: int = SMALL.vocab_size) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(gpt: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter that learns, by name; one that the loss does not reach gets zeros."""
    named = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                                  ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_the_four_sizes_have_openais_numbers_of_parameters(name, parameters):
    with torch.device("meta"):
        gpt = GPT(model.SIZES[name])
    assert sum(p.numel() for p in gpt.parameters()) == parameters


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_logits_are_those_of_transformers_at_every_width(name, gpt2_folder):
    from transformers import GPT2LMHeadModel

    size = model.SIZES[name]
    folder = gpt2_folder(n_embd=size.n_embd, n_head=size.n_head, n_layer=2 if size.n_embd < 1280 else 1,
                         vocab_size=211, n_positions=24, bos_token_id=0, eos_token_id=0)
    tokens = ids_of(2, 24, vocab=211)
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(folder).double().eval()(tokens).logits
        ours = GPT.from_pretrained(folder).double()(tokens)
    close(ours, theirs)
    assert theirs.std() > 0.1


def test_a_new_model_starts_as_openais_did():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=997, n_embd=128, n_layer=8, n_head=4))
    tokens = ids_of(4, 64, vocab=997)
    assert gpt.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert gpt.wpe.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for block in gpt.h:
        assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
        for branch in (block.attn, block.mlp):  # sixteen branches: 0.02 / sqrt(16)
            assert branch.c_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert all((p == 0).all() for name, p in gpt.named_parameters() if name.endswith("bias"))
    loss = F.cross_entropy(gpt(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(997), abs=0.1)  # it knows nothing yet: all tokens are as likely


def test_a_later_token_never_changes_an_earlier_logit():
    gpt, tokens = random_gpt(), ids_of(2, 32)
    with torch.no_grad():
        before = gpt(tokens)
        for t in (1, 13, 31):
            other = tokens.clone()
            other[:, t:] = (tokens[:, t:] + 1) % SMALL.vocab_size
            after = gpt(other)
            close(after[:, :t], before[:, :t])
            assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-3).all()


def test_all_1024_positions_are_used_and_differ(tiny_model):
    gpt = GPT.from_pretrained(tiny_model)
    with torch.no_grad():
        hidden = gpt.hidden(torch.full((1, 1024), 7))[0]
    assert torch.cdist(hidden[-3:], hidden).fill_diagonal_(9).topk(2, largest=False).values[:, 1].min() > 1e-3


@pytest.mark.parametrize("tokens", [33, 1000])
def test_more_tokens_than_positions_are_refused(tokens):
    with pytest.raises(ValueError, match=rf"{tokens} tokens .* 32 positions"):
        random_gpt()(ids_of(1, tokens))


@pytest.mark.parametrize("bad", [-1, 61, 50256])
def test_ids_out_of_range_are_refused(bad):
    gpt, tokens = random_gpt(), ids_of(2, 5)
    tokens[1, 3] = bad
    with pytest.raises(ValueError, match=rf"0\.\.60.*{bad}"):
        gpt(tokens)
    with pytest.raises(ValueError, match=rf"0\.\.60.*{bad}"):
        list(generate(gpt, tokens[1].tolist()))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"n_embd 16 .* n_head 3"):
        GPT(replace(SMALL, n_head=3))


# ---- dropout and recomputation -------------------------------------------------------------------


def test_dropout_stands_where_transformers_has_it(gpt2_folder):
    """From one seed both models draw the same masks only if they drop the same things in the same order."""
    from transformers import GPT2LMHeadModel

    folder = gpt2_folder(n_embd=16, n_head=2, n_layer=2, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0,
                         embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3)
    theirs, ours = GPT2LMHeadModel.from_pretrained(folder).train(), GPT.from_pretrained(folder).train()
    ours.dropout = 0.3
    tokens = ids_of(2, 9)
    logits = []
    for gpt in (ours, theirs):
        torch.manual_seed(1)
        out = gpt(tokens)
        logits.append(out if gpt is ours else out.logits)
    close(logits[0], logits[1], 1e-4)
    assert (logits[0] - ours.eval()(tokens)).abs().max() > 0.1


def test_dropout_acts_in_training_only():
    gpt, tokens = random_gpt(), ids_of(1, 12)
    batch, _ = pack([tokens[0].tolist()])
    plain, plain_logprobs = gpt(tokens), gpt.target_logprobs(batch)
    close(gpt.train()(tokens), plain)  # no dropout is the default
    gpt.dropout = 0.5
    close(gpt.eval()(tokens), plain)
    close(gpt.target_logprobs(batch), plain_logprobs)
    gpt.train()
    assert (gpt(tokens) - gpt(tokens)).abs().max() > 0.1
    assert (gpt.target_logprobs(batch) - gpt.target_logprobs(batch)).abs().max() > 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputed_activations_change_nothing(dropout):
    gpt = random_gpt().train()
    gpt.dropout = dropout
    batch, _ = pack([ids_of(9).tolist(), ([1, 2, 3], [4, 5], [6, 7, 8])])
    runs = [0]
    gpt.h[1].register_forward_pre_hook(lambda *_: runs.append(runs.pop() + 1))
    torch.manual_seed(3)
    loss = gpt.target_logprobs(batch).sum()
    plain = gradients(gpt, loss)
    assert runs == [1]
    gpt.recompute_activations = True
    torch.manual_seed(3)
    again = gpt.target_logprobs(batch).sum()
    same_gradients(gradients(gpt, again), plain)
    close(again, loss)
    assert runs == [3]  # once forward, once more in the backward pass
    with torch.no_grad():
        gpt.target_logprobs(batch)
    assert runs == [4]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(24, 16), (61, 16), (7, 48)], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (1,), (), (1, 2), (2, 4), (9,), (0, 4)], ids=str)
def test_a_product_dealt_out_to_the_cores_is_the_same_product(rows, shape, threads, monkeypatch):
    """Outputs that the cores cannot share evenly too, and no rows at all; and its gradient."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer = model.Linear(shape[1], shape[0]).double()
    x = torch.randn(*rows, shape[1], dtype=torch.double, requires_grad=True)
    plain = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        for ours, theirs in ((layer(x), plain), (model.linear(x, layer.weight), F.linear(x, layer.weight))):
            assert ours.shape == theirs.shape
            assert ours.stride() == theirs.stride()
            close(ours, theirs)
    wanted = torch.autograd.grad(plain.square().sum(), (x, layer.weight, layer.bias))
    for ours, theirs in zip(torch.autograd.grad(layer(x).square().sum(), (x, layer.weight, layer.bias)), wanted,
                            strict=True):
        close(ours, theirs)


def test_few_rows_without_gradients_are_dealt_out_to_the_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    layer, products = model.Linear(48, 24), []
    with mock.patch("torch.bmm", lambda *parts: products.append([p.shape for p in parts]) or torch.matmul(*parts)):
        layer(torch.ones(1, 1, 48))
        with torch.no_grad():
            layer(torch.ones(1, 1, 48))
            layer(torch.ones(2, 4, 48))
            layer(torch.ones(9, 48))
    assert products == [[(2, 12, 48), (2, 48, 1)], [(2, 12, 48), (2, 48, 8)]]


# ---- packed batches ------------------------------------------------------------------------------


def pack(rows) -> tuple[SimpleNamespace, list[tuple[list[int], list[int], list[int]]]]:
    """A packed batch, and the same as separate rows (ids, index, targets) for the naive form.

    A list of ids is a plain row, in which every other token is a target. A tuple (prompt, chosen, rejected) is a pair:
    the prompt stands in the batch once and is the prefix of the rejected reply; all tokens of the replies are targets.
    """
    tokens, positions, spans, index, targets, separate = [], [], [], [], [], []
    for row in rows:
        at = len(tokens)
        if isinstance(row, tuple):
            prompt, chosen, rejected = row
            p, middle = len(prompt), at + len(prompt) + len(chosen)
            tokens += prompt + chosen + rejected
            positions += [*range(p + len(chosen)), *range(p, p + len(rejected))]
            spans += [Span(middle - at, ()), Span(len(rejected), ((len(spans), p),))]
            index += [at + p - 1 + i for i in range(len(chosen))]
            index += [at + p - 1] + [middle + i for i in range(len(rejected) - 1)]
            targets += chosen + rejected
            separate += [(prompt + r, [p - 1 + i for i in range(len(r))], r) for r in (chosen, rejected)]
        else:
            learnt = list(range(1, len(row), 2))
            tokens += row
            positions += range(len(row))
            spans.append(Span(len(row), ()))
            index += [at + t - 1 for t in learnt]
            targets += [row[t] for t in learnt]
            separate.append((row, [t - 1 for t in learnt], [row[t] for t in learnt]))
    fields = {"tokens": tokens, "positions": positions, "index": index, "targets": targets}
    tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in fields.items()}
    return SimpleNamespace(**tensors, spans=tuple(spans)), separate


def naive_logprobs(gpt: GPT, separate) -> torch.Tensor:
    """Every row on its own, all logits, log-softmax, then the targets."""
    return torch.cat([gpt(torch.tensor([ids]))[0].log_softmax(-1)[index, targets] for ids, index, targets in separate])


ROWS = [ids_of(9).tolist(), ([5, 6, 7, 8], [9, 10, 11], [12, 13]), ids_of(2, seed=1).tolist(),
        ([3], [4], [60, 59, 58, 57, 56]), ids_of(32, seed=2).tolist()]


def test_scores_are_the_logits_log_softmax_and_what_is_likeliest_in_each_place():
    gpt, ids = random_gpt().float(), ids_of(12).tolist()
    logp, likeliest, its_logp = model.scores(gpt, ids, start=5, likeliest=3)
    with torch.no_grad():
        plain = gpt(torch.tensor([ids]))[0, 4:11].log_softmax(-1)                       # (7, V): before each of ids[5:]
    assert torch.allclose(logp, plain[torch.arange(7), ids[5:]], atol=1e-5)
    assert torch.equal(likeliest, plain.argsort(descending=True)[:, :3])
    assert torch.allclose(its_logp, plain.sort(descending=True).values[:, :3], atol=1e-5)
    batch, _ = pack([(ids[:5], ids[5:], [1, 2])])
    assert torch.allclose(logp.sum(), gpt.target_logprobs(batch)[:7].sum(), atol=1e-4)  # what DPO sums up


def test_a_packed_batch_worked_by_hand():
    batch, separate = pack([[10, 11, 12], ([1, 2], [3], [4, 5])])
    assert batch.tokens.tolist() == [10, 11, 12, 1, 2, 3, 4, 5]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 2, 3]
    assert batch.spans == ((3, ()), (3, ()), (2, ((1, 2),)))
    assert (batch.index.tolist(), batch.targets.tolist()) == ([0, 4, 4, 6], [11, 3, 4, 5])
    assert separate == [([10, 11, 12], [0], [11]), ([1, 2, 3], [1], [3]), ([1, 2, 4, 5], [1, 2], [4, 5])]


def test_packed_rows_equal_separate_rows():
    gpt = random_gpt()
    batch, separate = pack(ROWS)
    with torch.no_grad():
        packed = gpt.hidden(batch.tokens[None], batch.positions[None], Packed(batch.spans))[0]
        alone = [gpt.hidden(torch.tensor([ids]))[0] for ids, _, _ in separate]
    own = [hidden[len(hidden) - span.tokens:] for hidden, span in zip(alone, batch.spans, strict=True)]
    close(packed, torch.cat(own))


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(0, 3))
def test_no_row_of_a_packed_batch_sees_another(lengths, changed):
    gpt, changed = random_gpt(), changed % len(lengths)
    rows = [ids_of(n, seed=i).tolist() for i, n in enumerate(lengths)]
    others = [[(t + 1) % 61 for t in row] if i == changed else row for i, row in enumerate(rows)]
    (before, _), (after, _) = pack(rows), pack(others)
    with torch.no_grad():
        moved = [(gpt.hidden(b.tokens[None], b.positions[None], Packed(b.spans)))[0] for b in (before, after)]
    start = sum(lengths[:changed])
    end = start + lengths[changed]
    moves = (moved[0] - moved[1]).abs().amax(-1) > 1e-9
    assert moves[start:end].all()
    assert not moves[:start].any()
    assert not moves[end:].any()


@given(st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=9), min_size=1, max_size=6), st.integers(1, 3))
def test_what_texts_share_is_computed_once_for_the_same_gradient(texts, worth):
    """Trees of any shape, packed by data.pack: log-probabilities and all gradients are those of the texts alone."""
    gpt, texts = random_gpt(), sorted(texts)  # as pack lays them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WORTH_SHARING", worth)
        rows = [data.Row(np.array(ids, np.int32), np.arange(len(ids)) % 2 > 0) for ids in texts]
        batch = train.to_device(data.pack(rows, range(len(rows))), torch.device("cpu"))
    weights = torch.linspace(-1, 2, len(batch.targets)).double()
    separate = [(ids, list(range(0, len(ids) - 1, 2)), ids[1::2]) for ids in texts]
    ours, theirs = gpt.target_logprobs(batch), naive_logprobs(gpt, separate)
    close(ours, theirs)
    same_gradients(gradients(gpt, ours @ weights), gradients(gpt, theirs @ weights))


def test_the_replies_of_a_pair_do_not_see_one_another():
    gpt = random_gpt()
    ours, chosen, rejected = (gpt.target_logprobs(pack([([1, 2, 3], [4, 5], reply)])[0]) if i != 1 else
                              gpt.target_logprobs(pack([([1, 2, 3], [40, 50], reply)])[0])
                              for i, reply in enumerate(([6, 7, 8], [6, 7, 8], [16, 17, 18])))
    close(chosen[2:], ours[2:])
    close(rejected[:2], ours[:2])
    assert (chosen[:2] - ours[:2]).abs().max() > 0.1
    assert (rejected[2:] - ours[2:]).abs().max() > 0.1


# ---- log-probabilities of targets ----------------------------------------------------------------


def partly_frozen(prefixes: tuple[str, ...]) -> GPT:
    gpt = random_gpt()
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return gpt


@pytest.mark.parametrize("frozen", [(), ("wte.weight",), ("wte.weight", "wpe.weight", "h.0.")])
@pytest.mark.parametrize("block", [1, 7, 4096])
def test_target_logprobs_and_gradients_equal_the_naive_form(block, frozen, monkeypatch):
    monkeypatch.setattr(LogProbs, "BLOCK", block)
    gpt = partly_frozen(frozen)
    batch, separate = pack(ROWS)
    weights = torch.linspace(-1, 2, len(batch.targets)).double()  # every target pulls with its own force
    ours, theirs = gpt.target_logprobs(batch), naive_logprobs(gpt, separate)
    close(ours, theirs)
    same_gradients(gradients(gpt, ours @ weights), gradients(gpt, theirs @ weights))


@pytest.mark.parametrize("frozen", [(), ("wte.weight",)])
@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_their_total_and_its_gradients_equal_the_naive_form(rows, frozen, monkeypatch):
    monkeypatch.setattr(TotalLogProb, "ROWS", rows)
    gpt = partly_frozen(frozen)
    batch, separate = pack(ROWS)
    ours, theirs = gpt.total_logprob(batch), naive_logprobs(gpt, separate).sum()
    assert (type(ours.grad_fn).__name__ == "TotalLogProbBackward") is not bool(frozen)
    close(ours, theirs)
    same_gradients(gradients(gpt, -0.3 * ours), gradients(gpt, -0.3 * theirs))
    with torch.no_grad():
        close(gpt.total_logprob(batch), theirs)


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_equal_rows_of_a_frozen_head_computed_once_change_nothing(block, monkeypatch):
    """Some of the targets are among the words that share a row, some are not, and another two words share another."""
    monkeypatch.setattr(LogProbs, "BLOCK", block)
    gpt, (batch, separate) = random_gpt(), pack(ROWS)
    words = len(gpt.wte.weight)
    known = torch.cat([batch.targets[::2].unique(), torch.arange(4)]).unique()
    assert len(known) < words / 3 and not set(batch.targets.tolist()) <= set(known.tolist())
    with torch.no_grad():
        shared = torch.ones(words, dtype=torch.bool).index_fill(0, known, False)
        gpt.wte.weight[shared] = gpt.wte.weight[-1].clone()
        gpt.wte.weight[0] = gpt.wte.weight[1]
    gpt.wte.weight.requires_grad_(False)
    share_equal_rows(gpt)
    assert len(gpt.lm_head.weight) == len(known) and gpt.lm_head.log_count.exp().sum().round() == words
    weights = torch.linspace(-1, 2, len(batch.targets)).double()
    ours, theirs = gpt.target_logprobs(batch), naive_logprobs(gpt, separate)
    close(ours, theirs)
    same_gradients(gradients(gpt, ours @ weights), gradients(gpt, theirs @ weights))
    assert set(gpt.state_dict()) == set(random_gpt().state_dict()), "nothing of it is saved"


def test_where_all_rows_differ_none_are_shared():
    gpt = random_gpt()
    share_equal_rows(gpt)
    assert gpt.lm_head is None


def test_rows_are_equal_when_they_are_and_not_when_a_sum_of_them_is():
    """At a width of 2, (sin 2, 0) and (0, sin 1) have the same sum of products with (sin 1, sin 2)."""
    gpt = random_gpt(replace(SMALL, n_embd=2, n_head=1))
    first, second = torch.linspace(1, 2, 2).sin().double().tolist()
    with torch.no_grad():
        gpt.wte.weight.copy_(torch.tensor([[second, 0.0], [0.0, first]] * 30 + [[1.0, 2.0]]))
    before = gpt(ids_of(2, 5))
    share_equal_rows(gpt)
    close(gpt(ids_of(2, 5)), before)


@pytest.mark.parametrize("log_probs", [LogProbs, TotalLogProb])
def test_a_second_derivative_is_refused_and_not_wrong(log_probs):
    hidden, weight = (torch.randn(n, 8, dtype=torch.double, requires_grad=True) for n in (5, 61))
    total = log_probs.apply(hidden.tanh(), weight, ids_of(5)).sum()
    with pytest.raises(RuntimeError, match=r"no second derivative: .* logprobs"):
        torch.autograd.grad(total, hidden, create_graph=True)
    assert torch.autograd.grad(total, hidden)[0].isfinite().all()


@pytest.mark.parametrize("vocabulary", [4095, 4096, 4097, 9000])
def test_more_tokens_than_a_block(vocabulary):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8).double().requires_grad_(), torch.randn(vocabulary, 8).double().requires_grad_()
    wanted, pull = torch.tensor([0, 4094, 77, vocabulary - 1, 2000]), torch.randn(5).double()
    ours = LogProbs.apply(hidden, weight, wanted)
    theirs = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), wanted]
    close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(x @ pull, (hidden, weight)) for x in (ours, theirs)), strict=True):
        close(a, b)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_logits_too_large_for_exp_come_in_any_order_of_blocks(order, monkeypatch):
    monkeypatch.setattr(LogProbs, "BLOCK", 1)
    hidden = torch.tensor([[1.0]], requires_grad=True)
    logits = torch.tensor([[-500.0], [500.0], [499.0]])[order]
    logprob = LogProbs.apply(hidden, logits, torch.tensor([order.index(2)]))
    assert logprob.item() == pytest.approx(-math.log(1 + math.e), abs=1e-4)  # exp(500) is infinity in fp32
    logprob.backward()
    assert hidden.grad.item() == pytest.approx(499 - (500 * math.e + 499) / (math.e + 1), abs=1e-3)


def test_gradcheck_of_logprobs(monkeypatch):
    monkeypatch.setattr(LogProbs, "BLOCK", 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    targets = torch.tensor([0, 3, 3, 1, 0])
    assert torch.autograd.gradcheck(lambda h, w: LogProbs.apply(h, w, targets), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: LogProbs.apply(h, weight.detach(), targets), (hidden,))
    assert torch.autograd.gradcheck(lambda w: LogProbs.apply(hidden.detach(), w, targets), (weight,))
    monkeypatch.setattr(TotalLogProb, "ROWS", 2)
    assert torch.autograd.gradcheck(lambda h, w: TotalLogProb.apply(h, w, targets), (hidden, weight))


def test_logprobs_worked_by_hand():
    """Logits (2, 0) and (0, 3): log p(0) = -log(1 + e^-2), log p(0) = -log(1 + e^3)."""
    hidden = torch.tensor([[2.0, 0.0], [0.0, 3.0]], requires_grad=True)
    logprobs = LogProbs.apply(hidden, torch.eye(2), torch.tensor([0, 0]))
    assert logprobs.tolist() == pytest.approx([-0.126928, -3.048587], abs=1e-6)
    logprobs.sum().backward()  # 1[v = target] - p(v), with p = (0.880797, 0.119203) and (0.047426, 0.952574)
    assert hidden.grad.flatten().tolist() == pytest.approx([0.119203, -0.119203, 0.952574, -0.952574], abs=1e-6)


def test_a_batch_without_targets_adds_zero_and_no_nan():
    gpt = random_gpt()
    batch, _ = pack([[1], [2]])
    logprobs = gpt.target_logprobs(batch)
    assert logprobs.shape == (0,)
    assert logprobs.sum().item() == 0
    total = gpt.total_logprob(batch)
    assert total.item() == 0
    for loss in (logprobs.sum(), total):
        for gradient in gradients(gpt, loss).values():
            assert (gradient == 0).all()


def test_the_logits_of_a_whole_batch_never_exist_in_training(monkeypatch):
    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.found |= {tuple(out.shape)} if isinstance(out, torch.Tensor) else set()
            return out

    monkeypatch.setattr(LogProbs, "BLOCK", 10)
    monkeypatch.setattr(TotalLogProb, "ROWS", 5)
    gpt = random_gpt()
    batch, _ = pack(ROWS)
    targets = len(batch.targets)
    with Shapes() as seen:
        gradients(gpt, gpt.target_logprobs(batch).sum())
    assert (targets, 10) in seen.found and (targets, 1) in seen.found  # 61 tokens: six blocks of ten, and one of one
    assert not any(61 in shape and 16 not in shape for shape in seen.found)  # but for the weights, which are 16 wide
    with Shapes() as seen:
        gradients(gpt, gpt.total_logprob(batch))
    assert (5, 61) in seen.found and targets > 5
    assert all(math.prod(shape) <= 5 * 61 for shape in seen.found if 61 in shape and 16 not in shape)
    with Shapes() as seen:
        gpt(batch.tokens[None, :20])
    assert (1, 20, 61) in seen.found  # this is how the naive form would have shown


def test_autocast_computes_in_bf16_but_returns_fp32():
    gpt = random_gpt(spread=0.1).float()
    batch, _ = pack(ROWS)
    exact = gpt.target_logprobs(batch)
    exact_gradients = gradients(gpt, exact.sum())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, total = gpt.target_logprobs(batch), gpt.total_logprob(batch)
    assert rounded.dtype == total.dtype == torch.float32
    close(rounded, exact, 0.05)
    close(total / len(exact), exact.mean(), 0.05)
    assert not torch.equal(rounded, exact)
    for loss in (rounded.sum(), total):
        for name, gradient in gradients(gpt, loss).items():
            assert gradient.dtype == torch.float32
            assert (gradient - exact_gradients[name]).norm() < 0.05 * exact_gradients[name].norm(), name


def test_in_bf16_a_certain_token_has_probability_one():
    """Logits near -100, as GPT-2's are, where bf16 steps by 0.5: own logit and softmax are rounded alike, or p > 1."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(50, 32) - 3
    hidden[:, 0], weight[:, 0] = 30, -3.3
    targets = (hidden @ weight.t()).argmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = LogProbs.apply(hidden, weight, targets)
    exact = LogProbs.apply(hidden.double(), weight.double(), targets).float()
    assert logprobs.max() <= 1e-6
    assert (logprobs - exact).abs().mean() < 0.25


@pytest.mark.full
def test_compiled_blocks_give_the_same_loss_and_plain_names(monkeypatch):
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(Packed, "__call__", torch.compiler.disable(Packed.__call__))  # as train.py does
    gpt = random_gpt()
    batch, separate = pack(ROWS)
    names, plain = list(gpt.state_dict()), gradients(gpt, naive_logprobs(gpt, separate).sum())
    torch._dynamo.reset()
    for block in gpt.h:
        block.compile()
    loss = gpt.target_logprobs(batch).sum()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    close(loss, naive_logprobs(random_gpt(), separate).sum(), 1e-8)
    same_gradients(gradients(gpt, loss), plain, 1e-8)
    assert list(gpt.state_dict()) == names


# ---- generation ----------------------------------------------------------------------------------


def naive_greedy(gpt: GPT, ids: list[int], count: int) -> list[int]:
    """No cache: the whole window through the network for each token; it moves by half when it is full."""
    ids, positions, written = list(ids), gpt.config.n_positions, len(ids)
    with torch.no_grad():
        while len(ids) < written + count:
            start = 0
            while len(ids) - start > positions:
                start += max(1, positions // 2)
            ids.append(int(gpt(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[written:]


def greedy(gpt: GPT, ids: list[int], count: int, **rest) -> list[int]:
    return list(generate(gpt, ids, count, temperature=0, **{"stop": None, **rest}))


def test_the_window_moves_by_half_the_context():
    assert [window_start(n, 1024) for n in (1, 1024, 1025, 1536, 1537, 2049)] == [0, 0, 512, 512, 1024, 1536]
    assert [window_start(n, 5) for n in (5, 6, 7, 8, 9, 10)] == [0, 2, 2, 4, 4, 6]
    assert [window_start(n, 1) for n in (1, 2, 3)] == [0, 1, 2]


@pytest.mark.parametrize("positions", [8, 7, 2, 1])
@pytest.mark.parametrize("prompt", [1, 6, 8, 20])
def test_cached_generation_equals_uncached_and_goes_on_past_the_positions(positions, prompt):
    gpt, ids = random_gpt(replace(SMALL, n_positions=positions)), ids_of(prompt).tolist()
    reply = greedy(gpt, ids, 24)
    assert reply == naive_greedy(gpt, ids, 24)
    assert len(reply) == 24


def test_cached_generation_equals_uncached_across_position_1024():
    gpt, ids = random_gpt(replace(SMALL, n_positions=1024)), ids_of(1019).tolist()
    reply = greedy(gpt, ids, 12)
    assert reply == naive_greedy(gpt, ids, 12)
    assert len(set(reply)) > 2  # not one token over and over, which a broken cache could give as well


def test_greedy_generation_is_that_of_transformers(tiny_model):
    from transformers import GPT2LMHeadModel

    ids = ids_of(10, vocab=50257).tolist()
    theirs = GPT2LMHeadModel.from_pretrained(tiny_model).generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 10), max_new_tokens=30, do_sample=False,
        eos_token_id=None, pad_token_id=0)[0, 10:].tolist()
    assert greedy(GPT.from_pretrained(tiny_model), ids, 30) == theirs
    assert len(set(theirs)) > 5


def test_a_cached_step_gives_the_logits_of_the_whole():
    gpt, ids = random_gpt(), ids_of(12).tolist()
    whole, cache = gpt(torch.tensor([ids]))[0], KVCache(gpt)
    close(cache.continue_from(gpt, ids[:5]), whole[4:5])
    for t in range(5, 9):
        close(cache.extend(gpt, torch.tensor([ids[t:t + 1]])), whole[t:t + 1])
    close(cache.extend(gpt, torch.tensor([ids[9:]])), whole[11:])  # several behind those in the cache


def count_tokens(gpt: GPT, monkeypatch) -> list[int]:
    """How many tokens each later call of the network computes."""
    computed, hidden = [], gpt.hidden
    monkeypatch.setattr(gpt, "hidden", lambda tokens, *rest: computed.append(tokens.numel()) or hidden(tokens, *rest))
    return computed


def test_a_second_turn_computes_only_what_is_new(monkeypatch):
    gpt, cache, first = random_gpt(), KVCache(random_gpt()), ids_of(8).tolist()
    reply = greedy(gpt, first, 5, cache=cache)
    second = first + reply + ids_of(4, seed=1).tolist()
    expected = greedy(gpt, second, 5)
    computed = count_tokens(gpt, monkeypatch)
    assert greedy(gpt, second, 5, cache=cache) == expected
    assert computed == [5, 1, 1, 1, 1]  # the last token of the reply was never read, and four are new


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(0, 5), st.booleans()),
                min_size=2, max_size=5))
def test_a_cache_kept_across_turns_changes_nothing(turns):
    """Turns that go on, go back, differ in the middle or outgrow the eight positions."""
    gpt = random_gpt(replace(SMALL, n_positions=8))
    cache, conversation = KVCache(gpt), []
    for ids, count, goes_on in turns:
        conversation = [*conversation, *ids] if goes_on else ids
        reply = greedy(gpt, conversation, count, cache=cache)
        assert reply == greedy(gpt, conversation, count)
        conversation = conversation + reply


@pytest.mark.parametrize("call", [0, 2])  # while it reads the prompt, and while it writes
def test_a_cache_survives_an_interrupted_reply(call):
    gpt, prompt = random_gpt(), ids_of(10).tolist()
    expected, cache = greedy(gpt, prompt, 8), KVCache(gpt)
    greedy(gpt, ids_of(20, seed=3).tolist(), 3, cache=cache)  # what was there before
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt

    hook = gpt.h[1].register_forward_pre_hook(interrupt)  # the first block has written its keys, the second has not
    said = []
    with pytest.raises(KeyboardInterrupt):
        said.extend(generate(gpt, prompt, 8, temperature=0, stop=None, cache=cache))
    hook.remove()
    assert len(calls) == call + 1
    assert greedy(gpt, prompt, 8, cache=cache) == expected
    assert greedy(gpt, prompt + expected[:4], 4, cache=cache) == expected[4:]


def test_generation_stops_at_the_stop_id_which_is_not_yielded():
    gpt, ids = random_gpt(), ids_of(4).tolist()
    reply = greedy(gpt, ids, 12)
    stop = reply[6]
    assert greedy(gpt, ids, 12, stop=stop) == reply[:reply.index(stop)]
    assert list(generate(gpt, ids, 12, temperature=0)) == reply  # the default, 50256, is not in this vocabulary


@pytest.mark.parametrize("count", [0, 1, 3])
def test_max_new_tokens_is_obeyed(count, monkeypatch):
    gpt = random_gpt()
    computed = count_tokens(gpt, monkeypatch)
    assert len(greedy(gpt, [1, 2], count)) == count
    assert len(computed) == count  # the last token of a reply is not read
    assert [len(reply) for reply in generate_batch(gpt, [[1], [2, 3]], count)] == [count, count]


def test_generation_needs_a_token_to_start_from():
    with pytest.raises(ValueError, match="at least one token"):
        list(generate(random_gpt(), []))


def test_generation_leaves_no_graph_and_a_caller_may_stop_it():
    gpt = random_gpt()
    stream = generate(gpt, [1, 2, 3], 10, seed=0)
    first = next(stream)
    stream.close()
    assert isinstance(first, int)
    assert list(stream) == []
    cache = KVCache(gpt)
    greedy(gpt, [1, 2, 3], 3, cache=cache)
    assert not cache.keys.requires_grad


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_generate_batch_equals_generate_one_by_one(rows):
    gpt = random_gpt(replace(SMALL, n_positions=16))
    prompts = [ids_of(n, seed=n).tolist() for n in (3, 1, 12, 7, 16, 3, 14)]
    alone = [greedy(gpt, prompt, 9) for prompt in prompts]
    stop = alone[0][4]
    expected = []
    for prompt, reply in zip(prompts, alone, strict=True):
        reply = reply[:16 - len(prompt) + 1]  # it does not slide: a reply ends where the positions do
        expected.append(reply[:reply.index(stop) + 1] if stop in reply else reply)
    assert generate_batch(gpt, prompts, 9, stop=stop, rows=rows) == expected
    assert expected[0][-1] == stop
    assert len(expected[4]) == 1
    assert len(expected[1]) == 9 or expected[1][-1] == stop


def test_generate_batch_of_nothing_and_of_too_much():
    gpt = random_gpt()
    assert generate_batch(gpt, [], 5) == []
    with pytest.raises(ValueError, match=r"33 tokens .* 32 positions"):
        generate_batch(gpt, [[1], [1] * 33], 5)


# ---- sampling ------------------------------------------------------------------------------------

HALVES = [0.5, 0.2, 0.15, 0.1, 0.05]


def drawn_from(logits: torch.Tensor, seen=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0):
    """The probabilities that `choose` draws from, after all its filters."""
    with mock.patch.object(torch, "multinomial", side_effect=lambda probs, *_, **__: probs.argmax()[None]) as draw:
        choose(logits, list(seen), temperature, top_k, top_p, min_p, penalty, torch.Generator())
    probs = draw.call_args.args[0]
    return (probs / probs.sum()).tolist()


@pytest.mark.parametrize(("filters", "expected"), [
    ({}, HALVES),
    ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0, 0]),
    ({"top_k": 1}, [1, 0, 0, 0, 0]),
    ({"top_k": 5}, HALVES),
    ({"top_k": 100}, HALVES),                              # more than there are
    ({"top_p": 0.6}, [5 / 7, 2 / 7, 0, 0, 0]),             # 0.5 is not enough, 0.7 is: the smallest set that reaches it
    ({"top_p": 0.8}, [10 / 17, 4 / 17, 3 / 17, 0, 0]),
    ({"top_p": 0.4}, [1, 0, 0, 0, 0]),
    ({"top_p": 0.0}, [1, 0, 0, 0, 0]),                     # the likeliest always stays
    ({"min_p": 0.25}, [10 / 17, 4 / 17, 3 / 17, 0, 0]),    # at least 0.25 * 0.5 = 0.125
    ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
    ({"temperature": 0.5, "top_k": 2}, [25 / 29, 4 / 29, 0, 0, 0]),                 # squares: 25 to 4
    ({"temperature": 1e-6}, [1, 0, 0, 0, 0]),
    ({"temperature": 2.0, "top_k": 2}, [5**.5 / (5**.5 + 2**.5), 2**.5 / (5**.5 + 2**.5), 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.75}, [5 / 7, 2 / 7, 0, 0, 0]),          # of the 0.85 that top_k leaves, 0.7 is 82 %
    ({"temperature": 0.5, "min_p": 0.05}, [100 / 125, 16 / 125, 9 / 125, 0, 0]),  # the fourth: (1/5)^2 = 0.04 as likely
])
def test_filters_worked_by_hand(filters, expected):
    assert drawn_from(torch.tensor(HALVES).log(), **filters) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-38])
def test_next_to_temperature_0_the_likeliest_is_taken(temperature):
    logits = torch.tensor([-90.0, -100.0, -110.0])  # divided by any of them: infinite
    assert choose(logits, [], temperature, 0, 1.0, 0.0, 1.0, torch.Generator()) == 0


def test_filters_do_not_depend_on_the_order_of_the_vocabulary():
    backwards = torch.tensor(HALVES[::-1]).log()
    for filters in ({"top_k": 2}, {"top_p": 0.6}):
        assert drawn_from(backwards, **filters) == pytest.approx([0, 0, 0, 2 / 7, 5 / 7], abs=1e-6)


def test_repetition_penalty_worked_by_hand():
    """A seen 2.0 is halved, a seen -1.0 doubled; what was not seen, or seen twice, is no different."""
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    expected = torch.tensor([1.0, 1.5, -2.0, -1.5]).softmax(0).tolist()
    assert drawn_from(logits, seen=[0, 2, 2, 0, 0], penalty=2.0) == pytest.approx(expected, abs=1e-6)
    assert logits.tolist() == [2.0, 1.5, -1.0, -1.5]  # the caller's logits are left alone
    generator = torch.Generator()
    assert choose(logits, [], 0, 0, 1.0, 0.0, 2.0, generator) == 0
    assert choose(logits, [0, 2], 0, 0, 1.0, 0.0, 2.0, generator) == 1


def test_repetition_penalty_counts_the_prompt_and_the_reply():
    gpt, ids = random_gpt(), ids_of(5).tolist()
    reply = list(generate(gpt, ids, 20, temperature=0, repetition_penalty=1e9, stop=None))
    assert len(set(ids + reply)) == len(set(ids)) + 20  # under so harsh a penalty no token comes twice


@given(st.integers(0, 10**6), st.floats(0.3, 3), st.integers(0, 12), st.floats(0.05, 1), st.floats(0, 0.5),
       st.floats(1, 2))
def test_filters_are_those_of_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    from transformers.generation import logits_process as theirs

    torch.manual_seed(seed)
    logits, seen = torch.randn(12) * 2, torch.randint(12, (1, 6))
    steps = [theirs.RepetitionPenaltyLogitsProcessor(penalty), theirs.TemperatureLogitsWarper(temperature)]
    steps += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    steps += [theirs.TopPLogitsWarper(top_p), theirs.MinPLogitsWarper(min_p)]
    scores = logits[None].clone()
    for step in steps:
        scores = step(seen, scores)
    ours = drawn_from(logits, seen[0].tolist(), temperature, top_k, top_p, min_p, penalty)
    assert ours == pytest.approx(scores[0].softmax(-1).tolist(), abs=1e-5)


def test_draws_come_as_often_as_they_are_likely():
    generator, logits = torch.Generator().manual_seed(0), torch.tensor(HALVES).log()
    draws = [choose(logits, [], 1.0, 3, 1.0, 0.0, 1.0, generator) for _ in range(3000)]
    shares = [draws.count(i) / 3000 for i in range(5)]
    assert shares == pytest.approx([10 / 17, 4 / 17, 3 / 17, 0, 0], abs=0.03)  # over three standard deviations


def test_a_seed_gives_the_same_reply_and_touches_nothing_else():
    gpt = random_gpt(spread=0.05)
    before = torch.get_rng_state()
    one, again, other, free, freed = (list(generate(gpt, [1, 2], 20, seed=s, stop=None)) for s in (7, 7, 8, None, None))
    assert one == again
    assert len({tuple(reply) for reply in (one, other, free, freed)}) == 4
    assert torch.equal(torch.get_rng_state(), before)


# ---- int8 weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 16, 48])
def test_an_int8_layer_worked_by_hand(width):
    weight, x = torch.zeros(3, width), torch.zeros(1, width)
    weight[:, :2], x[:, :2] = torch.tensor([[1.27, -0.62], [0.0, 0.0], [-2.54, 1.0]]), torch.tensor([1.0, 2.0])
    layer = Int8Linear(weight, torch.tensor([0.5, 1.0, 0.0]))
    assert layer.int8[:, :2].tolist() == [[127, -62], [0, 0], [-127, 50]]
    close(layer.scale, torch.tensor([0.01, 1e-12 / 127, 0.02]), 1e-8)
    close(layer(x), torch.tensor([[0.53, 1.0, -0.54]]), 1e-6)


@pytest.mark.parametrize(("rows", "rounding"), [(1, 4e-3), (4, 4e-3), (5, 1e-6), (40, 1e-6)])
def test_an_int8_layer_is_its_rounded_weight_whatever_the_number_of_rows(rows, rounding):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(2, rows, 64)
    layer = Int8Linear(weight, bias)
    rounded = layer.int8 * layer.scale[:, None]
    assert ((rounded - weight).abs() <= layer.scale[:, None] / 2 + 1e-7).all()
    exact = F.linear(x, rounded, bias)
    assert (layer(x) - exact).norm() <= rounding * exact.norm()  # up to 8 rows, activations pass through bf16


def test_a_quantised_model_says_the_same_in_most_places():
    """The bundled model: rounding moves its logits by a hundredth, which is less than its doubts."""
    folder = Path(__file__).parents[1] / "sample" / "model"
    gpt, quantised = GPT.from_pretrained(folder), GPT.from_pretrained(folder)
    model.for_generation(quantised, "int8")
    assert not any(isinstance(layer, torch.nn.Linear) for layer in quantised.modules())
    ids = torch.tensor([greedy(gpt, [END_OF_TEXT, 32], 120)])  # <|endoftext|>A ...
    logits, rounded = gpt(ids), quantised(ids)
    assert 0 < (rounded - logits).norm() < 0.02 * logits.norm()
    same, (first, second) = rounded.argmax(-1) == logits.argmax(-1), logits.topk(2).values.unbind(-1)
    assert same.float().mean() > 0.94
    assert same[first - second > 0.5].all()


# ---- weights in and out --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_folder(gpt2_folder):
    return gpt2_folder(n_embd=16, n_head=2, n_layer=2, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def copy(small_folder, tmp_path):
    """A folder of one's own to damage."""
    return shutil.copytree(small_folder, tmp_path / "copy")


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: w.contiguous() for k, w in change(weights).items()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def edit_config(folder, **settings) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | settings))


def logits_of(folder) -> torch.Tensor:
    with torch.no_grad():
        return GPT.from_pretrained(folder)(ids_of(2, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_weights_of_any_precision_with_and_without_prefix(copy, dtype, prefix):
    from transformers import GPT2LMHeadModel

    edit_weights(copy, lambda weights: {k: w.to(dtype) for k, w in weights.items()})
    theirs = GPT2LMHeadModel.from_pretrained(copy, dtype=torch.float32).eval()(ids_of(2, 32)).logits
    edit_weights(copy, lambda weights: {prefix + k.removeprefix("transformer."): w for k, w in weights.items()})
    gpt = GPT.from_pretrained(copy)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.is_contiguous() for p in gpt.parameters())
    assert gpt.config == SMALL
    close(gpt(ids_of(2, 32)), theirs, 1e-5)


def test_what_older_files_hold_besides_is_passed_over(copy, small_folder):
    """The causal mask and its fill value, which early versions of transformers saved, and a second name of the head."""
    edit_weights(copy, lambda weights: weights | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": weights["transformer.wte.weight"].clone()})
    assert torch.equal(logits_of(copy), logits_of(small_folder))


def test_a_sharded_folder(small_folder, tmp_path):
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel.from_pretrained(small_folder).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits_of(tmp_path), logits_of(small_folder))
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match="has no model-00002-of-"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transformers_opens_what_is_saved(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    gpt = random_gpt().float()
    gpt.save_pretrained(tmp_path / "new" / "folder", dtype=dtype)
    stored = load_file(tmp_path / "new" / "folder" / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {dtype}
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == dtype
    assert (theirs.generation_config.eos_token_id, theirs.config.n_inner) == (END_OF_TEXT, None)
    ours = GPT.from_pretrained(tmp_path / "new" / "folder")
    for name, weight in gpt.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight.to(dtype).float()), name
    close(theirs.float().eval()(ids_of(2, 32)).logits, ours(ids_of(2, 32)), 1e-4)


def test_transformers_folders_come_back_the_same(small_folder, tmp_path):
    GPT.from_pretrained(small_folder).save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (small_folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_weights_can_be_saved_in_a_models_place(tmp_path):
    gpt, other = random_gpt(seed=0).float(), random_gpt(seed=1).float()
    gpt.save_pretrained(tmp_path, other.state_dict())
    close(logits_of(tmp_path), other(ids_of(2, 32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_in_memory_is_what_was_read_whatever_becomes_of_its_file(copy, dtype):
    edit_weights(copy, lambda weights: {name: w.to(dtype) for name, w in weights.items()})
    gpt = GPT.from_pretrained(copy)
    before = {name: w.clone() for name, w in gpt.state_dict().items()}
    file = copy / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert all(torch.equal(w, before[name]) for name, w in gpt.state_dict().items())


def test_what_is_no_gpt2_is_not_saved_as_one(tmp_path):
    """transformers would open it, and begin at random what it misses."""
    gpt = random_gpt().float()
    model.for_generation(gpt, "int8")
    with pytest.raises(ValueError, match=r"'h\.0\.attn\.c_attn\.int8' is not as in a GPT-2.*save the model"):
        gpt.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match=r"'wpe\.weight' is not as in a GPT-2"):
        gpt.save_pretrained(tmp_path / "new", {n: w for n, w in random_gpt().state_dict().items() if n != "wpe.weight"})
    assert not (tmp_path / "new").exists()


def test_a_save_that_is_cut_short_mixes_no_two_models(copy, small_folder, monkeypatch):
    """The disk is full: the old one stands. Killed in between: neither opens."""
    other = GPT(replace(SMALL, n_head=SMALL.n_head * 2))  # of the same shapes
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_file", mock.Mock(side_effect=OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            other.save_pretrained(copy)
    assert torch.equal(logits_of(copy), logits_of(small_folder))
    for cut in (mock.patch("os.replace", side_effect=KeyError), mock.patch("json.dumps", side_effect=KeyError)):
        with cut, pytest.raises(KeyError):
            other.save_pretrained(copy)
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            GPT.from_pretrained(copy)
    assert {path.suffix for path in copy.iterdir()} <= {".json", ".safetensors"}
    other.save_pretrained(copy)
    assert GPT.from_pretrained(copy).config == other.config


def test_the_layer_norms_epsilon_is_read(copy, small_folder):
    edit_config(copy, layer_norm_epsilon=0.5)
    assert (logits_of(copy) - logits_of(small_folder)).abs().max() > 0.01


def test_loading_draws_no_random_numbers(small_folder):
    before = torch.get_rng_state()
    GPT.from_pretrained(small_folder)
    assert torch.equal(torch.get_rng_state(), before)


def renamed(old, new):
    return lambda weights: {k.replace(old, new): w for k, w in weights.items()}


def without(name):
    return lambda weights: {k: w for k, w in weights.items() if k != name}


def put(name, value):
    return lambda weights: weights | {name: value}


@pytest.mark.parametrize(("change", "message"), [
    (without("transformer.h.1.mlp.c_fc.bias"), r"no weight 'h\.1\.mlp\.c_fc\.bias'"),
    (without("transformer.wte.weight"), r"no weight 'wte\.weight'"),
    (renamed("transformer.h", "model.layers"), r"not a GPT-2.*h\.0\.ln_1\.weight.*model\.layers\.0"),
    (put("transformer.wte.weight", torch.zeros(60, 16)), r"'wte\.weight' has shape \(60, 16\).*\(61, 16\)"),
    (put("transformer.h.0.mlp.c_fc.weight", torch.zeros(64, 16)), r"c_fc\.weight' has shape \(64, 16\).*\(16, 64\)"),
    (put("transformer.h.0.mlp.c_fc.weight", torch.zeros(64)), r"c_fc\.weight' has shape \(64,\).*\(16, 64\)"),
    (put("transformer.h.0.attn.q_norm.weight", torch.zeros(16)), r"does not have.*h\.0\.attn\.q_norm\.weight"),
    (put("transformer.h.2.ln_1.weight", torch.zeros(16)), r"does not have.*h\.2\.ln_1\.weight"),
    (put("lm_head.weight", torch.zeros(61, 16)), r"lm_head\.weight differs from wte\.weight"),
    (put("lm_head.weight", torch.zeros(60, 16)), r"lm_head\.weight differs from wte\.weight"),
    *((put("transformer.ln_f.weight", torch.full((16,), bad, dtype=dtype)), r"'ln_f\.weight' .* not finite.*of no use")
      for bad in (math.nan, math.inf, -math.inf) for dtype in (torch.float32, torch.float16)),
])
def test_weights_that_are_not_a_gpt2s_are_refused(copy, change, message):
    edit_weights(copy, change)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(copy)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(("settings", "message"), [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
    ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
    ({"activation_function": "relu"}, "activation_function is 'relu'"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ({"n_inner": 63}, "n_inner is 63"),
    ({"n_embd": "16"}, "n_embd is '16'"),
    ({"n_layer": None}, "n_layer is None"),
    ({"n_head": 0}, "n_head is 0"),
    ({"n_embd": -16}, "n_embd is -16"),
    ({"n_embd": 16.5}, "n_embd is 16.5"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small'"),
    ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
    ({"n_layer": 3}, r"no weight 'h\.2\."),
    ({"n_layer": 1_000_000}, "asks for 1,000,000 layers"),
    ({"n_layer": 10**9}, "n_layer is 1000000000"),
    ({"n_embd": 2**31 - 2}, "n_embd is 2147483646"),
    ({"n_embd": 2**23}, r"'wte\.weight' has shape \(61, 16\).*8388608"),
    ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan"),
    ({"layer_norm_epsilon": math.inf}, "layer_norm_epsilon is inf"),
    ({"n_positions": 64}, r"'wpe\.weight' has shape \(32, 16\).*\(64, 16\)"),
])
def test_a_configuration_that_is_not_a_gpt2s_is_refused(copy, settings, message):
    edit_config(copy, **settings)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(copy)
    assert len(str(error.value).splitlines()) <= 5


def test_an_inner_width_of_four_times_the_width_may_be_spelt_out(copy, small_folder):
    edit_config(copy, n_inner=64)
    assert torch.equal(logits_of(copy), logits_of(small_folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"gpt2"', "\x00\xff", '{"a":' * 100_000])
def test_a_damaged_configuration_is_refused(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration"):
        GPT.from_pretrained(copy)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:5], lambda b: b[:200], lambda b: b[:-8],
                                    lambda b: b + b"more", lambda b: b"garbage " * 99])
def test_damaged_weights_are_refused(copy, damage):
    file = copy / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        GPT.from_pretrained(copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_refused(copy, text):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        GPT.from_pretrained(copy)


def test_missing_folders_and_files_are_named(copy):
    with pytest.raises(FileNotFoundError, match=r"(?s)no model in '.*nowhere'.*sample.*gpt2-medium.*config\.json"):
        GPT.from_pretrained(copy / "nowhere")
    (copy / "model.safetensors").rename(copy / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        GPT.from_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        GPT.from_pretrained(copy)


def test_what_a_download_and_git_lfs_leave_is_called_by_its_name(copy):
    weights = copy / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: it is a git-lfs pointer.*git lfs pull"):
        GPT.from_pretrained(copy)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors\.\nIf it was downloaded, that broke off"):
        GPT.from_pretrained(copy)
    (copy / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=r"config\.json .* it is a git-lfs pointer"):
        GPT.from_pretrained(copy)


def test_a_pickle_is_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        GPT.from_pretrained(copy)


def test_a_name_means_openais_weights_from_the_hub(small_folder, monkeypatch, tmp_path):
    """Here transformers answers for the Hub; a folder of that name where one stands goes before it."""
    import transformers.utils

    asked = []
    monkeypatch.setattr(transformers.utils, "cached_file",
                        lambda name, file: asked.append((name, file)) or str(small_folder / file))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits_of("gpt2-large"), logits_of(small_folder))
    assert asked == [("openai-community/gpt2-large", file) for file in ("config.json", "model.safetensors")]
    shutil.copytree(small_folder, tmp_path / "gpt2-large")
    assert torch.equal(logits_of("gpt2-large"), logits_of(small_folder))
    assert len(asked) == 2


def test_without_a_network_the_message_says_what_to_do(monkeypatch, tmp_path):
    import transformers.utils

    def offline(name, file):
        raise OSError("We couldn't connect to the Hub\nand so on\nand so on")

    monkeypatch.setattr(transformers.utils, "cached_file", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download openai-community/gpt2-xl") as error:
        GPT.from_pretrained("gpt2-xl")
    assert "--model sample" in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


@pytest.mark.parametrize("device", ["meta", "cpu-2", "xpu", "vulkan"])
def test_a_device_that_computes_nothing_is_refused(device):
    with pytest.raises(ValueError, match=f"--device {device} cannot be used here") as error:
        model.pick_device(device)
    assert len(str(error.value).splitlines()) == 1


# ---- on a GPU that is not there ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_nothing_meets_a_tensor_of_another_device(dtype):
    """Fake tensors know device, shape and type, and refuse what a GPU would; logits are fp32 whatever the weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = [data.Row(np.arange(n, dtype=np.int32), np.arange(n) % 2 > 0) for n in (5, 9, 9)]
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            gpt = GPT(SMALL)
            tokens, hidden = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 3, SMALL.n_embd, dtype=dtype)
        for module in gpt.modules():  # Module.to() cannot turn fake tensors
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(weight.to(dtype)))
        found = [gpt.target_logprobs(train.to_device(data.pack(rows, range(3)), torch.device("cuda")))]
        cache = model.KVCache(gpt, 2, pads=[0, 3])
        found += [model.KVCache.extend.__wrapped__(cache, gpt, new) for new in (tokens, tokens[:, :1])]
        found += [gpt.logits(part) for part in (hidden[0, 0], hidden[0], hidden)]
    assert {str(tensor.device) for tensor in found} == {"cuda:0"}
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert [tuple(tensor.shape[:-1]) for tensor in found[1:]] == [(2,), (2,), (), (3,), (2, 3)]
