#!/usr/bin/env bash
# Asks the databases of known holes about the versions that CI tests, and can list them as a bill of materials.
#
#   pip install "hovle_jax[audit]"                   brings pip-audit
#   requirements/audit.sh                            requirements/py312.txt; fails where a version has a known hole
#   requirements/audit.sh --sbom sbom.json           also writes an SBOM (CycloneDX, JSON) of them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lock=requirements/py312.txt
if [[ "${1:-}" == --sbom ]]; then
  pip-audit --require-hashes --disable-pip -r "$lock" --format cyclonedx-json --output "${2:?"name a file: --sbom sbom.json"}"
else
  pip-audit --require-hashes --disable-pip -r "$lock" "$@"
fi
