"""What the state said of prompts before a block, so that the block can be begun again with another one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from .block_prompt import BlockPrompt

KEYS_ARE_STALE = "keys_are_stale"
# What a new prompt changes in the state before the pipeline is called.
_OF_PROMPTS = ("prompt_embeds", "encoded_prompt", "prompt_tokens_cut", KEYS_ARE_STALE)


@dataclass(frozen=True)
class TextBefore:
    """The prompt of the past, and its entries of the state, by reference.

    Attributes:
        prompt: that the block before was made with; None where there is none.
        entries: of the state.
    """

    prompt: str | None
    entries: Mapping[str, Any]

    @classmethod
    def note(cls, values: Mapping[str, Any], prompt: str | None) -> TextBefore:
        """Note a state between two blocks; `prompt` is that of a past which is not in it yet."""
        entries = {name: values[name] for name in _OF_PROMPTS if name in values}
        return cls(entries.get("encoded_prompt") if prompt is None else prompt, entries)

    def put_back(self, values: MutableMapping[str, Any]) -> None:
        """Have the state say of prompts what it said then."""
        for name in _OF_PROMPTS:
            values.pop(name, None)
        values.update(self.entries)

    def has_gone(self, prompt: BlockPrompt) -> bool:
        """Whether the prompt of the past has gone for good: not at each step of a transition, but behind it."""
        return self.prompt not in (None, prompt.name) and prompt.coming_from is None
