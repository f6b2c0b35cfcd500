#!/usr/bin/env bash
# The process of a pod on GKE: python -m hovle_jax.train ARGUMENTS, with its status.
#
# The first process of a container gets no signal that it does not handle, and Python alone does not handle SIGTERM, by
# which a pod is told that its machine is taken back: this one hands it on.
set -uo pipefail

trap 'kill -TERM "$child"' TERM
python -m hovle_jax.train "$@" &
child=$!
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # the signal has ended the wait, and not the training
  wait "$child"
  code=$?
done
exit "$code"
