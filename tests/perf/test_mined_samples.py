"""The samples of mined tasks that are printed: whose licence allows it, the same in every run."""

from __future__ import annotations

import pytest

from flabc.perf.mined_samples import COUNT, PERMISSIVE, as_markdown, sample


@pytest.mark.parametrize(
    ("licence", "printed"),
    [
        ("PSF-2.0", True),
        ("MIT", True),
        ("MIT License", True),
        ("BSD", True),
        ("BSD-3-Clause", True),
        ("Apache 2.0", True),
        ("Apache-2.0", True),
        ("Apache License, Version 2.0", True),
        ("Apache 2.0 License", True),
        ("MPL-2.0", False),
        ("GPL-3.0 OR MIT", False),
        ("BSD-3-Clause AND MIT AND GPL-3.0", False),
        ("", False),
    ],
)
def test_only_permissive_licences_are_printed(licence: str, printed: bool) -> None:
    assert bool(PERMISSIVE.fullmatch(licence)) is printed


def test_samples_are_the_same_in_every_order() -> None:
    labels = {"project": "p", "split": "dev", "tested_by": "tests", "imports": ["p.a"], "entry_point": "f"}
    prompt = 'def f(x, y=1):\n    """What f | does.\n\n    More.\n    """\n'
    code = {"prompt": prompt, "canonical_solution": "    1\n    2\n"}
    licences = ["MIT", "GPL"] * 50
    rows = [{"task_id": f"p/{n:03}", "licence": licences[n], **labels, **code} for n in range(99)]
    drawn = sample(rows)
    assert drawn == sample(rows[::-1])
    assert len({row["task_id"] for row in drawn}) == COUNT
    assert {row["licence"] for row in drawn} == {"MIT"}
    counts = {"counts": {"tasks": 1234}, "tested_by": {"tests": 99}, "needs": {"packages": 99}, "splits": {"dev": 99}}
    page = as_markdown(drawn, {**counts, "sources": {"p": 99}})
    assert "`flabc data mine p`" in page
    assert "| tasks | 1,234 |" in page
    assert page.count(r" | `f(x, y=1)`: What f \| does. | MIT | 2 lines | tests |") == COUNT
