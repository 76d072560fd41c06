#!/usr/bin/env bash
# Installs Debian's SLURM, munge and a database for accounting where they are missing, without starting their services.
set -euo pipefail
for program in slurmctld slurmd munged sbatch srun slurmdbd mariadbd; do command -v "$program" >/dev/null || missing=1; done
[ -n "${missing:-}" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "SLURM is not installed; ask for: apt-get install --no-install-recommends slurm-wlm munge slurmdbd mariadb-server-core" >&2
    exit 1
fi
policy=/usr/sbin/policy-rc.d # what Debian asks before it starts a service
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge slurmdbd mariadb-server-core >/dev/null
