"""The shell lines around the ranks in a SLURM job's script: they note its starts and ends and requeue it."""

import shlex
from pathlib import Path

from dynexit.study.schema import DistSettings
from launch.slurm.notes import CANCELLED, CRASHED, IN_NOTED, OR_CRASHED, PARTLY_FAILED, PREEMPTED, RUN, TIMED_OUT
from launch.slurm.worker import EARLY_SECONDS, STOPPED, ClusterTask

_LOST_TRIES = 120  # of a file system, every 5 seconds
_AWAY_TRIES = 720  # of a controller
_REFUSALS = 12  # by a controller that is there
_LATE_SECONDS = 5  # from a script's end to SLURM's word of it
_MANY = 1_000_000
_NOTED_RUN = f'"$(grep -ox "[0-9]*" "$job.{RUN}" 2>/dev/null || echo 0)"'  # empty on a full disk

# sbatch also refuses a trial where the queue is as full as a user's limit allows. Then: enough nodes like this job's,
# unless it may use some nodes only, of which sinfo says nothing
_ARE_OTHERS = r"""are_others() {
  refusal=$(sbatch --test-only --exclude="$avoided" "$0" 2>&1) && return
  [[ $refusal == *"accounting/QOS policy"* ]] && [ -z "$SLURM_JOB_RESERVATION" ] || return
  answer | grep "ReqNodeList=(null)" >/dev/null || return
  sinfo -hNp "$SLURM_JOB_PARTITION" -o "%N %t %c %m %f %G" 2>/dev/null |
    awk -v mine="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs)" -v least="${SLURM_JOB_NUM_NODES:-1}" \
      -v out="$(scontrol show hostnames "$avoided" | xargs)" '
      BEGIN { split(mine, a); for (i in a) own[a[i]]; split(out, b); for (i in b) avoided[b[i]] }
      { kind = $3 " " $4 " " $5 " " $6 }
      $1 in own { kinds[kind] }
      !($1 in avoided) && $2 ~ /^(idle|mix|alloc|comp|plnd)[-~#]?$/ { up[$1] = kind }
      END { for (name in up) others += up[name] in kinds; exit others < least }'
}"""


