"""``flabc doctor``."""

from __future__ import annotations

import click

from .parameters import emit, json_option


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can do and how to get what is missing.

    \b
    flabc doctor
    """
    from flabc import api

    findings = api.doctor()

    def show() -> None:
        signs = {"ok": "ok     ", "missing": "missing", "problem": "PROBLEM"}
        for finding in findings:
            fix = f"  → {finding.fix}" if finding.fix else ""
            click.echo(f"{signs[finding.status]}  {finding.name:<26} {finding.detail}{fix}")

    emit(as_json, {"findings": [finding.model_dump() for finding in findings]}, show)
