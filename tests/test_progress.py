"""The bar draws what its callback is told; without a terminal it writes a line per minute."""

import io

import pytest
from rich.console import Console

from qmoe_jax.progress import ProgressBar, ProgressMeter
from tests.helpers.clock import Clock


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


def test_without_a_terminal_there_is_one_line_per_minute():
    log, clock = console(terminal=False), Clock()
    with ProgressBar("compressing", "work", log, clock=clock) as progress:
        for second in range(200):
            clock.now = float(second)
            progress(second, 1000, "encoder layer 0, experts")
    lines = log.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(
        "compressing · encoder layer 0, experts: 6.0 %, 6.0 %/min, elapsed 0:01:00, left 0:15:40, memory "
    )
    assert lines[2].startswith("compressing · encoder layer 0, experts: 18.0 %")


def test_work_is_shown_in_percent():
    screen = console(terminal=True)
    with ProgressBar("compressing", "work", screen) as progress:
        progress(0, 1_000_000, "encoder layer 0")
        progress(625_000, 1_000_000, "encoder layer 0")
    assert "62.5 %" in screen.file.getvalue()


def test_time_left_runs_on_between_calls():
    clock = Clock()
    meter = ProgressMeter("compressing", "experts", clock)
    assert meter.seconds_left is None
    meter.update(0, 8, "reading")
    clock.now = 100.0  # nothing of this was for the first unit
    meter.update(0, 8, "")
    clock.now = 110.0
    meter.update(2, 8, "")
    assert (meter.seconds_left, meter.rate, meter.seconds) == (30.0, "0.2 experts/s", 110.0)
    clock.now = 125.0
    assert meter.seconds_left == 15.0
    clock.now = 160.0
    assert meter.seconds_left == 0.0


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
