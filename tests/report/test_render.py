"""The page: escaped, self-contained, well formed, true to its data, and whole when parts are missing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from optpass.report.clips import Clips
from optpass.report.render import breakable, marked_yaml, render_report

Report = dict[str, Any]
VOID = {"meta", "link", "br", "img", "input", "wbr", "hr"}
HOSTILE = """<script>alert('x')</script>"'><img src=http://evil.example/x onerror=alert(1)>&amp;{{ 7*7 }}</style>"""


class Page(HTMLParser):
    """Elements and text of a page; an end tag that does not close the open element is an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.errors: list[str] = []
        self.feed(html)
        self.close()
        self.errors += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def reports(svd: Report, digits: Report) -> dict[str, Report]:
    idle = copy.deepcopy(svd)
    idle["passes"][0].update(modified=False, sites=0, site_paths=[], after=idle["passes"][0]["before"])
    idle["after"] = idle["before"]
    return {
        "svd": svd,
        "digits": digits,
        "empty": {},
        "no passes": {**svd, "passes": [], "after": svd["before"]},
        "idle": idle,
        "odd values": {
            **digits,
            "before": None,
            "samples": {"psnr": "Infinity"},
            "latency": {"before": {"median": math.nan}},
            "engines": [{}],
            "passes": [{}, {"difference": {"relative_error": math.nan, "snr": -math.inf}}],
        },
    }


@pytest.fixture
def all_reports(svd_report: Report, digits_report: Report) -> dict[str, Report]:
    return reports(copy.deepcopy(svd_report), copy.deepcopy(digits_report))


def hostile(value: Any) -> Any:
    """Every text in ``value``, keys of open mappings included, made hostile."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()} | {f"extra {HOSTILE}": HOSTILE}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_pages_are_well_formed(all_reports: dict[str, Report], make_clips: Callable[..., Clips]) -> None:
    clips = make_clips(2)
    for name, report in all_reports.items():
        page = Page(render_report(report, clips=clips))
        assert page.errors == [], name
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), name
        targets = {attributes["href"][1:] for attributes in page.named("a")}
        assert targets <= set(ids), name


