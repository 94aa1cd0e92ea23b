"""The tokenizer of the text encoder: from a folder, or from the file of a text encoder that carries it inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from ...checkpoints.checkpoint_error import CheckpointError, first_line
from ...checkpoints.checkpoint_reading import read_checkpoint
from ...checkpoints.file_bytes import check_small_files
from ...checkpoints.json_text import read_json
from ...checkpoints.row_sources import RowSource, elements, read_whole
from .pipeline_folder import check_pipeline_folder

TOKENIZER_KEY = "spiece_model"
# umt5's tokenizer.json has 17 MB, and its sentencepiece model 4.5.
LARGEST_TOKENIZER = 50_000_000
_PAD = 0


class SentencePieceTokenizer:
    """UMT5's tokenizer from the bytes of its sentencepiece model, called like those of transformers.

    transformers reads such a model only with protobuf, which ComfyUI does not bring. Each text ends with the model's
    end token.

    Args:
        model: a serialized sentencepiece model.

    Raises:
        RuntimeError: `model` is not one.
        ValueError: it cannot encode a text.
    """

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model, add_bos=False, add_eos=True)
        if not self._processor.get_piece_size():
            raise RuntimeError("it has no pieces")
        # What a model lacks, such as an end token, is said by the first text only.
        self._encode("a", None)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        **_: Any,  # noqa: ANN401
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask` of one text, or of several as a batch.

        Args:
            text: one or several.
            padding: "max_length" fills up to `max_length` with the pad token.
            max_length: tokens, the end token among them.
            truncation: whether longer texts are cut; the end token stays.
            return_tensors: "pt" for int64 tensors.
            **_: what transformers' tokenizers take beside.
        """
        texts = [text] if isinstance(text, str) else text
        rows = [self._encode(each, max_length if truncation else None) for each in texts]
        fill = [max(0, (max_length or 0) - len(row)) if padding == "max_length" else 0 for row in rows]
        ids = [row + [_PAD] * count for row, count in zip(rows, fill, strict=True)]
        masks = [[1] * len(row) + [0] * count for row, count in zip(rows, fill, strict=True)]
        values: dict[str, Any] = {"input_ids": ids, "attention_mask": masks}
        if isinstance(text, str):
            values = {name: of_texts[0] for name, of_texts in values.items()}
        return BatchEncoding(values, tensor_type=return_tensors)

    def _encode(self, text: str, limit: int | None) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def is_tokenizer(name: str) -> bool:
    """Whether the tensor called `name` is a tokenizer, in a text encoder's file or one with other parts too."""
    return name == TOKENIZER_KEY or name.endswith(f".{TOKENIZER_KEY}")


def find_tokenizer(places: Sequence[Path]) -> PreTrainedTokenizerBase | SentencePieceTokenizer:
    """The tokenizer of the first place that has one, without touching the network and without running its code.

    Args:
        places: pipeline folders with a sub-folder `tokenizer`, and files of text encoders that may hold one.

    Raises:
        CheckpointError: none has, or it cannot be loaded.
    """
    for place in places:
        if (place / "tokenizer").is_dir():
            return load_tokenizer(place)
        if place.is_file():
            inside = [tensor for name, tensor in read_checkpoint(place).tensors.items() if is_tokenizer(name)]
            if inside:
                return _tokenizer_inside(inside[0])
    raise CheckpointError(
        f"there is no tokenizer in {' or '.join(map(str, places))}: choose a text encoder file that holds its own "
        f"({TOKENIZER_KEY}), as ComfyUI's umt5 files do, or under 'tokenizer' such a file or a folder that has a "
        "sub-folder tokenizer."
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the pipeline `folder`, without touching the network and without running code of its own."""
    check_pipeline_folder(folder, ["tokenizer"])
    place = folder / "tokenizer"
    check_small_files(place, LARGEST_TOKENIZER)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        if (place / name).exists():
            read_json(place / name)
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        # The tokenizers library raises plain Exceptions, and what its Rust code panics with is no Exception at all.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{place} holds no tokenizer that transformers can load ({first_line(error)}): download it again."
        ) from error


def _tokenizer_inside(stored: RowSource) -> SentencePieceTokenizer:
    if stored.dtype not in (torch.uint8, torch.int8) or elements(stored) > LARGEST_TOKENIZER:
        raise CheckpointError(
            f"{stored.file} holds a tokenizer ({stored.key}) of {elements(stored)} numbers of {stored.dtype}, which "
            f"must be up to {LARGEST_TOKENIZER} bytes: download it again."
        )
    try:
        return SentencePieceTokenizer(read_whole(stored).numpy().tobytes())
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{stored.file} holds a tokenizer ({stored.key}) that cannot be read ({first_line(error)}): download it "
            "again."
        ) from error
