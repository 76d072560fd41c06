#!/usr/bin/env bash
# Stops the cluster that up.sh started in DEVCLUSTER (default: run/ beside this file) and removes its folder.
set -uo pipefail
folder=${DEVCLUSTER:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/run}
[ -e "$folder/slurm.conf" ] || exit 0
export SLURM_CONF="$folder/slurm.conf"

ended() { ! grep -qs '^State:.[^ZX]' "/proc/$1/status"; }
stop() { # PIDFILE NAME: only a process that still has the daemon's name
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] || return 0
    kill "$pid"
    for _ in $(seq 100); do ended "$pid" && return 0; sleep 0.1; done
    kill -9 "$pid"
}

mapfile -t jobs < <(timeout 10 squeue --noheader --format %A 2>/dev/null | sort -u)
if [ "${#jobs[@]}" -gt 0 ]; then
    timeout 20 scancel "${jobs[@]}"
    for _ in $(seq 150); do [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break; sleep 0.1; done
fi
for file in "$folder"/pid/dev*.pid; do stop "$file" slurmd; done
for process in /proc/[0-9]*; do # what a slurmd that was killed left running
    if grep -qszx "SLURM_CONF=$SLURM_CONF" "$process/environ" && { grep -qsz '^SLURM_JOB_ID=' "$process/environ" ||
        [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ]; }; then
        kill -9 "${process#/proc/}"
    fi
done
stop "$folder/pid/slurmctld.pid" slurmctld
stop "$folder/pid/slurmdbd.pid" slurmdbd
stop "$folder/pid/mariadbd.pid" mariadbd
stop "$folder/pid/munged.pid" munged
kept=$(grep -vF "# dynexit devcluster $folder" /etc/hosts) && printf '%s\n' "$kept" >/etc/hosts # in place: it may be a mount
rm -rf "$folder"
