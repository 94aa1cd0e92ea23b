"""The question of `tools/allow_code.py`: what code is it, and may it run?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..stream.code_consent import LIST_NAME, allow_code, check_pinned, forbid_place, read_allowed_code
from ..stream.code_files import RepositoryCode, read_code
from ..stream.recipe import is_hub_id
from ..stream.shown_code import shown_file, shown_text

_ROOT = Path(__file__).absolute().parent.parent
_PAGE_LINES = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, show the files, ask, write the list; 1 when the code is not allowed."""
    options = _parser().parse_args(arguments)
    try:
        file = options.list or _usual_list()
        # Where both are there, a path is a path: it is given here by who sits at the machine.
        on_hub = is_hub_id(options.place) and (options.commit is not None or not Path(options.place).exists())
        place = options.place if on_hub else str(Path(options.place).resolve())
        if options.forbid:
            print(f"{forbid_place(file, place)} consents to {shown_text(place)} taken from {file}")
            return 0
        return _ask(_read(place, options.commit), file, pages=not options.names)
    except (ValueError, OSError) as error:
        print(shown_text(str(error)), file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allow_code.py", description="Show the code that a model brings, and ask.")
    parser.add_argument("place", help="the model's folder, or the hub id of its repository, such as owner/name")
    parser.add_argument("--commit", default=None, help="of a hub repository: the 40 digits of the commit")
    parser.add_argument(
        "--list",
        type=Path,
        default=None,
        metavar="FILE",
        help=f"the list of allowed code; by default user/__streamblocks/{LIST_NAME} of the ComfyUI that the pack is in",
    )
    parser.add_argument("--names", action="store_true", help="show names, sizes and digests only, and not the code")
    parser.add_argument("--forbid", action="store_true", help="take all consents to this place from the list")
    return parser


def _usual_list() -> Path:
    packs = _ROOT.parent
    if packs.name != "custom_nodes":
        raise ValueError(
            "the pack is not in the custom_nodes folder of a ComfyUI: give --list FILE as the refused run names it."
        )
    return packs.parent / "user" / "__streamblocks" / LIST_NAME


def _read(place: str, commit: str | None) -> RepositoryCode:
    if is_hub_id(place):
        check_pinned(place, commit)
    elif commit is not None:
        raise ValueError(f"commit is {commit!r}: {place} is a folder, and only a hub repository has commits.")
    return read_code(place, commit)


def _ask(code: RepositoryCode, file: Path, *, pages: bool) -> int:
    if not code.python_files:
        print(f"{shown_text(code.place)} has no Python code: there is nothing to allow.")
        return 0
    if read_allowed_code(file).admits(code):
        print(f"This code of {shown_text(code.place)} is allowed already.")
        return 0
    if pages:
        _show_files(code)
    print(f"\n{shown_text(code.place)}" + ("" if code.commit is None else f" at commit {code.commit}"))
    for one in code.files:
        print(f"  {len(one.content):>9,} bytes  {one.digest[:16]}  {shown_text(one.path)}")
    print(f"  digest of all files: {code.digest}")
    print("What is allowed runs as you do: it can read, change and send all that you can. Have you read it?")
    if _answer("Type yes to let this code run on this machine: ") != "yes":
        print("Not allowed.")
        return 1
    allow_code(file, code)
    print(f"Allowed, until a byte of it changes. The list: {file}")
    return 0


def _show_files(code: RepositoryCode) -> None:
    """Page by page on a terminal; all at once elsewhere."""
    lines = []
    for one in code.files:
        lines += [f"===== {shown_text(one.path)} =====", *shown_file(one).split("\n")]
    step = _PAGE_LINES if sys.stdin.isatty() and sys.stdout.isatty() else len(lines)
    for first in range(0, len(lines), step):
        print("\n".join(lines[first : first + step]))
        if first + step < len(lines) and _answer("-- Enter for more, q to skip the rest -- ") == "q":
            return


def _answer(question: str) -> str:
    try:
        return input(question).strip().lower()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
