#!/usr/bin/env bash
# Prints the interpreter to make a virtual environment with. Fails with a remedy.
#
#   find_python.sh            the newest supported one on the PATH, else under ~/.pyenv
#   find_python.sh 3.12       that version, from either
#   find_python.sh PATH       this one
set -euo pipefail

supported() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not sys.version_info >= (3, 11))' \
    2>/dev/null
}

# The interpreter of version 3.$1, from the PATH or from pyenv's versions.
of_minor() {
  local path
  if path=$(command -v "python3.$1") && supported "$path"; then
    echo "$path"
    return
  fi
  for path in "$HOME"/.pyenv/versions/3."$1".*/bin/python; do
    if supported "$path"; then
      echo "$path"
      return
    fi
  done
  return 1
}

if [[ "${1:-}" =~ ^3\.([0-9]+)$ ]]; then
  if [ "${BASH_REMATCH[1]}" -ge 11 ] && of_minor "${BASH_REMATCH[1]}"; then
    exit 0
  fi
  echo "error: PYTHON=$1: no Python $1 (3.11 or later, with its venv module) on the" \
    "PATH or under ~/.pyenv." >&2
  echo "Install it, or give its path: make PYTHON=/path/to/python$1 ..." >&2
  exit 2
fi

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
  if of_minor "$minor"; then
    exit 0
  fi
done
echo "error: no Python 3.11 or later (with its venv module) on the PATH." >&2
echo "Install one (Debian: apt install python3.12-venv; macOS: brew install python@3.12)" >&2
echo "or name one: make PYTHON=/path/to/python3.12 ..." >&2
exit 2
