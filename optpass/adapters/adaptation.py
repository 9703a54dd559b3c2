"""What an adapter does to one weight, as lazy expressions: ΔW, its low-rank factors, the merged weight.

Sources: LoRA (Hu et al., arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), LoHa and LoKr
(LyCORIS, 2309.14859), the first two as `peft` defines them, CP-decomposed convolutions as LyCORIS does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Literal

import torch

from optpass.errors import UserError
from optpass.ir.algebra import Einsum, Power, Update
from optpass.ir.weights import Cast, Concat, Expression, Reshape, Scale, Shape, Sum

Kind = Literal["lora", "loha", "lokr"]
Matrix = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Adaptation:
    """One module's part of an adapter. Shapes: ``r`` rank, ``out`` and ``in`` channels, ``k…`` the kernel.

    ``factors`` by name:

    - ``lora``: ``down`` [r, in, k…], ``up`` [out, r, 1…]; with ``mid`` [r, r, k…], ``down`` is [r, in, 1…]
    - ``loha``: ``w1_a`` [out, r], ``w1_b`` [r, in·k], ``w2_a``, ``w2_b``; with ``t1``, ``t2`` [r, r, k…],
      ``w1_a`` is [r, out] and ``w1_b`` [r, in]
    - ``lokr``: ``w1`` [a, c] or ``w1_a`` [a, r] and ``w1_b`` [r, c]; ``w2`` [b, d, k…] or ``w2_a`` [b, r] and
      ``w2_b`` [r, d·k], or with ``t2`` [r, r, k…] ``w2_a`` [r, b] and ``w2_b`` [r, d]; out = a·b, in = c·d

    ``magnitude`` (DoRA) is [out] by whatever rank the file gives it, or [in] where ``magnitude_of`` says so.
    ``keys`` are the names in the file, by factor (and ``magnitude``, ``alpha``).
    """

    kind: Kind
    factors: Mapping[str, Expression]
    alpha: float
    rank: int
    rank_stabilised: bool = False
    magnitude: Expression | None = None
    magnitude_of: Literal["out", "in"] = "out"
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """α/r, or α/√r where the adapter is rank-stabilised."""
        return self.alpha / (sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def is_plain(self) -> bool:
        """Whether the adapted weight is W + BA and no more."""
        return self.kind == "lora" and self.magnitude is None

    @property
    def key(self) -> str:
        """A name in the file to call the adaptation by."""
        return next(iter(self.keys.values()), "")

    @property
    def matrix(self) -> Matrix:
        """Rows and columns of ΔW: ``out`` and ``in·k``."""
        if self.kind == "lora":
            down, up = self.factors["down"].shape, self.factors["up"].shape
            kernel = self.factors["mid"].shape[2:] if "mid" in self.factors else ()
            return up[0], prod(down[1:]) * prod(kernel)
        if self.kind == "loha":
            return _half_shape(self.factors, 1)
        (rows, columns), (inner_rows, inner_columns) = _kron_shapes(self.factors)
        return rows * inner_rows, columns * inner_columns

    def check_fits(self, shape: Shape) -> None:
        """
        Raises:
            UserError: ΔW is no change of a weight of ``shape``; says both shapes.
        """
        fits = self._matrices() == {(shape[0], prod(shape[1:]))} and self._kernel_fits(shape)
        if not fits:
            raise UserError(f"changes a weight of {self._described()}, and the model's is {list(shape)}")
        if self.magnitude is not None and self.magnitude.numel != self._magnitudes(shape):
            raise UserError(f"has a magnitude of {list(self.magnitude.shape)}, and the model's weight is {list(shape)}")

    def _magnitudes(self, shape: Shape) -> int:
        return shape[0] if self.magnitude_of == "out" else shape[1]

    def _matrices(self) -> set[Matrix]:
        """:attr:`matrix`; of LoHa, both factors of the product's."""
        return {_half_shape(self.factors, n) for n in (1, 2)} if self.kind == "loha" else {self.matrix}

    def _kernel_fits(self, shape: Shape) -> bool:
        if core := next((name for name in ("mid", "t1", "t2") if name in self.factors), None):
            return _trimmed((1, *self.factors[core].shape[2:])) == _trimmed((1, *shape[2:]))
        given = self.factors["down"].shape if self.kind == "lora" else ()
        # 1×1 convolutions and linears are written as either.
        return len(given) <= 2 or _trimmed(given[1:]) == _trimmed(shape[1:])

    def _described(self) -> str:
        if self.kind == "lora" and "mid" not in self.factors:
            return str([self.factors["up"].shape[0], *self.factors["down"].shape[1:]])
        return f"{self.matrix[0]} rows and {self.matrix[1]} columns"

    def delta(self, shape: Shape, strength: float = 1.0) -> Expression:
        """ΔW · ``strength`` for a weight of ``shape``, its scale included, float32.

        Raises:
            UserError: the shapes do not fit.
        """
        self.check_fits(shape)
        made = {"lora": self._lora, "loha": self._loha, "lokr": self._lokr}[self.kind](self.scale * strength)
        return _shaped(made, shape)

    def low_rank(self, shape: Shape, strength: float = 1.0) -> tuple[Expression, Expression]:
        """The two layers of a plain LoRA over a weight of ``shape``: ``down`` [r, in, k…] and ``up`` [out, r, 1…].

        Both float32; the scale and ``strength`` are in ``up``.

        Raises:
            UserError: the shapes do not fit.
            ValueError: the adaptation is not of low rank as it stands.
        """
        if self.kind != "lora":
            raise ValueError(f"{self.kind} has no two layers")
        self.check_fits(shape)
        down, up = self._down(), _wide(self.factors["up"])
        rank = up.shape[1]
        ones = (1,) * (len(shape) - 2)
        return _shaped(down, (rank, *shape[1:])), _scaled(_shaped(up, (shape[0], rank, *ones)), self.scale * strength)

    def _down(self) -> Expression:
        down = _wide(self.factors["down"])
        if "mid" not in self.factors:
            return down
        return Einsum("asm,si->aim", (_kernel_flat(self.factors["mid"]), _matrix(down)))

    def _lora(self, scale: float) -> Expression:
        up = _scaled(_matrix(_wide(self.factors["up"])), scale)
        return Einsum("or,ri->oi", (up, _matrix(self._down())))

    def _loha(self, scale: float) -> Expression:
        halves = [_half(self.factors, number, factor) for number, factor in ((1, scale), (2, 1.0))]
        return Einsum("oi,oi->oi", tuple(map(_matrix, halves)))

    def _lokr(self, scale: float) -> Expression:
        return Einsum("ac,bd->abcd", (_scaled(_outer(self.factors), scale), _matrix(_inner(self.factors))))


