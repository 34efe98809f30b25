"""The built-in tables and chains of iptables, and where the kernel calls them.

iptables-nft takes a table for its own only while each base chain in it has this name, type, hook and priority
(`xtables_ipv4` in its nft.c; priorities of linux/netfilter_ipv4.h). It makes them when it needs them, so creating
only those in use is fine.
"""

from __future__ import annotations

from netapply.ruleset import FAMILIES, Base, Family, Hook

#: enum nf_inet_hooks
HOOKS: dict[Hook, int] = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}

#: table -> built-in chain -> where it is called, in the order of the hooks
BUILT_IN: dict[str, dict[str, Base]] = {
    "raw": {
        "PREROUTING": Base("filter", "prerouting", -300),
        "OUTPUT": Base("filter", "output", -300),
    },
    "mangle": {
        "PREROUTING": Base("filter", "prerouting", -150),
        "INPUT": Base("filter", "input", -150),
        "FORWARD": Base("filter", "forward", -150),
        "OUTPUT": Base("route", "output", -150),
        "POSTROUTING": Base("filter", "postrouting", -150),
    },
    "filter": {
        "INPUT": Base("filter", "input", 0),
        "FORWARD": Base("filter", "forward", 0),
        "OUTPUT": Base("filter", "output", 0),
    },
    "nat": {
        "PREROUTING": Base("nat", "prerouting", -100),
        "INPUT": Base("nat", "input", 100),
        "OUTPUT": Base("nat", "output", -100),
        "POSTROUTING": Base("nat", "postrouting", 100),
    },
}

#: Every table that iptables-nft manages and we may write to, in the order in which ours are read back.
TABLES: tuple[tuple[Family, str], ...] = tuple((family, table) for table in BUILT_IN for family in FAMILIES)
