"""The one form of a request that steers a stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..stream.live_control import Edit
from .request_bodies import RefusedRequestError

# Stands for a value that is not given; it cannot be given.
_LEFT_OUT: Any = None
_VALUES = ("prompt", "strength", "attention_bias")


def _say_conditions(schema: dict[str, Any]) -> None:
    """Say in JSON schema what the model's validator checks, and that a value which is not given is left out."""
    for name in _VALUES:
        schema["properties"][name].pop("default", None)
    is_edit = {"properties": {"action": {"const": "edit"}}}
    gives = [{"required": [name]} for name in _VALUES]
    schema |= {"if": is_edit, "then": {"anyOf": gives}, "else": {"not": {"anyOf": gives}}}


class ControlRequest(BaseModel):
    """Steers a running stream: "edit" gives new values from the next block on, other actions give none."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_say_conditions)

    token: str = Field(max_length=200, description="as the event streamblocks.stream handed it out")
    action: Literal["edit", "pause", "resume", "stop"]
    prompt: str = Field(default=_LEFT_OUT, min_length=1, max_length=10_000, description="taken as it is, not mixed")
    strength: float = Field(default=_LEFT_OUT, ge=0, le=1, description="how much of an input video is replaced")
    attention_bias: float = Field(default=_LEFT_OUT, gt=0, le=1, description="weight of past frames")

    @model_validator(mode="after")
    def _check_values(self) -> ControlRequest:
        given = [name for name in _VALUES if name in self.model_fields_set]
        if self.action == "edit" and not given:
            raise ValueError(f"an edit needs a value, one of {', '.join(_VALUES)}")
        if self.action != "edit" and given:
            raise ValueError(f"{self.action} takes no {given[0]}")
        return self

    def edit(self) -> Edit:
        """The values that are given."""
        return Edit(**{name: getattr(self, name) for name in _VALUES if name in self.model_fields_set})


def read_control(value: Any) -> ControlRequest:  # noqa: ANN401
    """Check a parsed body.

    Raises:
        RefusedRequestError: it is not of the form; the sentence names the first thing that is not.
    """
    if not isinstance(value, dict):
        raise RefusedRequestError(400, "The body is not a JSON object: send one with token and action.")
    try:
        return ControlRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"{str(part)[:40]}: " for part in first["loc"])
        message = "refused_too_long" if first["loc"] == ("prompt",) and first["type"] == "string_too_long" else ""
        raise RefusedRequestError(400, f"{where}{first['msg'].removeprefix('Value error, ')}.", message) from None
