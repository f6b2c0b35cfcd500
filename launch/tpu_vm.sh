#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one slice, or several (--slices) that work as one.
#
#   launch/tpu_vm.sh VERB [options] [-- arguments of hovle_jax.train]
#
#   create     one slice, now or not at all
#   queue      a queued resource: waits for its place; the way to several slices
#   setup      copies this checkout to all workers and installs it; mounts the bucket there
#   run        python -m hovle_jax.train ARGUMENTS on all workers; goes on when ssh ends
#   resume     whatever is missing of queue, setup, run; the same command again after a preemption
#   logs       follows the log of a worker
#   status     the state of the machines, and of the run on each worker
#   stop       ends the run on all workers
#   delete     gives the machines back
#
#   --project --zone --name          where, and what the machines are called
#   --accelerator TYPE               v5litepod-256 (v5e-256), v6e-256, v5p-128, v4-32, ...
#   --slices N                       of this type; 1 if not given
#   --spot                           may be preempted, and costs less
#   --bucket BUCKET                  is mounted at /mnt/hovle: for --workdir, and for weights and data
#   --env NAME=VALUE                 for run and resume, as LIBTPU_INIT_ARGS=...; may be repeated
#   --gcloud FLAG                    one more flag for create and queue, as --gcloud=--reserved; may be repeated
#   --runtime VERSION                another software version than the accelerator's usual one
#   --slice I --worker W             whose log: numbers from 0, or all; 0 and 0 if not given
#   --dry-run                        prints the commands and runs nothing
#
# HOVLE_PROJECT, HOVLE_ZONE, HOVLE_NAME, HOVLE_ACCELERATOR, HOVLE_SLICES and HOVLE_BUCKET stand for the options.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=accelerators.sh
source "$(dirname "${BASH_SOURCE[0]}")/accelerators.sh"

OPTIONS="project zone name accelerator slices bucket runtime slice worker"
FLAGS="spot"
LISTS="env gcloud"
POLL_SECONDS=${HOVLE_POLL_SECONDS:-60}
WORKER=hovle_jax/launch/worker.sh
SENT="setup.py README.md requirements hovle_jax configs launch"

project=${HOVLE_PROJECT:-} zone=${HOVLE_ZONE:-} name=${HOVLE_NAME:-}
accelerator=${HOVLE_ACCELERATOR:-} slices=${HOVLE_SLICES:-1} bucket=${HOVLE_BUCKET:-}
runtime="" spot=false slice=0 worker=0 env=() gcloud=()
parse "$@"

tpu_vm() { run gcloud compute tpus tpu-vm "$1" "$name" --project="$project" --zone="$zone" "${@:2}"; }
queued() { run gcloud compute tpus queued-resources "$1" "$name" --project="$project" --zone="$zone" "${@:2}"; }

# What creates machines, beside their place.
machine_flags() {
  flags=(--accelerator-type="$accelerator")
  if $spot; then flags+=(--spot); fi
  flags+=(${gcloud[@]+"${gcloud[@]}"})
  runtime=${runtime:-$(runtime_version "$accelerator")}
}

create() {
  ((slices == 1)) || die "several slices come from one queued resource: use queue, or resume"
  machine_flags
  tpu_vm create --version="$runtime" "${flags[@]}"
}

