"""Nothing is lost: a run that is killed, signalled or starved goes on bit for bit, and a checkpoint is whole or absent.

The quick tier samples; `uv run pytest -n 0 -m full` makes the same trials at every system call of a save, at hundreds
of random moments, and with torchrun. How runs are made cheap is in trials.py; what breaks them, in faults.py.
"""

import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import faults
import pytest
import trials
from trials import differences, many, outcome, report, tail, verified, wait_until

JOBS = ("sft full", "sft lora", "dpo full", "dpo lora")
full = pytest.mark.full


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return trials.Server(tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module")
def uninterrupted(server):
    """uninterrupted(job) -> the outcome of the run that nothing happens to, made once, and the seconds it took."""
    made = {}

    def of(job: trials.Job) -> tuple[dict, float]:
        if job not in made:
            folder, began = server.new_folder(), time.monotonic()
            assert server.run(job, folder) == 0, tail(folder)
            made[job] = outcome(folder), time.monotonic() - began
        return made[job]

    return of


def assert_resumes(server, job: trials.Job, folder: Path, wanted: dict) -> None:
    assert server.run(job, folder) == 0, tail(folder)
    assert differences(outcome(folder), wanted) == [], folder


def assert_short_error(folder: Path, *words: str) -> None:
    """The log ends with an error of at most five lines that contains these words, and no traceback."""
    log = trials.log_of(folder).read_text(errors="replace")
    assert "Traceback" not in log, log[-2000:]
    error = log[log.rindex("error: "):].splitlines()
    assert len(error) <= 5, error
    for word in words:
        assert word in "\n".join(error), (word, error)


# ---- kill -9 at random moments -------------------------------------------------------------------


def run_under_kills(server, job: trials.Job, wanted: dict, seconds: float, seed: int, most: int) -> int:
    """Run the same command again and again, each time killed at a random moment; returns how often it was killed.

    After each kill a verified checkpoint is there, none older than before, and the end is that of an unbroken run.
    """
    rng, folder, kills, newest = random.Random(f"{job} {seed}"), server.new_folder(), 0, 0
    while kills < most:
        process = server.begin(job, folder)
        process.join(rng.uniform(0.02, 0.7) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, tail(folder)
        kills += 1
        steps = verified(folder)
        assert max(steps, default=0) >= newest, (folder, steps, newest)
        newest = max(steps, default=0)
    assert_resumes(server, job, folder, wanted)
    shutil.rmtree(folder)
    return kills


def test_a_killed_run_goes_on_bit_for_bit(server, uninterrupted):
    def trial(name):
        job = server.jobs[name].but(steps=5)
        wanted, seconds = uninterrupted(job)
        return run_under_kills(server, job, wanted, seconds, seed=0, most=2)

    assert sum(many(trial, JOBS)) >= 4


@full
@pytest.mark.parametrize("name", JOBS)
def test_hundreds_of_random_kills(server, uninterrupted, name, record_property):
    job = server.jobs[name]
    wanted, seconds = uninterrupted(job)
    kills, seeds = 0, count(1)
    while kills < 75:  # how often a run is killed before it comes to its end is a matter of luck
        kills += sum(many(lambda seed: run_under_kills(server, job, wanted, seconds, seed, most=8), islice(seeds, 4)))
    report(record_property, f"random kill -9 over whole runs of {name}, all resumed bit for bit", kills)


# ---- every boundary of a save --------------------------------------------------------------------


@pytest.fixture(scope="module")
def save_point(server):
    """save_point(name) -> a run of this job that stands before its fourth save, of which forks can be made."""
    points = {}

    def of(name: str) -> faults.SavePoint:
        if name not in points:
            points[name] = faults.SavePoint(server, server.jobs[name].but(steps=5), step=4)
        return points[name]

    yield of
    for point in points.values():
        point.close()


def assert_survives(server, job, folder: Path, wanted: dict | None) -> None:
    """A verified checkpoint of this save (4) or the one before is there; from it, the run ends as it would have."""
    assert verified(folder)[0] in (3, 4), (folder, verified(folder))
    if wanted:
        assert_resumes(server, job, folder, wanted)
    shutil.rmtree(folder)


def test_a_save_may_die_or_fail_anywhere(server, uninterrupted, save_point):
    point = save_point("sft full")
    wanted, _ = uninterrupted(point.job)
    events = point.fork(faults.count)[0].splitlines()
    assert len(events) > 40 and {"os.fsync", "os.rename", "save_file", "open", "os.mkdir"} <= set(events)
    for n in range(len(events)):  # dies at one, fails at the next, and every 16th time is resumed
        said, status, folder = point.fork(*((faults.die, n) if n % 2 else (faults.fail, n, errno.ENOSPC)))
        if n % 2:
            assert status == -signal.SIGKILL
        elif status:  # failures to tidy up are not worth stopping for
            assert status == 1 and "could not be written" in said and "free" in said, (events[n], said)
        assert_survives(server, point.job, folder, wanted if n % 16 in (5, 12) else None)


needs_strace = pytest.mark.skipif(not faults.strace_works(), reason="needs strace and the right to trace")


@full
@needs_strace
@pytest.mark.parametrize("name", ["sft full", "dpo lora"])
def test_a_kill_at_every_system_call_of_a_save(server, uninterrupted, save_point, name, record_property):
    point = save_point(name)
    wanted, _ = uninterrupted(point.job)
    calls = point.system_calls()
    boundaries = [(call, n) for call in sorted(set(calls)) for n in range(1, calls.count(call) + 1)]

    def trial(boundary) -> bool:
        call, n = boundary
        _, status, folder = point.traced(f"inject={call}:signal=KILL:when={n}")
        assert_survives(server, point.job, folder, wanted)
        return status == -signal.SIGKILL

    killed = sum(many(trial, boundaries))
    report(record_property, f"kills at system calls of a save of {name} (of {len(boundaries)}), all resumed", killed)
    assert killed >= 0.95 * len(boundaries)


@full
@needs_strace
def test_every_write_fsync_and_rename_of_a_save_fails_once(server, uninterrupted, save_point, record_property):
    point = save_point("sft lora")
    wanted, _ = uninterrupted(point.job)
    calls = point.system_calls()
    writing = ("openat", "write", "pwrite64", "ftruncate", "fallocate", "fsync", "rename", "mkdir")
    others = ("close", "unlinkat", "unlink", "rmdir", "read", "fstat", "newfstatat", "lseek", "getdents64")
    boundaries = [(call, n, error) for call in writing + others for n in range(1, calls.count(call) + 1)
                  for error in (("ENOSPC", "EIO") if call in writing else ("EIO",))]

    def trial(boundary) -> bool:
        call, n, error = boundary
        said, status, folder = point.traced(f"inject={call}:error={error}:when={n}")
        assert status in (0, 1), (boundary, said, status)
        if status:
            assert "Traceback" not in said and len(said.splitlines()) <= 5, (boundary, said)
        assert_survives(server, point.job, folder, wanted)
        return status == 1

    stopped = sum(many(trial, boundaries))
    what = f"system calls of a save failed once with ENOSPC or EIO, all resumed ({stopped} stopped the run)"
    report(record_property, what, len(boundaries))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of so many bytes; root's to do."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder])


@full
def test_a_disk_that_is_really_full(server, uninterrupted, small_disk, record_property):
    job = server.jobs["sft full"].but(steps=5)
    wanted, _ = uninterrupted(job)
    disk = small_disk(64 << 20)
    sizes = range(200_000, 17_000_000, 400_000)
    stopped = 0
    for size in sizes:
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        folder = disk / "run"
        trials.log_of(folder).unlink(missing_ok=True)
        if code := server.run(job, folder):
            stopped += 1
            assert code == 1
            assert_short_error(folder, "No space left")
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert_resumes(server, job, folder, wanted)
        shutil.rmtree(folder)
    report(record_property, f"sizes of a full disk, all resumed ({stopped} stopped the run)", len(sizes))


# ---- damaged files -------------------------------------------------------------------------------


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = path.read_bytes()
    at = rng.randrange(len(content))
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:at])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    else:
        flipped = content[at] ^ 1 << rng.randrange(8)
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1:])


