"""Published ladders of structural changes beside those that the recipes count, structure only."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.ir.program import Program
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import make_recipe

SVD, SD15 = "tests/configs/svd-unet", "tests/configs/sd15-unet"
PIX2PIX, TAESD = "tests/configs/instruct-pix2pix", "tests/configs/taesd"
SPATIAL = {"axis": "spatial", "match": ["*.attn1.*"]}
THIRTY = ["*.resnets.*", "down_blocks.[12].*", "up_blocks.1.*", "up_blocks.2.attentions.0"]
INNERMOST = {"after": "conv_in", "before": "conv_norm_out"}
Row = tuple[str, float | None, float]


def structure(optpass: Callable[..., Any], root: Path) -> str:
    """The page; ``optpass`` runs the command with ``--json`` in ``root``."""
    svd = capture(root / SVD, inputs={"sample": (1, 14, 8, 32, 64)})
    one_token = passed(svd, "single-token-attention")
    halved = passed(one_token, "multiscale-time")
    sections = [
        HEAD,
        "## MobileVD, Table 1",
        MOBILEVD.format(rows=_table(_mobilevd(optpass))),
        "## Temporal multiscaling, MobileVD, Table 3",
        MULTISCALE.format(rows=_table(_multiscale(one_token))),
        "## Temporal pruning, MobileVD, Tables 1 and 6",
        PRUNING.format(rows=_table(_pruning(halved))),
        "## Channel funnels, MobileVD, Tables 2 and 5",
        FUNNELS.format(rows=_table(_funnels(svd, halved))),
        "## MoViE, Table 1",
        MOVIE.format(rows=_table(_movie(optpass))),
        "## Efficient SD 1.5, Clockwork, Table 1",
        EFFICIENT.format(rows=_table(_efficient(optpass))),
    ]
    return "\n\n".join(sections)


def passed(program: Program, *passes: Any) -> Program:
    """``program`` after passes, each a name or ``{name: options}``."""
    return run_passes(program, make_recipe({"passes": list(passes)}).steps)[0]


def teraflop(program: Program, *passes: Any) -> float:
    """What an evaluation takes after passes, in 10¹², attention's products included."""
    _, records = run_passes(program, make_recipe({"passes": list(passes)}).steps)
    found: float = records[-1].after.totals.flops() / 1e12
    return found


def rungs(optpass: Callable[..., Any], recipe: str, checkpoint: str, *options: str) -> list[dict[str, Any]]:
    """The ladder of a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("apply", recipe, checkpoint, "-o", f"{folder}/out", "--structure-only", *options)
        found: list[dict[str, Any]] = optpass(*arguments).record["ladder"]
    return found


def _table(rows: Iterator[Row]) -> str:
    head = "| | published | optpass | difference |\n|---|---|---|---|\n"
    return head + "\n".join(_row(*row) for row in rows)


def _row(name: str, published: float | None, found: float) -> str:
    told, off = (f"{published:g}", f"{100 * (found / published - 1):+.2f} %") if published else ("", "")
    return f"| {name} | {told} | {found:.4g} | {off} |"


def _tera(rung: dict[str, Any], key: str = "macs") -> float:
    return 2 * float(rung[key]) / 1e12


def _mobilevd(optpass: Callable[..., Any]) -> Iterator[Row]:
    captured, _, small, one, student, halved, pruned, funnelled = rungs(optpass, "mobilevd-svd", SVD)
    yield "SVD 1024×576, 50 evaluations", 45.43, _tera(captured)
    yield "512×256", 8.60, _tera(small)
    yield "optimized cross-attention", 8.24, _tera(one)
    yield "one evaluation", 8.24, _tera(student)
    yield "temporal multiscaling", 5.42, _tera(halved)
    yield "temporal block pruning, 70 %", 4.64, _tera(pruned)
    yield "channel funnels", 4.34, _tera(funnelled)
    yield "TFLOP of a clip before", 50 * 45.43, _tera(captured, "total")
    yield "TFLOP of a clip after", 4.34, _tera(funnelled, "total")
    yield "fewer, times", 523, captured["total"] / funnelled["total"]
    yield "parameters before, M", None, captured["parameters"] / 1e6
    yield "parameters after, M", None, funnelled["parameters"] / 1e6


def _multiscale(program: Program) -> Iterator[Row]:
    def halve(**options: Any) -> dict[str, Any]:
        return {"multiscale-time": options}

    pixels = halve(axis="pixels")
    yield "none", 8.24, teraflop(program, "single-token-attention")
    yield "frames, after down_blocks.0 and before up_blocks.3", 5.42, teraflop(program, halve())
    yield "pixels, the same", 4.35, teraflop(program, pixels)
    yield "both, the same", 3.39, teraflop(program, halve(), pixels)
    others = (("conv_in", "conv_norm_out"), ("down_blocks.1", "up_blocks.2"), ("down_blocks.2", "up_blocks.1"))
    for after, before in others:
        place = f"after {after} and before {before}"
        yield f"frames, {place}", None, teraflop(program, halve(after=after, before=before))
    yield "pixels, after conv_in and before conv_norm_out", None, teraflop(program, halve(**INNERMOST, axis="pixels"))


def _pruning(program: Program) -> Iterator[Row]:
    for share, published, count in ((53, 5.17, 20), (70, 4.64, 27), (80, 4.35, 30), (90, 4.06, 34), (100, None, 38)):
        cheapest = {"prune-blocks": {"kind": "temporal", "count": count, "importance": "macs"}}
        yield f"{share} %: the {count} cheapest of 38 units", published, teraflop(program, cheapest)
    others = {"prune-blocks": {"kind": "temporal", "remove": THIRTY}}
    yield f"80 %: another 30, `{' '.join(THIRTY)}`", 4.35, teraflop(program, others)


def _funnels(svd: Program, halved: Program) -> Iterator[Row]:
    def funnel(**options: Any) -> dict[str, Any]:
        return {"funnel-channels": {"ratio": 0.5, **options}}

    every = ["*.attn1.*"]
    scopes = {
        "spatial self-attention, QK": funnel(**SPATIAL, scope=["attention-qk"]),
        "spatial self-attention, QK and VO": funnel(**SPATIAL),
        "self-attention, QK": funnel(match=every, scope=["attention-qk"]),
        "self-attention, QK and VO": funnel(match=every),
        "convolutions": funnel(scope=["conv"]),
    }
    published = {"self-attention, QK and VO": 8.0, "convolutions": 7.2}
    original = measure(svd).totals.flops() / 1e12
    yield "Table 5: SVD at 512×256", 8.6, original
    for name, item in scopes.items():
        yield f"Table 5: {name}", published.get(name), teraflop(svd, item)
    yield "Table 5: convolutions, share of SVD", 7.2 / 8.6, teraflop(svd, scopes["convolutions"]) / original
    pruned = passed(halved, {"prune-blocks": {"kind": "temporal", "count": 27, "importance": "macs"}})
    for name, item in list(scopes.items())[:4]:
        yield f"Table 2: {name}", 4.34 if item == funnel(**SPATIAL) else None, teraflop(pruned, item)


def _movie(optpass: Callable[..., Any]) -> Iterator[Row]:
    swapped = ("--set", f"swap-autoencoder.checkpoint={TAESD}")
    captured, _, _, mobile, guided, student = rungs(optpass, "movie-instructpix2pix", PIX2PIX, *swapped)
    for name, published, rung in (
        ("InstructPix2Pix, 30 evaluations", 21.31, captured),
        ("Mobile-Pix2Pix", 16.10, mobile),
        ("guidance distilled, 10 evaluations", 5.50, guided),
        ("steps distilled, 1 evaluation", 0.76, student),
    ):
        yield name, published, _tera(rung, "total") - _tera(rung, "total_attention")
    yield "an evaluation of the UNet", 0.600, _tera(captured) - _tera(captured, "macs_attention")
    yield "the autoencoder", 3.2, _tera(captured, "beside") - _tera(captured, "beside_attention")
    yield "the tiny autoencoder", None, _tera(student, "beside")
    yield "parameters of the UNet after, M", None, student["parameters"] / 1e6


def _efficient(optpass: Callable[..., Any]) -> Iterator[Row]:
    captured, _, efficient, student, cached = rungs(optpass, "efficient-sd15", SD15)
    for name, published, rung in (
        ("SD 1.5, 8 steps with guidance", 10.8, captured),
        ("Efficient UNet", 9.5, efficient),
        ("guidance distilled", 4.7, student),
        ("every second step reuses", 2.9, cached),
    ):
        yield name, published, _tera(rung, "total") - _tera(rung, "total_attention")


HEAD = """# Structure: published ladders, counted

