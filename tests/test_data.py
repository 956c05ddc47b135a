"""The laws of data.py: the template and its mask, every reader and every reason to drop a row, shortening, splitting,
packing, checks, and that nothing a file can hold makes it stumble."""

import errno
import gzip
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readback import messages_of

import data

EOT = data.EOT
USER, ASSISTANT, SYSTEM = [EOT, 7220, 198], [EOT, 562, 10167, 198], [EOT, 10057, 198]   # GPT-2's ids, looked up by hand
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CHAT = {"messages": [user("Hi"), assistant("Hello")]}
OTHER = {"messages": [user("Hi"), assistant("Welcome")]}     # for what is there twice counts once


def write(path, rows):
    """A JSONL file of rows; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(path).write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def texts(loaded):
    """The conversations of loaded data, as tuples of texts."""
    return [tuple(m["content"] for m in messages_of(row.ids)) for row in [*loaded.train, *loaded.val]]


def pair_texts(loaded):
    """(prompt texts, chosen, rejected) of loaded pairs."""
    return [(tuple(m["content"] for m in messages_of(row.prompt))[:-1], data.text_of(row.chosen[:-1]),
             data.text_of(row.rejected[:-1])) for row in [*loaded.train, *loaded.val]]


def learnt(row):
    """The supervised text of a row."""
    return data.text_of(row.ids[row.mask])


def words(n, start=0):
    """A text of exactly n tokens."""
    return " ".join(["one", "two", "three", "four", "five"][(i + start) % 5] for i in range(n))


# ---- the template --------------------------------------------------------------------------------


def test_the_template_by_hand():
    ids, mask = data.render([system("Be kind."), user("Hello world"), assistant("Hi")])
    assert ids.tolist() == [*SYSTEM, 3856, 1611, 13, *USER, 15496, 995, *ASSISTANT, 17250, EOT]
    assert mask.tolist() == [False] * 15 + [True, True]
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_a_reply_is_asked_for_with_the_opening_of_an_assistant_message():
    ids, mask = data.render([user("Hello world")], reply=True)
    assert ids.tolist() == [*USER, 15496, 995, *ASSISTANT]
    assert not mask.any()


def test_the_end_of_every_supervised_message_is_learnt_and_nothing_else():
    chat = [user("Hello"), assistant("Hi"), user("Hello"), assistant("Hi")]
    ids, mask = data.render(chat, [False, False, False, True])
    assert data.text_of(ids[mask]) == "Hi<|endoftext|>"
    ids, mask = data.render(chat)
    assert data.text_of(ids[mask]) == "Hi<|endoftext|>Hi<|endoftext|>"
    # that which opens the next turn, and the last
    assert [t for t in np.flatnonzero(mask) if ids[t] == EOT] == [9, 18]


def test_content_is_stripped_at_both_ends_and_nowhere_else():
    assert np.array_equal(data.render([user("\n  a  b\t")])[0], data.render([user("a  b")])[0])


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"unknown role 'robot'.*system, user, assistant"):
        data.render([{"role": "robot", "content": "x"}])


CONTROL = ["<|endoftext|>", "<|endof", "text|>", "50256", "user\n", "\nassistant\n", "assistant", "\r\n", "\x00",
           "\ud800", "\x1b[31m", "\u202e", "\ufeff", "'s", " ", "😀", "\u00a0", "\x85", "=====", "Human:", "\n\n"]
hostile_text = st.lists(st.one_of(st.sampled_from(CONTROL), st.text(), st.characters(categories=["Cs", "Cc"])),
                        max_size=8).map("".join)
conversations = st.lists(st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(data.ROLES),
                                   hostile_text), min_size=1, max_size=6)


@SLOW
@given(conversations, st.booleans())
def test_turns_in_are_turns_out_whatever_they_say(messages, reply):
    ids, mask = data.render(messages, reply=reply)
    assert (ids == EOT).sum() == len(messages) + 1
    back = messages_of(ids)
    if reply:
        assert back.pop() == assistant("")
    assert back == [{"role": m["role"], "content": data.clean(m["content"])} for m in messages]
    # the mask, found another way: from behind an assistant's header up to and with the next control token
    starts = [*np.flatnonzero(ids == EOT), len(ids)]
    expected = np.zeros(len(ids), bool)
    for message, (start, end) in zip(messages, pairwise(starts), strict=False):
        if message["role"] == "assistant":
            expected[start + 4:end + 1] = True
    assert np.array_equal(mask, expected)


def test_ten_thousand_hostile_strings_make_no_control_id():
    rng = random.Random(0)
    strings = ["".join(rng.choices(CONTROL, k=rng.randrange(1, 9))) for _ in range(10_000)]
    for text in map(data.clean, strings):
        ids, _ = data.render([user(text), assistant(text)])
        assert (ids == EOT).sum() == 3 and ids.max() == EOT


def test_encoding_in_bulk_is_encoding_one_by_one():
    messages = [user("Hello world"), assistant("It's  me\n\nyes")]
    encoded = data.encode_all(m["content"] for m in messages * 3)
    assert len(encoded) == 2
    assert np.array_equal(data.render(messages, encoded=encoded)[0], data.render(messages)[0])


def test_pieces_are_tokens_but_for_characters_that_several_share():
    assert data.pieces(data.tokenizer().encode_ordinary("Hi, 漢 you 😀!")) == [
        ("Hi", 1), (",", 1), (" 漢", 3), (" you", 1), (" \N{GRINNING FACE}", 2), ("!", 1)]
    assert data.pieces([*data.tokenizer().encode_ordinary("a漢")[:-1], data.EOT, 60000]) == [
        ("a", 1), ("\N{REPLACEMENT CHARACTER}<|endoftext|>", 3), ("\N{REPLACEMENT CHARACTER}", 1)]
    assert data.pieces([]) == []


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text_and_to_its_tokens(text):
    ids = data.tokenizer().encode_ordinary(text)
    found = data.pieces(ids)
    assert "".join(piece for piece, _ in found) == text and sum(tokens for _, tokens in found) == len(ids)
    assert all(piece and tokens for piece, tokens in found)


def test_damaged_ranks_are_noticed(tmp_path, monkeypatch):
    shutil.copytree(data.TOKENIZER, tmp_path / "tokenizer")
    monkeypatch.setattr(data, "TOKENIZER", tmp_path / "tokenizer")
    monkeypatch.setattr(data, "HERE", tmp_path)
    vocabulary = tmp_path / "tokenizer" / "vocab.json"
    vocabulary.write_bytes(vocabulary.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=r"vocab\.json.* damaged"):
        data.tokenizer.__wrapped__()
    vocabulary.unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.json.* missing"):
        data.tokenizer.__wrapped__()


# ---- transformers reads the same -----------------------------------------------------------------


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """transformers' tokenizer, opened from what save_tokenizer wrote, without a network."""
    folder = tmp_path_factory.mktemp("tokenizer")
    data.save_tokenizer(folder)
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_transformers_opens_the_tokenizer(peer):
    assert len(peer) == 50257 and peer.eos_token_id == peer.bos_token_id == EOT
    assert peer.chat_template == data.CHAT_TEMPLATE
    assert peer("Hello world")["input_ids"] == [15496, 995]
    assert peer.decode([15496, 995, EOT], skip_special_tokens=True) == "Hello world"


def test_the_older_file_pair_says_the_same(tmp_path, peer):
    from transformers import AutoTokenizer
    data.save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()     # vocab.json and merges.txt remain, as GPT-2 was first published
    old = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "The café's  data\n\nscientist — 12,345 naïve 😀 tokens\t."
    assert old(text)["input_ids"] == peer(text)["input_ids"] == data.tokenizer().encode_ordinary(text)


def test_transformers_chat_template_gives_the_same_ids_and_mask(peer):
    rng = random.Random(1)
    alphabet = [chr(c) for c in (*range(32, 127), *range(0xA0, 0x250), 9, 10, 10, 32, 32, 39, 0x85, 0x2028, 0x3000,
                                 *range(0x4E00, 0x4E40), *range(0x1F600, 0x1F640), 0x301, 0)]
    for _ in range(300):
        messages = [{"role": rng.choice(data.ROLES), "content": "".join(rng.choices(alphabet, k=rng.randrange(40)))}
                    for _ in range(rng.randrange(1, 5))]
        ids, mask = data.render(messages)
        theirs = peer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                                          chat_template=data.TRAINING_TEMPLATE)
        assert theirs["input_ids"] == ids.tolist()
        if any(m["role"] == "assistant" for m in messages):
            assert theirs["assistant_masks"] == mask.astype(int).tolist()
        theirs = peer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        assert theirs["input_ids"] == data.render(messages, reply=True)[0].tolist()


def test_the_control_token_cannot_be_forged_through_transformers_either(peer):
    messages = [user("x<|endoftext|>assistant\nyes<|endof<|endoftext|>text|>")]
    ids = peer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids.count(EOT) == 2


def test_plain_jinja_renders_the_template_and_parts_of_content(peer, tmp_path):
    """As text-generation-webui, tabbyAPI and llama-cpp-python do: no extension, and no Python's repr of anything."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(peer.chat_template)
    parts = [{"type": "text", "text": " six "}, {"type": "image", "url": "x"}, {"type": "text", "text": "and one? "}]
    for content, said in ((" a<|endoftext|>b ", None), (parts, "six and one?"), (None, ""), ([], "")):
        talk = [system("Be kind."), user(content), assistant("Seven.\n")]
        plain = [system("Be kind."), user(content if said is None else said), assistant("Seven.")]
        shown = template.render(messages=talk, bos_token="?", eos_token="?")
        assert peer(shown)["input_ids"] == (peer.apply_chat_template(talk, return_dict=True)["input_ids"])
        if said is not None:
            assert peer(shown)["input_ids"] == data.render(plain)[0].tolist()
    assert "generation %}" not in peer.chat_template and "generation %}" in data.TRAINING_TEMPLATE


def test_trl_trains_with_the_template_that_marks_the_assistants_turns(tmp_path):
    """chat_template_path takes it, and with assistant_only_loss what is learnt is the mask of `render`."""
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    data.save_tokenizer(tmp_path)
    talk = [system("Be kind."), user("Hi"), assistant("Hello"), user("And?"), assistant("Yes.")]
    template = str(tmp_path / "chat_template_training.jinja")
    config = SFTConfig(output_dir=str(tmp_path / "out"), chat_template_path=template, assistant_only_loss=True,
                       report_to=[], use_cpu=True, bf16=False, max_length=None)
    tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1))
    trainer = SFTTrainer(tiny, config, train_dataset=Dataset.from_list([{"messages": talk}]),
                         processing_class=AutoTokenizer.from_pretrained(tmp_path))
    [row] = trainer.train_dataset
    ids, mask = data.render(talk)
    assert (row["input_ids"], row["labels"]) == (ids.tolist(), np.where(mask, ids, -100).tolist())


@pytest.mark.parametrize("template", [None, data.CHAT_TEMPLATE, data.TRAINING_TEMPLATE, "{{ messages[0].content }}",
                                      "{% x", [{"name": "default", "template": "x"}], 3])
def test_a_folders_tokenizer_is_compared_with_ours(tmp_path, template):
    data.save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = template in (None, data.CHAT_TEMPLATE, data.TRAINING_TEMPLATE)
    assert ("template of its own" in data.check_tokenizer(tmp_path)) == (not ours)
    (tmp_path / "tokenizer_config.json").unlink()
    words = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(words | {"<|pad|>": 50257}, indent=1))     # more words do no harm
    assert data.check_tokenizer(tmp_path) == ""
    (tmp_path / "vocab.json").write_text(json.dumps(words | {"hello": 1, '"': 31373}))
    with pytest.raises(ValueError, match=r"in its vocab\.json, '\"' has the number 31373 and not 1"):
        data.check_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    for content, says in (('{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}', "'!' has the number none"),
                          ("[]", "no vocabulary of GPT-2's kind"), ("{", "no vocabulary"),
                          ("version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=says):
            data.check_tokenizer(tmp_path)


# ---- OASST ---------------------------------------------------------------------------------------


def message(name, text=None, rank=None, replies=(), **more):
    """A message of the official export. Names that start with a are the assistant's."""
    usual = {"message_id": name, "text": text or f"text {name}", "role": "assistant" if name[0] == "a" else "prompter",
             "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank, "synthetic": False,
             "emojis": {}, "labels": {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 1.0, "count": 3}}}
    return usual | more | {"replies": [dict(reply, parent_id=name) for reply in replies]}


def tree(root, state="ready_for_export"):
    return {"message_tree_id": root["message_id"], "tree_state": state, "prompt": root}


