#!/bin/sh
# Build netapply.box from Debian packages alone: a bookworm system, and beside it the kernels of four releases.
#   box.sh OUT      fills OUT with netapply.box and boot/SERIES/{vmlinuz,initrd,version}; needs root, 3 GB, two minutes.
# The packages come from the mirror that this machine's apt names (MIRROR=URI for another), by apt and its keys.
# All mounts are made in a mount namespace of its own, which goes with the script however that ends.
set -eu
[ "${NETAPPLY_UNSHARED:-}" ] || NETAPPLY_UNSHARED=1 exec unshare --mount --propagation private "$0" "$@"

SUITES='bullseye bookworm trixie sid' # 5.10, 6.1, 6.12 and the newest
SYSTEM=bookworm                       # the first Debian with a Python that netapply runs on
INCLUDE=systemd,systemd-sysv,udev,dbus,openssh-server,sudo,rsync,kmod,procps,iproute2,iptables,nftables,conntrack
INCLUDE=$INCLUDE,python3,python3-venv,initramfs-tools-core,e2fsprogs,busybox
SIZE=2G
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d "$out/.box-XXXXXX")
trap 'umount -q "$work/root/dev" "$work/root/proc" || :; rm -rf --one-file-system "$work"' EXIT
trap 'exit 143' TERM INT HUP

say() { echo "vagrant-box: $*"; }

# The mirror of this machine's own release, which has the others too.
machine_mirror() {
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  apt-get update --print-uris | sed -n "s|^'\(.*\)/dists/$codename/main/binary-.*|\1|p" | head -n 1
}

# apt with sources, lists and a status of its own: what is installed here does not count, and nothing here changes.
own_apt() {
  apt-get -qq -o "Dir::State=$work/apt" -o "Dir::State::status=$work/apt/status" -o "Dir::Cache=$work/apt" \
    -o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Etc::preferencesparts=/dev/null -o APT::Sandbox::User=root -o Acquire::Languages=none \
    -o Acquire::Check-Valid-Until=false -o Acquire::Retries=3 -o Acquire::http::Timeout=30 "$@"
}

# The kernel that the metapackage of a release names today: $work/kernels/SUITE with its packages unpacked.
fetch_kernel() {
  mkdir -p "$work/debs/$1" "$work/kernels/$1"
  policy=$(own_apt -o "APT::Default-Release=$1" install --simulate --no-install-recommends linux-image-cloud-amd64)
  packages=$(echo "$policy" | sed -nE 's/^Inst (linux-(base|image|binary|modules)-[0-9][^ ]*) .*/\1/p')
  [ "$packages" ] || { say "no kernel in $1 at $mirror"; exit 1; }
  # shellcheck disable=SC2086  # a list of words
  (cd "$work/debs/$1" && own_apt -o "APT::Default-Release=$1" download $packages)
  for deb in "$work/debs/$1"/*.deb; do dpkg-deb --extract "$deb" "$work/kernels/$1"; done
}

# Modules and a vmlinuz into the system, its initrd made there; then both out to boot/SERIES.
install_kernel() {
  unpacked=$work/kernels/$1
  modules=$(find "$unpacked" -type d -path '*lib/modules/*' -name '[0-9]*' -prune | head -n 1)
  release=${modules##*/}
  image=$(find "$unpacked" -type f -name 'vmlinuz*' | head -n 1)
  mkdir -p "$root/usr/lib/modules"
  cp -a "$modules" "$root/usr/lib/modules/"
  rm -f "$root/usr/lib/modules/$release/vmlinuz"
  chroot "$root" depmod "$release"
  echo CONFIG_RD_GZIP=y > "$root/boot/config-$release" # all have it; the file itself is in other packages each time
  chroot "$root" mkinitramfs -o /boot/initrd "$release" 2>"$work/log" || { cat "$work/log"; exit 1; }
  series=$(echo "$release" | cut -d. -f1,2)
  mkdir -p "$made/boot/$series"
  cp "$image" "$made/boot/$series/vmlinuz"
  mv "$root/boot/initrd" "$made/boot/$series/initrd"
  echo "$1 $release" > "$made/boot/$series/version"
  say "kernel $release of $1"
}

