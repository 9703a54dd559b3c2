"""Which dimensions are one and the same axis: what must be cut together, and what every axis is.

Every dimension of every value and weight is an atom, a product of structures or a concatenation of them
(:mod:`~optpass.analysis.axes.structure`). Operators are walked once; each says by its rule
(:mod:`~optpass.analysis.axes.rules`) which dimensions are the same, what they are made of, and what may not be cut
(:mod:`~optpass.analysis.axes.algebra`). What must be cut together follows: a channel of a residual stream is that of
every layer that writes or reads it, of the norms on it and of the convolutions behind its concatenations.
"""

from optpass.analysis.axes.axes import Axes, axes_of
from optpass.analysis.axes.groups import Fixed, Group, Slice
from optpass.analysis.axes.rules import axis_rule
from optpass.analysis.axes.structure import Atom, Concatenation, Product, Structure

__all__ = ["Atom", "Axes", "Concatenation", "Fixed", "Group", "Product", "Slice", "Structure", "axes_of", "axis_rule"]