queue() {
  machine_flags
  if ((slices > 1)); then
    flags+=(--node-count="$slices" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  queued create --runtime-version="$runtime" "${flags[@]}"
}

# Runs a command on workers. The nodes of several slices are reached by the queued resource, a single one by its name.
on_workers() {
  if ((slices > 1)); then
    queued ssh --node="$1" --worker="$2" --batch-size=all --command="$3"
  else
    tpu_vm ssh --worker="$2" --command="$3"
  fi
}

copy_to_workers() {
  if ((slices > 1)); then
    run gcloud compute tpus queued-resources scp "$1" "$name:$2" --node=all --worker=all \
      --project="$project" --zone="$zone"
  else
    run gcloud compute tpus tpu-vm scp "$1" "$name:$2" --worker=all --project="$project" --zone="$zone"
  fi
}

setup() {
  local folder=${TMPDIR:-/tmp}/hovle_jax.XXXXXX
  if ! $dry_run; then
    folder=$(mktemp -d "$folder") # a name that nobody else on this machine can have taken
    # shellcheck disable=SC2064 # the folder's name is known here alone
    trap "rm -rf $(quote "$folder")" EXIT
  fi
  local archive=$folder/hovle_jax.tar.gz
  # shellcheck disable=SC2086
  run tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" $SENT
  copy_to_workers "$archive" hovle_jax.tar.gz
  on_workers all all "mkdir -p hovle_jax && tar -xzf hovle_jax.tar.gz -C hovle_jax && $(quote $WORKER install "$bucket")"
}

start() {
  local command=("$WORKER" start "${arguments[@]}")
  if ((${#env[@]})); then command=(env "${env[@]}" "${command[@]}"); fi
  on_workers all all "$(quote "${command[@]}")"
}

stop() { on_workers all all "$WORKER stop"; }
worker_states() { on_workers all all "test -x $WORKER && $WORKER status || echo not set up"; }

# The queued resource's state, or GONE. An error of another kind ends the script: it must not create machines.
queued_state() {
  local errors
  errors=$(mktemp)
  if ! queued describe --format='value(state.state)' 2>"$errors"; then
    grep -q NOT_FOUND "$errors" || die "$(cat "$errors")"
    echo GONE
  fi
  rm -f "$errors"
}

# $1 for machines that came from queue, $2 for those from create.
by_origin() {
  if $dry_run; then
    queued describe --format='value(state.state)'
    note "if that is a queued resource:"
    "$1"
    note "if there is none:"
    "$2"
  else
    state=$(queued_state)
    if [[ "$state" == GONE ]]; then "$2"; else "$1"; fi
  fi
}

delete_queued() { queued delete --force --quiet; }
delete_tpu_vm() { tpu_vm delete --quiet; }
describe_queued() { queued describe; }
describe_tpu_vm() { tpu_vm describe; }

# Workers answer only where there are machines.
status() {
  by_origin describe_queued describe_tpu_vm
  if $dry_run || [[ "$state" == ACTIVE || "$state" == GONE ]]; then worker_states; fi
}

# Until the queued resource is ACTIVE. One that was preempted (SUSPENDED) is never allocated again: it makes room for
# a new one.
ensure_machines() {
  local queued_here=false
  while true; do
    state=$(queued_state)
    echo "$(date '+%H:%M:%S') $name: $state"
    case $state in
      ACTIVE) return ;;
      GONE)
        queue
        queued_here=true
        ;;
      SUSPENDED) delete_queued ;;
      FAILED)
        if $queued_here; then die "the request for $name failed; launch/tpu_vm.sh status says why"; fi
        delete_queued
        ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

# All workers stop before any starts: the processes of a run begin together.
ensure_run() {
  local states
  states=$(worker_states)
  printf '%s\n' "$states"
  case $states in
    *"not set up"*) setup ;;
    *"not running"* | *stopped* | *failed*) ;;
    *) return ;;
  esac
  stop
  start
}

resume() {
  if $dry_run; then
    queued describe --format='value(state.state)'
    note "if it is SUSPENDED or FAILED:"
    delete_queued
    note "then, or if it is GONE:"
    queue
    note "as soon as it is ACTIVE:"
    worker_states
    note "if a worker is not set up:"
    setup
    note "if the run has not finished and does not go on everywhere:"
    stop
    start
  else
    ensure_machines
    ensure_run
  fi
}

case $verb in
  create | queue) need project zone name accelerator ;;
  resume)
    need project zone name accelerator
    check_workdir
    ;;
  run)
    need project zone name
    check_workdir
    ;;
  setup | logs | status | stop | delete) need project zone name ;;
  "") die "which of create, queue, setup, run, resume, logs, status, stop, delete? See launch/tpu_vm.sh --help" ;;
  *) die "unknown verb $verb: create, queue, setup, run, resume, logs, status, stop or delete" ;;
esac
check_number slices
if [[ -n "$accelerator" ]]; then accelerator=$(accelerator_type "$accelerator"); fi
need_tool gcloud "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"

case $verb in
  run) start ;;
  delete) by_origin delete_queued delete_tpu_vm ;;
  logs)
    label=""
    if [[ "$slice$worker" == *all* ]]; then label=" label"; fi
    on_workers "$slice" "$worker" "$WORKER logs$label"
    ;;
  *) "$verb" ;;
esac
