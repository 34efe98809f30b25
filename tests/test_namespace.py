from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

from netapply import namespace as namespace_module
from netapply import netlink as netlink_module
from netapply import nsfs, reaper, syscalls
from netapply.errors import NamespaceError
from netapply.kernel import NETLINK_NETFILTER, NETLINK_ROUTE
from netapply.namespace import Namespace, NamespaceId
from tests import netns as namespaces
from tests.netns import in_thread

NFGEN = struct.Struct("=IHHIIBBH")
REQUEST, ACK, DUMP, CREATE = 1, 4, 0x300, 0x400
NEWTABLE, GETTABLE, GETGEN = 0xA00, 0xA01, 0xA10
IPT_SO_GET_INFO = 64


def nft(kind: int, flags: int, sequence: int = 7, family: int = 0, body: bytes = b"") -> bytes:
    return NFGEN.pack(NFGEN.size + len(body), kind, REQUEST | flags, sequence, 0, family, 0, 0) + body


def batch(*messages: bytes) -> bytes:
    begin = NFGEN.pack(NFGEN.size, 0x10, REQUEST, 0, 0, 0, 0, socket.htons(10))
    end = NFGEN.pack(NFGEN.size, 0x11, REQUEST, 0, 0, 0, 0, socket.htons(10))
    return b"".join((begin, *messages, end))


def header(message: bytes) -> tuple[int, int, int, int, int]:
    return struct.unpack_from("=IHHII", message)


def current_inode() -> int:
    return Path(nsfs.CURRENT).stat().st_ino


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def wait_until(condition, seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def namespace(netns):
    with Namespace.open(netns.fd) as opened:
        yield opened


# --- names and identity ------------------------------------------------------------------------------------


def test_every_kind_of_name_leads_to_the_same_namespace(named_netns):
    process = named_netns.spawn("sleep", "60")
    try:
        assert wait_until(lambda: Path(f"/proc/{process.pid}/ns/net").stat().st_ino == named_netns.inode)
        found = set()
        fd = named_netns.fd
        for spec in (named_netns.name, f"/run/netns/{named_netns.name}", f"pid:{process.pid}", f"fd:{fd}", fd):
            with Namespace.open(spec) as opened:
                found.add(opened.identity)
    finally:
        process.kill()
        process.wait(10)
    assert [identity.inode for identity in found] == [named_netns.inode]


def test_two_namespaces_differ_in_inode_and_cookie(make_netns):
    with Namespace.open(make_netns().fd) as one, Namespace.open(make_netns().fd) as other:
        assert one.identity.inode != other.identity.inode
        assert one.identity.cookie != other.identity.cookie


def test_none_is_the_namespace_that_the_thread_runs_in_and_needs_no_setns(netns, monkeypatch):
    def work() -> tuple[int, str]:
        with Namespace.open() as opened:
            opened.netlink(NETLINK_NETFILTER, nft(GETGEN, 0))
            return opened.identity.inode, opened.read_file("net/dev")

    def refuse(fd: int, kind: int) -> int:
        raise AssertionError("an init container may not call setns")

    def run() -> tuple[int, str]:
        monkeypatch.setattr(syscalls, "raw_setns", refuse)
        return work()

    inode, devices = netns.enter(run)
    assert inode == netns.inode
    assert devices.count(":") == 1


def test_an_init_container_needs_no_cap_sys_admin(netns):
    script = (
        "from netapply.namespace import Namespace\n"
        "with Namespace.open() as namespace:\n"
        "    namespace.write_file('sys/net/ipv4/ip_forward', '1')\n"
        "    print(namespace.identity.inode, len(namespace.read_file('net/dev')) > 0)\n"
    )
    shown = netns.run("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", script)
    assert shown == f"{netns.inode} True\n"


@pytest.mark.parametrize("name", ["", "-x", ".", ".hidden", "a b", "ä", "a\n", "a\0b", "netns:1", "--host"])
def test_a_name_outside_of_the_grammar_is_refused(name):
    with pytest.raises(NamespaceError, match="cannot name"):
        Namespace.open(name)


@pytest.mark.parametrize("spec", ["pid:", "pid:-1", "pid:1x", "fd:٣", "fd:99999999999"])
def test_a_pid_or_descriptor_that_is_no_number_is_refused(spec):
    with pytest.raises(NamespaceError, match="not a number"):
        Namespace.open(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("netapply-test-absent", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("pid:4194304", "does not exist"),
        ("fd:4000", "not an open descriptor"),
        ("/proc/self/ns/mnt", "another kind"),
        ("/proc/self/status", "is no namespace"),
        ("/dev/null", "is no namespace"),
    ],
)
def test_what_is_no_network_namespace_is_refused_with_a_next_step(spec, words):
    before = descriptors()
    with pytest.raises(NamespaceError, match=words) as caught:
        Namespace.open(spec)
    assert caught.value.next_step
    assert descriptors() == before


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NamespaceError, match="is no namespace"):
        Namespace.open(str(tmp_path / "fifo"))


