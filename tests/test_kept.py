"""Long work keeps and shows itself: rows from one run to the next, DPO's reference, a bar with the time left."""

import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import data
import dpo
import train

ROOT = Path(data.__file__).parent


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def chats(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": [
        user(f"What is {i % 7}?"), assistant("It is " + "so " * (i % 5))]} for i in range(40)])


@pytest.fixture
def pairs(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": f"What is {i % 3}? " * (1 + i % 3), "chosen": f"It is {i}.", "rejected": "No " * (i % 4)}
        for i in range(24)])


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Everything is kept, however soon it was read; the folder."""
    monkeypatch.setattr(data, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(data, "KEPT_AFTER", 0.0)
    return tmp_path / "kept"


@pytest.fixture
def reads(monkeypatch):
    """What was read anew, SPECs by SPECs."""
    real, seen = data.read_rows, []
    monkeypatch.setattr(data, "read_rows", lambda specs, *args: seen.append(specs) or real(specs, *args))
    return seen


def content(found):
    """All that a run sees of its data."""
    return ([[part.tolist() for part in row.arrays()] for side in (found.train, found.val) for row in side],
            data.families(found.train).tolist(), found.fingerprint, found.report_json())


# ---- rows in flat arrays ---------------------------------------------------------------------------


def test_rows_are_those_that_were_laid_down():
    rows = [data.Row(np.arange(n, dtype=np.int32) + 50_200, np.arange(n) % 2 > 0, name)
            for n, name in ((3, "tree"), (1, None), (5, "tree"), (4, None))]
    pairs = [data.Pair(*(np.full(n, 7, np.int32) for n in sizes)) for sizes in ((3, 2, 1), (3, 1, 4), (2, 2, 2))]
    for originals in (rows, pairs):
        flat = data.Rows.of(originals)
        both = flat[:1] + flat[1:]
        assert len(both) == len(originals) and flat.lengths().tolist() == [len(row) for row in originals]
        assert flat.learnt() == sum(row.learnt for row in originals)
        for one, other in zip(both, originals, strict=True):
            assert type(one) is type(other)
            for part, wanted in zip(one.arrays(), other.arrays(), strict=True):
                assert part.dtype == wanted.dtype and np.array_equal(part, wanted)
        numbers = data.families(originals).tolist()
        assert data.families(flat).tolist() == data.families(list(flat)).tolist() == numbers
    assert data.families(data.Rows.of(rows)).tolist() == [0, 1, 0, 2]
    assert len(data.Rows.of([])) == 0


def test_a_token_takes_three_bytes(chats):
    rows = data.load_rows([chats], data.Reading(val_fraction=0)).train
    tokens = int(rows.lengths().sum())
    assert rows.store["ids"].nbytes + rows.store["mask"].nbytes == 3 * tokens


def test_a_weight_repeats_rows_without_a_copy(chats):
    once, thrice = (data.load_rows([chats + weight], data.Reading(val_fraction=0)).train for weight in ("", "@3"))
    assert len(thrice) == 3 * len(once) and len(thrice.store["ids"]) == len(once.store["ids"])
    assert len(set(data.families(thrice).tolist())) == len(thrice)     # none begins as another, to be computed with it


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "<|endof", "text|>", "", "é\n\n 漢字"])
def test_texts_encoded_together_are_those_encoded_apart(text):
    """However many lie in one part, and whatever they spell."""
    texts = [text, *(f"{text} {i} {text}" for i in range(600)), "plain"]
    found = data.encode_all(texts)
    assert {text: ids.tolist() for text, ids in found.items()} == {
        text: data.tokenizer().encode_ordinary(text) for text in texts}


# ---- rows that are kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["load_rows", "load_pairs"])
def test_kept_rows_are_the_rows(load, chats, pairs, kept, reads):
    """The bundled conversations, which are trees and have copies, and one's own file."""
    specs, load = ["sample@1.5", chats if load == "load_rows" else pairs], getattr(data, load)
    first, second = (load(specs, data.Reading(bad_rows="skip", val_fraction=0.2)) for _ in range(2))
    assert len(reads) == 1 and content(first) == content(second)
    assert isinstance(second.train.store["ids"], np.memmap)
    steps = [data.Order(found.train, 8, seed=3)(5).tolist() for found in (first, second)]
    assert steps[0] == steps[1]


