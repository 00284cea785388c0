# ruff: noqa: RUF001 - the report writes real multiplication signs and dashes
from __future__ import annotations

import importlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flabc.errors import MissingExtraError
from flabc.perf import plots, report, table
from flabc.runtime.measure.result import BenchResult, Cell, Energy, Roofline, Sample

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Every element with its attributes, and the text; fails on tags that do not nest."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(result: BenchResult, tmp_path: Path) -> Page:
    report.write_html(result, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def hostile(result: BenchResult) -> BenchResult:
    side = result.candidate.model_copy(update={"engine": HOSTILE})
    return result.model_copy(update={"candidate": side, "environment": {HOSTILE: {"a|b`c": HOSTILE}}})


def test_loads_nothing(page: Page) -> None:
    assert not {name for name, _ in page.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "image",
        "base",
    }
    for name, attributes in page.elements:
        for key, value in attributes.items():
            if key in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}:
                assert value is not None
                assert value.startswith("#"), f"<{name} {key}={value}>"


def test_css_loads_nothing(result: BenchResult, tmp_path: Path) -> None:
    report.write_html(result, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "@font-face" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))


def test_references_resolve_and_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["xlink:href"] for _, attributes in page.elements if "xlink:href" in attributes]
    clips = [re.findall(r"url\((#[^)]+)\)", a["clip-path"] or "")[0] for _, a in page.elements if "clip-path" in a]
    assert links
    assert clips
    assert {str(link).removeprefix("#") for link in [*links, *clips]} <= set(ids)


def test_every_plot_is_there_and_says_what_it_shows(page: Page) -> None:
    drawings = page.all("svg")
    assert [figure["id"] for figure in page.all("figure")] == [
        "ttft",
        "tpot",
        "position",
        "components",
        "shape-ffn",
        "shape-heads",
    ]
    assert len(drawings) == 6
    assert {drawing["role"] for drawing in drawings} == {"img"}
    labels = [str(drawing["aria-label"]) for drawing in drawings]
    assert all("dense" in label and "pruned" in label for label in labels)
    assert "embedding 28.3 M" in labels[3]
    assert "30 layers of 1536" in labels[4]
    assert "27 layers of 1024 to 1536" in labels[4]


def test_all_samples_are_dots(result: BenchResult) -> None:
    drawing = plots.svg(plots.plots(result)[0])
    dots = re.findall(r"<use [^>]*var\(--(dense|pruned)\)", drawing)
    assert dots.count("dense") == len(result.baseline.samples)
    assert dots.count("pruned") == len(result.candidate.samples)


def test_drawings_have_no_colour_of_their_own(result: BenchResult) -> None:
    for plot in plots.plots(result):
        drawing = plots.svg(plot)
        inks = set(re.findall(r"var\(--(\w+)\)", drawing))
        assert inks - set(plots.INKS) == {"sans"}, plot.name
        assert not re.findall(r"(?:fill|stroke): #", drawing), plot.name
        assert "<metadata" not in drawing
        assert "DejaVu" not in drawing


def test_drawing_is_reproducible(result: BenchResult) -> None:
    first, again = (plots.svg(plots.plots(result)[0]) for _ in range(2))
    assert first == again


def test_page_says_the_summary_the_figures_and_the_circumstances(page: Page, result: BenchResult) -> None:
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert report.summary(table.rows(result)) in text
    for words in ("perplexity (per dense token)", "538 MB", "0.74×", "AMD EPYC 7B13", "versions onnxruntime"):
        assert words in text
    assert page.all("details") == [{}]  # closed
    assert f"{result.baseline.samples[3].token_ms[7]:.3f}" in text


