"""Which keepers an agent has: found by whatever names their namespace, and no two of one namespace."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from netapply.agent.keeper import Keeper, Surroundings
from netapply.agent.model import Target
from netapply.agent.places import Place, find_place
from netapply.errors import NamespaceError
from netapply.nsfs import NamespaceId


class Roster:
    """All keepers, by the keys of their places."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self.keepers: dict[str, Keeper] = {}
        #: Those that are let go, once what is being done there is done.
        self._parting: dict[Keeper, asyncio.Task[None]] = {}
        self._claims: dict[NamespaceId, Keeper] = {}

    def find(self, target: str | int | Target) -> Keeper:
        """The keeper of a namespace that is known. Raises NamespaceError."""
        place = find_place(target_of(target).spec)
        if place.fd >= 0:
            status = os.fstat(place.fd)
            os.close(place.fd)
            for identity, keeper in list(self._claims.items()):  # workers claim meanwhile
                if (identity.device, identity.inode) == (status.st_dev, status.st_ino):
                    return keeper
        found = self.keepers.get(place.key)
        if found is None:
            raise NamespaceError(f"the agent does not know {place.name}", next_step="see `netapply status`")
        return found

    async def find_or_add(self, target: Target) -> tuple[Keeper, bool]:
        """The keeper of a namespace, and whether it is a new one. Raises NamespaceError."""
        while True:
            try:
                return self.find(target), False
            except NamespaceError:
                place = find_place(target.spec)
            parting = [task for keeper, task in self._parting.items() if keeper.place.key == place.key]
            if not parting:
                return self.add(place, target.labels), True
            if place.fd >= 0:
                os.close(place.fd)
            await asyncio.wait(parting)

    def add(self, place: Place, labels: Mapping[str, str]) -> Keeper:
        """A new one."""
        keeper = self.keepers[place.key] = Keeper(place, self._around, dict(labels))
        return keeper

    async def drop(self, keeper: Keeper) -> None:
        """Let go of a namespace, whose rules stay."""
        if self.keepers.get(keeper.place.key) is keeper:
            del self.keepers[keeper.place.key]
        keeper.stop()
        if keeper not in self._parting:
            self._parting[keeper] = asyncio.create_task(self._part_with(keeper))
        # Whoever waits for this may leave: who is half let go would keep all others out.
        await asyncio.shield(self._parting[keeper])

    async def _part_with(self, keeper: Keeper) -> None:
        try:
            await keeper.close()
            if keeper.place.fd >= 0:
                os.close(keeper.place.fd)
        finally:
            del self._parting[keeper]

    async def parted(self) -> None:
        """Back when all that are let go by now are."""
        await asyncio.gather(*self._parting.values(), return_exceptions=True)

    def claim(self, keeper: Keeper, identity: NamespaceId) -> str:
        """The name of another keeper that holds this namespace; "" where it is this one's now. From any thread."""
        other = self._claims.setdefault(identity, keeper)
        return "" if other is keeper else other.place.name

    def unclaim(self, keeper: Keeper, identity: NamespaceId) -> None:
        """It is nobody's any more."""
        if self._claims.get(identity) is keeper:
            del self._claims[identity]


def target_of(target: str | int | Target) -> Target:
    """What was named, as a Target."""
    return target if isinstance(target, Target) else Target(target)