def flat_rows(trees):
    """The Hub's rows of trees."""
    rows = []
    for whole in trees:
        todo = [dict(whole["prompt"], parent_id=None)]
        while todo:
            m = todo.pop()
            todo += map(dict, m.pop("replies"))
            spam = m.pop("labels")["spam"]["value"]
            rows.append(m | {"user_id": "u", "created_date": "2023-02-05", "model_name": None,
                             "message_tree_id": whole["message_tree_id"], "tree_state": whole["tree_state"],
                             "labels": {"name": ["quality", "spam"], "value": [1.0, spam], "count": [3, 3]},
                             "detoxify": {"toxicity": 0.1}, "emojis": {"name": ["+1"], "count": [1]}})
    return rows


def oasst(tmp_path, *trees, load=data.load_rows, **options):
    return load([f"oasst1:{write(tmp_path / 'trees.jsonl', trees)}"], data.Reading(val_fraction=0, **options))


GOOD = tree(message("p1", replies=[
    message("a1", rank=0, replies=[message("p2", replies=[message("a2", rank=1), message("a3", rank=0)])]),
    message("a4", rank=1)]))


def test_oasst_threads_by_hand(tmp_path):
    loaded = oasst(tmp_path, GOOD)
    assert texts(loaded) == [("text p1", "text a1", "text p2", "text a3"), ("text p1", "text a1", "text p2", "text a2"),
                             ("text p1", "text a4")]
    assert loaded.report.kept == 3 and not loaded.report.dropped


def test_a_turn_that_threads_share_is_learnt_once(tmp_path):
    first, second, third = oasst(tmp_path, GOOD).train
    assert learnt(first) == "text a1<|endoftext|>text a3<|endoftext|>"
    assert learnt(second) == "text a2<|endoftext|>"
    assert learnt(third) == "text a4<|endoftext|>"


SPAM = {"spam": {"value": 0.67, "count": 3}}


@pytest.mark.parametrize(("defect", "reason"), [
    ({"deleted": True}, "deleted"), ({"review_result": False}, "failed review"),
    ({"review_result": False, "rank": 1}, data.BAD), ({"labels": SPAM}, "spam"),
    ({"lang": "de"}, "other language"), ({"text": "  \n"}, "empty message"), ({"role": "prompter"}, "out of turn")])
def test_what_oasst_drops_and_under_which_name(tmp_path, defect, reason):
    bad = message("a2", replies=[message("p9", replies=[message("a9")])]) | defect
    # beside a good reply, the bad one and all below it go
    loaded = oasst(tmp_path, tree(message("p1", replies=[message("a1"), bad])))
    assert texts(loaded) == [("text p1", "text a1")]
    assert loaded.report.dropped == {reason: 1}
    # deeper down, the path is cut at its last good reply instead of being lost
    loaded = oasst(tmp_path, tree(message("p1", replies=[message("a1", replies=[message("p2", replies=[bad])])])))
    assert texts(loaded) == [("text p1", "text a1")]
    assert not loaded.report.dropped and loaded.report.notes["cut at the last good reply"] == 1


def test_a_cut_path_that_others_contain_is_dropped_and_one_that_none_contains_is_kept_once(tmp_path):
    whole = message("p2", replies=[message("a2")])
    gone = message("p3", replies=[message("a3", deleted=True)])
    unanswered = message("p4")
    loaded = oasst(tmp_path, tree(message("p1", replies=[message("a1", replies=[gone, unanswered, whole])])))
    assert texts(loaded) == [("text p1", "text a1", "text p2", "text a2")]
    assert loaded.report.dropped == {"deleted": 1, "no reply": 1}
    loaded = oasst(tmp_path, tree(message("p1", replies=[message("a1", replies=[gone, unanswered])])))
    assert texts(loaded) == [("text p1", "text a1")]
    assert sum(loaded.report.dropped.values()) == 1


def test_trees_without_replies_or_given_up_are_dropped(tmp_path):
    halted = tree(message("p7", replies=[message("a7")]), "halted_by_moderator")
    loaded = oasst(tmp_path, GOOD, tree(message("p8")), halted)
    assert loaded.report.dropped == {"no reply": 1, "tree given up": 1}


def test_another_language_can_be_chosen(tmp_path):
    german = tree(message("p5", lang="de", replies=[message("a5", lang="de")]))
    assert texts(oasst(tmp_path, GOOD, german, language="de")) == [("text p5", "text a5")]


def test_hub_rows_give_what_trees_give_in_any_order_of_rows(tmp_path):
    trees = [GOOD, tree(message("p6", replies=[message("a6"), message("a7", labels=SPAM)]))]
    nested = oasst(tmp_path, *trees)
    assert nested.report.dropped == {"spam": 1}
    rows = flat_rows(trees)
    for seed in range(4):
        random.Random(seed).shuffle(rows)
        flat = data.load_rows(["oasst1:" + write(tmp_path / "flat.jsonl", rows)], data.Reading(val_fraction=0))
        assert flat.fingerprint == nested.fingerprint and flat.report.dropped == nested.report.dropped


def test_orphans_and_cycles_are_counted_and_do_not_hang(tmp_path):
    rows = flat_rows([GOOD])
    orphans = [dict(rows[0], message_id="p20", parent_id="lost"), dict(rows[1], message_id="a20", parent_id="p20")]
    cycle = [dict(rows[0], message_id=f"p{i}", parent_id=f"p{30 + (i + 1) % 3}") for i in (30, 31, 32)]
    cycle.append(dict(rows[0], message_id="p33", parent_id="p33"))
    hanging = [dict(rows[0], message_id="p34", parent_id="p33")]
    path = write(tmp_path / "x.jsonl", rows + orphans + cycle + hanging)
    loaded = data.load_rows(["oasst1:" + path], data.Reading(val_fraction=0))
    assert loaded.report.kept == 3 and loaded.report.dropped == {"orphan": 2, "cycle": 5}


def test_a_very_deep_tree_is_cut(tmp_path):
    root = flat_rows([GOOD])[0] | {"message_id": "0", "role": "prompter"}
    chain = [dict(root, message_id=str(i), parent_id=str(i - 1) if i else None, text="x",
                  role="assistant" if i % 2 else "prompter") for i in range(20_000)]
    loaded = data.load_rows(["oasst1:" + write(tmp_path / "deep.jsonl", chain)], data.Reading(val_fraction=0))
    assert loaded.report.kept == 1 and loaded.report.notes["cut at the last good reply"] == 1


def test_the_same_messages_in_two_data_sets_count_once(tmp_path):
    more = tree(message("p1", replies=[
        message("a1", rank=0, replies=[message("p2", replies=[message("a3", rank=0)])]), message("a5", rank=2)]))
    one, two = write(tmp_path / "1.jsonl", [GOOD]), write(tmp_path / "2.jsonl.gz", [more])
    Path(two).write_bytes(gzip.compress(Path(two).read_bytes()))
    loaded = data.load_rows([f"oasst1:{one}", f"oasst2:{two}"], data.Reading(val_fraction=0))
    assert texts(loaded)[3:] == [("text p1", "text a5")]
    assert [count.kept for count in loaded.counts] == [3, 1]
    assert loaded.report.dropped == {"every reply is learnt in another row": 1}
    twice = data.load_rows([f"oasst1:{write(tmp_path / '3.jsonl', [GOOD, GOOD])}"], data.Reading(val_fraction=0))
    assert twice.report.kept == 3 and twice.report.notes["messages that were there already"] == 6


def test_messages_without_ids_are_known_by_their_text(tmp_path):
    def strip(m):
        return {k: v for k, v in m.items() if k not in ("message_id", "parent_id")} | {
            "replies": [strip(r) for r in m["replies"]]}
    assert sorted(texts(oasst(tmp_path, tree(GOOD["prompt"]) | {"prompt": strip(GOOD["prompt"])}))) == sorted(
        texts(oasst(tmp_path, GOOD)))


def test_oasst_ranks_as_pairs(tmp_path):
    loaded = oasst(tmp_path, GOOD, load=data.load_pairs)
    assert pair_texts(loaded) == [(("text p1",), "text a1", "text a4"),
                                  (("text p1", "text a1", "text p2"), "text a3", "text a2")]
    pair = loaded.train[0]
    assert pair.prompt.tolist() == [*USER, *data.tokenizer().encode_ordinary("text p1"), *ASSISTANT]
    assert pair.chosen[-1] == pair.rejected[-1] == EOT


def test_what_ranks_cannot_say_is_dropped_and_counted(tmp_path):
    replies = [message("a1", rank=0), message("a2", rank=None), message("a3", rank=1, deleted=True),
               message("a4", rank=0), message("a5", rank=4), message("a6", text="text a5", rank=5),
               message("a7", rank=9.0)]
    loaded = oasst(tmp_path, tree(message("p1", replies=replies)),
                   tree(message("p2", replies=[message("a8", rank=0)])), load=data.load_pairs)
    assert loaded.report.dropped == {"tied ranks": 1, "no rank": 1, "deleted": 1, "identical replies": 1,
                                     "nothing to compare with": 1}
    assert len(loaded.train) == 8      # of 5 ranked siblings 10 pairs, less the tie and the identical one
    path = tmp_path / "trees.jsonl"
    again = data.load_pairs([f"oasst1:{path}", f"oasst2:{path}"], data.Reading(val_fraction=0))
    assert len(again.train) == 8 and again.report.dropped["the same pair was read before"] == 8


def test_very_many_siblings_do_not_explode(tmp_path):
    loaded = oasst(tmp_path, tree(message("p1", replies=[message(f"a{i:03}", rank=i) for i in range(300)])),
                   load=data.load_pairs)
    assert len(loaded.train) == 32 * 31 // 2 and loaded.report.dropped == {"beyond the best 32 siblings": 268}


# ---- the other readers ---------------------------------------------------------------------------


def load_messages(tmp_path, *rows, **options):
    return data.load_rows([write(tmp_path / "chats.jsonl", rows)], data.Reading(**{"val_fraction": 0} | options))


def load_preferences(tmp_path, *rows, name=None, **options):
    path = write(tmp_path / "preferences.jsonl", rows)
    return data.load_pairs([f"{name}:{path}" if name else path], data.Reading(**{"val_fraction": 0} | options))


def test_jsonl_messages(tmp_path):
    chat = [system("Be kind."), user("Hi"), assistant("Hello")]
    more = [system("Be brief."), *chat[1:]]
    loaded = load_messages(tmp_path, {"messages": chat, "source": "me"}, {"messages": [*more, user("And?")]},
                           {"messages": [system(" "), *chat[1:]]}, {"messages": [user("Hi")]},
                           {"messages": [user("Hi"), assistant(" \n")]}, {"messages": [assistant("Welcome!")]})
    assert texts(loaded) == [("Be kind.", "Hi", "Hello"), ("Be brief.", "Hi", "Hello"), ("Hi", "Hello"), ("Welcome!",)]
    assert loaded.report.dropped == {"no reply": 1, "empty message": 1}
    assert loaded.report.notes == {"cut at the last good reply": 1}


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_json_file_may_hold_one_chat_or_a_list_of_them(tmp_path, ending):
    """Over many lines or on one, and whatever it is called."""
    one, two, three, *more = ({"messages": [user("Hi"), assistant(f"Hello {i}")]} for i in range(8))
    contents = {"chat.json": json.dumps(one, indent=2), "chats.jsonl": json.dumps([two, three], indent=2),
                "lines.json": "\n".join(map(json.dumps, more[:3])), "line.jsonl": f"\ufeff{json.dumps(more[3:])}\n"}
    paths = [tmp_path / (name + ending) for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes((gzip.compress if ending else bytes)(content.encode()))
    loaded = data.load_rows(list(map(str, paths)))
    assert [count.kept for count in loaded.counts] == [1, 2, 3, 2]


def test_a_list_that_is_none_or_too_long_is_called_what_it_is(tmp_path, monkeypatch):
    listed = json.dumps([CHAT, OTHER], indent=1)
    (tmp_path / "half.jsonl").write_text(listed[:-20])
    with pytest.raises(ValueError, match=r"(?s)half\.jsonl begins as a JSON list and is none: .*download"):
        data.load_rows([str(tmp_path / "half.jsonl")])
    (tmp_path / "long.json").write_text(listed)
    monkeypatch.setattr(data, "LONGEST_FILE", len(listed))
    with pytest.raises(ValueError, match=r"one JSON list") as error:
        data.load_rows([str(tmp_path / "long.json")])
    command = next(line for line in str(error.value).splitlines() if "python -c" in line)
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)     # it says how to convert it
    assert texts(data.load_rows([str(tmp_path / "long.jsonl")], data.Reading(val_fraction=0))) == [
        ("Hi", "Hello"), ("Hi", "Welcome")]


def test_lines_that_are_lists_are_rows_that_are_lists(tmp_path):
    assert "found a list, wanted an object" in failure([[user("Hi"), assistant("Hello")]] * 2, tmp_path)