def test_the_page_says_what_the_intervals_hold(result: BenchResult) -> None:
    assert "which the intervals do not hold" in report.facts(result)["Workload"]["openings"]
    runs = tuple(run.model_copy(update={"opening": at // 5}) for at, run in enumerate(result.baseline.samples))
    twice = result.model_copy(update={"baseline": result.baseline.model_copy(update={"samples": runs})})
    several = report.facts(twice)["Workload"]["openings"]
    assert several == "2, both engines anew; intervals are over how these differ"


def test_page_follows_the_reader(result: BenchResult, tmp_path: Path, page: Page) -> None:
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    defined = set(re.findall(r"--(\w+):", text))
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= defined
    assert text.count("<table") == text.count('<div class="card scroll">')


def test_hostile_text_stays_text(result: BenchResult, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    report.write_html(hostile(result), file, title=HOSTILE)
    page = Page(file)
    assert not page.all("script")
    assert not page.all("img")
    assert page.text.count(HOSTILE) == 5  # <title>, <h1>, engine, environment name and value
    assert "<script" not in file.read_text(encoding="utf-8")


def test_markdown_has_table_workload_and_environment(result: BenchResult, tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    report.write_markdown(result, file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Dense against pruned\n\nThe pruned model has 26.4 % fewer parameters")
    assert table.as_markdown(table.rows(result)) in text
    assert "- output tokens: `64`\n" in text
    assert "- versions python: `3.12.4`\n" in text


def test_markdown_keeps_hostile_text_in_its_place(result: BenchResult, tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    report.write_markdown(hostile(result), file, title="<b>\n# two `x` |")
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[0] == r"# &lt;b&gt; \# two \`x\` \|"
    outside = re.sub(r"(?<!\\)(`+) ?.*? ?\1", "", text[text.index("## Engines") :])
    assert "<script>" not in outside


def test_summary_names_gain_cost_and_doubt() -> None:
    def row(key: str, label: str, unit: str, dense: float, pruned: float, interval: object = None) -> table.Row:
        return table.Row(key, label, unit, dense, pruned, pruned / dense, interval, "lower")  # type: ignore[arg-type]

    parameters = row("parameters", "parameters", "parameters", 134.5e6, 104.9e6)
    first = row("ttft_ms", "time to first token", "ms", 50, 49, (0.93, 1.05))
    quality = row("perplexity", "perplexity (per dense token)", "", 12.31, 13.52)
    assert report.summary([parameters, first, quality]) == (
        "The pruned model has 22.0 % fewer parameters (134.5 M → 104.9 M)."
        " The cost: 9.8 % higher perplexity on held-out text (12.31 → 13.52)."
        " No clear change in time to first token."
    )
    assert report.summary([first]) == (
        "The pruned model gained nothing measurable. No clear change in time to first token."
        " What it cost in quality was not measured."
    )


def test_one_output_token_leaves_out_what_it_cannot_show(result: BenchResult, tmp_path: Path) -> None:
    single = (Sample(ttft_ms=9.0, token_ms=()), Sample(ttft_ms=9.5, token_ms=()))
    sides = {name: getattr(result, name).model_copy(update={"samples": single}) for name in ("baseline", "candidate")}
    report.write_html(result.model_copy(update=sides), tmp_path / "report.html")
    ids = [figure["id"] for figure in Page(tmp_path / "report.html").all("figure")]
    assert ids == ["ttft", "components", "shape-ffn", "shape-heads"]


def test_without_matplotlib_the_module_imports_and_the_error_names_the_extra(
    result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    importlib.reload(report)
    report.write_markdown(result, tmp_path / "report.md")
    with pytest.raises(MissingExtraError, match=r"flabc\[report\]"):
        report.write_html(result, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_import_brings_neither_matplotlib_nor_torch() -> None:
    heavy = {"matplotlib", "torch", "rich.table", "jinja2"}
    code = f"import sys, flabc.perf.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_limits_foreign_load_and_energy_are_told(result: BenchResult, tmp_path: Path) -> None:
    read = Energy(counter="RAPL", joules_per_token=0.1234, idle_w=20, window_s=2.5, tokens=50)
    sides = {
        "baseline": result.baseline.model_copy(update={"bytes_per_token": 2**29, "energy": read}),
        "candidate": result.candidate.model_copy(
            update={"bytes_per_token": 2**28, "energy": Energy(missing="no counter here")}
        ),
    }
    about = {"roofline": Roofline(bandwidth_gib_s=10.04, gflops=98.7), "foreign_cores": (0.1, 0.2, 0.9)}
    limits = report.facts(result.model_copy(update={**sides, **about}))["Limits"]
    assert limits["memory bandwidth"].startswith("10.0 GiB/s")
    assert limits["arithmetic"].startswith("99 GFLOP/s")
    assert limits["others' use of the machine"] == "0.20 cores, at most 0.90 in a round"
    assert limits["energy, dense"].startswith("0.123 J per output token by RAPL over 2.5 s, 20.0 W")
    assert limits["energy, pruned"] == "not measured: no counter here"
    assert limits["saved bytes that became saved time"][:3] in (
        "64%",
        "65%",
        "66%",
    )  # 1.3 times as fast, half the bytes
    report.write_markdown(result.model_copy(update={**sides, **about}), tmp_path / "r.md")
    assert "## Limits" in (tmp_path / "r.md").read_text()


def swept(result: BenchResult) -> BenchResult:
    """The same runs at two more batches, twice and four times as slow a step."""

    def slower(runs: tuple[Sample, ...], times: float) -> tuple[Sample, ...]:
        return tuple(Sample(ttft_ms=run.ttft_ms, token_ms=tuple(times * ms for ms in run.token_ms)) for run in runs)

    work = result.workload
    sides = (result.baseline.samples, result.candidate.samples)
    more = [
        Cell(
            prompt_tokens=work.prompt_tokens,
            batch=batch,
            baseline=slower(sides[0], times),
            candidate=slower(sides[1], times),
        )
        for batch, times in ((16, 4), (4, 2))
    ]
    return result.model_copy(update={"sweep": tuple(more)})


def test_a_sweep_is_a_table_and_a_plot(result: BenchResult, tmp_path: Path) -> None:
    wide = swept(result)
    rows = report.sweep(wide)
    assert [(row["prompt"], row["batch"]) for row in rows] == [("128", "1"), ("128", "16"), ("128", "4")]
    one, sixteen = (float(rows[at]["decode tok/s, dense"]) for at in (0, 1))
    assert sixteen == pytest.approx(4 * one, rel=0.02)
    assert rows[0]["decode, times as fast"].startswith("1.3")
    assert "batch" in [plot.name for plot in plots.plots(wide)]
    assert "batch" not in [plot.name for plot in plots.plots(result)]
    report.write_html(wide, tmp_path / "r.html")
    assert "Sweep" in " ".join(Page(tmp_path / "r.html").words)
    report.write_markdown(wide, tmp_path / "r.md")
    assert "| 128 | 16 |" in (tmp_path / "r.md").read_text()
    assert report.sweep(result) == []
