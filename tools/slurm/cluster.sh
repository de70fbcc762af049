#!/bin/bash
# A real Slurm of two nodes on this machine, for trying job scripts: one controller and two slurmd, each with a network,
# a host name and an /etc/hosts of its own. Needs root and Debian's packages slurm-wlm and munge, nothing else; no GPU
# is needed: nodes claim four, which are null devices.
#
#     tools/slurm/cluster.sh up FOLDER            # FOLDER gets configuration, logs and spool
#     tools/slurm/cluster.sh run FOLDER CMD ...   # CMD on the controller: sbatch, squeue, ...
#     tools/slurm/cluster.sh down FOLDER
#
# Processes are tracked by cgroups (v1 freezer), as production sites do: srun's signals reach tasks otherwise than with
# other plugins. KILL_WAIT (seconds between SIGTERM and SIGKILL, 15), GRACE (of preempted jobs, 20) and REQUEUE_DELAY
# (seconds before a requeued job starts again, 5) are read by `up`.
set -euo pipefail

NODES=2 NETWORK=10.86.7 GPUS=4

say() { echo "cluster.sh: $*" >&2; }

check_machine() {
  [ "$(id -u)" = 0 ] || { say "needs root, for namespaces and slurmd"; exit 2; }
  local missing=()
  for program in slurmctld slurmd munged ip nsenter unshare; do
    [ -n "$(find_program "$program")" ] || missing+=("$program")
  done
  [ ${#missing[@]} = 0 ] || { say "not there: ${missing[*]} (Debian: slurm-wlm munge iproute2 util-linux)"; exit 2; }
}

find_program() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" || true; }

write_configuration() {
  mkdir -p "$FOLDER"/{etc,log,run,spool/controller,devices}
  {
    echo "127.0.0.1 localhost"
    echo "$NETWORK.100 controller"
    for node in $(seq "$NODES"); do echo "$NETWORK.$node n$node"; done
  } > "$FOLDER/etc/hosts"
  for gpu in $(seq 0 $((GPUS - 1))); do
    [ -e "$FOLDER/devices/gpu$gpu" ] || mknod -m 666 "$FOLDER/devices/gpu$gpu" c 1 3
  done
  echo "NodeName=n[1-$NODES] Name=gpu File=$FOLDER/devices/gpu[0-$((GPUS - 1))]" > "$FOLDER/etc/gres.conf"
  cat > "$FOLDER/etc/cgroup.conf" <<END
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
CgroupPlugin=cgroup/v1
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
END
  cat > "$FOLDER/etc/slurm.conf" <<END
ClusterName=megakd
SlurmctldHost=controller($NETWORK.100)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPidFile=$FOLDER/run/slurmctld.pid
SlurmdPidFile=$FOLDER/run/slurmd.%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
StateSaveLocation=$FOLDER/spool/controller
SlurmdSpoolDir=$FOLDER/spool/%n
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,requeue_delay=${REQUEUE_DELAY:-5}
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=900
KillWait=${KILL_WAIT:-15}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=7200
JobCompType=jobcomp/filetxt
JobCompLoc=$FOLDER/log/jobs.txt
GresTypes=gpu
NodeName=n[1-$NODES] NodeAddr=$NETWORK.[1-$NODES] CPUs=32 RealMemory=100000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=batch Nodes=n[1-$NODES] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=${GRACE:-20}
PartitionName=urgent Nodes=n[1-$NODES] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
}

# in_host NAME CMD ...: CMD in the network of a host, with its name and its /etc/hosts
in_host() {
  local host=$1
  shift
  # shellcheck disable=SC2016  # expanded by the inner shell
  nsenter --net="/run/netns/megakd-$host" unshare --mount --uts --propagation private bash -c '
    mount --bind "$1/etc/hosts" /etc/hosts
    hostname "$2"
    export SLURM_CONF=$1/etc/slurm.conf PATH=$PATH:/usr/sbin
    shift 2
    exec "$@"' in_host "$FOLDER" "$host" "$@"
}

make_network() {
  ip netns add megakd-controller
  ip -n megakd-controller link set lo up
  ip -n megakd-controller link add bridge type bridge
  ip -n megakd-controller address add "$NETWORK.100/24" dev bridge
  ip -n megakd-controller link set bridge up
  for node in $(seq "$NODES"); do
    ip netns add "megakd-n$node"
    ip -n "megakd-n$node" link set lo up
    ip -n megakd-controller link add "to-n$node" type veth peer name eth0 netns "megakd-n$node"
    ip -n megakd-controller link set "to-n$node" master bridge up
    ip -n "megakd-n$node" address add "$NETWORK.$node/24" dev eth0
    ip -n "megakd-n$node" link set eth0 up
  done
}

start_munge() {
  [ -S /run/munge/munge.socket.2 ] && return
  install -d -o munge -g munge /run/munge
  runuser -u munge -- "$(find_program munged)"
  touch "$FOLDER/run/munge-is-ours"
}

up() {
  check_machine
  [ ! -e /run/netns/megakd-controller ] || { say "one is up already; tools/slurm/cluster.sh down FOLDER ends it"; exit 1; }
  write_configuration
  make_network
  start_munge
  in_host controller slurmctld
  for node in $(seq "$NODES"); do
    mkdir -p "$FOLDER/spool/n$node"
    in_host "n$node" slurmd -N "n$node"
  done
  for _ in $(seq 60); do
    [ "$(in_host controller sinfo --noheader --partition=batch --states=idle --format=%D)" != "$NODES" ] || return 0
    sleep 0.5
  done
  say "the nodes do not get ready; see $FOLDER/log"
  exit 1
}

down() {
  in_host controller scancel --user=root 2> /dev/null || true
  for _ in $(seq 40); do
    [ -n "$(in_host controller squeue --noheader 2> /dev/null)" ] || break
    sleep 0.5
  done
  local files=("$FOLDER"/run/slurmd.*.pid "$FOLDER/run/slurmctld.pid")
  [ ! -e "$FOLDER/run/munge-is-ours" ] || files+=(/run/munge/munged.pid)
  for file in "${files[@]}"; do
    [ ! -s "$file" ] || kill "$(cat "$file")" 2> /dev/null || true
  done
  sleep 1
  for host in controller $(seq -f n%g "$NODES"); do ip netns delete "megakd-$host" 2> /dev/null || true; done
  find /sys/fs/cgroup/freezer/slurm_n* -depth -type d -exec rmdir {} \; 2> /dev/null || true
}

verb=${1:?up, run or down} FOLDER=$(realpath -m "${2:?a folder for configuration, logs and spool}")
shift 2
case $verb in
  up) up ;;
  run) in_host controller "$@" ;;
  down) down ;;
  *) say "unknown: $verb; expected up, run or down"; exit 2 ;;
esac
