"""iptables-nft in real kernels' namespaces: whose is what, what is touched, and what stays."""

from __future__ import annotations

import errno
import secrets
import socket
import subprocess
from collections.abc import Iterator

import pytest

from netapply.errors import ConflictError, GenerationChanged, KernelError, UnsupportedError
from netapply.namespace import Namespace
from netapply.ruleset import (
    Accept,
    Base,
    CgroupMatch,
    Chain,
    Cidr,
    IfaceMatch,
    Jump,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    Return,
    Rule,
    Ruleset,
    SetMatch,
    Table,
)
from netapply_iptables_nft import BACKEND
from netapply_iptables_nft.builtin import BUILT_IN
from netapply_iptables_nft.decode import decode_rule
from netapply_iptables_nft.dumped import without_state
from netapply_iptables_nft.encode import encode_rule
from netapply_iptables_nft.operations import TableOperations
from netapply_iptables_nft.probe import Needed, missing_extensions
from netapply_wire.nfnetlink import parse_attributes, send_batch, u32
from tests.iptables_nft_rules import named_set
from tests.netns import Netns

TCP, UDP = ProtocolMatch(6), ProtocolMatch(17)
OWN = Rule((OwnerMatch("uid", 1337, 1337),), Return())
CAPTURE = Rule((TCP,), Redirect(15001))
LOOPBACK = Rule((IfaceMatch("out", "lo"),), Return())
JUMP = Rule((), Jump("NETAPPLY_OUTPUT"))
NAT_OUTPUT = BUILT_IN["nat"]["OUTPUT"]


def nat(*rules: Rule, head: tuple[Rule, ...] = (JUMP,), rest: tuple[Rule, ...] = ()) -> Ruleset:
    """One chain of ours in nat OUTPUT, for both families."""
    chains = (Chain("OUTPUT", rest, NAT_OUTPUT, head), Chain("NETAPPLY_OUTPUT", rules))
    return Ruleset((Table("ip", "nat", chains), Table("ip6", "nat", chains)))


SEED = nat(OWN, CAPTURE)
FOREIGN = """*nat
:DOCKER - [0:0]
[7:420] -A OUTPUT -p udp -m udp --dport 9 -j DOCKER
[3:180] -A DOCKER -j RETURN
COMMIT
*filter
:INPUT DROP [0:0]
[1:40] -A INPUT -i lo -j ACCEPT
COMMIT
"""


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path) as opened:
        yield opened


def apply(kernel: Namespace, ruleset: Ruleset | None) -> list[str]:
    steps = BACKEND.encode(BACKEND.read(kernel), ruleset)
    for step in steps:
        BACKEND.commit(kernel, step)
    return [step.name for step in steps]


def listed(netns: Netns) -> str:
    return netns.run("nft", "list", "ruleset")


def saved(netns: Netns) -> list[str]:
    return [line for line in netns.run("iptables-nft-save", "-c").splitlines() if line[0] == "["]


def foreign_rules(netns: Netns) -> None:
    netns.run("iptables-nft-restore", "-c", stdin=FOREIGN)


def test_reading_probing_and_detecting_create_nothing(netns: Netns, kernel: Namespace) -> None:
    assert BACKEND.probe(kernel).status == "usable"
    assert not BACKEND.detect(kernel)
    assert BACKEND.read(kernel).ruleset is None
    assert listed(netns) == ""


def test_both_families_change_in_one_step(kernel: Namespace) -> None:
    assert apply(kernel, SEED) == ["batch ip, ip6"]
    assert BACKEND.read(kernel).ruleset == SEED


def test_the_same_again_is_no_step_and_bumps_no_generation(kernel: Namespace) -> None:
    apply(kernel, SEED)
    before = BACKEND.read(kernel)
    assert apply(kernel, SEED) == []
    assert BACKEND.read(kernel).generation == before.generation


