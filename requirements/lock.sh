#!/usr/bin/env bash
# Makes the list of versions of one Python anew: what its pip chooses today, in an environment with nothing else.
#
#   requirements/lock.sh python3.12                    writes requirements/py312.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:?"name a Python: requirements/lock.sh python3.12"}
name=$("$python" -c 'import sys; print("py{}{}".format(*sys.version_info))')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --editable ".[dev,docs,tpu,data]"
{
  echo "# Versions that CI tests, beside the newest ones; made by requirements/lock.sh."
  echo "# pip install -e \".[test]\" -c requirements/$name.txt"
  "$folder/venv/bin/python" -m pip freeze --exclude-editable --exclude pip --exclude setuptools
} >"$folder/list"
mv "$folder/list" "requirements/$name.txt"