TFLOP, that is 10¹² · 2·MAC, from the configurations alone. No weight is read, so nothing here speaks of quality: most
rows need training, which the recipes leave to a healing pass. `optpass apply RECIPE CHECKPOINT --structure-only`
prints the ladders. MobileVD counts the products inside attention, MoViE and Clockwork do not; so do the rows here.
The papers' figures have two to four digits."""

MOBILEVD = """An evaluation of the UNet at batch 1, 14 frames. Ben Yahia et al., arXiv 2412.07583. The paper's counter
sees 1.4 % more in SVD itself.

{rows}

523 is 50 · 45.43 / 4.34. The paper's other figure, 1817.2 TFLOP, is 40 · 45.43 and does not go with it. MobileVD-HD
(23.63 TFLOP at 1024×576) is not among the rows: which of its blocks are pruned is not published."""

MULTISCALE = """At 512×256, after the cross-attention. The paper does not say where it resamples; its temporal row fits
one pair of levels, below, and with both axes the same levels fit. Its spatial row fits none: halving pixels at these
levels costs 7 % less than published.

{rows}"""

PRUNING = """After multiscaling. The units are 22 residual blocks and 16 transformers over frames. The paper learns
which go, and does not list them. Its counts are near the most that so many removals can leave, so that cheap units
went; no 34 leave more than the row says. 53 % is its row with L1 regularisation.

{rows}"""

FUNNELS = """Funnels of half the width. The paper's tables do not agree on what a funnel is in: the 8.0 of Table 5 is
that of queries, keys, values and outputs of all self-attention, the 4.34 of Table 2 that of spatial self-attention
alone, after multiscaling and pruning. The recipe is Table 2's. Convolutions are 2.5 % below the paper, of which 1.6 %
are in its count of SVD: the shares differ by less.

{rows}"""

MOVIE = """A frame at 480×480 with the autoencoder's encoder and decoder, without products inside attention. arXiv
2412.06578. Mobile-Pix2Pix is both the UNet without its highest transformers and the tiny autoencoder. The UNet's and
the autoencoder's own figures are the text's, which rounds them (21.31 − 30 · 0.6 would leave 3.3 to the latter).

{rows}"""

EFFICIENT = """An image at 512×512, without products inside attention. Habibian et al., CVPR 2024, arXiv 2312.08128.
The last row is Clockwork with the identity adaptor, before the upsampler; the paper's adaptor has 0.03 more.

{rows}"""
