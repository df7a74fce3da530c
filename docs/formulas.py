"""Formulas of the pages, set by mkdocs as MathML: browsers draw it themselves, without a script."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> None:
    """Let a block of code in the language `math` be a formula, as it is on GitHub."""
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(
        {"name": "math", "class": "formula", "format": set_formula}
    )


def set_formula(source: str, *_: Any, **__: Any) -> str:
    """Return the MathML of a formula that stands in a line of its own."""
    return convert(source.strip(), display="block")
