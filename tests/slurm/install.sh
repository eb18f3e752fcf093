#!/usr/bin/env bash
# What the tests of this folder need of the machine: root, for network namespaces, and Slurm, which Debian has.
set -euo pipefail
if [[ $(id -u) != 0 ]]; then
  echo "make test-slurm makes network namespaces and needs root" >&2
  exit 1
fi
missing=
for command in slurmctld slurmd munged sbatch ip; do
  command -v "$command" >/dev/null || missing+=" $command"
done
[[ -n $missing ]] || exit 0
if ! command -v apt-get >/dev/null; then
  echo "make test-slurm needs$missing: install Slurm, munge and iproute2" >&2
  exit 1
fi
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends slurm-wlm munge iproute2 >/dev/null
