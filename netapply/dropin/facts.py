"""What Istio looks up: the namespace's addresses, resolvers, and the ids of the names in its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from netapply.errors import NetapplyError
from netapply.importers.istio import Facts
from netapply.importers.istio_settings import IstioSettings
from netapply.kernel import Kernel
from netapply.lookups import SYSTEM, Lookups
from netapply.rtnetlink import local_addresses

#: Instead of a namespace's own where both families are meant: documentation addresses (RFC 5737, RFC 3849).
BOTH_FAMILIES = (b"\xc0\0\2\1", b"\x20\x01\x0d\xb8" + bytes(11) + b"\1")


def read_facts(kernel: Kernel, settings: IstioSettings, lookups: Lookups = SYSTEM) -> Facts:
    """All facts; the resolvers where the settings ask for them. Raises KernelError, NetapplyError."""
    servers: tuple[str, ...] = ()
    if settings.redirect_dns and not settings.capture_all_dns:
        try:
            servers = lookups.servers()
        except OSError as error:
            raise NetapplyError(
                f"the resolvers cannot be read from /etc/resolv.conf: {error.strerror}",
                next_step="mount it, or say --capture-all-dns, which does not need it",
            ) from error
    return without_kernel(settings, lookups)._replace(addresses=tuple(local_addresses(kernel)), servers=servers)


def without_kernel(settings: IstioSettings, lookups: Lookups = SYSTEM) -> Facts:
    """The ids of the names that stand in the settings, with an address of each family."""
    users = [settings.proxy_uid or settings.envoy_user]
    groups = [settings.proxy_gid or settings.proxy_uid]
    groups += [settings.istio_outbound_owner_groups, settings.istio_outbound_owner_groups_exclude]
    return Facts(BOTH_FAMILIES, (), _ids(users, lookups.uid), _ids(groups, lookups.gid))


def _ids(lists: list[str], look_up: Callable[[str], int | None]) -> Mapping[str, int]:
    words = {word.strip() for text in lists for word in text.split(",")}
    found = {word: look_up(word) for word in words if word.strip("*0123456789-")}
    return {name: number for name, number in found.items() if number is not None}