def test_ours_are_detected_until_they_are_cleaned(kernel: Namespace) -> None:
    apply(kernel, SEED)
    assert BACKEND.detect(kernel)
    assert BACKEND.probe(kernel).in_use
    apply(kernel, None)
    assert not BACKEND.detect(kernel)


def test_clean_leaves_an_empty_namespace_empty(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, SEED)
    netns.run("iptables-nft", "-t", "nat", "-S")  # looking at it with the stock tool does not make it theirs
    apply(kernel, None)
    assert listed(netns) == ""


def test_clean_leaves_foreign_rules_byte_for_byte(netns: Netns, kernel: Namespace) -> None:
    foreign_rules(netns)
    before, foreign = listed(netns), BACKEND.read(kernel).foreign
    apply(kernel, SEED)
    assert BACKEND.read(kernel).foreign == foreign
    apply(kernel, nat(LOOPBACK, OWN, CAPTURE))
    apply(kernel, None)
    assert listed(netns) == before


def test_clean_leaves_tables_that_were_there_before_though_empty(netns: Netns, kernel: Namespace) -> None:
    for verb in ("-A", "-D"):
        netns.run("iptables-nft", "-t", "nat", verb, "OUTPUT", "-j", "ACCEPT")
    netns.run("nft", "add", "table", "ip6", "nat")
    before = listed(netns)
    assert "chain OUTPUT" in before
    apply(kernel, SEED)
    apply(kernel, None)
    assert listed(netns) == before


def test_what_others_put_into_our_tables_stays(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, SEED)
    netns.run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-j", "ACCEPT")
    netns.run("nft", "add", "set", "ip6", "nat", "theirs", "{ type mark; }")
    apply(kernel, None)
    rest = listed(netns)
    assert "accept" in rest
    assert "set theirs" in rest
    assert "NETAPPLY" not in rest


def test_a_policy_that_others_set_stays(netns: Netns, kernel: Namespace) -> None:
    drop = Rule((), Jump("NETAPPLY_INPUT"))
    chains = (Chain("INPUT", (), BUILT_IN["filter"]["INPUT"], (drop,)), Chain("NETAPPLY_INPUT", (Rule((), Accept()),)))
    apply(kernel, Ruleset((Table("ip", "filter", chains),)))
    netns.run("iptables-nft", "-P", "INPUT", "DROP")
    apply(kernel, None)
    assert "policy drop" in listed(netns)


def test_foreign_counters_and_order_survive_an_update(netns: Netns, kernel: Namespace) -> None:
    foreign_rules(netns)
    before = [line for line in saved(netns) if "NETAPPLY" not in line]
    apply(kernel, nat(OWN, CAPTURE, rest=(Rule((UDP,), Jump("NETAPPLY_OUTPUT")),)))
    apply(kernel, SEED)
    assert [line for line in saved(netns) if "NETAPPLY" not in line] == before


def test_head_comes_before_and_the_rest_after_foreign_rules(netns: Netns, kernel: Namespace) -> None:
    foreign_rules(netns)
    last = Rule((UDP,), Jump("NETAPPLY_OUTPUT"))
    ruleset = nat(OWN, head=(JUMP, Rule((TCP,), Jump("NETAPPLY_OUTPUT"))), rest=(last,))
    apply(kernel, ruleset)
    assert BACKEND.read(kernel).ruleset == ruleset
    rules = [line.split("] -A OUTPUT ")[1] for line in saved(netns) if " -A OUTPUT " in line]
    assert rules == [
        "-j NETAPPLY_OUTPUT",
        "-p tcp -j NETAPPLY_OUTPUT",
        "-p udp -m udp --dport 9 -j DOCKER",
        "-p udp -j NETAPPLY_OUTPUT",
    ]


def test_head_that_is_not_first_any_more_is_put_back(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, SEED)
    netns.run("iptables-nft", "-t", "nat", "-I", "OUTPUT", "-p", "icmp", "-j", "ACCEPT")
    assert BACKEND.read(kernel).ruleset != SEED
    assert apply(kernel, SEED) == ["batch ip"]
    assert BACKEND.read(kernel).ruleset == SEED


