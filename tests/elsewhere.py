"""Greedy replies of other people's tools from a run's folder: `python elsewhere.py TOOL FOLDER < talks > replies`.

Each function is what the README tells a person to type, in the tool's own environment: it imports nothing of ours.
Talks and replies are JSON lists; a talk is a list of messages. `test_elsewhere.py` compares them with chat.py's.
"""

import json
import sys
from pathlib import Path

TOKENS = 60


def pipeline(folder, talks):
    from transformers import pipeline

    chat = pipeline("text-generation", folder)
    return [chat(talk, max_new_tokens=TOKENS, do_sample=False)[0]["generated_text"][-1]["content"] for talk in talks]


def generated(gpt, tokenizer, talks):
    """What transformers' generate makes of apply_chat_template's ids."""
    for talk in talks:
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        reply = gpt.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids["input_ids"].shape[1]:]
        yield tokenizer.decode(reply, skip_special_tokens=True)


def apply_chat_template(folder, talks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return generated(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), talks)


def peft(folder, talks):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    gpt = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")  # it knows its base
    return generated(gpt, AutoTokenizer.from_pretrained(folder), talks)


def gguf_file(folder, talks):
    """transformers on llama.cpp's file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype="float32")
    return generated(gpt, AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf"), talks)


def llama_cpp(folder, talks):
    from llama_cpp import Llama

    llama = Llama(f"{folder}/model.gguf", n_ctx=1024, verbose=False)
    return [llama.create_chat_completion(talk, max_tokens=TOKENS, temperature=0.0)["choices"][0]["message"]["content"]
            for talk in talks]


def ctranslate2(folder, talks):
    import ctranslate2
    from transformers import AutoTokenizer

    ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}/ct2")  # ct2-transformers-converter's work
    generator, tokenizer = ctranslate2.Generator(f"{folder}/ct2"), AutoTokenizer.from_pretrained(folder)
    for talk in talks:
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
        found = generator.generate_batch([tokenizer.convert_ids_to_tokens(ids)], max_length=TOKENS,
                                         include_prompt_in_result=False, end_token="<|endoftext|>")
        yield tokenizer.decode(found[0].sequences_ids[0], skip_special_tokens=True)


def vllm(folder, talks):
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", max_model_len=1024, enforce_eager=True,
              gpu_memory_utilization=0.3)  # of the memory, on a CPU too: by default nearly all must be free
    return [llm.chat(talk, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)[0].outputs[0].text
            for talk in talks]


if __name__ == "__main__":
    tool, folder = sys.argv[1:]
    sys.path.remove(str(Path(__file__).parent))
    said, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(list(globals()[tool](folder, json.load(sys.stdin)))), file=said)
