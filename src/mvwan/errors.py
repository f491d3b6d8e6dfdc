"""The exceptions that users see, and the nearest-name hint in their messages.

Knows nothing of what went wrong; every room words its own message: what was given, what is allowed, what to do.
"""

import difflib
from collections.abc import Iterable


class MvwanError(ValueError):
    """A mistake in what the user gave. The command line prints it as one sentence and exits with code 2."""


class PreemptedError(RuntimeError):
    """Training was asked to stop (SIGTERM), saved and stopped; `--resume` goes on. The command line exits with `EXIT_CODE`."""

    EXIT_CODE = 75
    """EX_TEMPFAIL of sysexits.h: try again."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
