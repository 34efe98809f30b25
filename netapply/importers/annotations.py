"""A pod as istio-cni reads it: its annotations, and the environment and ids of its proxy's container. Pure.

Source: cni/pkg/plugin/plugin.go (which pods are left alone), sidecar_redirect.go, sidecar_iptables_linux.go and
kubernetes.go of Istio. istio-cni takes no flags.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from netapply.errors import Fault, NetapplyError
from netapply.fields import is_list, is_mapping, shorten
from netapply.importers.istio_settings import WORDS, IstioSettings
from netapply.importers.readings import Reading, Source, read_flags

PREFIX = "traffic.sidecar.istio.io/"
MODE, INJECT, STATUS = "sidecar.istio.io/interceptionMode", "sidecar.istio.io/inject", "sidecar.istio.io/status"
KUBEVIRT, REROUTE = f"{PREFIX}kubevirtInterfaces", "istio.io/reroute-virtual-interfaces"
#: The setting that each annotation is.
ANNOTATIONS: Mapping[str, str] = {
    MODE: "istio_inbound_interception_mode",
    f"{PREFIX}includeInboundPorts": "istio_inbound_ports",
    f"{PREFIX}excludeInboundPorts": "istio_local_exclude_ports",
    f"{PREFIX}includeOutboundIPRanges": "istio_service_cidr",
    f"{PREFIX}excludeOutboundIPRanges": "istio_service_exclude_cidr",
    f"{PREFIX}includeOutboundPorts": "istio_outbound_ports",
    f"{PREFIX}excludeOutboundPorts": "istio_local_outbound_ports_exclude",
    f"{PREFIX}excludeInterfaces": "istio_exclude_interfaces",
    KUBEVIRT: "kube_virt_interfaces",
    REROUTE: "kube_virt_interfaces",
}
#: What istio-cni takes where the annotation is missing, and istio-iptables would not.
DEFAULTS = {
    "istio_inbound_interception_mode": "REDIRECT",
    "istio_inbound_ports": "*",
    "istio_local_exclude_ports": "15020",
    "istio_service_cidr": "*",
    "istio_local_outbound_ports_exclude": "15020",
    "proxy_uid": "1337",
    "proxy_gid": "1337",
}
#: Appended to the excluded inbound ports, as the injector does.
ADDED_PORTS = ("15020", "15021", "15090")
#: Of the proxy's environment.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "ISTIO_META_DNS_CAPTURE": ("redirect_dns", "capture_all_dns"),
    "ISTIO_DUAL_STACK": ("dual_stack",),
    "INVALID_DROP": ("drop_invalid",),
}
#: What istio-cni takes from its own environment.
OF_THE_AGENT = (
    "istio_outbound_ipv4_loopback_cidr", "istio_outbound_owner_groups", "istio_outbound_owner_groups_exclude",
)  # fmt: skip
#: By the end of an annotation's name, in lower case: what an entry of its list is to istio-cni, and how to write it.
_FORMS = {
    "ports": (re.compile(r"\s*[0-9]+\s*"), "write single ports, as 80,8080: istio-cni takes no ranges there"),
    "ipranges": (re.compile(r"\S+"), "write blocks with a comma between them and no spaces"),
    "interfaces": (re.compile(r"\s*[a-zA-Z][\w.-]{0,14}\s*", re.ASCII), "write names of interfaces, without wildcards"),
}
PROXY, INIT = "istio-proxy", "istio-init"


class SkippedError(NetapplyError):
    """istio-cni leaves the pod alone, so that there is no plan to import."""


def read_pod(document: Any, env: Mapping[str, str], source: str) -> Reading:
    """The settings that istio-cni takes for a pod's manifest. `env` is the environment of istio-cni itself.

    Raises SkippedError for a pod that istio-cni leaves alone, with every reason.
    """
    pod = _Pod(document, source)
    if not pod.faults and (reasons := [*_skipped(pod)]):
        raise SkippedError(f"istio-cni leaves pod {pod.name} alone: {'; '.join(reasons)}", next_step=_instead(pod))
    values: dict[str, str | bool] = {**DEFAULTS}
    given: dict[str, Source] = {}
    _read_annotations(pod, values, given)
    _read_proxy(pod, values, given)
    _read_agent(env, values, given)
    settings = IstioSettings(**values)  # type: ignore[arg-type]  # each value has the type of its field
    otherwise = dict.fromkeys(DEFAULTS, "istio-cni's default")
    of = f"pod {pod.name} ({source}), as istio-cni reads it"
    return Reading(settings, given, otherwise, of, (*pod.warnings, *_unknown(pod)), tuple(pod.faults))


class _Pod:
    """What istio-cni looks at in a manifest. Faults are collected, where a part has not the shape of a pod's."""

    def __init__(self, document: Any, source: str) -> None:
        self.faults: list[Fault] = []
        self.warnings: list[str] = []
        pod = self._mapping(document, source)
        if pod and pod.get("kind", "Pod") != "Pod":
            accepted = "give a pod as it runs: kubectl get pod NAME -o yaml"
            self.faults.append(Fault(f"{source}: kind", shorten(pod["kind"]), accepted))
            pod = {}
        metadata, self.spec = self._mapping(pod.get("metadata"), "metadata"), self._mapping(pod.get("spec"), "spec")
        name, namespace = metadata.get("name") or metadata.get("generateName") or "", metadata.get("namespace")
        self.name = f"{namespace}/{name}" if namespace else str(name or "without a name")
        self.annotations = self._texts(metadata.get("annotations"), "metadata.annotations")
        self.labels = self._texts(metadata.get("labels"), "metadata.labels")
        self.containers = [*self._containers("initContainers"), *self._containers("containers")]
        self.proxy = self.container(PROXY)
        entries = [self._mapping(each, f"{PROXY}.env") for each in self._list(self.proxy.get("env"), f"{PROXY}.env")]
        #: As Go decodes it: what has no value of its own (valueFrom) has an empty one.
        self.env = {str(each.get("name")): str(each.get("value") or "") for each in entries}

    def container(self, name: str) -> dict[str, Any]:
        """The container of this name; the last one, as istio-cni, and {} if there is none."""
        found: dict[str, Any] = {}
        for each in self.containers:
            found = each if each.get("name") == name else found
        return found

    def _containers(self, name: str) -> list[dict[str, Any]]:
        path = f"spec.{name}"
        return [self._mapping(each, f"{path}[{i}]") for i, each in enumerate(self._list(self.spec.get(name), path))]

    def _mapping(self, value: Any, path: str) -> dict[str, Any]:
        if value is None or is_mapping(value):
            return value or {}
        self.faults.append(Fault(path, shorten(value), "a mapping stands there in a pod"))
        return {}

    def _list(self, value: Any, path: str) -> list[Any]:
        if value is None or is_list(value):
            return value or []
        self.faults.append(Fault(path, shorten(value), "a list stands there in a pod"))
        return []

    def _texts(self, value: Any, path: str) -> dict[str, str]:
        found = self._mapping(value, path)
        for name, text in found.items():
            if not isinstance(text, str):
                accepted = "Kubernetes takes nothing but text there: put quotes around it"
                self.faults.append(Fault(f"{path}: {name}", shorten(text), accepted))
        return {name: str(text) for name, text in found.items()}


