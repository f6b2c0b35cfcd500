#!/usr/bin/env bash
# Trains on Google Kubernetes Engine: through xpk, which makes the cluster too, or with a JobSet and kubectl alone.
#
#   launch/gke.sh VERB [options] [-- arguments of hovle_jax.train]
#
#   cluster          makes a cluster with --slices node pools by xpk; the bucket is mounted in all its workloads
#   image            builds launch/Dockerfile and pushes it as --image
#   run              starts the training as an xpk workload
#   list             the workloads of the cluster, and their state
#   delete           ends a workload of xpk
#   delete-cluster   gives all machines back
#
#   manifest         prints launch/jobset.yaml with the options filled in
#   apply            starts it with kubectl
#   unapply          ends it
#
#   logs             follows the log of host 0 of slice 0, or of all hosts (--all)
#
#   --project --zone --cluster       where
#   --name NAME                      of the run
#   --accelerator TYPE               v5litepod-256 (v5e-256), v6e-256, v5p-128, v4-32, ...
#   --slices N                       of this type; 1 if not given
#   --image IMAGE                    as REGION-docker.pkg.dev/PROJECT/REPOSITORY/hovle_jax:TAG
#   --bucket BUCKET                  is mounted at /mnt/hovle: for --workdir, and for weights and data
#   --spot, --reservation NAME       what a cluster is made of; on demand if not given
#   --env NAME=VALUE                 for the training, as LIBTPU_INIT_ARGS=...; may be repeated
#   --service-account NAME           Kubernetes' own, which may read and write the bucket (manifest); default if not given
#   --dry-run                        prints the commands and runs nothing
#
# HOVLE_PROJECT, HOVLE_ZONE, HOVLE_CLUSTER, HOVLE_NAME, HOVLE_ACCELERATOR, HOVLE_SLICES, HOVLE_IMAGE and HOVLE_BUCKET
# stand for the options.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source-path=SCRIPTDIR source=accelerators.sh
source "$(dirname "${BASH_SOURCE[0]}")/accelerators.sh"

OPTIONS="project zone cluster name accelerator slices image bucket reservation service-account"
FLAGS="spot all"
LISTS="env"
MAX_RESTARTS=20
MOUNT_OPTIONS=implicit-dirs,rename-dir-limit=1000000,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0

project=${HOVLE_PROJECT:-} zone=${HOVLE_ZONE:-} cluster=${HOVLE_CLUSTER:-} name=${HOVLE_NAME:-}
accelerator=${HOVLE_ACCELERATOR:-} slices=${HOVLE_SLICES:-1} image=${HOVLE_IMAGE:-} bucket=${HOVLE_BUCKET:-}
reservation="" service_account=default spot=false all=false env=()
parse "$@"

on_cluster() { run xpk "$@" --cluster="$cluster" --project="$project" --zone="$zone"; }

cluster() {
  local capacity=--on-demand
  if $spot; then capacity=--spot; fi
  if [[ -n "$reservation" ]]; then capacity=--reservation=$reservation; fi
  on_cluster cluster create --tpu-type="$accelerator" --num-slices="$slices" "$capacity" \
    --enable-workload-identity --enable-gcsfuse-csi-driver
  on_cluster storage attach hovle --type=gcsfuse --bucket="$bucket" --mount-point="$MOUNT" --readonly=false \
    --auto-mount=true --size=1 --mount-options="$MOUNT_OPTIONS"
}

image() {
  run docker build --platform=linux/amd64 --build-arg=RUN_AS=root --file="$ROOT/launch/Dockerfile" --tag="$image" "$ROOT"
  run docker push "$image"
}

# Where one host is lost the others end with 1, or with 2 while they wait for it at the start; 75 is a run that was told to
# end where nothing could be saved: reasons to start again, as are those above 126 by default.
run_workload() {
  local variable flags=()
  for variable in ${env[@]+"${env[@]}"}; do flags+=(--env="$variable"); done
  on_cluster workload create --workload="$name" --tpu-type="$accelerator" --num-slices="$slices" --docker-image="$image" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1,2,75 --termination-grace-period-seconds=120 \
    ${flags[@]+"${flags[@]}"} --command="$(quote exec launch/pod.sh "${arguments[@]}")"
}

