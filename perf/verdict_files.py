"""A gate's verdict as files: for people, for CI systems, and for dashboards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .gate import Check, verdict

#: What each outcome is called in a summary.
SIGNS = {"pass": "✅ pass", "fail": "❌ fail", "undecided": "❔ undecided"}


def write(checks: Sequence[Check], folder: Path, about: dict[str, Any]) -> None:
    """Write ``gate.json``, ``junit.xml``, ``summary.md`` and ``benchmark.json`` into a folder that exists.

    Args:
        checks: the verdicts.
        folder: where.
        about: what else belongs into ``gate.json``: samples, environment, the gates.
    """
    content = {"verdict": verdict(checks), "checks": [check.model_dump(mode="json") for check in checks], **about}
    (folder / "gate.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "junit.xml").write_text(as_junit(checks) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(as_markdown(checks), encoding="utf-8")
    (folder / "benchmark.json").write_text(json.dumps(as_benchmark(checks), indent=1) + "\n", encoding="utf-8")


def as_markdown(checks: Sequence[Check]) -> str:
    """A table for a pull request or a job's summary, newline at the end."""
    lines = [
        f"**flabc gate: {SIGNS[verdict(checks)]}**",
        "",
        "| metric | baseline | candidate | change | limit | samples | |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | :--- |",
    ]
    return "\n".join([*lines, *(_line(check) for check in checks)]) + "\n"


def _line(check: Check) -> str:
    change = "-"
    if check.ratio is not None:
        change = f"{check.ratio - 1:+.1%}"
        if check.interval is not None:
            change += f" ({check.interval[0] - 1:+.1%} to {check.interval[1] - 1:+.1%})"
    cells = [check.metric, _number(check.baseline, check.unit), _number(check.value, check.unit), change, _limit(check)]
    samples = "-" if check.samples is None else str(check.samples)
    sign = SIGNS[check.outcome] + (f": {check.detail}" if check.detail else "")
    return f"| {' | '.join([*cells, samples, sign])} |"


def _limit(check: Check) -> str:
    if check.limit is None:
        return "-"
    if check.ratio is not None:
        return f"{check.limit - 1:+.1%}"
    return f"at least {check.limit:g}" if check.higher_is_better else f"{check.limit:g}"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4g} {unit}".strip()


def as_junit(checks: Sequence[Check]) -> str:
    """JUnit's XML: every check a test case; what is undecided is skipped, since it says nothing."""
    count = {name: sum(check.outcome == name for check in checks) for name in ("fail", "undecided")}
    numbers = {"tests": str(len(checks)), "failures": str(count["fail"]), "skipped": str(count["undecided"])}
    suite = ElementTree.Element("testsuite", {"name": "flabc gate", "errors": "0", **numbers})
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"flabc.gate.{check.kind}", name=check.metric)
        if check.outcome != "pass":
            tag = "failure" if check.outcome == "fail" else "skipped"
            ElementTree.SubElement(case, tag, message=_line(check).strip("| "))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def as_benchmark(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """What github-action-benchmark reads as ``customSmallerIsBetter``: so nothing of which more is better."""
    return [
        {"name": check.metric, "unit": check.unit or "ratio", "value": check.value, "extra": check.outcome}
        for check in checks
        if check.value is not None and not check.higher_is_better
    ]