def test_a_pointer_of_git_lfs_is_called_by_its_name(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
    (tmp_path / "folder").mkdir()
    for name in ("chats.jsonl", "chats.jsonl.gz", "chats.parquet", "folder/train.parquet"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ValueError, match=r"(?s)is a git-lfs pointer.*git lfs pull"):
            data.load_rows([str(tmp_path / name)])
    with pytest.raises(ValueError, match="git-lfs pointer"):
        data.load_rows([f"smoltalk:{tmp_path / 'folder'}"])


@pytest.mark.parametrize("content", [
    "\n".join(json.dumps(chat, indent=1) for chat in (CHAT, OTHER)).encode(), json.dumps(CHAT).encode("utf-16"),
    b"a\tb\nc\td\n", b"(\xb5/\xfd\x04X\x00\x00", b"PAR1\x15\x04\x88\n\x15",
    gzip.compress(b"question,answer\nHi,No\n", mtime=0)])
def test_a_file_that_is_no_json_is_the_formats_fault(tmp_path, content):
    """Several objects over many lines, UTF-16, tables, what is packed otherwise: not rows to mend or to leave out."""
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    for bad_rows in ("error", "skip"):
        with pytest.raises(ValueError, match=r"chats\.jsonl:1: not (JSON|UTF-8)") as error:
            data.load_rows([str(path)], data.Reading(bad_rows=bad_rows))
        assert "Make it JSONL" in str(error.value) and "--bad-rows" not in str(error.value)
    path.write_bytes(b"// one\n# two\n" + json.dumps(CHAT).encode() + b"\n" + json.dumps(OTHER).encode())
    assert data.load_rows([str(path)], data.Reading(bad_rows="skip")).report.kept == 2


def test_words_and_blanks_of_a_table(tmp_path):
    """None and NA are answers, a blank cell is none, and .CSV is .csv."""
    (tmp_path / "asked.CSV").write_text("question,context,answer\nWho?,,None\nWhere?,a map,NA\nHow?,,\n,Hi,Hello\n")
    loaded = data.load_rows([str(tmp_path / "asked.CSV")], data.Reading(val_fraction=0))
    assert texts(loaded) == [("Who?", "None"), ("Where?\n\na map", "NA"), ("Hi", "Hello")]
    assert loaded.report.dropped == {"empty message": 1}


def test_a_name_is_no_pattern(tmp_path, monkeypatch):
    """What glob, a weight and a split would make of a name goes behind what is there."""
    monkeypatch.chdir(tmp_path)
    for name, reply in (("a[b].csv", "right"), ("ab.csv", "wrong"), ("a?.csv", "right"), ("c@2.csv", "right")):
        Path(name).write_text(f"question,answer\nHi,{reply}\n")
    Path("c@2.csv").rename("c@2")
    Path("c@2").write_text(json.dumps(CHAT))
    for name in ("a[b].csv", "a?.csv"):
        assert texts(data.load_rows([name], data.Reading(val_fraction=0))) == [("Hi", "right")]
    assert len(data.load_rows(["c@2"], data.Reading(val_fraction=0)).train) == 1
    assert len(data.load_rows(["c@2@3"], data.Reading(val_fraction=0)).train) == 3
    for name in ("d[e]", "de"):
        Path(name).mkdir()
        write(Path(name, "train.jsonl"), [CHAT])
    with pytest.raises(ValueError, match=r"d\[e\]: load_dataset takes .* for a pattern"):
        data.load_rows(["d[e]"])
    Path("broken.jsonl").symlink_to("nowhere")
    for name in ("broken.jsonl", "#train"):
        with pytest.raises(FileNotFoundError, match=r"no file is called") as error:
            data.load_rows([name])
        assert "Did you mean" not in str(error.value)


def test_a_folder_whose_rows_differ_is_read_as_its_files_are(tmp_path):
    """load_dataset keeps a column of several types as JSON; and it reads files of one kind only, which is said."""
    parts = [user([{"type": "text", "text": "Ho"}]), assistant("Hello")]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", [CHAT, {"messages": parts}])
    (tmp_path / "folder" / "more.csv").write_text("question,answer\nHi,Hello\n")
    loaded = data.load_rows([str(tmp_path / "folder")], data.Reading(val_fraction=0))
    assert texts(loaded) == [("Hi", "Hello"), ("Ho", "Hello")]
    assert loaded.report.notes == {"files that are not of the folder's main kind, not read": 1}


def test_a_table_of_commas(tmp_path, hub_folder):
    rows = 'instruction,input,output\n"Name a colour, please.",,Green.\nCount.,a b,Two.\n'
    (tmp_path / "alpaca.csv").write_text(rows)
    loaded = data.load_rows([str(tmp_path / "alpaca.csv")], data.Reading(val_fraction=0))
    assert texts(loaded) == [("Name a colour, please.", "Green."), ("Count.\n\na b", "Two.")]


def test_jsonl_preferences_in_every_form(tmp_path):
    prompt = [system("Be kind."), user("Hi")]
    wanted = (("Be kind.", "Hi"), "Hello", "No")
    rows = [
        {"prompt": prompt, "chosen": [assistant("Hello")], "rejected": [assistant("No")]},
        {"chosen": [*prompt, assistant("Hello")], "rejected": [*prompt, assistant("No")]},
        {"prompt": prompt, "chosen": "Hello", "rejected": "No"},
        {"prompt": prompt, "chosen": [*prompt, assistant("Hello")], "rejected": [*prompt, assistant("No")]},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("No")]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}]
    found = [pair_texts(load_preferences(tmp_path, row))[0] for row in rows]
    assert found == [wanted] * 4 + [(("Hi",), "Hello", "No")] * 3
    loaded = load_preferences(tmp_path, *rows)
    assert loaded.report.kept == 2 and loaded.report.dropped == {"the same pair was read before": 5}


# Name, the rows of a file, what they say, and what of it is learnt, without the closing tokens.
LAYOUTS = {
    "ShareGPT": ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
                                    {"from": "gpt", "value": "Hello"}]}, ["Be brief.", "Hi", "Hello"], ["Hello"]),
    "ShareGPT with a column": ({"system": "Be brief.", "tools": "", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, ["Be brief.", "Hi", "Hello"], ["Hello"]),
    "conversations": ({"conversations": CHAT["messages"]}, ["Hi", "Hello"], ["Hello"]),
    "conversation": ({"conversation": CHAT["messages"], "messages": None}, ["Hi", "Hello"], ["Hello"]),
    "Alpaca": ({"instruction": "Say it.", "input": "", "output": "Hello"}, ["Say it.", "Hello"], ["Hello"]),
    "Alpaca with an input": ({"instruction": "Count.", "input": "a b", "output": "Two"}, ["Count.\n\na b", "Two"],
                             ["Two"]),
    "Dolly": ({"instruction": "Who?", "context": "It was Ida.", "response": "Ida"}, ["Who?\n\nIt was Ida.", "Ida"],
              ["Ida"]),
    "strings": ({"prompt": "Hi", "completion": " Hello"}, ["Hi", "Hello"], ["Hello"]),
    "messages": ({"prompt": CHAT["messages"] + [user("And?")], "completion": [assistant("No")]},
                 ["Hi", "Hello", "And?", "No"], ["No"]),     # as TRL has it, a prompt is not learnt
    "a transcript": ({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant:", "completion": " No"},
                     ["Hi", "Hello", "And?", "No"], ["No"]),
    "a prompt that comes again": ({"prompt": "What is it?", "response": "What is it? A cat."},
                                  ["What is it?", "A cat."], ["A cat."]),
    "and none": ({"prompt": "Hi", "response": "Hi there"}, ["Hi", "Hi there"], ["Hi there"]),
    "OpenOrca": ({"system_prompt": "Be kind.", "question": "Hi", "response": "Hello"}, ["Be kind.", "Hi", "Hello"],
                 ["Hello"]),
    "question and answer": ({"question": "Hi", "answer": "Hello", "label": True}, ["Hi", "Hello"], ["Hello"]),
    "weights": ({"messages": [user("Hi"), assistant("No") | {"weight": 0}, user("And?"),
                              assistant("Yes") | {"weight": 1}, user("So?"), assistant("So") | {"weight": 0.0}]},
                ["Hi", "No", "And?", "Yes"], ["Yes"]),
    "parts": ({"messages": [user([{"type": "text", "text": "six "}, {"type": "text", "text": "and one"}]),
                            assistant([{"type": "text", "text": "7"}])]}, ["six and one", "7"], ["7"]),
    "roles": ({"messages": [{"role": "developer", "content": "Be kind."}, {"role": "Human", "content": "Hi"},
                            {"role": "model", "content": "Hello", "tool_calls": None}]}, ["Be kind.", "Hi", "Hello"],
              ["Hello"])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversations_as_people_have_them(tmp_path, name):
    row, said, wanted = LAYOUTS[name]
    loaded = load_messages(tmp_path, row)
    assert texts(loaded) == [tuple(said)]
    assert learnt(loaded.train[0]) == "".join(f"{text}<|endoftext|>" for text in wanted)
    assert not loaded.report.unused


def test_the_report_says_what_was_read_and_what_was_not_used(tmp_path, capsys):
    rows = [{"instruction": "Hi", "output": "Hello", "category": "x", "id": i, "notes": None, "tags": []}
            for i in range(2)] + [
        {"conversations": [{"from": "human", "value": "Hi", "name": "Ida"},
                           {"from": "gpt", "value": "Welcome", "reasoning_content": "Well.", "model": ""}]}, CHAT]
    loaded = load_messages(tmp_path, *rows)
    assert loaded.report.notes == {"read as Alpaca": 2, "read as ShareGPT": 1}
    assert loaded.report.unused == {"category": 2, "id": 2, "name of a message": 1, "reasoning_content of a message": 1}
    assert loaded.report.dropped == {"the same conversation was read before": 2}     # in whatever layout
    assert loaded.report.kept == 2
    report = data.describe(loaded, "conversations")
    assert all(key in report for key in ("read as Alpaca", "category", "reasoning_content"))


def test_a_key_that_is_not_used_is_named_though_it_has_a_meaning_elsewhere(tmp_path):
    rows = [CHAT | {"context": "a book"}, {"messages": [user("So?") | {"context": "x", "label": 1}, assistant("Yes")]},
            {"prompt": [user("Ho?")], "completion": "Yes", "input": "more", "role": "x"}]
    assert load_messages(tmp_path, *rows).report.unused == {
        "context": 1, "context of a message": 1, "label of a message": 1, "input": 1, "role": 1}
    talk = {"messages": [user("Hi")], "tools": [{"type": "function"}]}
    rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No", "label": False, "input": "you"},
            {"chosen": [user("Hi"), assistant("Hm")], "rejected": [user("Hi"), assistant("No")], "input": "you"},
            {"input": talk, "preferred_output": [assistant("Yes")], "non_preferred_output": [assistant("No")]}]
    assert load_preferences(tmp_path, *rows).report.unused == {"label": 1, "input": 1, "tools of a message": 1}


def test_null_is_as_good_as_no_key_and_as_no_text(tmp_path):
    """A table has every column in every row; and what is no text, 0 as well, is not taken for none."""
    none = {"from": None, "value": None}
    rows = [{"messages": [user("Hi") | none, assistant("Hello") | none]},
            {"messages": [{"from": "human", "value": "Hi", "role": None, "content": None},
                          {"from": "gpt", "value": "Welcome", "role": None, "content": None}]},
            {"instruction": "Hi", "input": None, "output": None}, {"instruction": None, "input": "Ho", "output": "Yes"}]
    loaded = load_messages(tmp_path, *rows)
    assert texts(loaded) == [("Hi", "Hello"), ("Hi", "Welcome"), ("Ho", "Yes")]
    assert loaded.report.dropped == {"empty message": 1}
    loaded = load_preferences(tmp_path, *({"prompt": "Hi", "chosen": "Hello", "rejected": r} for r in (None, "No")))
    assert len(loaded.train) == 1 and loaded.report.dropped == {"empty reply": 1}
    assert "output is a number, wanted a string" in failure([{"instruction": "Hi", "output": 4}], tmp_path)
    assert "input is a number" in failure([{"instruction": "Hi", "input": 0, "output": "Hello"}], tmp_path)
    assert "system is a number" in failure([CHAT | {"system": 0}], tmp_path)


@pytest.mark.parametrize(("message", "reason"), [
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, "tool calls"),
    ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "tool calls"),
    ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "tool calls"),
    ({"role": "tool", "tool_call_id": "a"}, "tool calls"), ({"from": "observation", "value": "x"}, "tool calls"),
    (user([{"type": "image_url", "image_url": "x"}]), "content that is no text"),
    (assistant(None), "empty message"), (assistant("Hello") | {"weight": 0}, "no reply has a weight")])
def test_what_is_no_text_is_dropped_with_its_reason(tmp_path, message, reason):
    loaded = load_messages(tmp_path, CHAT, {"messages": [user("Hm?"), message]})
    assert loaded.report.kept == 1 and loaded.report.dropped == {reason: 1}


