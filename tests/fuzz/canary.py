"""An object that must never be called: pickles of the fuzz run ask for it."""

calls: list[str] = []


def sing() -> None:
    """Tell that a pickle was executed."""
    calls.append("sing")
