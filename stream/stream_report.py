"""The result of a stream."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .direction import Direction
from .settings import StreamSettings
from .snapshot import StreamSnapshot
from .video_input import VideoUse


@dataclass(frozen=True)
class StreamReport:
    """The result of a stream.

    Attributes:
        blocks_made: blocks in the sinks.
        pictures: pictures in the sinks.
        seconds: wall time, including the loading of components.
        notices: sentences the user should read, such as a prompt that was cut or why the stream stopped early.
        settings: of the stream, with what was left to the memory decided.
        described: how the pipeline was made; see `StreamPipeline.describe`.
        direction: what the blocks followed, edits included.
        by_hand: whether somebody edited or ended it while it ran.
        snapshot: the stream after its last block; None unless it was asked for and could be taken.
        no_snapshot: why there is none, a sentence.
        video: what was taken of the input video; None without one.
        ran_out: whether the stream ended early because its device ran out of memory.
    """

    blocks_made: int
    pictures: int
    seconds: float
    notices: tuple[str, ...]
    settings: StreamSettings
    described: dict[str, Any]
    direction: Direction
    by_hand: bool = False
    snapshot: StreamSnapshot | None = None
    no_snapshot: str = ""
    video: VideoUse | None = None
    ran_out: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for text output; without the snapshot."""
        told = {
            "blocks_made": self.blocks_made,
            "pictures": self.pictures,
            "seconds": round(self.seconds, 3),
            "notices": list(self.notices),
            "changed_by_hand": self.by_hand,
            "video": None if self.video is None else asdict(self.video),
        }
        directed = self.direction.describe() | self.direction.describe_values(
            self.blocks_made, self.settings.attention_bias
        )
        return self.settings.as_dict() | told | self.described | directed
