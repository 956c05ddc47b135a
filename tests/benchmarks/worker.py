"""One measurement in a process of its own: `worker.py SYSTEM TASK FOLDER DATA OUT OPTIONS-AS-JSON`.

SYSTEM is ours, trl, transformers or ctranslate2. Prints one JSON object. The peak memory is this process's alone, and
every system counts the same thing: the real tokens (or pairs) of the same rows, not padding, and the seconds of all its
steps. Each takes these rows in its own order, as its users would: TRL's batches are shuffled, ours go by trees.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from readback import messages_of

import data


def peak() -> int:
    """Bytes at the most: of the GPU's memory if one was used, otherwise of the process."""
    return torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now() -> float:
    """Seconds; what was given to a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured_steps(rows: list, options: dict) -> list[int]:
    """The steps that are measured, evenly spread over an epoch: how rows differ in length is then as in all of it."""
    return [i * (len(rows) // options["batch"]) // options["steps"] for i in range(options["steps"])]


def rows_of_steps(load, path: str, options: dict) -> list:
    """The rows of the measured steps, of at most so many tokens, in the order in which ours takes them."""
    rows = load([path], data.Reading(context=options["length"], val_fraction=0.0)).train
    order = data.Order(rows, options["batch"], seed=0)
    return [rows[i] for step in measured_steps(rows, options) for i in order(step)]


# ---- ours ----------------------------------------------------------------------------------------


def ours_train(task: str, folder: str, path: str, out: str, options: dict) -> dict:
    """The script's own main(), with evaluation, replies and saving left out as far as the settings allow."""
    import dpo
    import model
    import sft
    import train

    stage, length = dpo if task == "dpo-lora" else sft, options["length"]
    if options.get("full_rows"):  # all of the same length, of the same text
        rows = data.load_rows([path], data.Reading(context=length, val_fraction=0.0, seed=0)).train
        ids = np.concatenate([row.ids for row in rows])[:64 * length]
        rows = data.Data([data.Row(row, np.arange(length) % 2 > 0) for row in ids.reshape(-1, length)], [], [], "full")
        data.load_rows = lambda *_, **__: rows
    cfg = stage.Config(model=folder, data=(path,), out=out, steps=options["steps"], batch_size=options["batch"],
                       context=length, lora_rank=0 if task == "sft-full" else options["rank"], checks="", prompts=(),
                       val_fraction=0.0, eval_every=0, save_every=0, overwrite=True, lr=1e-5,
                       micro_batch_tokens=options["micro_batch_tokens"], recompute=options.get("recompute", False),
                       precision=options["precision"], device=options["device"])
    taken, seconds, work, step_batches = {}, [], {}, stage.step_batches

    def watched(rows, *args):
        batches, steps = step_batches(rows, *args), measured_steps(rows.train, options)

        def of(step, budget):
            found = batches(steps[step], budget)
            work[step] = sum(operations(batch, task, json.loads(Path(folder, "config.json").read_text()))
                             for batch in found)
            return found

        of.rows = lambda step: batches.rows(steps[step])
        return of

    stage.step_batches = watched
    reference = dpo.reference_logprobs  # before the loop and once for every pair, but not for nothing: it counts

    def timed(*args):
        began = time.perf_counter()
        table = reference(*args)
        seconds.append(time.perf_counter() - began)
        return table

    dpo.reference_logprobs = timed
    memory_estimate, estimates = model.memory_estimate, []
    model.memory_estimate = lambda *args: estimates.append(memory_estimate(*args)) or estimates[-1]
    original = train.save_checkpoint  # the checkpoint after the last step is not training: TRL saves none here
    train.save_checkpoint = lambda *_: taken.setdefault("peak", peak())
    try:
        stage.main(cfg)
    finally:
        train.save_checkpoint, stage.step_batches, model.memory_estimate = original, step_batches, memory_estimate
    records = train.read_metrics(Path(out))
    took = sum(options["batch"] / record[f"{cfg.row_name}_per_second"] for record in records)
    return rates(took + sum(seconds), records[-1]["tokens"], options) | {
        "operations_per_second": sum(work.values()) / took, "peak": taken["peak"], "estimate": estimates[-1]}


