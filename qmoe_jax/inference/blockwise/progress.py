"""How far a walk over a model has come: events of layers and experts, shown as a bar or not at all."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Watcher(Protocol):
    """What a walk (a compression, a comparison) tells about itself."""

    def begin(self, layers: int, experts: int) -> None:
        """The work: layers in both stacks, experts to go through in all of them."""

    def layer(self, stack: str, layer: int, tokens: int) -> None:
        """A layer begins; `tokens` will be run through it."""

    def experts(self, count: int) -> None:
        """Experts are finished, and their tokens run."""

    def end(self) -> None:
        """The end, or an error."""


class Silent:
    """Shows nothing."""

    def begin(self, layers: int, experts: int) -> None:
        """Nothing."""

    def layer(self, stack: str, layer: int, tokens: int) -> None:
        """Nothing."""

    def experts(self, count: int) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class ProgressBar:
    """A bar on the terminal: layer, experts done, tokens a second, time left. Draws nothing where output is piped."""

    def __init__(self, title: str = "compressing", console: Console | None = None):
        self.title, console = title, console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("experts"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.layers = self.layers_begun = self.tokens = 0

    def begin(self, layers: int, experts: int) -> None:
        """Start the bar."""
        self.layers = layers
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=experts, rate="")

    def layer(self, stack: str, layer: int, tokens: int) -> None:
        """Name the layer; the rate is that of the layers before it."""
        elapsed = self.progress.tasks[0].elapsed
        rate = f"{self.tokens / elapsed:,.0f} tokens/s" if elapsed and self.tokens else ""
        self.layers_begun, self.tokens = self.layers_begun + 1, self.tokens + tokens
        description = f"{self.title} · {stack} {layer} ({self.layers_begun}/{self.layers} layers)"
        self.progress.update(self.task, description=description, rate=rate)

    def experts(self, count: int) -> None:
        """Advance."""
        self.progress.advance(self.task, count)

    def end(self) -> None:
        """Leave the finished bar."""
        self.progress.stop()
