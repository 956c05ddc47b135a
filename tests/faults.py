"""Faults put into the save of a checkpoint, one at a time, at every place where it touches the disk.

`SavePoint` is a run that stands before a save. Each trial is a fork of it in a copy of its folder, so that a trial
costs a fork, a copy and a save. Faults come in two ways: from inside, at each of Python's audit events for files, each
fsync and each safetensors file; and with strace from outside, at each system call.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import trials

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}


# ---- from inside: context managers around a save, at its n-th event -------------------------------


def count(n: int = 0):
    """Print the events."""
    return _at_events(lambda name, i: print(name))


def die(n: int):
    return _at_events(lambda name, i: os.kill(os.getpid(), signal.SIGKILL) if i == n else None)


def fail(n: int, number: int):
    def act(name: str, i: int) -> None:
        if i == n:
            raise OSError(number, os.strerror(number))
    return _at_events(act)


@contextmanager
def _at_events(act: Callable[[str, int], None]):
    """act(name, number) at every event from here on, for good: a process has to be spent on it."""
    import safetensors.torch

    numbers, fsync, save_file = itertools.count(), os.fsync, safetensors.torch.save_file

    def event(name: str) -> None:
        act(name, next(numbers))

    def broken_save_file(tensors, path, *more) -> None:
        try:
            event("save_file")
        except OSError as error:
            Path(path).write_bytes(b"the first half")
            raise safetensors.SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
        save_file(tensors, path, *more)

    os.fsync = lambda handle: (event("os.fsync"), fsync(handle))
    safetensors.torch.save_file = broken_save_file
    sys.addaudithook(lambda name, args: event(name) if name in EVENTS else None)
    yield


# ---- the run that is broken ----------------------------------------------------------------------


class SavePoint:
    """A run of `job` that stands before its save of `step`."""

    def __init__(self, server: trials.Server, job: trials.Job, step: int):
        self.server, self.job = server, job
        self.home = server.new_folder()
        self.home.mkdir()
        self.lock = threading.Lock()
        self.line, theirs = server.context.Pipe()
        self.process = server.start(_stand, job, str(self.home), step, theirs, log=trials.log_of(self.home))
        theirs.close()
        assert self.line.recv() == "standing"

    def close(self) -> None:
        self.line.send(None)
        self.process.join()

    def fork(self, how: Callable, *args) -> tuple[str, int, Path]:
        """Save once under `with how(*args)`: (what was printed, exit code, the run's folder afterwards)."""
        with self.lock:
            home = self._copy()
            self.line.send((how, args, str(home), False))
            self.line.recv()
            return self._result(home)

    def traced(self, *strace: str) -> tuple[str, int, Path]:
        """The same under strace with these -e expressions."""
        with self.lock:
            home = self._copy()
            self.line.send((nullcontext, (), str(home), True))
            pid = self.line.recv()
            expressions = [word for expression in strace for word in ("-e", expression)]
            with subprocess.Popen(["strace", "-p", str(pid), "-o", home / "calls", *expressions],
                                  stderr=subprocess.PIPE, text=True) as tracer:
                assert "attached" in tracer.stderr.readline()
                self.line.send("go")
                result = self._result(home)
                tracer.stderr.read()
            return result

    def system_calls(self) -> list[str]:
        """The names of all system calls of the save, in order."""
        _, status, folder = self.traced("trace=all")
        assert status == 0
        lines = (folder.parent / "calls").read_text().splitlines()
        shutil.rmtree(folder.parent)
        return [line.partition("(")[0] for line in lines if line[:1].isalpha() and "(" in line][1:]

    def _copy(self) -> Path:
        home = self.server.new_folder()
        shutil.copytree(self.home, home)
        return home

    def _result(self, home: Path) -> tuple[str, int, Path]:
        status = self.line.recv()
        return (home / "said").read_text(), status, home / "run"


def _stand(job: trials.Job, home: str, step: int, line) -> None:
    import train

    save = train.save_checkpoint

    def stand(gpt, optimizer, state, cfg, run) -> None:
        if state.step == step:
            line.send("standing")
            while order := line.recv():
                _fork(line, *order, partial_save=lambda: save(gpt, optimizer, state, cfg, run))
            os._exit(0)
        save(gpt, optimizer, state, cfg, run)

    train.save_checkpoint = stand
    os.chdir(home)
    trials._run(job, "run", None, {})


def _fork(line, how: Callable, args: tuple, home: str, held: bool, partial_save: Callable) -> None:
    wait, go = os.pipe()
    prepared, ready = os.pipe()
    pid = os.fork()
    if not pid:
        os.chdir(home)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 2
        try:
            os.write(ready, b"!")
            if held:
                os.read(wait, 1)
            with how(*args):
                partial_save()
            code = 0
        except OSError as error:
            print(error)
            code = 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    os.read(prepared, 1)  # only the save is to be traced
    line.send(pid)
    if held and line.recv():
        os.write(go, b"!")
    _, status = os.waitpid(pid, 0)
    for end in (wait, go, prepared, ready):
        os.close(end)
    line.send(os.waitstatus_to_exitcode(status))


def strace_works() -> bool:
    if not shutil.which("strace"):
        return False
    with subprocess.Popen(["sleep", "10"]) as sleeper:
        tracer = subprocess.Popen(["strace", "-p", str(sleeper.pid)], stderr=subprocess.PIPE, text=True)
        attached = "attached" in tracer.stderr.readline()
        tracer.terminate()
        tracer.wait()
        sleeper.kill()
    return attached
