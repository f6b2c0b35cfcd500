# shellcheck shell=bash
# What the scripts of this folder share; sourced by them. Runs with bash 3.2 too, which is what macOS has.

# The mount point of the bucket on every machine.
# shellcheck disable=SC2034
MOUNT=/mnt/hovle
SCRIPT=${0##*/}
ROOT=$(cd "$(dirname "$0")/.." >/dev/null && pwd)
dry_run=false

die() {
  printf 'launch/%s: %s\n' "$SCRIPT" "$1" >&2
  exit 1
}

# The arguments as one line that a shell reads as they are.
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs a command; with --dry-run prints it.
run() {
  if $dry_run; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# A line between the commands of a dry run: when the next ones are run.
note() {
  if $dry_run; then printf '# %s\n' "$1"; fi
}

# The comment at the top of the script.
usage() {
  local line
  while IFS= read -r line; do
    case $line in
      '#!'*) ;;
      '#'*)
        line=${line#\#}
        printf '%s\n' "${line# }"
        ;;
      *) break ;;
    esac
  done <"$ROOT/launch/$SCRIPT"
}

# Reads "VERB [--option value | --option=value | --flag]... [-- ARGUMENTS]" into the variables `verb`, one for each
# option (--max-restarts: max_restarts) and `arguments`. The script names what it knows in OPTIONS and FLAGS; an option
# of LISTS may be repeated and makes an array.
parse() {
  verb="" arguments=()
  while (($#)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --dry-run) dry_run=true ;;
      --)
        shift
        arguments=("$@")
        return
        ;;
      --*=*) set_option "${1%%=*}" "${1#*=}" ;;
      --*)
        if is_one_of "${1#--}" "$FLAGS"; then
          set_option "$1" true
        else
          check_option "${1#--}"
          (($# > 1)) || die "$1 needs a value"
          set_option "$1" "$2"
          shift
        fi
        ;;
      *)
        [[ -z "$verb" ]] || die "'$1' is one word too many; what follows -- goes to hovle_jax.train"
        verb=$1
        ;;
    esac
    shift
  done
}

check_option() { is_one_of "$1" "$OPTIONS $FLAGS $LISTS" || die "unknown option --$1; see launch/$SCRIPT --help"; }

set_option() {
  local option=${1#--}
  check_option "$option"
  [[ -n "$2" ]] || die "$1 is empty"
  if is_one_of "$option" "$LISTS"; then
    eval "${option//-/_}+=(\"\$2\")"
  else
    printf -v "${option//-/_}" '%s' "$2"
  fi
}

is_one_of() { [[ " $2 " == *" $1 "* ]]; }

# Ends with one line that names every option that is needed and has no value.
need() {
  local option variable missing=""
  for option in "$@"; do
    variable=${option//-/_}
    if [[ -z "${!variable}" ]]; then
      missing+="${missing:+, }--$option (or HOVLE_$(printf '%s' "$variable" | tr '[:lower:]' '[:upper:]'))"
    fi
  done
  [[ -z "$missing" ]] || die "$verb needs $missing"
}

# Whether a tool is there; a dry run needs none.
need_tool() {
  $dry_run || command -v "$1" >/dev/null || die "$1 is not on PATH; $2"
}

check_number() {
  [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || die "--$1 ${!1} is not a number above 0"
}

# The --workdir of these training arguments; empty without one.
workdir_of() {
  local argument previous="" workdir=""
  for argument in "$@"; do
    case $argument in
      --workdir=*) workdir=${argument#*=} ;;
      *) if [[ "$previous" == --workdir ]]; then workdir=$argument; fi ;;
    esac
    previous=$argument
  done
  printf '%s' "$workdir"
}

# The training arguments must say where the checkpoints go: machines, and with them their disks, come and go.
check_workdir() {
  local workdir
  workdir=$(workdir_of ${arguments[@]+"${arguments[@]}"})
  [[ "$workdir" == /* || "$workdir" == gs://?* ]] || die "give the arguments of hovle_jax.train behind --, with a \
--workdir that outlives the machines and that all of them see, gs://BUCKET/runs or an absolute path: \
-- --config configs/instruct.py --workdir $MOUNT/runs"
}
