"""Runs in the machine. `table.py NAME` looks at our native table in a namespace again and again until its input ends,
and prints as JSON the states that it came to, one after the other: flags, the owner's port, the handle; null for none.
"""

from __future__ import annotations

import json
import select
import sys

from netapply.namespace import Namespace
from netapply_nftables.find import NFTA_TABLE_FLAGS, NFTA_TABLE_NAME, NFTA_TABLE_OWNER
from netapply_wire.nfnetlink import NFPROTO_INET, NFT_MSG_GETTABLE, get, number, string

NFTA_TABLE_HANDLE = 4  # linux/netfilter/nf_tables.h


def look(namespace: Namespace) -> list[int] | None:
    found = get(namespace, NFT_MSG_GETTABLE, NFPROTO_INET, string(NFTA_TABLE_NAME, "netapply"))
    if found is None:
        return None
    flags, owner = (number(found.attributes.get(key, b"")) for key in (NFTA_TABLE_FLAGS, NFTA_TABLE_OWNER))
    return [flags, owner, int.from_bytes(found.attributes[NFTA_TABLE_HANDLE], "big")]


with Namespace.open(sys.argv[1], host=True) as namespace:
    seen = [look(namespace)]
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.0005)[0]:
        if (now := look(namespace)) != seen[-1]:
            seen.append(now)
print(json.dumps(seen), flush=True)
