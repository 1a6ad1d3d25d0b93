#!/usr/bin/env bash
# Stands in for ssh between the hosts of a test: drops ssh's options and runs the rest on the host.
while [[ "$1" == -* ]]; do
  case "$1" in -o | -l | -p | -i) shift ;; esac
  shift
done
host=$1
shift
# As over ssh, nothing of the caller's environment goes along.
exec env -i PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME="$HOME" \
  ip netns exec "$host" unshare --uts bash -c "hostname $host; $*"
