#!/usr/bin/env bash
# Runs the digits study on the cluster in one folder and stops the cluster at the end. Argument: the program dynexit.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
dynexit=${1:-dynexit}
study=(configs/digits.yaml name=digits-slurm dist.members_per_pack=4 dist.num_threads=1)
"$here/up.sh"
trap '"$here/down.sh"' EXIT
. "${DEVCLUSTER:-$here/run}/env.sh"
"$dynexit" run "${study[@]}" --on slurm --site slurm/sites/devcluster.yaml
while [ -n "$(squeue --me --noheader)" ]; do
    sleep 30
    date +%T
    "$dynexit" status "${study[@]}"
done
"$dynexit" run "${study[@]}" # all is done: prints the result