def script_after(task: ClusterTask, dist: DistSettings, exclude: str = "") -> list[str]:
    """The shell lines that follow the ranks in a job's script: note how they ended, requeue up to the limits.

    A job that crashed is to avoid the nodes it crashed on (and `exclude`), where it could run without them.
    """
    in_time = int(task.time_limit_seconds - task.signal_delay_seconds - EARLY_SECONDS)
    avoided = shlex.quote(exclude + ",") if exclude else ""
    return [
        "status=$?",
        _ARE_OTHERS,
        # a lost file system comes back after a while, and nothing can be noted before
        f'for try in $(seq {_LOST_TRIES}); do [ -z "$mark" ] || [ -e "$mark" ] && break; sleep 5; done',
        'cd "$PWD" 2>/dev/null',  # which may be of the mount before
        # SLURM takes one whose end it hears of after its time for timed out, and with that ends what waits for it
        '[ "$status" -eq 0 ] && ! is_over && exit 0',
        # SLURM took this node for dead, and the job runs on another
        f'[ {_NOTED_RUN} -gt "$run" ] && exit "$status"',
        f'[ "$status" -eq 0 ] && why={TIMED_OUT} || why={CRASHED}',
        # SIGUSR2 before the program could take it
        f'[ "$status" -eq 140 ] && {{ [ "$SECONDS" -lt {in_time} ] && why={PREEMPTED} || why={TIMED_OUT}; }}',
        'why=$(cat "$job.why" 2>/dev/null || echo "$why")',
        'rm -f "$job.why"',
        # srun ends the ranks beside one that was killed, and they cannot know it from a preemption
        f"case $status,$why in 0,*|{STOPPED},*|140,*|143,*) ;; *[{OR_CRASHED}]) why={CRASHED} ;; esac",
        f'why="${{why%[{OR_CRASHED}]}}"',
        f'part=; [ -e "$job.now" ] && part="{IN_NOTED}"; [ -s "$job.now" ] && part=" in part $(cat "$job.now")"',
        f'[ "$why" = {CRASHED} ] || part=',
        f'tries={dist.max_retries}; [ -z "$part" ] || tries={_MANY}; [ ! -e "$job.last" ] || tries=0',
        'rm -f "$job.now" "$job.last"',
        f"case $why in {TIMED_OUT}) most={dist.max_timeouts} ;; {PREEMPTED}) most={dist.max_preemptions} ;;",
        # each of the task's jobs has its own tries, and the program leaves out one that has used them up
        f"  {CRASHED}) most=$tries ;;",
        f"  {PARTLY_FAILED}) most={_MANY} ;; *) most=0 ;; esac  # each time there is a job less to do",
        # what cannot be noted, as on a full disk, would not be counted either
        'echo "$why $(date +%FT%T) on ${SLURM_JOB_NODELIST:-?} with exit status $status$part" >> "$job.ends" || most=0',
        'if [ "$most" -gt 0 ] && [ "$(grep -c "^$why .* status [0-9]*$" "$job.ends")" -le "$most" ]; then',
        f"  avoided={avoided}$SLURM_JOB_NODELIST",
        f'  [ "$why" = {CRASHED} ] && are_others || avoided=',
        "  trap '' TERM  # a requeue ends this script, and a job can be told what to avoid only after it",
        "  refused=0",
        f"  for try in $(seq {_AWAY_TRIES}); do  # the controller may be away for a while",
        f'    ! grep -q "^{CANCELLED} " "$job.ends" || break  # a requeue would bring it back',
        '    if scontrol requeue "$this"; then',
        '      [ -z "$avoided" ] || scontrol update JobId="$this" ExcNodeList="$avoided"',
        '      exit "$status"',
        "    fi",
        f'    scontrol show job "$this" >/dev/null 2>&1 && [ $((refused += 1)) -ge {_REFUSALS} ] && break',
        "    sleep 5",
        "  done",
        "fi",
        '[ -e "$job.some" ] && exit 0  # there is something to record, and that waits for this job',
        'exit "$status"',
    ]


def script_before(folder: Path) -> list[str]:
    """The shell lines that go before the ranks, after a site's own: where this job notes how it ended."""
    return [
        "set +eu +o pipefail",  # a site's lines may have set these; what follows the ranks must be come to
        "trap : USR2",  # for the ranks, and sent to this script too by `scancel --full`
        # one task of an array has the array's SLURM_JOB_ID, which would requeue them all
        'this="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}"',
        "answer() {",
        "  command -v scontrol >/dev/null || return",
        f'  for try in $(seq {_AWAY_TRIES}); do scontrol show job "$this" 2>/dev/null && break; sleep 5; done',
        "}",
        "is_over() {",
        "  end=$(answer | sed -n 's/.* EndTime=\\(20[^ ]*\\).*/\\1/p')",
        f'  [ -n "$end" ] && [ "$(date +%s)" -ge $(($(date -d "$end" +%s) - {_LATE_SECONDS})) ]',
        "}",
        # the end of its time, too, where no signal told of it, as from a controller that was away
        # (not grep -q, which leaves before it has read all, and scontrol would fail and be asked again)
        """trap 'answer | grep "Reason=TimeLimit " >/dev/null || exit 143' TERM""",
        f'job={shlex.quote(str(folder))}/"$this"',
        'mark="${job}_submitted.pkl"; [ -e "$mark" ] || mark=',  # there as long as the file system is
        f'run=${{SLURM_RESTART_COUNT:-0}}; [ {_NOTED_RUN} -gt "$run" ] || echo "$run" > "$job.{RUN}"',
        # submitit refuses to write over what a kill left of its own
        'rm -f "$job.why" "$job.now" "$job.last" "$job"_*_result.pkl.save_tmp',
        'echo "$(date +%FT%T) on ${SLURM_JOB_NODELIST:-?}" >> "$job.starts"',
    ]