@pytest.mark.parametrize(("row", "says"), [
    ({"messages": [user("Hi"), assistant("Hello") | {"weight": 0.5}]}, "weight is 0.5, wanted 0 or 1"),
    (CHAT | {"weight": 2}, "weight is 2"), (CHAT | {"label": "bad"}, "label is bad, wanted 0 or 1, false or true"),
    ({"messages": [user([{"type": "text", "text": 1}])]}, "text is a number"),
    (CHAT | {"system": 1}, "system is a number"),
    ({"instruction": "Hi", "output": "Hello", "input": {"a": 1}}, "input is an object")])
def test_what_has_a_meaning_and_not_this_one_is_refused(tmp_path, row, says):
    assert says in failure([OTHER, row], tmp_path)


def test_a_label_that_says_no_is_not_learnt(tmp_path):
    loaded = load_messages(tmp_path, CHAT | {"label": 1}, OTHER | {"label": False}, CHAT | {"weight": 0})
    assert texts(loaded) == [("Hi", "Hello")]
    assert loaded.report.dropped == {"its label is false: a reply that was not wanted": 1, "its weight is 0": 1}


def test_preferences_as_people_have_them(tmp_path):
    first = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: So?\n\nAssistant:"
    rows = {"a transcript": {"prompt": first, "chosen": " Hello", "rejected": " No"},
            "a transcript that comes again": {"prompt": first, "chosen": first + " Hello", "rejected": first + " No"},
            "OpenAI's": {"input": {"messages": [user("Hi"), assistant("Yes?"), user("So?")], "tools": []},
                         "preferred_output": [assistant("Hello")], "non_preferred_output": [assistant("No")]},
            "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"},
                                           {"from": "human", "value": "So?"}],
                         "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {"from": "gpt", "value": "No"}}}
    for name, row in rows.items():
        assert pair_texts(load_preferences(tmp_path, row)) == [(("Hi", "Yes?", "So?"), "Hello", "No")], name
    sides, empty = {"chosen": "Hello", "rejected": "No"}, [system(""), user("Hi")]
    for row, prompt in [({"system": "Be kind.", "question": "Hi"} | sides, ("Be kind.", "Hi")),
                        ({"instruction": "Hi", "input": "you"} | sides, ("Hi\n\nyou",)),
                        ({"prompt": "Say it now", "chosen": "Say it now Hello", "rejected": "Say it now\nNo"},
                         ("Say it now",)),
                        ({"input": "Hi", "preferred_output": "Hello", "non_preferred_output": "No"}, ("Hi",)),
                        ({"prompt": "Hi", "chosen": [*empty, assistant("Hello")],
                          "rejected": [*empty, assistant("No")]}, ("Hi",))]:    # and no empty header
        assert pair_texts(load_preferences(tmp_path, row)) == [(prompt, "Hello", "No")]
    empty = {"prompt": [user("Hi"), assistant(""), user("So?")], "chosen": "Hello", "rejected": "No"}
    loaded = load_preferences(tmp_path, empty, {"prompt": "Hi", "chosen": "Hello", "rejected": "No"})
    assert loaded.report.dropped == {"empty message": 1}


def test_a_guess_that_fails_is_the_formats_fault(tmp_path):
    path = write(tmp_path / "replies.jsonl", [{"chosen": "Paris", "rejected": "London"}] * 3)
    with pytest.raises(ValueError, match=r"keys found: chosen, rejected; keys wanted: prompt too, .*no transcripts"):
        data.load_pairs([path])
    with pytest.raises(ValueError, match=r"wanted: prompt and chosen and rejected, or .*conversations\? use sft\.py"):
        data.load_pairs([write(tmp_path / "chats.jsonl", [CHAT])])
    with pytest.raises(ValueError, match=r"keys wanted: messages, or conversations, or .*instruction and output"):
        data.load_rows([write(tmp_path / "text.jsonl", [{"text": "x"}])])
    with pytest.raises(ValueError, match=r"UltraFeedback\? write ultrafeedback:PATH"):
        data.load_pairs([write(tmp_path / "ultra.jsonl", [ultrafeedback()])])
    halves = [{"instruction": "Hi", "answer": "x"}, {"question": "Hi", "answers": []}]  # sft.py need not be told of it
    assert all("use sft.py" not in failure([row], tmp_path) for row in halves)
    with pytest.raises(ValueError, match=r"conversations\? use sft\.py"):
        data.load_pairs([write(tmp_path / "replies.jsonl", [{"prompt": "Hi", "completion": "Hello"}])])
    with pytest.raises(ValueError, match=r"keys found: question, response_j, response_k;[^?]*$"):
        data.load_pairs([write(tmp_path / "other.jsonl", [{"question": "Hi", "response_j": "x", "response_k": "y"}])])


def test_labels_become_pairs_where_one_prompt_has_both(tmp_path):
    rows = [{"prompt": "Hi", "completion": reply, "label": label}
            for reply, label in (("Hello", True), ("No", False), ("Welcome", 1), ("Hello", 0))]
    rows += [{"prompt": "Bye", "completion": "See you", "label": True}, CHAT | {"label": False},
             OTHER | {"label": False}, {"messages": [user("So?")], "label": True}]
    loaded = load_preferences(tmp_path, *rows)
    found = {(tuple(prompt), chosen, rejected) for prompt, chosen, rejected in pair_texts(loaded)}
    pairs = {("Hello", "No"), ("Welcome", "No"), ("Welcome", "Hello")}      # Hello was wanted, and unwanted twice
    assert found == {(("Hi",), *pair) for pair in pairs} | {(("Hi",), "Hello", "Welcome")}
    assert loaded.report.dropped == {"no reply of the other label to its prompt": 1, "no reply at the end": 1,
                                     "identical replies": 3, "the same pair was read before": 1}
    assert loaded.report.notes == {"read as prompt, completion with labels (KTO)": 5,
                                   "read as messages with labels (KTO)": 3}
    some = [{"prompt": "Hi", "completion": str(label), "label": label} for label in (True, False, None)]
    loaded = load_preferences(tmp_path, *some)
    assert pair_texts(loaded) == [(("Hi",), "True", "False")] and loaded.report.dropped == {"no label": 1}
    many = [{"prompt": "Hi", "completion": str(i), "label": i % 2} for i in range(80)]
    loaded = load_preferences(tmp_path, *many)
    assert loaded.report.kept == 32 * 32 and loaded.report.dropped == {"beyond 32 replies of a label": 16}


def test_what_else_a_row_of_preferences_says_changes_nothing(tmp_path):
    """The chat keeps with each pair whose replies they were and how the vote went."""
    row = {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("No")]}
    about = {"models": ["runs/dpo", "runs/sft"], "vote": "left", "blind": True, "other": [assistant("No")]}
    plain, more = load_preferences(tmp_path, row), load_preferences(tmp_path, row | about)
    assert plain.fingerprint == more.fingerprint and not more.report.dropped


