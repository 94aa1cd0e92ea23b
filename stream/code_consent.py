"""Whether a repository's own Python code may run: a list in the user's own folder says so, and no workflow can."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .code_files import RepositoryCode

ALLOW_TOOL = Path(__file__).absolute().parent.parent / "tools" / "allow_code.py"
LIST_NAME = "allowed_code.json"
_VERSION = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Consent:
    """The user allowed this code.

    Attributes:
        place: a hub id, or the absolute path of a folder.
        commit: of a hub repository; None for a folder.
        digest: of its files, see `RepositoryCode.digest`.
    """

    place: str
    commit: str | None
    digest: str

    @classmethod
    def to(cls, code: RepositoryCode) -> Consent:
        """Consent to exactly this code."""
        return cls(code.place, code.commit, code.digest)


@dataclass(frozen=True)
class AllowedCode:
    """What the user's list allows.

    Attributes:
        file: the list; None where there is none, as outside of ComfyUI.
        consents: what stands in it.
        problem: why it could not be read, a part of a sentence; else empty.
    """

    file: Path | None = None
    consents: frozenset[Consent] = field(default=frozenset())
    problem: str = ""

    def admits(self, code: RepositoryCode) -> bool:
        """Whether exactly this code, at this place, is allowed."""
        return Consent.to(code) in self.consents


NOTHING_ALLOWED = AllowedCode()


class CodeNotAllowedError(PermissionError):
    """A repository's own code would have run, and the user has not allowed it.

    Args:
        sentence: for people.
        code: what would have run.
    """

    # See CheckpointError.
    __module__ = "builtins"

    def __init__(self, sentence: str, code: RepositoryCode) -> None:
        super().__init__(sentence)
        self.code = code


def check_code_allowed(code: RepositoryCode, allowed: AllowedCode) -> None:
    """Raise unless the user has allowed exactly this code.

    Raises:
        ValueError: the code is on the hub, and no commit is pinned; see `check_pinned`.
        CodeNotAllowedError: it is not allowed; the sentence says how to do so.
    """
    if allowed.admits(code):
        return
    count = len(code.python_files)
    reason = f" ({allowed.problem})" if allowed.problem else ""
    raise CodeNotAllowedError(
        f"model {code.place!r} brings Python code of its own ({count} file{'s' * (count != 1)}, digest "
        f"{code.digest[:12]}), which runs only once you have allowed it on this machine{reason}: read it with "
        f"{allow_command(code, allowed.file)} and allow it there, or answer the question on the page, and run again; "
        "or choose the built-in blocks.",
        code,
    )


def check_pinned(model: str, revision: str | None) -> None:
    """Raise ValueError unless `revision` is a full commit: what a name stands for on the hub can change."""
    if not _COMMIT.fullmatch(revision or ""):
        raise ValueError(
            f"revision is {revision!r}: {model} brings code of its own, which runs only from a pinned commit; give the "
            "40-digit commit that you have read."
        )


def allow_command(code: RepositoryCode, file: Path | None) -> str:
    """The command line that shows the code and asks, to be copied."""
    words = [sys.executable, str(ALLOW_TOOL), code.place]
    words += [] if code.commit is None else ["--commit", code.commit]
    words += [] if file is None else ["--list", str(file)]
    # A folder's name comes from who made it, and must stay one word.
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def read_allowed_code(file: Path) -> AllowedCode:
    """What the list in `file` allows; nothing if it is absent or cannot be read, with the reason."""
    try:
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return AllowedCode(file)
    except OSError as error:
        return AllowedCode(file, problem=f"the list {file} cannot be read: {error.strerror}")
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError("it is longer than a MiB")
        return AllowedCode(file, frozenset(_consents(json.loads(content))))
    except (ValueError, RecursionError) as error:
        return AllowedCode(file, problem=f"the list {file} cannot be used: {error}")


def _consents(listed: object) -> list[Consent]:
    entries = listed.get("allowed") if isinstance(listed, dict) and listed.get("version") == _VERSION else None
    if not isinstance(entries, list):
        raise ValueError(f"it is not of version {_VERSION}, with a list called allowed")
    return [_consent(entry) for entry in entries]


def _consent(entry: object) -> Consent:
    if isinstance(entry, dict):
        place, commit, digest = (entry.get(name) for name in ("place", "commit", "digest"))
        if isinstance(place, str) and isinstance(digest, str) and (commit is None or isinstance(commit, str)):
            return Consent(place, commit, digest)
    raise ValueError("an entry has no place, commit and digest")


def allow_code(file: Path, code: RepositoryCode) -> None:
    """Add consent to exactly this code to the list in `file`; other consents to its place stay.

    Raises:
        ValueError: the list is there and cannot be used; nothing is changed.
        OSError: it cannot be written; nothing is changed.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    named: dict[str, object] = {"place": code.place, "commit": code.commit, "digest": code.digest, "allowed": now}
    entry = named | {"files": {one.path: one.digest for one in code.files}}
    _write(file, [*(each for each in _entries(file) if _consent(each) != Consent.to(code)), entry])


def forbid_place(file: Path, place: str) -> int:
    """Take all consents to a place from the list, and return how many there were; raises as `allow_code`."""
    entries = _entries(file)
    kept = [each for each in entries if _consent(each).place != place]
    if len(kept) < len(entries):
        _write(file, kept)
    return len(entries) - len(kept)


def _entries(file: Path) -> list[object]:
    problem = read_allowed_code(file).problem
    if problem:
        raise ValueError(f"{problem}; put it away, or mend it.")
    entries: list[object] = json.loads(file.read_bytes())["allowed"] if file.exists() else []
    return entries


def _write(file: Path, entries: list[object]) -> None:
    """Write beside and rename, so that nobody reads half a list. Only its owner may read it."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = json.dumps({"version": _VERSION, "allowed": entries}, indent=2) + "\n"
    handle, beside = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        Path(beside).replace(file)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
