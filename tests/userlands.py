"""iptables and nft of several Debian releases, and a Prometheus, unpacked side by side under build/: for tests alone.

`make userlands` (`python -m tests.userlands`) fetches them by the machine's own apt, from the mirror that the machine
uses, with each release's C library: what is installed is neither touched nor used. `bin/` of each holds the tools.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

#: iptables 1.8.7 with nft 0.9.8, 1.8.9 with 1.0.6, 1.8.11 with 1.1.3.
SUITES = ("bullseye", "bookworm", "trixie")
PROMETHEUS = "prometheus"  # 2.42, with promtool
HOME = Path(__file__).resolve().parent.parent / "build" / "userlands"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")  # of the package debian-archive-keyring
PATIENCE = 180  # seconds that one run of apt may take
#: Programs of the packages that do the work of all tools of a dialect, by the name that they are called by first.
PROGRAMS = {
    **{f"{name}-{dialect}{verb}": f"xtables-{dialect}-multi"
       for dialect in ("legacy", "nft") for name in ("iptables", "ip6tables") for verb in ("", "-save", "-restore")},
    "nft": "nft",
}  # fmt: skip


class Wanted(NamedTuple):
    """What one of them is unpacked from, with what that depends on or alone, and which of its tools must run."""

    release: str
    packages: tuple[str, ...]
    tools: tuple[str, ...]
    alone: bool = False


WANTED = {
    **{suite: Wanted(suite, ("iptables", "nftables"), ("iptables-nft", "iptables-legacy", "nft")) for suite in SUITES},
    # Go's programs take a C library, and nothing else of the 400 MB that the package depends on.
    PROMETHEUS: Wanted("bookworm", ("prometheus", "libc6"), ("prometheus", "promtool"), alone=True),
}
SCRIPT = """\
#!/bin/sh
# {program} of {suite}, with its own C library and extensions.
root=${{0%/*}}/../root
export XTABLES_LIBDIR="$root/{extensions}"
exec "$root/{loader}" --library-path "{libraries}" "$root/{program}" {first} "$@"
"""


class Userland(NamedTuple):
    """The tools of one Debian release, or PROMETHEUS."""

    suite: str
    path: Path

    def tool(self, name: str) -> str:
        """The path of a tool, by a name of PROGRAMS; `prometheus` or `promtool`. It runs like the machine's own."""
        return str(self.path / "bin" / name)

    def version(self, name: str) -> tuple[int, ...]:
        """What the tool says of itself: (1, 8, 7)."""
        done = subprocess.run([self.tool(name), "--version"], capture_output=True, text=True, timeout=30, check=True)
        found = re.search(r"v(?:ersion )?([\d.]+)", done.stdout)
        assert found, done.stdout
        return tuple(map(int, found[1].split(".")))


def find(suite: str) -> Userland | None:
    """The userland of this release where it was unpacked, or None."""
    path = HOME / suite
    return Userland(suite, path) if path.is_dir() else None


def fetch(suite: str, mirror: str) -> Userland:
    """Download and unpack; whole, or not at all. Raises SystemExit that says why."""
    HOME.mkdir(parents=True, exist_ok=True)
    wanted = WANTED[suite]
    with tempfile.TemporaryDirectory(dir=HOME, prefix=f".{suite}-") as directory:
        work = Path(directory)
        made = work / "made"
        (made / "root").mkdir(parents=True)
        (made / "bin").mkdir()
        for package in _download(wanted, mirror, work):
            _run(["dpkg-deb", "--extract", str(package), str(made / "root")])
        _write_tools(suite, made)
        for tool in wanted.tools:
            _run([str(made / "bin" / tool), "--version"])
        made.rename(HOME / suite)
    return Userland(suite, HOME / suite)


def _download(wanted: Wanted, mirror: str, work: Path) -> list[Path]:
    """The packages and all that they depend on: apt is told of this one release, and that nothing is installed."""
    signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    (work / "sources.list").write_text(f"deb {signed}{mirror} {wanted.release} main\n")
    (work / "status").touch()
    for name in ("state/lists/partial", "archives/partial"):
        (work / name).mkdir(parents=True)
    settings = {
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work,
        "Dir::Cache::archives": work / "archives",
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Default-Release": "",
        "APT::Sandbox::User": "root",  # another user could not write here
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
        "Acquire::http::Timeout": 30,
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    hint = f"is {wanted.release} at {mirror} still? another mirror: make userlands MIRROR=URI"
    _run([*apt, "update"], hint)
    if wanted.alone:
        _run([*apt, "download", *wanted.packages], hint, work / "archives")
    else:
        _run([*apt, "install", "--yes", "--download-only", "--no-install-recommends", *wanted.packages], hint)
    return sorted((work / "archives").glob("*.deb"))


def _write_tools(suite: str, made: Path) -> None:
    """A script for each tool, which starts it by the release's own loader."""
    root = made / "root"
    alone = WANTED[suite].alone
    needed = ("libc.so.6",) if alone else ("libc.so.6", "libxtables.so.12", "libnftables.so.1")
    places = {
        "suite": suite,
        "loader": _place(root, "ld-linux*.so.*"),
        "extensions": "" if alone else _place(root, "libxt_owner.so").parent,
        "libraries": ":".join(f"$root/{each}" for each in dict.fromkeys(_place(root, name).parent for name in needed)),
    }
    programs = {name: name for name in WANTED[suite].tools} if alone else PROGRAMS
    for tool, program in programs.items():
        script = made / "bin" / tool
        first = "" if tool == program else tool
        script.write_text(SCRIPT.format(program=_place(root, f"*bin/{program}"), first=first, **places))
        script.chmod(0o755)


def _place(root: Path, pattern: str) -> Path:
    """Where a file of that name is, from the root; not a link that leads out of it, as absolute ones do here."""
    found = (path for path in sorted(root.rglob(pattern)) if path.is_file() and path.resolve().is_relative_to(root))
    path = next(found, None)
    if path is None:
        raise SystemExit(f"userlands: no {pattern} in the packages under {root}")
    return path.relative_to(root)


def machine_mirror() -> str:
    """The mirror that the machine's apt sources name for its own release. Raises SystemExit where there is none."""
    if not shutil.which("apt-get"):
        raise SystemExit("userlands: there is no apt-get here; the readers' packages are Debian's")
    codename = re.search(r"(?m)^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
    listed = _run(["apt-get", "update", "--print-uris"])
    found = codename and re.search(rf"'(\S+)/dists/{codename[1]}/main/binary-", listed)
    if not found:
        raise SystemExit("userlands: apt's sources name no mirror of this release; make userlands MIRROR=URI")
    return found[1]


def _run(command: list[str], hint: str = "", place: Path | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=place)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"userlands: {command[0]} was not done after {PATIENCE} s; {hint}") from None
    if done.returncode:
        said = " ".join(word for word in command if not word.startswith("-o"))
        raise SystemExit(f"userlands: {said}: {done.stderr.strip() or done.stdout.strip()}\n{hint}".strip())
    return done.stdout


def main() -> None:
    """Fetch what is not there yet."""
    parser = argparse.ArgumentParser(prog="python -m tests.userlands", description=__doc__)
    parser.add_argument("suites", nargs="*", default=[*WANTED], metavar="SUITE", help=f"default: {' '.join(WANTED)}")
    parser.add_argument("--mirror", default="", metavar="URI", help="instead of the machine's own")
    wanted = parser.parse_args()
    missing = [suite for suite in wanted.suites if find(suite) is None]
    mirror = wanted.mirror or (machine_mirror() if missing else "")
    for suite in missing:
        made = fetch(suite, mirror)
        versions = (f"{name} {'.'.join(map(str, made.version(name)))}" for name in WANTED[suite].tools)
        print(f"userlands: {suite}: {', '.join(versions)}", flush=True)


if __name__ == "__main__":
    main()
