"""The way to the Hugging Face Hub, walked on a stand-in (hub.py): from an empty cache to a chat, and every failure."""

import errno
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import hub as standin
import pytest

import chat
import data
import dpo
import model
import sft
import train

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How can I help you today?"}]


def talks(n):
    return [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} is a number."}]
            for i in range(n)]


def oasst(n):
    """Trees of a prompt with two ranked replies, message by message as the Hub has them."""
    rows = []
    for i, (_, reply) in enumerate(talks(n)):
        for name, parent, role, text, rank in (("p", None, "prompter", f"What is {i}?", None),
                                               ("a", "p", "assistant", reply["content"], 0),
                                               ("b", "p", "assistant", "No.", 1)):
            rows.append({"message_id": f"{name}{i}", "parent_id": parent and f"{parent}{i}", "text": text, "role": role,
                         "lang": "en", "review_result": True, "deleted": False, "rank": rank, "user_id": "u",
                         "labels": {"name": ["spam"], "value": [0.0], "count": [3]}, "detoxify": {"toxicity": 0.0},
                         "tree_state": "ready_for_export", "message_tree_id": f"p{i}"})
    return rows


def ultra(i):
    def of(response, rating):
        return {"model": "m", "response": response, "overall_score": 1.0, "annotations": {
            aspect: {"Rating": rating, "Rationale": "so"} for aspect in data.ASPECTS}}
    return {"source": "s", "instruction": f"What is {i}?", "models": ["m"],
            "completions": [of(f"{i}.", "5"), of("?", "1")]}