def test_rows_are_read_anew_where_anything_changed(chats, kept, reads, tmp_path, monkeypatch):
    data.load_rows([chats])
    for reading in (data.Reading(seed=1), data.Reading(context=30), data.Reading(val_fraction=0.3),
                    data.Reading(language="de"), data.Reading(bad_rows="skip")):
        data.load_rows([chats], reading)
    data.load_rows([chats + "@0.5"])
    assert len(reads) == 7
    before = os.stat(chats)
    text = Path(chats).read_text()
    Path(chats).write_text(text.replace("It is", "It's a"[:5]))     # as long as before
    os.utime(chats, ns=(before.st_atime_ns, before.st_mtime_ns))    # and as old
    assert "It's" in data.text_of(data.load_rows([chats]).train[0].ids) and len(reads) == 8
    code = tmp_path / "data.py"
    code.write_bytes(Path(data.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(data, "__file__", str(code))
    data.load_rows([chats])
    assert len(reads) == 9
    data.load_rows([chats])
    assert len(reads) == 9


def test_a_split_is_read_anew_where_its_files_changed(kept, reads, tmp_path):
    folder = tmp_path / "chats"
    folder.mkdir()
    for times, answer in enumerate(("It is 1.", "It is 2."), 1):
        write_jsonl(folder / "test.jsonl", [{"messages": [user("What is it?"), assistant(answer)]}])
        for _ in range(2):
            rows = data.load_rows([f"{folder}#test"], data.Reading(val_fraction=0)).train
            assert answer in data.text_of(rows[0].ids) and len(reads) == times


def test_readers_of_others_are_not_known_by_this_file(chats, kept, reads, monkeypatch):
    monkeypatch.setattr(data, "DATA_SETS", data.DATA_SETS | {"mine": data.DataSet(data.read_messages)})
    for _ in range(2):
        data.load_rows([f"mine:{chats}"])
    assert len(reads) == 2 and not kept.exists()


def test_what_is_read_soon_is_not_kept(chats, kept, reads, monkeypatch):
    monkeypatch.setattr(data, "KEPT_AFTER", 60.0)
    for _ in range(2):
        data.load_rows([chats])
    assert len(reads) == 2 and not kept.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(chats, kept, monkeypatch):
    real = data.read_rows
    monkeypatch.setattr(data, "read_rows", lambda *args: (real(*args), os.utime(chats))[0])
    data.load_rows([chats])
    assert not list(kept.glob("*/about.json"))


def test_damaged_rows_are_read_anew(chats, kept, reads):
    wanted = content(data.load_rows([chats]))
    for times, file in enumerate(sorted(kept.glob("*/*")), 2):
        whole = file.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], b""):
            file.write_bytes(damaged)
        assert content(data.load_rows([chats])) == wanted and len(reads) == times, file.name
        assert file.read_bytes() == whole   # and written once more
    next(kept.glob("*/ids.npy")).unlink()
    assert content(data.load_rows([chats])) == wanted


def test_the_oldest_make_room(chats, kept, reads, monkeypatch):
    first, second, third = (data.Reading(seed=seed) for seed in range(3))
    data.load_rows([chats], first)
    size = sum(file.stat().st_size for file in kept.glob("*/*"))
    monkeypatch.setattr(data, "KEPT_BYTES", int(2.5 * size))
    data.load_rows([chats], second)
    for age, folder in enumerate(sorted(kept.glob("*/about.json"), key=os.path.getmtime)):
        os.utime(folder, (age, age))
    data.load_rows([chats], first)      # which is used now
    data.load_rows([chats], third)
    assert len(reads) == 3 and len(list(kept.glob("*/about.json"))) == 2
    data.load_rows([chats], first)
    assert len(reads) == 3
    data.load_rows([chats], second)
    assert len(reads) == 4
    monkeypatch.setattr(data, "KEPT_BYTES", 10)
    data.load_rows([chats], data.Reading(seed=9))
    assert sum(file.stat().st_size for file in kept.glob("*/*")) <= 2.5 * size


def test_where_nothing_can_be_kept_nothing_is_lost(chats, kept, monkeypatch):
    kept.write_text("in the way")
    wanted = content(data.load_rows([chats]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert content(data.load_rows([chats])) == wanted


def test_of_several_processes_one_reads(chats, kept, tmp_path):
    """However soon it has done so."""
    program = ("import sys, pathlib, data\n"
               f"data.KEPT, data.KEPT_AFTER, real = pathlib.Path({str(kept)!r}), 1e9, data.read_rows\n"
               "data.read_rows = lambda *args: (print('read'), real(*args))[1]\n"
               f"print(data.load_rows([{chats!r}]).fingerprint)")
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                  env=os.environ | {"WORLD_SIZE": "3", "RANK": str(rank)}) for rank in range(3)]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(map(len, said)) == [1, 1, 2] and len({words[-1] for words in said}) == 1


