"""States of a loop that nobody reads: gone with what computes them, and only they."""

from __future__ import annotations

from loops import cached

from optpass.ir.dialect import verify
from optpass.ir.interface import Interface
from optpass.ir.loop import past
from optpass.ir.text import operator_name
from optpass.rewrite.unread_states import without_unread_states


def test_what_is_read_stays():
    program, _ = cached()
    after = without_unread_states(program)
    assert after.loop == program.loop
    assert after.entries["full"] is program.entries["full"]
    assert after.entries["reuse"] is program.entries["reuse"]


def test_what_nobody_reads_goes():
    program = cached()[0].copy()
    reuse = program.entries["reuse"]
    inputs = dict(zip(reuse.signature.inputs, reuse.placeholders, strict=True))
    add = next(node for node in reuse.calls if inputs[past("deep")] in node.all_input_nodes)
    add.replace_input_with(inputs[past("deep")], next(n for n in add.all_input_nodes if n.op != "placeholder"))
    full = program.entries["full"]
    after = without_unread_states(program)
    assert not after.loop.states
    assert Interface.of(after.entries["reuse"]).reads == []
    assert Interface.of(after.entries["full"]).writes == []
    assert any("tanh" in operator_name(node) for node in after.entries["full"].calls)
    assert [spec.name for spec in after.entries["full"].inputs] == [spec.name for spec in full.inputs]
    verify(after)