def test_a_pid_that_ended_while_its_namespace_was_opened_is_refused(monkeypatch):
    process = os.fork()
    if not process:
        time.sleep(30)
        os._exit(0)
    opened: list[int] = []

    def open_then_die(path: str, flags: int) -> int:
        opened.append(os.dup(0))
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        return opened[0]

    with monkeypatch.context() as patch:
        patch.setattr(nsfs.os, "open", open_then_die)
        with pytest.raises(NamespaceError, match="does not exist"):
            Namespace.open(f"pid:{process}")
    os.waitpid(process, 0)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(opened[0])


def test_an_inherited_descriptor_stays_the_callers(netns):
    Namespace.open(netns.fd).close()
    assert os.fstat(netns.fd).st_ino == netns.inode


# --- the machine's own namespace ---------------------------------------------------------------------------


@pytest.fixture
def on_the_machine():
    with Namespace.open(None, host=True) as opened:
        if not nsfs.is_initial(opened.identity):
            pytest.skip("this test session does not run in the machine's initial namespace")


@pytest.mark.usefixtures("on_the_machine")
@pytest.mark.parametrize("name", ["none", "path", "pid", "fd", "int", "link"])
def test_the_machines_own_namespace_is_refused_however_it_is_named(name, tmp_path):
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    (tmp_path / "link").symlink_to("/proc/self/ns/net")
    specs = {"none": None, "path": "/proc/self/ns/net", "pid": f"pid:{os.getpid()}", "fd": f"fd:{fd}", "int": fd}
    try:
        with pytest.raises(NamespaceError, match="machine's own") as caught:
            Namespace.open(specs.get(name, str(tmp_path / "link")))
        assert "--host" in caught.value.next_step
        Namespace.open(specs.get(name, str(tmp_path / "link")), host=True).close()
    finally:
        os.close(fd)


@pytest.mark.usefixtures("on_the_machine")
def test_the_first_process_is_refused_whether_we_may_look_at_it_or_not():
    with pytest.raises(NamespaceError):
        Namespace.open("pid:1")


@pytest.mark.parametrize(
    ("identity", "sysctl", "initial"),
    [
        (NamespaceId(4, 0xEFFFFFF9, 3), False, True),  # 6.18
        (NamespaceId(4, 0xF0000000, 1), False, True),  # 5.14 to 6.17
        (NamespaceId(4, 0xF0000000, 0), True, True),  # 5.10
        (NamespaceId(4, 0xF0000081, 9), False, False),
        (NamespaceId(4, 0xF0000081, 0), False, False),
    ],
)
def test_each_kernels_sign_of_the_initial_namespace_is_enough(identity, sysctl, initial, monkeypatch):
    monkeypatch.setattr(nsfs.os, "access", lambda path, mode: sysctl)
    assert nsfs.is_initial(identity) is initial


def test_the_setting_that_only_the_initial_namespace_has_is_missing_in_others(netns):
    assert not netns.enter(lambda: nsfs.is_initial(NamespaceId(0, 0, 0)))


# --- verify_identity ---------------------------------------------------------------------------------------


def test_an_unchanged_name_is_verified(named_netns):
    with Namespace.open(named_netns.name) as opened:
        opened.verify_identity()


def test_a_name_that_was_deleted_and_made_anew_is_noticed():
    with namespaces.named() as first, Namespace.open(first.name) as opened:
        namespaces.delete(first.name)
        with namespaces.named(first.name), pytest.raises(NamespaceError, match="another one"):
            opened.verify_identity()


