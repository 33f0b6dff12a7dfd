"""The one error type for every user mistake, and the nearest valid name for a mistyped one."""

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest", "one_line"]


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, the nearest valid choice.

    `jpeft.main` prints the message and exits with code 2; library users catch it as a `ValueError`.
    """


def one_line(error: BaseException) -> str:
    """The message of an error, in one line."""
    return " ".join(str(error).split())


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Returns the end of an error message: the closest choices, or all of them when they are few.

    Args:
      name: what the user wrote.
      choices: the valid names.
      n: how many close choices to name at most.

    >>> nearest("lroa", ["lora", "adapter"])
    "did you mean 'lora'?"
    >>> nearest("zzz", ["lora", "adapter"])
    "expected one of 'lora', 'adapter'"
    """
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=n, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    listed = ", ".join(map(repr, choices[:40])) + (", ..." if len(choices) > 40 else "")
    return f"expected one of {listed}"
