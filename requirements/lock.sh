#!/usr/bin/env bash
# Makes the list of versions of one Python anew, with the sha256 of every file of each: pip then takes no other file.
#
#   pip install "hovle_jax[audit]"                   brings uv
#   requirements/lock.sh 3.12                        writes requirements/py312.txt; versions stay where they can
#   requirements/lock.sh 3.12 --upgrade              the newest versions
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:?"name a Python: requirements/lock.sh 3.12"}
lock=requirements/py${version//./}.txt
made=$(mktemp)
trap 'rm -f "$made"' EXIT
if [[ -f "$lock" ]]; then cp "$lock" "$made"; fi
# Neither the index nor a folder of this machine is written down.
uv pip compile setup.py --quiet --output-file "$made" --python-version "$version" "${@:2}" \
  --extra dev --extra docs --extra tpu --extra data --generate-hashes --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links >/dev/null
{
  echo "# Versions that CI tests, beside the newest ones, with their hashes; made by requirements/lock.sh $version."
  echo "# pip install --require-hashes -r $lock && pip install --no-deps -e ."
  cat "$made"
} >"$made.whole"
mv "$made.whole" "$lock"