def test_a_name_that_was_deleted_is_noticed():
    with namespaces.named() as first, Namespace.open(first.name) as opened:
        namespaces.delete(first.name)
        with pytest.raises(NamespaceError, match=r"deleted|another one"):
            opened.verify_identity()


def test_a_relative_path_is_verified_from_any_directory(named_netns, monkeypatch, tmp_path):
    monkeypatch.chdir("/run/netns")
    with Namespace.open(f"./{named_netns.name}") as opened:
        monkeypatch.chdir(tmp_path)
        opened.verify_identity()


# --- entering and coming back ------------------------------------------------------------------------------


def test_the_calling_thread_is_home_after_every_call(namespace):
    home = current_inode()
    namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, 0))
    namespace.read_file("net/dev")
    namespace.write_file("sys/net/ipv4/ip_forward", "1")
    with pytest.raises(FileNotFoundError):
        namespace.read_file("net/absent")
    assert current_inode() == home


def test_a_thread_that_cannot_come_back_ends_the_process(namespace, monkeypatch, capfd):
    real, calls = syscalls.raw_setns, []

    class Aborted(BaseException):
        pass

    def only_there(fd: int, kind: int) -> int:
        calls.append(fd)
        return real(fd, kind) if len(calls) == 1 else -1

    def abort() -> None:
        raise Aborted

    def work() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "raw_setns", only_there)
            patch.setattr(namespace_module.os, "abort", abort)
            namespace.read_file("net/dev")

    with pytest.raises(Aborted):
        in_thread(work)
    assert "cannot come back" in capfd.readouterr().err


def test_a_namespace_that_may_not_be_entered_is_an_error_and_no_abort(namespace, monkeypatch):
    def refuse(fd: int, kind: int) -> int:
        syscalls.ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(syscalls, "raw_setns", refuse)
    with pytest.raises(NamespaceError, match="cannot be entered"):
        namespace.read_file("net/dev")


def test_inside_runs_in_the_namespace_and_hands_back_the_result(namespace):
    home = current_inode()
    assert namespace.inside(current_inode) == namespace.identity.inode
    assert current_inode() == home


def test_inside_hands_back_the_exception(namespace):
    with pytest.raises(ZeroDivisionError):
        namespace.inside(lambda: 1 // 0)


# --- files -------------------------------------------------------------------------------------------------


def test_files_are_those_of_the_namespace(make_netns):
    with Namespace.open(make_netns(lo=False).fd) as down, Namespace.open(make_netns().fd) as up:
        assert down.read_file("net/if_inet6") == ""
        assert up.read_file("net/if_inet6").split()[-1] == "lo"


def test_a_setting_is_written_in_the_namespace_alone(make_netns):
    with Namespace.open(make_netns().fd) as one, Namespace.open(make_netns().fd) as other:
        one.write_file("sys/net/ipv4/ip_forward", "1")
        assert one.read_file("sys/net/ipv4/ip_forward").strip() == "1"
        assert other.read_file("sys/net/ipv4/ip_forward").strip() == "0"


@pytest.mark.parametrize("path", ["self/status", "../etc/passwd", "net/../status", "/net/dev", "sys/../version"])
def test_a_path_outside_of_proc_net_and_proc_sys_is_refused(namespace, path):
    with pytest.raises(ValueError, match="neither"):
        namespace.read_file(path)


def test_looking_creates_nothing(netns):
    def tables() -> str:
        nft_rules = netns.run("nft", "list", "ruleset")
        names = netns.enter(lambda: [Path(f"/proc/thread-self/net/{n}").read_text() for n in LEGACY if exists(n)])
        return nft_rules + "".join(names)

    def exists(name: str) -> bool:
        return Path(f"/proc/thread-self/net/{name}").exists()

    with Namespace.open(netns.fd) as opened:
        opened.netlink(NETLINK_NETFILTER, nft(GETTABLE, DUMP))
        opened.netlink(NETLINK_NETFILTER, nft(GETGEN, 0))
        for name in LEGACY:
            try:
                opened.read_file(f"net/{name}")
            except FileNotFoundError:
                continue
        opened.verify_identity()
    assert tables() == ""


LEGACY = ("ip_tables_names", "ip6_tables_names")

# --- netlink -----------------------------------------------------------------------------------------------


def test_a_get_is_answered(namespace):
    (answer,) = namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, 0))
    assert header(answer)[1] == 0xA0F


