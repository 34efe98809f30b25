"""Rules of somebody else, in the dialect of the backend that is looked at: a plan's, under names that are not ours."""

from __future__ import annotations

from netapply.backend import Owned
from netapply.compiler import compile_plan
from netapply.conformance.stage import Stage
from netapply.kernel import NetlinkProtocol, Scratch
from netapply.namespace import Namespace
from netapply.plan import CapturePlan
from netapply.ruleset import Chain, Family, Match, Rule, Ruleset, Table

#: How the foreign rules are told from ours, and from all others.
OWNED = Owned(("FOREIGN_",), "foreign", "foreign-")


#: Tags by which the built-in backends know rules, chains and tables of theirs among everybody's (decision 11), as they
#: go to the kernel, and what foreign ones bear in their place. A backend that tags in another way is not tested here.
_TAGS = (
    (b"netA", bytes(4)),
    (b"netZ", bytes(4)),
    (b"\x07\x00\x07\x00\x6e\x01", b"\x07\x00\x07\x00\x6d\x01"),  # NFTA_RULE_USERDATA
    (b"\0\x09netapply\0", b"\0\x09somebody\0"),
)


class _Somebody(Namespace):
    """A namespace in which nothing that is put up bears our tags."""

    def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
        """The same without tags."""
        return super().netlink(protocol, _untagged(request))

    def setsockopt(self, family: Family, option: int, blob: bytes, scratch: Scratch | None = None) -> bytes:
        """The same without tags."""
        return super().setsockopt(family, option, _untagged(blob), scratch)


def _untagged(data: bytes) -> bytes:
    for tag, other in _TAGS:
        data = data.replace(tag, other)
    return data


def put_up(stage: Stage, plan: CapturePlan) -> None:
    """Have foreign rules that do what `plan` says. They stay as long as the namespace. Raises NetapplyError."""
    backend = stage.backend
    with _Somebody.open(stage.world.pod.path) as namespace:
        for step in backend.encode(backend.read(namespace, OWNED), renamed(compile_plan(plan, backend.dialect))):
            backend.commit(namespace, step)


def renamed(ruleset: Ruleset) -> Ruleset:
    """The same rules under foreign names."""
    sets = tuple(each._replace(name=_name(each.name)) for each in ruleset.sets)
    return Ruleset(tuple(_table(table) for table in ruleset.tables), sets)


def _table(table: Table) -> Table:
    name = OWNED.table if table.name == "netapply" else table.name
    return table._replace(name=name, chains=tuple(_chain(chain) for chain in table.chains))


def _chain(chain: Chain) -> Chain:
    head, rules = (tuple(_rule(rule) for rule in each) for each in (chain.head, chain.rules))
    return chain._replace(name=_name(chain.name), head=head, rules=rules)


def _rule(rule: Rule) -> Rule:
    matches = tuple(_match(match) for match in rule.matches)
    if rule.statement.kind != "jump":
        return rule._replace(matches=matches)
    return rule._replace(matches=matches, statement=rule.statement._replace(chain=_name(rule.statement.chain)))


def _match(match: Match) -> Match:
    return match._replace(set=_name(match.set)) if match.kind == "set" else match


def _name(name: str) -> str:
    return name.replace("NETAPPLY_", OWNED.prefixes[0]).replace("netapply-", OWNED.sets)