# The system's own files: who logs in, how it gets an address, what its initrds carry.
configure() {
  install -d "$root/etc/systemd/network"
  printf '[Match]\nName=e*\n[Network]\nDHCP=ipv4\n[DHCPv4]\nClientIdentifier=mac\n' \
    > "$root/etc/systemd/network/lan.network"
  printf 'MODULES=list\nBUSYBOX=auto\nCOMPRESS=gzip\nRESUME=none\n' > "$root/etc/initramfs-tools/initramfs.conf"
  printf 'virtio_pci\nvirtio_blk\nvirtio_net\next4\n' > "$root/etc/initramfs-tools/modules"
  echo netapply > "$root/etc/hostname"
  printf '127.0.0.1 localhost netapply\n::1 localhost\n' > "$root/etc/hosts"
  echo '/dev/vda / ext4 rw 0 1' > "$root/etc/fstab"
  : > "$root/etc/machine-id"
  chroot "$root" systemctl --quiet enable systemd-networkd ssh
  chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer
  chroot "$root" useradd --create-home --shell /bin/bash vagrant
  echo 'vagrant ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/vagrant"
  install -d -m 700 "$root/home/vagrant/.ssh"
  # The key pair that everybody has, as in all boxes: the machine is reached from this one alone.
  install -m 600 "$(dpkg --listfiles vagrant | grep 'keys/vagrant.pub$')" \
    "$root/home/vagrant/.ssh/authorized_keys"
  chroot "$root" chown -R vagrant:vagrant /home/vagrant/.ssh
  chroot "$root" python3 -m venv /opt/netapply # for the wheel; a minute in a guest
  printf 'UseDNS no\n' > "$root/etc/ssh/sshd_config.d/vagrant.conf"
}

"$here/packages.sh"
mirror=${MIRROR:-$(machine_mirror)}
[ "$mirror" ] || { say "apt's sources name no mirror of this release: make vagrant-box MIRROR=URI"; exit 1; }
root=$work/root
made=$work/made
mkdir -p "$made/boot" "$work/apt/state/lists/partial" "$work/apt/lists/partial" "$work/apt/archives/partial"
: > "$work/apt/status"
for suite in $SUITES; do echo "deb [signed-by=$KEYRING] $mirror $suite main"; done > "$work/apt/sources.list"
own_apt update

say "a $SYSTEM system"
timeout 900 mmdebstrap --quiet --mode=root --variant=minbase --include=$INCLUDE \
  --aptopt='Acquire::Check-Valid-Until "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  $SYSTEM "$root" "deb [signed-by=$KEYRING] $mirror $SYSTEM main"
configure
mount --bind /proc "$root/proc" && mount --bind /dev "$root/dev"
for suite in $SUITES; do fetch_kernel "$suite" && install_kernel "$suite"; done
umount "$root/dev" "$root/proc"
rm -rf "$root/var/cache/apt" "$root/var/lib/apt/lists" "$root/usr/share/doc"

say "its image"
truncate --size $SIZE "$work/box.raw"
mke2fs -q -t ext4 -O ^64bit,^metadata_csum -d "$root" "$work/box.raw"
qemu-img convert -c -O qcow2 "$work/box.raw" "$made/box.img"
echo '{"provider": "libvirt", "format": "qcow2", "virtual_size": 2}' > "$made/metadata.json"
echo 'Vagrant.configure("2") { |config| config.vm.provider(:libvirt) { |vm| vm.disk_bus = "virtio" } }' \
  > "$made/Vagrantfile"
tar -C "$made" -czf "$made/netapply.box" metadata.json Vagrantfile box.img
rm -rf "$out/boot" && mv "$made/boot" "$out/boot"
mv "$made/netapply.box" "$out/"
say "$out/netapply.box, $(du -h "$out/netapply.box" | cut -f1)"
