"""The timeline of a stream's memory: one record per stage, as plain data that goes to JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .compile_caches import CompileCaches
from .json_text import json_text
from .owners import Owner
from .pipeline_facts import StateAdvice
from .readings import MemoryReading

# The record at the end of each block, of everything that is kept until the next.
BLOCK_END = "block end"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class StageRecord:
    """Memory at the end of a stage.

    Attributes:
        stage: such as "load transformer", "text encode", "context", "step 0", "decode", "block end", "clean-up".
        block: of the stream, from 0; None before the first.
        seconds: since the stream began, by the host's clock.
        reading: of the device; its peak is that of the stage.
        owners: of the memory; at the end of a block only.
        caches: of torch.compile; at the end of a block only.
        event: what happened that may explain a step in the curve, such as "prompt changed"; mostly empty.
    """

    stage: str
    block: int | None
    seconds: float
    reading: MemoryReading
    owners: tuple[Owner, ...] = ()
    caches: CompileCaches | None = None
    event: str = ""


@dataclass(frozen=True)
class Timeline:
    """All records of a stream, in order.

    Attributes:
        device: such as "cuda:0".
        card_bytes: memory of the card; None where it is not known.
        records: in a long stream not of every block, see `stride`.
        blocks: how many the stream made while it was recorded.
        stride: only blocks whose index is a multiple of it have records; it doubles whenever there are too many.
        peak: the most that was allocated, blocks without records included; None where it is not measured.
        state_advice: the pipeline's own, for keys of its state that may grow.
    """

    device: str
    card_bytes: int | None
    records: tuple[StageRecord, ...]
    blocks: int = 0
    stride: int = 1
    peak: int | None = None
    state_advice: tuple[StateAdvice, ...] = ()

    @property
    def block_ends(self) -> tuple[StageRecord, ...]:
        """The records at the end of blocks."""
        return tuple(record for record in self.records if record.stage == BLOCK_END)

    def stages_of(self, block: int | None) -> tuple[StageRecord, ...]:
        """The records of one block, or those before the first."""
        return tuple(record for record in self.records if record.block == block)

    def to_json(self, indent: int | None = None) -> str:
        """As JSON text."""
        return json_text({"version": FORMAT_VERSION} | asdict(self), indent=indent)
