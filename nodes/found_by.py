"""Words that the page's node search finds a node by, besides its name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io


def search_aliases(*words: str) -> dict[str, Any]:
    """The argument of a schema that names these words; none on a ComfyUI that does not know it yet."""
    return {"search_aliases": list(words)} if "search_aliases" in {field.name for field in fields(io.Schema)} else {}