def test_a_get_with_acknowledgement_ends_in_it(namespace):
    answer = namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, ACK))
    assert [header(each)[1] for each in answer] == [0xA0F, 2]


def test_an_empty_dump_ends_in_done(namespace):
    (answer,) = namespace.netlink(NETLINK_NETFILTER, nft(GETTABLE, DUMP))
    assert header(answer)[1] == 3


def test_a_dump_of_many_datagrams_is_read_to_its_end(netns, namespace):
    netns.run("nft", "-f", "-", stdin="".join(f"add table ip t{number}\n" for number in range(2000)))
    answer = namespace.netlink(NETLINK_NETFILTER, nft(GETTABLE, DUMP))
    assert len(answer) > 2
    assert sum(each.count(b"\0t") for each in answer) >= 2000
    assert header(answer[-1][-20:])[1] == 3


def test_the_error_of_a_batch_is_returned_with_its_sequence_number(namespace):
    name = struct.pack("=HH", 6, 1) + b"t\0\0\0"
    answer = namespace.netlink(
        NETLINK_NETFILTER, batch(nft(NEWTABLE, CREATE, 1, 2, name), nft(NEWTABLE, CREATE, 2, 99, name))
    )
    errors = [(header(each)[3], struct.unpack_from("=i", each, 16)[0]) for each in answer if header(each)[1] == 2]
    assert errors == [(2, -errno.EOPNOTSUPP)]


def test_a_batch_without_acknowledgements_is_answered_by_nothing_and_at_once(namespace):
    name = struct.pack("=HH", 6, 1) + b"t\0\0\0"
    begun = time.monotonic()
    assert namespace.netlink(NETLINK_NETFILTER, batch(nft(NEWTABLE, CREATE, 1, 2, name))) == []
    assert time.monotonic() - begun < 1


def test_a_batch_beyond_the_default_buffers_gets_every_acknowledgement(namespace):
    name = struct.pack("=HH", 6, 1) + b"t\0\0\0"
    messages = [nft(NEWTABLE, CREATE | ACK, number, 2, name) for number in range(1, 20001)]
    answer = namespace.netlink(NETLINK_NETFILTER, batch(*messages))
    assert [header(each)[3] for each in answer] == list(range(1, 20001))


def test_a_batch_of_a_stale_generation_is_answered_at_once(namespace):
    name = struct.pack("=HH", 6, 1) + b"t\0\0\0"
    generation = struct.pack("=HH", 8, 1) + struct.pack(">I", 4711)
    begin = NFGEN.pack(NFGEN.size + 8, 0x10, REQUEST, 5, 0, 0, 0, socket.htons(10)) + generation
    request = begin + batch(nft(NEWTABLE, CREATE | ACK, 6, 2, name))[NFGEN.size :]
    begun = time.monotonic()
    (answer,) = namespace.netlink(NETLINK_NETFILTER, request)
    assert time.monotonic() - begun < 1
    assert (header(answer)[3], struct.unpack_from("=i", answer, 16)[0]) == (5, -errno.ERESTART)


def test_several_requests_in_one_datagram_are_answered_all(namespace):
    answer = namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, ACK, 1) + nft(GETGEN, ACK, 2))
    assert [header(each)[3] for each in answer if header(each)[1] == 2] == [1, 2]


def test_another_process_cannot_send_to_a_socket_of_ours(netns, namespace):
    namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, 0))
    port = namespace._netlink[NETLINK_NETFILTER].getsockname()[0]

    def forge() -> None:
        other = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        with other, pytest.raises(ConnectionRefusedError):
            other.sendto(nft(2, 0, 7), (port, 0))

    netns.enter(forge)
    answer = namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, ACK))
    assert [header(each)[1] for each in answer] == [0xA0F, 2]


def test_an_answer_that_does_not_come_is_given_up_at_the_deadline(monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(netlink_module, "DEADLINE", 0.05)
    with ours, theirs, pytest.raises(TimeoutError):
        netlink_module.exchange(ours, NETLINK_NETFILTER, nft(GETGEN, ACK))


def test_after_a_failed_exchange_the_next_one_has_a_socket_of_its_own(namespace, monkeypatch):
    def fail(sock: socket.socket, protocol: int, request: bytes) -> list[bytes]:
        sock.send(request)
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(namespace_module, "exchange", fail)
        with pytest.raises(TimeoutError):
            namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, ACK, 1))
    answer = namespace.netlink(NETLINK_NETFILTER, nft(GETGEN, ACK, 2))
    assert {header(each)[3] for each in answer} == {2}


