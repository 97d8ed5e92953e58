#!/bin/sh
# Runs a command with the disk held at one read rate, so that figures compare: a shared host's disk drifts by a third within minutes.
#
#   benches/steady_disk.sh GB_PER_S PATH_ON_THE_DISK COMMAND …        (root; cgroup v1's blkio or v2's io controller)
#
# The kernel throttles what the command and its children read from the disk that PATH lies on.
set -eu
rate=$(python3 -c "print(int(float('$1') * 1e9))")
device=$(findmnt -no MAJ:MIN -T "$2")
shift 2
if [ -d /sys/fs/cgroup/blkio ]; then
    group=/sys/fs/cgroup/blkio/tensorpager-steady-$$ file=blkio.throttle.read_bps_device line="$device $rate"
else
    group=/sys/fs/cgroup/tensorpager-steady-$$ file=io.max line="$device rbps=$rate"
fi
mkdir "$group"
trap 'rmdir "$group"' EXIT INT TERM
echo "$line" >"$group/$file"
sh -c 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"' sh "$group" "$@"
