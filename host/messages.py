"""What the pack says on a node, in English; pages render the same templates in their own language."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

# A message's values by name; people read them as they are, so numbers come rounded and sizes with their units.
Values = Mapping[str, str | int | float]

_FILE = Path(__file__).resolve().parent.parent / "locales" / "en" / "main.json"
_PLACE = re.compile(r"\{(\w+)\}")


def message_text(message: str, values: Values) -> str:
    """The English text of a message.

    Args:
        message: its id, under `streamblocks.says` in `locales/<language>/main.json`.
        values: for each `{name}` in its template.

    Raises:
        KeyError: there is no such message, or a value is missing.
    """
    return _PLACE.sub(lambda place: str(values[place[1]]), message_templates()[message])


@cache
def message_templates() -> Mapping[str, str]:
    """The English templates, by id."""
    says: dict[str, str] = json.loads(_FILE.read_text(encoding="utf-8"))["streamblocks"]["says"]
    return says
