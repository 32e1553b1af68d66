"""A clock for tests."""


class Clock:
    """A clock that is set by hand: call it for the seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now