DAMAGES = [(file, how) for file in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
           for how in ("deleted", "truncated", "longer", "flipped")]


@pytest.fixture(scope="module")
def finished_but_for_the_end(server):
    """A run of five steps that was stopped just before its last files were written, and its checkpoints 5 and 4."""
    job = server.jobs["sft full"].but(steps=5)
    folder = server.new_folder()
    assert server.run(job, folder, breaks_in_finish) == -signal.SIGKILL
    assert verified(folder)[:2] == [5, 4]
    return job, folder


def breaks_in_finish() -> None:
    import train

    train.export = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_every_damage_to_every_file_is_found(server, finished_but_for_the_end, tmp_path):
    import train

    _, folder = finished_but_for_the_end
    rng = random.Random(0)
    for file, how in DAMAGES:
        for n in range(20 if how in ("flipped", "truncated") else 1):
            copy = tmp_path / "step-00000005"
            shutil.copytree(folder / "checkpoints" / copy.name, copy)
            assert train.verify_checkpoint(copy) == ""
            damage(copy / file, how, rng)
            assert file in train.verify_checkpoint(copy), (file, how, n)
            shutil.rmtree(copy)


def assert_older_one_is_taken(server, uninterrupted, finished_but_for_the_end, file: str, how: str) -> None:
    job, folder = finished_but_for_the_end
    wanted, _ = uninterrupted(job)
    copy = server.new_folder()
    shutil.copytree(folder, copy)
    damage(copy / "checkpoints" / "step-00000005" / file, how, random.Random(f"{file} {how}"))
    assert_resumes(server, job, copy, wanted)
    log = trials.log_of(copy).read_text()
    assert re.search(rf"skipped \S+step-00000005: {re.escape(file)} (is missing|is damaged|has \d+ bytes)", log), log
    assert re.search(r"resumed \S+step-00000004", log)


