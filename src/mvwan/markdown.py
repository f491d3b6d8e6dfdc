"""Tables and texts as Markdown, and numbers of things in words. Knows nothing of what they say."""

import re
from collections.abc import Collection, Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table without a line break at its end. The columns at the places `left` hold words; all others hold numbers and stand right."""
    rule = ["---" if place in left else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def escaped(text: str) -> str:
    """`text` on one line, with the signs that Markdown would act upon escaped."""
    return re.sub(r"([\\|*<>`\[])", r"\\\1", " ".join(text.split()))


def count(amount: int, noun: str) -> str:
    """`1 window`, `3 windows`."""
    return f"{amount} {noun}{'' if amount == 1 else 's'}"
