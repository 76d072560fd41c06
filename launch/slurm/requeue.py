"""The shell script around the ranks of a SLURM job, and the program by which it asks whether to requeue.

    python -m launch.slurm.requeue FOLDER/JOB RESTART NODES STATUS SECONDS LIMITS SCRIPT

prints what the script is to do: `requeue` or `end`, the exit status, and the nodes to avoid.
"""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dynexit.errors import Failure
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
    arguments = f'"$job" "$restart" "$node" "$status" "$SECONDS" {text} "$0"'
    return [
        "status=$?",
        f"answer=$({python} -m launch.slurm.requeue {arguments} | tail -n 1)",
        'read -r action code avoid <<< "${answer:-end $status}"',
        'if [ -z "$answer" ] && [ "$status" -ne 0 ]; then',
        f'  [ "$restart" -lt {limits.max_retries} ] && action=requeue',
        """  printf '{"reason": "crashed", "status": %d, "node": "%s"}\\n' "$status" "$node" >> "$job.jsonl\"""",
        "fi",
        "for try in {1..12}; do  # a minute: the controller may be restarted",
        '  [ "$action" = requeue ] && [ ! -e "$job.cancelled" ] || break',
        "  trap '' TERM  # a requeue ends this script, and only then ExcNodeList can be set",
        '  scontrol requeue "$this" && break',
        "  sleep 5",
        "done",
        '[ -z "$avoid" ] || scontrol update JobId="$this" ExcNodeList="$avoid"',
        'exit "$code"',
    ]


def _can_run_elsewhere(avoid: str, script: str) -> bool:
    """Whether other nodes can run the script. False in a container without sbatch."""
    command = ["sbatch", "--test-only", f"--exclude={avoid}", script]
    return bool(shutil.which("sbatch")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    job, restart, node, status, seconds, limits, script = sys.argv[1:]
    try:
        found = settle(Path(job), int(restart), node, int(status), float(seconds), RequeueLimits(**json.loads(limits)))
    except Failure as damage:  # the script decides alone
        sys.exit(str(damage))
    if not (found.requeue and found.avoid and _can_run_elsewhere(found.avoid, script)):
        found = dataclasses.replace(found, avoid="")
    print(found)
