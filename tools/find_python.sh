#!/usr/bin/env bash
# Prints the interpreter to make .venv with: the argument if given, else the newest
# supported one on the PATH or under ~/.pyenv. Fails with a remedy.
set -euo pipefail

supported() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not sys.version_info >= (3, 11))' \
    2>/dev/null
}

if [ -n "${1:-}" ]; then
  if supported "$1"; then
    command -v "$1"
    exit 0
  fi
  echo "error: PYTHON=$1 is not Python 3.11 or later with venv." >&2
  exit 2
fi

# 3.13 is the newest version that constraints.txt pins; later ones come after all
# pinned ones, since their wheels may not exist yet.
for name in python3.13 python3.12 python3.11 python3 python; do
  if path=$(command -v "$name") && supported "$path"; then
    echo "$path"
    exit 0
  fi
done
for minor in 13 12 11; do
  for path in "$HOME"/.pyenv/versions/3."$minor".*/bin/python; do
    if supported "$path"; then
      echo "$path"
      exit 0
    fi
  done
done
echo "error: no Python 3.11 or later (with its venv module) on the PATH." >&2
echo "Install one (Debian: apt install python3.12-venv; macOS: brew install python@3.12)" >&2
echo "or name one: make PYTHON=/path/to/python3.12 ..." >&2
exit 2