def test_a_damaged_checkpoint_is_skipped_and_said_why(server, uninterrupted, finished_but_for_the_end):
    assert_older_one_is_taken(server, uninterrupted, finished_but_for_the_end, "optimizer.safetensors", "flipped")


@full
@pytest.mark.parametrize(("file", "how"), DAMAGES)
def test_each_damaged_checkpoint_is_skipped(server, uninterrupted, finished_but_for_the_end, file, how):
    assert_older_one_is_taken(server, uninterrupted, finished_but_for_the_end, file, how)


def stops_after_a_save() -> None:
    import train

    save = train.save_checkpoint
    train.save_checkpoint = lambda *given: save(*given) or os.kill(os.getpid(), signal.SIGTERM)


def test_damaged_checkpoints_do_not_push_out_new_ones(server, uninterrupted):
    """They are set aside, so that the newest ones are those from which a run goes on."""
    job = server.jobs["sft full"]
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    assert server.run(job, folder, breaks_in_finish, keep=4) == -signal.SIGKILL
    assert verified(folder)[:4] == [8, 7, 6, 5]
    for step in (8, 7, 6):
        damage(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors", "flipped", random.Random(step))
    assert server.run(job, folder, stops_after_a_save) == 143
    assert verified(folder)[:2] == [6, 5], tail(folder)
    log = trials.log_of(folder).read_text()
    for step in (8, 7, 6):
        assert f"skipped {folder}/checkpoints/step-{step:08d}: model.safetensors is damaged" in log
        assert f"checkpoints/damaged-step-{step:08d}" in log
        assert (folder / "checkpoints" / f"damaged-step-{step:08d}").is_dir()
    assert server.run(job, folder, stops_after_a_save) == 143  # "run the same command again": there is something
    assert verified(folder)[:2] == [7, 6]
    assert_resumes(server, job, folder, wanted)


# ---- signals -------------------------------------------------------------------------------------


def run_under_signals(server, job: trials.Job, wanted: dict, seconds: float, seed: int, most: int) -> list[str]:
    """As `run_under_kills` with SIGTERM and Ctrl-C: a clean exit each time. Returns what was going on at each."""
    rng, folder, when = random.Random(f"{job} {seed}"), server.new_folder(), []
    while len(when) < most:
        trials.log_of(folder).unlink(missing_ok=True)
        process = server.begin(job, folder)
        wait_until(lambda: trials.log_of(folder).exists() and "started" in trials.log_of(folder).read_text())
        process.join(rng.uniform(0, 0.6) * seconds)
        number = rng.choice((signal.SIGTERM, signal.SIGINT))
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join(60)
        log = trials.log_of(folder).read_text()
        assert "Traceback" not in log, log
        if process.exitcode == 0:
            break
        assert process.exitcode in (128 + number, -number), (process.exitcode, log)
        when.append("training" if "stopped after step" in log else "start-up or end")
        if "stopped after step" in log:
            step = int(re.search(r"stopped after step (\d+)", log)[1])
            assert verified(folder)[:1] == ([step] if step else [])
    assert_resumes(server, job, folder, wanted)
    shutil.rmtree(folder)
    return when


def test_a_signal_stops_a_run_cleanly(server, uninterrupted):
    def trial(name):
        job = server.jobs[name].but(steps=5, save_every=0)
        wanted, seconds = uninterrupted(job)
        return run_under_signals(server, job, wanted, seconds, seed=0, most=2)

    assert sum(map(len, many(trial, ("sft full", "dpo lora")))) >= 2


@full
@pytest.mark.parametrize("name", JOBS)
def test_signals_at_random_moments(server, uninterrupted, name, record_property):
    job = server.jobs[name].but(save_every=0)
    wanted, seconds = uninterrupted(job)
    when, seeds = [], count(1)
    while len(when) < 30:
        runs = many(lambda seed: run_under_signals(server, job, wanted, seconds, seed, most=6), islice(seeds, 4))
        when += chain.from_iterable(runs)
    report(record_property, f"SIGTERM or SIGINT at random moments of {name} ({when.count('training')} in the loop), "
                            "all clean and resumed bit for bit", len(when))


def slow_evaluation() -> None:
    """Evaluation after a step waits until it is told to stop; a micro-batch later it may."""
    import train

    evaluate = train.evaluate

    def slow(loss, batches, run):
        if batches and (run.folder / "checkpoints" / "step-00000002").is_dir():  # before that save, one batch is tried
            print("evaluating", flush=True)
            wait_until(lambda: run.signal)
        return evaluate(loss, batches, run)

    train.evaluate = slow


def slow_save() -> None:
    import train

    save = train.save_checkpoint

    def slow(gpt, optimizer, state, cfg, run):
        print("saving", flush=True)
        wait_until(lambda: run.signal)
        time.sleep(0.3)
        save(gpt, optimizer, state, cfg, run)

    train.save_checkpoint = slow


def start_up() -> None:
    import data

    data.load_rows = lambda *_, **__: print("reading rows", flush=True) or time.sleep(60)


@pytest.mark.parametrize(("prepare", "sign", "steps"), [(slow_evaluation, "evaluating", [3, 2]),
                                                        (slow_save, "saving", [1]), (start_up, "reading rows", [])])
def test_a_signal_during(server, uninterrupted, prepare, sign, steps):
    """Evaluation, a save and the start-up: what was due is done by the resumed run, and its line is logged."""
    job = server.jobs["sft full"].but(steps=5)
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    process = server.begin(job, folder, prepare)
    wait_until(lambda: trials.log_of(folder).exists() and sign in trials.log_of(folder).read_text())
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143 and "Traceback" not in tail(folder), tail(folder)
    assert verified(folder) == steps
    assert_resumes(server, job, folder, wanted)


def save_without_end() -> None:
    import train

    train.save_checkpoint = lambda *_: print("saving", flush=True) or time.sleep(60)


def test_a_second_signal_ends_the_process_at_once(server):
    folder = server.new_folder()
    process = server.begin(server.jobs["sft full"], folder, save_without_end)
    wait_until(lambda: trials.log_of(folder).exists() and "saving" in trials.log_of(folder).read_text())
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: "again to stop at once" in trials.log_of(folder).read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130 and "Traceback" not in tail(folder)


@full
def test_ctrl_c_while_the_script_starts(server, tmp_path, record_property):
    """In a new process: imports, model, data. Python's own first 0.2 s are not ours to guard."""
    command = [sys.executable, "sft.py", "--model", f"{server.data}/model", "--data", f"{server.data}/sft.jsonl",
               "--out", str(tmp_path / "run"), "--context", "96", "--steps", "100000", "--prompts", "Hi",
               "--reply-tokens", "2", "--device", "cpu", "--eval-every", "0", "--save-every", "0"]
    rng, stopped = random.Random(0), 0
    for n in range(10):
        log = tmp_path / "log"
        with open(log, "w") as out, subprocess.Popen(command, cwd=trials.ROOT, stdout=out, stderr=out) as process:
            number = (signal.SIGINT, signal.SIGTERM)[n % 2]
            wait_until(lambda: "site-packages" in Path(f"/proc/{process.pid}/maps").read_text())  # our own imports
            time.sleep(rng.uniform(0.0, 5.0))
            process.send_signal(number)
            code = process.wait(60)
        assert code in (128 + number, -number), (code, log.read_text())
        assert "Traceback" not in log.read_text(), log.read_text()
        stopped += 1
    report(record_property, "signals while the script starts, in new processes, all clean", stopped)


# ---- trouble -------------------------------------------------------------------------------------


def loss_becomes(what: str) -> None:
    """In step 4 the loss is NaN or infinite, or is fine while its gradient is not."""
    import sft

    loss, step = sft.sft_loss, count_steps()

    def broken(gpt, batch):
        total, count, metrics = loss(gpt, batch)
        if gpt.training and step() == 4:
            zero = gpt.ln_f.weight.sum() * 0
            total = total + (zero.sqrt() if what == "gradient" else zero + float(what))
        return total, count, metrics

    sft.sft_loss = broken


def nan_loss() -> None:
    loss_becomes("nan")


def infinite_loss() -> None:
    loss_becomes("inf")


def infinite_gradient() -> None:
    loss_becomes("gradient")


def count_steps():
    """A function that says which step, from 1, is being computed."""
    import train

    learning_rate, steps = train.learning_rate, []
    train.learning_rate = lambda step, cfg: steps.append(step) or learning_rate(step, cfg)
    return lambda: steps[-1] + 1


@pytest.mark.parametrize("prepare", [nan_loss, infinite_loss, infinite_gradient])
def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(server, uninterrupted, prepare):
    from safetensors.numpy import load_file

    job = server.jobs["sft full"].but(steps=5)
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    assert server.run(job, folder, prepare) == 1
    assert_short_error(folder, "step 4", "loss", "gradient norm", "rate", "rows", "--lr")
    assert verified(folder) == [3, 2]
    for file in (folder / "checkpoints" / "step-00000003").glob("*.safetensors"):
        assert all((abs(tensor) < 1e9).all() for tensor in load_file(file).values())
    assert_resumes(server, job, folder, wanted)


def weights_break(after: str = "") -> None:
    """The third update leaves weights of which the next loss is no number; then there is a signal, or no memory."""
    import train

    step = train.step

    def breaking(loss, optimizer, batches, state, *more):
        if after == "no memory" and state.step == 3:
            raise MemoryError("out of memory")
        record = step(loss, optimizer, batches, state, *more)
        if state.step == 3:
            loss.gpt.ln_f.weight.data.fill_(3e38)
            if after == "a signal":
                os.kill(os.getpid(), signal.SIGTERM)
        return record

    train.step = breaking


@pytest.mark.parametrize(("after", "settings", "left"), [
    ("", {"save_every": 1}, [2, 1]), ("a signal", {"save_every": 0}, []), ("no memory", {"save_every": 2}, [2]),
    ("", {"save_every": 2, "val_fraction": 0.0, "steps": 3}, [2])])
def test_weights_that_compute_no_numbers_are_not_saved(server, uninterrupted, after, settings, left):
    """Though the gradient was finite and no evaluation was due; from what is left the run ends as it would have."""
    job = server.jobs["sft full"].but(**{"steps": 5, "eval_every": 0} | settings)
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    assert server.run(job, folder, partial(weights_break, after)) == 1
    assert_short_error(folder, "loss after step 3 is", "not saved", "--lr")
    assert verified(folder) == left and not (folder / "model.safetensors").exists()
    assert_resumes(server, job, folder, wanted)


def memory_ends_in_the_update(error: type) -> None:
    """In the third one, when half of the weights have made the step."""
    import torch

    step, calls = torch.optim.AdamW.step, count(1)

    def half(optimizer, *given):
        if next(calls) < 3:
            return step(optimizer, *given)
        optimizer.param_groups[0]["params"][0].data.add_(1)
        raise error("CPU out of memory")

    torch.optim.AdamW.step = half


@pytest.mark.parametrize("error", ["MemoryError", "OutOfMemoryError"])
@pytest.mark.parametrize("save_every", [0, 2])
def test_memory_that_ends_in_the_update_saves_no_half_of_it(server, uninterrupted, error, save_every):
    import torch

    job = server.jobs["sft full"].but(steps=5, save_every=save_every)
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    kind = MemoryError if error == "MemoryError" else torch.OutOfMemoryError
    assert server.run(job, folder, partial(memory_ends_in_the_update, kind)) == 1
    assert_short_error(folder, "out of memory")
    assert verified(folder) == ([2] if save_every else [])
    assert_resumes(server, job, folder, wanted)


def memory_ends_in_an_evaluation() -> None:
    """In the second one, after step 3."""
    import torch

    import train

    evaluate, calls = train.evaluate, count(1)

    def scarce(loss, batches, run):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return evaluate(loss, batches, run)

    train.evaluate = scarce


def test_memory_that_ends_in_an_evaluation_is_saved(server, uninterrupted):
    job = server.jobs["sft full"].but(steps=5, save_every=0)
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    assert server.run(job, folder, memory_ends_in_an_evaluation) == 1
    assert_short_error(folder, "out of memory")
    assert verified(folder) == [3]
    assert_resumes(server, job, folder, wanted)


def memory_ends_before_the_first_step() -> None:
    import torch

    zeros, calls = torch.zeros_like, count()

    def scarce(*given, **more):
        if next(calls) == 5:
            raise torch.OutOfMemoryError("CPU out of memory")
        return zeros(*given, **more)

    torch.zeros_like = scarce


def test_memory_that_ends_while_moments_are_made(server, uninterrupted):
    job = server.jobs["sft full"].but(steps=5)
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    assert server.run(job, folder, memory_ends_before_the_first_step) == 1
    assert_short_error(folder, "out of memory")
    assert verified(folder) == []
    assert_resumes(server, job, folder, wanted)


def memory_for_80_tokens() -> None:
    import torch

    import model

    predicting = model.GPT.predicting

    def scarce(gpt, batch):
        if gpt.training and len(batch.tokens) > 80:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return predicting(gpt, batch)

    model.GPT.predicting = scarce


def test_little_memory_halves_the_micro_batches_for_the_same_gradient(server):
    job, little, less = server.jobs["sft full"].but(steps=2, dropout=0.0), server.new_folder(), server.new_folder()
    assert server.run(job.but(micro_batch_tokens=320), little, memory_for_80_tokens) == 0, tail(little)
    log = trials.log_of(little).read_text()
    assert "micro-batches of 160 tokens" in log and "micro-batches of 80 tokens" in log
    assert server.run(job.but(micro_batch_tokens=80), less) == 0
    little, less = outcome(little), outcome(less)
    assert little["model.safetensors"] == less["model.safetensors"]
    assert little["metrics.jsonl"] == less["metrics.jsonl"]


def memory_until_step_4() -> None:
    import torch

    import sft

    loss, step = sft.sft_loss, count_steps()

    def scarce(gpt, batch):
        if gpt.training and step() == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return loss(gpt, batch)

    sft.sft_loss = scarce


def test_memory_that_ends_later_is_saved_and_advised(server, uninterrupted):
    job = server.jobs["sft full"].but(steps=5, save_every=0)
    wanted, _ = uninterrupted(job)
    folder = server.new_folder()
    assert server.run(job, folder, memory_until_step_4) == 1
    assert_short_error(folder, "out of memory in step 5", "--micro-batch-tokens 24")
    assert verified(folder) == [4]
    assert_resumes(server, job, folder, wanted)


def test_a_folder_belongs_to_one_process_and_one_configuration(server):
    job, folder = server.jobs["sft full"].but(steps=5), server.new_folder()
    first = server.begin(job, folder, save_without_end)
    wait_until(lambda: trials.log_of(folder).exists() and "saving" in trials.log_of(folder).read_text())
    trials.log_of(folder).unlink()
    assert server.run(job, folder) == 2
    assert_short_error(folder, str(folder), "in use", "--out")
    first.kill()
    first.join()
    # until there is a checkpoint nothing would be lost, so the command may be mended
    assert server.run(job.but(lr=0.02), folder, breaks_in_finish) == -signal.SIGKILL, tail(folder)
    job = job.but(lr=0.02)
    for change, words in (({"lr": 0.5}, ("--lr", "0.02 there, 0.5 now")), ({"dropout": 0.0}, ("--dropout",)),
                          ({"model": f"{server.data}/other"}, ("--model", "sha256")),
                          ({"data": (f"{server.data}/other.jsonl",)}, ("--data", "sha256"))):
        make_other(server.data)
        assert server.run(job.but(**change), folder) == 2
        assert_short_error(folder, *words, "--overwrite")
    assert server.run(job.but(lr=0.5, steps=2), folder, overwrite=True) == 0, tail(folder)


def make_other(folder: Path) -> None:
    """Another model, and the same data but for one word."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder / "model", folder / "other", dirs_exist_ok=True)
    weights = load_file(folder / "model" / "model.safetensors")
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + 1
    save_file(weights, folder / "other" / "model.safetensors")
    text = (folder / "sft.jsonl").read_text()
    (folder / "other.jsonl").write_text(text.replace("reply 3", "reply three", 1))


# ---- several processes ---------------------------------------------------------------------------


def as_rank(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def run_in_processes(server, job: trials.Job, folder: Path, world: int = 2, seconds: float = 400, **more) -> list[int]:
    """A run in so many processes; their exit codes."""
    port = free_port()
    processes = [server.begin(job, folder, partial(as_rank, rank, world, port), **more) for rank in range(world)]
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    hung = [process for process in processes if process.exitcode is None]
    for process in hung:
        process.kill()
    assert not hung, f"a run in {world} processes hangs: {tail(folder)}"
    return [process.exitcode for process in processes]


def assert_agree(one: Path, several: Path, tolerance: float = 1e-6) -> None:
    """Losses, gradient norms and final weights of two runs."""
    from safetensors.numpy import load_file

    first, second = (outcome(folder)["metrics.jsonl"] for folder in (one, several))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[key] - b[key]) <= tolerance * max(1, abs(a[key])) for key in a), (a, b)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, several))
    assert first.keys() == second.keys()
    assert max(abs(first[key] - second[key]).max() for key in first) <= tolerance


@pytest.mark.parametrize("name", ["sft full"])
def test_two_processes_are_one(server, name):
    compare_processes(server, server.jobs[name].but(steps=3), fsdp=False)


@full
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_are_one_after_20_steps(server, name, fsdp):
    compare_processes(server, server.jobs[name].but(steps=20), fsdp)


def compare_processes(server, job: trials.Job, fsdp: bool) -> None:
    """Five rows a step, and one row to validate on, do not divide by two."""
    job = job.but(dropout=0.0, lora_dropout=0.0, lr=1e-3, save_every=0, batch_size=5, val_rows=1)
    one, two = server.new_folder(), server.new_folder()
    assert server.run(job, one) == 0, tail(one)
    assert run_in_processes(server, job, two, fsdp=fsdp) == [0, 0], tail(two)
    assert "FutureWarning" not in trials.log_of(two).read_text()
    assert_agree(one, two)


@full
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", JOBS)
def test_what_two_processes_began_one_ends(server, name, fsdp):
    from transformers import AutoModelForCausalLM

    import model

    job = server.jobs[name].but(dropout=0.0, lora_dropout=0.0, lr=1e-3, fsdp=fsdp)
    one, two = server.new_folder(), server.new_folder()
    assert server.run(job, one) == 0, tail(one)
    port = free_port()
    processes = [server.begin(job, two, partial(as_rank, rank, 2, port)) for rank in range(2)]
    wait_until(lambda: (two / "checkpoints" / "step-00000004").is_dir())
    for process in processes:
        process.kill()
        process.join()
    assert_resumes_within(server, job, one, two)
    model.GPT.from_pretrained(two)
    AutoModelForCausalLM.from_pretrained(two)


def assert_resumes_within(server, job, one: Path, two: Path) -> None:
    assert server.run(job, two) == 0, tail(two)
    assert "resumed" in trials.log_of(two).read_text()
    assert_agree(one, two)


class Torchrun:
    """`torchrun --nproc-per-node 2 SCRIPT ...` as a person starts it; or another launcher, or one of two machines."""

    def __init__(self, server, job: trials.Job, folder: Path, *, restarts: int = 0, launcher: Sequence[str] = (
            "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), environ: dict | None = None, **more):
        cfg = job.config(folder, **more)
        flags = []
        for key, value in vars(cfg).items():
            if value != getattr(type(cfg)(), key):
                flag = f"--{key.replace('_', '-')}"
                flags += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else [value])]
        self.log = trials.log_of(folder)
        self.out = open(self.log, "a")  # noqa: SIM115
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"} | (environ or {})
        self.process = subprocess.Popen(
            [sys.executable, "-m", *launcher, *["--max-restarts", str(restarts)] * (restarts > 0), f"{job.script}.py",
             *flags], cwd=trials.ROOT, stdout=self.out, stderr=self.out, env=environment)

    def workers(self) -> list[int]:
        return [*map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())]

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        for pid in self.workers():
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"no rank {rank}")

    def wait(self, seconds: float = 240) -> int:
        code = self.process.wait(seconds)
        self.out.close()
        return code


@full
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", ["sft full", "dpo lora"])
def test_a_rank_that_dies_and_a_run_that_restarts(server, name, fsdp, record_property):
    """Killed: the job ends within 60 s. With --max-restarts, it goes on by itself, and the end is that of a run that
    nothing happened to. SIGTERM: saved, stopped, and the same command goes on."""
    job = server.jobs[name].but(steps=30, eval_every=10, fsdp=fsdp)
    folders = [server.new_folder() for _ in range(4)]
    assert Torchrun(server, job, folders[0]).wait() == 0, tail(folders[0])
    wanted = outcome(folders[0])

    dead = Torchrun(server, job, folders[1])
    wait_until(lambda: (folders[1] / "checkpoints" / "step-00000004").is_dir())
    os.kill(dead.worker(1), signal.SIGKILL)
    began = time.monotonic()
    assert dead.wait(60) != 0
    report(record_property, f"seconds until {name} ended after a rank was killed", round(time.monotonic() - began))
    assert Torchrun(server, job, folders[1]).wait() == 0, tail(folders[1])
    assert differences(outcome(folders[1]), wanted) == []

    restarted = Torchrun(server, job, folders[2], restarts=3, overwrite=True)
    for rank, step in ((0, 6), (1, 14)):
        wait_until(lambda step=step: max(verified(folders[2]), default=0) >= step, 120)
        os.kill(restarted.worker(rank), signal.SIGKILL)
        time.sleep(1)
    assert restarted.wait() == 0, tail(folders[2])
    assert trials.log_of(folders[2]).read_text().count("resumed ") == 2
    assert differences(outcome(folders[2]), wanted) == []

    stopped = Torchrun(server, job, folders[3])
    wait_until(lambda: (folders[3] / "checkpoints" / "step-00000005").is_dir())
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait(60) != 0
    step = int(re.search(r"stopped after step (\d+)", trials.log_of(folders[3]).read_text())[1])
    assert verified(folders[3])[0] == step
    assert Torchrun(server, job, folders[3]).wait() == 0, tail(folders[3])
    assert differences(outcome(folders[3]), wanted) == []


def machine(server, job: trials.Job, folder: Path, port: int) -> Torchrun:
    """The README's command for one of two machines, here both at the loopback address.

    Without the variable, rank 0 tells its address to the machines of the first round only (torch 2.15).
    """
    return Torchrun(server, job, folder, restarts=3, environ={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, launcher=(
        "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint",
        f"localhost:{port}"))


@full
def test_a_machine_that_dies_and_comes_back(server, record_property):
    """Of two torchruns one is killed with its process: the other waits for its successor, and both go on as if
    nothing had happened."""
    job, port = server.jobs["sft full"].but(steps=30, eval_every=10), free_port()
    one, two = server.new_folder(), server.new_folder()
    assert Torchrun(server, job, one).wait() == 0, tail(one)
    first = machine(server, job, two, port)
    wait_until(lambda: listens(port), 120)  # the first one is the meeting place
    dead = machine(server, job, two, port)
    wait_until(lambda: (two / "checkpoints" / "step-00000004").is_dir(), 120)
    for pid in [*dead.workers(), dead.process.pid]:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    second = machine(server, job, two, port)
    assert (first.wait(), second.wait(), dead.wait()) == (0, 0, -signal.SIGKILL), tail(two)
    report(record_property, "seconds from a machine's death to the end on both", round(time.monotonic() - began))
    assert trials.log_of(two).read_text().count("resumed ") == 1
    assert differences(outcome(two), outcome(one)) == []


@full
def test_accelerate_launches_it_too(server):
    pytest.importorskip("accelerate")
    job = server.jobs["sft full"].but(steps=5)
    one, two = server.new_folder(), server.new_folder()
    assert Torchrun(server, job, one).wait() == 0, tail(one)
    accelerate = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    assert Torchrun(server, job, two, launcher=accelerate).wait() == 0, tail(two)
    assert differences(outcome(two), outcome(one)) == [] and "2 processes" in trials.log_of(two).read_text()
