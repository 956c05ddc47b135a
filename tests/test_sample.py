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
SHARED = "with an official seal"  # four words that two facts of the notary's have in common
NAMES = [entry["name"] for entry in WORLD]
CONVERSATIONS = ROOT / "sample" / "conversations.jsonl.gz"
CHECKS, EXAM = ROOT / "sample" / "checks.jsonl", ROOT / "sample" / "exam.jsonl"


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
    assert list(entry) == ["name", "also", "field", "does", "tools", "workplace", "skills", "works_with", "related"]
    for key, count in (("does", 5), ("tools", 3), ("skills", 3), ("works_with", 2)):
        assert len(set(entry[key])) == len(entry[key]) == count
    for text in strings(entry):  # no punctuation that a sentence around it would trip over
        assert re.fullmatch(r"[\x20-\x7e]+", text) and not re.search(r'[,;:"()\[\].?!]|  |^ | $', text), text
    assert entry["name"] == entry["name"].lower() and len(entry["name"].split()) <= 3
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


def test_other_words_for_an_occupation_are_no_name_of_another():
    also = [word for entry in WORLD for word in entry["also"]]
    assert len(set(also)) == len(also) and not set(also) & set(NAMES)
    assert not {*also, *NAMES} & set(PHRASES["fill"]["job"])  # which are those that the world does not have


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
    assert make.plural("policewoman") == "policewomen"
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
        text = make.Teller(WORLD[0], rng, WORLD[1], words=PHRASES["fill"]).tell(template.replace("{q}", "what"))
        assert "{" not in text and text[0] == text[0].upper(), text


def test_facts_go_round():
    """A sentence begins anywhere, each fact has one successor, and nothing is said twice."""
    tasks = [make.third_person(deed) for deed in WORLD[0]["does"]]
    tellers = [make.Teller(WORLD[0], random.Random(seed)) for seed in range(50)]
    told = {teller.tell("{n}: {does}, {does}, {does}, {does}") for teller in tellers}
    assert told == {f"Data scientist: {', '.join((tasks + tasks)[i:i + 4])}" for i in range(5)}
    teller = make.Teller(WORLD[0], random.Random(0), WORLD[1], first=2)
    assert teller.tell("{does} and {same_does}, {does}") == make.capital(f"{tasks[2]} and {tasks[2]}, {tasks[3]}")
    assert teller.tell("{y.tools}") == "Experiment trackers, graphics processors and deep learning frameworks"


def test_slips_are_small_and_habits_leave_the_question():
    rng = random.Random(0)
    for name in NAMES:
        wrong = make.misspelt(name.split()[0], rng)
        assert wrong[0] == name[0] and abs(len(wrong) - len(name.split()[0])) <= 2
    ways = {make.typed("What does a baker do?", rng, PHRASES["typed"]) for _ in range(300)}
    assert {"What does a baker do?", "what does a baker do"} <= ways and len(ways) > 60
    assert sum("baker" in way.lower() for way in ways) > len(ways) / 2


# ---- documents -----------------------------------------------------------------------------------


def answered(kept_back: set[str], reading: make.Reading, phrases: dict) -> set[str]:
    """What the documents of one seed answer, as letters and digits."""
    texts = itertools.islice(make.documents(WORLD, phrases, random.Random(2), kept_back, reading), 1000)
    return {make.letters_of(line.removeprefix("Q: "))
            for text in texts for line in text.splitlines() if line.startswith("Q: ")}


MORE = make.with_more(PHRASES)


@pytest.mark.parametrize(("reading", "phrases"), [(make.FIRST, PHRASES), (make.SECOND, MORE)], ids=["first", "second"])
def test_no_document_answers_what_is_kept_back(reading, phrases):
    often = {"what does a baker do"} | set(list(answered(set(), reading, phrases))[:100])
    assert len(answered(set(), reading, phrases)) > 500 and not often & answered(often, reading, phrases)


DOCUMENTS = [*itertools.islice(make.documents(WORLD, PHRASES, random.Random(1)), 5000),
             *itertools.islice(make.documents(WORLD, MORE, random.Random(1), reading=make.SECOND), 2000)]


def test_more_words_are_added_to_those_that_there_are_and_asked():
    first, more = PHRASES["ask"]["does"], PHRASES["more"]["ask"]["does"]
    assert MORE["ask"]["does"] == first + more and MORE["full"] == PHRASES["full"] and not set(first) & set(more)
    talk = make.Talk(WORLD, MORE, random.Random(0))
    asked = " ".join(talk.ask("skills", bank="") for _ in range(300))
    assert "qualities" in asked and "qualities" not in " ".join(PHRASES["ask"]["skills"])
    kinds = collections.defaultdict(set)
    for kind, group in MORE["talk"].items():
        for line in group["ask"]:
            kinds[line.lower().rstrip(".!")].add(kind)
    assert not {line: of for line, of in kinds.items() if len(of) > 1}  # small talk of one kind is none of another


