"""A flow in words: `--from uid=1000 --to 10.0.0.5:443`. What is not said is assumed, and told."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from netapply import spelling
from netapply.cli.arguments import UsageError
from netapply.errors import Fault
from netapply.flow import TCP, UDP, Flow, FlowState
from netapply.otherwise import SOMEWHERE
from netapply.reasons import show_address
from netapply.ruleset import Family
from netapply.sights import is_loopback
from netapply.values import NamedTuple
from netapply.ways import Way

if TYPE_CHECKING:
    from netapply.lookups import Lookups

FORMS = "write uid=, gid=, cgroup=, iface=, mark= or state=, or an address, 10.0.0.5:443, [fd00::5]:443 or :443"
STATES: tuple[str, ...] = get_args(FlowState)
#: The application's, where nobody is named.
APP_ID, CLIENT_PORT, SERVICE_PORT, DNS_PORT = 1000, 40000, 80, 53
DEVICE = "eth0"
_PAIR = re.compile(r"([a-z]+)=(.*)")
_ENDPOINT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)|(?=:))(?::([0-9]+))?")


#: Asks a namespace for the way to a packed address; None where there is none, or nobody to ask.
FindWay: TypeAlias = Callable[[bytes], Way | None]


class Asked(NamedTuple):
    """What the command line says of a flow. `server` is where DNS goes where nothing else is said."""

    source: Sequence[str]
    destination: Sequence[str]
    inbound: bool = False
    dns: bool = False
    protocol: int = TCP
    server: bytes = b""


class Told(NamedTuple):
    """A flow, and what of it was assumed, a phrase each."""

    flow: Flow
    assumed: tuple[str, ...]


def read_flow(asked: Asked, lookups: Lookups, find_way: FindWay = lambda _: None) -> Told:
    """The flow that is asked for. Raises UsageError with every fault of the words."""
    reading = _Reading(asked, lookups)
    if reading.faults:
        count = f"{len(reading.faults)} words are" if len(reading.faults) > 1 else "a word is"
        lines = "\n".join(f"  {fault}" for fault in reading.faults)
        raise UsageError(f"{count} not understood\n{lines}", "")
    return _Completing(asked, reading, find_way).told()


class _Reading:
    """The words, each checked; nothing is assumed yet. Faults are collected."""

    def __init__(self, asked: Asked, lookups: Lookups) -> None:
        self.faults: list[Fault] = []
        self.said: dict[str, Any] = {}
        self.addresses: dict[str, bytes] = {}
        self.ports: dict[str, int] = {}
        self._asked, self._lookups = asked, lookups
        for side, words in (("--from", asked.source), ("--to", asked.destination)):
            for word in words:
                self._word(side, word)
        self._together()

    def _refuse(self, side: str, value: str, accepted: str) -> None:
        self.faults.append(Fault(side, value, accepted))

    def _word(self, side: str, word: str) -> None:
        pair = _PAIR.fullmatch(word)
        try:
            if pair is None:
                self._endpoint(side, word)
            elif pair[1] in self.said:
                self._refuse(side, word, f"say {pair[1]}= once")
            else:
                self.said[pair[1]] = self._value(side, pair[1], pair[2])
        except spelling.RefusedError as error:
            self._refuse(side, word, str(error))

    def _value(self, side: str, name: str, text: str) -> Any:
        if name in ("uid", "gid", "cgroup") and side == "--to":
            raise spelling.RefusedError("whose socket it is belongs to --from")
        match name:
            case "uid" | "gid":
                return self._id(name, text)
            case "cgroup":
                return spelling.read_cgroup(text, self._lookups).path
            case "iface":
                if text.endswith("+"):
                    raise spelling.RefusedError("write the name of one interface")
                return spelling.read_interface(text)
            case "mark":
                return 0 if text in ("0", "0x0") else _one_mark(text)
            case "state":
                if text not in STATES:
                    raise spelling.RefusedError(f"write {', '.join(STATES[:-1])} or {STATES[-1]}")
                return text
            case _:
                raise spelling.RefusedError(FORMS)

    def _id(self, name: str, text: str) -> int:
        read = spelling.read_uid if name == "uid" else spelling.read_gid
        try:
            return read(text, self._lookups)
        except spelling.RefusedError:
            what = "user" if name == "uid" else "group"
            raise spelling.RefusedError(f"write a {what}'s id, or the name of a {what} that exists here") from None

    def _endpoint(self, side: str, word: str) -> None:
        found = _ENDPOINT.fullmatch(word)
        address, port = (found[1] or found[2] or "", found[3]) if found else (word, None)
        if not word or (found is None and word.count(":") < 2):
            raise spelling.RefusedError(FORMS)
        if (address and side in self.addresses) or (port and side in self.ports):
            raise spelling.RefusedError("say one address and port")
        if address:
            self.addresses[side] = spelling.read_address(address)
        if port:
            self.ports[side] = spelling.read_port(port)

    def _together(self) -> None:
        """What is impossible though each word is right."""
        asked = self._asked
        if self.said.get("state") == "picked-up" and asked.protocol != TCP:
            self._refuse("--from", "state=picked-up", "write state=new: of UDP each packet can be the first")
        if asked.inbound:
            for name in ("uid", "gid", "cgroup"):
                if name in self.said:
                    self._refuse(
                        "--from", f"{name}= of an inbound packet", "leave it out: a remote sender has none here"
                    )
            if self.said.get("iface") == "lo":
                self._refuse("--inbound", "iface=lo", "leave out --inbound: what comes in by lo was sent here")
            if asked.dns:
                self._refuse("--dns", "--inbound", "say one of them: queries are captured where they are sent")
        if len({len(packed) for packed in self.addresses.values()}) > 1:
            shown = " and ".join(show_address(packed) for packed in self.addresses.values())
            self._refuse("--to", shown, "write two addresses of one family")
        if not asked.destination and not asked.dns:
            self._refuse("--to", "nothing", "write where the packet goes: 10.0.0.5:443, or :8080 with --inbound")


def _one_mark(text: str) -> int:
    mark = spelling.read_mark(text)
    if mark.mask != 0xFFFFFFFF:
        raise spelling.RefusedError("write the packet's whole mark, such as 0x539")
    return mark.value


class _Completing:
    """What was said, completed by what is known of the namespace, or usual."""

    def __init__(self, asked: Asked, reading: _Reading, find_way: FindWay) -> None:
        self._asked, self._said, self._find_way = asked, reading.said, find_way
        self._addresses, self._ports = dict(reading.addresses), reading.ports
        said = next(iter(self._addresses.values()), asked.server)
        if asked.dns and "--to" not in self._addresses and asked.server and len(said) == len(asked.server):
            self._addresses["--to"] = asked.server
        packed = next(iter(self._addresses.values()), bytes(4))
        self._family: Family = "ip" if len(packed) == 4 else "ip6"
        self.assumed: list[str] = []

    def told(self) -> Told:
        flow = self._inbound() if self._asked.inbound else self._outbound()
        if "state" not in self._said:
            self.assumed.append("a new connection")
        return Told(
            flow._replace(state=self._said.get("state", "new"), mark=self._said.get("mark", 0)), (*self.assumed,)
        )

    def _take(self, what: str, value: Any) -> Any:
        self.assumed.append(what)
        return value

    def _port(self, side: str, usual: int) -> int:
        return self._ports.get(side) or self._take(f"{side.removeprefix('--')} port {usual}", usual)

    def _address(self, side: str, usual: bytes) -> bytes:
        found = self._addresses.get(side)
        return found or self._take(f"{side.removeprefix('--')} {show_address(usual)}", usual)

    def _iface(self, usual: str, why: str = "") -> str:
        found: str | None = self._said.get("iface")
        return found or self._take(f"iface={usual}{why}", usual)

    def _outbound(self) -> Flow:
        asked, somewhere = self._asked, SOMEWHERE[self._family]
        destination = self._address("--to", somewhere[1])
        dport = self._port("--to", DNS_PORT if asked.dns else SERVICE_PORT)
        way = self._find_way(destination)
        if is_loopback(destination) or destination == self._addresses.get("--from"):
            iface = self._iface("lo", " as an address of one's own")
        elif way is not None:
            iface = self._iface(way.iface, " as it is routed")
        else:
            iface = self._iface(DEVICE)
        known = destination if iface == "lo" else way.source if way and way.source else somewhere[0]
        source = self._address("--from", known)
        uid, gid = self._owner()
        sport = self._port("--from", CLIENT_PORT)
        return Flow("outbound", asked.protocol, source, destination, sport, dport, iface, uid, gid, self._cgroup())

    def _inbound(self) -> Flow:
        somewhere = SOMEWHERE[self._family]
        source = self._address("--from", somewhere[1])
        way = self._find_way(source)
        destination = self._address("--to", way.source if way and way.source else somewhere[0])
        dport = self._port("--to", SERVICE_PORT)
        iface = self._iface(way.iface, " as answers are routed") if way else self._iface(DEVICE)
        sport = self._port("--from", CLIENT_PORT)
        return Flow("inbound", self._asked.protocol, source, destination, sport, dport, iface)

    def _owner(self) -> tuple[int, int]:
        uid, gid = self._said.get("uid"), self._said.get("gid")
        if uid is None:
            uid = self._take(f"uid={APP_ID}", APP_ID)
        if gid is None:
            gid = self._take(f"gid={uid} as the uid" if "uid" in self._said else f"gid={uid}", uid)
        return uid, gid

    def _cgroup(self) -> str:
        return str(self._said.get("cgroup", ""))


def protocol_of(*, tcp: bool, udp: bool, dns: bool) -> int:
    """The protocol that the options name; DNS is asked over UDP unless they say otherwise."""
    return UDP if udp or (dns and not tcp) else TCP
