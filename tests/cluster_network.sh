#!/usr/bin/env bash
# Three machines, which are network namespaces joined by a bridge: a chief at
# 10.9.0.1, workers at 10.9.0.2 and 10.9.0.3. To be run in a namespace of its
# own:
#
#     unshare -Urn --fork --kill-child bash cluster_network.sh PYTHON CHIEF JSON
#
# The chief finds the commands that cut the network in CUT_chief and
# CUT_workers.
set -eu
python=$1 chief=$2 settings=$3
workers=10.9.0.2:2222,10.9.0.3:2222

ip link set lo up
ip link add bridge type bridge
ip addr add 10.9.0.1/24 dev bridge
ip link set bridge up
trap 'kill $(jobs -p)' EXIT
for task in 0 1; do
  unshare -n sleep 300 &
  machine=$!
  # It is in its own namespace once it sleeps.
  until [ "$(cat /proc/$machine/comm)" = sleep ]; do sleep 0.05; done
  in_it="nsenter -t $machine -n"
  ip link add "port$task" type veth peer name eth0 netns "/proc/$machine/ns/net"
  ip link set "port$task" master bridge up
  $in_it ip link set lo up
  $in_it ip addr add "10.9.0.$((task + 2))/24" dev eth0
  $in_it ip link set eth0 up
  $in_it "$python" -m fdg_keras.worker --cluster $workers --task $task \
    --allow_network >&2 2>/dev/null &
  [ $task = 1 ] || export CUT_workers="$in_it ip route add blackhole 10.9.0.3"
done
export CUT_chief="ip link set port1 nomaster"
"$python" "$chief" train $workers "$settings"
