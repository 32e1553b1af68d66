"""Checks of GPTQ's digits that hold on any CPU, because float64 judges each digit given the digits before it.

CPUs add in different orders, so a target within float32 rounding of a border falls on either side of it, and
all later digits of its row follow. Two results of one problem therefore need not have equal digits. What must
hold is:

- A digit is the grid's for its target, or the target lies within the tolerance of that digit's cell. The
  target is computed in float64 from the digits before it, as they were chosen
  (`Replay.assert_digits_follow`).
- Levels are those of the weights as they stand, within the tolerance (`Replay.assert_levels_follow`).
- Each row equals another result's up to the first column where both digits are allowed
  (`Replay.assert_same_up_to_a_border`).

The tolerance is `STANDARD_DEVIATIONS` of the rounding error that a float32 computation of the target has.
With H = Lᵀ C L of width n, D = W - Q and R = D Lᵀ, a Cholesky factorization in float32 factors H + ΔH, whose
ΔH_ij is a sum of n roundings: √n u √(H_ii H_jj), u = 2⁻²⁴ (Higham, Accuracy and Stability, theorem 10.3, with
√n for n as the signs are random: Higham and Mary 2019). To first order the factor then moves by C⁻¹ stril(L⁻ᵀ
ΔH L⁻¹) L, so

    var(target_i) = n u² a_i / C_i² Σ_{k<i} a_k R_k² + u² Σ_{j<i} L_ij² (n D_j² + W_j² + Q_j²) + u² W_i²,
    a = |L⁻ᵀ|² diag(H),

where the values Q may be rounded before they are taken from W, or not (fused multiply-add).

Measured on the golden problems with OpenBLAS' kernels for SkylakeX and Haswell, the error is at most 0.35
standard deviations, and at most 0.16 % of the weights lie within 4 of a border.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

UNIT = 2.0**-24
STANDARD_DEVIATIONS = 4.0
MOST_AT_A_BORDER = 3e-3  # share of an expert's weights that the tolerance may leave undecided


@dataclasses.dataclass(frozen=True)
class Problem:
    """One expert's GPTQ in float64, its columns in the order of quantization.

    Attributes:
        w: weights `[out, in]`.
        lower, curvature: the damped Hessian as lowerᵀ diag(curvature) lower; the identity after a fallback.
        diagonal: of the damped Hessian.
        order: the column of the matrix at each place.
        bits: None for ternary.
        block_size, group_size: of the run; `group_size` None for whole rows.
    """

    w: np.ndarray
    lower: np.ndarray
    curvature: np.ndarray
    diagonal: np.ndarray
    order: np.ndarray
    bits: int | None
    block_size: int
    group_size: int | None

    @classmethod
    def of(
        cls,
        w,
        hessian,
        bits=None,
        *,
        damping=0.1,
        order=None,
        block_size=128,
        group_size=None,
        fallback=False,
    ) -> Problem:
        """Damp and factor a Hessian; `order` None takes the columns as they stand."""
        width = w.shape[1]
        order = np.arange(width) if order is None else np.asarray(order)
        group_size = None if group_size is None or group_size >= width else group_size
        damped = np.eye(width)
        if not fallback:
            damped = np.asarray(hessian, np.float64)
            damped = damped + max(damping * np.diagonal(damped).mean(), 1e-6) * np.eye(width)
        damped = damped[np.ix_(order, order)]
        half = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1].T
        scale = np.diagonal(half)
        return cls(
            np.asarray(w, np.float64)[:, order], half / scale[:, None], scale**2, np.diagonal(damped),
            order, bits, block_size, group_size,
        )  # fmt: skip

    @property
    def group(self) -> np.ndarray:
        """The group of each place in the order."""
        return np.arange(self.w.shape[1]) // (self.group_size or self.w.shape[1])

    def replay(self, digits, levels) -> Replay:
        """Follow the digits `[out, in]` chosen under levels `[out, group, 2]`."""
        levels = np.asarray(levels)
        return Replay(self, np.asarray(digits).astype(int)[:, self.order], levels.astype(np.float64))

    def values(self, digits, levels) -> np.ndarray:
        """The values of digits in the order, under levels `[out, in, 2]` or `[out, 1, 2]`."""
        first, second = levels[..., 0], levels[..., 1]
        if self.bits is None:
            return np.where(digits == 2, second, np.where(digits == 1, first, 0.0))
        return first * (digits - second)

    def excess(self, target, digits, levels) -> np.ndarray:
        """Distance of each target from its digit's cell: positive outside, negative inside."""
        first, second = levels[..., 0], levels[..., 1]
        if self.bits is None:
            low, high = np.where(first < 0, first / 2, -np.inf), np.where(second > 0, second / 2, np.inf)
            begin = np.select([digits == 2, digits == 1], [high, -np.inf], low)
            end = np.select([digits == 2, digits == 1], [np.inf, low], high)
        else:
            top = 2**self.bits - 1
            begin = np.where(digits == 0, -np.inf, first * (digits - second - 0.5))
            end = np.where(digits == top, np.inf, first * (digits - second + 0.5))
        return np.maximum(begin - target, target - end)

    def nearest(self, target, levels) -> np.ndarray:
        """The digit of each target."""
        every = np.arange(3 if self.bits is None else 2**self.bits)
        cells = [self.excess(target, np.full(target.shape, digit), levels) for digit in every]
        return np.argmin(cells, axis=0)


