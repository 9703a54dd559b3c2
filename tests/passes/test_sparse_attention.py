from __future__ import annotations

from functools import partial

import pytest
import torch
from denoisers import denoiser
from torch import nn
from torch.nn import functional

from optpass.analysis.token_grids import Grid
from optpass.capture.spans import Span
from optpass.evaluate.difference import outputs_difference, program_runner
from optpass.ir.program import Origin, Program
from optpass.ir.text import graph_text
from optpass.ir.weights import Absent, WeightStore
from optpass.passes.sparse_attention import SparseAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.registry import target_class
from optpass.pipeline.target import Lowering
from optpass.rewrite.draft_attention import DraftWriter
from optpass.rewrite.inward_windows import neighbours
from optpass.rewrite.sparse_attention import SparseWriter, Tables

WIDTH, HEADS = 16, 2
FRAMES, HEIGHT, WIDE = 2, 6, 8
CLIP = (2, 4, FRAMES, HEIGHT, WIDE)


def sparse(program, **options):
    return run_pass(program, Step("sparse-attention", SparseAttention(**options)))


def attend(q, k, v, seen=None):
    """softmax(q·kᵀ)·v over the keys that ``seen`` [.., queries, keys] allows."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if seen is None else logits.masked_fill(~seen, -torch.inf)).softmax(-1) @ v


class Layer(nn.Module):
    def __init__(self, causal=False, masked=False, written_out=False):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal, self.masked, self.written_out = causal, masked, written_out

    def heads(self, x):
        return (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))

    def forward(self, x, seen=None):
        """With ``seen``, from queries and keys, attention by itself."""
        q, k, v = self.heads(x)
        if seen is not None:
            z = attend(q, k, v, seen(q, k))
        elif self.written_out:
            z = attend(q, k, v)
        else:
            mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu() if self.masked else None
            z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return x + self.proj(z.transpose(1, 2).flatten(2))


class Clip(nn.Module):
    """Pixels of a clip, behind ``text`` tokens and before ``behind`` others."""

    def __init__(self, depth=2, text=0, behind=0, layer=Layer):
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, 1)
        self.text = nn.Parameter(torch.zeros(1, text, WIDTH)) if text else None
        self.behind = nn.Parameter(torch.zeros(1, behind, WIDTH)) if behind else None
        self.layers = nn.ModuleList([layer() for _ in range(depth)])

    def forward(self, clip, seen=None):
        rows = self.embed(clip).flatten(2).mT
        parts = [self.text, rows, self.behind]
        parts = [part if part is rows else part.expand(rows.shape[0], -1, -1) for part in parts if part is not None]
        x = torch.cat(parts, 1) if len(parts) > 1 else rows
        for layer in self.layers:
            x = layer(x) if seen is None else layer(x, seen)
        return x


def compare(program, clip, expected, bound=1e-5):
    found = program_runner(program, "full")({"clip": clip})
    [name] = found
    assert outputs_difference(found, {name: expected.detach()}).relative_error <= bound


def with_all(seen, before, behind):
    """``seen`` [.., pixels, pixels] among tokens before and behind, which all see and which see all."""
    return functional.pad(seen, (before, behind, before, behind), value=True)


def inward(q, size, radius):
    """The keys that the query at q sees, as the released form writes it down."""
    low = q - radius - max(radius + q - size + 1, 0)
    high = q + radius + max(radius - q, 0)
    return range(max(low, 0), min(high, size - 1) + 1)


def window_of_clip(radius, frames=FRAMES, height=HEIGHT, width=WIDE):
    seen = torch.zeros(frames, height, width, frames, height, width, dtype=torch.bool)
    for row in range(height):
        for column in range(width):
            rows, columns = inward(row, height, radius[0]), inward(column, width, radius[1])
            for other in rows:
                seen[:, row, column, :, other, columns.start : columns.stop] = True
    return seen.flatten(3).flatten(0, 2)


WINDOWS = {
    "small": ((1, 1), (2, 4), 0, 0),
    "tiles that do not fit": ((1, 1), (4, 3), 0, 0),
    "among others": ((1, 2), (3, 2), 3, 2),
    "itself": ((0, 0), (1, 1), 1, 0),
    "all rows": ((3, 1), (2, 2), 0, 0),
}


@pytest.mark.parametrize("form", ["blocks", "mask"])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_those_of_an_independent_module(case, form, capture_module):
    radius, tile, text, behind = WINDOWS[case]
    clip = torch.randn(CLIP)
    program, module = capture_module(partial(Clip, 2, text, behind), clip=clip)
    after, record = sparse(program, pattern="window", radius=radius, tile=tile, form=form)
    assert list(record.sites) == ["layers.0", "layers.1"]
    assert (str(record.record.promise), after.untrained) == ("approximate", frozenset())
    seen = with_all(window_of_clip(radius), text, behind)
    compare(after, clip, module(clip, lambda q, k: seen))
    fewer = record.after.totals.macs_attention < record.before.totals.macs_attention
    assert fewer == (form == "blocks")


class Hidden(Clip):
    """That hides keys: pixels by the clip, and every second of the tokens before them."""

    def hidden(self, clip):
        text = torch.arange(self.text.shape[1]) % 2 == 0
        return torch.cat([text.expand(clip.shape[0], -1), clip[:, 0].flatten(1) > -0.5], 1)[:, None, None]

    def forward(self, clip, seen=None):
        x = torch.cat([self.text.expand(clip.shape[0], -1, -1), self.embed(clip).flatten(2).mT], 1)
        for layer in self.layers:
            q, k, v = layer.heads(x)
            if seen is None:
                z = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.hidden(clip))
            else:
                z = attend(q, k, v, seen(q, k) & self.hidden(clip))
            x = x + layer.proj(z.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("form", ["blocks", "mask"])
@pytest.mark.parametrize("pattern", ["window", "draft"])
def test_hidden_keys_stay_hidden(pattern, form, capture_module):
    clip = torch.randn(CLIP, generator=torch.Generator().manual_seed(3))
    program, module = capture_module(partial(Hidden, 2, 3), clip=clip)
    options = {"window": {"radius": (1, 2), "tile": (2, 2)}, "draft": {"pool": (3, 2), "per": "row", "sparsity": 0.6}}
    after, record = sparse(program, pattern=pattern, form=form, **options[pattern])
    assert len(record.sites) == 2

    def seen(q, k):
        drafts = drafted(q, k, (3, 2), 0.6, 3, "row")[0]
        return with_all(window_of_clip((1, 2)) if pattern == "window" else drafts, 3, 0)

    compare(after, clip, module(clip, seen))
    assert not sparse(after, pattern=pattern, form=form, **options[pattern])[1].modified


def test_every_pixel_sees_as_many():
    for radius in ((1, 2), (2, 3)):
        counts = neighbours((HEIGHT, WIDE), radius).sum(1)
        assert set(counts.tolist()) == {(2 * radius[0] + 1) * (2 * radius[1] + 1)}
    assert neighbours((HEIGHT, WIDE), (3, 4)).all()


def test_a_window_that_is_the_grid_is_dense_attention(capture_module):
    """The pass leaves it alone, and a grid that the window covers along one axis is the same along it."""
    program, _ = capture_module(partial(Clip, 1), clip=torch.zeros(CLIP))
    after, record = sparse(program, pattern="window", radius=(3, 4))
    assert not record.modified
    assert record.declined[0].reason == "a window of this radius is the whole grid of 6 × 8"
    assert graph_text(after.entries["full"]) == graph_text(program.entries["full"])


def blocks_of_clip(pool):
    """Pixels by block: parts of ``pool`` rows, in them columns of blocks, in a block row by row."""
    numbers = torch.arange(FRAMES * HEIGHT * WIDE).view(FRAMES, HEIGHT, WIDE)
    return [
        numbers[frame, top : top + pool[0], left : left + pool[1]].flatten()
        for frame in range(FRAMES)
        for top in range(0, HEIGHT, pool[0])
        for left in range(0, WIDE, pool[1])
    ]


def drafted(q, k, pool, sparsity, text, per):
    """Which blocks attend to which, head by head, from pooled queries and keys; then which tokens."""
    blocks = blocks_of_clip(pool)
    count, pixels = len(blocks), FRAMES * HEIGHT * WIDE
    one, other = (
        torch.stack([each[:, :, text : text + pixels][:, :, block].mean(2) for block in blocks], 2) for each in (q, k)
    )
    draft = (one @ other.mT * q.shape[-1] ** -0.5).softmax(-1)
    seen = torch.zeros(*q.shape[:2], pixels, pixels, dtype=torch.bool)
    kept = torch.zeros(*q.shape[:2], dtype=torch.int64)
    for sample in range(len(q)):
        for head in range(HEADS):
            values = draft[sample, head]
            if per == "head":
                threshold = values.flatten().sort().values[max(0, int(sparsity * count**2) - 1)]
                keep = values >= threshold
            else:
                keep = values.argsort(1).argsort(1) >= int(sparsity * count)
            kept[sample, head] = keep.sum()
            for row, column in keep.nonzero().tolist():
                seen[sample, head, blocks[row][:, None], blocks[column]] = True
    return seen, kept, count


DRAFTS = {
    "per head": ({"per": "head"}, 0, 0),
    "per row": ({"per": "row"}, 0, 0),
    "per row, masked": ({"per": "row", "form": "mask"}, 0, 0),
    "per head, among others": ({"per": "head"}, 3, 1),
    "per row, among others": ({"per": "row"}, 0, 5),
    "per row, masked, among others": ({"per": "row", "form": "mask"}, 2, 2),
}


@pytest.mark.parametrize("case", DRAFTS)
def test_drafts_are_those_of_an_independent_module(case, capture_module):
    options, text, behind = DRAFTS[case]
    pool, sparsity = (3, 2), 0.6
    clip = torch.randn(CLIP)
    program, module = capture_module(partial(Clip, 2, text, behind), clip=clip)
    after, record = sparse(program, pattern="draft", pool=pool, sparsity=sparsity, **options)
    assert list(record.sites) == ["layers.0", "layers.1"]

    def seen(q, k):
        mask, kept, blocks = drafted(q, k, pool, sparsity, text, options["per"])
        by_rule = blocks**2 - int(sparsity * blocks**2) + 1, blocks * (blocks - int(sparsity * blocks))
        assert set(kept.flatten().tolist()) == {by_rule[options["per"] == "row"]}
        assert blocks == 16
        return with_all(mask, text, behind)

    compare(after, clip, module(clip, seen))
    fewer = record.after.totals.macs_attention < record.before.totals.macs_attention
    assert fewer == (options["per"] == "row" and "form" not in options)


def test_nothing_dropped_is_dense_attention(capture_module):
    clip = torch.randn(CLIP)
    program, module = capture_module(partial(Clip, 2, 3), clip=clip)
    dense = module(clip)
    unchanged, record = sparse(program, pattern="draft", pool=(3, 4), sparsity=0.0)
    assert not record.modified
    assert record.declined[0].reason == "of its 8 blocks none would be dropped"
    compare(unchanged, clip, dense, 1e-6)
    # One of 64 entries is to be dropped, and the largest of these is kept.
    after, record = sparse(program, pattern="draft", pool=(3, 4), sparsity=1 / 64)
    assert len(record.sites) == 2
    compare(after, clip, dense, 1e-6)


def test_equal_entries_are_kept(capture_module):
    """Of a clip without contrast every entry of the draft is the threshold."""
    clip = torch.ones(CLIP)
    program, module = capture_module(partial(Clip, 1), clip=clip)
    after, _ = sparse(program, pattern="draft", pool=(3, 4), sparsity=0.75)
    compare(after, clip, module(clip), 1e-6)


class Rows(nn.Module):
    def forward(self, rows):
        return functional.scaled_dot_product_attention(rows, rows, rows)


def test_blocks_are_a_permutation_and_back(capture_module):
    rows = torch.randn(2, HEADS, FRAMES * HEIGHT * WIDE, 3)
    program, _ = capture_module(Rows, rows=rows)
    graph, pool = program.entries["full"], (3, 4)
    [dense] = [node for node in graph.calls if "attention" in node.name]
    grid = Grid(0, FRAMES * HEIGHT * WIDE, FRAMES, HEIGHT, WIDE)
    draft = DraftWriter(SparseWriter(graph, dense, grid, Tables(program)), pool, 0.5)
    with graph.before(dense):
        blocks = draft.in_blocks(draft.writer.matrices[0])
        back = draft.in_order(blocks)
    graph.output_node.args = ((blocks, back),)
    inside, found = graph.module(program.weights)(rows)
    assert torch.equal(found, rows.flatten(0, 1))
    assert torch.equal(inside, torch.stack([found[:, block] for block in blocks_of_clip(pool)], 1))


GOLDEN = """\
  %reshape_default_2 = reshape(%transpose_2, [2, 24, 8]) : f32[2, 24, 8]  ; layers.0
  %index_select_default = index_select(%reshape_default, 1, @T.queries) : f32[2, 24, 8]  ; layers.0
  %reshape_default_3 = reshape(%index_select_default, [2, 6, 4, 8]) : f32[2, 6, 4, 8]  ; layers.0
  %index_select_default_1 = index_select(%reshape_default_1, 1, @T.keys) : f32[2, 48, 8]  ; layers.0
  %reshape_default_4 = reshape(%index_select_default_1, [2, 6, 8, 8]) : f32[2, 6, 8, 8]  ; layers.0
  %index_select_default_2 = index_select(%reshape_default_2, 1, @T.keys) : f32[2, 48, 8]  ; layers.0
  %reshape_default_5 = reshape(%index_select_default_2, [2, 6, 8, 8]) : f32[2, 6, 8, 8]  ; layers.0
  %scaled_dot_product_attention_default = scaled_dot_product_attention(%reshape_default_3, %reshape_default_4, %reshape_default_5, @T.seen) : f32[2, 6, 4, 8]  ; layers.0
  %reshape_default_6 = reshape(%scaled_dot_product_attention_default, [2, 24, 8]) : f32[2, 24, 8]  ; layers.0
  %index_select_default_3 = index_select(%reshape_default_6, 1, @T.back) : f32[2, 24, 8]  ; layers.0
  %reshape_default_7 = reshape(%index_select_default_3, [1, 2, 24, 8]) : f32[1, 2, 24, 8]  ; layers.0