@pytest.fixture(scope="session")
def repos():
    card = {"README.md": b"---\nlicense: mit\n---\n", ".gitattributes": b""}
    halves = oasst(6)
    chats = [{"messages": talk, "source": "s"} for talk in talks(8)]

    def hh(part):
        return [{side: f"\n\nHuman: {part} {i}?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
                for i in range(3)]

    return {
        **{f"openai-community/{name}": standin.openai_files() for name in model.SIZES},
        "datasets/OpenAssistant/oasst1": card | {
            "data/train-00000-of-00001-b42a775f407cee45.parquet": standin.parquet(halves[:12]),
            "data/validation-00000-of-00001-134b8fd0c89408b6.parquet": standin.parquet(halves[12:]),
            "2023-04-12_oasst_all.trees.jsonl.gz": b"0" * 100_000},
        "datasets/OpenAssistant/oasst2": card | {"data/train-00000-of-00001.parquet": standin.parquet(oasst(3))},
        "datasets/HuggingFaceTB/smoltalk": card | {
            f"data/{part}/{split}.parquet": standin.parquet(rows) for part in ("all", "smol-rewrite")
            for split, rows in (("train-00000-of-00002", chats[:3]), ("train-00001-of-00002", chats[3:6]),
                                ("test-00000-of-00001", chats[6:]))},
        "datasets/HuggingFaceTB/smol-smoltalk": card | {
            "data/train-00000-of-00002.parquet": standin.parquet(chats[:4]),
            "data/train-00001-of-00002.parquet": standin.parquet(chats[4:6]),
            "data/test-00000-of-00001.parquet": standin.parquet(chats[6:])},
        "datasets/HuggingFaceTB/everyday-conversations-llama3.1-2k": card | {
            f"data/{split}-00000-of-00001.parquet": standin.parquet([{
                "topic": "t", "subtopic": "t", "subsubtopic": "t", "full_topic": "t", "prompt": "p", "completion": "c",
                "token_length": 9, "messages": TALK + talk} for talk in talks(n)])
            for n, split in ((3, "train_sft"), (2, "test_sft"))},
        "datasets/Anthropic/hh-rlhf": card | {
            f"{part}/{split}.jsonl.gz": standin.jsonl(hh(part + split), zipped=True)
            for part in ("harmless-base", "helpful-base") for split in ("train", "test")}
        | {"red-team-attempts/red_team_attempts.jsonl.gz": b"no rows"},
        "datasets/openbmb/UltraFeedback": card | {
            f"{part}.jsonl": standin.jsonl([ultra(part + str(i)) for i in range(3)]) for part in ("flan", "sharegpt")}}


@pytest.fixture
def hub(repos, tmp_path, monkeypatch):
    """The stand-in, and this process's libraries turned to it, with an empty cache."""
    from huggingface_hub import constants

    with standin.Hub({repo: dict(files) for repo, files in repos.items()}) as server:
        turn_to(monkeypatch, server.url, tmp_path / "hub")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for module in (model, data):
            monkeypatch.setattr(module, "PATIENCE", 1)
        monkeypatch.chdir(tmp_path)
        yield server


def turn_to(monkeypatch, url, cache=None):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    if cache:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script as from the command line: its exit code and what it said on standard error."""
    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        capsys.readouterr()
        try:
            data.run_script(script.main, script.Config, getattr(script, "PRESETS", None))
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        return code, capsys.readouterr().err
    return run


SMALL = ("--steps", 2, "--batch-size", 2, "--val-fraction", 0.2, "--context", 128, "--eval-every", 0, "--save-every", 0,
         "--prompts", "Hi", "--reply-tokens", 4, "--checks", "", "--device", "cpu")


# ---- the way ---------------------------------------------------------------------------------------


def test_from_an_empty_cache_to_a_chat_and_offline_afterwards(hub, run, tmp_path, monkeypatch, capsys):
    """--preset gpt2 through SFT with LoRA in bf16, DPO and chat; then the Hub falls silent, and nothing asks it."""
    monkeypatch.setattr(train, "plot_curves", lambda folders, path: None)
    assert run(sft, "--preset", "gpt2", *SMALL, "--precision", "bf16", "--out", "sft")[0] == 0
    assert run(dpo, "--preset", "gpt2", "--model", "sft", *SMALL, "--out", "dpo")[0] == 0
    wanted = {spec.partition("@")[0] for script in (sft, dpo) for spec in script.PRESETS["gpt2"]["data"]}
    fetched = [re.sub(r"/resolve/\w+/", " ", path).lstrip("/").split(" ") for path in hub.fetched()]
    assert {repo for repo, _ in fetched} == {"openai-community/gpt2"} | {
        f"datasets/{data.DATA_SETS[name].hub}" for name in wanted}
    assert sorted(file for repo, file in fetched if repo == "openai-community/gpt2") == list(model.HUB_FILES)
    assert all(file.startswith("data/") for repo, file in fetched if "datasets/" in repo)

    hub.mood, before = "silent", len(hub.asked)
    assert run(chat, "--model", "gpt2", "--prompt", "Hi", "--max-new-tokens", 4)[0] == 0
    assert run(sft, "--preset", "gpt2", *SMALL, "--precision", "bf16", "--out", "again")[0] == 0
    assert len(hub.asked) == before
    files = [Path(folder, "model.safetensors").read_bytes() for folder in ("sft", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", [name for name, data_set in data.DATA_SETS.items() if data_set.hub])
def test_every_data_set_comes_from_the_hub_with_what_is_needed_and_no_more(name, hub, capfd):
    data_set = data.DATA_SETS[name]
    for load, reader in ((data.load_rows, data_set.conversations), (data.load_pairs, data_set.preferences)):
        if reader:
            found = load([name], data.Reading(val_fraction=0))
            assert found.report.kept >= 3 and not any(why.startswith("bad row") for why in found.report.dropped)
    files = {path.split("/resolve/")[1].partition("/")[2] for path in hub.fetched()}
    everything = set(hub.repos[f"datasets/{data_set.hub}"])
    needed = {file for file in everything if file.endswith((".parquet", ".jsonl", "train.jsonl.gz", "test.jsonl.gz"))
              and "smol-rewrite" not in file}
    assert files == needed and "%" not in capfd.readouterr().err    # no bar enters a pipe
    same = data.load_rows if data_set.conversations else data.load_pairs
    assert same([data_set.hub], data.Reading(val_fraction=0)).report.kept      # by its name there, and unasked
    assert len(hub.fetched()) == len(files)


def test_a_broken_download_goes_on_where_it_broke_off(hub):
    hub.cut = 12_000_000
    folder = model.find_model("gpt2")
    weights = [asked for asked in hub.asked if asked[0] == "GET" and asked[1].endswith("model.safetensors")]
    assert [part[:9] for _, _, part in weights] == ["", "bytes=104"]   # in pieces of 10 MiB
    assert (folder / "model.safetensors").read_bytes() == hub.repos["openai-community/gpt2"]["model.safetensors"]


@pytest.mark.parametrize("spec", ["gpt2", "openai-community/gpt2", "gpt2-small"])
def test_names_of_openais_smallest(spec, hub):
    assert model.find_model(spec) == model.find_model("gpt2")
    assert {path.split("/resolve/")[0] for path in hub.fetched()} == {"/openai-community/gpt2"}


def test_a_half_fetched_data_set_is_not_taken_for_the_whole(hub, run, tmp_path):
    """One of two parts is missing, and the Hub is away."""
    data.load_rows(["smol-smoltalk"])
    next((tmp_path / "hub").rglob("snapshots/*/data/train-00001-of-00002.parquet")).unlink()
    hub.mood = "down"
    code, said = run(data, "smol-smoltalk")
    assert code == 2 and "503" in said, said
    hub.mood = "well"
    assert data.load_rows(["smol-smoltalk"]).report.kept == 8


# ---- failures --------------------------------------------------------------------------------------


ASK = {"a model": (sft, "--model", "gpt2", "--data", "{chats}", "--out", "run"), "a data set": (data, "oasst1")}
FORMS = ASK | {"a zipped one": (data, "hh-rlhf"), "one of lines": (data, "ultrafeedback")}


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(standin.jsonl([{"messages": talk} for talk in talks(8)]))
    return path


def lines_of(what, run, chats):
    script, *args = ASK[what]
    code, said = run(script, *(str(arg).replace("{chats}", str(chats)) for arg in args))
    lines = [line for line in said.splitlines() if not line.startswith("fetching ")]
    assert code in (1, 2) and 1 <= len(lines) <= 5 and "Traceback" not in said, said
    assert ("hf download" in said and "--include" in said) or "model.safetensors" in said, said
    return said


@pytest.mark.parametrize("what", ASK)
@pytest.mark.parametrize("mood, word", [
    ("silent", "timed out (no answer)"), ("portal", "a login page or a proxy may be"), ("limited", "rate limit"),
    ("gated", "You must be authenticated to access it."), ("unauthorized", "401"), ("down", "503")])
def test_a_hub_that_is_ill_is_told_in_its_own_words_and_soon(what, mood, word, hub, run, chats):
    hub.mood = mood
    assert word in lines_of(what, run, chats)
    assert len(hub.asked) <= 3      # it was not asked again and again


@pytest.mark.parametrize("script", [sft, dpo])
def test_no_model_is_fetched_for_data_that_are_not_there(script, hub, run):
    code, said = run(script, "--model", "gpt2", "--data", "oasst1", "my_talks.jsonl", "--out", "run")
    assert code == 2 and "no file is called 'my_talks.jsonl'" in said and not hub.asked, said


@pytest.mark.parametrize("what", ASK)
def test_without_a_name_server(what, hub, run, chats, monkeypatch):
    looked = []

    def getaddrinfo(host, *args, **more):
        looked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    turn_to(monkeypatch, "http://huggingface.invalid")
    assert "Temporary failure in name resolution" in lines_of(what, run, chats)
    assert 1 <= len(looked) <= 2


@pytest.mark.parametrize("what", ASK)
def test_a_cache_that_cannot_be_written(what, hub, run, chats, tmp_path):
    """Root writes where it likes, but makes no folder in a file."""
    (tmp_path / "hub").write_text("in the way")
    said = lines_of(what, run, chats)
    assert str(tmp_path / "hub") in said and re.search("Not a directory|File exists|Permission denied", said), said


@pytest.mark.parametrize("what", ASK)
def test_a_full_disk(what, hub, run, chats, monkeypatch):
    """It is told before the download where it can be seen, and else when the disk is full."""
    from huggingface_hub import file_download

    with monkeypatch.context() as patch:
        patch.setattr(file_download.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        said = lines_of(what, run, chats)
        assert "Not enough free disk space" in said and "warn" not in said and not hub.fetched()

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    assert "No space left on device" in lines_of(what, run, chats)


@pytest.mark.parametrize("what, large", [("a model", "model.safetensors"), ("a model", "config.json"),
                                         ("a data set", "train-00000-of-00001-b42a775f407cee45.parquet"),
                                         ("a zipped one", "train.jsonl.gz"), ("one of lines", "flan.jsonl")])
def test_a_truncated_file_in_the_cache(what, large, hub, run, chats, tmp_path):
    """It is named; deleted, as the message says, it comes again."""
    model.find_model("gpt2")
    data.load_rows(["oasst1"])
    data.load_pairs(["hh-rlhf", "ultrafeedback"])
    file = next((tmp_path / "hub").rglob(large)).resolve()
    file.write_bytes(file.read_bytes()[:-20])
    script, *args = FORMS[what]
    args = [str(arg).replace("{chats}", str(chats)) for arg in args]
    code, said = run(script, *args)
    assert code == 2 and len(said.splitlines()) <= 4 and "Traceback" not in said, said
    assert said.rstrip().endswith(f"Delete it, and it is fetched again: {file}")
    file.unlink()
    assert run(script, *args, *(SMALL if script is sft else ()))[0] == 0


def test_what_is_cached_needs_no_hub_that_answers(hub, run, chats):
    """The model was fetched before; a Hub that takes requests and answers none is not even asked."""
    model.find_model("gpt2")
    data.load_rows(["oasst1"])
    hub.mood, before = "silent", len(hub.asked)
    assert model.find_model("gpt2").is_dir() and data.load_rows(["oasst1"]).report.kept
    assert len(hub.asked) == before
