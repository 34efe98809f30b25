#!/bin/sh
# libvirt.sh COMMAND...: run it beside a libvirt of its own, without systemd, and end both.
# libvirt, its machines and all that the command starts live in namespaces of their own (mounts, network, processes):
# the host's libvirt, /etc and netfilter are neither used nor changed, and nothing outlives this script, even killed.
# Vagrant's own state goes to build/vagrant/run, which is removed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=${NETAPPLY_VAGRANT:-$here/../build/vagrant}/run

if [ "${NETAPPLY_UNSHARED:-}" != libvirt ]; then
  "$here/packages.sh"
  mkdir -p "$work"
  exec 9> "$work.lock"
  flock --nonblock 9 || { echo "libvirt.sh: another one runs, see $work.lock" >&2; exit 1; }
  # Killing the first process of a process namespace kills all; and it is killed when its parent goes.
  NETAPPLY_UNSHARED=libvirt setpriv --pdeathsig KILL unshare --mount --net --pid --fork --kill-child --mount-proc \
    --propagation private "$0" "$@" 9>&- &
  child=$!
  trap 'kill -KILL $child; wait $child || :; rm -rf "$work"; exit 143' TERM INT HUP
  code=0
  wait $child || code=$?
  rm -rf "$work"
  exit $code
fi

rm -rf "$work"
mkdir -p "$work/etc" "$work/lib" "$work/home"
work=$(cd "$work" && pwd)
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p /run/libvirt /run/lock
cp -a /etc/libvirt/. "$work/etc"
mount --bind "$work/etc" /etc/libvirt
cp -a /var/lib/libvirt/. "$work/lib"
mount --bind "$work/lib" /var/lib/libvirt
mkdir -p "$work/lib/images"
for place in log cache; do
  mkdir -p /var/$place/libvirt && mount -t tmpfs tmpfs /var/$place/libvirt
done
cat > /etc/libvirt/libvirtd.conf <<-'END'
	auth_unix_ro = "none"
	auth_unix_rw = "none"
END
# Everything as root, who is alone here; no cgroups, devices or labels to prepare.
cat > /etc/libvirt/qemu.conf <<-'END'
	user = "root"
	group = "root"
	dynamic_ownership = 0
	remember_owner = 0
	security_driver = "none"
	cgroup_controllers = []
	namespaces = []
	stdio_handler = "file"
END
virtlogd -d
libvirtd -d
tries=0
until virsh --quiet list > /dev/null 2>&1; do
  tries=$((tries + 1))
  [ $tries -lt 60 ] || { echo "libvirt.sh: libvirtd does not answer:" >&2; tail /var/log/libvirt/* >&2; exit 1; }
  sleep 0.5
done
{ virsh pool-define-as default dir --target /var/lib/libvirt/images && virsh pool-start default; } > /dev/null
export VAGRANT_HOME="$work/home" VAGRANT_DOTFILE_PATH="$work/dot" VAGRANT_CWD="$here" \
  VAGRANT_CHECKPOINT_DISABLE=1 VAGRANT_DEFAULT_PROVIDER=libvirt
code=0
"$@" || code=$?
exit $code # the first process of the namespace: everything else goes with it
