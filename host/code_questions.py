"""Questions whether code may run, each put to one page once."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from ..stream.code_files import RepositoryCode
from .tokens import is_same

MOST_QUESTIONS = 4
SECONDS_TO_ANSWER = 1800.0


@dataclass
class CodeQuestion:
    """May this code run?

    Attributes:
        code: as it was when its run was refused.
        file: the list that a consent is written to.
        id: names the question in a path.
        token: who has it may see the question.
        asked: when, by the monotonic clock, in seconds.
    """

    code: RepositoryCode
    file: Path
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    asked: float = field(default_factory=time.monotonic)
    _nonce: str | None = field(default=None, repr=False)

    def show(self) -> str:
        """A nonce for one answer; an earlier one is void."""
        self._nonce = secrets.token_urlsafe(32)
        return self._nonce

    def admits(self, token: str) -> bool:
        """Whether `token` is this question's, in a time that says nothing about it."""
        return is_same(token, self.token)

    def takes(self, nonce: str) -> bool:
        """Whether `nonce` is that of the newest showing; each counts for one try."""
        shown, self._nonce = self._nonce, None
        return shown is not None and is_same(nonce, shown)


class CodeQuestions:
    """The newest questions that are neither answered nor too old. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._questions: dict[str, CodeQuestion] = {}

    def begin(self, question: CodeQuestion) -> None:
        """List a question; the same question asked before, and the oldest of too many, are forgotten."""
        with self._lock:
            others = [one for one in self._questions.values() if one.code != question.code]
            self._questions = {one.id: one for one in [*others, question][-MOST_QUESTIONS:]}

    def find(self, name: str) -> CodeQuestion | None:
        """The question of an id; None where there is none any more."""
        with self._lock:
            found = self._questions.get(name)
        return found if found is not None and time.monotonic() - found.asked < SECONDS_TO_ANSWER else None

    def end(self, question: CodeQuestion) -> None:
        """Forget a question."""
        with self._lock:
            self._questions.pop(question.id, None)
