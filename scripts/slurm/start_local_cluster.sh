#!/usr/bin/env bash
# A real SLURM on this one machine, for tests and for trying: no systemd, nothing written outside of its own folder.
# Needs Debian's or Ubuntu's packages (apt-get install --no-install-recommends slurm-wlm munge) and root.
# Usage: bash scripts/slurm/start_local_cluster.sh [--folder FOLDER] [--cpus N] [--memory MIB] [--gpus N] [--nodes N]
#        source FOLDER/environment        then sinfo, sbatch, srun, squeue, scancel talk to it
#        bash scripts/slurm/start_local_cluster.sh --stop [--folder FOLDER]
# A cluster that already answers is left as it is. FOLDER is ${TMPDIR:-/tmp}/voxfit-slurm by default.
# --gpus N makes N that are only counted: no device stands behind them, but jobs that ask for some can be tried.
# --nodes N shares this machine's CPUs and memory out to N nodes, for jobs over several. Nobody can look up their names, so
# what listens for others there is told MASTER_ADDR=127.0.0.1.
# Exit codes: 0 it answers; 2 wrong options; 69 it cannot run here (the reason is on standard error).
set -euo pipefail

folder="${TMPDIR:-/tmp}/voxfit-slurm" cpus="$(env -u OMP_NUM_THREADS nproc)" memory="" gpus=0 nodes=1 stop=""
while [ $# -gt 0 ]; do
    case "$1" in
        --stop) stop=yes; shift; continue ;;
        --folder | --cpus | --memory | --gpus | --nodes) [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;
        *) echo "error: unknown option $1; the head of $0 tells which there are" >&2; exit 2 ;;
    esac
    case "$1" in
        --folder) folder="$2" ;;
        --cpus) cpus="$2" ;;
        --memory) memory="$2" ;;
        --gpus) gpus="$2" ;;
        --nodes) nodes="$2" ;;
    esac
    shift 2
done
folder="$(realpath -m "$folder")"
export SLURM_CONF="$folder/slurm.conf"
memory="${memory:-$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)}"

cannot() {
    echo "no local SLURM: $1" >&2
    exit 69
}

# end PROGRAM [NAME]: ends a daemon by the process id that it wrote, if that is still the same program.
end() {
    local name="$1" pid
    pid="$(cat "$folder/${2:-$name}.pid" 2> /dev/null || true)"
    [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2> /dev/null)" = "$name" ] || return 0
    kill "$pid" 2> /dev/null || true
    for _ in $(seq 50); do
        # What has ended may stay a zombie (Z) for a while where the first process of a container does not collect it.
        [ -d "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status" 2> /dev/null || return 0
        sleep 0.1
    done
    kill -9 "$pid" 2> /dev/null || true
}

stop_all() {
    if [ -e "$SLURM_CONF" ] && answers; then
        scancel --user "$(id -un)" 2> /dev/null || true
    fi
    for file in "$folder"/slurmd-*.pid; do
        end slurmd "$(basename "$file" .pid)"
    done
    end slurmctld
    end munged
    rm -rf "$folder/state" "$folder/spool"
    rm -f "$folder"/*.pid "$folder"/munge.* "$folder/jobs.txt" "$folder/environment" "$SLURM_CONF" "$folder"/{cgroup,gres}.conf
}

# All of its nodes take jobs; a stale folder has a configuration but nobody who answers.
answers() {
    local states
    states="$(timeout 10 scontrol show node --oneliner 2> /dev/null)" && [ -n "$states" ] &&
        ! grep -Evq 'State=(IDLE|MIXED|ALLOCATED)( |$)' <<< "$states"
}

if [ -n "$stop" ]; then
    stop_all
    exit 0
fi
[ "$(uname -s)" = Linux ] || cannot "it runs on Linux only"
[ "$(id -u)" = 0 ] || cannot "slurmd starts jobs as other users and has to be started by root"
for program in munged slurmctld slurmd sbatch scontrol; do
    command -v "$program" > /dev/null ||
        cannot "$program is not installed: apt-get install --no-install-recommends slurm-wlm munge"
done
[ "${#folder}" -le 90 ] || cannot "the folder's name is too long for a socket, which has 107 characters at most: $folder"
if [ -e "$SLURM_CONF" ] && answers; then
    echo "it is running already: source $folder/environment"
    exit 0
fi
[ ! -e "$folder" ] || stop_all
mkdir -p "$folder/state" "$folder/spool"

# Ports that nobody listens on now, so that it does not meet another cluster of this machine.
free_ports() {
    local used port found=0
    used="$(awk 'NR > 1 {split($2, a, ":"); print a[2]}' /proc/net/tcp /proc/net/tcp6 2> /dev/null)"
    for port in $(shuf -i 20000-29999 -n 40); do
        grep -qix "$(printf '%04X' "$port")" <<< "$used" && continue
        echo "$port"
        found=$((found + 1))
        [ "$found" -le "$nodes" ] || return 0
    done
}
mapfile -t ports < <(free_ports)
host="$(hostname -s)" names=("$(hostname -s)")
[ "$nodes" = 1 ] || mapfile -t names < <(seq --format 'node%g' "$nodes")
[ "$nodes" -le "$cpus" ] || cannot "$nodes nodes need $nodes CPUs, and there are $cpus"

head -c 1024 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
# --force: it runs as root and from a folder of the user's choice, which is right for one machine and a trial only.
munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
    --log-file "$folder/munged.log" --seed-file "$folder/munge.seed" --num-threads 2 2> "$folder/munged.stderr" ||
    cannot "munged did not start: $(tail -n 1 "$folder/munged.stderr")"

# proctrack/linuxproc and task/none need no cgroups, which a container seldom lets one make.
# cred_expire is also how long a requeued job waits before it starts again (120 s by default).
cat > "$SLURM_CONF" << CONF
ClusterName=voxfit
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/jobs.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,batch_sched_delay=0,defer_batch
SchedulerType=sched/builtin
ReturnToService=2
MinJobAge=86400
JobRequeue=1
RebootProgram=/bin/false
GresTypes=gpu
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
for number in "${!names[@]}"; do
    echo "NodeName=${names[$number]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$((number + 1))]} \
CPUs=$((cpus / nodes)) RealMemory=$((memory / nodes)) Gres=gpu:$gpus State=UNKNOWN" >> "$SLURM_CONF"
done
if [ "$gpus" -gt 0 ]; then
    # A GPU needs a file to be counted; an empty one stands in for the device.
    for number in $(seq 0 $((gpus - 1))); do
        : > "$folder/spool/gpu$number"
        echo "Name=gpu File=$folder/spool/gpu$number" >> "$folder/gres.conf"
    done
else
    sed -i -e '/^GresTypes/d' -e 's/ Gres=gpu:0//' "$SLURM_CONF"
fi
echo "CgroupPlugin=cgroup/v1" > "$folder/cgroup.conf"
echo "export SLURM_CONF=$SLURM_CONF" > "$folder/environment"

slurmctld || cannot "slurmctld did not start: see $folder/slurmctld.log"
for node in "${names[@]}"; do
    mkdir -p "$folder/spool/$node"
    slurmd -N "$node" || cannot "slurmd did not start: see $folder/slurmd.log"
done
for _ in $(seq 60); do
    if answers; then
        echo "source $folder/environment"
        exit 0
    fi
    sleep 0.5
done
cannot "the node does not take jobs after 30 s: see $folder/slurmctld.log and $folder/slurmd.log"
