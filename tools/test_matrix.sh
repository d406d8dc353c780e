#!/usr/bin/env bash
# Runs make targets under every supported Python, each in a virtual environment of its
# own, and ends with one line per Python: pytest's closing line, or that it is missing.
#
#   test_matrix.sh TARGET [OTHERS]
#
# TARGET runs in .venv (or $VENV), whichever Python make has chosen for it; OTHERS (TARGET
# if not given) runs in .venv-3.N for the others. A missing interpreter is named and is no
# failure. Ends non-zero if any run failed.
set -uo pipefail
cd "$(dirname "$0")/.."

target=$1
others=${2:-$1}
venv=${VENV:-.venv}
# One line per pinned version, as in constraints.txt.
versions="3.11 3.12 3.13"

log=$(mktemp)
summary=$(mktemp)
trap 'rm -f "$log" "$summary"' EXIT
status=0

# The last line that counts tests, colours and rulers taken out.
closing() {
  sed $'s/\033\\[[0-9;]*m//g' "$log" |
    grep -E '[0-9]+ (passed|failed|error)|no tests ran' | tail -n 1 |
    sed -E 's/^=+ //; s/ =+$//'
}

# $1: Python's version; $2: the target; the rest: variables of make.
run() {
  local version=$1 goal=$2
  shift 2
  echo "=== Python $version: make $goal ==="
  make "$goal" "$@" 2>&1 | tee "$log"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || status=1
  local line
  line=$(closing)
  echo "pytest ($goal, Python $version): ${line:-did not finish}" >>"$summary"
}

if ! make setup VENV="$venv"; then
  echo "pytest: did not start, because $venv could not be set up"
  exit 1
fi
own=$("$venv"/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

missing=""
for version in $versions; do
  [ "$version" = "$own" ] && continue
  if bash tools/find_python.sh "$version" >/dev/null 2>&1; then
    run "$version" "$others" VENV=".venv-$version" PYTHON="$version"
  else
    missing="$missing $version"
  fi
done
# The whole suite last: its closing line ends the log.
run "$own" "$target" VENV="$venv"

echo
for version in $missing; do
  echo "not tested: Python $version is neither on the PATH nor under ~/.pyenv"
done
cat "$summary"
exit "$status"