"""  # noqa: E501


def test_golden(capture_module):
    program, _ = capture_module(partial(Clip, 1), clip=torch.zeros(1, 4, 1, 4, 6))
    after, _ = sparse(program, pattern="window", radius=(0, 1), tile=(2, 2))
    lines = graph_text(after.entries["full"]).replace("sparse_attention", "T").splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if "T.queries" in line) - 1
    stop = next(index for index, line in enumerate(lines) if "T.back" in line) + 2
    assert "".join(lines[start:stop]) == GOLDEN


def test_layers_and_entries_share_tables(capture_module):
    program, _ = capture_module(partial(Clip, 3, 2), clip=torch.zeros(CLIP))
    program = Program({**program.entries, "other": program.entries["full"].copy()}, program.weights, program.origin)
    after, record = sparse(program, pattern="window", radius=(1, 1), tile=(2, 2), layers=[0, 2])
    assert list(record.sites) == ["layers.0", "layers.2", "other:layers.0", "other:layers.2"]
    tables = sorted(after.weights.keys() - program.weights.keys())
    leaves = ("back", "keys", "queries", "seen", "seen_columns", "seen_rows")
    assert tables == [f"sparse_attention.{leaf}" for leaf in leaves]
    assert record.after.totals.parameters == record.before.totals.parameters


FORMS = {
    "window, blocks": {"pattern": "window", "radius": (1, 1), "tile": (2, 2)},
    "window, mask": {"pattern": "window", "radius": (1, 1), "form": "mask"},
    "draft per row": {"pattern": "draft", "pool": (3, 4), "per": "row", "sparsity": 0.5},
    "draft per row, mask": {"pattern": "draft", "pool": (3, 4), "per": "row", "sparsity": 0.5, "form": "mask"},
    "draft per head": {"pattern": "draft", "pool": (3, 4), "sparsity": 0.5},
}
SOME = [each if each == "draft per row" else pytest.param(each, marks=pytest.mark.slow) for each in FORMS]


@pytest.mark.parametrize("form", FORMS)
def test_a_second_run_finds_nothing(form, capture_module):
    program, _ = capture_module(partial(Clip, 1, 2), clip=torch.zeros(CLIP))
    after, record = sparse(program, **FORMS[form])
    assert record.modified
    for other in (FORMS[form], FORMS["window, blocks"]):
        _, record = sparse(after, **other)
        assert not record.modified
        assert record.declined


@pytest.mark.parametrize("form", SOME)
def test_open_batch(form, capture_shared):
    """One graph for every batch gives what the graph of one gives."""
    program = capture_shared(partial(Clip, 1, 2), {"clip": ("batch", *CLIP[1:])}, {"batch": Span(1, 5)})
    fixed = capture_shared(partial(Clip, 1, 2), {"clip": (3, *CLIP[1:])}, {})
    clip = torch.randn(3, *CLIP[1:])
    results = []
    for each in (program, fixed):
        after, record = sparse(each, **FORMS[form])
        assert len(record.sites) == 1
        results.append(program_runner(after, "full")({"clip": clip}))
    assert outputs_difference(*results).relative_error <= 1e-5


@pytest.mark.parametrize("form", SOME)
def test_in_onnxruntime(form, capture_module, tmp_path):
    clip = torch.randn(CLIP)
    program, _ = capture_module(partial(Clip, 1, 2), clip=clip)
    after, _ = sparse(program, **FORMS[form])
    target = target_class("onnxruntime")(threads=1)
    entry = target.lower(after, Lowering(tmp_path))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs], "details": entry.details}
    found = type(target).load(tmp_path, record, {"threads": 1})({"clip": clip})
    assert outputs_difference(found, program_runner(after, "full")({"clip": clip})).relative_error <= 1e-5


def test_a_grid_that_inputs_do_not_say(capture_module):
    class Sequence(Clip):
        def forward(self, clip):
            for layer in self.layers:
                clip = layer(clip)
            return clip

    rows = torch.randn(2, FRAMES * HEIGHT * WIDE, WIDTH)
    program, module = capture_module(partial(Sequence, 1), clip=rows)
    options = {"pattern": "window", "radius": (1, 1), "tile": (2, 2)}
    _, record = sparse(program, **options)
    assert [item.reason for item in record.declined] == [
        "its tokens are no grid of rows and columns that inputs say: give it as grid"
    ]
    _, record = sparse(program, **options, grid=(2, 4, 8))
    assert [item.reason for item in record.declined] == ["its tokens are 96, none of them 2 × 4 × 8"]
    after, _ = sparse(program, **options, grid=(FRAMES, HEIGHT, WIDE))
    expected = module.layers[0](rows, lambda q, k: window_of_clip((1, 1)))
    compare(after, rows, expected)


REFUSED = {
    "causal": (partial(Layer, causal=True), {}, "it has a mask already (simplify drops one that hides nothing)"),
    "masked": (partial(Layer, masked=True), {}, "it has a mask already (simplify drops one that hides nothing)"),
    "written out": (
        partial(Layer, written_out=True),
        {},
        "it is written out as products, and only scaled_dot_product_attention has the form that is needed",
    ),
    "no blocks": (
        Layer,
        {"pattern": "draft", "pool": (4, 4)},
        "blocks of 4 × 4 do not divide its grid of 6 × 8",
    ),
    "nothing saved": (
        Layer,
        {"radius": (2, 3)},
        "tiles with the windows around them multiply as much as all tokens do: smaller radius or tile",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, capture_module):
    layer, options, reason = REFUSED[case]
    program, _ = capture_module(partial(Clip, 1, layer=layer), clip=torch.zeros(CLIP))
    _, record = sparse(program, **{"pattern": "window", "radius": (1, 1), "tile": (2, 2), **options})
    assert not record.modified
    assert [(item.path, item.reason) for item in record.declined] == [("layers.0", reason)]


def test_open_grids_are_refused(capture_shared):
    sizes = {"height": Span(4, 16)}
    program = capture_shared(partial(Clip, 1), {"clip": (2, 4, 2, "height", 8)}, sizes)
    _, record = sparse(program, pattern="window", radius=(1, 1))
    assert [item.reason for item in record.declined] == [
        "the sizes of its grid are open, and windows and blocks are of one grid"
    ]


def test_blocks_per_head_have_no_shape():
    with pytest.raises(ValueError, match="per: row, or form: mask"):
        SparseAttention(pattern="draft", form="blocks")


def test_half_precision(capture_module):
    program, _ = capture_module(lambda: Clip(1).half(), clip=torch.zeros(CLIP, dtype=torch.float16))
    for options in FORMS.values():
        assert sparse(program, **options)[1].modified


def of_denoiser(name, **options):
    graph = denoiser(name)
    specs = {str(n.target): n.meta["val"] for n in graph.fx.nodes if n.op == "get_attr"}
    weights = WeightStore({name: Absent(name, tuple(v.shape), v.dtype) for name, v in specs.items()})
    return sparse(Program({"full": graph.copy()}, weights, Origin("test")), **options)[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["window, blocks", "draft per row", "draft per head"])
def test_in_denoisers(form):
    """Wan's clip, CogVideoX's behind its text, HunyuanVideo's before one that has a mask; Latte's frames one by one."""
    options = {**FORMS[form], "layers": [1], **({"pool": (2, 3)} if "draft" in form else {})}
    wan = of_denoiser("Wan 2.1 text-to-video 1.3B", **options)
    assert list(wan.sites) == ["blocks.1.attn1"]
    assert [item.reason.partition(":")[0] for item in wan.declined] == ["cross-attention"]
    assert list(of_denoiser("CogVideoX 5B", **options).sites) == ["transformer_blocks.1.attn1"]
    latte = of_denoiser("Latte-1", **options)
    assert list(latte.sites) == ["transformer_blocks.1.attn1"]
    assert latte.declined[-1].reason == "its tokens are no grid of rows and columns that inputs say: give it as grid"
    blocks = ["transformer_blocks.1", "single_transformer_blocks.1"]
    hunyuan = of_denoiser("HunyuanVideo", **{**options, "layers": None}, match=blocks)
    assert list(hunyuan.sites) == [f"{block}.attn" for block in blocks]
