# shellcheck shell=bash
# What is known about Cloud TPU's accelerator types; sourced.
# The number in a type counts chips for v5e and v6e, TensorCores (two a chip) for v4 and v5p.

# "v5e-256" is "v5litepod-256" to Cloud TPU. Ends with one line where the type does not exist.
accelerator_type() {
  local type=${1/#v5e-/v5litepod-}
  case $type in
    v5litepod-1 | v5litepod-4 | v5litepod-8 | v5litepod-16 | v5litepod-32 | v5litepod-64 | v5litepod-128 | v5litepod-256) ;;
    v6e-1 | v6e-4 | v6e-8 | v6e-16 | v6e-32 | v6e-64 | v6e-128 | v6e-256) ;;
    v4-* | v5p-*)
      if ! [[ "${type#*-}" =~ ^[1-9][0-9]*$ ]] || ((${type#*-} % 8)); then
        die "unknown accelerator $1: v4 and v5p count TensorCores, eight a host, as in v4-32 and v5p-128"
      fi
      ;;
    *) die "unknown accelerator $1; for example v5litepod-256 (or v5e-256), v6e-256, v5p-128, v4-32" ;;
  esac
  printf '%s' "$type"
}

# The software of the machines, from https://cloud.google.com/tpu/docs/runtimes.
runtime_version() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

# GKE's label of the nodes.
gke_accelerator() {
  case $1 in
    v5litepod-*) echo tpu-v5-lite-podslice ;;
    v5p-*) echo tpu-v5p-slice ;;
    v6e-*) echo tpu-v6e-slice ;;
    v4-*) echo tpu-v4-podslice ;;
  esac
}

# Chips as GKE's topology label has them.
topology() {
  case $1 in
    v5litepod-1 | v6e-1) echo 1x1 ;;
    v5litepod-4 | v6e-4) echo 2x2 ;;
    v5litepod-8 | v6e-8) echo 2x4 ;;
    v5litepod-16 | v6e-16) echo 4x4 ;;
    v5litepod-32 | v6e-32) echo 4x8 ;;
    v5litepod-64 | v6e-64) echo 8x8 ;;
    v5litepod-128 | v6e-128) echo 8x16 ;;
    v5litepod-256 | v6e-256) echo 16x16 ;;
    *-8) echo 2x2x1 ;;
    *-16) echo 2x2x2 ;;
    *-32) echo 2x2x4 ;;
    *-64) echo 2x4x4 ;;
    *-128) echo 4x4x4 ;;
    *-256) echo 4x4x8 ;;
    *-512) echo 4x8x8 ;;
    *-1024) echo 8x8x8 ;;
    *-2048) echo 8x8x16 ;;
    *-4096) echo 8x16x16 ;;
    *) die "the topology of $1 is not known here; launch/gke.sh run finds it by xpk" ;;
  esac
}

# Chips of one host on GKE's machines for training: four, or the only one.
chips_per_host() {
  case $1 in
    v5litepod-1 | v6e-1) echo 1 ;;
    *) echo 4 ;;
  esac
}

hosts() {
  local chips=${1#*-}
  case $1 in v4-* | v5p-*) chips=$((chips / 2)) ;; esac
  echo $((chips / $(chips_per_host "$1")))
}