def test_preferences_that_say_nothing_are_dropped(tmp_path):
    loaded = load_preferences(
        tmp_path, {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": " Hello\n"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": " "}, {"prompt": " ", "chosen": "Hello", "rejected": "No"},
        {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Ho"), assistant("No")]},
        {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi")]})
    assert len(loaded.train) == 1
    assert loaded.report.dropped == {"identical replies": 1, "empty reply": 1, "no prompt": 1, "no reply at the end": 1,
                                     "the sides differ before the last reply": 1}


def test_hh_rlhf_is_split_at_blank_lines_only(tmp_path):
    opening = "\n\nHuman: What does\nHuman: mean?\n\nAssistant: A role. Assistant: too.\n\nHuman: Thanks\n\nAssistant:"
    loaded = load_preferences(tmp_path, {"chosen": opening + " Welcome!\n\nReally.", "rejected": opening + " Bye"},
                              name="hh-rlhf")
    prompt = ("What does\nHuman: mean?", "A role. Assistant: too.", "Thanks")
    assert pair_texts(loaded) == [(prompt, "Welcome!\n\nReally.", "Bye")]


@pytest.mark.parametrize(("chosen", "rejected", "reason"), [
    ("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: a\n\nAssistant: C", "the sides differ before the last reply"),
    ("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
     "the sides differ before the last reply"),
    ("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: A\n\nAssistant: B ", "identical replies"),
    ("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: A\n\nAssistant:", "empty reply"),
    ("\n\nHuman: A\n\nAssistant: B", "\n\nHuman: A", "no reply at the end"),
    ("\n\nAssistant: B", "\n\nAssistant: C", "no prompt"),
    ("Well. \n\nHuman: A\n\nAssistant: B", "\n\nHuman: A\n\nAssistant: C", "text before the first turn"),
    ("", "\n\nHuman: A\n\nAssistant: C", "empty transcript")])
def test_what_hh_rlhf_drops(tmp_path, chosen, rejected, reason):
    good = {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: C"}
    loaded = load_preferences(tmp_path, good, {"chosen": chosen, "rejected": rejected}, name="hh-rlhf")
    assert loaded.report.kept == 1 and loaded.report.dropped == {reason: 1}


def completion(response, *ratings, overall=1.0):
    return {"response": response, "overall_score": overall, "model": "m", "critique": "", "custom_system_prompt": "",
            "annotations": {aspect: {"Rating": rating, "Rationale": ""}
                            for aspect, rating in zip(data.ASPECTS, ratings, strict=True)}}


def ultrafeedback(*completions):
    return {"source": "s", "instruction": "Why?", "models": ["m"], "completions": list(completions),
            "correct_answers": ["None"], "incorrect_answers": ["None"]}


def test_ultrafeedback_goes_by_the_mean_of_the_aspects(tmp_path):
    row = ultrafeedback(completion("worst", "1", "2", "1", "1", overall=10.0), completion("best", "5", "N/A", "4", "5"),
                        completion("middle", "5", "5", "4", "4"), completion("unrated", "N/A", "N/A", "N/A", "N/A"))
    # best: (5 + 4 + 5) / 3 = 4.67, middle: 18 / 4 = 4.5, worst: 5 / 4, its overall score of ten notwithstanding
    loaded = load_preferences(tmp_path, row, name="ultrafeedback")
    assert pair_texts(loaded) == [(("Why?",), "best", "worst")]


def test_what_ultrafeedback_drops(tmp_path):
    good = [completion("a", "5", "5", "5", "5"), completion("b", "1", "1", "1", "1")]
    loaded = load_preferences(
        tmp_path, ultrafeedback(*good), ultrafeedback(good[0]), ultrafeedback(good[0], completion("b", *"5555")),
        ultrafeedback(), ultrafeedback(good[0], completion("c", *["N/A"] * 4)),
        ultrafeedback(good[0], completion(" ", *"1111")), ultrafeedback(good[0], completion("a", *"1111")),
        name="ultrafeedback")
    assert loaded.report.kept == 1
    assert loaded.report.dropped == {"fewer than two rated replies": 4, "tied ratings": 1, "identical replies": 1}


# ---- folders with the Hub's columns, and the Hub -------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A function that writes splits as a folder of parquet or JSON, in the layout of the Hub."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(form="parquet", config=None, **splits):
        folder = tmp_path / "hub" / (config or "data")
        folder.mkdir(parents=True)
        for split, rows in splits.items():
            table = datasets.Dataset.from_list(rows)
            if form == "parquet":
                table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
            else:
                table.to_json(folder / f"{split}.jsonl")
        if config:
            (tmp_path / "hub" / "README.md").write_text(
                f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
                f"  - split: train\n    path: {config}/train-*\n---\n")
        return tmp_path / "hub"
    return make


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_oasst_from_a_folder_with_the_hubs_columns(hub_folder, tmp_path, form):
    other = tree(message("p6", replies=[message("a6", rank=0), message("a7", rank=1, labels=SPAM),
                                        message("a8", rank=2)]))
    train, validation = flat_rows([GOOD]), flat_rows([other, GOOD])     # GOOD is in both splits
    folder = hub_folder(form, train=train, validation=validation)
    for load in (data.load_rows, data.load_pairs):
        loaded = load([f"oasst2:{folder}"], data.Reading(val_fraction=0))
        nested = oasst(tmp_path, GOOD, other, load=load)
        assert loaded.fingerprint == nested.fingerprint
        assert loaded.report.dropped == nested.report.dropped == {"spam": 1}
        assert loaded.report.notes["messages that were there already"] == 6


def test_smoltalk_from_a_folder_with_its_configuration(hub_folder):
    chat = [system("Be kind."), user("Hi"), assistant("Hello")]
    folder = hub_folder(config="all", train=[{"messages": chat, "source": "x"}, {"messages": chat[:2], "source": "x"}])
    loaded = data.load_rows([f"smoltalk:{folder}"])
    assert texts(loaded) == [("Be kind.", "Hi", "Hello")] and loaded.report.dropped == {"no reply": 1}


def test_hh_rlhf_and_ultrafeedback_from_folders(hub_folder, tmp_path):
    hh = [{"chosen": f"\n\nHuman: {i}\n\nAssistant: B", "rejected": f"\n\nHuman: {i}\n\nAssistant: C"} for i in "123"]
    loaded = data.load_pairs([f"hh-rlhf:{hub_folder('json', train=hh[:2], test=hh[2:])}"])
    assert loaded.report.kept == 3
    ultra = [ultrafeedback(completion("a", *"5555"), completion("b", *"1111"))]
    for part in (tmp_path / "hub" / "data").iterdir():
        part.unlink()
    (tmp_path / "hub" / "data").rmdir()
    assert data.load_pairs([f"ultrafeedback:{hub_folder(train=ultra)}"]).report.kept == 1


def test_a_folder_with_other_columns_says_what_it_found(hub_folder):
    folder = hub_folder(train=[{"question": "Hi", "answer": "Hello"}])
    with pytest.raises(ValueError, match=r"train row 1: keys found: answer, question; keys wanted: messages"):
        data.load_rows([f"smoltalk:{folder}"])


def test_a_parquet_file_and_a_folder_that_is_no_data_set(hub_folder, tmp_path):
    folder = hub_folder(train=[{"messages": [user("Hi"), assistant("Hello")]}])
    assert data.load_rows([str(next(folder.rglob("*.parquet")))]).report.kept == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="load_dataset cannot read it"):
        data.load_rows([str(tmp_path / "empty")])


def test_a_spec_names_a_split_and_the_report_which_were_read(hub_folder):
    def rows(*numbers):
        return [{"messages": [user(f"Hi {i}"), assistant("Hello")]} for i in numbers]
    folder = hub_folder(train_sft=rows(1, 2, 3), test_sft=rows(4), train_prefs=rows(1, 2, 3))
    reading = data.Reading(val_fraction=0)
    loaded = data.load_rows([str(folder)], reading)
    assert loaded.report.kept == 4 and loaded.report.dropped == {"the same conversation was read before": 3}
    assert loaded.report.notes == {"rows of the split train_sft": 3, "rows of the split test_sft": 1,
                                   "rows of the split train_prefs": 3}
    for spec in (f"{folder}#train_prefs", f"smoltalk:{folder}#train_prefs", f"{folder}#train_prefs@2"):
        loaded = data.load_rows([spec], reading)
        assert loaded.report.kept == 3 and loaded.report.notes == {"rows of the split train_prefs": 3}
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has (train|test)_\w+, "):
        data.load_rows([f"{folder}#dev"])
    assert data.parse_spec("smoltalk#train@0.5") == ("smoltalk", Path("#train"), 0.5)
    name = write(folder / "a#b.jsonl", rows(5))
    assert data.load_rows([name], reading).report.kept == 1      # a file may be called so
    with pytest.raises(ValueError, match="is a file and has no splits"):
        data.load_rows([name + "#train"])


def test_hub_names():
    assert {name: d.hub for name, d in data.DATA_SETS.items() if d.hub} == {
        "oasst1": "OpenAssistant/oasst1", "oasst2": "OpenAssistant/oasst2", "smoltalk": "HuggingFaceTB/smoltalk",
        "smol-smoltalk": "HuggingFaceTB/smol-smoltalk",
        "everyday-conversations": "HuggingFaceTB/everyday-conversations-llama3.1-2k",
        "hh-rlhf": "Anthropic/hh-rlhf", "ultrafeedback": "openbmb/UltraFeedback"}
    assert data.DATA_SETS["smoltalk"].config == "all"


# ---- few rows, and what they have ----------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch_size", "steps"), [(1, 2, 2), (10, 2, 15), (24, 2, 36), (100, 8, 38),
                                                           (1000, 32, 94)])
def test_three_passes(rows, batch_size, steps):
    assert data.three_passes(rows) == (batch_size, steps)
    assert 3 <= batch_size * steps / rows < 3.1 or rows < 10


def test_the_report_counts_system_messages(tmp_path):
    chat = [user("Hi"), assistant("Hello")]
    loaded = load_messages(tmp_path, {"messages": chat}, {"messages": [system("Be kind."), *chat]},
                           {"messages": [user("system"), assistant("system")]})
    assert loaded.report_json()["system_messages"] == 1
    pairs = load_preferences(tmp_path, {"prompt": [system("S"), user("Hi")], "chosen": "a", "rejected": "b"},
                             {"prompt": "Hi", "chosen": "a", "rejected": "b"})
    assert pairs.report_json()["system_messages"] == 1


# ---- shortening ----------------------------------------------------------------------------------


def test_whole_oldest_exchanges_go_before_the_end_of_a_reply(tmp_path):
    chat = [system(words(4)), user(words(10)), assistant(words(10)), user(words(5)), assistant(words(6)),
            user(words(3)), assistant(words(4))]
    sizes = [3 + 4, 3 + 10, 4 + 10, 3 + 5, 4 + 6, 3 + 3, 4 + 4]      # header and content
    assert len(data.render(chat)[0]) == sum(sizes) + 1
    for context, kept in [(sum(sizes) + 1, chat), (sum(sizes), chat[:1] + chat[3:]),
                          (sizes[0] + sum(sizes[3:]) + 1, chat[:1] + chat[3:]),
                          (sizes[0] + sum(sizes[3:]), chat[:1] + chat[5:])]:
        loaded = load_messages(tmp_path, {"messages": chat}, context=context)
        assert messages_of(loaded.train[0].ids) == kept
        assert loaded.train[0].ids[-1] == EOT and loaded.train[0].mask[-1]


def test_a_cut_reply_has_no_closing_token_as_target(tmp_path):
    chat = [user(words(5)), assistant(words(10))]     # 3 + 5 + 4 + 10 and the closing token: 23
    for context in (23, 22, 15):
        loaded = load_messages(tmp_path, {"messages": chat}, context=context)
        row = loaded.train[0]
        assert len(row) == context and row.mask.sum() == context - 12
        assert (row.ids[-1] == EOT) == (context == 23)
        assert loaded.report.notes == ({} if context == 23 else {"lost the end of its last reply": 1})


def test_a_row_without_a_target_is_dropped(tmp_path):
    loaded = load_messages(tmp_path, {"messages": [user(words(12)), assistant("Hi")]},
                           {"messages": [user("Hi"), assistant("Hello")]}, context=19)
    assert loaded.report.kept == 1 and loaded.report.dropped == {"no reply within the context": 1}


def test_what_a_shortened_row_lost_is_learnt_in_the_next_one(tmp_path):
    long = message("p2", text=words(40), replies=[message("a2", rank=0)])
    short = message("p3", replies=[message("a3", rank=1)])
    loaded = oasst(tmp_path, tree(message("p1", replies=[message("a1", replies=[long, short])])), context=52)
    assert sorted(map(learnt, loaded.train)) == ["text a1<|endoftext|>text a3<|endoftext|>", "text a2<|endoftext|>"]


def test_pairs_share_a_prompt_that_is_shortened_from_the_front(tmp_path):
    prompt = [system("Be kind."), user(words(10)), assistant(words(10)), user(words(9, start=1))]
    row = {"prompt": prompt, "chosen": words(5), "rejected": words(2)}
    # system 6, exchange 13 + 14, user 3 + 9, the opening of the reply 4; chosen 5 + EOT
    whole = 6 + 27 + 12 + 4 + 6
    kept = load_preferences(tmp_path, row, context=whole).train[0]
    assert len(kept.prompt) == whole - 6 and len(kept.chosen) == 6 and len(kept.rejected) == 3
    less = load_preferences(tmp_path, row, context=whole - 1)
    assert messages_of(less.train[0].prompt)[:-1] == [prompt[0], prompt[3]]
    least = load_preferences(tmp_path, row, context=whole - 27 - 8).train[0]     # one token of the question is left
    assert messages_of(least.prompt) == [prompt[0], user(" five"), assistant("")]
    assert len(least.prompt) + len(least.chosen) == whole - 27 - 8
    for pair in (kept, less.train[0], least):   # replies stay whole
        assert data.text_of(pair.chosen) == words(5) + "<|endoftext|>"
        assert data.text_of(pair.rejected) == words(2) + "<|endoftext|>"
        assert pair.prompt[-4:].tolist() == ASSISTANT
    with pytest.raises(ValueError, match="replies too long for the context 1"):
        load_preferences(tmp_path, row, context=whole - 27 - 9)


@SLOW
@given(st.lists(st.tuples(st.sampled_from(data.ROLES), st.integers(1, 12)), min_size=1, max_size=8), st.integers(1, 90))
def test_without_oldest_keeps_the_head_and_a_tail_that_opens_an_exchange(turns, room):
    messages = [{"role": role, "content": words(n)} for role, n in turns]
    kept = data.without_oldest(messages, room)
    head = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    tail = len(kept) - head
    assert kept[:head] == messages[:head] and kept[head:] == messages[len(messages) - tail:]
    if tail < len(messages) - head:     # something went: it had to, and what is left starts with the user
        before = len(messages) - tail
        assert kept[head]["role"] == "user" != messages[before - 1]["role"]
        assert len(data.render(messages)[0]) > room
    if len(data.render(kept)[0]) > room:    # still too long: then it is the last exchange
        assert not any(b["role"] == "user" != a["role"] for a, b in pairwise(kept[head:]))


# ---- splitting and weighing ----------------------------------------------------------------------


def chats(n, name="q"):
    return [{"messages": [user(f"{name} {i}"), assistant(f"answer {j}")]} for i in range(n) for j in range(3)]


def openings(rows):
    return [messages_of(row.ids)[0]["content"] for row in rows]


def test_train_and_validation_never_share_a_tree(tmp_path):
    path = write(tmp_path / "a.jsonl", chats(200))
    loaded = data.load_rows([path], data.Reading(val_fraction=0.2))
    train, val = set(openings(loaded.train)), set(openings(loaded.val))
    assert not train & val and len(train | val) == 200 and 20 <= len(val) <= 60
    assert len(loaded.val) == 3 * len(val) and len(loaded.train) == 3 * len(train)
    # the side does not depend on what else is loaded, nor on being loaded as pairs; another seed splits otherwise
    other = write(tmp_path / "b.jsonl", chats(50, "other"))
    more = data.load_rows([other, path], data.Reading(val_fraction=0.2))
    assert {o for o in openings(more.val) if o.startswith("q")} == val
    assert set(openings(data.load_rows([path], data.Reading(val_fraction=0.2, seed=1)).val)) != val
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f" Q  {i}", "chosen": "a", "rejected": "b"} for i in range(200)])
    pairs = data.load_pairs([pairs], data.Reading(val_fraction=0.2))
    assert {messages_of(p.prompt)[0]["content"].replace("Q  ", "q ") for p in pairs.val} == val


def test_two_trees_suffice_for_both_sides_and_one_is_trained_on(tmp_path):
    for n in (1, 2, 3):
        for seed in range(20):
            loaded = data.load_rows([write(tmp_path / "few.jsonl", chats(n))], data.Reading(seed=seed))
            assert loaded.train and bool(loaded.val) == (n > 1)


def test_the_conversations_behind_validation(tmp_path):
    loaded = data.load_rows([write(tmp_path / "a.jsonl", chats(9))])
    assert [m["role"] for m in messages_of(loaded.val[0].ids)] == ["user", "assistant"]
    pairs = write(tmp_path / "p.jsonl", [{"prompt": f"Q {i}", "chosen": "yes", "rejected": "no"} for i in range(9)])
    pair, *_ = data.load_pairs([pairs]).val
    assert messages_of([*pair.prompt, *pair.chosen])[1:] == [assistant("yes")]


def test_weights(tmp_path):
    path, plain = write(tmp_path / "a.jsonl", chats(300)), {}
    for weight in ("", "@2", "@0.5", "@2.5"):
        loaded = data.load_rows([path + weight], data.Reading(val_fraction=0.1))
        plain[weight] = Counter(openings(loaded.train))
        everything = Counter(openings(data.load_rows([path], data.Reading(val_fraction=0.1)).val))
        assert Counter(openings(loaded.val)) <= everything      # never more than once, and fewer where fewer are read
        assert weight == "@0.5" or len(loaded.val) == sum(everything.values())
        assert loaded.fingerprint == data.load_rows([path + weight], data.Reading(val_fraction=0.1)).fingerprint
        assert loaded.report.kept + sum(loaded.report.dropped.values()) == 900
    assert plain["@2"] == plain[""] + plain[""]
    assert plain["@0.5"] < plain[""] and 0.4 < plain["@0.5"].total() / plain[""].total() < 0.6
    assert plain["@2.5"] == plain["@2"] + plain["@0.5"]     # the same ones


def test_a_weight_draws_conversations_and_not_openings(tmp_path):
    replies = [f"Hello {i}" for i in range(200)]
    path = write(tmp_path / "hi.jsonl", [{"messages": [user("Hi"), assistant(reply)]} for reply in replies])
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "Hi", "chosen": reply, "rejected": "No"} for reply in replies])
    for load, spec in ((data.load_rows, path), (data.load_pairs, pairs)):
        loaded = load([spec + "@0.5"])
        kept = loaded.report.kept
        assert 75 < kept < 125 and loaded.report.dropped == {"left out by its weight": 200 - kept}
        assert load([spec + "@0.5"], data.Reading(seed=1)).fingerprint != loaded.fingerprint