def merged(base: Expression, adaptations: Sequence[tuple[Adaptation, float]]) -> Expression:
    """``base`` with every adaptation at its strength, in ``base``'s dtype, rounded once.

    W + Σ s·ΔW. A DoRA adaptation gives m/‖W+s·ΔW‖·(W+s·ΔW), the norm over all but the output channels; as in
    `peft`, it takes its norm without the other adaptations, and what stands before it in the order is scaled too.

    Raises:
        UserError: an adaptation does not fit the shape of ``base``.
    """
    if all(adaptation.is_plain for adaptation, _ in adaptations):
        return _updated(base, adaptations)
    wide = value = _wide(base)
    for adaptation, strength in adaptations:
        delta = adaptation.delta(base.shape, strength)
        value = Sum(value, delta)
        if adaptation.magnitude is not None:
            value = _along(value, direction_scale(wide, delta, adaptation), adaptation)
    return value if value.dtype == base.dtype else Cast(value, base.dtype)


def _updated(base: Expression, adaptations: Sequence[tuple[Adaptation, float]]) -> Expression:
    """Plain LoRAs side by side are one of all their ranks."""
    pairs = [adaptation.low_rank(base.shape, strength) for adaptation, strength in adaptations]
    if not pairs:
        return base
    downs, ups = (tuple(map(_matrix, side)) for side in zip(*pairs, strict=True))
    return Update(base, _joined(ups, 1), _joined(downs, 0))


