#!/usr/bin/env bash
# A real Slurm on this one machine, for tests: one node with two CPUs, no accounting.
#
#   mini_slurm.sh start DIR | stop DIR | reboot DIR
#
# reboot kills the node's daemon and starts it anew, as after a crash of the node.
#
# Needs slurmctld, slurmd, munged (Debian: slurm-wlm, munge) and root. After `start`,
# SLURM_CONF=DIR/slurm.conf is all that sinfo, srun, sbatch, squeue and scancel need. The
# partition `main` may be preempted by `urgent`, with 20 seconds of grace; `short` allows
# jobs of 10 minutes.
set -euo pipefail

what=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)

stop() {
  for name in slurmd slurmctld munged; do
    if [ -f "$dir/$name.pid" ]; then
      kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
    fi
  done
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

if [ "$what" = stop ]; then
  stop
  exit 0
fi
if [ "$what" = reboot ]; then
  kill -9 "$(cat "$dir/slurmd.pid")"
  SLURM_CONF=$dir/slurm.conf slurmd -f "$dir/slurm.conf" > /dev/null 2>&1
  exit 0
fi

host=$(hostname -s)
mkdir -p "$dir"/{state,spool,log}
chmod 711 "$dir"
head -c 1024 /dev/urandom > "$dir/munge.key"
chmod 400 "$dir/munge.key"

# cred_expire: a requeued job waits that long, 120 seconds by default. BatchStartTimeout
# and ten seconds: a younger job is not missed when its node comes back without it.
# CPUs=2 on whatever there is: the tests count on two jobs at once, and a third waiting.
cat > "$dir/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
ReturnToService=2
BatchStartTimeout=1
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=short Nodes=$host MaxTime=10 State=UP PriorityTier=1
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF=$dir/slurm.conf

munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" \
  --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" \
  --seed-file="$dir/munged.seed"
# Absolute paths: the daemons change their directory.
slurmctld -f "$SLURM_CONF"
for _ in $(seq 50); do
  scontrol ping 2>/dev/null | grep -q UP && break
  sleep 0.2
done
slurmd -f "$SLURM_CONF"
for _ in $(seq 60); do
  sinfo -h -t idle 2>/dev/null | grep -q idle && exit 0
  sleep 0.5
done
echo "Slurm did not come up; see $dir/log." >&2
tail -n 5 "$dir"/log/*.log >&2
stop
exit 1
