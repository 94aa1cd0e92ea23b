"""Imports a repository's Python files from the bytes that were digested, under a name that no other code has."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ..checkpoints.checkpoint_files import CheckpointError
from .code_files import RepositoryCode

_PREFIX = "streamblocks_code_"


class ImportedCode(MetaPathFinder, InspectLoader):
    """A package of a repository's Python files, in `sys.modules` until `forget` is called.

    Its modules see each other by relative imports only. The package's name is made of place, commit and digest, so that
    modules of two repositories are never taken for each other, nor those of two versions of one. Nothing is read from
    the disk: the files may have changed since they were digested.

    Args:
        code: that the user has allowed.
    """

    def __init__(self, code: RepositoryCode) -> None:
        self._place = code.place
        self._files = code.python_files
        named = hashlib.sha256(f"{code.place}\n{code.commit}\n{code.digest}".encode()).hexdigest()
        self.package = f"{_PREFIX}{named[:32]}"
        sys.meta_path.insert(0, self)

    def load_class(self, module: str, name: str) -> type:
        """Import a module, such as "blocks" or "transformer.causal_model", and return its class called `name`.

        Raises:
            CheckpointError: there is no such module or class, or the module cannot be imported.
        """
        try:
            loaded = importlib.import_module(f"{self.package}.{module}")
        except Exception as error:
            # Catches every error: it is the repository's code that raises.
            raise CheckpointError(f"the code of {self._place!r} cannot be imported: {self._explain(error)}.") from error
        found = getattr(loaded, name, None)
        if not isinstance(found, type):
            raise CheckpointError(f"the code of {self._place!r} has no class {name} in {module}.py: download it again.")
        return found

    def forget(self) -> None:
        """Take the package and its modules out of `sys.modules`; what was imported from them keeps working."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in [name for name in sys.modules if name == self.package or name.startswith(f"{self.package}.")]:
            del sys.modules[name]
        for name in [name for name in linecache.cache if name.startswith(f"{self.package}/")]:
            del linecache.cache[name]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of this package; None for every other name."""
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        if self._file_of(fullname) is None and not self._is_folder(fullname):
            return None
        # An empty path of a package: no other finder looks anywhere for its modules.
        return ModuleSpec(fullname, self, origin=self._file_name(fullname), is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        """Whether a module is a folder; the repository itself is one."""
        file = self._file_of(fullname)
        return file is None or file.endswith("/__init__.py")

    def get_source(self, fullname: str) -> str:
        """The text of a module, as Python decodes it; empty for a folder."""
        file = self._file_of(fullname)
        return "" if file is None else importlib.util.decode_source(self._files[file])

    def exec_module(self, module: ModuleType) -> None:
        """Run a module, and keep its lines for those that look for them, such as Triton and tracebacks."""
        name = module.__name__
        source, file = self.get_source(name), self._file_name(name)
        # Without a time of change, Python takes these lines and never those of a file of this name.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)

    def _below(self, fullname: str) -> str:
        return fullname.removeprefix(self.package).lstrip(".").replace(".", "/")

    def _file_of(self, fullname: str) -> str | None:
        below = self._below(fullname)
        # The repository's own __init__.py is left out, as diffusers does.
        candidates = (f"{below}/__init__.py", f"{below}.py") if below else ()
        return next((file for file in candidates if file in self._files), None)

    def _is_folder(self, fullname: str) -> bool:
        below = self._below(fullname)
        return not below or any(file.startswith(f"{below}/") for file in self._files)

    def _file_name(self, fullname: str) -> str:
        return f"{self.package}/{self._file_of(fullname) or self._below(fullname)}"

    def _explain(self, error: Exception) -> str:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            if not error.name.startswith(self.package):
                return f"it needs the Python package {error.name.partition('.')[0]}, which is not installed"
            return f"it has no file for {error.name.removeprefix(self.package).lstrip('.')}"
        text = (str(error).splitlines() or [""])[0].removesuffix(".")
        return f"{type(error).__name__}: {text}"
