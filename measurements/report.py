"""One page of HTML, and the same in Markdown, from a folder of result files."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from measurements import report_short, report_tables
from measurements.report_files import PICTURES, Problem, Result, collect
from transfer.errors import ConfigError

TEMPLATES = Path(__file__).parent / "templates"


def run(folder: Path, html: Path | None, markdown: Path | None) -> None:
    """Write both reports, into ``folder`` unless told otherwise, and print what is wrong with the results.

    The HTML holds its pictures; the Markdown names them, for hosts of Markdown drop pictures that are held within.
    Raises :class:`ConfigError` for a folder without results and files that cannot be written.
    """
    results, problems = collect(folder)
    html, markdown = html or folder / "report.html", markdown or folder / "report.md"
    _write(html, render("report.html.j2", results, problems))
    _write(markdown, render("report.md.j2", results, problems))
    console = Console()
    for problem in problems:
        console.print(f"[yellow]{problem.where}[/]: {problem.what}", highlight=False)
    console.print(f"{len(results)} results in {html} and {markdown}", highlight=False)


def render(template: str, results: list[Result], problems: list[Problem]) -> str:
    """The report that ``template`` makes; everything that comes from files is escaped in HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _markdown_cell
    parts = [_part(result) for result in results]
    return environment.get_template(template).render(
        parts=parts, problems=problems, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    )


def _part(result: Result) -> dict[str, Any]:
    load = result.about("load").get("1min")
    gpus = result.environment.get("gpu")
    return {
        "result": result,
        "picture": _data_uri(result.picture) if result.picture else None,
        "short": list(report_short.sentences(result.measure, result.summary)),
        "tables": report_tables.tables(result.summary),
        "machine": result.about("cpu").get("model", "unknown"),
        "cores": result.about("cpu").get("usable_cores", "?"),
        "gpus": ", ".join(map(str, gpus)) if isinstance(gpus, list) and gpus else "none",
        "versions": ", ".join(f"{name} {version}" for name, version in result.about("versions").items()),
        "load": f"{load:.2f}" if isinstance(load, float) else "unknown",
    }


def _data_uri(picture: Path) -> str:
    content = base64.b64encode(picture.read_bytes()).decode()
    return f"data:{PICTURES[picture.suffix]};base64,{content}"


def _markdown_cell(text: object) -> str:
    """``text`` as one cell of a table."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
