"""The page: a well-set sheet of paper that carries everything inside itself."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from bilevel.jsonable import flatten
from bilevel.report.figures import plates
from bilevel.report.load import Run
from bilevel.report.style import DARK, LIGHT, Plate, draw_in
from bilevel.tracking.format import baseline_table, duration, number
from bilevel.tracking.troubles import Troubles

__all__ = ["config_details", "figure_html", "header", "run_page", "table", "write_page"]

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfcf9; --ink: #22252b; --faint: #6d7078; --line: #e4e1d8;
        --accent: #1f5a93; --wash: #f4f1e9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181d; --ink: #e4e2dc; --faint: #989ba3; --line: #31343c; --accent: #7db4e6; --wash: #1e2127; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 Charter, "Bitstream Charter",
       "Source Serif 4", "Sitka Text", Cambria, Georgia, "Liberation Serif", serif; }
main { max-width: 820px; margin: 0 auto; padding: 64px 28px 96px; }
main.broad { max-width: 1160px; } main.broad th { white-space: normal; } main.broad figure { max-width: 820px; }
h1 { font-size: 34px; line-height: 1.15; font-weight: 600; letter-spacing: -0.01em; margin: 6px 0 4px;
     overflow-wrap: anywhere; }
h2 { font-size: 21px; font-weight: 600; margin: 60px 0 14px; }
.kicker, .label, th, figcaption b, summary, footer { font-family: "Helvetica Neue", Inter, "Segoe UI", Arial,
     "Liberation Sans", sans-serif; }
.kicker { font-size: 12px; letter-spacing: 0.14em; text-transform: uppercase; color: var(--accent); margin: 0; }
.status { color: var(--faint); margin: 0; overflow-wrap: anywhere; }
.verdict { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 34px 0 0;
           border-top: 2px solid var(--ink); border-bottom: 1px solid var(--line); }
.verdict > div { padding: 14px 18px 16px 0; }
.label { font-size: 12px; color: var(--faint); }
.figure { font-size: 27px; line-height: 1.2; font-variant-numeric: tabular-nums lining-nums; }
.note { font-size: 14px; color: var(--faint); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 15px; line-height: 1.5; color: var(--faint); max-width: 88ch; margin-top: 10px; }
figcaption b { font-size: 12.5px; color: var(--ink); font-weight: 600; margin-right: 0.35em; }
.wide { overflow-x: auto; margin: 0 -10px; padding: 0 10px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums lining-nums; }
th { font-size: 12px; font-weight: 500; color: var(--faint); text-align: right; vertical-align: bottom;
     border-bottom: 1px solid var(--ink); }
th, td { padding: 6px 0 6px 22px; white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
tr.own td { background: var(--wash); font-weight: 600; }
tr.own td:first-child { box-shadow: -10px 0 0 var(--wash); } tr.own td:last-child { box-shadow: 10px 0 0 var(--wash); }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 0 44px;
         border-top: 1px solid var(--ink); align-items: start; }
.pairs td { white-space: normal; overflow-wrap: anywhere; } .pairs td:first-child { color: var(--faint); }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 3px; }
details { margin-top: 56px; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.troubles { border-left: 3px solid #c0392b; padding: 6px 0 6px 28px; margin: 18px 0; }
summary { font-size: 14px; padding: 14px 0; cursor: pointer; }
pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-x: auto;
      background: var(--wash); padding: 18px 20px; margin: 0 0 18px; border-radius: 4px; }
footer { font-size: 12.5px; color: var(--faint); margin-top: 28px; overflow-wrap: anywhere; }
@media print { main { padding-top: 0; } figure { break-inside: avoid; } }
"""


def run_page(run: Run) -> Path:
    """Write the figures and the page of one run; return the page's path."""
    standing = run.standing
    figures = [
        (standing.name, standing.figure, standing.where),
        ("outer steps", number(run.num_steps_taken), _of(run)),
        ("wall time", duration(run.wall_seconds), _memory(run)),
        ("products", number(_total(run, "receipt.products")), "with the inner Hessian, for all hypergradients"),
    ]
    parts = [header("A run of bilevel", run.name, run.verdict, figures), _troubles(run), _baseline(run)]
    folder = run.directory / "figures"
    for index, plate in enumerate(plates(run), start=1):
        parts.append(f"<h2>{escape(plate.title)}</h2>" + figure_html(plate, index, folder))
    parts += [_final_figures(run), config_details(run.config_text), _footer(run)]
    return write_page(run.directory, run.name, parts)


