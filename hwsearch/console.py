"""What a person sees while hwsearch works: progress bars, notes and tables, always on standard error.

Standard output belongs to results (the tables of a finished verb, or one JSON object under ``--json``). On a terminal a
bar moves; in a log file the same progress is a line every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unicodedata import category

#: Called with (units done, units in all, a few words).
Report = Callable[[float, float, str], None]

_LOG_EVERY_S = 10.0


class Console:
    """One conversation with the user. ``json`` keeps standard output free for the one object printed at the end."""

    def __init__(self, *, json: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.json = json
        # A pipe has no width of its own; 100 columns keep a table's row on one line of a log.
        width = None if sys.stderr.isatty() else 100
        self._errors = RichConsole(stderr=True, highlight=False, soft_wrap=True, width=width)
        self._output = RichConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

    def say(self, text: str) -> None:
        """A line of progress, on standard error."""
        self._errors.print(plain_text(text), markup=False)

    def step(self, text: str) -> None:
        """The title of a stage of a longer job."""
        self._errors.print(f"[bold]{_escaped(text)}[/bold]")

    def show(self, renderable: Any) -> None:
        """A part of the result, on standard output; under ``--json`` it goes to standard error."""
        # A text is shown as it is: names and paths may hold brackets, which are no markup of ours.
        shown = plain_text(renderable) if isinstance(renderable, str) else renderable
        (self._errors if self.json else self._output).print(shown, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of text; all columns but the first are numbers and stand to the right."""
        from rich.table import Table

        table = Table(title=_escaped(title), title_justify="left", title_style="bold")
        for at, column in enumerate(columns):
            table.add_column(_escaped(column), justify="left" if at == 0 else "right", no_wrap=at == 0)
        for row in rows:
            table.add_row(*(_escaped(cell) for cell in row))
        self.show(table)

    @contextmanager
    def bar(self, title: str) -> Iterator[Report]:
        """Progress of one long piece of work, as a callback."""
        if self._errors.is_terminal:
            with self._moving_bar(title) as report:
                yield report
        else:
            yield self._log_lines(title)

    @contextmanager
    def _moving_bar(self, title: str) -> Iterator[Report]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
        )
        with Progress(*columns, console=self._errors) as progress:
            task = progress.add_task(_escaped(title), total=None, words="")

            def report(done: float, total: float, words: str) -> None:
                progress.update(task, completed=min(done, total or done), total=total or None, words=_escaped(words))

            yield report

    def _log_lines(self, title: str) -> Report:
        last_s, closed = time.monotonic() - _LOG_EVERY_S, False

        def report(done: float, total: float, words: str) -> None:
            nonlocal last_s, closed
            now = time.monotonic()
            finished = bool(total) and done >= total
            if now - last_s < _LOG_EVERY_S and not (finished and not closed):
                return
            last_s, closed = now, finished
            share = f"{100 * min(done / total, 1.0):3.0f} %" if total else f"{done:g}"
            self.say(f"  {title}: {share}  {words}".rstrip())

        return report


def plain_text(text: str) -> str:
    """A text of a file from elsewhere as a terminal may get it: what would move its cursor is spelt out.

    Example:
        >>> plain_text("net\\x1b[2J")
        'net\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    control = ("Cc", "Cs")
    return "".join(c if c in "\n\t" or category(c) not in control else ascii(c)[1:-1] for c in text)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(plain_text(text))
