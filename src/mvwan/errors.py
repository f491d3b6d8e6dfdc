"""The exceptions that users see, and how their messages list and hint at names.

Knows nothing of what went wrong; every room words its own message: what was given, what is allowed, what to do.
"""

import difflib
from collections.abc import Iterable

_LONGEST_MESSAGE = 2000


class MvwanError(ValueError):
    """A mistake in what the user gave. The command line prints it as one sentence and exits with code 2.

    Its message is one line of printable characters, whatever names from files it quotes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_one_line(str(message)))


def _one_line(text: str) -> str:
    """`text` with what a terminal would act upon escaped, and the middle of an endless name left out."""
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE // 2]} … {text[-_LONGEST_MESSAGE // 2 :]}"
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)


class PreemptedError(RuntimeError):
    """Training was asked to stop (SIGTERM), saved and stopped; `--resume` goes on. The command line exits with `EXIT_CODE`."""

    EXIT_CODE = 75
    """EX_TEMPFAIL of sysexits.h: try again."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name[:100], list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")