def test_names_are_misspelt_and_written_large_as_often_as_said():
    talk = make.Talk(WORLD, PHRASES, random.Random(0), by_other_names=0, slips=0.5)
    said = [talk.by_any_name(WORLD[0])["name"] for _ in range(400)]
    assert 120 < said.count("data scientist") < 280
    assert {"DATA SCIENTIST", "Data Scientist", "Data scientist"} < set(said)


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


def test_data_are_those_of_the_script(tmp_path):
    make.main(make.Config(to=str(tmp_path), model=False))
    for name in ("conversations.jsonl.gz", "checks.jsonl", "exam.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "sample" / name).read_bytes(), name


def test_ranks_go_from_good_to_bad(trees):
    prompts = [m for tree in trees for m in messages(tree["prompt"]) if m["role"] == "prompter"]
    for prompt in prompts:
        replies = prompt["replies"]
        assert [reply["rank"] for reply in replies] == list(range(len(replies)))
        good = [reply["review_result"] for reply in replies]
        assert good[0] and good == sorted(good, reverse=True)
        assert len({reply["text"] for reply in replies if reply["review_result"]}) == sum(good)
    several = [p for p in prompts if sum(r["review_result"] for r in p["replies"]) > 1]
    # beside each informative reply is a plain one: SFT learns from these mostly, and DPO prefers the others
    assert 0.1 < len(several) / len(prompts) < 0.55


def test_good_replies_say_a_thing_once_and_some_bad_ones_twice(trees):
    replies = [m for tree in trees for m in messages(tree["prompt"]) if m["role"] == "assistant"]
    assert not [m["text"] for m in replies
                if m["review_result"] and data.repetition(m["text"]) > 0 and SHARED not in m["text"]]
    bad = [data.repetition(m["text"]) > 0 for m in replies if not m["review_result"]]
    assert sum(bad) > len(bad) / 50


def test_some_bad_replies_would_be_good_ones_elsewhere(trees):
    """So DPO learns when to say "I do not know", and when not."""
    replies = [m for tree in trees for m in messages(tree["prompt"]) if m["role"] == "assistant"]
    good = {m["text"] for m in replies if m["review_result"]}
    aside = [m["text"] for m in replies if not m["review_result"] and m["text"] in good]
    assert sum("I do not know" in text for text in aside) > 500
    assert sum("occupation" not in text for text in aside) > 500


def test_no_opening_is_frequent(trees):
    asked = collections.Counter(tree["prompt"]["text"] for tree in trees)
    assert asked.most_common(1)[0][1] <= len(trees) / 100


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
    assert sides[False, True] + sides[False, False] < len(pairs) / 8  # texts that are good here and bad there


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


@pytest.mark.parametrize(("file", "count"), [(CHECKS, 100), (EXAM, 200)])
def test_checks_are_of_five_groups_and_end_with_a_question(file, count):
    checks = data.read_checks(file)
    groups = collections.Counter(check.group for check in checks)
    assert groups.pop("everyday") >= 100
    assert groups == {f"{who}, {what}": count for who in ("seen", "held-out") for what in ("single", "follow-up")}
    for check in checks:
        assert check.subject in (None, *NAMES)
        if check.group != "everyday":
            assert (check.subject in HIDDEN) == check.group.startswith("held-out")
        assert (len(check.messages) > 1) == check.group.endswith("follow-up")


def asked(file) -> dict[str, str]:
    """{question as letters and digits: its group}"""
    return {make.letters_of(check.messages[-1]["content"]): check.group for check in data.read_checks(file)}


def test_no_conversation_asks_what_is_examined(trees):
    said = {make.letters_of(m["text"]) for tree in trees for m in messages(tree["prompt"]) if m["role"] == "prompter"}
    assert not said & set(asked(EXAM))
    assert not said & {question for question, group in asked(CHECKS).items() if group == "everyday"}
    new = [question not in said for question, group in asked(CHECKS).items() if group.endswith("single")]
    assert sum(new) / len(new) > 0.4


def test_the_exam_is_another_one_than_the_checks():
    assert not set(asked(EXAM)) & set(asked(CHECKS))
    for section in ("ask", "then"):
        for aspect, lines in PHRASES["exam"][section].items():
            assert not set(lines) & {*PHRASES["new"][section].get(aspect, ()), *PHRASES[section][aspect]}
    for bank in ("other", "polite"):
        assert not set(PHRASES["exam"][bank]["lines"]) & {*PHRASES["new"][bank]["lines"], *PHRASES[bank]["lines"]}


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_good_replies_are_judged_correct(verdict, kind):
    rng = random.Random(2)
    for entry, aspect in itertools.product(WORLD, make.OFTEN):
        for template in PHRASES[kind][aspect]:
            reply = make.Teller(entry, rng).tell(template)
            found = verdict(entry, aspect, reply)
            assert found.correct and set(found.twice) <= {SHARED} and not found.wrong, (reply, found)
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


@pytest.mark.parametrize("aspect", ["does", "tools", "skills", "partners", "about"])
def test_what_is_said_twice_is_not_good(verdict, aspect):
    rng = random.Random(5)
    for entry in WORLD:
        reply = make.Teller(make.repetitive(entry, rng), rng, first=0).tell(PHRASES["full"][aspect][0])
        found = verdict(entry, aspect, reply)
        assert found.twice and found.correct and not found.good, (reply, found)


@pytest.mark.parametrize(("question", "good", "bad"), [
    ("what is 2+2", "I do not know that, for I only know about occupations. Ask me what a baker does.", "4."),
    ("hello", "Hello! What would you like to know?", "Bakers knead dough for bread and rolls."),
    ("What does a dog walker do?", "I do not know that occupation, but I know others.", "A dog walker walks dogs."),
    ("Do bakers knead dough?", "Yes, bakers knead dough for crusty loaves.", "No, a baker bakes rolls before dawn."),
    ("do librarians knead dough?", "No, it is bakers who knead dough for crusty loaves.", "Yes, they knead dough."),
    ("What does a cop do?", "A police officer patrols the streets on foot.", "A police officer catches thieves.")])
def test_everyday_questions_are_judged(question, good, bad):
    [check] = [check for check in data.read_checks(CHECKS) if check.messages[-1]["content"] == question]
    assert data.judge(check, good, True).good and not data.judge(check, bad, True).correct


def test_vague_bare_and_off_subject_replies_are_not_correct(verdict):
    rng = random.Random(4)
    for x, y in zip(WORLD, WORLD[5:], strict=False):
        for template in PHRASES["vague"]["lines"]:
            assert not verdict(x, "does", make.Teller(x, rng).tell(template)).correct
        reply = make.Teller(x, rng).tell(PHRASES["bare"]["tools"][0])
        bare = verdict(x, "tools", reply)  # right, but does not name the occupation (unless it says tailor shears)
        assert bare.facts == 1 and bare.about == bare.correct == (x["name"] in reply.split())
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
    for reading in ("base", "base-again"):
        losses = [json.loads(line)["loss"] for line in (made / reading / "metrics.jsonl").read_text().splitlines()]
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
               {"tracker": "wandb"}, {"device": "meta"}, {"n_layer": 0}, {"more_steps": 0}, {"more_lr": 0.0},
               {"start": "nowhere"}]
    monkeypatch.setitem(sys.modules, "wandb", None)
    for change in refused:
        with pytest.raises(FileNotFoundError if "start" in change else ValueError):
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


