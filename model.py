"""GPT-2: the four sizes, the network, how it is trained and how it writes; then the same numbers, faster.

Dimension key
    B  rows in a batch            C  width of the model (n_embd)     V  vocabulary (50,257)
    T  time, tokens in a row      H  attention heads                 N  tokens of a packed batch, all rows together
    P  positions (1,024)          D  width of a head, C / H          M  targets: the tokens that are predicted

One network serves training, evaluation and chat. What differs between them is who may attend to whom, so that is
an argument, `attend`: plain causal attention on a (B, T) batch, `Packed` on rows laid end to end without padding
(training), and `KVCache` on the tokens seen so far (generation). Everything else in a transformer works on one
position at a time and never learns which of the three it serves.

A reader of the mathematics may stop at "The same numbers, faster": what follows changes nothing but the time it takes.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---- sizes ---------------------------------------------------------------------------------------

END_OF_TEXT = 50256


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5


SIZES = {
    "gpt2": GPTConfig(),                                           # 124M parameters
    "gpt2-medium": GPTConfig(n_embd=1024, n_layer=24, n_head=16),  # 355M
    "gpt2-large": GPTConfig(n_embd=1280, n_layer=36, n_head=20),   # 774M
    "gpt2-xl": GPTConfig(n_embd=1600, n_layer=48, n_head=25),      # 1,558M
}


# ---- the network ---------------------------------------------------------------------------------


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Each position sees itself and all before it. Rows padded on the right need no mask under this."""
    return mix(q, k, v, dropout=dropout, causal=True)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend, layer: int, dropout: float) -> Tensor:
        heads = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))             # (B, T, 3, H, D)
        q, k, v = (z.transpose(1, 2) for z in heads.unbind(2))                 # each (B, H, T, D)
        y = attend(layer, q, k, v, dropout)                                    # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))                       # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # OpenAI's GELU is the tanh approximation


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend, layer: int, dropout: float) -> Tensor:
        x = x + F.dropout(self.attn(self.ln_1(x), attend, layer, dropout), dropout)
        x = x + F.dropout(self.mlp(self.ln_2(x)), dropout)
        return x


class GPT(nn.Module):
    """GPT-2 with OpenAI's names for its parts; `gpt(tokens)` maps (B, T) ids to (B, T, V) logits, always."""

    def __init__(self, config: GPTConfig | None = None):
        super().__init__()
        self.config = config = config or GPTConfig()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.dropout = 0.0  # applied while training, where GPT-2 has it: embeddings, attention, branches
        self.recompute_activations = False  # gradient checkpointing: a third more time for a fraction of the memory
        tokens = torch.empty(config.vocab_size, config.n_embd)
        positions = torch.empty(config.n_positions, config.n_embd)
        # from tables, because nn.Embedding's own initialisation on the meta device takes a second to import a compiler
        self.wte = nn.Embedding.from_pretrained(tokens, freeze=False)  # also the output head: GPT-2 ties the two
        self.wpe = nn.Embedding.from_pretrained(positions, freeze=False)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = None  # wte itself, but for a copy that is faster: see for_generation() and share_equal_rows()
        if not self.wte.weight.is_meta:
            self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention | MLP):  # 2 * n_layer branches add up on the residual stream: keep its variance
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, attend=None) -> Tensor:
        """The last layer's output, normalised and ready for the head: (B, T) ids to (B, T, C)."""
        if tokens.shape[-1] > self.config.n_positions and positions is None:
            raise ValueError(f"{tokens.shape[-1]} tokens do not fit the model's {self.config.n_positions} positions")
        leave_busy_cores()
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        attend = attend or causal_attention
        dropout = self.dropout if self.training else 0.0
        x = F.dropout(self.wte(tokens) + self.wpe(positions), dropout)        # (B, T, C)
        for layer, block in enumerate(self.h):
            if self.recompute_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, attend, layer, dropout, use_reentrant=False)
            else:
                x = block(x, attend, layer, dropout)
        return self.ln_f(x)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}, "
                             f"got {int(tokens.min())}..{int(tokens.max())}")
        return self.logits(self.hidden(tokens))                               # (B, T, V)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, hidden wte^T: (..., C) to (..., V)."""
        return head(self, hidden)

    def target_logprobs(self, batch) -> Tensor:
        """log p(target | all before it) for every target of a packed batch: (M,), in fp32.

        `batch` has tokens (N,), positions (N,), spans, index (M,) and targets (M,): see `data.Batch`. The numbers are
        those of logprobs(self.logits(hidden), batch.targets), without its (M, V) logits.
        """
        return head_logprobs(self, self.predicting(batch), batch.targets)

    def total_logprob(self, batch) -> Tensor:
        """The sum of `target_logprobs`: (), and sooner where all weights learn."""
        return head_total_logprob(self, self.predicting(batch), batch.targets)

    def predicting(self, batch) -> Tensor:
        """The last layer's output where it predicts a target of the batch: (M, C)."""
        hidden = self.hidden(batch.tokens[None], batch.positions[None], Packed(batch.spans))[0]   # (N, C)
        return hidden.index_select(0, batch.index)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> GPT:
        """The bundled `sample`, one of OpenAI's by name, or a folder in transformers' format; in fp32."""
        return read_model(find_model(str(name_or_folder)))

    def save_pretrained(self, folder: str | Path, weights: dict[str, Tensor] | None = None,
                        dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that transformers' AutoModelForCausalLM opens; `weights` stands in for this model's own."""
        write_model(self, Path(folder), weights or self.state_dict(), dtype)


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target): (..., V), (...) -> (...). Summed up and negated, this is a language model's whole loss."""
    return logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]


