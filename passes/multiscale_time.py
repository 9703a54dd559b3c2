"""The pass ``multiscale-time``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch.fx import Node

from optpass.analysis.axes import Axes, axes_of
from optpass.analysis.boundaries import module_paths
from optpass.errors import UserError, nearest
from optpass.ir.graph import Graph, path_of
from optpass.ir.program import Program
from optpass.pipeline.contract import retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.multiscale import HalvedBeforeError, halved
from optpass.rewrite.resizing import ResizeError

AXES = {"frames": ("frames",), "pixels": ("height", "width")}
UP = "up_blocks."


class MultiscaleTime(Pass):
    """a video UNet's inner levels on all frames → on every second one, repeated before the last up block.

    Between the modules `after` and `before` everything runs on half the frames. The features that come in, skips
    among them, are averaged in pairs (`down: average`) or every second frame is taken (`first`); so are the
    embedding of the timestep and the context, which are the same for every frame, and the indicator of images; the
    positions of frames in temporal attention are counted anew. What goes out stands for two frames (nearest).
    `axis: pixels` halves height and width in the same way instead.

    Refuses a model without such an axis, modules that are not there or in the other order, an axis that is open, and
    tables along it, among them constants that `simplify` folded: run it later. Leaves alone, and says so, levels that
    run on half of it already, and entries that lack the modules.

    Source: temporal multiscaling in MobileVD, arXiv 2412.07583, Table 3. The levels are those that give the paper's
    count; its operators for resampling are not published.
    """

    after: str = Field("down_blocks.0", description="the last module on all frames")
    before: str | None = Field(None, description="the first module on all frames again; by default the last up block")
    axis: Literal["frames", "pixels"] = Field("frames", description="what is halved")
    down: Literal["average", "first"] = Field("average", description="how two frames become one")

    contract = retrain()

    def run(self, program: Program, context: Context) -> Program:
        regions = {name: self._region(graph) for name, graph in program.entries.items()}
        missing = [reason for reason in regions.values() if isinstance(reason, str)]
        if len(missing) == len(regions):
            raise UserError(missing[0])
        found = axes_of(program)
        for name, region in regions.items():
            if isinstance(region, str):
                context.decline(self.after, region, name)
            else:
                self._halve(program.entries[name], region, found, context, name)
        return program.with_written_states()

    def _halve(self, graph: Graph, region: list[Node], found: Axes, context: Context, entry: str) -> None:
        try:
            entering, leaving = halved(graph, found, region, AXES[self.axis], self.down)
        except HalvedBeforeError as error:
            return context.decline(self.after, str(error), entry)
        except ResizeError as error:
            raise UserError(f"{self.axis} cannot be halved after {self.after}: {error}") from error
        graph.remove_dead_code()
        for node in (*entering, *leaving):
            context.rewrote(node, entry)
        return None

    def _region(self, graph: Graph) -> list[Node] | str:
        """The operators between the two modules, or why there are none."""
        known = module_paths(graph)
        before = self.before or _last_up_block(known)
        for path in (self.after, before):
            if path not in known:
                as_deep = [other for other in known if other.count(".") <= path.count(".")]
                return f"no module {path!r} in the graph{nearest(path, as_deep)}"
        calls = graph.calls
        last = max(index for index, node in enumerate(calls) if _is_in(node, self.after))
        first = min(index for index, node in enumerate(calls) if _is_in(node, before))
        return calls[last + 1 : first] or f"nothing is computed after {self.after} and before {before}"


def _last_up_block(paths: set[str]) -> str:
    names = [path.removeprefix(UP) for path in paths if path.startswith(UP)]
    return f"{UP}{max((int(name) for name in names if name.isdecimal()), default=0)}"


def _is_in(node: Node, module: str) -> bool:
    return f"{path_of(node)}.".startswith(f"{module}.")
