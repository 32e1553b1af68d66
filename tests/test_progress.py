"""The bar draws what its callback is told, and leaves the terminal alone otherwise."""

import io

import pytest
from rich.console import Console

from qmoe_jax.progress import ProgressBar


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_the_bar_shows_title_step_and_units():
    screen = console(terminal=True)
    with ProgressBar("compressing", "experts", screen) as progress:
        progress(0, 8, "encoder layer 0")
        progress(8, 8, "decoder layer 1")
    drawn = screen.file.getvalue()
    assert "compressing · decoder layer 1" in drawn and "8/8" in drawn and "experts" in drawn


def test_nothing_is_drawn_where_output_is_not_a_terminal():
    screen = console(terminal=False)
    with ProgressBar("compressing", console=screen) as progress:
        progress(0, 8, "encoder layer 0")
    assert screen.file.getvalue().strip() == ""


def test_an_error_ends_the_bar():
    screen = console(terminal=True)
    bar = ProgressBar("compressing", console=screen)
    with pytest.raises(RuntimeError), bar as progress:
        progress(0, 8, "")
        raise RuntimeError
    assert bar._bar.live.is_started is False


class Closed(io.StringIO):
    """A terminal that is closed after its first lines."""

    left = 2

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError
        return super().write(text)


@pytest.mark.parametrize("close", [lambda file: setattr(file, "left", 0), io.StringIO.close])
def test_a_terminal_that_is_closed_ends_the_drawing_only(close):
    screen = Console(file=Closed(), force_terminal=True, width=120)
    file = screen.file
    with ProgressBar("compressing", console=screen) as progress:
        progress(0, 8, "encoder layer 0")
        close(file)
        progress(8, 8, "encoder layer 0")
