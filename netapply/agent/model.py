"""What the agent is told (its configuration, its targets) and what it shows of itself (status, metrics)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from netapply.agent.events import Cause
from netapply.nsfs import NamespaceId
from netapply.values import NamedTuple

State: TypeAlias = Literal["pending", "inplace", "healing", "dormant", "failed", "quarantined", "gone"]
STATES: tuple[State, ...] = ("pending", "inplace", "healing", "dormant", "failed", "quarantined", "gone")
#: What becomes of capture when the proxy of a plan with activation on-listen stops listening.
FailMode: TypeAlias = Literal["open", "closed"]

#: Whether native nftables tables get an owner, where the kernel has such tables.
OwnMode: TypeAlias = Literal["auto", "never"]


class Target(NamedTuple):
    """One namespace: `spec` as netapply.open takes it (a name, a path, "pid:N", a descriptor), and its labels.

    Plan files name namespaces by label, too; labels are given here, by the library or through the socket.
    A descriptor is duplicated, and stays the caller's. `fail`: see FailMode.
    """

    spec: str | int
    labels: Mapping[str, str] = {}
    fail: FailMode = "closed"


class Budget(NamedTuple):
    """How much healing one namespace may have: `heals` within `window` seconds, then quarantine.

    Quarantine lasts `quarantine` seconds, and twice as long each time that it follows another within ten windows, up
    to `longest`. A failed attempt is repeated after `backoff` seconds, each time twice as long, up to `longest`.
    """

    heals: int = 30
    window: float = 10.0
    quarantine: float = 5.0
    backoff: float = 0.1
    longest: float = 60.0


class AgentConfig(NamedTuple):
    """All that an Agent needs. Times are in seconds.

    `plans`: the directory of plan files, "" for none. `state`: where desired state is kept over a restart, "" for
    nowhere. `journal`: None is netapply's own place. `poll`: how often is looked where the kernel tells nothing
    (iptables-legacy, vanished names, listening ports). `looks`: at how many namespaces of which the kernel tells
    nothing is looked in a second at most, all together; of many of them, each is looked at less often than `poll`
    says. `concurrency`: worker threads at most, of which one goes on at a time unless it is held up, and as many for
    what waits for the xtables lock; 0 for as many as serve. `settle`: for how long changes of iptables-nft's tables
    are gathered after a heal, as the kernel makes the next batch wait for what the last one freed. `queue`: events
    that a subscriber may be behind. `host`: whether the machine's own namespace may be named. The sockets are those
    of `netapply agent`. `owned`: "auto" has native tables belong to the agent where the kernel can do that, so that
    nobody else can change them; a table that stands already stays as it is.
    """

    plans: str = "/etc/netapply/plans.d"
    state: str = "/var/lib/netapply"
    journal: str | None = None
    poll: float = 1.0
    looks: float = 40.0
    concurrency: int = 0
    settle: float = 0.03
    budget: Budget = Budget()
    queue: int = 1024
    lock_timeout: float = 2.0
    host: bool = False
    owned: OwnMode = "never"
    socket: str = "/run/netapply-agent/control.sock"
    read_socket: str = "/run/netapply-agent/read.sock"
    read_group: str = ""
    metrics: str = ""


class NamespaceStatus(NamedTuple):
    """One namespace at a glance. Wall-clock seconds, 0 for never.

    `source` is the plan file, or "api". `fail_open_seconds` are all the moments in which its plan was not in force
    though wanted: dormant, quarantined or failed.
    """

    name: str
    path: str
    identity: NamespaceId | None
    state: State
    source: str
    fingerprint: str
    backend: str
    layout: str
    last_apply: float
    heals: int
    last_cause: Cause | None
    fail_open_seconds: float
    error: str
    labels: Mapping[str, str] = {}
    confirm_by: float = 0.0


class Histogram(NamedTuple):
    """Observed seconds: `counts[i]` of at most `bounds[i]` and more than the one before; the last is of all others."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def observed(self) -> int:
        """How many were observed."""
        return sum(self.counts)


class Metrics(NamedTuple):
    """Counters since the agent began, as values; histograms are in seconds."""

    #: By state, each of STATES.
    namespaces: Mapping[str, int]
    applies: int
    failures: int
    #: By the process that caused the drift, "" where the kernel does not tell; from the 65th name on "others".
    heals: Mapping[str, int]
    apply_seconds: Histogram
    heal_seconds: Histogram
    quarantines: int
    #: How often a lock (of the journal, or xtables') was not to be had in time.
    lock_failures: int
    recoveries: int
    fail_open_seconds: float
    #: Messages of the kernel about changes, how many that others forged were dropped, how often some were lost.
    notifications: int
    forged: int
    overruns: int
    rejected_files: int
    events_lost: int
    #: Monotonic seconds at which the reconcile loop last came round: what a watchdog watches.
    ticked: float