def test_foreign_rules_after_ours_are_no_drift(netns: Netns, kernel: Namespace) -> None:
    ruleset = nat(OWN, head=(), rest=(JUMP,))
    apply(kernel, ruleset)
    netns.run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "icmp", "-j", "ACCEPT")
    assert BACKEND.read(kernel).ruleset == ruleset
    assert apply(kernel, ruleset) == []


def test_stale_generation_is_told_apart_and_changes_nothing(netns: Netns, kernel: Namespace) -> None:
    steps = BACKEND.encode(BACKEND.read(kernel), SEED)
    netns.run("nft", "add", "table", "inet", "other")
    with pytest.raises(GenerationChanged):
        BACKEND.commit(kernel, steps[0])
    assert "nat" not in listed(netns)


def test_a_failing_operation_is_named_and_nothing_of_the_batch_stays(netns: Netns, kernel: Namespace) -> None:
    with pytest.raises(KernelError) as caught:
        apply(kernel, nat(OWN, Rule((), Jump("NETAPPLY_NOWHERE"))))
    assert caught.value.operation == "add rule ip nat NETAPPLY_OUTPUT #2"
    assert caught.value.errno == errno.ENOENT
    assert listed(netns) == ""


def test_a_foreign_jump_to_our_chain_is_a_conflict(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, SEED)
    netns.run(
        "iptables-nft-restore", "-n", stdin="*nat\n:THEIRS - [0:0]\n-A THEIRS -p tcp -j NETAPPLY_OUTPUT\nCOMMIT\n"
    )
    before = listed(netns)
    with pytest.raises(ConflictError, match="chain ip nat THEIRS jumps to NETAPPLY_OUTPUT"):
        apply(kernel, None)
    assert listed(netns) == before
    assert apply(kernel, SEED) == []


def test_a_built_in_name_at_another_priority_is_a_conflict(netns: Netns, kernel: Namespace) -> None:
    netns.run("nft", "add", "table", "ip", "nat")
    netns.run("nft", "add", "chain", "ip", "nat", "OUTPUT", "{ type nat hook output priority -5; }")
    with pytest.raises(ConflictError, match="OUTPUT is not the built-in chain"):
        apply(kernel, SEED)


def test_a_base_chain_under_a_name_of_ours_is_a_conflict(netns: Netns, kernel: Namespace) -> None:
    netns.run("nft", "add", "table", "ip", "nat")
    netns.run("nft", "add", "chain", "ip", "nat", "NETAPPLY_OUTPUT", "{ type nat hook output priority 5; }")
    with pytest.raises(ConflictError, match="NETAPPLY_OUTPUT is somebody else's"):
        apply(kernel, SEED)


def test_an_unreadable_rule_in_our_chain_is_drift_and_is_replaced(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, SEED)
    netns.run("nft", "add", "rule", "ip", "nat", "NETAPPLY_OUTPUT", "ip", "ttl", "5", "counter", "accept")
    assert BACKEND.read(kernel).ruleset != SEED
    assert apply(kernel, SEED) == ["batch ip"]
    assert BACKEND.read(kernel).ruleset == SEED


def test_a_comment_that_is_not_last_is_not_of_our_making(netns: Netns, kernel: Namespace) -> None:
    """Read as last it would compare equal, and yet not be what iptables-nft -C looks for."""
    apply(kernel, nat())
    words = "-m comment --comment x -m owner --uid-owner 1337 -j RETURN"
    netns.run("iptables-nft", "-t", "nat", "-A", "NETAPPLY_OUTPUT", *words.split())
    assert apply(kernel, nat(OWN._replace(comment="x"))) == ["batch ip, ip6"]
    assert BACKEND.encode(BACKEND.read(kernel), nat(OWN._replace(comment="x"))) == ()