def _skipped(pod: _Pod) -> Iterator[str]:
    """Why istio-cni would leave the pod alone."""
    if pod.spec.get("hostNetwork") is True:
        yield "it is in the host's network, where no CNI plugin is called"
    if pod.container(INIT):
        yield f"it has container {INIT}, which sets up capture by itself"
    if WORDS.get(pod.env.get("DISABLE_ENVOY", "")):
        yield f"DISABLE_ENVOY is true in container {PROXY}"
    if not pod.proxy:
        yield f"it has no container {PROXY}"
    words = pod.proxy.get("args")
    if is_list(words) and len(words) > 1 and words[0] == "proxy" and words[1] not in ("", "sidecar"):
        yield f"its proxy is a {words[1]}, no sidecar"
    kind, texts = ("label", pod.labels) if INJECT in pod.labels else ("annotation", pod.annotations)
    if WORDS.get(texts.get(INJECT, "")) is False:
        yield f"{kind} {INJECT} is {texts[INJECT]}"
    if STATUS not in pod.annotations:
        yield f"it has no annotation {STATUS}, which the injector puts there"


def _instead(pod: _Pod) -> str:
    """What to do with a pod that istio-cni leaves alone."""
    words = pod.container(INIT).get("args")
    if is_list(words) and words[:1] == ["istio-iptables"]:
        return f"import what that container says: netapply import istio -- {shlex.join(map(str, words[1:]))}"
    return "import a pod as it runs, after injection (kubectl get pod NAME -o yaml), or flags"