def _joined(parts: tuple[Expression, ...], dim: int) -> Expression:
    return Concat(parts, dim) if len(parts) > 1 else parts[0]


def direction_scale(base: Expression, delta: Expression, adaptation: Adaptation) -> Expression:
    """DoRA's m/‖W+ΔW‖ of a wide ``base``: [out], or [in] where the magnitude is of the inputs."""
    assert adaptation.magnitude is not None
    squares = Power(_channels(Sum(base, delta)), 2.0)
    sums = Einsum(f"oik->{_letter(adaptation)}", (squares,))
    magnitude = Reshape(_wide(adaptation.magnitude), sums.shape)
    return Einsum("c,c->c", (magnitude, Power(sums, -0.5)))


def _along(value: Expression, scale: Expression, adaptation: Adaptation) -> Expression:
    scaled = Einsum(f"oik,{_letter(adaptation)}->oik", (_channels(value), scale))
    return _shaped(scaled, value.shape)


def _letter(adaptation: Adaptation) -> str:
    return "o" if adaptation.magnitude_of == "out" else "i"


def _half(factors: Mapping[str, Expression], number: int, scale: float) -> Expression:
    """One factor of LoHa's Hadamard product."""
    left, right = _wide(factors[f"w{number}_a"]), _wide(factors[f"w{number}_b"])
    if f"t{number}" not in factors:
        return Einsum("or,ri->oi", (_scaled(left, scale), right))
    return Einsum("ijm,jc,io->ocm", (_kernel_flat(factors[f"t{number}"]), right, _scaled(left, scale)))


def _half_shape(factors: Mapping[str, Expression], number: int) -> Matrix:
    left, right = factors[f"w{number}_a"].shape, factors[f"w{number}_b"].shape
    if f"t{number}" not in factors:
        return left[0], right[1]
    return left[1], right[1] * prod(factors[f"t{number}"].shape[2:])


def _outer(factors: Mapping[str, Expression]) -> Expression:
    """The left factor of LoKr's Kronecker product, [a, c]."""
    if "w1" in factors:
        return _wide(factors["w1"])
    return Einsum("ar,rc->ac", (_wide(factors["w1_a"]), _wide(factors["w1_b"])))


def _inner(factors: Mapping[str, Expression]) -> Expression:
    """The right factor, [b, d, k…] or [b, d·k]."""
    if "w2" in factors:
        return _wide(factors["w2"])
    left, right = _wide(factors["w2_a"]), _wide(factors["w2_b"])
    if "t2" not in factors:
        return Einsum("br,rd->bd", (left, right))
    return Einsum("ijm,ib,jd->bdm", (_kernel_flat(factors["t2"]), left, right))


def _kron_shapes(factors: Mapping[str, Expression]) -> tuple[Matrix, Matrix]:
    outer, inner = _outer(factors).shape, _inner(factors).shape
    return (outer[0], outer[1]), (inner[0], prod(inner[1:]))


def _wide(expression: Expression) -> Expression:
    return expression if expression.dtype in (torch.float32, torch.float64) else Cast(expression, torch.float32)


def _scaled(expression: Expression, factor: float) -> Expression:
    return expression if factor == 1.0 else Scale(expression, factor)


def _shaped(expression: Expression, shape: Shape) -> Expression:
    return expression if expression.shape == shape else Reshape(expression, shape)


def _matrix(expression: Expression) -> Expression:
    return _shaped(expression, (expression.shape[0], prod(expression.shape[1:])))


def _channels(expression: Expression) -> Expression:
    """[out, in, all of the kernel]."""
    shape = expression.shape
    return _shaped(expression, (shape[0], shape[1], prod(shape[2:])))


def _kernel_flat(expression: Expression) -> Expression:
    return _channels(_wide(expression))


def _trimmed(shape: Shape) -> Shape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