def test_nothing_is_loaded_and_nothing_runs(all_reports: dict[str, Report], make_clips: Callable[..., Clips]) -> None:
    clips = make_clips(2)
    for name, report in all_reports.items():
        html = render_report(report, clips=clips)
        page = Page(html)
        assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", html)), name
        policy = [m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        assert not page.named("script")
        for tag, attributes in page.elements:
            for key in ("src", "href", "srcset", "data", "action", "poster"):
                assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,", "data:,")), (tag, attributes)
            assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        style = html.split("<style>")[1].split("</style>")[0]
        assert re.findall(r"url\(([^)]*)\)", style) == ["#hatch"]
        assert "@import" not in style


def test_untrusted_text_is_escaped_everywhere(digits_report: Report, make_clips: Callable[..., Clips]) -> None:
    clips = make_clips(2)
    clean = Page(render_report(digits_report, clips=clips))
    bad_clips = Clips((HOSTILE, HOSTILE), clips.after, clips.before, captions=(HOSTILE, HOSTILE))
    html = render_report(hostile(digits_report), clips=bad_clips)
    page = Page(html)
    assert page.errors == []
    assert not page.named("script")
    assert len(page.named("style")) == len(clean.named("style")) == 1
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.named("img"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count("<script>alert('x')</script>") > 40
    assert "{{ 7*7 }}" in page.text


def test_svg_titles_and_attributes_are_escaped(svd_report: Report) -> None:
    svd_report["passes"][0]["name"] = HOSTILE
    page = Page(render_report(svd_report))
    assert page.errors == []
    assert len(page.named("svg")) == 1 + 5
    assert not page.named("script")
    assert not page.named("img")


def test_figures_are_those_of_the_data(svd_report: Report) -> None:
    text = Page(render_report(svd_report)).text
    assert "The pass single-token-attention changed 32 sites: 4.5 % fewer MACs, 3.3 % fewer parameters" in text
    for figure in (
        "1,524.62 M",
        "1,474.28 M",
        "4.229 TMAC",
        "4.038 TMAC",
        "8.076 TFLOP",
        "−3.3 %",
        "−4.5 %",
        "32 changed",
    ):
        assert figure in text, figure
    assert "not verified: captured structure-only" in text
    assert "nothing was executed" in text
    assert "No engine" in text


def test_measured_figures_are_those_of_the_data(digits_report: Report) -> None:
    text = Page(render_report(digits_report)).text
    for figure in ("3.1e−07", "7.4e−04", "128.4 dB", "∞ dB (identical)", "36.2 ms (35.1–40.8)", "0.842 to 0.913"):
        assert figure in text, figure
    for figure in (
        "58.2 dB",
        "98.4 %",
        "4.190",
        "at least 40",
        "9.739 MiB",
        "1,571",
        "184 ms",
        "held: 3.1e-07 ≤ 1e-05",
    ):
        assert figure in text, figure
    assert "1.15 times as fast" in text


def test_every_site_and_every_declined_place_appears(svd_report: Report) -> None:
    reasons = ["keys come from 256 tokens", "context length is dynamic", "the mask is <not> constant"]
    record = svd_report["passes"][0]
    record["declined"] = [
        {"entry": "full", "path": f"{'very.long.' * 30}block_{i}", "node": f"sdpa_{i}", "reason": reasons[i % 3]}
        for i in range(300)
    ]
    text = Page(render_report(svd_report)).text
    assert "300 declined, for 3 reasons" in text
    assert all(text.count(f"100 × {reason}") == 1 for reason in reasons)
    assert all(f"block_{i} sdpa_{i}" in text for i in range(300))
    assert all(path in text for path in record["site_paths"])


def test_few_declined_places_are_open_and_many_are_folded(digits_report: Report) -> None:
    def opened(report: Report) -> list[bool]:
        return ["open" in d for d in Page(render_report(report)).named("details") if d.get("class") == "declined"]

    assert opened(digits_report) == [True, True]
    digits_report["passes"][0]["declined"] *= 10
    assert opened(digits_report) == [False, False]


def test_it_says_so_when_nothing_improved(all_reports: dict[str, Report]) -> None:
    idle = Page(render_report(all_reports["idle"])).text
    assert "The pass changed nothing: the costs are as they were." in idle
    assert "fewer" not in idle
    assert "The recipe has no passes" in Page(render_report(all_reports["no passes"])).text


def test_it_says_so_when_it_got_worse(digits_report: Report) -> None:
    digits_report["after"], digits_report["before"] = digits_report["before"], digits_report["after"]
    digits_report["latency"]["after"]["median"] = 83.4
    digits_report["gates"][0]["held"] = False
    text = Page(render_report(digits_report)).text
    assert "more parameters" in text
    assert "slower by 100 %" in text
    assert "A gate did not hold." in text
    assert "did not hold" in text


def test_latency_within_noise_is_not_called_faster(digits_report: Report) -> None:
    digits_report["latency"]["ratio"]["certain"] = False
    text = Page(render_report(digits_report)).text
    assert "noise does not tell apart" in text
    assert "times as fast" not in text


@pytest.mark.parametrize(
    ("key", "anchor"),
    [("latency", "latency"), ("samples", "samples"), ("gates", "gates"), ("engines", "engines"), ("passes", "sites")],
)
def test_a_missing_part_leaves_no_heading(digits_report: Report, key: str, anchor: str) -> None:
    def anchors() -> set[str]:
        return {attributes["id"] for attributes in Page(render_report(digits_report)).named("section")}

    assert anchor in anchors()
    del digits_report[key]
    assert anchor not in anchors()


def test_any_single_key_may_be_missing(digits_report: Report, make_clips: Callable[..., Clips]) -> None:
    clips = make_clips(1)
    for key in digits_report:
        assert Page(render_report({k: v for k, v in digits_report.items() if k != key}, clips=clips)).errors == []
    record = digits_report["passes"][0]
    for key in record:
        one = {**digits_report, "passes": [{k: v for k, v in record.items() if k != key}]}
        assert Page(render_report(one)).errors == []


def test_entries_are_compared_when_there_are_several(digits_report: Report) -> None:
    assert "By entry" not in Page(render_report(digits_report)).text
    digits_report["after"] = copy.deepcopy(digits_report["after"])
    digits_report["after"]["entries"]["reuse"] = {"totals": {"macs": 3.2e8}}
    text = Page(render_report(digits_report)).text
    assert "By entry" in text
    assert "320 MMAC" in text


def test_command_is_quoted_for_the_shell(svd_report: Report) -> None:
    svd_report["checkpoint"]["name"] = "my model; rm -rf ~"
    command = "optpass apply recipe.yaml 'my model; rm -rf ~' -o out --structure-only"
    assert command in Page(render_report(svd_report)).text


def test_recipe_is_shown_as_yaml_that_reads_back(digits_report: Report) -> None:
    import yaml

    html = render_report(digits_report)
    shown = html.split('<pre class="yaml">')[1].split("</pre>")[0]
    page = Page(f"<p>{shown}</p>")
    assert yaml.safe_load("".join(page.words)) == digits_report["recipe"]


def test_numbers_stay_with_their_units(svd_report: Report) -> None:
    assert "4.5\N{NO-BREAK SPACE}% fewer MACs" in render_report(svd_report)


def test_filters_escape() -> None:
    assert breakable("a.<b>/c") == "a.<wbr>&lt;b&gt;/<wbr>c"
    assert marked_yaml("<k>: '<v>'") == '<span class="key">&lt;k&gt;:</span> &#39;&lt;v&gt;&#39;'
    assert marked_yaml("- [a, <b>]") == "- [a, &lt;b&gt;]"


def test_controls_only_for_clips_that_move(digits_report: Report, make_clips: Callable[..., Clips]) -> None:
    assert len(Page(render_report(digits_report, clips=make_clips(2, 8))).named("input")) == 3
    assert not Page(render_report(digits_report, clips=make_clips(2, 1))).named("input")
    assert not Page(render_report(digits_report)).named("img")


def test_clips_without_an_original(digits_report: Report) -> None:
    page = Page(render_report(digits_report, clips=Clips(("a", "b"), torch.rand(2, 4, 3, 8, 8))))
    assert len(page.named("img")) == 2
    assert page.errors == []
