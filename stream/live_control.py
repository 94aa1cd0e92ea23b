"""What people ask of a running stream: edits, pause, stop. Filled by a server's thread, read by the stream's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from threading import Condition

# How long a paused stream sleeps before it looks whether the prompt was cancelled.
_SECONDS_BETWEEN_LOOKS = 0.2


class Refusal(str):
    """Why something cannot be done: a sentence, and the id under which pages have it in their language; "" for none."""

    message: str

    def __new__(cls, sentence: str, message: str = "") -> Refusal:
        """The sentence with its id."""
        made = super().__new__(cls, sentence)
        made.message = message
        return made


_STOPS = Refusal(
    "The stream ends behind the block that is being made, so no block would follow the edit: start another one.",
    "refused_stopping",
)


class EditRefusedError(ValueError):
    """An edit that no block would follow.

    Args:
        refusal: says why.
    """

    # See CheckpointError.
    __module__ = "builtins"

    def __init__(self, refusal: str) -> None:
        super().__init__(refusal)
        self.message = getattr(refusal, "message", "")


@dataclass(frozen=True)
class Edit:
    """New values from the next block on, or from the one being made, begun again; None leaves a value as it is.

    Attributes:
        prompt: taken as it is, not mixed.
        strength: how much of an input video is replaced, 0..1.
        attention_bias: weight of past frames, above 0 and up to 1.
    """

    prompt: str | None = None
    strength: float | None = None
    attention_bias: float | None = None

    def then(self, later: Edit) -> Edit:
        """Both edits at once; of two values for one thing the later counts."""
        return Edit(**(asdict(self) | later.values()))

    def values(self) -> dict[str, str | float]:
        """The values that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_NOTHING = Edit()


@dataclass(frozen=True)
class Allowed:
    """Which edits take effect: "" where one does, else a sentence that says why not, such as a `Refusal`."""

    prompt: str = ""
    strength: str = ""
    attention_bias: str = ""

    def refusal(self, edit: Edit) -> str:
        """Why `edit` cannot be taken; "" where it can."""
        given = edit.values()
        return next((why for one in fields(self) if one.name in given and (why := getattr(self, one.name))), "")


class LiveControl:
    """A mailbox between whoever steers and the stream, which looks into it between two blocks, and early in one.

    All methods may be called from any thread; none but `wait_while_paused` waits.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._edit = Edit()
        self._paused = self._stopped = False
        self._allowed = Allowed()

    @property
    def allowed(self) -> Allowed:
        """Which edits take effect."""
        return self._allowed

    def allow(self, allowed: Allowed) -> None:
        """Say which edits take effect from now on; those that wait and have none are dropped."""
        with self._changed:
            self._allowed = allowed
            self._edit = Edit(
                **{name: value for name, value in asdict(self._edit).items() if not getattr(allowed, name)}
            )

    def edit(self, edit: Edit) -> None:
        """Have values changed, see `Edit`; they replace those that wait.

        Raises:
            EditRefusedError: one of them would have no effect; none is taken.
        """
        with self._changed:
            refusal = _STOPS if self._stopped else self._allowed.refusal(edit)
            if refusal:
                raise EditRefusedError(refusal)
            self._edit = self._edit.then(edit)

    def pause(self) -> None:
        """Wait behind the running block."""
        with self._changed:
            self._paused = True

    def resume(self) -> None:
        """Go on."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def stop(self) -> None:
        """End behind the running block, as a finished stream."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def pending(self) -> Edit:
        """What waits."""
        with self._changed:
            return self._edit

    @property
    def has_edit(self) -> bool:
        """Whether anything waits; does not wait for a lock, so it may be asked often."""
        return self._edit != _NOTHING

    @property
    def is_paused(self) -> bool:
        """Whether the stream is to wait."""
        return self._paused

    @property
    def is_stopped(self) -> bool:
        """Whether the stream is to end."""
        return self._stopped

    def take_edit(self) -> Edit:
        """What waits, which then waits no more."""
        with self._changed:
            taken, self._edit = self._edit, Edit()
            return taken

    def wait_while_paused(self, look: Callable[[], None]) -> None:
        """Return when the stream goes on or is stopped; at once where it is not paused.

        Args:
            look: called several times a second meanwhile; may raise.
        """
        while True:
            with self._changed:
                if self._stopped or not self._paused:
                    return
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
            look()
