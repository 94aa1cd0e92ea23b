"""Fetch a diffusers-layout repository from the Hugging Face hub; only if the user named it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from ..checkpoints.checkpoint_files import CheckpointError
from .abandoned_work import Check, never_cancelled
from .hub_download import BYTE_SECONDS, download_file
from .hub_patience import HubPatience, HubSilentError

BUILT_IN_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")

_HUB_ERRORS = (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    HTTPError,
    OSError,
)

# Of the causes of a failed call.
_NO_CONNECTION = frozenset({"ConnectError", "ConnectTimeout", "ConnectionError"})

# Bytes downloaded so far, and bytes in all.
OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its path in it, and bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class FetchedFiles:
    """Some files of a repository on this disk.

    Attributes:
        folder: they are in.
        commit: 40 hex digits.
        reached: whether the hub was asked; False where there was no network, and an earlier download was found.
    """

    folder: Path
    commit: str
    reached: bool


@dataclass(frozen=True)
class HubRepository:
    """The files of one commit of a hub repository, before any is fetched.

    Attributes:
        name: owner/name.
        revision: as requested; None for the default branch.
        commit: of the revision, 40 hex digits.
        files: those that the wanted components need: configs, tokenizers and weights, PyTorch's only where there are
            no others.
    """

    name: str
    revision: str | None
    commit: str
    files: tuple[HubFile, ...]

    def elements(self, component: str, check: Check = never_cancelled) -> int:
        """How many numbers the weights of `component` have, from the headers of its files, some kilobytes each."""
        count = 0
        for file in self.files:
            if file.path.startswith(f"{component}/") and file.path.endswith(".safetensors"):
                look = partial(HfApi().parse_safetensors_file_metadata, self.name, file.path, revision=self.commit)
                with _explained(self.name):
                    header = HubPatience(check).run(look)
                count += sum(tensor.parameter_count for tensor in header.tensors.values())
        return count

    def fetch(self, on_bytes: OnBytes) -> Path:
        """Download (or find in the hub's cache) all files, one after another.

        Args:
            on_bytes: called some times a second; if it raises, the download stops, and resumes there next time.

        Returns:
            The folder they are in.

        Raises:
            CheckpointError: no network, no answer, no permission, or the repository changed meanwhile.
        """
        folders: set[Path] = set()
        total, done = sum(file.size for file in self.files), 0
        for file in self.files:
            # The first by the revision's own name, which the cache then also knows without a network.
            revision = self.commit if folders else self.revision
            local = self._fetch_file(file.path, revision, _beside(done, total, on_bytes))
            done += file.size
            on_bytes(done, total)
            folders.add(local.parents[file.path.count("/")])
        if len(folders) != 1:
            raise CheckpointError(f"hub repository {self.name!r} was changed while it was downloaded: run again.")
        return folders.pop()

    def _fetch_file(self, path: str, revision: str | None, on_count: Callable[[int], None]) -> Path:
        with _explained(self.name):
            return download_file(self.name, path, revision, on_count)


def find_repository(
    repository: str,
    revision: str | None,
    components: Collection[str] = BUILT_IN_COMPONENTS,
    check: Check = never_cancelled,
) -> HubRepository:
    """Ask the hub which files the named components have.

    Raises:
        CheckpointError: no such repository, no network, no answer, no permission, or no file of these components.
    """
    refuse_folder_as_hub_id(repository)
    info = _ask_for_files(repository, revision, check)
    found = [HubFile(entry.rfilename, entry.size or 0) for entry in info.siblings or ()]
    files = [file for component in components for file in _files_of(component, found)]
    if not files or info.sha is None:
        raise CheckpointError(
            f"hub repository {repository!r} has no files in {', '.join(components)}: give one in diffusers' layout."
        )
    # Small files first: a wrong config is found before gigabytes are downloaded.
    return HubRepository(repository, revision, info.sha, tuple(sorted(files, key=lambda file: (file.size, file.path))))


def _ask_for_files(repository: str, revision: str | None, check: Check) -> ModelInfo:
    """What the hub says of a revision: its commit, and its files with their bytes."""
    with _explained(repository):
        return HubPatience(check).run(
            # A limit of the call's own, so that an abandoned one ends, too.
            partial(HfApi().model_info, repository, revision=revision, files_metadata=True, timeout=BYTE_SECONDS)
        )


def _files_of(component: str, found: Sequence[HubFile]) -> list[HubFile]:
    def matching(pattern: str) -> list[HubFile]:
        return [file for file in found if fnmatch(file.path, f"{component}/{pattern}")]

    weights = matching("*.safetensors") or matching("*.bin")
    return [*matching("*.json"), *matching("*.model"), *weights]


def find_cached_folder(repository: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache on this disk that an earlier download filled; None if there is none."""
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def fetch_files(
    repository: str,
    revision: str | None,
    wanted: Callable[[str], bool],
    *,
    most_files: int,
    most_bytes: int,
    check: Check = never_cancelled,
) -> FetchedFiles:
    """Download (or find in the hub's cache) the wanted small files of one commit.

    Args:
        repository: owner/name.
        revision: None for the default branch.
        wanted: whether a file, by its path in the repository, is.
        most_files: of those that are wanted.
        most_bytes: of all of them together.
        check: called while the hub is waited for.

    Returns:
        Where they are; without a network, those of an earlier download.

    Raises:
        CheckpointError: no such repository, no network, no answer, no permission, or more than that.
    """
    refuse_folder_as_hub_id(repository)
    try:
        info = _ask_for_files(repository, revision, check)
    except CheckpointError:
        folder = find_cached_folder(repository, revision)
        if folder is None:
            raise
        return FetchedFiles(folder, folder.name, reached=False)
    found = [file for file in info.siblings or () if wanted(file.rfilename)]
    if len(found) > most_files or sum(file.size or 0 for file in found) > most_bytes:
        raise CheckpointError(
            f"hub repository {repository!r} has more than {most_files} files or {most_bytes // 2**20} MiB of code: "
            "download into models/diffusers what the pipeline needs, and choose the folder."
        )
    if not found or info.sha is None:
        raise CheckpointError(f"hub repository {repository!r} has no pipeline: give one in diffusers' layout.")
    folders = set()
    for file in found:
        with _explained(repository):
            local = download_file(repository, file.rfilename, info.sha, lambda _: check())
        folders.add(local.parents[file.rfilename.count("/")])
    if len(folders) != 1:
        raise CheckpointError(f"hub repository {repository!r} has files outside of it: do not use it.")
    return FetchedFiles(folders.pop(), info.sha, reached=True)


def refuse_folder_as_hub_id(repository: str) -> None:
    """Raise if this path exists in the working directory: diffusers would take it for the repository.

    Raises:
        CheckpointError: the path exists.
    """
    if Path(repository).exists():
        raise CheckpointError(
            f"hub id {repository!r} is also a path below {Path.cwd()}: a path is never taken for a hub repository; "
            "put the model into models/diffusers and choose it in the loader."
        )


def _beside(done: int, total: int, on_bytes: OnBytes) -> Callable[[int], None]:
    """Count the bytes of one file beside the `done` bytes of those before it."""
    return lambda count: on_bytes(done + count, total)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    try:
        yield
    except _HUB_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not isinstance(error, HubSilentError) and _is_of_network(error):
            reason = f"no connection to {constants.ENDPOINT}, so there is no network or the hub is down"
        raise CheckpointError(
            f"hub repository {repository!r} could not be fetched ({reason}): check its name, your network and "
            "whether it asks for a login, or download it into models/diffusers and choose the folder."
        ) from error


def _is_of_network(error: BaseException) -> bool:
    """Whether no connection is behind an error; by names, as the hub's library has changed its HTTP library twice."""
    chain: BaseException | None = error
    while chain is not None:
        if any(kind.__name__ in _NO_CONNECTION for kind in type(chain).__mro__):
            return True
        chain = chain.__cause__
    return False