def test_a_strange_rule_elsewhere_is_foreign(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, SEED)
    netns.run(
        "nft", "add", "rule", "ip", "nat", "OUTPUT", "ip", "ttl", "5", "quota", "1", "mbytes", "counter", "accept"
    )
    after = BACKEND.read(kernel)
    assert after.ruleset == SEED
    assert after.foreign != ()
    apply(kernel, None)
    assert "ttl 5" in listed(netns)


def test_chains_are_read_in_the_order_in_which_they_were_asked_for(kernel: Namespace) -> None:
    """The kernel keeps the order of creation, so another order is made anew, jumps and all."""
    first, second = Chain("NETAPPLY_OUTPUT", (OWN,)), Chain("NETAPPLY_B", (CAPTURE,))
    output = Chain("OUTPUT", (), NAT_OUTPUT, (JUMP,))
    for chains in ((first, second), (second, first), (first,), (second, first)):
        ruleset = Ruleset((Table("ip", "nat", (output, *chains)),))
        apply(kernel, ruleset)
        assert BACKEND.read(kernel).ruleset == ruleset


def send() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", 9))


def test_foreign_is_equal_while_only_counters_move(netns: Netns, kernel: Namespace) -> None:
    netns.run("iptables-nft", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT")
    before, rules = BACKEND.read(kernel).foreign, saved(netns)
    netns.enter(send)
    assert saved(netns) != rules
    assert BACKEND.read(kernel).foreign == before
    netns.run("iptables-nft", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT")
    assert BACKEND.read(kernel).foreign != before


def test_chains_that_stay_the_same_keep_their_counters(netns: Netns, kernel: Namespace) -> None:
    count = Chain("NETAPPLY_COUNT", (Rule((UDP,), Return()),))
    to_count = Rule((), Jump("NETAPPLY_COUNT"))

    def ruleset(*rules: Rule) -> Ruleset:
        chains = (Chain("OUTPUT", (), NAT_OUTPUT, (to_count, JUMP)), count, Chain("NETAPPLY_OUTPUT", rules))
        return Ruleset((Table("ip", "nat", chains),))

    apply(kernel, ruleset(OWN, CAPTURE))  # a target that translates addresses switches conntrack on, and so nat chains
    netns.enter(send)
    apply(kernel, ruleset(CAPTURE))
    counters = BACKEND.read(kernel).counters
    assert counters["ip", "nat", "NETAPPLY_COUNT", 0] == (1, 29)
    assert counters["ip", "nat", "OUTPUT", 0] == (1, 29)
    assert counters["ip", "nat", "NETAPPLY_OUTPUT", 0] == (0, 0)


def test_sets_come_before_the_rules_and_go_after_them(netns: Netns, kernel: Namespace) -> None:
    blocks = named_set("ip", [Cidr(bytes([10, n, 0, 0]), 16) for n in range(50)])
    other = named_set("ip", [Cidr(b"\xc0\xa8\0\0", 16)])

    def ruleset(*sets: object) -> Ruleset:
        rules = tuple(Rule((SetMatch("dst", each.name),), Return()) for each in sets)
        chains = (Chain("OUTPUT", (), NAT_OUTPUT, (JUMP,)), Chain("NETAPPLY_OUTPUT", rules))
        return Ruleset((Table("ip", "nat", chains),), tuple(sorted(sets)))

    assert apply(kernel, ruleset(blocks, other)) == [
        *sorted([f"create set {blocks.name}", f"create set {other.name}"]),
        "batch ip",
    ]
    assert BACKEND.read(kernel).ruleset == ruleset(blocks, other)
    assert f"--match-set {blocks.name} dst" in netns.run("iptables-nft-save")
    assert apply(kernel, ruleset(other)) == ["batch ip", f"destroy set {blocks.name}"]
    assert BACKEND.read(kernel).ruleset == ruleset(other)
    apply(kernel, None)
    assert BACKEND.read(kernel).ruleset is None


@pytest.fixture
def cgroup() -> Iterator[str]:
    """The path of a cgroup v2 of our own."""
    name = f"netapply-test-{secrets.token_hex(4)}"
    mounted = "mount -t cgroup2 none /mnt && cd /mnt && "
    made = subprocess.run(["unshare", "-m", "sh", "-c", f"{mounted} mkdir {name}"], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no cgroup v2 to be had here")
    yield name
    subprocess.run(["unshare", "-m", "sh", "-c", f"{mounted} rmdir {name}"], check=True)


def test_a_cgroup_is_told_by_its_path(netns: Netns, kernel: Namespace, cgroup: str) -> None:
    """xt_cgroup stores the path and not the id, so rules that differ in the id alone are the same."""
    ruleset = nat(Rule((CgroupMatch(cgroup, 4711),), Return()))
    apply(kernel, ruleset)
    assert f"-m cgroup --path {cgroup} -j RETURN" in netns.run("iptables-nft-save")
    assert BACKEND.encode(BACKEND.read(kernel), ruleset) == ()
    apply(kernel, None)


def test_the_stock_tool_can_delete_flush_and_remove_what_we_wrote(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, nat(OWN, CAPTURE, Rule((UDP, PortMatch("dst", (PortRange(53, 53),))), Redirect(15053))))
    tool = ("iptables-nft", "-t", "nat")
    netns.run(*tool, "-D", "NETAPPLY_OUTPUT", "-p", "udp", "--dport", "53", "-j", "REDIRECT", "--to-ports", "15053")
    assert BACKEND.read(kernel).ruleset.tables[0] == SEED.tables[0]
    netns.run(*tool, "-F")
    netns.run(*tool, "-X", "NETAPPLY_OUTPUT")
    apply(kernel, None)
    assert listed(netns) == ""


def test_tables_and_chains_that_iptables_does_not_have_are_refused(kernel: Namespace) -> None:
    snapshot = BACKEND.read(kernel)
    for table in (
        Table("inet", "netapply", ()),
        Table("ip", "security", ()),
        Table("ip", "nat", (Chain("OUTPUT", (LOOPBACK,), Base("nat", "output", 0)),)),
    ):
        with pytest.raises(UnsupportedError):
            BACKEND.encode(snapshot, Ruleset((table,)))


def test_unknown_attributes_of_an_expression_are_tolerated() -> None:
    """A newer kernel may say more about an expression than we asked for."""
    plain = parse_attributes(encode_rule(LOOPBACK, "ip").attributes)[4]
    meta_data = plain.index(b"meta\0") + 8
    size = plain[meta_data]
    extra = u32(99, 1)
    grown = bytearray(plain[: meta_data + size] + extra + plain[meta_data + size :])
    grown[meta_data] += len(extra)
    grown[0] += len(extra)
    assert decode_rule(without_state(bytes(grown)), "ip") == (LOOPBACK, False)


def test_an_extension_that_the_kernel_lacks_is_found_missing(kernel: Namespace) -> None:
    lacking = Needed("log", "match", "nonesuch", 0, "xt_nonesuch")
    present = Needed("", "match", "tcp", 0, "x_tables")
    other = Needed("ip6", "target", "NONESUCH", 3, "xt_NONESUCH", "ip6")
    assert list(missing_extensions(kernel, (lacking, present, other))) == [lacking, other]


class Denied:
    """A kernel that lets us do nothing."""

    lock_timeout = 0.0

    def netlink(self, protocol: int, request: bytes) -> list[bytes]:
        raise PermissionError(errno.EPERM, "Operation not permitted")


def test_denied_is_told_apart_from_unsupported() -> None:
    assert BACKEND.probe(Denied()).status == "denied"


def test_tables_marked_as_ours_are_cleaned_even_when_nothing_else_is_left(netns: Netns, kernel: Namespace) -> None:
    """As a foreign rule in them kept an earlier clean from it."""
    op = TableOperations(("ip", "nat"))
    send_batch(kernel, [op.add_table().operation, op.add_base_chain("OUTPUT", NAT_OUTPUT).operation], None)
    assert "OUTPUT" in listed(netns)
    assert apply(kernel, None) == ["batch ip"]
    assert listed(netns) == ""
