#!/usr/bin/env bash
# The process of a pod on GKE: python -m hovle_jax.train ARGUMENTS.
#
# A run that is told to end (SIGTERM: its machine is taken back) saves, stops, and ends with 0. To Kubernetes that would
# mean that the work is done; 143 means that it is to be started again.
set -uo pipefail

told=false
trap 'told=true; kill -TERM "$child"' TERM
python -m hovle_jax.train "$@" &
child=$!
wait "$child"
code=$?
if $told; then
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  exit 143
fi
exit "$code"
