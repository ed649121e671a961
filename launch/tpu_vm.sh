#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM, which is created first where --type is given:
#   launch/tpu_vm.sh --name=lumos --zone=us-west4-a [--project=P] [--type=v5litepod-16] [--dry-run] -- \
#     --config=configs/i2i.py --workdir=/mnt/runs/xl
# The repository goes to every worker as `git archive HEAD` has it. --workdir must be a directory that all workers share, as a
# bucket mounted with gcsfuse or a Filestore. --dry-run prints the commands instead of running them.
# The run is started again, LUMOS_RESTARTS times (10), when it loses a worker; it continues from its newest checkpoint.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name="" zone="" project="" type="" version="" dry=""
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    *) echo "error: unexpected argument '$1'; options of training go behind --" >&2 && exit 2 ;;
  esac
  shift
done
if [[ -z "$name" || -z "$zone" || $# -eq 0 ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi

run() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")

if [[ -n "$type" ]]; then
  if [[ -z "$version" ]]; then
    case $type in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      *) version=tpu-ubuntu2204-base ;;
    esac
  fi
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" --accelerator-type="$type" --version="$version"
fi

folder=$(mktemp -d)
archive=$folder/lumos_jax.tar.gz  # bash 3.2 and BSD tools, as macOS has them, run this script
trap 'rm -rf "$folder"' EXIT
[[ -n "$dry" ]] || git -C "$root" archive --format=tar.gz --output="$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:lumos_jax.tar.gz" "${where[@]}" --worker=all
run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
  --command="mkdir -p lumos_jax && tar -xzf lumos_jax.tar.gz -C lumos_jax"

# Workers find each other by the metadata of the TPU VM. 2 is a mistake on the command line: the same again would not help.
train="cd lumos_jax && launch/local.sh$(printf ' %q' "$@")"
restarts=${LUMOS_RESTARTS:-10}
for ((attempt = 0; attempt <= restarts; attempt++)); do
  code=0
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$train" || code=$?
  [[ $code -ne 0 && $code -ne 2 ]] || exit "$code"
  echo "ended with code $code; restart $((attempt + 1)) of $restarts" >&2
done
exit "$code"
