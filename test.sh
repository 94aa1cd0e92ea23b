#!/usr/bin/env bash
# Lint, types, tests. Tests that need real ComfyUI skip, in one visible line, where it is not installed.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/make_venv.sh

.venv/bin/ruff check .
.venv/bin/ruff format --check .
# mypy sees the repository root as the package `streamblocks`, as ComfyUI and pip do.
mkdir -p .venv/typing
ln -sfn "$PWD" .venv/typing/streamblocks
(cd .venv/typing && MYPYPATH=. ../bin/mypy --config-file streamblocks/pyproject.toml -p streamblocks)
# The tests compute on one thread each, so there is a process per core; a file's tests stay together for its fixtures.
.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
