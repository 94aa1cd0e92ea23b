"""Prompts as JSON, for those that the lines of a track cannot say plainly: line breaks, `||`, spaces around them.

"two\\nlines"                        a prompt
[["a\\ncat", 0.7], ["a dog", 0.3]]    several prompts with weights
"""

from __future__ import annotations

import json
import math
import re

from .block_prompt import shares_of

Parts = tuple[tuple[str, float], ...]

# A letter takes up to 25 bytes as it is read, and no prompt is as long.
_MOST_LETTERS = 1_000_000
# Shares that were written are read as they are; dividing them by their sum again would move their last digit.
_ROUNDING = 1e-9
# What ends a line for `str.splitlines`, what is no text in UTF-8, and what ComfyUI's page takes for its own: `{a|b}`,
# `//` and `/*` comments, and a backslash before a brace, a bar or the end of the text.
_ESCAPED = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff{}]|/(?=[/*])|(?<=\\)\|")
_CHANGED_BY_THE_PAGE = re.compile(r"[{}]|/[/*]|\\(?:\||$)")


def read_exact(text: str) -> Parts | None:
    """The prompts of a JSON text, with their shares; None where it is something else."""
    if len(text) > _MOST_LETTERS:
        return None
    try:
        read = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return None
    if isinstance(read, str):
        return ((read, 1.0),)
    if not isinstance(read, list) or not all(_is_weighted(part) for part in read):
        return None
    weighted = [(prompt, weight) for prompt, weight in read]
    whole = sum(weight for _, weight in weighted)
    if not math.isfinite(whole) or whole <= 0:
        return None
    once = len({prompt for prompt, _ in weighted}) == len(weighted)
    if once and abs(whole - 1.0) < _ROUNDING and all(weight for _, weight in weighted):
        return tuple(weighted)
    return shares_of(weighted)


def write_exact(parts: Parts) -> str:
    """JSON text that `read_exact` reads as `parts`, in one line that ComfyUI's page leaves as it is."""
    value = parts[0][0] if len(parts) == 1 else parts
    text = json.dumps(value, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def is_changed_by_the_page(text: str) -> bool:
    """Whether ComfyUI's page would read a choice or a comment into `text` when it queues a prompt."""
    return _CHANGED_BY_THE_PAGE.search(text) is not None


def _is_weighted(part: object) -> bool:
    match part:
        case [str(), float(weight)]:
            return math.isfinite(weight) and weight >= 0
        case _:
            return False
