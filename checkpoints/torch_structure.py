"""What a PyTorch file is made of, looked through before torch opens it: sizes, and what its pickle asks for.

The restricted unpickler of `torch.load(weights_only=True)` runs no code of a file, and still does what the file's
opcodes say: unpack a compressed entry, make an array of any length, rebuild the same tensor a million times. Here the
zip's entries and the pickle's opcodes are counted first; nothing is made of them.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

from .checkpoint_error import CheckpointError, first_line
from .file_bytes import open_file

# A training checkpoint of three 14B models and their optimizers has some 10,000 tensors, in 4 MB of pickle.
_LARGEST_PICKLE = 8_000_000
_MOST_OPCODES = 500_000
_MOST_CALLS = 60_000
_LARGEST_DIRECTORY = 16_000_000
_PICKLES = 5
# The end record of a zip lies within its last bytes, before a comment.
_END_RECORD, _END_BYTES = b"PK\x05\x06", 22 + 65_535
_END64_RECORD, _END64_BYTES = b"PK\x06\x06", 56
_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "INST", "OBJ", "BINPERSID", "PERSID"})
# Makes any number of zeros of a number.
_REFUSED = ("bytearray",)


def check_zip_structure(path: Path) -> int:
    """The size of a zip file that `torch.save` may have written, in bytes.

    Raises:
        CheckpointError: it is damaged, compressed, so that its tensors have no place in the file, or larger in a way
            that no checkpoint is.
    """
    with open_file(path) as raw, io.BufferedReader(raw) as file:
        size = os.fstat(raw.fileno()).st_size
        try:
            _check_directory(path, file, size)
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if any(entry.filename.endswith("constants.pkl") for entry in entries):
                    # A script, which torch refuses by name.
                    return size
                packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
                if packed is not None:
                    raise CheckpointError(
                        f"{path} is a compressed zip file ({packed.filename[:200]!r}), as torch.save writes none: "
                        "unpack it, and give the checkpoint in it."
                    )
                for entry in entries:
                    if entry.filename.endswith("data.pkl"):
                        _check_size(path, entry.file_size)
                        _check_pickle(path, archive.read(entry), 1)
        except CheckpointError:
            raise
        except (
            OSError,
            zipfile.BadZipFile,
            NotImplementedError,
            ValueError,
            EOFError,
            struct.error,
            RuntimeError,
        ) as error:
            raise CheckpointError(
                f"{path} is not a complete PyTorch file ({first_line(error)}): download it again."
            ) from error
    return size


def check_legacy_structure(path: Path) -> None:
    """Raise CheckpointError for a file from before PyTorch 1.6 whose pickles ask for more than tensors take."""
    with open_file(path) as file:
        start = bytes(file.read(_LARGEST_PICKLE))
    _check_pickle(path, start, _PICKLES)


def _check_directory(path: Path, file: Any, size: int) -> None:  # noqa: ANN401
    """Python's zipfile reads the whole directory, whatever its size."""
    file.seek(max(0, size - _END_BYTES))
    end = file.read(_END_BYTES)
    place = end.rfind(_END_RECORD)
    if place < 0:
        raise zipfile.BadZipFile("it ends too early")
    entries, directory = struct.unpack_from("<HI", end, place + 10)
    place64 = end.rfind(_END64_RECORD, 0, place)
    if place64 >= 0 and len(end) - place64 >= _END64_BYTES:
        entries, directory = struct.unpack_from("<QQ", end, place64 + 32)
    if directory > _LARGEST_DIRECTORY or entries > _MOST_CALLS:
        raise CheckpointError(
            f"{path} has {entries} entries in a directory of {directory} bytes, which no checkpoint has: download it "
            "again."
        )


def _check_size(path: Path, nbytes: int) -> None:
    if nbytes > _LARGEST_PICKLE:
        raise CheckpointError(
            f"{path} describes its tensors in {nbytes} bytes, and up to {_LARGEST_PICKLE} are read: give a checkpoint "
            "with the weights only."
        )


def _check_pickle(path: Path, content: bytes, pickles: int) -> None:
    """Count what the first `pickles` pickles in `content` ask for; a damaged one is left to torch."""
    stream, calls, count = io.BytesIO(content), 0, 0
    try:
        for _ in range(pickles):
            for opcode, argument, _place in pickletools.genops(stream):
                count += 1
                calls += opcode.name in _CALLS
                if count > _MOST_OPCODES or calls > _MOST_CALLS:
                    raise CheckpointError(f"{path} has more entries than any checkpoint: download it again.")
                if isinstance(argument, str) and argument.endswith(_REFUSED):
                    raise CheckpointError(
                        f"{path} asks for a bytearray when it is opened, which no weights need, so it is not opened: "
                        "give a .safetensors file of the model."
                    )
    except CheckpointError:
        raise
    except (ValueError, pickle.UnpicklingError, AttributeError, struct.error, LookupError):
        # What is behind is no pickle: the storages of an old file, or damage, of which torch says more.
        return
