"""The report as one self-contained HTML page: no script, no outside resource, everything untrusted escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from optpass.report.page import page_of

if TYPE_CHECKING:
    from jinja2 import Environment

    from optpass.report.clips import Clips
    from optpass.report.scatter import Plot

_YAML_KEY = re.compile(r"^(\s*(?:- )*)([^\s:'\"#][^:]*)(:)(?=\s|$)(.*)$")


def render_report(report: Mapping[str, Any], *, clips: Clips | None = None) -> str:
    """The HTML text of ``report`` (the mapping of ``report.json``) with ``clips`` as animations.

    Keys that are missing leave their part of the page out. The page has a Content-Security-Policy that
    forbids scripts and loading, works from a file, follows the reader's colour scheme and asks for no network.
    """
    page = page_of(report, clips)
    css = Markup(_own_text("report.css") + _own_text("scatter.css"))
    return _environment().get_template("page.jinja").render(page=page, css=css)


def render_plot(plot: Plot) -> str:
    """One plot as an SVG file of its own."""
    css = Markup(_own_text("scatter.css"))
    return _environment().get_template("plot.jinja").render(plot=plot, css=css)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_own_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["path"] = breakable
    environment.filters["together"] = together
    environment.filters["yaml"] = marked_yaml
    return environment


def _own_text(name: str) -> str:
    return (files("optpass.report") / name).read_text("utf-8")


def breakable(path: str) -> Markup:
    """A module path or file name, escaped, that may break after its dots, slashes and underscores."""
    parts = re.split(r"(?<=[._/])", str(path))
    return Markup("<wbr>").join(escape(part) for part in parts if part)


def together(prose: str) -> str:
    """Prose whose numbers do not part from their units at the end of a line."""
    return re.sub(r"(?<=\d) (?=(?:%|dB|ms|µs|s)(?:\W|$))", "\N{NO-BREAK SPACE}", prose)


def marked_yaml(document: str) -> Markup:
    """YAML, escaped, with its keys marked."""
    return Markup("\n").join(_marked_line(line) for line in document.rstrip("\n").split("\n"))


def _marked_line(line: str) -> Markup:
    found = _YAML_KEY.match(line)
    if not found:
        return escape(line)
    indent, key, colon, rest = found.groups()
    return Markup('{}<span class="key">{}{}</span>{}').format(indent, key, colon, rest)
