"""Rules of somebody else, in the same tables as ours and beside them, and all that can be seen of a namespace."""

from __future__ import annotations

import re

from tests.netns import Netns

SAVE = """\
*raw
-A PREROUTING -p udp --dport 9999 -j NOTRACK
COMMIT
*mangle
:FOREIGN - [0:0]
-A PREROUTING -j FOREIGN
-A FOREIGN -p tcp --dport 81 -j MARK --set-mark 0x10/0x10
-A OUTPUT -p tcp --dport 82 -j RETURN
COMMIT
*nat
:DOCKER - [0:0]
[7:420] -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
[3:180] -A OUTPUT ! -d %s -m addrtype --dst-type LOCAL -j DOCKER
[5:300] -A POSTROUTING -s %s ! -o docker0 -j MASQUERADE
[2:120] -A DOCKER -p tcp --dport 8443 -j REDIRECT --to-ports 9443
COMMIT
*filter
-A INPUT -p tcp --dport 23 -j DROP
COMMIT
"""
BLOCKS = {"": ("127.0.0.0/8", "172.17.0.0/16"), "6": ("::1/128", "fd00:17::/64")}
NATIVE = """\
table inet somebody {
    set known { type ipv4_addr; elements = { 10.9.9.9 } }
    chain input { type filter hook input priority 10; ip saddr @known counter packets 4 bytes 240 drop; }
}
"""


def put_up(netns: Netns, backend: str) -> None:
    """Foreign rules with counters in the tables that `backend` shares with others, and in a native table."""
    netns.run("nft", "-f", "-", stdin=NATIVE)
    flavour = "legacy" if backend == "iptables-legacy" else "nft"
    for six, blocks in BLOCKS.items():
        netns.run(f"ip{six}tables-{flavour}-restore", "--counters", stdin=SAVE % blocks)


def picture(netns: Netns) -> dict[str, str]:
    """Everything that iptables, nft and ip show, to the letter; the lines with dates left out."""
    commands = (
        "iptables-legacy-save -c",
        "ip6tables-legacy-save -c",
        "iptables-nft-save -c",
        "ip6tables-nft-save -c",
        "nft list ruleset",
        "ip rule",
        "ip -6 rule",
        "ip route show table all",
        "ip -6 route show table all",
        "ip address",
    )
    shown = {command: netns.run(*command.split(), check=False) for command in commands}
    return {command: re.sub(r"(?m)^#.*\n", "", text) for command, text in shown.items()}
