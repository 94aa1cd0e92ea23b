"""What a pipeline says of itself to the memory timeline: names for its stages, advice for state that may grow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassLabel:
    """What the timeline calls the transformer's passes inside one leaf block.

    Attributes:
        leaf: name of the leaf block.
        label: of a pass inside it.
        numbered: whether the pass's number within the leaf block, from 0, follows the label.
    """

    leaf: str
    label: str
    numbered: bool = False


@dataclass(frozen=True)
class StateAdvice:
    """What to do about one key of the state when it grows.

    Attributes:
        key: of `PipelineState.values`.
        advice: the end of a sentence, with its full stop.
    """

    key: str
    advice: str


@dataclass(frozen=True)
class PipelineFacts:
    """What the timeline has to be told about a pipeline; the defaults suit any.

    Attributes:
        pass_labels: of leaf blocks whose passes have names of their own.
        state_advice: for keys that may grow for a known reason.
    """

    pass_labels: tuple[PassLabel, ...] = ()
    state_advice: tuple[StateAdvice, ...] = ()

    def pass_name(self, leaf: str, index: int) -> str:
        """The stage name of the transformer's pass `index` (from 0) inside the leaf block; "leaf/pass 0" by default."""
        for known in self.pass_labels:
            if known.leaf == leaf:
                return f"{known.label} {index}" if known.numbered else known.label
        return f"{leaf}/pass {index}"


UNKNOWN_PIPELINE = PipelineFacts()