@torch.inference_mode()
def scores(gpt: GPT, ids: list[int], start: int, likeliest: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """How likely each of the M tokens ids[start:] is, given all before it, and what would have been likeliest there.

    log p (M,); the ids of the likeliest tokens at each place (M, likeliest), and their log p. All on the CPU, in fp32.
    """
    hidden = gpt.hidden(torch.tensor([ids], device=gpt.device))[0, start - 1:-1]               # (M, C)
    logits = gpt.logits(hidden)                                                                # (M, V)
    best = logits.float().log_softmax(-1).topk(likeliest)
    return logprobs(logits, torch.tensor(ids[start:], device=gpt.device)).cpu(), best.indices.cpu(), best.values.cpu()


# ---- training: rows end to end -------------------------------------------------------------------


class Packed:
    """Causal attention inside each of the spans of tokens that lie end to end in one packed row of N.

    A span also sees all of its prefix, the first tokens of spans before it (see `data.Span`): two replies to one prompt
    are computed with the prompt only once, and each gives it its gradient.
    """

    def __init__(self, spans):
        self.spans, self.masks = spans, {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        lengths = [span.tokens for span in self.spans]
        # split, not slices: the gradient of N-wide slices would be as many N-wide tensors of zeros
        q, k, v = (z.split(lengths, dim=2) for z in (q, k, v))                 # tuples of (1, H, T, D)
        mixed = []
        for i, span in enumerate(self.spans):
            if not span.prefix:
                mixed.append(causal_attention(layer, q[i], k[i], v[i], dropout))
                continue
            keys, values = (torch.cat([*(z[n][:, :, :tokens] for n, tokens in span.prefix), z[i]], dim=2)
                            for z in (k, v))
            if i not in self.masks:  # in the first layer, for all of them
                self.masks[i] = sees_up_to_itself(span.tokens, keys.shape[2], keys.device)
            mixed.append(mix(q[i], keys, values, self.masks[i], dropout))
        # joined as (1, N, H, D), which is how the next projection reads it: else all would be copied once more
        return torch.cat([y.transpose(1, 2) for y in mixed], dim=1).transpose(1, 2)


def sees_up_to_itself(queries: int, keys: int, device) -> Tensor:
    """Causal mask (queries, keys) for the last `queries` of `keys` positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


# ---- generation ----------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, in memory allocated once.

    `rows` prompts of different lengths are padded on the left (`pads` tokens each), so that all rows grow at the same
    place. The cache of a conversation can be passed to one `generate` after another: what the new ids share with the
    old from the start is not computed again.
    """

    def __init__(self, gpt: GPT, rows: int = 1, pads: list[int] | None = None, positions: int | None = None):
        c = gpt.config
        shape = (c.n_layer, rows, c.n_head, positions or c.n_positions, c.n_embd // c.n_head)
        self.keys = torch.empty(shape, device=gpt.device, dtype=gpt.wte.weight.dtype)
        self.values = torch.empty_like(self.keys)
        self.ids: list[int] = []  # the tokens of a single row, to find what a new prompt shares with them
        self.length = 0
        self.pads = None if not pads or not any(pads) else torch.tensor(pads, device=gpt.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        new, end = k.shape[2], self.length + k.shape[2]
        q, k, v = (z.to(self.keys.dtype) for z in (q, k, v))
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        if self.length == 0 and self.pads is None:  # a prompt: without a mask, the kernel skips what none may see
            return causal_attention(layer, q, k, v, dropout=0.0)
        k, v = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]    # (B, H, end, D)
        mask = None if new == 1 else sees_up_to_itself(new, end, k.device)
        if self.pads is not None:
            place = torch.arange(end, device=k.device)
            real = (place >= self.pads[:, None])[:, None, None]                # (B, 1, 1, end)
            itself = place == place[self.length:, None]  # a pad sees itself: a softmax over nothing would be NaN
            mask = real | itself if mask is None else mask & real | itself     # (B, 1, new, end)
        return mix(q, k, v, mask)

    @torch.inference_mode()
    def extend(self, gpt: GPT, tokens: Tensor) -> Tensor:
        """Run (B, t) new tokens behind those in the cache; logits of the last position, (B, V)."""
        positions = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)
        if self.pads is not None:
            positions = (positions - self.pads[:, None]).clamp(0, gpt.config.n_positions - 1)
        last = gpt.hidden(tokens, positions, self)[:, -1]                      # (B, C)
        self.length += tokens.shape[1]
        return gpt.logits(last)

    def shared(self, ids: list[int]) -> int:
        """How many of the first `ids` are here already; never all, for the last one's logits are wanted."""
        most = min(self.length, len(self.ids), len(ids) - 1)  # an interrupted extend() leaves ids that have no keys yet
        return next((i for i in range(most) if self.ids[i] != ids[i]), most)

    def continue_from(self, gpt: GPT, ids: list[int]) -> Tensor:
        """Logits (1, V) after `ids`, computing only what they do not share with the tokens already here."""
        self.length, self.ids = self.shared(ids), list(ids)
        return self.extend(gpt, torch.tensor([ids[self.length:]], device=gpt.device))


def choose(logits: Tensor, seen: list[int], temperature: float, top_k: int, top_p: float, min_p: float,
           repetition_penalty: float, generator: torch.Generator, stop: int | None = None) -> int:
    """Draw the next id from (V,) logits; a temperature of 0, or next to it, takes the likeliest."""
    logits = logits.float().cpu()
    if repetition_penalty != 1.0 and seen:
        # Keskar et al. 2019 (CTRL), section 4.1, divide a seen token's logit; where it is negative it is multiplied, as
        # in transformers. To stop is no repetition
        place = torch.tensor(sorted(set(seen) - {stop}), dtype=torch.long)
        logits = logits.clone()
        logits[place] = torch.where(logits[place] > 0, logits[place] / repetition_penalty,
                                    logits[place] * repetition_penalty)
    if temperature < 1e-6:  # logits divided by less may overflow, and one token has all the probability
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1:  # Holtzman et al. 2019: the smallest set of tokens whose probabilities add up to top_p
        ordered, place = probs.sort(descending=True)
        probs[place[1:][ordered.cumsum(0)[:-1] >= top_p]] = 0  # all whose betters suffice; never the likeliest
    if min_p > 0:  # tokens at least min_p times as likely as the likeliest
        probs[probs < min_p * probs.max()] = 0
    return int(torch.multinomial(probs, 1, generator=generator))


def generate(gpt: GPT, ids: list[int], max_new_tokens: int = 256, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int | None = None,
             stop: int | None = END_OF_TEXT, cache: KVCache | None = None) -> Iterator[int]:
    """Yield the ids that follow `ids`, one by one, until `stop` (not yielded) or max_new_tokens.

    Text may grow past the model's positions: the window then slides, see `window_start`.
    """
    if not ids:
        raise ValueError("generate needs at least one token to start from")
    if not 0 <= min(ids) <= max(ids) < gpt.config.vocab_size:
        raise ValueError(f"token ids must lie in 0..{gpt.config.vocab_size - 1}, got {min(ids)}..{max(ids)}")
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    ids, cache = list(ids), cache or KVCache(gpt)
    for _ in range(max_new_tokens):
        start = window_start(len(ids), gpt.config.n_positions)
        logits = cache.continue_from(gpt, ids[start:])                         # (1, V)
        token = choose(logits[0], ids, temperature, top_k, top_p, min_p, repetition_penalty, generator, stop)
        if token == stop:
            return
        yield token
        ids.append(token)


# ======== The same numbers, faster; files; the machine. A reader of the mathematics may stop here.

# ---- past the context ----------------------------------------------------------------------------


def window_start(length: int, positions: int) -> int:
    """Where the model's view of `length` tokens begins: at 0 while they fit, then in hops of half the context.

    A pure function of the length, so that generation with and without a cache see the same; a hop at a time, because
    every move of the window gives all tokens new positions, and the cache must be read anew.
    """
    hop = max(1, positions // 2)
    return max(0, math.ceil((length - positions) / hop)) * hop


# ---- log-probabilities without logits ------------------------------------------------------------


def head(gpt: GPT, hidden: Tensor) -> Tensor:
    """hidden wte^T, (..., C) to (..., V), by the fastest way there is."""
    if gpt.lm_head:
        return gpt.lm_head(hidden)
    if hidden.itemsize < 4:
        logits = wide_product(hidden.reshape(-1, hidden.shape[-1]), gpt.wte.weight.t())
        return logits.view(*hidden.shape[:-1], -1)
    return linear(hidden, gpt.wte.weight)


def head_logprobs(gpt: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """`logprobs(gpt.logits(hidden), targets)` without the logits: (M, C), (M,) to (M,)."""
    if isinstance(gpt.lm_head, SharedRows):
        return LogProbs.apply(hidden, gpt.lm_head.weight, gpt.lm_head.place[targets], gpt.lm_head.log_count)
    return LogProbs.apply(hidden, gpt.wte.weight, targets)


def head_total_logprob(gpt: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """The sum of `head_logprobs`: ()."""
    if gpt.wte.weight.requires_grad and torch.is_grad_enabled():
        return TotalLogProb.apply(hidden, gpt.wte.weight, targets)
    return head_logprobs(gpt, hidden, targets).sum()


def first_derivative_only() -> None:
    """Refuse a second derivative, which would be wrong: the backward passes below take for constant what they saved."""
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True. once_differentiable lets a sum's through
        raise RuntimeError("target_logprobs and total_logprob have no second derivative: "
                           "where one is needed, take logprobs(gpt(ids), targets)")


class LogProbs(torch.autograd.Function):
    """log softmax(hidden W^T) at the targets, in blocks of the vocabulary: (M, C), (V, C), (M,) -> (M,), in fp32.

    Neither the (M, V) logits nor their gradient ever exist. Two tricks. The softmax is taken online (Milakov and
    Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3): a running maximum and sum, rescaled when a block
    holds a larger logit. And d log p / d hidden = W[target] - softmax W is summed up on the way, as FlashAttention sums
    up its values, so a frozen head (LoRA) costs no second pass. A head that learns computes its logits once more in the
    backward pass, which knows how much each target counts. Products are taken in the working precision, sums over them
    in fp32. A row of a frozen head may stand for several equal ones, whose numbers' logarithms are `log_count` (V,).
    """

    BLOCK = 4096  # logits of a few hundred targets stay in a CPU's cache, and each row of W is read once

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, log_count: Tensor | None = None) -> Tensor:
        working, wide = LogProbs.precisions(weight)
        h, head = hidden.to(working), centred(weight, working)
        top = torch.full_like(targets, -math.inf, dtype=wide)                               # (M,)
        total, mean = torch.zeros_like(top), torch.zeros_like(hidden, dtype=wide)           # (M,), (M, C)
        for start, rows in zip(range(0, len(head), LogProbs.BLOCK), head.split(LogProbs.BLOCK), strict=True):
            logits = wide_product(rows, h.t())                                              # (block, M)
            rounded, logits = logits.dtype, logits.to(wide)
            if log_count is not None:
                logits.add_(log_count[start:start + LogProbs.BLOCK, None])
            higher = torch.maximum(top, logits.amax(0))
            rescale, likelihood = (top - higher).exp(), logits.sub_(higher).exp_()
            total = total * rescale + likelihood.sum(0)
            if ctx.needs_input_grad[0]:
                mean = mean * rescale[:, None] + likelihood.to(working).t() @ rows
            top = higher
        chosen = head[targets].to(wide)                                                     # (M, C)
        logsumexp = top + total.log()                                                       # (M,)
        ctx.save_for_backward(hidden, weight, targets, logsumexp, chosen - mean / total[:, None])
        ctx.working = working
        # rounded as its twin among the logits was, or the two errors would not cancel and p could exceed 1
        own = (h * chosen).sum(1).to(rounded).to(wide)                                      # (M,)
        return own - logsumexp

    @staticmethod
    def backward(ctx, grad: Tensor):
        first_derivative_only()
        hidden, weight, targets, logsumexp, slope = ctx.saved_tensors
        grad_hidden, grad_weight = (grad[:, None] * slope).to(hidden.dtype), None
        if ctx.needs_input_grad[1]:
            h, head, grad_weight = hidden.to(ctx.working), centred(weight, ctx.working), torch.empty_like(weight)
            scaled = h * grad[:, None].to(h.dtype)                                          # (M, C)
            for rows, grad_rows in zip(head.split(LogProbs.BLOCK), grad_weight.split(LogProbs.BLOCK), strict=True):
                logits = wide_product(rows, h.t()).to(logsumexp.dtype)                       # (block, M)
                softmax = logits.sub_(logsumexp).exp_()
                grad_rows.copy_(-softmax.to(h.dtype) @ scaled)
            grad_weight.index_add_(0, targets, scaled.to(weight.dtype))
        return grad_hidden, grad_weight, None, None

    @staticmethod
    def precisions(weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Of products, as autocast has it, and of sums over them."""
        device = weight.device.type
        working = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return working, torch.promote_types(working, torch.float32)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b; on CUDA in fp32 also from bf16 factors, for probabilities want more digits than bf16 has."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.itemsize < 4 else a @ b


def centred(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """wte as the head reads it in fewer digits: without the mean of its rows, which adds the same to every logit.

    That changes no probability. But numbers near -100, where OpenAI's logits lie, are 0.5 apart in bf16.
    """
    if dtype == weight.dtype:
        return weight
    return torch.sub(weight, weight.mean(0), out=torch.empty_like(weight, dtype=dtype))


class TotalLogProb(torch.autograd.Function):
    """The sum of `LogProbs` over all targets under a head that learns: (M, C), (V, C), (M,) -> (), in fp32.

    In a sum all targets count alike, so both gradients are known but for a factor as soon as the logits are, and these
    need not be computed again (Hsu et al. 2024, https://arxiv.org/abs/2410.10989, as FusedLinearCrossEntropy):
    d sum / d logits = 1[v = target] - softmax, a thousand targets at a time.
    """

    ROWS = 1024  # 200 MB of GPT-2's logits in fp32; fewer rows make slower products

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        working, wide = LogProbs.precisions(weight)
        head, total = centred(weight, working), torch.zeros((), dtype=wide, device=weight.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        parts = (x.split(TotalLogProb.ROWS) for x in (hidden.to(working), targets, grad_hidden))
        for h, target, grad_h in zip(*parts, strict=True):
            logits = wide_product(head, h.t()).to(wide)                                      # (V, rows)
            logits -= logits.amax(0)
            own = logits.gather(0, target[None])                                            # (1, rows)
            odds = logits.exp_()
            normaliser = odds.sum(0)
            total += (own - normaliser.log()).sum()
            error = odds.div_(-normaliser).scatter_add_(0, target[None], torch.ones_like(own)).to(working)
            grad_h.copy_(error.t() @ head)
            grad = (error @ h).to(weight.dtype)                                             # (V, C)
            grad_weight = grad if grad_weight is None else grad_weight.add_(grad)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        first_derivative_only()
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad * grad_hidden, grad * grad_weight, None


class SharedRows(nn.Module):
    """A frozen head whose equal rows are computed once: n equal logits weigh as one plus log n."""

    def __init__(self, weight: Tensor, place: Tensor, count: Tensor):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)                            # (rows, C), all different
        self.register_buffer("place", place, persistent=False)                              # (V,): the row of each word
        self.register_buffer("log_count", count.to(weight).log(), persistent=False)         # (rows,)

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight)[..., self.place]


def share_equal_rows(gpt: GPT) -> None:
    """Give a frozen head a copy without repetitions, if half of its rows are some.

    All the words that a small base model never met share one row (see sample/make.py). OpenAI's rows are all different,
    and for those this does nothing.
    """
    weight = gpt.wte.weight.detach()
    guess = (weight * torch.linspace(1, 2, weight.shape[1], device=weight.device).sin()).sum(1, dtype=torch.double)
    _, place, count = guess.unique(return_inverse=True, return_counts=True)
    first = torch.zeros_like(count).scatter_(0, place, torch.arange(len(weight), device=place.device))
    if len(count) < len(weight) / 2 and torch.equal(weight[first][place], weight):  # equal sums may be of other rows
        gpt.lm_head = SharedRows(weight[first], place, count)


# ---- what a CPU does sooner ----------------------------------------------------------------------


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
        causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, H, T, D): PyTorch's fused attention.

    On a CPU bf16 goes by way of fp32, whose kernel is as fast for long texts, takes two fifths of the time for short
    ones and a third for one query, and rounds less.
    """
    if q.device.type == "cpu" and q.itemsize < 4 and q.shape[2] <= 256:
        training = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
        with training:
            return mix(q.float(), k.float(), v.float(), mask, dropout, causal).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose gain and bias get the same gradient, bit for bit, from any number of threads."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.weight.requires_grad and torch.is_grad_enabled():
            return NormByTokens.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class NormByTokens(torch.autograd.Function):
    """The layer norm of (.., C); PyTorch's own gradient of gain and bias sums up by thread, this one by token."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # as autocast has it for norms
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, bias, mean, scale = ctx.saved_tensors
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, mean, scale, weight, bias,
                                                                 [True, False, False])
        normal = ((x - mean) * scale).mul_(grad)
        return grad_x, normal.flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; of few rows, which is what generation has, as W x^T on all of a CPU's cores: (..., in) to (..., out).

    For few columns MKL is faster at W x^T than at x W^T for few rows: of GPT-2's, 4 take a third of the time, 64 three
    quarters. But it leaves a single column to one core, which cannot read W as fast as the memory gives it. As a batch
    of smaller products, the rows of W dealt out to the cores, all of them read.
    """
    rows, parts = x.numel() // weight.shape[1], torch.get_num_threads()
    few = 0 < rows <= weight.shape[1] // 6  # of more, y takes longer to turn around than the product gains
    mkl = (x.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
           and torch.backends.mkl.is_available())
    if torch.is_grad_enabled() or not (few and mkl):
        return F.linear(x, weight, bias)
    share, columns = len(weight) // parts, x.reshape(rows, -1).t()                                  # (in, rows)
    y = torch.bmm(weight[:share * parts].unflatten(0, (parts, share)), columns.expand(parts, -1, -1)).flatten(0, 1)
    if len(y) < len(weight):
        y = torch.cat([y, weight[share * parts:] @ columns])
    y = y.t().contiguous().view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


# ---- many prompts at once ------------------------------------------------------------------------


def generate_batch(gpt: GPT, prompts: list[list[int]], max_new_tokens: int, stop: int = END_OF_TEXT,
                   rows: int = 128, cached: int = 16384, advance=lambda prompts: None) -> list[list[int]]:
    """The likeliest continuation of every prompt, many at a time; one that ended by itself ends with `stop`.

    The window does not slide here: a reply also ends where prompt and reply fill the model's positions, with a
    last token that none is predicted from. At once go at most `rows` prompts, and so many that the cache has `cached`
    positions for all of them together. advance is told how many more are done: after each token, a share of those at
    work.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while longest_first:
        longest = len(prompts[longest_first[0]])
        fitting = max(1, min(rows, cached // (longest + max_new_tokens)))
        group, longest_first = longest_first[:fitting], longest_first[fitting:]
        if longest > gpt.config.n_positions:
            raise ValueError(f"a prompt of {longest} tokens exceeds the model's {gpt.config.n_positions} positions")
        pads = [longest - len(prompts[i]) for i in group]
        cache = KVCache(gpt, len(group), pads, positions=longest + max_new_tokens)
        tokens = torch.tensor([prompts[i][:1] * pad + prompts[i] for i, pad in zip(group, pads, strict=True)])
        going = torch.ones(len(group), dtype=torch.bool)
        for done in range(1, max_new_tokens + 1):
            tokens = cache.extend(gpt, tokens.to(gpt.device)).argmax(-1).cpu()[:, None]    # (B, 1)
            advance(len(group) / max_new_tokens)
            for row in going.nonzero()[:, 0].tolist():
                replies[group[row]].append(int(tokens[row, 0]))
            going &= (tokens[:, 0] != stop) & (cache.length - torch.tensor(pads) < gpt.config.n_positions)
            if not going.any():
                advance(len(group) * (1 - done / max_new_tokens))
                break
    return replies


# ---- fewer digits, for generation ----------------------------------------------------------------


@torch.no_grad()
def for_generation(gpt: GPT, precision: str) -> GPT:
    """The model in fp32, or with its large matrices rounded to bf16 or int8, which are read sooner: not to be trained.

    The residual stream and the norms stay in fp32, as in training: GPT-2's stream has a few values hundreds of
    times as large as the others. Raises ValueError for int8 on anything but a CPU.
    """
    if precision == "int8" and gpt.device.type != "cpu":
        raise ValueError("--precision int8 is for the CPU: elsewhere use bf16, or --device cpu")
    if precision in ("bf16", "int8"):
        layer_of = Int8Linear if precision == "int8" else Bf16Linear
        for part in [half for block in gpt.h for half in (block.attn, block.mlp)]:
            for name, layer in list(part.named_children()):
                setattr(part, name, layer_of(layer.weight, layer.bias))
        mean = gpt.wte.weight.mean(0)
        centred = layer_of(gpt.wte.weight - mean)
        gpt.lm_head = CentredHead(centred, mean)
        gpt.wte.weight = nn.Parameter(centred.weight if precision == "bf16" else (gpt.wte.weight - mean).bfloat16())
        gpt.wpe.weight += mean
    return gpt.eval()


class CentredHead(nn.Module):
    """A head in few digits, see `centred`; what that leaves out is added in fp32: logits are what they are."""

    def __init__(self, product: nn.Module, mean: Tensor):
        super().__init__()
        self.product = product
        self.register_buffer("mean", mean)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.product(hidden).float() + (hidden.float() @ self.mean)[..., None]


class Bf16Linear(nn.Module):
    """A linear layer in bf16; on CUDA what comes out has fp32's digits."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight.bfloat16())
        self.register_buffer("bias", bias if bias is None else bias.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if not x.is_cuda:
            return F.linear(x, self.weight, self.bias)
        y = wide_product(x.flatten(0, -2), self.weight.t()).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale for each output: W[o] = scale[o] * int8[o], rounded.

    To generate a token is to read all weights once, and memory is what limits it: int8 is a quarter of fp32's bytes.
    Absmax by row is the simplest scheme there is (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2.1).
    Activations are not quantised: GPT-2's have outliers, which would coarsen all the rest.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127                    # (out,)
        self.register_buffer("int8", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("one", torch.ones(len(scale), dtype=torch.bfloat16, device=scale.device))
        self.register_buffer("bias", torch.zeros_like(scale) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)                                                # (rows, in)
        # the kernel reads 16 columns at a time, past the end of other widths, and is fast for bf16 activations alone
        if x.device.type == "cpu" and len(rows) <= 8 and rows.shape[1] % 16 == 0:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.int8, self.one)
        else:  # a prompt: arithmetic is what limits it, so the weight becomes a matrix once for all rows
            y = linear(rows, self.int8.to(x.dtype))
        y = torch.addcmul(self.bias, y, self.scale)                            # what the kernel rounds is y alone
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


# ---- weights in and out --------------------------------------------------------------------------

SAMPLE = Path(__file__).parent / "sample" / "model"  # the bundled base model
HUB = "openai-community"  # where OpenAI's four are on the Hugging Face Hub
PATIENCE = 10  # seconds that the Hub has to answer the first question
HUB_FILES = ("config.json", "model.safetensors")  # of each; the others are the same weights once more


def find_model(spec: str) -> Path:
    """The folder of a model: the bundled one, OpenAI's (fetched from the Hub once), or one's own. Computes nothing."""
    check_model(spec)
    if Path(spec, "config.json").is_file():
        return Path(spec)
    return SAMPLE if spec == "sample" else _from_hub(size_of(spec))


def size_of(spec: str) -> str:
    """Which of OpenAI's four a name means, "" if none: gpt2 is also openai-community/gpt2 and gpt2-small."""
    name = spec.removeprefix(f"{HUB}/")
    return name if name in SIZES else "gpt2" if name == "gpt2-small" else ""


def check_model(spec: str) -> None:
    """Refuse a `--model` that can be seen to be none, with the reason and the next command; asks no network."""
    folder = Path(spec)
    if (folder / "config.json").is_file():
        read_config(folder)
    if (folder / "config.json").is_file() or spec == "sample" or (size_of(spec) and not folder.is_dir()):
        return
    if (folder / "adapter_config.json").is_file():
        why = "it holds adapters, not a model.\nGive the model they were trained on as --model, and these as --adapter"
    elif (folder / "run.json").is_file():
        why = "its run is not finished.\nRun its command again: it goes on from the newest checkpoint"
    elif folder.is_dir():
        why = "it has no config.json"
    else:
        near = difflib.get_close_matches(spec.rpartition("/")[2], ["sample", *SIZES], n=1)
        why = f"there is no such folder in {Path.cwd()}" + (f"; did you mean {near[0]}?" if near else "")
    raise FileNotFoundError(f"no model in '{spec}': {why}\nWanted: sample, {', '.join(SIZES)}, or the folder of a "
                            "model (with its config.json).\nTo train one: uv run sft.py")


def read_model(folder: Path) -> GPT:
    """The model of a folder in transformers' format, in fp32."""
    config, weights = read_config(folder), read_weights(folder)
    if config.n_layer > len(weights):
        raise ValueError(f"{folder / 'config.json'} asks for {config.n_layer:,} layers, of which there are no weights")
    with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
        gpt = GPT(config)
    gpt.load_state_dict(_from_transformers(weights, gpt, folder), assign=True)
    return gpt.requires_grad_(True)


def write_model(gpt: GPT, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    with torch.device("meta"):
        strangers = sorted(weights.keys() ^ GPT(gpt.config).state_dict().keys())
    if strangers:
        remedy = "fold its adapters in first: lora.merge(gpt), or save_pretrained(folder, lora.merged_weights(gpt))"
        raise ValueError(f"'{strangers[0]}' is not as in a GPT-2, and other tools would begin it at random: "
                         + (remedy if ".lora_" in " ".join(strangers) else "save the model that this one was made of"))
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"transformer.{name}": (w.t() if _is_conv1d(name) else w).to("cpu", dtype).contiguous()
               for name, w in weights.items()}
    temporary = folder / ".model.safetensors.tmp"
    try:
        save_file(weights, temporary, metadata={"format": "pt"})
        (folder / "config.json").unlink(missing_ok=True)  # by which a folder opens: new weights never meet an old one
        os.replace(temporary, folder / "model.safetensors")
    finally:
        temporary.unlink(missing_ok=True)
    about = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
             **asdict(gpt.config), "n_ctx": gpt.config.n_positions, "n_inner": None, "tie_word_embeddings": True,
             "bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "dtype": str(dtype).removeprefix("torch.")}
    generation = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def read_config(folder: Path) -> GPTConfig:
    path = folder / "config.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise TypeError("it holds no settings")
        config = GPTConfig(**{k: about[k] for k in GPTConfig.__dataclass_fields__ if k in about})
        for key, value in asdict(config).items():
            if type(value) is not type(getattr(GPTConfig, key)) or not 0 < value < 2**24:
                raise ValueError(f"{key} is {value!r}")
    except (ValueError, TypeError, RecursionError) as error:
        reason = _pointer(path) or error
        raise ValueError(f"{path} is not a model's configuration: {reason}{fetch_again(path)}") from None
    wanted = {"model_type": "gpt2", "activation_function": "gelu_new", "n_inner": (None, 4 * config.n_embd),
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, allowed in wanted.items():
        if about.get(key, allowed) != allowed and about.get(key) not in (allowed if isinstance(allowed, tuple) else ()):
            raise ValueError(f"{path}: {key} is {about[key]!r}, GPT-2 has {allowed!r}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's model.safetensors, or of the shards that its index names."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():  # transformers too takes the single file first
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{index} is damaged: it has no weight_map from weights to files") from None
    weights: dict[str, Tensor] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            pickled = next((f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")), None)
            reason = f": {pickled} is a pickle, which can run code when it is read; save it again with transformers' " \
                     "save_pretrained, which writes safetensors" if pickled else \
                     ".\nIf it was downloaded, that broke off: the same command again goes on"
            raise FileNotFoundError(f"'{folder}' has no {name}{reason}")
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {_pointer(file) or error}{fetch_again(file)}") from None
    return weights


def fetch_again(file: Path) -> str:
    """How to get a damaged file once more; the Hub's cache holds links to the files themselves."""
    fetched = f"Delete it, and it is fetched again: {file.resolve()}"
    return "\n" + (fetched if file.is_symlink() else "Copy or download it once more")


def _pointer(file: Path) -> str:
    """What to say of a file that git-lfs left a few lines of text in the place of."""
    is_one = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
    return "it is a git-lfs pointer, not the file itself; in its repository: git lfs pull" if is_one else ""


def _from_transformers(weights: dict[str, Tensor], gpt: GPT, source: Path) -> dict[str, Tensor]:
    """Our names and orientation, in fp32; says which key is missing or which shape is off."""
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    head, own = weights.pop("lm_head.weight", None), {}
    for name, want in gpt.state_dict().items():
        if name not in weights:
            near = ", ".join(list(weights)[:3])
            raise ValueError(f"{source} is not a GPT-2: it has no weight '{name}' (its first keys: {near})")
        w = weights[name].t() if _is_conv1d(name) and weights[name].dim() == 2 else weights[name]
        if w.shape != want.shape:
            raise ValueError(f"{source}: weight '{name}' has shape {tuple(weights[name].shape)}, "
                             f"config.json asks for {tuple(want.t().shape if _is_conv1d(name) else want.shape)}")
        # a copy: load_file maps the file, and what is written over it later must not reach the model
        own[name] = w.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not all(map(math.isfinite, own[name].aminmax())):
            raise ValueError(f"{source}: weight '{name}' has numbers that are not finite: this model is of no use.\n"
                             "Take the one it was made from, or an earlier copy of it")
    unknown = [n for n in weights if n not in own and not n.endswith((".attn.bias", ".attn.masked_bias"))]
    if unknown:
        raise ValueError(f"{source} has a weight that GPT-2 does not have: '{unknown[0]}'")
    if head is not None and not torch.equal(head.float(), own["wte.weight"]):
        raise ValueError(f"{source}: lm_head.weight differs from wte.weight, but GPT-2 ties the two")
    return own


def _is_conv1d(name: str) -> bool:
    """transformers keeps GPT-2's four projections as OpenAI's Conv1D, whose weight is (in, out): ours is (out, in)."""
    return name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith(".weight")


def _from_hub(name: str) -> Path:
    """The folder in the Hub's cache with OpenAI's model of this name, fetched where it is not there yet.

    What is there is taken without a question: these files never change, and a Hub that is ill stops no run.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars, logging
    from transformers.utils import cached_file

    logging.set_verbosity_error()  # what goes wrong is told below
    repo = f"{HUB}/{name}"
    files = [try_to_load_from_cache(repo, file) for file in HUB_FILES]
    if all(isinstance(file, str) for file in files):
        return Path(files[0]).parent
    try:
        if not constants.HF_HUB_OFFLINE:  # asked once and with an end: the library would ask again for minutes
            print(f"fetching {repo} from {constants.ENDPOINT} ...", file=sys.stderr, flush=True)
            if not get_hf_file_metadata(hf_hub_url(repo, HUB_FILES[0]), timeout=PATIENCE).commit_hash:
                raise OSError("what answers is not the Hub: a login page or a proxy may be in between")
        if not sys.stderr.isatty():
            disable_progress_bars()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space")  # now, not when the disk is full
            files = [cached_file(repo, file) for file in HUB_FILES]
    except Exception as error:  # its causes are told by who shows it
        raise FileNotFoundError(
            f"OpenAI's {name} is not in {constants.HF_HUB_CACHE}, and the Hugging Face Hub did not give it.\n"
            f"Where there is a network: uv run hf download {repo} {' '.join(HUB_FILES)} --local-dir {name}\n"
            f"then copy the folder here and give --model {name}; or use the bundled --model sample") from error
    return Path(files[0]).parent


# ---- the machine ---------------------------------------------------------------------------------


def pick_device(wanted: str = "auto") -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    else:
        try:
            if torch.device(wanted).type not in ("cuda", "mps", "cpu"):
                raise RuntimeError("wanted: cuda, mps or cpu")
            torch.empty(0, device=wanted)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {wanted} cannot be used here: {str(error).splitlines()[0]}") from None
    if wanted == "cuda":
        # which Hopper would take: it plans anew for every length, and each conversation has another
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(wanted)


def pick_precision(wanted: str, device: torch.device, small: bool = False) -> str:
    """auto: bf16 where the hardware multiplies in it; elsewhere it is several times slower than fp32.

    small: work of few products, which are bf16's gain, and many small calls, which it adds to. GPT2_CHAT_BF16=0 or =1
    in the environment says what a CPU is taken for, so that either kind can be tested on the other.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    fast = device.type == "cpu" and bool(int(os.environ.get("GPT2_CHAT_BF16", has_units)))
    return "bf16" if fast and not small else "fp32"


class Cores:
    """What is remembered between two looks at the machine."""

    most = 0                # threads, if the machine is ours alone
    looked = idle = own = 0.0   # seconds: when, and until then the machine's idle time and ours on the CPU


def leave_busy_cores() -> None:
    """Twice a second, take as many threads as there are cores that others leave to us.

    The threads of a product wait for one another thousands of times a second, awake. If one has to share its core with
    another program, all wait for its turns: on two cores, beside one busy program, training went on at a thirtieth of
    its speed. One thread and two give the same numbers, bit for bit (see MKL_CBWR in data.py). OMP_NUM_THREADS, if set,
    is obeyed instead.
    """
    now = time.monotonic()
    if now - Cores.looked < 0.5 or "OMP_NUM_THREADS" in os.environ:
        return
    times, own = psutil.cpu_times(), time.process_time()
    idle = times.idle + getattr(times, "iowait", 0.0)
    if not Cores.looked:
        Cores.most = torch.get_num_threads()
    elif Cores.most > 1:
        free = (idle - Cores.idle + own - Cores.own) / (now - Cores.looked)     # cores, on average since the last look
        threads = max(1, min(Cores.most, int(free + 0.25)))
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    Cores.looked, Cores.idle, Cores.own = now, idle, own


def memory_estimate(gpt: GPT, tokens: int, context: int, dtype: torch.dtype, shards: int = 1) -> int:
    """Bytes at the peak of a training step: weights, gradients, AdamW's moments, activations, one block of logits.

    tokens: computed at once. context: of one row. dtype: of the products. shards: processes that share the weights.
    """
    c, width = gpt.config, dtype.itemsize
    learning = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in gpt.parameters())
    head_learns = gpt.wte.weight.requires_grad
    if width < 4 and head_learns:
        weights += sum(p.numel() for p in gpt.parameters()) * width  # autocast's copies
    # kept for the backward pass, in widths of the model: inputs and outputs of two norms, q k v, attention's output,
    # the MLP's 4C before and after GELU, the residual stream, and what the adapters read
    layer = 4 if gpt.recompute_activations else 19 * width + 8
    per_token = (19 * width + 4) * c.n_embd + (c.n_layer - 1) * c.n_embd * layer
    if gpt.device.type == "mps":  # its fused attention is for inference: in training, the weights of each pair are kept
        per_token += c.n_head * context * width * (1 if gpt.recompute_activations else c.n_layer)
    block = 3 * tokens * LogProbs.BLOCK * 4  # logits as they come, as fp32, and what the next product reads
    gradient = 0
    if head_learns:  # its gradient before and after it is scaled, and logits in two precisions
        block = max(block, 2 * min(tokens, TotalLogProb.ROWS) * c.vocab_size * 4)
        gradient = 2 * c.vocab_size * c.n_embd * 4
    return int((weights + 12 * learning) / shards + tokens * per_token + block + gradient)


def memory_taken(device: torch.device) -> int:
    """Bytes that this process has by now of the memory that the device computes in: with a CPU, Python and PyTorch."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def memory_free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest so far: of a GPU's memory what PyTorch took, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:  # Windows
        return 0
