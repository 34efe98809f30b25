#!/bin/sh
# A root file system for systemd-nspawn: Debian with systemd, and netapply installed from its wheel as users do.
#   root.sh ROOT PYTHON     makes ROOT if it is not there (300 MB, a minute or some), and puts today's wheel into it;
#                           PYTHON is an environment with `build`, to build the wheel and fetch what it needs.
set -eu
root=$1 python=$2
here=$(cd "$(dirname "$0")/../.." && pwd)
include=systemd,systemd-sysv,dbus,python3,python3-venv,iproute2,nftables,iptables,procps,passwd,firewalld
tools='systemd-nspawn mmdebstrap'

for tool in $tools; do
  command -v "$tool" >/dev/null || { apt-get update -qq && apt-get install -y -qq systemd-container mmdebstrap; break; }
done
if [ ! -d "$root" ]; then
  mkdir -p "$(dirname "$root")"
  mmdebstrap --quiet --mode=root --variant=minbase --include="$include" bookworm "$root.new" ${MIRROR:+"$MIRROR"}
  systemctl --quiet --root "$root.new" disable firewalld.service # one test starts it
  mv "$root.new" "$root"
fi
rm -rf "$root/wheelhouse" && mkdir "$root/wheelhouse"
"$python" -m build --wheel --outdir "$root/wheelhouse" "$here" >/dev/null
wheel=$(basename "$root"/wheelhouse/netapply-*.whl)
"$python" -m pip download --quiet --dest "$root/wheelhouse" --only-binary :all: --python-version 3.11 \
  --platform manylinux2014_x86_64 "$root/wheelhouse/$wheel[agent]"
# The same with a higher number, to upgrade to.
newer=$(mktemp -d)
cp -r "$here/netapply" "$here/backends" "$here/pyproject.toml" "$here/README.md" "$here/LICENSE" "$newer"
sed -i 's/^version = .*/version = "99.0"/' "$newer/pyproject.toml"
sed -i 's/^__version__ = .*/__version__ = "99.0"/' "$newer/netapply/__init__.py"
rm -rf "$root/newer" && mkdir "$root/newer"
"$python" -m build --wheel --outdir "$root/newer" "$newer" >/dev/null
rm -rf "$newer"
[ -x "$root/opt/netapply/bin/pip" ] || chroot "$root" python3 -m venv /opt/netapply
pip="/opt/netapply/bin/pip install --quiet --no-index --find-links /wheelhouse"
chroot "$root" $pip "netapply[agent]"
chroot "$root" $pip --no-deps --force-reinstall "/wheelhouse/$wheel"
