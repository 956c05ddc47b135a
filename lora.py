"""LoRA: a frozen layer learns through two small matrices beside it (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    h = W x + b + s B A dropout(x),    A (r, in) random, B (out, r) zero, s = alpha / r        (equation 3)

A fresh adapter changes nothing, since B is zero, and a trained one can be folded into W and cost nothing. The layer
is wrapped, not subclassed: a model never learns that adapters exist. Files are PEFT's, in and out.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ("c_attn", "c_proj", "c_fc")  # all four projections of a GPT-2 block: c_proj stands in both of its halves


class LoRALinear(nn.Module):
    """An nn.Linear that is frozen, with a low-rank update beside it that learns."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"a LoRA's rank is at least 1, got {rank}")
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # alpha / sqrt(r) keeps the update's size as r grows: Kalajdzievski 2023 (rsLoRA), https://arxiv.org/abs/2312.03732
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout = dropout
        self.enabled = True
        self.training = base.training  # wrapped in an eval()'d model, it does not drop either

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x.to(self.base.weight.dtype))                            # (..., out); a frozen base may be bf16
        if not self.enabled:
            return y
        down = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)                # (..., r)
        # not F.linear: of a B^T that lies by rows, a CPU's thin products take a half, and its gradient's a quarter
        return y + self.scale * down @ self.lora_B.t().contiguous()

    def merged(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """W + s B A, (out, in), summed up in fp32."""
        return weight.float() + self.scale * lora_B @ lora_A


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The wrapped layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_adapters(model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, rslora: bool = False,
                 targets: tuple[str, ...] = TARGETS) -> None:
    """Freeze the model and wrap every nn.Linear whose name ends in one of `targets` ("c_attn", or "h.0.attn.c_attn").

    Raises ValueError for a target that matches no nn.Linear, and for a model that has adapters already.
    """
    _refuse_second(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {target: [n for n in linear if n == target or n.endswith("." + target)] for target in targets}
    for target, names in chosen.items():
        if not names:
            have = sorted({name.split(".")[-1] for name in linear})
            raise ValueError(f"LoRA target '{target}' matches no nn.Linear of this model: it has {', '.join(have)}")
    model.requires_grad_(False)
    for name in dict.fromkeys(name for names in chosen.values() for name in names):
        _put(model, name, LoRALinear(linear[name], rank, alpha, dropout, rslora))


def _refuse_second(model: nn.Module) -> None:
    if adapters(model):
        raise ValueError("this model has LoRA adapters already: merge() them before adding others")


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the one from before the adapters: DPO's reference policy, without a second model."""
    wrapped = adapters(model).values()
    before = [layer.enabled for layer in wrapped]
    try:
        for layer in wrapped:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(wrapped, before, strict=True):
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Fold every adapter into its layer, which stands alone again; returns what was folded in: {layer: (A, s B)}."""
    merged = {}
    for name, layer in adapters(model).items():
        layer.base.weight.copy_(layer.merged(layer.base.weight, layer.lora_A, layer.lora_B))
        _put(model, name, layer.base)
        merged[name] = layer.lora_A.detach(), layer.scale * layer.lora_B.detach()
    return merged


def merged_weights(model: nn.Module, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict that the model would have after merge(), while its adapters stay as they are.

    `weights` stands in for the model's own state dict, where that is spread over several processes.
    """
    weights = dict(weights or model.state_dict())
    for name, layer in adapters(model).items():
        lora_A, lora_B = weights.pop(f"{name}.lora_A"), weights.pop(f"{name}.lora_B")
        weights[f"{name}.weight"] = layer.merged(weights.pop(f"{name}.base.weight"), lora_A, lora_B).detach()
        if layer.base.bias is not None:
            weights[f"{name}.bias"] = weights.pop(f"{name}.base.bias")
    return weights


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# ---- PEFT's files --------------------------------------------------------------------------------
#
# PEFT wraps transformers' Conv1D, whose weight is transposed ("fan_in_fan_out"), but its own A and B are the same way
# round as here, so only the names differ.

PEFT_PREFIX = "base_model.model.transformer."


def save_adapters(model: nn.Module, folder: str | Path, base_model: str, weights: dict[str, Tensor] | None = None,
                  merged: dict[str, tuple[Tensor, Tensor]] | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PeftModel.from_pretrained reads them.

    `base_model` is the folder or Hub name that they belong to; `weights` stands in for this model's own state dict.
    `merged` was folded into the base before (see `merge`): s B A + s' B' A' = [s B, s' B'] [A; A'] is one adapter.
    """
    wrapped, weights = adapters(model), weights or model.state_dict()
    if not wrapped:
        raise ValueError("this model has no LoRA adapters to save")
    pairs = {name: (weights[f"{name}.lora_A"], weights[f"{name}.lora_B"], layer.scale)
             for name, layer in wrapped.items()}
    for name, (lora_A, lora_B) in (merged or {}).items():
        A, B, scale = pairs.get(name, (lora_A[:0], lora_B[:, :0], 1.0))
        pairs[name] = torch.cat([A.cpu(), lora_A.cpu()]), torch.cat([scale * B.cpu(), lora_B.cpu()], dim=1), 1.0
    ranks = {name: len(A) for name, (A, _, _) in sorted(pairs.items())}
    alphas = {name: pairs[name][2] * rank for name, rank in ranks.items()}
    rank, alpha = max(ranks.values()), max(alphas.values())
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model), "r": rank,
             "lora_alpha": alpha, "lora_dropout": next(iter(wrapped.values())).dropout, "use_rslora": False,
             "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
             "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
             "bias": "none", "fan_in_fan_out": True, "inference_mode": True, "target_modules": list(ranks)}
    tensors = {f"{PEFT_PREFIX}{name}.{part}.weight": tensor.detach().float().cpu().contiguous()
               for name, pair in pairs.items() for part, tensor in zip(("lora_A", "lora_B"), pair[:2], strict=True)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")


# The settings of PEFT 0.21's LoraConfig that leave plain LoRA what it is. Some chose the layers, which the names of the
# tensors tell; some began the training, and left the base alone (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it).
# Any other setting, and any that PEFT will have next year, is refused unless it is off.
APPLIED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
WITHOUT_EFFECT = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
                  "eva_config", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
                  "peft_version", "megatron_core", "qalora_group_size"}
PLAIN = {"peft_type": ("LORA",), "bias": ("none",),
         "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica")}


def merge_adapters(model: nn.Module, folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Fold somebody's PEFT adapters into the model that they were trained on; returns them, as `merge` does."""
    load_adapters(model, folder)
    merged = merge(model)
    model.requires_grad_(True)
    return merged


@torch.no_grad()
def load_adapters(model: nn.Module, folder: str | Path) -> None:
    """Wrap the model's layers as a PEFT folder says, and fill in its adapters.

    Raises ValueError, before anything is wrapped, for whatever is not plain LoRA or does not fit this model.
    """
    _refuse_second(model)
    about, tensors = _read_peft(Path(folder))
    for key, value in about.items():
        if key not in APPLIED | WITHOUT_EFFECT and value and value not in PLAIN.get(key, ()):
            raise ValueError(f"'{folder}': {key} = {value!r} is not plain LoRA, which is all that is read here")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = {key.removeprefix("base_model.model.").removesuffix(".weight"): tensor for key, tensor in tensors.items()}
    inside = "transformer." * any(key.startswith("transformer.") for key in tensors)  # not of a bare GPT2Model
    tensors = {key.removeprefix(inside): tensor for key, tensor in tensors.items()}
    names = sorted({name.partition(".lora_")[0] for name in tensors})
    trained_on = f".\nIt was trained on {about.get('base_model_name_or_path') or 'a model without a name'}: see --model"
    if not names:
        raise ValueError(f"'{folder}' is not a PEFT adapter: it has no lora_A and lora_B")
    if strangers := [name for name in names if name not in linear]:
        raise ValueError(f"'{folder}' adapts '{strangers[0]}', which this model does not have{trained_on}")
    try:
        rank = {name: int(_setting(about, "r", "rank_pattern", inside + name)) for name in names}
        alpha = {name: float(_setting(about, "lora_alpha", "alpha_pattern", inside + name)) for name in names}
        dropout = float(about.get("lora_dropout") or 0.0)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(f"'{folder}' is not a readable PEFT adapter: {error}") from None
    shapes = {f"{name}.lora_A": (rank[name], linear[name].in_features) for name in names}
    shapes |= {f"{name}.lora_B": (linear[name].out_features, rank[name]) for name in names}
    for key in sorted(shapes.keys() | tensors.keys()):
        if key not in tensors:
            raise ValueError(f"'{folder}' is not a whole PEFT adapter: it has no {key}")
        if key not in shapes:
            raise ValueError(f"'{folder}' holds '{key}', which is not plain LoRA, which is all that is read here")
        if tensors[key].shape != shapes[key]:
            raise ValueError(f"'{folder}': {key} has shape {tuple(tensors[key].shape)}, this model needs {shapes[key]}"
                             + trained_on)
        if not (alpha[key.rpartition(".")[0]] * tensors[key].float()).isfinite().all():
            raise ValueError(f"'{folder}': {key} of this adapter has numbers that are not finite: it is of no use")
    model.requires_grad_(False)
    for name in names:
        layer = LoRALinear(linear[name], rank[name], alpha[name], dropout, bool(about.get("use_rslora")))
        layer.lora_A.copy_(tensors[f"{name}.lora_A"])
        layer.lora_B.copy_(tensors[f"{name}.lora_B"])
        _put(model, name, layer)


def _setting(about: dict, key: str, pattern: str, name: str) -> float:
    """Of a layer: that of the first pattern which its name ends with, as PEFT matches them, or else the usual one."""
    return next((value for end, value in (about.get(pattern) or {}).items()
                 if re.match(rf"(.*\.)?({end})$", name)), about[key])


def _read_peft(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The settings and the tensors of a folder, as PEFT wrote them."""
    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if about["peft_type"] not in PLAIN["peft_type"]:     # the others have no r
            raise ValueError(f"peft_type = {about['peft_type']!r} is not plain LoRA, which is all that is read here")
        int(about["r"]), float(about["lora_alpha"])
        return about, load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        missing = Path(error.filename or "adapter_model.safetensors").name
        pickled = (": adapter_model.bin is a pickle, which can run code when it is read; save it again with PEFT"
                   if (folder / "adapter_model.bin").is_file() else "")
        raise FileNotFoundError(f"'{folder}' is not a PEFT adapter: it has no {missing}{pickled}") from None
    except KeyError as error:
        raise ValueError(f"'{folder}' is not a readable PEFT adapter: adapter_config.json has no {error}") from None
    except (ValueError, TypeError, SafetensorError) as error:
        pointers = [file.name for file in folder.iterdir() if file.is_file() and file.stat().st_size < 1024
                    and file.read_bytes().startswith(b"version https://git-lfs")]
        why = f"{pointers[0]} is a git-lfs pointer, so fetch the file:  git lfs pull" if pointers else error
        raise ValueError(f"'{folder}' is not a readable PEFT adapter: {why}") from None


def base_of(folder: str | Path) -> str:
    """The model that a PEFT folder names: as it does, or its path seen from here or from a folder above it."""
    base = _read_peft(Path(folder))[0].get("base_model_name_or_path") or ""
    places = (place / base for place in (Path(), *Path(folder).absolute().parents))
    return str(next((place for place in places if (place / "config.json").is_file()), base)).removeprefix(
        "openai-community/")


def check_base(folder: str | Path, model: str | Path) -> str:
    """What there is to say of an adapter that names another model than this as the one it was trained on."""
    base, name = base_of(folder), str(model).removeprefix("openai-community/")
    if not base or base == name or Path(base).resolve() == Path(name).resolve():
        return ""
    return f"{folder} names {base} as the model that it was trained on, and this is {name}"