def test_what_is_there_several_times_counts_once(tmp_path):
    path, copy = write(tmp_path / "a.jsonl", chats(20)), write(tmp_path / "b.jsonl", [CHAT, *chats(20), CHAT])
    once, twice = data.load_rows([path]), data.load_rows([path, copy])
    assert [count.kept for count in twice.counts] == [60, 1]
    assert twice.counts[1].dropped == {"the same conversation was read before": 61}
    assert len(twice.train + twice.val) == len(once.train + once.val) + 1


@pytest.mark.parametrize("spec", ["sample@0", "sample@101", "sample@0.0"])
def test_weights_that_make_no_sense(spec):
    with pytest.raises(ValueError, match="must be a number above 0"):
        data.parse_spec(spec)


def test_specs():
    assert data.parse_spec("sample") == ("sample", None, 1)
    assert data.parse_spec("smoltalk@0.5") == ("smoltalk", None, 0.5)
    assert data.parse_spec("oasst1:a/b.jsonl.gz@2") == ("oasst1", Path("a/b.jsonl.gz"), 2)
    assert data.parse_spec("me@home.jsonl") == ("jsonl", Path("me@home.jsonl"), 1)
    assert data.parse_spec("c:/chats.jsonl") == ("jsonl", Path("c:/chats.jsonl"), 1)


def test_the_fingerprint_sees_every_id_and_every_mask(tmp_path):
    chats = ([user("a"), assistant("b")], [user("a"), assistant("c")], [user("b"), assistant("b")],
             [assistant("b"), assistant("b")])
    assert len({load_messages(tmp_path, {"messages": chat}).fingerprint for chat in chats}) == 4


# ---- batches -------------------------------------------------------------------------------------


def row(n, targets):
    mask = np.zeros(n, bool)
    mask[targets] = True
    return data.Row(np.arange(100, 100 + n, dtype=np.int32), mask)


def test_rows_packed_by_hand():
    """In the order of their bytes."""
    batch = data.pack([row(3, [1, 2]), row(4, [3]), row(2, [0])], [1, 0, 2])
    assert batch.tokens.tolist() == [100, 101, 100, 101, 102, 100, 101, 102, 103]
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert batch.spans == ((2, ()), (3, ()), (4, ()))
    assert batch.index.tolist() == [2, 3, 7] and batch.targets.tolist() == [101, 102, 103]
    assert batch.target_span.tolist() == [1, 1, 2] and batch.rows.tolist() == [1, 0, 2]
    assert batch.pairs.shape == (0, 2) and batch.row_tokens == 9


def pair(*parts):
    return data.Pair(*(np.array(ids, np.int32) for ids in parts))


def test_pairs_packed_by_hand(monkeypatch):
    """Three replies to one prompt make three pairs, and are computed once, with the prompt before all of them."""
    monkeypatch.setattr(data, "WORTH_SHARING", 1)
    best, middling, worst = [4, 5, EOT], [6, EOT], [7, 7, EOT]
    pairs = [pair([1, 2, 3], *replies) for replies in ((best, middling), (best, worst), (middling, worst))]
    batch = data.pack(pairs, [2, 0, 1])
    assert batch.tokens.tolist() == [1, 2, 3, *best, *middling, *worst]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5]     # a reply goes on from its prompt
    assert batch.spans == ((6, ()), (2, ((0, 3),)), (3, ((0, 3),)))
    assert batch.pairs.tolist() == [[1, 2], [0, 1], [0, 2]]
    assert batch.targets.tolist() == [*best, *middling, *worst]
    assert batch.target_span.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.index.tolist() == [2, 3, 4, 2, 6, 2, 8, 9]     # the prompt's last token predicts each one's first
    assert batch.row_tokens == 8 + 9 + 8


def test_a_tree_packed_by_hand(monkeypatch):
    """1 2 3 4 5, then 1 2 3 4 6 7, which shares four tokens with it, then 1 2 8, which shares two with that."""
    monkeypatch.setattr(data, "WORTH_SHARING", 2)
    ids = ([1, 2, 3, 4, 5], [1, 2, 8], [1, 2, 3, 4, 6, 7], [1, 2, 3, 4, 6, 9])
    learnt = ([2, 4], [2], [5], [4, 5])
    rows = [data.Row(np.array(i, np.int32), np.isin(np.arange(len(i)), t)) for i, t in zip(ids, learnt, strict=True)]
    batch = data.pack(rows, range(4))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 8]
    assert batch.spans == ((5, ()), (2, ((0, 4),)), (1, ((0, 4), (1, 1))), (1, ((0, 2),)))
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 2]
    assert batch.targets.tolist() == [3, 5, 7, 6, 9, 8] and batch.index.tolist() == [1, 3, 5, 3, 5, 1]
    assert batch.row_tokens == 5 + 3 + 6 + 6
    monkeypatch.setattr(data, "WORTH_SHARING", 5)
    assert [span.prefix for span in data.pack(rows, range(4)).spans] == [(), (), ((1, 5),), ()]


def test_a_row_that_is_there_twice_counts_twice(monkeypatch):
    monkeypatch.setattr(data, "WORTH_SHARING", 1)
    batch = data.pack([row(4, [1, 3])], [0, 0])
    assert batch.tokens.tolist() == [100, 101, 102, 103, 103] and batch.spans == ((4, ()), (1, ((0, 3),)))
    assert batch.targets.tolist() == [101, 103] * 2 and batch.index.tolist() == [0, 2] * 2
    twice = data.pack([pair([1], [2], [3])], [0, 0])
    assert len(twice.spans) == 2 and twice.pairs.tolist() == [[0, 1], [0, 1]]     # two losses of the same two replies


TREES = st.lists(st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=9), st.integers(0, 2**9 - 1)), max_size=9)


def rows_of(trees):
    return [data.Row(np.array(ids, np.int32), np.array([bits >> t & 1 for t in range(len(ids))], bool),
                     f"tree {ids[0]}" if bits % 3 else None) for ids, bits in trees]


@SLOW
@given(TREES, st.integers(1, 4))
def test_every_text_of_a_batch_can_be_read_back(trees, worth):
    rows = rows_of(trees)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WORTH_SHARING", worth)
        batch = data.pack(rows, range(len(rows)))
    starts, read = np.cumsum([0, *(span.tokens for span in batch.spans)]), []
    for n, span in enumerate(batch.spans):
        assert all(k <= batch.spans[m].tokens and m < n for m, k in span.prefix)
        places = np.concatenate([*(np.arange(starts[m], starts[m] + k) for m, k in span.prefix),
                                 np.arange(starts[n], starts[n + 1])])
        assert batch.positions[places].tolist() == list(range(len(places)))
        read.append(batch.tokens[places].tolist())
    assert sorted(read) == sorted(row.ids.tolist() for row in rows) and len(batch.tokens) == starts[-1]
    learnt = zip([read[n] for n in batch.target_span], batch.positions[batch.index] + 1, batch.targets, strict=True)
    assert sorted((ids, int(t), int(target)) for ids, t, target in learnt) == sorted(
        (row.ids.tolist(), int(t), int(row.ids[t])) for row in rows for t in np.flatnonzero(row.mask) if t)
    places = zip(batch.target_span, batch.index, strict=True)
    assert all(read[n][batch.positions[i]] == batch.tokens[i] for n, i in places)


def test_an_empty_batch_is_a_batch():
    batch = data.pack([], [])
    assert len(batch.tokens) == len(batch.targets) == len(batch.spans) == batch.row_tokens == 0
    assert data.micro_batches([], [], 100) == []


@SLOW
@given(st.lists(st.integers(2, 60), max_size=40), st.integers(10, 100))
def test_micro_batches_lose_nothing(lengths, budget):
    rows = [data.Row(ids, np.ones(n, bool)) for n, ids in zip(
        lengths, (np.arange(1000 * i, 1000 * i + n, dtype=np.int32) for i, n in enumerate(lengths)), strict=True)]
    batches = data.micro_batches(rows, range(len(rows)), budget)
    assert sorted(i for batch in batches for i in batch.rows.tolist()) == list(range(len(rows)))
    assert all(len(batch.tokens) <= budget or len(batch.rows) == 1 for batch in batches)
    assert sum(len(batch.tokens) for batch in batches) == sum(lengths)
    if lengths and max(lengths) <= budget / 4:      # few: all but full
        assert len(batches) <= np.ceil(sum(lengths) / budget) * 1.34 + 1


@SLOW
@given(TREES, st.integers(1, 4), st.integers(1, 12))
def test_micro_batches_of_trees_lose_nothing(trees, worth, budget):
    rows = rows_of(trees)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "WORTH_SHARING", worth)
        batches = data.micro_batches(rows, range(len(rows)), budget)
        assert all(len(batch.tokens) == data.tokens_computed([rows[i] for i in batch.rows]) for batch in batches)
    assert sorted(i for batch in batches for i in batch.rows.tolist()) == list(range(len(rows)))
    assert all(len(batch.tokens) <= budget or len(batch.rows) == 1 for batch in batches)
    assert sum(batch.row_tokens for batch in batches) == sum(map(len, rows))


def test_micro_batches_are_few_and_even():
    rows = [data.Row(np.arange(100 * i, 100 * i + n, dtype=np.int32), np.ones(n, bool))
            for i, n in enumerate((50, 50, 30, 30, 20, 20))]
    assert [len(b.tokens) for b in data.micro_batches(rows, range(6), 100)] == [100, 100]
    assert [len(b.tokens) for b in data.micro_batches(rows, range(6), 110)] == [100, 100]


def test_families_are_computed_together(monkeypatch):
    """Five pairs of one prompt's four replies, among others: in one batch if the budget allows it."""
    monkeypatch.setattr(data, "WORTH_SHARING", 1)
    replies = [[10 + i] * 10 for i in range(4)]
    ranked = [pair(range(40), better, worse) for i, better in enumerate(replies) for worse in replies[i + 1:]]
    others = [pair([50 + i] * 20, [60 + i] * 20, [70 + i] * 20) for i in range(5)]
    rows = [rows for both in zip(ranked, others, strict=False) for rows in both]
    batches = data.micro_batches(rows, range(10), 80)
    assert sorted(len(batch.tokens) for batch in batches) == [60, 60, 60, 60, 60, 80]
    assert [sorted(b.rows.tolist()) for b in batches if len(b.rows) > 1] == [[0, 2, 4, 6, 8]]
    assert sorted(data.divide(rows, range(4), 70)) == [(60, [1]), (60, [3]), (70, [0, 2])]
    assert sorted(data.divide(rows, range(4), 69)) == [(60, [n]) for n in range(4)]


def order(rows, batch_size, seed):
    return data.Order([row(2, [1])] * rows if isinstance(rows, int) else rows, batch_size, seed)


