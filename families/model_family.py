"""Everything specific to a family of models, in one object.

`stream/`, `memory/` and `ops/` know no model by name: they ask the `ModelFamily` of a pipeline. This module and
the families' own `family` modules import quickly, so that nodes can read their facts; the methods import what needs
diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..memory.pipeline_facts import PipelineFacts
from .stream_preset import StreamPreset

if TYPE_CHECKING:
    import torch
    from diffusers.modular_pipelines import ModularPipeline

    from ..checkpoints.component import Component
    from ..checkpoints.lora_choice import LoraChoice
    from ..checkpoints.tensor_writing import PlannedFile
    from ..ops.call_graphs import CallGraphs
    from ..ops.quantization import QuantizationSpec


@dataclass(frozen=True)
class LatentGeometry:
    """How latents relate to pictures and tokens.

    Attributes:
        channels: of a latent.
        spatial_scale: pixels of a picture per latent pixel, each way.
        temporal_scale: pixel frames per latent frame, except a stream's first latent frame, which is one picture.
        patch: latent frames, rows and columns that become one token.
    """

    channels: int
    spatial_scale: int
    temporal_scale: int
    patch: tuple[int, int, int]

    @property
    def size_step(self) -> int:
        """Width and height of a picture are multiples of this many pixels."""
        return self.spatial_scale * self.patch[1]

    def pixel_frames(self, latent_frames: int, *, from_the_start: bool) -> int:
        """Pixel frames that latent frames decode to, at the start of a stream or after others."""
        frames = latent_frames * self.temporal_scale
        return frames - self.temporal_scale + 1 if from_the_start else frames

    def tokens_per_frame(self, width: int, height: int) -> int:
        """Tokens of one latent frame of pictures of `width` x `height` pixels."""
        rows, columns = (
            side // self.spatial_scale // step for side, step in zip((height, width), self.patch[1:], strict=True)
        )
        return rows * columns

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError, one sentence, for a width or height that is no multiple of `size_step`."""
        for name, value in (("width", width), ("height", height)):
            check_side(name, value, self.size_step)


def check_side(name: str, value: int, step: int) -> None:
    """Raise ValueError, one sentence, unless `value` pixels are a multiple of `step`."""
    if value < step or value % step:
        below = max(step, value // step * step)
        raise ValueError(f"{name} is {value}: choose a multiple of {step}, such as {below} or {below + step}.")


@dataclass(frozen=True)
class ModelSources:
    """Where the parts of a pipeline lie on this disk: in pipeline folders, or in files of their own.

    Attributes:
        transformer: pipeline folder or single file.
        vae: pipeline folder or single file.
        text_encoder: pipeline folder or single file; None where prompts come as embeddings only.
        tokenizers: where the text encoder's tokenizer may be; the first that has one counts.
        decoder: single file of what decodes in the VAE's place; None for the VAE itself.
    """

    transformer: Path
    vae: Path
    text_encoder: Path | None
    tokenizers: tuple[Path, ...]
    decoder: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path) -> ModelSources:
        """All parts in one pipeline folder."""
        return cls(folder, folder, folder, (folder,))


@dataclass(frozen=True)
class ComponentOptions:
    """What a user chose for the components of a pipeline.

    Attributes:
        dtype: of transformer and text encoder.
        vae_dtype: of the VAE.
        quantization: of the components that it names; None for none.
        attention: how attention is computed.
        loras: on the transformer, one after another.
        averaged: of a training checkpoint with both, take the exponential moving average of the weights.
    """

    dtype: torch.dtype
    vae_dtype: torch.dtype
    quantization: QuantizationSpec | None
    attention: AttentionChoice
    loras: tuple[LoraChoice, ...] = ()
    averaged: bool = True


@dataclass(frozen=True)
class AttentionChoice:
    """How a transformer's attention is computed.

    Attributes:
        backend: name of a diffusers attention backend.
        compiled: whether the transformer's layers are compiled, the attention in them included.
        device: where it is computed, which decides whether a library runs; None if unknown, and then none does.
    """

    backend: str = "native"
    compiled: bool = False
    device: torch.device | None = None