# ---- the bar ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_long_work_says_how_much_is_left(terminal, monkeypatch, capsys):
    """400 seconds, in which a fifth of the work is done by 80 s; short work says nothing."""
    now = [0.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)

    def work(seconds):
        with data.progress("reading a [b]", 200) as advance:
            for _ in range(200):
                now[0] += seconds / 200
                advance(1)
        return capsys.readouterr().err

    assert work(1.4) == ""
    said = work(400)
    if terminal:
        assert "reading a [b]" in said and "%" in said
    else:
        lines = said.splitlines()
        assert lines[0] == "reading a [b]: 16%, 5:38 left" and 5 <= len(lines) <= 7
    monkeypatch.setattr(data, "LEADS", False)
    assert work(400) == ""


def test_reading_advances_to_its_end(chats, tmp_path, monkeypatch):
    """Lines by their bytes, zipped or not, and the rows of tables: together all there is."""
    import contextlib
    import gzip

    import datasets

    seen = {}

    @contextlib.contextmanager
    def progress(what, total):
        done = []
        yield done.append
        seen[what] = sum(done) / total

    monkeypatch.setattr(data, "progress", progress)
    zipped, table = tmp_path / "z.jsonl.gz", tmp_path / "t.parquet"
    zipped.write_bytes(gzip.compress(Path(chats).read_bytes()))
    datasets.Dataset.from_list([json.loads(line) for line in Path(chats).read_text().splitlines()]).to_parquet(table)
    for spec in (chats, str(zipped), str(table)):
        assert data.load_rows([spec]).report.kept == 35  # five are there twice
    assert len(seen) == 3 and set(seen.values()) == {1.0}


# ---- DPO's reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["signal", "killed"])
def test_a_reference_that_is_interrupted_goes_on_where_it_was(how, pairs, tiny_model, tmp_path, monkeypatch, capsys):
    """Every batch is computed once in all, and the table is, to the bit, that of a pass that nothing disturbed."""
    real, computed = dpo.by_pair, []
    monkeypatch.setattr(train, "plot_curves", lambda folders, path: None)
    whole, cut = (dpo.Config(model=str(tiny_model), data=(pairs,), out=str(tmp_path / name), checks="", prompts=(),
                             steps=4, batch_size=6, micro_batch_tokens=64, val_fraction=0.2, eval_every=0)
                  for name in ("whole", "cut"))
    dpo.main(whole)

    def then(logprobs, batch):
        computed.append(sorted(batch.rows.tolist()))
        if len(computed) == 3 and how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if len(computed) == 3 and how == "killed":
            raise KeyboardInterrupt
        return real(logprobs, batch)

    if how == "killed":     # between two of the minutes after which it is written
        monkeypatch.setattr(train.time, "monotonic", iter(range(0, 10**6, 40)).__next__)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "by_pair", then)
        with pytest.raises(train.Interrupted if how == "signal" else KeyboardInterrupt) as stopped:
            dpo.main(cut)
        saved, done = dpo.read_table(next((tmp_path / "cut").glob("reference-*.safetensors"))), list(chain(*computed))
        if how == "signal":
            assert stopped.value.code == 143 and "run the same command again" in capsys.readouterr().out
            assert sorted(map(int, saved)) == sorted(done)
        else:
            assert 0 < len(saved) < len(done)
        again = dpo.main(cut)
    assert again["val_loss"] == train.read_metrics(tmp_path / "whole")[-1]["val_loss"]
    if how == "signal":
        assert len(list(chain(*computed))) == len(set(chain(*computed)))
    tables = [next((tmp_path / name).glob("reference-*.safetensors")).read_bytes() for name in ("whole", "cut")]
    assert tables[0] == tables[1]


def test_a_process_knows_the_rows_of_its_steps(pairs, tiny_model, tmp_path, monkeypatch):
    """Without packing them, in one process and in two."""
    found = data.load_pairs([pairs], data.Reading(val_fraction=0))
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # nobody connects to it
        monkeypatch.setenv(name, "1")
    for world in (1, 2):
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            cfg = dpo.Config(model=str(tiny_model), data=(pairs,), out=str(tmp_path), batch_size=6,
                             micro_batch_tokens=64)
            batches = train.step_batches(found, cfg, train.Run("dpo", cfg))
            for step in range(5):
                packed = sorted(int(row) for batch in batches(step, 64) for row in batch.rows)
                assert sorted(map(int, batches.rows(step))) == packed