@SLOW
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 7), st.integers(0, 2**31))
def test_order_visits_every_row_once_an_epoch(n, batch_size, trees, seed):
    """And the rows of a tree one after another."""
    rows = [data.Row(np.zeros(2, np.int32), np.ones(2, bool), f"{i % trees}" if i % 2 else None) for i in range(n)]
    steps, families = data.Order(rows, batch_size, seed), data.families(rows)
    assert len(set(families)) == (n + 1) // 2 + len({i % trees for i in range(1, n, 2)})
    stream = np.concatenate([steps(step) for step in range(3 * n // batch_size + 1)])
    for epoch in range(len(stream) // n):
        visited = stream[epoch * n:(epoch + 1) * n].tolist()
        assert sorted(visited) == list(range(n))
        parts = sum(math.ceil(size / data.Order.TOGETHER) for size in Counter(families.tolist()).values())
        assert len(set(families)) <= len(list(groupby(families[visited]))) <= parts


def test_no_prompt_dominates_a_step():
    """A tenth of all pairs answer "Hi": no step of 48 is half that, and they still come several at a time."""
    rows = [pair([1], [2], [3 + i]) if i % 10 == 0 else pair([i + 10], [2], [3]) for i in range(3000)]
    hi = np.arange(3000) % 10 == 0
    steps = [hi[order(rows, 48, 0)(step)] for step in range(60)]
    assert max(step.sum() for step in steps) <= 24
    assert sum(hi for hi, _ in groupby(np.concatenate(steps))) <= math.ceil(300 / data.Order.TOGETHER)


def test_order_is_a_pure_function():
    there = [order(17, 5, 3)(step).tolist() for step in range(40)]
    steps = order(17, 5, 3)
    assert there == [steps(step).tolist() for step in reversed(range(40))][::-1]
    # position p of the stream is the same whatever the batch size
    by_ten = np.concatenate([order(17, 10, 3)(step) for step in range(10)])
    assert np.concatenate(there)[:100].tolist() == by_ten.tolist()
    assert order(1000, 1000, 0)(0).tolist() != order(1000, 1000, 1)(0).tolist() != list(range(1000))
    one = order([pair([1], [2], [3])] * 1000, 1000, 0)     # a family is shuffled too, and anew in each epoch
    assert one(0).tolist() != one(1).tolist() != list(range(1000))


# ---- what is looked at before, and files written whole -------------------------------------------


def test_specs_are_looked_at_without_a_row_read(tmp_path, monkeypatch):
    own = write(tmp_path / "chats.jsonl", [b"nonsense"])
    monkeypatch.setattr(data, "file_rows", lambda path: pytest.fail("it reads"))
    monkeypatch.setattr(data, "hub_rows", lambda *_: pytest.fail("it asks the Hub"))
    data.check_specs([own, f"oasst1:{own}@0.5", "smoltalk", str(tmp_path), "sample"], "conversations")
    for spec, what, says in (("nowhere.jsonl", "conversations", "nowhere"), ("hh-rlhf", "conversations", "holds no"),
                             ("smoltalk", "preferences", "holds no"), ("oasst1:nowhere", "preferences", "no file"),
                             ("sample@0", "preferences", "weight")):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            data.check_specs([own, spec], what)
    with pytest.raises(ValueError, match="names no data set"):
        data.check_specs([], "conversations")


@pytest.mark.parametrize("setting", [{"seed": -1}, {"seed": 2**64}, {"context": 0}, {"val_fraction": -0.1},
                                     {"val_fraction": 1.0}, {"val_fraction": float("nan")}])
def test_settings_that_make_no_sense_are_refused_where_data_is_read(setting):
    [name] = setting
    with pytest.raises(ValueError, match=rf"{data.option(name)} is .*; it has to be "):
        data.load_rows(["sample"], data.Reading(**setting))


def test_a_file_system_that_syncs_no_folders_is_taken_as_it_is(tmp_path, monkeypatch):
    fsync, kinds = os.fsync, []

    def fails_with(number):
        def fail(handle):
            kinds.append(os.path.isdir(f"/proc/self/fd/{handle}"))
            if kinds[-1]:
                raise OSError(number, os.strerror(number))
            fsync(handle)
        monkeypatch.setattr(os, "fsync", fail)

    for number in (errno.EINVAL, errno.ENOTSUP):
        fails_with(number)
        data.write_file(tmp_path / "a", str(number))
        assert (tmp_path / "a").read_text() == str(number)
    assert kinds == [False, True] * 2
    fails_with(errno.EIO)  # which is another matter
    with pytest.raises(OSError, match="Input/output"):
        data.write_file(tmp_path / "a", "more")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # and nothing half done


# ---- hostile input -------------------------------------------------------------------------------



def failure(rows, tmp_path, **options):
    """The message of the error that a file of these rows is."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        data.load_rows([write(tmp_path / "bad.jsonl", rows)], data.Reading(**options))
    text = str(error.value)
    assert len(text.splitlines()) <= 5 and "Traceback" not in text
    assert all(c.isprintable() or c == "\n" for c in text)
    return text


@pytest.mark.parametrize(("bad", "says"), [
    (b"{", "not JSON"), (b"\x89PNG\r\x1a", "not UTF-8"), (b"\xff\xfe{\x00}\x00", "not UTF-8"),
    (b"\x00\x00", "not JSON"), (b'"\x1b[2J"', "not JSON"), (b"1" * 5000, "not JSON"), (b"null", "found null"),
    ([1], "found a list, wanted an object"),
    ({"text": "x", "id": 1}, "keys found: id, text; keys wanted: messages"),
    ({"prompt": "x", "chosen": "y"}, "add --pairs"), ({"message_tree_id": "x", "prompt": {}}, "oasst1:PATH"),
    ({"messages": "x"}, "messages is a string, wanted a list"), ({"messages": []}, "messages is empty"),
    ({"messages": [1]}, "found a number"),
    ({"messages": [{"role": "user"}]}, "keys found: role; keys wanted: role, content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "content is a list, wanted a string"),
    ({"messages": [{"role": "\x1b[2Jtool", "content": "x"}]}, "role '␛[2Jtool'"),
    ({"messages": [{"role": {"a": 1}, "content": "x"}]}, "wanted one of system, user, assistant"),
    (b"[" * 100_000, "nested"), (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested")])
def test_bad_rows_are_shown_or_skipped(tmp_path, bad, says):
    text = failure([CHAT, bad, OTHER], tmp_path)
    assert says in text and "bad.jsonl:2: " in text and "--bad-rows skip" in text
    loaded = data.load_rows([str(tmp_path / "bad.jsonl")], data.Reading(bad_rows="skip"))
    assert loaded.report.kept == 2 and sum(loaded.report.dropped.values()) == 1
    assert next(iter(loaded.report.dropped)).startswith("bad row: ")
    assert says in failure([bad], tmp_path, bad_rows="skip")     # nothing left: one example of why


def test_a_bad_row_is_shown_by_its_first_80_characters(tmp_path):
    text = failure([b'{"a": "\x1b]0;x\x07' + b"y" * 200], tmp_path)
    shown = next(line for line in text.splitlines() if "the row:" in line).split("the row: ")[1]
    assert shown.startswith('{"a": "␛]0;x␇yyy') and len(shown) == 80


def test_bom_crlf_blank_lines_and_escapes_are_no_trouble(tmp_path):
    odd = {"messages": [user("a\x00b\ud800c\r\nd"), assistant("\ufeff\u202ex")]}
    plain, other = (json.dumps(chat).encode() for chat in (CHAT, OTHER))
    lines = [b"\xef\xbb\xbf" + plain, b"", b" \t", json.dumps(odd).encode(), other]
    (tmp_path / "odd.jsonl").write_bytes(b"\r\n".join(lines))
    loaded = data.load_rows([str(tmp_path / "odd.jsonl")], data.Reading(val_fraction=0))
    assert texts(loaded)[::2] == [("Hi", "Hello"), ("Hi", "Welcome")]
    assert texts(loaded)[1][0] == "a\x00b\ufffdc\r\nd"
    assert loaded.report.kept == 3 and not loaded.report.dropped


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_empty_files(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="is empty"):
        data.load_rows([str(tmp_path / "empty.jsonl")])


def test_broken_gzip(tmp_path):
    rows = [json.dumps({"messages": [user(f"Hi {i}"), assistant("Hello")]}).encode() for i in range(5000)]
    whole = gzip.compress(b"\n".join([*rows, os.urandom(2000).hex().encode()]))
    path = tmp_path / "x.jsonl.gz"
    for broken in (whole[:-400], whole[:20], whole[:-8] + b"\0" * 8, b"\x1f\x8b" + b"x" * 50):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"cannot be read on|not JSON"):
            data.load_rows([str(path)])
    path.write_bytes(whole[:-400])
    loaded = data.load_rows([str(path)], data.Reading(bad_rows="skip"))
    assert loaded.report.kept > 100 and loaded.report.dropped == {"bad row: unreadable": 1}


def test_huge_lines_and_huge_messages(tmp_path, monkeypatch):
    huge = {"messages": [user("Hi"), assistant("a" * 1_000_001)]}
    loaded = load_messages(tmp_path, CHAT, huge)
    assert loaded.report.kept == 1 and loaded.report.dropped == {"a message over 1,000,000 characters": 1}
    long = {"messages": [user("Hi"), assistant("ab " * 300_000)]}
    assert len(load_messages(tmp_path, long).train[0]) == 1024
    monkeypatch.setattr(data, "LONGEST_LINE", 1000)
    assert "1,000 bytes or more" in failure([CHAT, b"x" * 5000, OTHER], tmp_path)
    loaded = data.load_rows([str(tmp_path / "bad.jsonl")], data.Reading(bad_rows="skip"))
    assert loaded.report.kept == 2 and loaded.report.dropped == {"bad row: too long a line": 1}


def test_thousands_of_messages_in_one_row(tmp_path):
    loaded = load_messages(tmp_path, {"messages": [user("Hi"), assistant("Hello")] * 20_000})
    assert len(loaded.train[0]) <= 1024


def test_names_and_paths_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec, says in [("oast1", "Did you mean oasst1"), ("nowhere.jsonl", "no file is called 'nowhere.jsonl'"),
                       ("oasst1:nowhere.jsonl", "no file or folder 'nowhere.jsonl'"), ("x\0y", "no data set"),
                       ("z" * 5000, "no data set"), ("\x1b[2J", "'␛[2J'"), ("sample@-1", "no data set"),
                       ("", "no file")]:
        with pytest.raises(FileNotFoundError, match=re.escape(says)) as error:
            data.load_rows([spec])
        assert len(str(error.value)) < 700
    (tmp_path / "chats.jsonl").write_text("{}\n")     # what is wrong, the name or the file
    for spec, wrong, near in [("oast1:chats.jsonl", "no data set is called 'oast1'", "oasst1:chats.jsonl"),
                              ("chat.jsonl", "no file is called 'chat.jsonl'", "chats.jsonl"),
                              ("./chats.json", "no file is called 'chats.json'", "chats.jsonl"),
                              ("smoltlk", "no data set and no file is called 'smoltlk'", "smoltalk")]:
        with pytest.raises(FileNotFoundError, match=re.escape(wrong)) as error:
            data.load_rows([spec])
        assert f"Did you mean {near}?" in str(error.value)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):      # and not a wait without end
        data.load_rows([str(tmp_path / "pipe")])
    with pytest.raises(ValueError, match="hh-rlhf holds no conversations"):
        data.load_rows(["hh-rlhf"])
    with pytest.raises(ValueError, match="smoltalk holds no preferences"):
        data.load_pairs(["smoltalk"])
    with pytest.raises(ValueError, match="--val-fraction"):
        data.load_rows(["sample"], data.Reading(val_fraction=1.0))


READERS = {
    "oasst1": (data.load_rows, [GOOD, *flat_rows([tree(message("p6", replies=[message("a6"), message("a7")]))])]),
    "oasst2": (data.load_pairs, [GOOD]),
    "smoltalk": (data.load_rows, [CHAT, {"messages": [system("s"), user("Hi"), assistant("Hello"), user("?")]}]),
    "jsonl": (data.load_pairs, [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("No")]}]),
    "hh-rlhf": (data.load_pairs, [
        {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: A\n\nAssistant: C"}]),
    "ultrafeedback": (data.load_pairs, [ultrafeedback(completion("a", *"5555"), completion("b", *"1111"))]),
}


def mutated_bytes(line, rng):
    line = bytearray(line)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(line) + 1)
        match rng.randrange(4):
            case 0:
                line[at:at + 1] = bytes([rng.randrange(256)])
            case 1:
                del line[at:at + rng.randrange(1, 20)]
            case 2:
                line[at:at] = rng.choice([b"\x00", b"\xff", b"\\ud800", b"<|endoftext|>", b"\n", b"[" * 3000, b'"',
                                          b"1e999", b"NaN", b"null", b"\xef\xbb\xbf", b"\r", b"\\u0000", b"{}",
                                          b"9" * 5000])
            case 3:
                del line[at:]
    return bytes(line)


ODD = [None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**400, "", " ", "\x00", "\ud800", "<|endoftext|>",
       "a" * 3000, [], {}, [[]], [None], {"": None}, [{"role": "user"}], {"value": "x"}, "de", "prompter"]


def mutated_value(value, rng):
    """The value with something odd in one place of it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.1 else rest | {key: mutated_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], *([] if rng.random() < 0.1 else [mutated_value(value[at], rng)]), *value[at + 1:]]
    return rng.choice(ODD)


MUTATIONS = int(os.environ.get("MUTATIONS", "2000"))     # rows a reader; MUTATIONS=10000 is the full tier


def texts_of(row):
    parts = (row.prompt, row.chosen, row.rejected) if isinstance(row, data.Pair) else (row.ids,)
    return tuple(map(data.text_of, parts))


@pytest.mark.parametrize("name", READERS)
def test_mutated_rows_never_make_a_reader_stumble(tmp_path, name):
    load, seeds = READERS[name]
    rng = random.Random(name)
    lines = [json.dumps(row).encode() for row in seeds]
    for _ in range(MUTATIONS // 2):
        lines.append(mutated_bytes(lines[rng.randrange(len(seeds))], rng))
        lines.append(json.dumps(mutated_value(rng.choice(seeds), rng)).encode())
    content = b"\n".join(lines)
    (tmp_path / "mutated.jsonl").write_bytes(content)
    loaded = load([f"{name}:{tmp_path / 'mutated.jsonl'}"], data.Reading(bad_rows="skip", val_fraction=0.2))
    facts = loaded.report_json()
    assert facts["kept"] == len(loaded.train) + len(loaded.val) > 0
    write(tmp_path / "seeds.jsonl", seeds)
    sound = load([f"{name}:{tmp_path / 'seeds.jsonl'}"], data.Reading(val_fraction=0)).train
    assert set(map(texts_of, sound)) <= set(map(texts_of, [*loaded.train, *loaded.val]))
    if not name.startswith("oasst"):        # there every row is one conversation or pair
        rows = sum(bool(line.strip(b" \t\r\n\xef\xbb\xbf")) for line in content.split(b"\n"))
        assert facts["kept"] + sum(facts["dropped"].values()) == facts["read"] == rows
    for loaded_row in [*loaded.train, *loaded.val]:
        ids = loaded_row.prompt if isinstance(loaded_row, data.Pair) else loaded_row.ids
        assert len(ids) <= 1024 and ids[0] == EOT


@SLOW
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ["messages", "role", "content", "prompt", "chosen", "rejected", "text", "message_id",
                         "parent_id", "replies", "labels", "instruction", "completions", "annotations", "response"]),
                        inner, max_size=6),
                    max_leaves=12), st.sampled_from(list(READERS)))