json_string() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\t'/\\t}
  printf '"%s"' "${text//$'\n'/\\n}"
}

json_arguments() {
  local argument items=""
  for argument in "${arguments[@]}"; do items+="${items:+, }$(json_string "$argument")"; done
  printf '[%s]' "$items"
}

json_environment() {
  local variable items=""
  for variable in ${env[@]+"${env[@]}"}; do
    items+="${items:+, }{\"name\": $(json_string "${variable%%=*}"), \"value\": $(json_string "${variable#*=}")}"
  done
  printf '[%s]' "$items"
}

# A substitution for sed: ${NAME} by a value.
fill() { printf "s|\${%s}|%s|" "$1" "$(printf '%s' "$2" | sed 's/[\\&|]/\\&/g')"; }

# The explanation at the top is for the template alone.
manifest() {
  local shape
  shape=$(topology "$accelerator")
  sed -e '/^#/d' -e "$(fill NAME "$(json_string "$name")")" -e "$(fill SLICES "$slices")" -e "$(fill HOSTS "$(hosts "$accelerator")")" \
    -e "$(fill CHIPS "$(chips_per_host "$accelerator")")" -e "$(fill ACCELERATOR "$(gke_accelerator "$accelerator")")" \
    -e "$(fill TOPOLOGY "$shape")" -e "$(fill IMAGE "$(json_string "$image")")" -e "$(fill BUCKET "$(json_string "$bucket")")" \
    -e "$(fill SERVICE_ACCOUNT "$(json_string "$service_account")")" -e "$(fill ENVIRONMENT "$(json_environment)")" \
    -e "$(fill ARGUMENTS "$(json_arguments)")" "$ROOT/launch/jobset.yaml"
}

apply() {
  local text
  text=$(manifest)
  if $dry_run; then
    printf "kubectl apply --filename=- <<'EOF'\n%s\nEOF\n" "$text"
  else
    printf '%s\n' "$text" | kubectl apply --filename=-
  fi
}

# A JobSet's pods carry its name, whoever made it; xpk's workloads are JobSets.
logs() {
  local selector=jobset.sigs.k8s.io/jobset-name=$name
  if $all; then
    run kubectl logs --follow --prefix --tail=50 --max-log-requests=2000 --selector="$selector"
  else
    run kubectl logs --follow --tail=50 \
      --selector="$selector,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  fi
}

XPK="install it: pip install xpk (it also wants gcloud and kubectl)"
KUBECTL="install it: https://cloud.google.com/kubernetes-engine/docs/how-to/cluster-access-for-kubectl"
case $verb in
  cluster) need project zone cluster accelerator bucket && need_tool xpk "$XPK" ;;
  image) need image && need_tool docker "install it, or build launch/Dockerfile elsewhere" ;;
  run) need project zone cluster name accelerator image && check_workdir && need_tool xpk "$XPK" ;;
  list | delete-cluster) need project zone cluster && need_tool xpk "$XPK" ;;
  delete) need project zone cluster name && need_tool xpk "$XPK" ;;
  manifest) need name accelerator image bucket && check_workdir ;;
  apply) need name accelerator image bucket && check_workdir && need_tool kubectl "$KUBECTL" ;;
  unapply | logs) need name && need_tool kubectl "$KUBECTL" ;;
  "") die "which of cluster, image, run, list, logs, delete, delete-cluster, manifest, apply, unapply? See launch/gke.sh --help" ;;
  *) die "unknown verb $verb: cluster, image, run, list, logs, delete, delete-cluster, manifest, apply or unapply" ;;
esac
check_number slices
if [[ -n "$accelerator" ]]; then accelerator=$(accelerator_type "$accelerator"); fi

case $verb in
  run) run_workload ;;
  list) on_cluster workload list ;;
  delete) on_cluster workload delete --workload="$name" ;;
  delete-cluster) on_cluster cluster delete ;;
  unapply) run kubectl delete jobset "$name" ;;
  *) "$verb" ;;
esac