def rates(seconds: float, tokens: int, options: dict) -> dict:
    return {"tokens_per_second": tokens / seconds, "pairs_per_second": options["steps"] * options["batch"] / seconds}


def operations(batch, task: str, config: dict) -> float:
    """Floating-point operations of a GPT-2's products with its weights, forward and backward.

    Two for each weight and token in the forward pass, for the activations' gradient and, but for LoRA, for the
    weights'.
    """
    blocks, head = config["n_layer"] * 12 * config["n_embd"]**2, config["vocab_size"] * config["n_embd"]
    return 2 * (len(batch.tokens) * blocks + len(batch.targets) * head) * (3 if task == "sft-full" else 2)


def ours_generate(folder: str, options: dict) -> dict:
    import model

    gpt = model.for_generation(model.GPT.from_pretrained(folder).to(options["device"]), options["precision"])

    def run(prompt: list[int], new: int) -> list[float]:
        stamps = [time.perf_counter()]
        for _ in model.generate(gpt, prompt, new, temperature=0, stop=None):
            stamps.append(time.perf_counter())
        return stamps

    return decode_figures(run, options)


# ---- the others ----------------------------------------------------------------------------------


def trl_train(task: str, folder: str, path: str, out: str, options: dict) -> dict:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                   attn_implementation=options.get("attention", "sdpa"))
    lora = LoraConfig(r=options["rank"], lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"],
                      fan_in_fan_out=True, task_type="CAUSAL_LM")
    common = {"output_dir": out, "per_device_train_batch_size": options["batch"], "max_steps": options["steps"],
              "learning_rate": 1e-5, "save_strategy": "no", "report_to": "none", "max_length": options["length"],
              "gradient_checkpointing": options.get("recompute", False), "bf16": options["precision"] == "bf16",
              "use_cpu": options["device"] == "cpu", "dataloader_pin_memory": options["device"] != "cpu",
              "disable_tqdm": True}
    took, tokens = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            took.append(-now())

        def on_step_end(self, *_, **__):
            took[-1] += now()

    if task == "dpo-lora":
        def says(ids) -> list[dict]:
            return [{"role": "assistant", "content": data.text_of(ids[:-1])}]

        rows = [{"prompt": messages_of(p.prompt)[:-1], "chosen": says(p.chosen), "rejected": says(p.rejected)}
                for p in rows_of_steps(data.load_pairs, path, options)]
        trainer = DPOTrainer(network, args=DPOConfig(**common, beta=0.1), train_dataset=Dataset.from_list(rows),
                             processing_class=tokenizer, peft_config=lora, callbacks=[Clock()])
    else:
        rows = [{"messages": messages_of(r.ids)} for r in rows_of_steps(data.load_rows, path, options)]
        config = SFTConfig(**common, assistant_only_loss=True, packing=options.get("packing", False),
                           chat_template_path=str(Path(folder, "chat_template_training.jinja")))
        trainer = SFTTrainer(network, args=config,
                             train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                             peft_config=lora if task == "sft-lora" else None, callbacks=[Clock()])
    original = trainer.training_step

    def counting(module, inputs, *more):
        tokens.append(int(inputs["attention_mask"].sum()))
        return original(module, inputs, *more)

    trainer.training_step = counting
    trainer.train()
    return rates(sum(took), sum(tokens), options) | {"peak": peak()}


def transformers_generate(folder: str, options: dict) -> dict:
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    dtype = torch.bfloat16 if options["precision"] == "bf16" else torch.float32
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(options["device"])

    class Clock(BaseStreamer):
        def __init__(self):
            self.stamps = []

        def put(self, value):
            self.stamps.append(time.perf_counter())

        def end(self):
            pass

    def run(prompt: list[int], new: int) -> list[float]:
        clock = Clock()
        ids = torch.tensor([prompt], device=network.device)
        network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                         min_new_tokens=new, do_sample=False, streamer=clock, pad_token_id=data.EOT)
        return clock.stamps  # the first stamp is the prompt's own

    return decode_figures(run, options)