@dataclasses.dataclass(frozen=True)
class Replay:
    """GPTQ's rule in float64 for every digit given those before it; columns in the order."""

    problem: Problem
    digits: np.ndarray
    levels: np.ndarray

    @functools.cached_property
    def column_levels(self) -> np.ndarray:
        """The levels of every column, `[out, in, 2]`."""
        return self.levels[:, self.problem.group]

    @functools.cached_property
    def value(self) -> np.ndarray:
        """The value of every digit."""
        return self.problem.values(self.digits, self.column_levels)

    @functools.cached_property
    def deviation(self) -> np.ndarray:
        """Weights less values."""
        return self.problem.w - self.value

    @functools.cached_property
    def deviation_variance(self) -> np.ndarray:
        """Variance of the deviations in float32, in u²; values may be rounded before the subtraction."""
        return self.problem.w**2 + self.value**2

    @functools.cached_property
    def target(self) -> np.ndarray:
        """The weights moved by the error feedback of the columns before."""
        return self.problem.w + self.deviation @ np.tril(self.problem.lower, -1).T

    @functools.cached_property
    def row_error(self) -> np.ndarray:
        """½ D H Dᵀ of each row, H damped."""
        return 0.5 * (self.target - self.value) ** 2 @ self.problem.curvature

    def residual_std(self, residual: np.ndarray) -> np.ndarray:
        """Standard deviation of (ΔL D)_i for L D = `residual` `[out, in]`: the factor's rounding."""
        p, width = self.problem, self.problem.w.shape[1]
        gain = (np.linalg.inv(p.lower).T ** 2) @ p.diagonal
        before = np.cumsum(gain * residual**2, axis=1) - gain * residual**2
        return UNIT * np.sqrt(width * gain * np.maximum(before, 0)) / p.curvature

    @functools.cached_property
    def target_std(self) -> np.ndarray:
        """Standard deviation of a float32 target, with that of comparing it to a border."""
        p, deviation = self.problem, self.deviation
        factor = self.residual_std(self.target - self.value)
        terms = p.w.shape[1] * deviation**2 + self.deviation_variance
        sums = terms @ np.tril(p.lower, -1).T ** 2
        comparing = p.w**2 + self.target**2 + (self.column_levels**2).sum(-1)
        return np.sqrt(factor**2 + UNIT**2 * (sums + comparing))

    @functools.cached_property
    def tolerance(self) -> np.ndarray:
        """Distance that the target of a digit may lie outside its cell."""
        return STANDARD_DEVIATIONS * self.target_std

    @functools.cached_property
    def excess(self) -> np.ndarray:
        """See `Problem.excess`."""
        return self.problem.excess(self.target, self.digits, self.column_levels)

    @functools.cached_property
    def at_a_border(self) -> np.ndarray:
        """True where the tolerance leaves the digit undecided between values that differ by more than it."""
        first, second = np.moveaxis(self.column_levels, -1, 0)
        apart = first if self.problem.bits is not None else (second - first) / 2
        return (np.abs(self.excess) <= self.tolerance) & (apart > 2 * self.tolerance)

    def assert_digits_follow(self) -> None:
        """Check every digit, and that the tolerance leaves few of them undecided."""
        over = self.excess - self.tolerance
        if (over > 0).any():
            row, place = np.unravel_index(np.argmax(over), over.shape)
            raise AssertionError(
                f"{(over > 0).sum()} digits do not follow from those before them; the worst is "
                f"{self.digits[row, place]} in row {row}, column {self.problem.order[place]}: its target "
                f"{self.target[row, place]:.6g} lies {self.excess[row, place]:.2g} outside its cell, allowed "
                f"are {self.tolerance[row, place]:.2g}"
            )
        assert self.at_a_border.mean() <= max(MOST_AT_A_BORDER, 3 / over.size)

    @functools.cached_property
    def standing(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights from which each group's levels are found, at the start of the block where the group begins.

        They stand where they make up in full for all columns before, so that R = 0 from there on.

        Returns:
            The weights `[out, in]` and the standard deviations of their float32 rounding.
        """
        p = self.problem
        weights, std = p.w.copy(), UNIT * np.abs(p.w)
        size = p.group_size or p.w.shape[1]
        for first in range(0, p.w.shape[1], size):
            start, members = first // p.block_size * p.block_size, slice(first, first + size)
            if start == 0:
                continue
            rest = np.linalg.inv(p.lower[start:, start:])
            done = self.deviation[:, :start]
            moved = p.w[:, start:] + done @ p.lower[start:, :start].T @ rest.T
            residual = np.concatenate([done @ p.lower[:start, :start].T, np.zeros_like(moved)], 1)
            sums = p.w.shape[1] * UNIT**2 * (done**2 @ p.lower[start:, :start].T ** 2 + moved**2)
            variance = (self.residual_std(residual)[:, start:] ** 2 + sums) @ rest.T**2
            feedback = rest @ p.lower[start:, :start]
            variance += UNIT**2 * self.deviation_variance[:, :start] @ feedback.T**2
            inside = slice(first - start, first - start + size)
            weights[:, members], std[:, members] = moved[:, inside], np.sqrt(variance[:, inside])
        return weights, std

    @functools.cached_property
    def expected_levels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Levels in float64 `[out, group, 2]`, their tolerance, and where they are undecided `[out, group]`.

        A zero point is undecided at a border of its own, and so is whether weights near zero are zero:
        rows of zeros have the levels of weights from -1 to 1.
        """
        p, (weights, std) = self.problem, self.standing
        groups = p.group.max() + 1
        size = p.group_size or p.w.shape[1]
        parts = [slice(g * size, (g + 1) * size) for g in range(groups)]
        low = np.stack([np.minimum(weights[:, s].min(1), 0) for s in parts], 1)
        high = np.stack([np.maximum(weights[:, s].max(1), 0) for s in parts], 1)
        empty = (low == 0) & (high == 0)
        low, high = np.where(empty, -1, low), np.where(empty, 1, high)
        off = np.stack([std[:, s].max(1) for s in parts], 1)
        off = STANDARD_DEVIATIONS * np.maximum(off, UNIT * np.maximum(high, -low))
        nothing = np.maximum(high, -low) <= off
        if p.bits is None:
            return np.stack([low, high], -1), off, nothing
        step = (high - low) / (2**p.bits - 1)
        zero = -low / step
        undecided = np.abs(zero - np.floor(zero) - 0.5) <= 6 * off / step
        return np.stack([step, np.round(zero)], -1), off, undecided | nothing

    def assert_levels_follow(self) -> None:
        """Check the levels: those of whole rows bit by bit, those of groups within their tolerance."""
        p = self.problem
        wanted, off, undecided = self.expected_levels
        if p.group_size is None:
            low, high = (np.float32(x) for x in (np.minimum(p.w.min(1), 0), np.maximum(p.w.max(1), 0)))
            empty = (low == 0) & (high == 0)
            low, high = np.where(empty, np.float32(-1), low), np.where(empty, np.float32(1), high)
            if p.bits is not None:
                step = (high - low) / np.float32(2**p.bits - 1)
                low, high = step, np.round(-low / step)
            np.testing.assert_array_equal(self.levels[:, 0], np.stack([low, high], -1))
            return
        zeros = np.float32([-1, 1])
        if p.bits is not None:
            step = np.float32(2) / np.float32(2**p.bits - 1)
            zeros = np.array([step, np.round(np.float32(1) / step)])
        as_zeros = undecided & (self.levels == zeros).all(-1)
        distance = np.abs(self.levels - wanted)
        allowed = np.stack([off, off if p.bits is None else undecided * 1.0], -1)
        assert ((distance <= allowed) | as_zeros[..., None]).all()

    def assert_same_up_to_a_border(self, digits, places: int | None = None) -> float:
        """Check that each row of another result's digits `[out, in]` equals this one up to a border.

        The other result is a float32 computation too, and found its own levels: it may be off as far again.

        Args:
            digits: of the other result, under the same levels, or levels equal but for rounding.
            places: compare only so many columns, the first in the order of quantization.

        Returns:
            The share of equal digits.
        """
        other = np.asarray(digits).astype(int)[:, self.problem.order][:, :places]
        different = other != self.digits[:, :places]
        if not different.any():
            return 1.0
        first = different.argmax(1)
        rows = np.flatnonzero(different.any(1))
        excess = self.problem.excess(self.target[:, :places], other, self.column_levels[:, :places])[
            rows, first[rows]
        ]
        over = excess - self.shared_tolerance[rows, first[rows]]
        if (over > 0).any():
            worst = np.argmax(over)
            row, place = rows[worst], first[rows[worst]]
            raise AssertionError(
                f"{(over > 0).sum()} rows differ elsewhere than at a border; the worst is row {row}, column "
                f"{self.problem.order[place]}: digits {self.digits[row, place]} and {other[row, place]}, "
                f"with a target {excess[worst]:.2g} outside the second's cell, allowed are "
                f"{self.shared_tolerance[row, place]:.2g}"
            )
        return 1 - float(different.mean())

    @functools.cached_property
    def level_tolerance(self) -> np.ndarray:
        """Distance of a border or value in two float32 results with the same digits before, `[out, in]`."""
        if self.problem.group_size is None:
            return np.zeros_like(self.problem.w)
        _, off, undecided = self.expected_levels
        return np.where(undecided, np.inf, 4 * off)[:, self.problem.group]

    @functools.cached_property
    def shared_tolerance(self) -> np.ndarray:
        """Distance that a target may lie outside another result's cell, all digits before being equal."""
        return 2 * self.tolerance + self.level_tolerance

    def before_a_difference(self, digits) -> np.ndarray:
        """True while a row of another result's digits is still equal, `[out, in]` in the order."""
        other = np.asarray(digits).astype(int)[:, self.problem.order]
        return np.cumsum(other != self.digits, axis=1) == 0


def determined_places(hessian: np.ndarray, order: np.ndarray | None) -> int:
    """Return the number of leading columns of an activation order before the first tie."""
    if order is None:
        return len(hessian)
    diagonal = np.diagonal(hessian)[order]
    assert not (diagonal[1:] > diagonal[:-1]).any()  # a NaN is neither
    ties = np.flatnonzero(diagonal[1:] == diagonal[:-1])
    return int(ties[0]) if len(ties) else len(diagonal)
