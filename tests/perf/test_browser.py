"""The report in a real browser, where there is one: from disk, on a telephone, by day and by night."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from flabc.perf import report
from flabc.runtime.measure.result import BenchResult

from .test_report import swept

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

#: What is asked of the page, in a frame as wide as a telephone.
PROBE = """<!doctype html>
<iframe src="report.html" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement, style = getComputedStyle(page.body);
  const seen = [...page.querySelectorAll("figure svg")].map(each => each.getBoundingClientRect().width);
  document.body.dataset.found = JSON.stringify({{
    wide: root.scrollWidth, ink: style.color, paper: style.backgroundColor, drawings: seen,
    size: parseFloat(style.fontSize),
  }});
}});
</script>
"""


def shown(folder: Path, width: int, *, dark: bool) -> tuple[dict[str, Any], str]:
    """What the page is like in a frame so wide, and what the browser had to say."""
    assert CHROMIUM is not None
    (folder / "probe.html").write_text(PROBE.format(width=width))
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-background-networking"]
    quiet += ["--disable-component-update", f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files"]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    told = ["--headless", "--enable-logging=stderr", "--window-size=1400,900", scheme, "--dump-dom"]
    page = (folder / "probe.html").as_uri()
    done = subprocess.run([CHROMIUM, *quiet, *told, page], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), done.stderr


def brightness(colour: str) -> float:
    """Of a colour as browsers write it, 0 to 255."""
    return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / 3


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_report_opens_from_disk_fits_and_follows_the_reader(
    result: BenchResult, tmp_path: Path, width: int, dark: bool
) -> None:
    report.write_html(swept(result), tmp_path / "report.html")
    found, said = shown(tmp_path, width, dark=dark)
    assert found["wide"] <= width  # tables and drawings scroll inside their cards
    assert found["size"] >= 14
    assert len(found["drawings"]) == 7
    assert all(drawing > 200 for drawing in found["drawings"])
    assert (brightness(found["paper"]) < 80 < 150 < brightness(found["ink"])) is dark
    assert abs(brightness(found["paper"]) - brightness(found["ink"])) > 120
    assert "CONSOLE" not in said
