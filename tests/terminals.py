"""What a script is told of the terminal it runs in."""

import os

import pytest

try:
    import pexpect
except ImportError:  # of pty, on Windows; or it is not installed
    pexpect = None


def need_pexpect() -> None:
    """Skip what needs a pseudo-terminal where there is none, and nothing else."""
    if not pexpect:
        pytest.skip("pseudo-terminals need pexpect, and Unix")


def environment(**more: str) -> dict[str, str]:
    """This process's environment without its own terminal and language, for a terminal of 256 colours."""
    unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "LANG", "LC_ALL", "TERM")
    kept = {k: v for k, v in os.environ.items() if k not in unwanted}
    return kept | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"} | more