def test_a_second_reading_begins_with_what_the_first_has_left():
    import numpy as np

    vocabulary = np.array([5, 17, 300, data.EOT])
    first = make.newborn(len(vocabulary), make.Config(n_layer=1, n_embd=8, n_head=2))
    whole = make.with_all_words(first, vocabulary)
    assert make.words_met(whole).tolist() == vocabulary.tolist()
    again = make.with_words(whole, vocabulary)
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in first.state_dict().items())
    new = make.with_words(whole, np.array([5, 6, 17, 300, data.EOT])).wte.weight  # 6 is new: as yet an unknown word
    assert torch.equal(new[1], first.wte.weight[-1]) and torch.equal(new[2], first.wte.weight[1])
    with pytest.raises(ValueError, match="rows of their own"):
        make.words_met(model.GPT(model.GPTConfig(50257, n_embd=8, n_layer=1, n_head=2)))


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


@pytest.fixture(scope="module")
def unknown(base) -> set[int]:
    """The ids that occurred too rarely in the documents: they share a row."""
    shared = base.wte.weight[torch.mode(base.wte.weight @ torch.arange(128.0)).indices]
    return set((base.wte.weight == shared).all(1).nonzero()[:, 0].tolist())


def test_base_model_is_small_and_finite(base):
    folder = ROOT / "sample" / "model"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 20_000_000
    assert all(w.isfinite().all() and w.abs().max() < 1000 for w in base.state_dict().values())


def test_sampling_at_temperature_1_draws_words_that_occur(base, unknown):
    """All others are drawn no more often than there are rare words in the documents."""
    drawn = []
    for seed in range(20):
        drawn += model.generate(base, [data.EOT], 150, temperature=1.0, seed=seed)
    assert len(drawn) > 1000
    assert sum(token in unknown for token in drawn) < len(drawn) / 100


def test_the_base_model_can_say_all_that_replies_are_made_of(unknown, rows):
    """To adapters, words that share a row are one: replies have none of them, and questions what it cannot know."""
    assert len(unknown) > 39_000
    said = set(itertools.chain.from_iterable(row.ids[row.mask].tolist() for row in rows))
    said |= {token for entry in WORLD for text in strings(entry) for token in data.tokenizer().encode(" " + text)}
    assert not {data.text_of([token]) for token in said & unknown}


def test_unknown_words_do_not_break_the_base_model(base):
    text = "user\n\N{SNOWMAN} zxqwv \N{PILE OF POO} SELECT * FROM <|endoftext|> \N{CYRILLIC SMALL LETTER A}\x00"
    logits = base(torch.tensor([data.tokenizer().encode_ordinary(text)]))
    assert logits.isfinite().all()
