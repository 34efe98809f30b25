#!/bin/sh
# In the machine, as root: netapply from the wheel of /netapply/wheelhouse into /opt/netapply, where check.py expects it.
set -eu
offline=
if [ -x /opt/netapply/bin/pip ]; then
  offline=--no-index # the box of `make vagrant-box`: nothing is reached from there
elif command -v apt-get > /dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  apt-get -qq install python3 python3-venv iptables nftables > /dev/null
  python3 -m venv /opt/netapply
else
  dnf -q -y install python3.12 nftables iptables-nft || dnf -q -y install python3 nftables iptables-nft
  "$(command -v python3.12 || echo python3)" -m venv /opt/netapply
fi
/opt/netapply/bin/pip install --quiet --disable-pip-version-check --root-user-action ignore --force-reinstall $offline \
  --find-links /netapply/wheelhouse 'netapply[agent]'
/opt/netapply/bin/netapply --version