def _read_annotations(pod: _Pod, values: dict[str, str | bool], given: dict[str, Source]) -> None:
    for name, setting in ANNOTATIONS.items():
        text = pod.annotations.get(name)
        if text is None or (name == KUBEVIRT and REROUTE in pod.annotations):
            continue
        pod.faults.extend(_faults(name, text))
        values[setting] = text
        given[setting] = Source(name, f"{name.removeprefix(PREFIX)}: {shorten(text)}")
    if KUBEVIRT in pod.annotations and REROUTE in pod.annotations:
        pod.warnings.append(f"annotation {KUBEVIRT} is not read: {REROUTE} stands beside it")
    _add_ports(values, given)


def _add_ports(values: dict[str, str | bool], given: dict[str, Source]) -> None:
    """The ports of the proxy itself, after the user's."""
    name = "istio_local_exclude_ports"
    listed = [each.strip() for each in str(values[name]).split(",") if each.strip()]
    values[name] = ",".join(dict.fromkeys((*listed, *ADDED_PORTS)))
    if name in given:
        added = ", ".join(each for each in ADDED_PORTS if each not in listed)
        more = f"; istio-cni adds {added}" if added else ""
        given[name] = given[name]._replace(text=f"{given[name].text}{more}")


def _faults(name: str, text: str) -> Iterator[Fault]:
    """What istio-cni refuses and istio-iptables would not."""
    if name == MODE and text not in ("REDIRECT", "TPROXY"):
        yield Fault(name, shorten(text), "write REDIRECT or TPROXY; istio-cni sets up no pod with another word")
    if name == MODE or text in ("", "*"):
        return
    pattern, accepted = next(form for ending, form in _FORMS.items() if name.lower().endswith(ending))
    for word in text.split(","):
        if not pattern.fullmatch(word):
            yield Fault(name, shorten(word), accepted)


def _read_proxy(pod: _Pod, values: dict[str, str | bool], given: dict[str, Source]) -> None:
    context = pod.proxy.get("securityContext")
    for key, setting in (("runAsUser", "proxy_uid"), ("runAsGroup", "proxy_gid")):
        number = context.get(key) if is_mapping(context) else None
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            pod.faults.append(Fault(f"{PROXY}.securityContext.{key}", shorten(number), "write an id"))
            continue
        values[setting] = str(number or 1337)
        taken = "" if number else ", which istio-cni takes for 1337"
        given[setting] = Source(f"{PROXY}.securityContext.{key}", f"{key}: {number} of {PROXY}{taken}")
    for variable, settings in VARIABLES.items():
        text = pod.env.get(variable)
        if text is None:
            continue
        counts = "" if text in WORDS else ", which counts as false"
        if counts:
            pod.warnings.append(f"{variable} of {PROXY} is {shorten(text)}, neither true nor false{counts}")
        for setting in settings:
            values[setting] = WORDS.get(text, False)
        given[settings[0]] = Source(variable, f"{variable}={text} of {PROXY}{counts}")


def _read_agent(env: Mapping[str, str], values: dict[str, str | bool], given: dict[str, Source]) -> None:
    variables = {name.upper(): name for name in OF_THE_AGENT}
    reading = read_flags((), {variable: env[variable] for variable in variables if variable in env})
    for setting, source in reading.given.items():
        values[setting] = getattr(reading.settings, setting)
        given[setting] = source._replace(text=f"{source.text} of istio-cni")


def _unknown(pod: _Pod) -> Iterator[str]:
    """Annotations that look like those of capture, and that nobody reads."""
    from difflib import get_close_matches

    for name in pod.annotations:
        if name.startswith(PREFIX) and name not in ANNOTATIONS:
            close = get_close_matches(name, ANNOTATIONS, 1, 0.8)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(ANNOTATIONS))}"
            yield f"annotation {name} is unknown and not read; {hint}"
