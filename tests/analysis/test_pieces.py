from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.analysis.pieces import piece_of

CASES = {
    "slice": (lambda x: x[:, 1:3], (1, 1, 3)),
    "slice to the end": (lambda x: x[:, 2:], (1, 2, 5)),
    "slice from the end": (lambda x: x[:, -2:], (1, 3, 5)),
    "slice between from the end": (lambda x: x[:, -4:-1], (1, 1, 4)),
    "slice beyond": (lambda x: x[:, 3:99], (1, 3, 5)),
    "chunk, shorter at last": (lambda x: x.chunk(2, 1)[1], (1, 3, 5)),
    "split": (lambda x: x.split(2, -2)[1], (1, 2, 4)),
    "split by sizes": (lambda x: x.split([1, 3, 1], 1)[2], (1, 4, 5)),
    "every second": (lambda x: x[:, ::2], None),
    "unbind": (lambda x: x.unbind(1)[0], None),
    "reversed": (lambda x: x.flip(1), None),
}


class Cut(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x):
        return self.cut(x)


@pytest.mark.parametrize("case", CASES)
def test_pieces(capture_module, case):
    cut, expected = CASES[case]
    program, module = capture_module(lambda: Cut(cut), x=torch.zeros(3, 5, 4))
    [result] = program.entries["full"].output_node.args[0]
    piece = piece_of(result)
    assert (piece and (piece.dim, piece.start, piece.stop)) == expected
    if piece:
        x = torch.randn(3, 5, 4)
        assert torch.equal(module(x), x.narrow(piece.dim, piece.start, piece.stop - piece.start))


def test_what_is_no_cut(capture_module):
    program, _ = capture_module(lambda: Cut(lambda x: x.sin()), x=torch.zeros(3, 5, 4))
    graph = program.entries["full"]
    assert piece_of(graph.calls[0]) is None
    assert piece_of(graph.placeholders[0]) is None
    assert piece_of(3) is None
