"""How a run's progress looks in a terminal, and in a log file."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from spikeloom.train.run import Run

Json = dict[str, Any]


class Quiet:
    """Says nothing but warnings."""

    def start(self, run: Run, steps: int, done: int) -> None:
        pass

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        pass

    def epoch(self, record: Json) -> None:
        pass

    def work(self, what: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        print(f"spikeloom: warning: {message}", file=sys.stderr)


class Shown:
    """A progress bar on standard error, and a line an epoch; without a terminal, the lines alone."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._epochs = 0

    def start(self, run: Run, steps: int, done: int) -> None:
        """Begins a run's display; `done` of its steps are behind it."""
        self.close()
        t = run.settings.train
        self._epochs = t.epochs
        resumed = f", continued after {done} of {steps} steps" if done else ""
        self._console.print(
            f"{run.title} ({run.budget}): {run.settings.model.name} on {run.settings.data.name}, "
            f"{t.epochs} epochs of {steps // t.epochs} steps, {t.precision}{resumed}\nrun: {run.folder}",
            markup=False,
        )
        for change in run.changes_in_words():
            self._console.print(f"changed {change}", markup=False)
        self._begin(steps, done, "")

    def work(self, what: str, total: int) -> None:
        """Begins the display of work other than training."""
        self.close()
        self._epochs = 0
        self._begin(total, 0, what)

    def advance(self, count: int) -> None:
        """Reports progress of `work`."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def _begin(self, total: int, done: int, state: str) -> None:
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done, state=state)
        self._bar.start()

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        """One optimiser step is done."""
        if self._bar is not None:
            state = f"loss {loss:.4f}" if math.isnan(accuracy) else f"loss {loss:.4f}  accuracy {accuracy:.2f} %"
            self._bar.update(self._task, advance=1, description=f"epoch {epoch}/{self._epochs}", state=state)

    def epoch(self, record: Json) -> None:
        """An epoch is done and evaluated."""

        def part(name: str) -> str:
            accuracy = record[f"{name}_accuracy"]
            shown = "" if accuracy is None else f" accuracy {accuracy:6.2f} %"
            return f"{name} loss {record[f'{name}_loss']:.4f}{shown}"

        self._console.print(
            f"epoch {record['epoch']:3d}/{self._epochs}  {part('train')}   {part('test')}   {record['seconds']:.0f} s",
            markup=False,
        )

    def note(self, message: str) -> None:
        """Something that was done."""
        self._console.print(message, markup=False)

    def warn(self, message: str) -> None:
        """Something the user should know."""
        self._console.print(f"spikeloom: warning: {message}", style="yellow", markup=False)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def is_main_process() -> bool:
    """Whether this one speaks, of those that a launcher started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def show_progress() -> Generator[Any]:
    """Progress on standard error, of the main process alone."""
    if not is_main_process():
        yield Quiet()
        return
    shown = Shown()
    try:
        yield shown
    finally:
        shown.close()


@contextlib.contextmanager
def stop_on_signal() -> Generator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end a run at the next step, with a checkpoint; a second one ends it at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
