#!/bin/sh
# What a fresh Debian machine lacks for building the box and for running it; installs nothing where all is there.
set -eu
packages="mmdebstrap e2fsprogs openssh-client rsync qemu-system-x86 qemu-utils
  vagrant vagrant-libvirt libvirt-daemon libvirt-daemon-system libvirt-clients libvirt-daemon-driver-qemu dnsmasq-base"
missing=
for package in $packages; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -z "$missing" ] && exit
echo "vagrant: installing$missing"
timeout 300 apt-get update -qq
# shellcheck disable=SC2086  # a list of words
DEBIAN_FRONTEND=noninteractive timeout 900 apt-get install -qq --no-install-recommends $missing
