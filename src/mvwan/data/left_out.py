"""What a run goes without because it is damaged, with the reason, so that nothing is left out in silence. Knows no format."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mvwan.errors import MvwanError


@dataclass(frozen=True)
class LeftOut:
    """An episode that cannot be read, or a window one of whose pictures cannot be decoded."""

    name: str
    """The episode, or the sample id of the window."""
    reason: str


@contextmanager
def leaving_out(name: str, left_out: list[LeftOut] | None) -> Iterator[None]:
    """A block that reads the episode `name`: a `MvwanError` in it adds to `left_out` instead; None: it is raised."""
    try:
        yield
    except MvwanError as error:
        if left_out is None:
            raise
        left_out.append(LeftOut(name=name, reason=str(error)))
