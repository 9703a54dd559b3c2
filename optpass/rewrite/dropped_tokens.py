"""Token dropping: behind an attention, the tokens that receive least of it go.

Source: EVAD, Chen et al., ICCV 2023, arXiv 2304.08451, section 3.2, and the authors' code; class tokens as in EViT.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from optpass.analysis.operators import aten
from optpass.ir.graph import Graph
from optpass.rewrite.token_rows import RowWriter


@dataclass(frozen=True)
class Protected:
    """Tokens that always stay: the first ``first``, and those of a frame from ``frame[0]`` to ``frame[1]``."""

    first: int
    frame: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        return self.first + (self.frame[1] - self.frame[0] if self.frame else 0)

    @property
    def gathered(self) -> Protected:
        """The same tokens behind a selection, which puts them in front."""
        return Protected(self.first, (self.first, self.count) if self.frame else None)


def kept_rows(graph: Graph, rows: Node, scores: Node, count: int, protected: Protected) -> Node:
    """``count`` of ``rows`` [batch, tokens, d], at the insertion point: those ``protected``, the highest ``scores``.

    In the order of their scores, as in the code.
    """
    write = RowWriter(graph, rows)
    first, frame = protected.first, protected.frame
    parts = [write.sliced(rows, 0, first)] if first else []
    if frame is None:
        free = write.sliced(scores, first)
    else:
        parts.append(write.sliced(rows, *frame))
        between = [write.sliced(scores, first, frame[0])] if frame[0] > first else []
        free = write.joined([*between, write.sliced(scores, frame[1])])
    chosen = write.item(write.call(aten.topk.default, free, count - protected.count), 1)
    chosen = write.call(aten.add.Tensor, chosen, first) if first else chosen
    if frame is not None:
        behind = write.call(aten.ge.Scalar, chosen, frame[0])
        skipped = write.call(
            aten.mul.Tensor, write.call(aten.to.dtype, behind, chosen.meta["val"].dtype), frame[1] - frame[0]
        )
        chosen = write.call(aten.add.Tensor, chosen, skipped)
    return write.joined([*parts, write.taken(rows, chosen)])