def test_threads_get_the_answers_of_their_own_namespace(make_netns):
    opened = [Namespace.open(make_netns().fd) for _ in range(3)]
    inodes: dict[int, set[int]] = {index: set() for index in range(3)}
    faults: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for sequence in range(1, 100):
                answer = opened[index].netlink(NETLINK_NETFILTER, nft(GETGEN, ACK, sequence))
                assert [header(each)[3] for each in answer] == [sequence, sequence]
            inodes[index].add(opened[index].inside(current_inode))
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            faults.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 2) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not faults
    assert inodes == {index: {opened[index].identity.inode} for index in range(3)}
    for each in opened:
        each.close()


# --- socket options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_a_socket_option_reads_with_an_input_buffer(namespace, family):
    info = namespace.getsockopt(family, IPT_SO_GET_INFO, b"nat".ljust(84, b"\0"))
    assert len(info) == 84
    assert struct.unpack_from("=I", info, 32)[0] == 0b11011  # valid_hooks: all but forward


def test_a_refused_socket_option_is_an_oserror(namespace):
    with pytest.raises(OSError) as caught:
        namespace.getsockopt("ip", IPT_SO_GET_INFO, b"absent".ljust(84, b"\0"))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(OSError) as caught:
        namespace.setsockopt("ip", IPT_SO_GET_INFO, b"\0" * 10)
    assert caught.value.errno in (errno.EINVAL, errno.EFAULT)


# --- closing -----------------------------------------------------------------------------------------------


def test_all_descriptors_are_released_soon_after_close(netns):
    time.sleep(2 * reaper.DELAY)  # those of the tests before
    before = descriptors()
    opened = Namespace.open(netns.fd)
    opened.netlink(NETLINK_NETFILTER, nft(GETGEN, 0))
    opened.netlink(NETLINK_ROUTE, struct.pack("=IHHII16x", 32, 18, 0x301, 1, 0))
    opened.getsockopt("ip", IPT_SO_GET_INFO, b"nat".ljust(84, b"\0"))
    opened.close()
    opened.close()
    assert len(descriptors() - before) == 1  # the netfilter socket
    time.sleep(reaper.DELAY + 0.03)
    assert descriptors() == before


def test_a_closed_namespace_that_is_deleted_is_gone_with_its_interfaces(make_netns):
    here, there = make_netns(), make_netns()
    here.run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", there.path)
    opened = Namespace.open(there.fd)
    opened.netlink(NETLINK_NETFILTER, nft(GETGEN, 0))
    there.close()
    time.sleep(0.1)
    assert "veth0" in here.run("ip", "-br", "link")
    opened.close()
    assert wait_until(lambda: "veth0" not in here.run("ip", "-br", "link"), 5)


def test_a_closed_namespace_refuses_work(netns):
    opened = Namespace.open(netns.fd)
    opened.close()
    for work in (opened.verify_identity, lambda: opened.read_file("net/dev"), lambda: opened.inside(current_inode)):
        with pytest.raises(NamespaceError, match="is closed"):
            work()


def test_closing_after_a_delete_does_not_wait_for_the_kernel(netns):
    name = struct.pack("=HH", 6, 1) + b"t\0\0\0"
    opened = Namespace.open(netns.fd)
    for _ in range(3):
        opened.netlink(NETLINK_NETFILTER, batch(nft(NEWTABLE, CREATE, 1, 2, name), nft(0xA02, 0, 2, 2, name)))
    begun = time.monotonic()
    opened.close()
    assert time.monotonic() - begun < 0.005


def test_more_sockets_than_may_wait_are_closed_at_once(monkeypatch):
    monkeypatch.setattr(reaper, "LIMIT", 0)
    reader, writer = os.pipe()
    reaper.close_later(writer)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(writer)
    os.close(reader)


def test_a_forked_child_does_not_keep_what_waits_to_be_closed():
    reader, writer = os.pipe()
    reaper.close_later(writer)
    child = os.fork()
    if not child:
        os._exit(0 if not Path(f"/proc/self/fd/{writer}").exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 1) == b""
    os.close(reader)
