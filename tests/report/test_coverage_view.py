"""What the page says of operators that run on the device, and of those that do not."""

from __future__ import annotations

from typing import Any

from optpass.pipeline.target import Coverage, Unsupported
from optpass.report.coverage_view import coverage_view, coverage_words
from optpass.report.render import render_report


def engine(coverage: Coverage | None) -> dict[str, Any]:
    details = {"opset": 18} | ({"coverage": coverage.as_json()} if coverage else {})
    return {"entry": "full", "file": "full.onnx", "bytes": 10, "nodes": 12, "details": details}


FALLEN = tuple(Unsupported(f"up.{index}.act", "Erf", "no kernel") for index in range(2))
PARTIAL = Coverage(1200, 1197, (*FALLEN, Unsupported("head", "Det", "no kernel")))


def test_places_are_grouped_by_operator_and_reason() -> None:
    view = coverage_view(engine(PARTIAL))
    assert view is not None
    assert view.words == "1,197 of 1,200 operators native, 3 elsewhere"
    assert [(item.operator, item.paths) for item in view.fallen] == [
        ("Erf", ("up.0.act", "up.1.act")),
        ("Det", ("head",)),
    ]


def test_an_engine_that_runs_whole_says_so() -> None:
    assert coverage_words(Coverage(144, 144).as_json()) == "all 144 operators native"


def test_no_coverage_is_no_view() -> None:
    assert coverage_view(engine(None)) is None
    assert coverage_view({"entry": "full", "details": {"coverage": {"operators": "many"}}}) is None


def test_the_page_names_the_modules_once_and_escapes_them(digits_report: dict[str, Any]) -> None:
    hostile = Coverage(3, 2, (Unsupported("<b>x</b>", "Erf", "none"),))
    page = render_report({**digits_report, "engines": [engine(hostile)]})
    assert "2 of 3 operators native, 1 elsewhere" in page
    assert "<b>x</b>" not in page
    # Not among the details too, as JSON.
    assert "elsewhere&#34;" not in page
    assert "Operators on the device" not in render_report({**digits_report, "engines": [engine(None)]})