def ctranslate2_generate(folder: str, out: str, options: dict) -> dict:
    import ctranslate2

    kind = {"fp32": "float32", "int8": "int8"}[options["precision"]]
    if not Path(out, "model.bin").exists():
        ctranslate2.converters.TransformersConverter(folder).convert(out, quantization=kind, force=True)
    engine = ctranslate2.Generator(out, compute_type=kind, intra_threads=torch.get_num_threads())
    names = json.loads(Path(folder, "vocab.json").read_text())
    names = {i: token for token, i in names.items()}

    def run(prompt: list[int], new: int) -> list[float]:
        stamps = [time.perf_counter()]
        for _ in engine.generate_tokens([names[i] for i in prompt], max_length=new, min_length=new, sampling_topk=1):
            stamps.append(time.perf_counter())
        return stamps

    return decode_figures(run, options)


def decode_figures(run, options: dict) -> dict:
    """Time to the first token and tokens per second after it, behind prompts of 64 and 900 tokens."""
    torch.manual_seed(0)
    figures = {}
    for context in options["contexts"]:
        prompt = torch.randint(0, 50000, (context,)).tolist()
        run(prompt, 4)
        short, stamps = [run(prompt, 4) for _ in range(5)], run(prompt, options["new"])
        figures[f"first_{context}"] = median(first - asked for asked, first, *_ in (*short, stamps))
        figures[f"decode_{context}"] = (len(stamps) - 2) / (stamps[-1] - stamps[1])
    return figures | {"peak": peak()}


def read(path: str, options: dict) -> dict:
    """Seconds to read, encode and cut the data, so many times as large: each copy with other words and ids."""
    name, source, _ = data.parse_spec(path)
    lines = [line for line in data.file_rows(source) if not isinstance(line[2], data.BadRow)] if source else None
    if not lines:
        raise SystemExit("give a file: --data oasst1:PATH")
    copies = Path(options["copies"])
    with copies.open("w") as file:
        for n in range(options["times"]):
            for _, _, row in lines:
                text = json.dumps(row).replace('"message_id": "', f'"message_id": "{n}-')
                file.write(text.replace('"text": "', f'"text": "{n} ') + "\n")
    data.tokenizer()
    began = time.perf_counter()
    rows = data.load_rows([f"{name}:{copies}"], data.Reading(val_fraction=0.0)).train
    seconds = time.perf_counter() - began
    copies.unlink()
    return {"rows": len(rows), "tokens": sum(map(len, rows)), "seconds": seconds}


def machine(device: str) -> dict:
    """The machine's own rates: of matrix products, in GFLOP/s, and of reading memory, in GB/s."""
    block, side = torch.ones(1 << 28, device=device), 1536 if device == "cpu" else 8192
    block.sum()
    times = []
    for _ in range(3):
        start = now()
        block.sum()
        times.append(now() - start)
    rates = {"memory": block.numel() * 4 / min(times) / 1e9}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
        times = []
        for _ in range(8):
            start = now()
            a @ b
            times.append(now() - start)
        rates[name] = 2 * side**3 / min(times) / 1e9
    return rates


def main() -> None:
    system, task, folder, path, out, options = sys.argv[1:7]
    options = json.loads(options)
    if not options.get("alone"):  # which leaves them to the scripts
        torch.set_num_threads(options["threads"])
    if task == "machine":
        result = machine(options["device"])
    elif task == "read":
        result = read(path, options | {"copies": f"{out}.jsonl"})
    elif task == "decode":
        result = {"ours": lambda: ours_generate(folder, options),
                  "transformers": lambda: transformers_generate(folder, options),
                  "ctranslate2": lambda: ctranslate2_generate(folder, out, options)}[system]()
    else:
        result = (ours_train if system == "ours" else trl_train)(task, folder, path, out, options)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
