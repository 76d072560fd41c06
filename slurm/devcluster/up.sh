#!/usr/bin/env bash
# Starts a SLURM cluster on this machine, for tests and for trying things out; stop it with down.sh.
# Needs root (nodes get host names of their own, GPUs are fake devices) and Debian's slurm-wlm and munge (install.sh).
#   DEVCLUSTER=folder   where everything is kept (default: run/ beside this file); its path must be short
#   NODES=3 CPUS=4 MEMORY_MB=8000 GPUS=2   what each node claims to have
#   PORT=26817          the controller's; node N takes PORT + N, accounting the one after the nodes'
#   ACCOUNTING=1        with slurmdbd and a database of its own, limits enforced (default: off)
#   EXTRA_CONF='MaxArraySize=6'            more lines for slurm.conf
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${DEVCLUSTER:-$here/run}
port=${PORT:-26817} nodes=${NODES:-3} accounting=${ACCOUNTING:-} cpus=${CPUS:-4} memory=${MEMORY_MB:-8000} gpus=${GPUS:-2}
accounting_port=$((port + nodes + 1))
for program in slurmctld slurmd munged unshare ${accounting:+slurmdbd mariadbd}; do
    command -v "$program" >/dev/null || { echo "$program is not installed; run $here/install.sh" >&2; exit 1; }
done
[ "$(id -u)" -eq 0 ] || { echo "the cluster's nodes get host names of their own, which only root may give" >&2; exit 1; }
if [ -e "$folder/slurm.conf" ]; then
    echo "$folder holds a cluster already; stop it with $here/down.sh" >&2
    exit 1
fi
[ "${#folder}" -le 80 ] || { echo "$folder is too long a path for sockets; set DEVCLUSTER to a shorter one" >&2; exit 1; }
for number in $(seq "$port" "$accounting_port"); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$number") 2>/dev/null; then
        echo "port $number is taken, perhaps by another such cluster; stop that one or set PORT" >&2
        exit 1
    fi
done
give_up() { # leaves nothing running
    tail -n 3 "$folder"/log/*.log >&2 || true
    DEVCLUSTER=$folder "$here/down.sh"
}
trap give_up ERR
start_accounting() { # a database that none but this machine's root can reach, by a socket in a folder of its own
    local files=$folder/database
    (umask 077 && mkdir "$files" "$files/tables" && cat >"$folder/slurmdbd.conf" <<CONF
DbdHost=localhost
DbdPort=$accounting_port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/pid/munge.socket
PidFile=$folder/pid/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
CONF
    )
    local options=(--no-defaults --user=root --datadir="$files/tables" --log-error="$folder/log/mariadbd.log"
        --innodb-log-file-size=8M)
    # slurmdbd's procedures live in a system table
    { printf 'create database mysql;\nuse mysql;\n'; cat /usr/share/mysql/mysql_system_tables.sql; } |
        mariadbd "${options[@]}" --bootstrap 2>>"$folder/log/mariadbd.log"
    mariadbd "${options[@]}" --skip-networking --skip-grant-tables --socket="$files/socket" \
        --pid-file="$folder/pid/mariadbd.pid" --innodb-lock-wait-timeout=900 >/dev/null 2>&1 &
    for _ in $(seq 100); do [ -S "$files/socket" ] && break; sleep 0.1; done
    MYSQL_UNIX_PORT="$files/socket" slurmdbd
    for _ in $(seq 50); do sacctmgr --quiet --immediate add cluster devcluster >/dev/null 2>&1 && return; sleep 0.1; done
    echo "slurmdbd does not answer" >&2
    return 1
}
mkdir -p "$folder"/{devices,log,pid,spool,state}

(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
: >"$folder/gres.conf"
gres=
if [ "$gpus" -gt 0 ]; then
    for g in $(seq 0 $((gpus - 1))); do mknod "$folder/devices/gpu$g" c 1 3; done # SLURM takes nothing but devices
    echo "NodeName=dev[1-$nodes] Name=gpu File=$folder/devices/gpu[0-$((gpus - 1))]" >"$folder/gres.conf"
    gres="Gres=gpu:$gpus"
fi
{
    cat <<CONF
ClusterName=devcluster
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job starts when its old credential has expired: 120 s by default
AuthInfo=socket=$folder/pid/munge.socket,cred_expire=6
# never the numbers of a cluster that was here before
FirstJobId=$(($(date +%s) % 60000000))
MinJobAge=3600
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/pid/slurmctld.pid
SlurmdPidFile=$folder/pid/%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((memory / cpus))
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=500000,batch_sched_delay=0
SlurmdTimeout=20
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    if [ -n "$accounting" ]; then
        echo AccountingStorageType=accounting_storage/slurmdbd
        echo AccountingStorageHost=127.0.0.1
        echo AccountingStoragePort=$accounting_port
        echo "AccountingStoragePass=$folder/pid/munge.socket"
        echo AccountingStorageEnforce=associations,limits
    else
        echo AccountingStorageType=accounting_storage/none
    fi
    printf '%s\n' "${EXTRA_CONF:-}"
    for i in $(seq "$nodes"); do
        echo "NodeName=dev$i NodeHostname=dev$i NodeAddr=127.0.1.$i Port=$((port + i)) CPUs=$cpus" \
            "RealMemory=$memory $gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES LLN=YES MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
    echo "PartitionName=fragile Nodes=ALL MaxTime=1-0 PriorityTier=1 PreemptMode=CANCEL"
    echo "PartitionName=urgent Nodes=ALL MaxTime=1-0 PriorityTier=9 PreemptMode=OFF"
} >"$folder/slurm.conf"
for i in $(seq "$nodes"); do # torch's ranks meet at the name of the first node
    echo "127.0.1.$i dev$i # dynexit devcluster $folder" >>/etc/hosts
done
echo "export SLURM_CONF=$folder/slurm.conf" >"$folder/env.sh"
export SLURM_CONF="$folder/slurm.conf"

munged --socket="$folder/pid/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/pid/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"
[ -z "$accounting" ] || start_accounting
slurmctld
for i in $(seq "$nodes"); do
    unshare --uts sh -c "hostname dev$i && exec slurmd -N dev$i"
done
for _ in $(seq 300); do
    ready=$(sinfo --noheader --Node --partition main --states idle --format %N 2>/dev/null | sort -u | wc -l)
    [ "$ready" -eq "$nodes" ] && { echo "$nodes nodes are up; to use them: . $folder/env.sh"; exit 0; }
    sleep 0.2
done
echo "only $ready of $nodes nodes came up; the ends of their logs:" >&2
give_up
exit 1
