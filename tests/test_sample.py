"""The bundled sample: the laws of its world, of its documents, conversations and checks, and of its base model."""

import collections
import itertools
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from readback import messages_of

import data
import model
import train
from sample import make

ROOT = Path(__file__).parent.parent
WORLD, PHRASES = make.read_world(), make.read_phrases()
HIDDEN = make.held_out(WORLD)
NAMES = [entry["name"] for entry in WORLD]
CONVERSATIONS = ROOT / "sample" / "conversations.jsonl.gz"
CHECKS = ROOT / "sample" / "checks.jsonl"


def words(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def strings(entry: dict) -> list[str]:
    return [text for value in entry.values() for text in ([value] if isinstance(value, str) else value)]


# ---- the world -----------------------------------------------------------------------------------


def test_world_is_large_and_names_are_unique():
    assert len(WORLD) >= 200
    assert len(set(NAMES)) == len(NAMES)
    assert {"data scientist", "machine learning engineer"} <= set(NAMES) - HIDDEN


@pytest.mark.parametrize("entry", WORLD, ids=NAMES)
def test_entry_is_complete_and_plain(entry):
    assert list(entry) == ["name", "field", "does", "tools", "workplace", "skills", "works_with", "related"]
    for key, count in (("does", 5), ("tools", 3), ("skills", 3), ("works_with", 2)):
        assert len(set(entry[key])) == len(entry[key]) == count
    for text in strings(entry):  # no punctuation that a sentence around it would trip over
        assert re.fullmatch(r"[\x20-\x7e]+", text) and not re.search(r'[,;:"()\[\].?!]|  |^ | $', text), text
    assert entry["name"] == entry["name"].lower() and len(entry["name"].split()) <= 3
    assert not entry["name"].endswith("man")  # whose plural make.py would get wrong
    assert entry["related"] in NAMES and entry["related"] != entry["name"]
    assert 3 <= len(entry["workplace"].split()) <= 8


@pytest.mark.parametrize("entry", WORLD, ids=NAMES)
def test_tasks_are_verb_phrases_of_five_verbs(entry):
    verbs = [deed.split()[0] for deed in entry["does"]]
    assert len(set(verbs)) == 5
    for deed in entry["does"]:
        verb, *rest = deed.split()
        assert 3 <= len(rest) <= 7
        assert verb not in ("have", "be", "do", "go")
        assert not verb.endswith("s") or verb.endswith("ss") or verb == "focus"  # the base form
        assert not {"their", "his", "her", "its", "them", "they", "it", "he", "she"} & set(rest)


def test_no_two_occupations_share_a_fact():
    for what, most, phrases in (("task", 1, [d.split(" ", 1)[1] for e in WORLD for d in e["does"]]),
                                ("workplace", 1, [e["workplace"] for e in WORLD]),
                                ("tool", 2, [t for e in WORLD for t in e["tools"]])):
        counts = collections.Counter(phrases)
        assert max(counts.values()) <= most, (what, counts.most_common(3))


def test_no_name_or_task_is_part_of_another():
    for phrases in (NAMES, [d.split(" ", 1)[1] for e in WORLD for d in e["does"]]):
        padded = [words(p) for p in phrases]
        assert not [(a, b) for a, b in itertools.permutations(padded, 2) if a in b]


# ---- English -------------------------------------------------------------------------------------


def test_forms_of_words():
    assert make.plural("bus") == "buses" and make.plural("city") == "cities" and make.plural("toy") == "toys"
    assert make.third_person("fix bugs") == "fixes bugs" and make.third_person("apply glue") == "applies glue"
    assert [make.gerund(f"{verb} it") for verb in ("bake", "plan", "tie", "referee", "open", "carry", "submit")] == [
        f"{form} it" for form in ("baking", "planning", "tying", "refereeing", "opening", "carrying", "submitting")]
    assert [make.with_article(noun) for noun in ("usability researcher", "university lecturer", "umpire", "actor")] == [
        "a usability researcher", "a university lecturer", "an umpire", "an actor"]
    assert make.listing(["a", "b", "c"]) == "a, b and c" and make.listing(["a"]) == "a"


def test_every_template_can_be_filled():
    def lines(node):
        return node if isinstance(node, list) else [line for part in node.values() for line in lines(part)]

    rng = random.Random(0)
    for template in lines(PHRASES):
        text = make.Teller(WORLD[0], rng, WORLD[1]).tell(template)
        assert "{" not in text and text[0] == text[0].upper(), text


# ---- documents -----------------------------------------------------------------------------------

DOCUMENTS = list(itertools.islice(make.documents(WORLD, PHRASES, random.Random(1)), 5000))


def test_documents_contain_no_chat():
    for text in DOCUMENTS:
        assert not re.search(r"<\|endoftext\|>|^ *(user|assistant|prompter|system) *:?$", text, re.MULTILINE), text


def test_documents_tell_every_fact_in_many_wordings():
    few = WORLD[:3]
    facts = [fact for entry in few for fact in (*entry["tools"], *entry["skills"], entry["workplace"],
                                                *(deed.split(" ", 1)[1] for deed in entry["does"]))]
    longest_first = "|".join(sorted(map(re.escape, facts), key=len, reverse=True))
    with_neighbours = re.compile(rf"(\w+) ({longest_first})\W+(?=(\w+))")
    around = collections.defaultdict(set)
    for text in itertools.islice(make.documents(few, PHRASES, random.Random(2)), 2000):
        for before, fact, after in with_neighbours.findall(text):
            around[fact].add((before, after))
    assert len(around) == 36 and min(map(len, around.values())) >= 12


def test_some_documents_tell_two_occupations_apart():
    both = [text for text in DOCUMENTS if sum(name in text.lower() for name in NAMES) >= 2]
    assert len(both) > len(DOCUMENTS) / 10


# ---- conversations -------------------------------------------------------------------------------


def messages(node: dict):
    yield node
    for reply in node["replies"]:
        yield from messages(reply)


@pytest.fixture(scope="module")
def trees() -> list[dict]:
    return [row for _, _, row in data.file_rows(CONVERSATIONS)]


def test_a_fifth_of_the_occupations_is_never_conversed_about(trees):
    assert abs(len(HIDDEN) - len(WORLD) / 5) < 1
    spoken = " ".join(words(message["text"]) for tree in trees for message in messages(tree["prompt"]))
    for name in NAMES:
        heard = f" {words(name).strip()} " in spoken or f" {words(make.plural(name)).strip()} " in spoken
        assert heard == (name not in HIDDEN), name


def test_trees_are_those_of_the_script(trees):
    again = make.conversations(WORLD, PHRASES, random.Random(f"conversations {make.Config().seed}"), len(trees))
    assert json.loads(json.dumps(list(again))) == trees


def test_ranks_go_from_good_to_bad(trees):
    prompts = [m for tree in trees for m in messages(tree["prompt"]) if m["role"] == "prompter"]
    for prompt in prompts:
        replies = prompt["replies"]
        assert [reply["rank"] for reply in replies] == list(range(len(replies)))
        good = [reply["review_result"] for reply in replies]
        assert good[0] and good == sorted(good, reverse=True)
        assert len({reply["text"] for reply in replies if reply["review_result"]}) == sum(good)
    several = [p for p in prompts if sum(r["review_result"] for r in p["replies"]) > 1]
    assert 0.1 < len(several) / len(prompts) < 0.4  # SFT learns mostly from plain replies, DPO prefers informative ones


@pytest.fixture(scope="module")
def rows() -> list:
    return data.load_rows([f"sample:{CONVERSATIONS}"], data.Reading(val_fraction=0.0)).train


def test_threads_have_no_reply_that_failed_its_review(trees, rows):
    failed = {m["text"] for tree in trees for m in messages(tree["prompt"]) if not m["review_result"]}
    passed = {m["text"] for tree in trees for m in messages(tree["prompt"]) if m["review_result"]}
    learnt = {m["content"] for row in rows for m in messages_of(row.ids) if m["role"] == "assistant"}
    assert learnt <= passed and len(failed - passed) > 1000


def test_replies_that_failed_their_review_are_rejected_ones_of_pairs(trees):
    quality = {m["text"]: m["review_result"] for tree in trees for m in messages(tree["prompt"])}
    pairs = data.load_pairs([f"sample:{CONVERSATIONS}"], data.Reading(val_fraction=0.0)).train
    sides = collections.Counter((quality[data.text_of(pair.chosen[:-1])], quality[data.text_of(pair.rejected[:-1])])
                                for pair in pairs)
    assert sides[True, False] > 2000 and sides[True, True] > 1000  # good over bad, informative over plain
    assert sides[False, True] + sides[False, False] < len(pairs) / 15  # texts that are good here and bad there


# ---- checks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checks() -> list:
    return data.read_checks(CHECKS)


@pytest.fixture(scope="module")
def verdict(tmp_path_factory):
    """verdict(occupation, aspect, reply), by what sample/checks.jsonl states of all occupations."""
    path = tmp_path_factory.mktemp("checks") / "checks.jsonl"
    stated = [line for line in CHECKS.read_text().splitlines() if "messages" not in json.loads(line)]
    asked = [json.dumps({"messages": [{"role": "user", "content": "?"}], "facts": make.facts(entry, aspect),
                         "subject": entry["name"], "group": f"{entry['name']}: {aspect}"})
             for entry in WORLD for aspect in make.OFTEN]
    path.write_text("\n".join(stated + asked))
    by_group = {check.group: check for check in data.read_checks(path)}
    return lambda entry, aspect, reply: data.judge(by_group[f"{entry['name']}: {aspect}"], reply, True)


def test_checks_are_of_four_groups_and_end_with_a_question(checks):
    groups = collections.Counter(check.group for check in checks)
    assert groups == {f"{who}, {what}": 100 for who in ("seen", "held-out") for what in ("single", "follow-up")}
    for check in checks:
        assert (check.subject in HIDDEN) == check.group.startswith("held-out")
        assert (len(check.messages) > 1) == check.group.endswith("follow-up")


def test_half_of_the_single_questions_are_worded_as_no_conversation_is(trees, checks):
    asked = {m["text"] for tree in trees for m in messages(tree["prompt"]) if m["role"] == "prompter"}

    longest_first = "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True))
    name = re.compile(rf"\b(an? )?({longest_first})(e?s)?\b", re.IGNORECASE)

    def pattern(text):
        return name.sub("X", text)

    known = {pattern(text) for text in asked}
    single = [check.messages[-1]["content"] for check in checks if check.group.endswith("single")]
    new = [pattern(question) not in known for question in single]
    assert 0.3 < sum(new) / len(new) < 0.6


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_good_replies_are_judged_correct(verdict, kind):
    rng = random.Random(2)
    for entry, aspect in itertools.product(WORLD, PHRASES[kind]):
        for template in PHRASES[kind][aspect]:
            reply = make.Teller(entry, rng).tell(template)
            found = verdict(entry, aspect, reply)
            assert found.correct and not found.wrong, (reply, found)
            counts = {"does": 4, "tools": 3, "skills": 3, "partners": 2, "about": 7} if kind == "full" else {
                "does": 1 + (" and " in template), "about": 2}
            assert found.facts >= counts.get(aspect, 1), (reply, found)  # a task may name a tool


@pytest.mark.parametrize("aspect", ["does", "tools", "place", "skills", "partners", "about"])
def test_facts_of_another_are_judged_wrong(verdict, aspect):
    rng = random.Random(3)
    caught = 0
    for x, y in zip(WORLD, WORLD[7:], strict=False):
        reply = make.Teller({**y, "name": x["name"]}, rng).tell(rng.choice(PHRASES["full"][aspect]))
        found = verdict(x, aspect, reply)
        assert not found.correct, (reply, found)
        caught += bool(found.wrong)
    assert caught == len(WORLD) - 7


def test_vague_bare_and_off_subject_replies_are_not_correct(verdict):
    rng = random.Random(4)
    for x, y in zip(WORLD, WORLD[5:], strict=False):
        for template in PHRASES["vague"]["lines"]:
            assert not verdict(x, "does", make.Teller(x, rng).tell(template)).correct
        bare = verdict(x, "tools", make.Teller(x, rng).tell(PHRASES["bare"]["tools"][0]))
        assert bare.facts == 1 and not bare.about and not bare.correct  # it does not name the occupation
        other = verdict(x, "tools", make.Teller(y, rng).tell(PHRASES["plain"]["tools"][0]))
        assert not other.correct and not other.about
        off = verdict(x, "tools", make.Teller(x, rng).tell(PHRASES["plain"]["place"][0]))
        assert not off.correct and off.about and not off.wrong


# ---- the base model ------------------------------------------------------------------------------


def test_the_script_runs_in_its_quick_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make.main(make.Config(quick=True))
    made = tmp_path / "runs" / "quick"
    gpt = model.GPT.from_pretrained(made / "model")
    assert gpt.config.vocab_size == 50257
    losses = [json.loads(line)["loss"] for line in (made / "base" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert data.load_rows([f"sample:{made / 'conversations.jsonl.gz'}"]).train
    assert data.read_checks(made / "checks.jsonl")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


QUICK = {"quick": True, "steps": 2, "trees": 3, "questions": 1, "eval_every": 0}


def test_what_was_made_is_made_anew_and_what_was_not_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = make.Config(**QUICK, to="made", out="base")
    make.main(cfg)
    before = content(tmp_path / "made")
    refused = [{"seed": -1}, {"trees": 0}, {"n_embd": 31}, {"row": 0}, {"show": -1}, {"lr": float("inf")},
               {"tracker": "wandb"}, {"device": "meta"}, {"n_layer": 0}]
    monkeypatch.setitem(sys.modules, "wandb", None)
    for change in refused:
        with pytest.raises(ValueError):
            make.main(replace(cfg, **{"trees": 4, "overwrite": True} | change))
        assert content(tmp_path / "made") == before, change
    make.main(replace(cfg, trees=4, seed=1, overwrite=True))
    assert not [name for name, text in content(tmp_path / "made").items() if "config" not in name
                and text == before[name]]
    assert not (tmp_path / "base" / train.REPLACED).exists()
    for name, text in (("model/model.safetensors.index.json", "{}"), ("checks.jsonl", '{"messages": []}\n'),
                       ("conversations.jsonl.gz", '{"message_tree_id": "mine"}\n'), ("checks.jsonl", "notes\n")):
        folder = tmp_path / name.replace("/", " ") / str(len(text))
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=r"(?s)left alone.*--to"):
            make.main(replace(cfg, to=str(folder), overwrite=True))
        assert content(folder) == {name: text.encode()}


def test_one_row_stands_for_all_words_that_do_not_occur():
    """documents_loss is the full softmax's cross-entropy with the shared row written out."""
    import numpy as np

    torch.manual_seed(0)
    vocabulary = np.array([5, 17, 300, data.EOT])
    small = model.GPT(model.GPTConfig(5, 16, 8, 1, 2)).double().eval()
    torch.nn.init.normal_(small.wte.weight)
    whole = make.with_all_words(small, vocabulary).double()
    row = data.Row(np.array([3, 0, 2, 1, 0, 3], np.int32), np.ones(6, bool))
    spread = data.Row(vocabulary[row.ids].astype(np.int32), row.mask)
    to_torch = train.to_device
    loss, count, _ = make.documents_loss(small, to_torch(data.pack([row], [0]), torch.device("cpu")), 50257 - 4)
    logits = whole(torch.from_numpy(spread.ids).long()[None])[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(spread.ids[1:]).long(), reduction="sum")
    assert int(count) == 5
    torch.testing.assert_close(loss, expected)


@pytest.fixture(scope="module")
def base():
    return model.GPT.from_pretrained(ROOT / "sample" / "model")


def occurring(rows) -> set[int]:
    """The ids of the documents and conversations, found anew."""
    texts = list(itertools.islice(make.documents(WORLD, PHRASES, random.Random(9)), 20000))
    ids = set(itertools.chain.from_iterable(data.tokenizer().encode_ordinary_batch(texts))) | {data.EOT}
    return ids.union(*(row.ids.tolist() for row in rows))


def test_base_model_is_small_and_finite(base):
    folder = ROOT / "sample" / "model"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 20_000_000
    assert all(w.isfinite().all() and w.abs().max() < 1000 for w in base.state_dict().values())


def test_sampling_at_temperature_1_draws_only_words_that_occur(base, rows):
    used, drawn = occurring(rows), []
    for seed in range(20):
        drawn += model.generate(base, [data.EOT], 150, temperature=1.0, seed=seed)
    assert len(drawn) > 1000
    assert not set(drawn) - used


def test_the_base_model_can_tell_all_words_of_conversations_and_checks_apart(base, rows, checks):
    """Words that it never met share a row, so questions that differ in one of them alone would be the same to it."""
    shared = base.wte.weight[torch.mode(base.wte.weight @ torch.arange(128.0)).indices]
    unknown = set((base.wte.weight == shared).all(1).nonzero()[:, 0].tolist())
    assert len(unknown) > 40_000
    said = set(itertools.chain.from_iterable(row.ids.tolist() for row in rows))
    said |= {token for check in checks for token in data.render(check.messages)[0].tolist()}
    assert not {data.text_of([token]) for token in said & unknown}


def test_unknown_words_do_not_break_the_base_model(base):
    text = "user\n\N{SNOWMAN} zxqwv \N{PILE OF POO} SELECT * FROM <|endoftext|> \N{CYRILLIC SMALL LETTER A}\x00"
    logits = base(torch.tensor([data.tokenizer().encode_ordinary(text)]))
    assert logits.isfinite().all()
