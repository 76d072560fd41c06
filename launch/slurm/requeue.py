"""The shell script around the ranks of a SLURM job, and the program by which it asks whether to requeue.

    python -m launch.slurm.requeue FOLDER/JOB RESTART NODES STATUS SECONDS LIMITS

prints what the script is to do: `requeue` or `end`, the exit status, and the nodes to avoid.
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

from launch.tasks.decision import RequeueLimits, settle


def script_before(folder: Path) -> list[str]:
    """The shell lines before the ranks, after a site's own: they note the start."""
    return [
        "set +eu +o pipefail  # a site's lines may have set these",
        "trap : USR2  # for the ranks; `scancel --full` sends it to this script too",
        "trap 'exit 143' TERM  # cancelled, or requeued by SLURM",
        # one task of an array has the array's SLURM_JOB_ID, which would requeue them all
        'this="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        f'job={shlex.quote(str(folder))}/"$this"',
        'restart="${SLURM_RESTART_COUNT:-0}" node="$SLURM_JOB_NODELIST" start=$(date +%FT%T)',
        """printf '{"start": "%s", "restart": %d, "node": "%s"}\\n' "$start" "$restart" "$node" >> "$job.jsonl\"""",
    ]


def script_after(python: str, limits: RequeueLimits) -> list[str]:
    """The shell lines after the ranks: they ask for the decision and carry it out.

    Their only own decision is for a batch host without the interpreter.
    """
    text = shlex.quote(json.dumps(dataclasses.asdict(limits)))
    arguments = f'"$job" "$restart" "$node" "$status" "$SECONDS" {text}'
    return [
        "status=$?",
        f"answer=$({python} -m launch.slurm.requeue {arguments} | tail -n 1)",
        'read -r action code avoid <<< "${answer:-end $status}"',
        'if [ -z "$answer" ] && [ "$status" -ne 0 ]; then',
        f'  [ "$restart" -lt {limits.max_retries} ] && action=requeue',
        """  printf '{"reason": "crashed", "status": %d, "node": "%s"}\\n' "$status" "$node" >> "$job.jsonl\"""",
        "fi",
        'if [ "$action" = requeue ]; then',
        "  trap '' TERM  # a requeue ends this script, and only then ExcNodeList can be set",
        '  [ -z "$avoid" ] || sbatch --test-only --exclude="$avoid" "$0" >/dev/null 2>&1 || avoid=',
        "  for try in $(seq 12); do  # the controller may be restarted",
        '    [ -e "$job.cancelled" ] && break',
        '    if scontrol requeue "$this"; then',
        '      [ -z "$avoid" ] || scontrol update JobId="$this" ExcNodeList="$avoid"',
        '      exit "$code"',
        "    fi",
        "    sleep 5",
        "  done",
        "fi",
        'exit "$code"',
    ]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    limits = RequeueLimits(**json.loads(arguments[5]))
    job, restart, node = Path(arguments[0]), int(arguments[1]), arguments[2]
    print(settle(job, restart, node, int(arguments[3]), float(arguments[4]), limits))
