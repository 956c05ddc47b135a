"""Pictures of runs for the README (losses.py draws that of the losses).

A run's curves; the answers of two models side by side, and why one of them said that.

    uv run tests/benchmarks/pictures.py --models runs/sft runs/dpo --out pictures
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import chat
import train
from data import run_script


@dataclass
class Config:
    """Write curves.png, and compare.svg and why.svg as a terminal shows them."""

    models: tuple[str, str] = ("runs/sft", "runs/dpo")  # what answers; the second is the one that is explained
    question: str = "What is a carpenter?"
    seed: int = 0  # of the replies
    width: int = 88  # columns of the terminal
    out: str = "pictures"  # the folder that they go to
    debug: bool = False  # show the traceback of an error


class Page(chat.Screen):
    """A terminal of 256 colours that keeps what it is shown."""

    def __init__(self, width: int):
        super().__init__()
        self.out, self.terminal, self.ansi, self.colour, self.shades = io.StringIO(), True, False, True, True
        self.columns = width

    def width(self) -> int:
        return self.columns


def picture(page: Page, path: Path, title: str) -> None:
    """What has been shown since the last picture, as SVG."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=io.StringIO(), record=True, width=page.width(), force_terminal=True, color_system="256")
    console.print(Text.from_ansi(page.out.getvalue().strip()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(console.export_svg(title=title), encoding="utf-8")
    page.out.seek(0)
    page.out.truncate()
    print(path)


def main(cfg: Config) -> None:
    page, folder = Page(cfg.width), Path(cfg.out)
    session = chat.Session(chat.Config(compare=cfg.models, seed=cfg.seed), page, list(cfg.models))
    for member in session.chats:
        member.loading.result()
    page.say("> " + cfg.question, "you")
    session.ask(cfg.question)
    picture(page, folder / "compare.svg", f"uv run chat.py --compare {' '.join(cfg.models)}")
    chat.answering(session, session.chats[1:])
    page.say("> /why", "you")
    chat.COMMANDS["/why"](session, "")
    picture(page, folder / "why.svg", f"uv run chat.py --model {cfg.models[1]}")
    train.plot_curves([Path(cfg.models[1])], folder / "curves.png")
    print(folder / "curves.png")


if __name__ == "__main__":
    run_script(main, Config)