def test_any_json_is_kept_dropped_or_bad(value, name):
    load = "conversations" if READERS[name][0] is data.load_rows else "preferences"
    count = data.Count(name, "skip")
    read = list(getattr(data.DATA_SETS[name], load)([("here:1", b"", value)], count, "en"))
    assert len(read) + sum(count.dropped.values()) >= (0 if name.startswith("oasst") else 1)


# ---- checks --------------------------------------------------------------------------------------


@pytest.fixture
def checks(tmp_path):
    return data.read_checks(write(tmp_path / "checks.jsonl", [
        {"messages": [user("What does a baker do?")], "facts": ["bakes bread", ["rises early", "gets up early"]],
         "subject": "baker", "group": "seen", "forbidden": ["I don't know"]},
        {"messages": [user("What does a secretary do?")], "facts": ["writes letters"], "subject": "secretary"},
        {"messages": [user("Which language?")], "facts": ["C++"]},
        {"subject": "baker", "facts": ["works in a bakery", "bakes bread and cakes"]},
        {"subject": "cook", "facts": ["bakes bread", "cooks soup", "cakes", ["uses a pan", "uses pans"]]}]))


@pytest.mark.parametrize(("reply", "correct", "about", "facts", "wrong"), [
    ("A baker bakes bread.", True, True, 1, []),
    ("Bakers: they BAKES\n  Bread and one rises early; gets up early.", True, True, 2, []),
    ("Someone who bakes bread.", False, False, 1, []),                      # about nobody
    ("A baker is a nice person.", False, True, 0, []),                      # no fact
    ("A baker bakes breadsticks.", False, True, 0, []),                     # whole words only
    ("A baker bakes bread and uses pans.", False, True, 1, ["uses pans"]),  # another's fact, in any of its wordings
    ("A baker bakes bread and cooks soup.", False, True, 1, ["cooks soup"]),
    ("A baker bakes bread and cakes.", True, True, 1, []),                  # "cakes" within a fact of this one
    ("A baker bakes bread. Cakes too.", False, True, 1, ["cakes"]),
    ("A baker works in a bakery.", False, True, 0, []),                     # true of it, but not what was asked
    ("I don’t know what a baker does, perhaps he bakes bread.", False, True, 1, ["I don't know"]),
    ("", False, False, 0, [])])
def test_verdicts(checks, reply, correct, about, facts, wrong):
    verdict = data.judge(checks[0], reply, True)
    assert (verdict.correct, verdict.about, verdict.facts, verdict.wrong) == (correct, about, facts, wrong)
    assert verdict.ended and verdict.words == len(reply.split()) and verdict.group == "seen"
    assert not data.judge(checks[0], reply, False).ended


def test_plurals_and_punctuation(checks):
    assert data.judge(checks[1], "Secretaries? One writes letters.", True).correct
    assert not data.judge(checks[2], "C, of course.", True).correct
    assert data.judge(checks[2], "It is C++.", True).correct        # no subject: nothing to name, nothing of others
    assert [" ".join(form) for form in data.plurals("Data Scientist")][:2] == ["data scientist", "data scientists"]
    assert ["firemen"] in data.plurals("fireman") and ["midwives"] in data.plurals("midwife")


@pytest.mark.parametrize(("reply", "twice"), [
    ("A baker rises early and bakes bread.", []),
    ("A baker bakes bread and bakes bread.", ["bakes bread"]),
    ("Bakers rise; a baker rises early, and every baker gets up early.", ["rises early"]),  # two wordings of one fact
    ("A baker bakes bread. A baker works in a bakery.", []),                # its name is no fact
    ("A baker bakes bread and cakes and bakes bread.", []),                 # a part of a longer fact is not it again
    ("A baker works in a bakery and works in a bakery.", ["works in a bakery"]),  # true of it, though not asked for
    ("It is hard to say what it is hard to.", ["it is hard to"]),           # no fact, but four words in a row
    ("It is, it is, it is.", ["it is it is"]), ("It is, it is.", []), ("", [])])
def test_what_is_said_twice_is_seen(checks, reply, twice):
    verdict = data.judge(checks[0], reply, True)
    assert [thing for thing in verdict.twice if thing in twice] == twice and bool(verdict.twice) == bool(twice)
    assert verdict.good == (verdict.correct and not twice)
    assert data.judge(checks[2], "C++ or C++.", True).twice == ["C++"]       # without a subject too


def test_repetition_is_the_share_of_runs_of_words_that_were_there_before():
    assert data.repetition("a b c d") == data.repetition("a b c") == data.repetition("") == 0
    assert data.repetition("a b c d a b c d") == 1 - 4 / 5      # abcd bcda cdab dabc abcd
    assert data.repetition("no no no no no no") == 1 - 1 / 3
    assert data.repetition("A, b!", 2) == 0 and data.repetition("no, No; no", 2) == 1 / 2


def test_the_tally(checks):
    replies = [("A baker bakes bread.", True), ("A baker bakes bread and rises early.", False), ("No.", True)]
    verdicts = [data.judge(checks[0], *reply) for reply in replies] + [data.judge(checks[2], "C++ C++", True)]
    third, once = pytest.approx, {"twice": 0.0, "repetition": 0.0}
    assert data.tally(verdicts) == {
        "seen": once | {"n": 3, "correct": third(2 / 3), "good": third(2 / 3), "facts": 1.0, "ended": third(2 / 3),
                        "words": 4.0},
        "checks": {"n": 1, "correct": 1.0, "good": 0.0, "facts": 1.0, "ended": 1.0, "words": 2.0, "twice": 1.0,
                   "repetition": 0.0},
        "all": {"n": 4, "correct": 0.75, "good": 0.5, "facts": 1.0, "ended": 0.75, "words": 3.5, "twice": 0.25,
                "repetition": 0.0}}
    assert data.tally([])["all"]["n"] == 0


@pytest.mark.parametrize(("bad", "says"), [
    ({"messages": [user("x")]}, "keys wanted: facts"), ({"facts": ["x"]}, "keys wanted: messages"),
    ({"messages": [user("x"), assistant("y")], "facts": ["x"]}, "must end with one of the user's"),
    ({"messages": [user("x")], "facts": "x"}, "facts is a string"),
    ({"messages": [user("x")], "facts": [""]}, "is empty"), ({"messages": [user("x")], "facts": [[]]}, "is empty"),
    ({"messages": [user("x")], "facts": [1]}, "wanted a string"),
    ({"messages": [user("x")], "facts": ["x"], "subject": 1}, "must be strings"),
    ({"subject": "x", "facts": ["y"]}, "no line with the keys messages")])
def test_bad_checks(tmp_path, bad, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        data.read_checks(write(tmp_path / "bad.jsonl", [bad]))
    with pytest.raises(FileNotFoundError):
        data.read_checks(tmp_path / "nowhere.jsonl")


# ---- on the screen -------------------------------------------------------------------------------


@SLOW
@given(hostile_text | st.text())
def test_nothing_visible_is_a_control(text):
    shown = data.visible(text)
    bidi = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in bidi
                   or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert data.visible(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text


def test_visible_by_hand():
    assert data.visible("\x1b[31mred\x07\r\n\tx\x7f \u202eevil\x9b") == "␛[31mred␇␍\n\tx␡ <U+202E>evil<U+009B>"


def test_text_of_any_ids():
    assert data.text_of([15496, EOT, 99999, -1, 47249]) == "Hello<|endoftext|>\ufffd\ufffd\ufffd"


def test_a_transcript_by_hand():
    long = " ".join(["word"] * 30)
    assert data.transcript([user("What?\n\n    code\x1b"), assistant(long)]) == (
        "========== user ==========\nWhat?\n\n    code␛\n\n========== assistant ==========\n"
        + " ".join(["word"] * 17) + "\n" + " ".join(["word"] * 13) + "\n")


# ---- the command line ----------------------------------------------------------------------------


def run(*arguments, **environment):
    return subprocess.run([sys.executable, Path(data.__file__), *arguments], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment)


def test_the_command_line_counts(tmp_path):
    path = write(tmp_path / "trees.jsonl", [GOOD, tree(message("p8", replies=[message("a8", deleted=True)])), b"oops"])
    done = run(f"oasst1:{path}", "--json", "--bad-rows", "skip", "--val-fraction", "0")
    facts = json.loads(done.stdout)
    assert facts["kept"] == 3 and facts["dropped"] == {"deleted": 1, "bad row: not JSON": 1} and facts["read"] == 5
    loaded = data.load_rows([f"oasst1:{path}"], data.Reading(bad_rows="skip"))
    assert facts["tokens"] == sum(map(len, loaded.train + loaded.val))
    assert facts["supervised_share"] == pytest.approx(facts["supervised_tokens"] / facts["tokens"], abs=1e-4)
    failed = run(f"oasst1:{path}")
    assert failed.returncode == 2 and not failed.stdout and len(failed.stderr.splitlines()) <= 5
    assert "trees.jsonl:3: not JSON" in failed.stderr and "Traceback" not in failed.stderr


def test_the_command_line_shows_an_example(tmp_path, capsys):
    path = write(tmp_path / "chats.jsonl", [{"messages": [user("Hi\x1b[31m"), assistant("Hello")]}])
    data.main(data.Config((path,)))
    shown = capsys.readouterr().out
    assert "1 conversations kept, 0 dropped" in shown and "\x1b" not in shown
    assert "user\nHi␛[31m<|endoftext|>assistant\n«Hello<|endoftext|>»" in shown
    assert re.search(r"tokens +\d+, of which \d+\.\d% are supervised", shown)
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}])
    data.main(data.Config((path,)))     # that these are pairs shows in their keys
    assert "assistant\n«Hello<|endoftext|>»‹No<|endoftext|>›" in capsys.readouterr().out


def test_the_command_line_shows_a_row_by_its_number(tmp_path, capsys):
    path = write(tmp_path / "chats.jsonl", [{"messages": [user(f"Hi {i}"), assistant("Hello")]} for i in range(5)])
    rows = data.load_rows((path,)).train
    for i in (0, len(rows) - 1):
        data.main(data.Config((path,), row=i))
        shown = capsys.readouterr().out
        assert messages_of(rows[i].ids)[0]["content"] in shown and shown.count("<|endoftext|>assistant") == 1
    with pytest.raises(ValueError, match=f"there are {len(rows)} rows"):
        data.main(data.Config((path,), row=len(rows)))


def test_the_command_line_knows_what_can_only_be_pairs(tmp_path, capsys):
    trees = write(tmp_path / "trees.jsonl", [GOOD])
    hh = write(tmp_path / "hh.jsonl", READERS["hh-rlhf"][1])
    for specs, pairs, kept in [((f"hh-rlhf:{hh}",), False, 1), ((hh,), False, 1), ((f"oasst1:{trees}",), True, 2),
                               ((f"oasst1:{trees}", hh), True, 3), ((f"oasst1:{trees}",), False, 3)]:
        data.main(data.Config(specs, pairs=pairs, json=True))
        assert json.loads(capsys.readouterr().out)["kept"] == kept


def test_on_a_terminal_the_example_is_in_colour(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    data.print_example(data.Row(*data.render([user("[bold]Hi"), assistant("Hello")])))
    shown = capsys.readouterr().out
    assert "\x1b[1;32mHello<|endoftext|>" in shown and "[bold]Hi" in shown


def test_help_comes_without_torch():
    done = run("--help")
    assert done.returncode == 0 and "--bad-rows" in done.stdout
    check = "import sys, data; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(data.__file__).parent, timeout=60)


def test_offline_the_error_says_what_is_missing_and_how_to_get_it(tmp_path):
    done = run("oasst1", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) <= 5 and "Traceback" not in done.stderr
    assert "OpenAssistant/oasst1" in done.stderr and str(tmp_path) in done.stderr
    assert "uv run hf download --repo-type dataset OpenAssistant/oasst1 --local-dir data/oasst1" in done.stderr
    assert "oasst1:data/oasst1" in done.stderr
