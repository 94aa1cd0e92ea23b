"""A repository's code as it is shown to who decides about it: nothing in it may hide, whatever it is shown on."""

from __future__ import annotations

import unicodedata
from importlib.util import decode_source
from typing import Any

from .code_files import CodeFile, RepositoryCode

# Control, format (they turn the order of text around), private use, surrogates, and line separators.
_HIDING = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")


def shown_text(text: str) -> str:
    """`text` with every character that a terminal or a page would act on, or not show, as `\\x..` or `\\u....`.

    Line feeds and tabs stay.
    """
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _HIDING:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown_file(file: CodeFile) -> str:
    """The text of a file, decoded as Python does it; where that fails, what can be read of it."""
    try:
        text = decode_source(file.content)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        text = file.content.decode("utf-8", "backslashreplace")
    return shown_text(text.removeprefix("\ufeff"))


def shown_code(code: RepositoryCode) -> dict[str, Any]:
    """Place, commit, digest, and of each file its path, bytes, digest and text, for a page."""
    return {
        "place": shown_text(code.place),
        "commit": code.commit,
        "digest": code.digest,
        "files": [
            {"path": shown_text(one.path), "size": len(one.content), "digest": one.digest, "text": shown_file(one)}
            for one in code.files
        ],
    }
