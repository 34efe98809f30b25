"""Runs as a service with the agent's unit around it: tries what the unit forbids, and prints as JSON what happened."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
from collections.abc import Callable

from netapply.agent.confine import deny_programs
from netapply.syscalls import setns

NEWUSER, NEWNET = 0x10000000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *words: int) -> None:
    if getattr(libc, function)(*words) < 0:
        raise OSError(ctypes.get_errno(), function)


def write(path: str, text: str = "x") -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def run_a_program() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)


def enter_a_namespace() -> None:
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    setns(os.open("/run/netns/pod", os.O_RDONLY))
    write("/proc/sys/net/ipv4/conf/all/route_localnet", "0")
    setns(own)


def talk() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", 9))


TRIES: dict[str, Callable[[], object]] = {
    "enter a namespace and set what it may": enter_a_namespace,
    "take the lock of iptables-legacy": lambda: os.open("/run/xtables.lock", os.O_RDWR),
    "keep state": lambda: write("/var/lib/netapply/probe"),
    "run a program": run_a_program,
    "write to /etc": lambda: write("/etc/probe"),
    "write to /run": lambda: write("/run/probe"),
    "set a kernel's setting": lambda: write("/proc/sys/kernel/printk", "4"),
    "make a user namespace": lambda: call("unshare", NEWUSER),
    "open a raw packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "open a raw IP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "talk": talk,
    "make memory executable": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC),
    "mount": lambda: call("mount", 0, 0, 0, 0, 0),
    "trace a process": lambda: call("ptrace", 16, 1, 0, 0),
    "become somebody else": lambda: os.setuid(1000),
    "give a file away": lambda: os.chown("/var/lib/netapply/probe", 1000, 1000),
    "load a module": lambda: call("syscall", 175, 0, 0, 0),
    "see the homes": lambda: os.listdir("/root"),
}

outcome: dict[str, str] = {}
print(deny_programs() or "denied", flush=True)
with open("/proc/self/status", encoding="ascii") as status:
    print(next(line for line in status if line.startswith("Seccomp_filters")), flush=True)
for name, attempt in TRIES.items():
    try:
        attempt()
        outcome[name] = "done"
    except (OSError, ValueError) as error:
        outcome[name] = f"refused: {error}"
print("OUTCOME " + json.dumps(outcome), flush=True)
