#!/usr/bin/env bash
# Trains on this machine, from nothing: makes .venv, installs the project, runs a config.
#
#   launch/local.sh                                     the instruct stage, tiny preset
#   launch/local.sh --config configs/distill.py         any arguments of hovle_jax.train
#   launch/local.sh --dry-run [arguments]               prints the commands and runs nothing
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ "${1:-}" == --help ]]; then
  usage
  exit
fi
cd "$ROOT"

if [[ "${1:-}" == --dry-run ]]; then
  dry_run=true
  shift
fi
if [[ $# -eq 0 ]]; then
  set -- --config configs/instruct.py
fi

# The newest Python >= 3.11. Each one is run, not only found: python3.12 may be a pyenv shim that leads nowhere.
find_python() {
  local name minor newest=10 found=""
  for name in python3.12 python3.11 python3; do
    minor=$("$name" -c 'import sys; print(sys.version_info.minor)' 2>/dev/null) || continue
    if ((minor > newest)); then
      newest=$minor
      found=$name
    fi
  done
  printf '%s' "$found"
}

# pip is looked for, not the folder: a venv whose making was interrupted is made again.
if [[ ! -x .venv/bin/pip ]]; then
  python=$(find_python)
  if [[ -z "$python" ]]; then
    die "no Python >= 3.11 on PATH (tried python3.12, python3.11, python3): install one"
  fi
  run "$python" -m venv .venv
fi

# Installed again only when setup.py has changed.
if [[ ! setup.py -ot .venv/installed ]]; then
  run .venv/bin/python -m pip install --quiet --editable .
  run touch .venv/installed
fi

run .venv/bin/python -m hovle_jax.train "$@"
