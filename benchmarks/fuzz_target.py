"""What a target of `fuzz.py` is, and when an error is clear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_inputs import Write

from streamblocks.checkpoints.checkpoint_error import CheckpointError

# Longer messages are no sentences.
_LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        name: for reports.
        share: how often it is called beside the others.
        write: makes an input in a folder of its own.
        call: reads it from there.
        is_clear: whether an error says in one sentence what is wrong and where.
        prepare: what lies beside the inputs in the folder.
    """

    name: str
    share: int
    write: Write
    call: Callable[[Path], object]
    is_clear: Callable[[Exception, Path], bool]
    prepare: Callable[[Path], None] = field(default=lambda folder: None)


def names_its_file(error: Exception, folder: Path) -> bool:
    """Whether `error` is the pack's own, in one line, and names a file in `folder`."""
    text = str(error)
    return isinstance(error, CheckpointError) and str(folder) in text and is_sentence(text)


def names(*words: str, kinds: tuple[type[Exception], ...] = (ValueError,)) -> Callable[[Exception, Path], bool]:
    """Whether an error is exactly of one of `kinds`, in one line, and has one of `words` or the folder in it."""

    def is_clear(error: Exception, folder: Path) -> bool:
        text = str(error)
        named = any(word in text for word in (*words, str(folder)))
        return type(error) in kinds and named and is_sentence(text)

    return is_clear


names_its_line = names("the track", "interpolation is", "state rule", "state_rules")


def is_sentence(text: str) -> bool:
    """Whether it is short, printable, and ends with a full stop."""
    return len(text) < _LONGEST_MESSAGE and text.endswith(".") and text.replace("\u2028", "").isprintable()
