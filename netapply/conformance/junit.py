"""A report as JUnit XML, which CI systems read."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from netapply.conformance.case import VERSION
from netapply.conformance.runner import Report


def junit(report: Report) -> str:
    """One test suite with a test case for each case."""
    suite = ET.Element(
        "testsuite",
        name=f"netapply conformance {VERSION}: {report.backend}",
        tests=str(len(report.outcomes)),
        failures=str(report.count("failed")),
        errors="0",
        skipped=str(report.count("skipped")),
        time=f"{report.seconds:.3f}",
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in (("kernel", report.kernel), ("probes", report.probes), ("new kernel taint", report.taint)):
        ET.SubElement(properties, "property", name=name, value=str(value))
    for outcome in report.outcomes:
        case = ET.SubElement(
            suite,
            "testcase",
            classname=f"{report.backend}.{outcome.level}",
            name=outcome.case,
            time=f"{outcome.seconds:.3f}",
        )
        if outcome.status == "failed":
            failure = ET.SubElement(case, "failure", message=outcome.differences[0])
            failure.text = "\n".join(outcome.differences)
        elif outcome.status == "skipped":
            ET.SubElement(case, "skipped", message=outcome.skipped)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
