#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on a worker, where this checkout lies in the home directory.
#
#   worker.sh install [BUCKET]     makes .venv with the extras tpu and data; mounts gs://BUCKET at /mnt/hovle
#   worker.sh start ARGUMENTS      python -m hovle_jax.train ARGUMENTS in the background; survives the end of ssh;
#                                  its log is copied to WORKDIR/logs every minute
#   worker.sh status               one line: running, finished, stopped, failed with code N, not running
#   worker.sh logs [LABEL]         follows the log; LABEL: every line begins with the host's name
#   worker.sh stop                 ends the run
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

STATE=.launch
LOG=$STATE/log
STOP_SECONDS=120 # in which the last step is saved
LOG_SECONDS=60   # between two copies of the log

# The images of Cloud TPU have Python 3.10, which is too old: uv brings its own, and holds packages to their hashes.
# Newer systems let pip install for the user only where it is told so.
install() {
  mkdir -p "$STATE"
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv==0.13.9
  uv venv --quiet --allow-existing --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python --constraint requirements/py312.txt --editable '.[tpu,data]'
  printf '%s' "${1:-}" >"$STATE/bucket"
  mount_bucket
}

# The mount point belongs to root, so that nothing is written to the machine's own disk where the mount is gone.
# Nothing about files is cached: hosts write one checkpoint together and look for each other's files.
mount_bucket() {
  local bucket
  bucket=$(cat "$STATE/bucket" 2>/dev/null) || return 0
  if [[ -z "$bucket" ]] || mountpoint --quiet "$MOUNT"; then
    return 0
  fi
  command -v gcsfuse >/dev/null || install_gcsfuse
  sudo mkdir -p "$MOUNT"
  sudo gcsfuse -o allow_other --uid "$(id -u)" --gid "$(id -g)" --implicit-dirs --rename-dir-limit 1000000 \
    --metadata-cache-ttl-secs 0 --metadata-cache-negative-ttl-secs 0 "$bucket" "$MOUNT"
}

install_gcsfuse() {
  local keyring=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keyring" >/dev/null
  echo "deb [signed-by=$keyring] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y gcsfuse
}

# The run's processes are one group, named by its first process.
alive() { [[ -f "$STATE/pid" ]] && kill -0 -- "-$(cat "$STATE/pid")" 2>/dev/null; }

start() {
  ! alive || die "a run is going on on $(hostname) (process $(cat "$STATE/pid")): stop it first"
  mount_bucket
  mkdir -p "$STATE"
  rm -f "$STATE/code"
  printf '== %s %s\n' "$(date)" "$(quote python -m hovle_jax.train "$@")" >>"$LOG"
  # shellcheck disable=SC2016
  setsid bash -c 'code=0; "${@:2}" || code=$?; echo "$code" >"$1"' start "$STATE/code" \
    .venv/bin/python -m hovle_jax.train "$@" >>"$LOG" 2>&1 </dev/null &
  echo $! >"$STATE/pid"
  keep_log_of "$@"
  echo "$(hostname): started"
}

# Machines go, and their disks with them: the log is copied beside the run, now and then and at the end.
keep_log_of() {
  local workdir
  workdir=$(workdir_of "$@")
  case $workdir in
    /*) workdir=$workdir/logs ;;
    gs://*) workdir=${workdir%/}_logs ;; # beside it: hosts take what is in it
    *) return ;;
  esac
  setsid bash "$ROOT/launch/worker.sh" keep_log "$workdir" >/dev/null 2>&1 </dev/null &
}

keep_log() {
  local second
  while alive; do
    for ((second = 0; second < LOG_SECONDS; second++)); do
      if alive; then sleep 1; fi
    done
    case $1 in
      gs://*) gcloud storage cp --quiet "$LOG" "$1/$(hostname).log" || true ;;
      *) mkdir -p "$1" && cp "$LOG" "$1/$(hostname).log" || true ;;
    esac
  done
}

status() {
  local state="not running"
  if alive; then
    state="running"
  elif [[ -f "$STATE/code" ]]; then
    state=$(cat "$STATE/code")
    case $state in
      0) state="finished" ;;
      75 | 129 | 130 | 143) state="stopped" ;; # told to end before its last step; to be started again
      *) state="failed with code $state" ;;
    esac
  fi
  echo "$(hostname): $state"
}

stop() {
  local second
  alive || return 0
  kill -TERM -- "-$(cat "$STATE/pid")" 2>/dev/null || true
  for ((second = 0; second < STOP_SECONDS; second++)); do
    alive || return 0
    sleep 1
  done
  kill -KILL -- "-$(cat "$STATE/pid")" 2>/dev/null || true
}

logs() {
  if [[ -n "${1:-}" ]]; then
    tail -n 50 -F "$LOG" | sed -u "s/^/$(hostname): /"
  else
    tail -n 50 -F "$LOG"
  fi
}

case ${1:-} in
  install | start | status | stop | logs | keep_log) "$@" ;;
  *) usage ;;
esac
