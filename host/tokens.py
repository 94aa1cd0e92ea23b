"""Secrets that a page shows."""

from __future__ import annotations

import hmac


def is_same(shown: str, kept: str) -> bool:
    """Whether two secrets are the same, in a time that says nothing about them."""
    return hmac.compare_digest(shown.encode("utf-8", "replace"), kept.encode())