def write_page(directory: Path, title: str, parts: Iterable[str], *, broad: bool = False) -> Path:
    """Join the parts into `report.html`, replaced in one go so that a reader never sees half of it."""
    body = "\n".join(part for part in parts if part)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: bilevel report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main{' class=broad' if broad else ''}>\n{body}\n</main>\n</body>\n</html>\n"
    )
    path = directory / "report.html"
    temporary = directory / ".report.html.writing"
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)
    return path


def header(kicker: str, title: str, status: str, figures: Sequence[tuple[str, str, str]]) -> str:
    """The verdict: a name, why it stopped, and a row of (label, figure, note)."""
    cells = "".join(
        f'<div><div class="label">{escape(label)}</div><div class="figure">{escape(figure)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for label, figure, note in figures
    )
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="status">{escape(status)}</p><div class="verdict">{cells}</div></header>'
    )


def figure_html(plate: Plate, index: int, folder: Path) -> str:
    """A figure with its caption; drawn twice, because a page cannot recolour a picture at night."""
    light, dark = draw_in(plate, [LIGHT, DARK], folder)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
        f'<img src="{_data(light)}" alt="{escape(plate.title)}"></picture>'
        f"<figcaption><b>Figure {index}.</b> {escape(plate.caption)}</figcaption></figure>"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], own: int | None = None) -> str:
    """A table of ready HTML cells; row `own` stands out."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = [
        f"<tr{' class=own' if index == own else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for index, row in enumerate(rows)
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def config_details(text: str) -> str:
    """The config, folded away."""
    return f"<details><summary>Configuration (config.yaml)</summary><pre>{escape(text)}</pre></details>" if text else ""


def _troubles(run: Run) -> str:
    """In how many steps a solve did not succeed, where a reader cannot miss it."""
    troubles = Troubles()
    for record in run.records:
        troubles.news(record)
    lines = "".join(f"<li>{escape(line)}</li>" for line in troubles.totals())
    return f'<ul class="troubles">{lines}</ul>' if lines else ""


def _baseline(run: Run) -> str:
    baseline = baseline_table(run.summary)
    if baseline is None:
        return ""
    rows = [[escape(cell) for cell in row] for row in baseline.rows]
    return f"<h2>Beside {escape(baseline.title)}</h2>" + table(baseline.columns, rows, baseline.own)


def _final_figures(run: Run) -> str:
    """Everything that the last step recorded, in two columns of pairs."""
    hidden = {"step", "num_steps", "eta_seconds"}
    pairs = [(key, _cell(key, value)) for key, value in run.final.items() if key not in hidden and value is not None]
    if not pairs:
        return ""
    half = -(-len(pairs) // 2)
    rows = [f"<tr><td>{escape(key)}</td><td>{escape(cell)}</td></tr>" for key, cell in pairs]
    tables = "".join(f"<table>{''.join(part)}</table>" for part in (rows[:half], rows[half:]) if part)
    return f'<h2>Figures of the last step ({number(run.final.get("step"))})</h2><div class="pairs">{tables}</div>'


def _cell(key: str, value: object) -> str:
    return duration(value) if key.endswith("seconds") else number(value, 5)


def _footer(run: Run) -> str:
    versions = run.summary.get("versions") or {}
    words = [f"{name} {version}" for name, version in flatten(versions)] if isinstance(versions, dict) else []
    if run.summary.get("num_threads"):
        words.append(f"{run.summary['num_threads']} threads")
    return f"<footer>{escape(' · '.join([*words, str(run.directory)]))}</footer>"


def _of(run: Run) -> str:
    planned = run.final.get("num_steps") or run.summary.get("num_steps")
    return f"of {number(planned)} planned" if planned else ""


def _memory(run: Run) -> str:
    mebibytes = run.summary.get("peak_memory_mib")
    return f"peak memory {number(mebibytes, 3)} MiB" if mebibytes else ""


def _total(run: Run, key: str) -> int | None:
    values = [record[key] for record in run.records if isinstance(record.get(key), int)]
    return sum(values) if values else None


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