class ModelFamily(ABC):
    """A family of models that the pack streams with blocks of its own.

    Attributes:
        name: shown to users.
        transformer_classes: class names in the configs of its transformers, diffusers' own first.
        vae_class: class name in the config of its VAE.
        geometry: of its latents.
        presets: how the makers of its models stream them; the first where nothing says which.
        memory_facts: names of its blocks' stages and advice on their state, for the memory timeline.
    """

    name: str
    transformer_classes: ClassVar[tuple[str, ...]]
    vae_class: ClassVar[str]
    geometry: LatentGeometry
    presets: tuple[StreamPreset, ...]
    memory_facts: ClassVar[PipelineFacts]

    @abstractmethod
    def recognises(self, model: Path) -> bool:
        """Whether `model`, a pipeline folder or a single file, holds a transformer of this family, by its headers."""

    @abstractmethod
    def components(self, sources: ModelSources, options: ComponentOptions) -> dict[str, Component]:
        """Transformer, VAE and, if `sources` names them, text encoder and decoder, known from their headers.

        Args:
            sources: where they are.
            options: the user's.

        Raises:
            CheckpointError: one of them is missing, of another model, or does not fit the others.
        """

    @abstractmethod
    def with_loras(self, transformer: Component, loras: tuple[LoraChoice, ...]) -> Component:
        """`transformer` with these LoRAs instead of those it has; raises CheckpointError for one that does not fit."""

    @abstractmethod
    def load_tokenizer(self, sources: ModelSources) -> Any:  # noqa: ANN401
        """The tokenizer of the text encoder; raises CheckpointError when there is none or it cannot be loaded."""

    @abstractmethod
    def parts_in(self, file: Path) -> frozenset[str]:
        """Which of "vae" and "text_encoder" a single file holds beside the transformer, by its header.

        Raises CheckpointError for a file that cannot be read.
        """

    @abstractmethod
    def notices(self, transformer: Component) -> tuple[str, ...]:
        """Sentences on what to expect of a model that loads and runs, and that was not made for streams."""

    @abstractmethod
    def text_shape(self, transformer: Component) -> tuple[int, int]:
        """Tokens and width of the text embeddings that the transformer takes."""

    @abstractmethod
    def choose_preset(self, transformer: Component) -> StreamPreset:
        """The preset of a model, by what its files say: their names, sizes and configs.

        Raises:
            CheckpointError: the model's own file of settings cannot be read.
        """

    @abstractmethod
    def make_pipeline(self) -> ModularPipeline:
        """The family's modular blocks, without components: a leaf block `text_encoder` comes first."""

    @abstractmethod
    def pack_keys(self, kv_cache: Any, inputs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """A stream's KV cache with its past in the `kv_format` of `inputs`, in 8 bits; the given one is used up."""

    def snapshot_kinds(self) -> Mapping[str, Callable[[Mapping[str, Any], torch.device], Any]]:
        """By the name of each class of objects that the blocks keep in the state: what makes one of its parts.

        The parts are those of the object's `to_snapshot`; their tensors lie on the CPU and are to be copied.
        """
        return {}

    @abstractmethod
    def decoder_reach(self, pipe: ModularPipeline) -> int:
        """How many latent frames, decoded again, leave the decoder of `pipe` as all before them would have."""

    @abstractmethod
    def decode_again(self, pipe: ModularPipeline, latents: torch.Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """State entries that decoding `latents` leaves in the place of those that a snapshot on disk lacks.

        Args:
            pipe: its VAE is on the device.
            latents: float32 [1, channels, frames, height, width]: all of the stream, or the last `decoder_reach`.
            inputs: of the pipeline's call; see `StreamSettings.pipeline_inputs`.
        """

    @abstractmethod
    def start_from_pictures(self, pipe: ModularPipeline, pictures: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        """State entries of a stream that goes on after given pictures.

        Args:
            pipe: its VAE is on the device.
            pictures: uint8 tensor [F, height, width, 3], 1 or more, oldest first, of the stream's size.
            inputs: of the pipeline's call; see `StreamSettings.pipeline_inputs`; and `video_given`, whether an input
                video follows the pictures.
        """

    @abstractmethod
    def streaming_bytes(
        self, components: Mapping[str, Component], inputs: Mapping[str, Any], attention: AttentionChoice
    ) -> int:
        """Bytes of a stream's caches and activations at their largest.

        Args:
            components: give configs and dtypes; no weight is read.
            inputs: of the pipeline's call; see `StreamSettings.pipeline_inputs`; and `video_given`, whether an input
                video is encoded, too.
            attention: how it is computed.
        """

    @abstractmethod
    def decode_bands(self, components: Mapping[str, Component]) -> tuple[int, ...]:
        """In how many bands of rows a picture can be decoded, fewest first; (1,) for whole pictures only.

        They are values of `StreamSettings.decode_bands`; more take less memory and more time.
        """

    @abstractmethod
    def text_encoding_bytes(self, text_encoder: Component) -> int:
        """Bytes of the text encoder's activations at their largest, for a full-length prompt."""

    @abstractmethod
    def save_quantized(self, transformer: Any, path: Path, on_tensor: Callable[[str, int], None]) -> None:  # noqa: ANN401
        """Write a quantized transformer to one safetensors file, which the family reads again.

        Args:
            transformer: as its component loaded it.
            path: replaced only by a complete file.
            on_tensor: called with each tensor's name and bytes when it is in the file.

        Raises:
            ValueError: the format cannot be written.
            OSError: the file cannot be written.
        """

    @abstractmethod
    def plan_plain_checkpoint(self, model: Path, *, averaged: bool = True) -> PlannedFile:
        """What one safetensors file with the transformer of `model`, under the makers' plain names, holds.

        Args:
            model: a pipeline folder or a single file; no weight of it is read.
            averaged: of a training checkpoint with both, take the exponential moving average of the weights.

        Raises:
            CheckpointError: `model` does not hold a complete transformer of this family.
        """

    @abstractmethod
    def held_masks(self, transformer: object) -> Mapping[str, object]:
        """Attention masks that a loaded transformer keeps, by shape, for the memory timeline."""

    @abstractmethod
    def repeat_calls(self, pipe: ModularPipeline, graphs: CallGraphs) -> None:
        """Have these graphs repeat what the loaded models of `pipe` compute again and again, where the family can."""

    @abstractmethod
    def report_kernels(
        self, pipe: ModularPipeline, components: Mapping[str, Component], device: torch.device
    ) -> dict[str, str]:
        """Which GPU kernels the pipeline runs: "runs" or the reason why not, by the kernel's name."""
