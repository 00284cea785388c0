"""The table of pruning methods: what was not measured and what failed are told apart."""

from flabc.perf.methods import as_markdown


def row(value: float, base: float | None = None, p_value: float | None = None) -> dict[str, object]:
    """A row of an evaluation over 164 units, with what the table reads."""
    baseline = None if base is None else {"value": base}
    return {"target": {"value": value, "n": 164}, "baseline": baseline, "p_value": p_value}


def test_a_row_tells_what_was_measured_and_what_was_not() -> None:
    cells = {
        "dense": {"parameters": 494_032_768, "perplexity": [row(4.0)], "humaneval": {"error": "no sandbox"}},
        "all-22/ours": {
            "parameters": 384_849_792,
            "seconds": 623.9,
            "kl": [row(0.0243)],
            "perplexity": [row(5.0, 4.0, 0.5)],
            "humaneval": [row(82 / 164, 70 / 164, 0.18)],
        },
        "blocks-50/flap": {"error": "cannot be reached"},
    }

    lines = as_markdown(cells).splitlines()[2:]

    assert lines == [
        "| all | dense | 494.0 M | - | 4.00 | - | failed |",
        "| 78% of all | flabc | 384.8 M | 0.024 | 5.00 (+25.0%) | 624 | 82/164 (p = 0.18) |",
        "| 50% of the layers | FLAP | - | - | cannot be reached | - | - |",
    ]
