#!/bin/sh
# A Slurm of one node on this machine (Debian's slurm-wlm and munge), for tests/cluster. As root:
#   apt-get install -y slurm-wlm munge && tests/cluster/one_node_slurm.sh start
#   tests/cluster/one_node_slurm.sh stop
# The configuration stands in its default place, because srun inside a job does not see SLURM_CONF.
# It is written only where there is none, or where this script wrote it.
set -eu
CONF=/etc/slurm/slurm.conf
STATE=/var/spool/circuit-slurm
MARK='# written by circuit tests/cluster/one_node_slurm.sh'

start() {
    if [ -s "$CONF" ] && ! head -n 1 "$CONF" | grep -qF "$MARK"; then
        echo "$CONF is somebody else's: nothing is touched" >&2
        exit 2
    fi
    node=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p /etc/slurm "$STATE/ctld" "$STATE/d" /run/munge /var/log/munge
    cat >"$CONF" <<CONF
$MARK
ClusterName=circuit
SlurmctldHost=$node
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MinJobAge=600
ReturnToService=2
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/d
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
NodeName=$node CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
    [ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2>/dev/null
    chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
    chmod 400 /etc/munge/munge.key
    munge -n >/dev/null 2>&1 || setpriv --reuid munge --regid munge --clear-groups munged --force
    slurmctld
    slurmd
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        if sinfo --noheader --format %T 2>/dev/null | grep -qE 'idle|mixed|allocated'; then
            sinfo
            exit 0
        fi
        sleep 1
    done
    tail -n 5 "$STATE"/*.log >&2
    exit 1
}

stop() {
    for name in slurmd slurmctld; do
        if [ -s "$STATE/$name.pid" ]; then kill "$(cat "$STATE/$name.pid")" || true; fi
    done
    # a configuration without a daemon makes every Slurm command, and with them Snakemake, wait
    if head -n 1 "$CONF" 2>/dev/null | grep -qF "$MARK"; then rm "$CONF"; fi
}

case "${1-}" in
start) start ;;
stop) stop ;;
*) sed -n '2,6p' "$0" && exit 2 ;;
esac
