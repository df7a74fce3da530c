"""One HTML file that shows a comparison and needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from .figures import FIGURES
from .findings import findings
from .tables import SPREAD, Table, tables

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; }
body { margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
caption { caption-side: top; text-align: left; font-weight: 600; padding: 1.2rem 0 .3rem; }
th, td { border-bottom: 1px solid #d0d7de; padding: .3rem .7rem; }
th, td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: 0; width: 32rem; max-width: 100%; }
figure img { width: 100%; }
dt { font-weight: 600; }
"""


def html(results: Mapping[str, Any], folder: Path) -> str:
    """Return the report, with the figures of `folder` inside."""
    plan, about = results["plan"], results["about"]
    said = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in findings(results))
    figures = "".join(_figure(folder / f"{name}.svg", text) for name, text in FIGURES.items())
    facts = {
        "Images": f"{about['images'][0]:,} for training, {about['images'][1]:,} for judging, "
        f"{about['classes']} classes; {about['left_out']} test images that training has too "
        "were left out",
        "Recipe": f"{plan['epochs']} epochs of {plan['rows']:,} images, {plan['filters']} filters "
        f"in the first of eight convolutions; {plan['seeds']} "
        f"seed{'s' if plan['seeds'] > 1 else ''} of MRL and of FF at "
        f"{', '.join(map(str, about['seeded']))} dims, one of the rest",
        "Command": about["command"],
        "Software and machine": about["machine"],
        "Minutes of training": ", ".join(f"{name} {m:g}" for name, m in results["minutes"].items()),
    }
    if about["unseen"]:
        facts["Classes never seen"] = ", ".join(about["unseen"])
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>\n" for name, text in facts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<title>Did Matryoshka pay off?</title>\n"
        f"<style>{_STYLE}</style></head><body>\n<h1>Did Matryoshka pay off?</h1>\n"
        f"<h2>What the numbers say</h2>\n<ul>\n{said}</ul>\n<h2>Figures</h2>\n{figures}\n"
        f"<h2>Tables</h2>\n<p>{escape(SPREAD)}</p>\n{''.join(map(_table, tables(results)))}"
        f"<h2>How it was measured</h2>\n<dl>\n{rows}</dl>\n</body></html>\n"
    )


def _figure(svg: Path, text: str) -> str:
    # As an image of its own: names inside one figure cannot meet those of another.
    data = base64.b64encode(svg.read_bytes()).decode()
    return f'<figure><img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}"></figure>\n'


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(table.title)}</caption>\n'
        f"<tr>{header}</tr>\n{rows}</table></div>\n"
    )
