"""The power-function profile of an EMA: the paper's equations, one function each.

The paper is Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv 2312.02696; equation numbers are those of its appendix C. Every function takes Python
numbers, NumPy arrays or torch tensors, broadcasts them, and answers in kind: one implementation
serves the CPU and the GPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from posthoc_cli.solver.arrays import Array, FloatArray, namespace

MAX_SIGMA_REL = 12**-0.5
"""The width of the uniform average (gamma = 0); a positive gamma is always narrower."""

MAX_GAMMA = 1e12
MIN_SIGMA_REL = 1 / MAX_GAMMA
"""Such an EMA is the network of its last step, whatever the training; beyond it sums overflow."""


@dataclass(frozen=True, slots=True)
class Average(ABC):
    """Any kind of average of the network; the kinds are in averages.py.

    All that a solver has to know of it is `step`, the training step it was taken at (> 0), and its
    share. `kind` is its word in JSON. `raw`: whether it is a raw checkpoint, plain weights which
    nothing was averaged to. `recursive`: whether it is the state of a running average, so that one
    of a later step holds an earlier one of the same parameters whole, only scaled:
    `G_later(u) = G_later(earlier.step) * G_earlier(u)` up to the earlier one's step.
    """

    kind: ClassVar[str]
    recursive: ClassVar[bool] = True

    step: float

    def __str__(self) -> str:
        """Which one it is, in words, but for its step: `sigma_rel 0.05`."""
        return self.kind

    @property
    def raw(self) -> bool:
        return False

    @abstractmethod
    def share(self, u: FloatArray) -> FloatArray:
        """The share G(u) of its weight before step `u`, elementwise for u >= 0.

        It never falls with `u`, and is 1 from `step` on; G(0) is what lies on the network's start.
        Discretely step k has the weight G(k) - G(k - 1).
        """

    @property
    def breaks(self) -> tuple[float, ...]:
        """Steps before its own where its share has a kink or a jump."""
        return ()

    @property
    def stairs(self) -> tuple[int, int] | None:
        """The first step at which its share may rise, and how many lie from one to the next; None
        where it may at every step."""
        return None

    def between(self, low: FloatArray, high: FloatArray) -> FloatArray:
        """`G(high) - G(low)`, for 0 <= low <= high <= step; more exact where a kind can be."""
        return self.share(high) - self.share(low)

    def as_dict(self) -> dict[str, Any]:
        """As JSON: `{"kind": ..., "step": ..., parameters}`; averages.read_average reads it."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Profile(Average):
    """How a power-function EMA spreads its weight over training time.

    `p(u) = (gamma + 1) u^gamma / step^(gamma + 1)` on `[0, step]` (eq. 121), where `step` is the
    training step the average was taken at (> 0) and `gamma` its exponent (> -1, finite).

    An average that is updated every N steps, `update_every`, holds only the networks of those: its
    share is a staircase, `G(N floor(u / N))` of the smooth one. With `one_step` the updates come
    after steps 1, N + 1, ..., each with the decay of a single step of exponent
    `N (gamma + 1) - 1`, as ema-pytorch's: the product of those is, to 5 in a thousand at the first
    and 1 in ten thousand later, the smooth share at the root mean square of each stair's steps.
    """

    kind: ClassVar[str] = "power"

    gamma: float
    update_every: int = 1
    one_step: bool = False

    def __post_init__(self) -> None:
        if not (self.step > 0 and -1 < self.gamma < math.inf):
            raise ValueError(f"no profile has step {self.step} and gamma {self.gamma}")
        if self.update_every < 1:
            raise ValueError(f"update_every {self.update_every} is out of bounds")

    def __str__(self) -> str:
        every = f", updated every {self.update_every} steps" if self.stairs else ""
        return f"sigma_rel {self.sigma_rel:.6g}{every}"

    @property
    def sigma_rel(self) -> float:
        """Relative width: the standard deviation of the profile over `step` (eq. 123)."""
        return _width(self.gamma)

    def share(self, u: FloatArray) -> FloatArray:
        """The share of the average before step `u`: `(u / step)^(gamma + 1)`, and 1 from `step` on.

        `u` is an array of any shape, u >= 0.
        """
        if self.stairs is None:
            share: FloatArray = np.minimum(u / self.step, 1.0) ** (self.gamma + 1)
            return share
        part = self._smooth_step(u) / (self._smooth_step(self.step) if self.one_step else self.step)
        return np.where(u >= self.step, 1.0, np.minimum(part, 1.0) ** (self.gamma + 1))

    def _smooth_step(self, u: FloatArray | float) -> FloatArray:
        """The step at which the smooth share is what the staircase is at `u`."""
        every = self.update_every
        if self.one_step:
            middle = (np.maximum(u, 1) - 1) // every * every + every / 2 + 1.5
            return np.where(u < 1, 0.0, np.hypot(middle, every / 12**0.5))
        return np.floor_divide(u, every) * every

    @property
    def stairs(self) -> tuple[int, int] | None:
        every = self.update_every
        return None if every == 1 else (1 if self.one_step else every, every)

    @property
    def smooth(self) -> Profile:
        """The same as if it were updated at every step."""
        return self if self.stairs is None else Profile(self.step, self.gamma)

    def between(self, low: FloatArray, high: FloatArray) -> FloatArray:
        if self.stairs is not None:
            return self.share(high) - self.share(low)
        with np.errstate(divide="ignore", under="ignore", invalid="ignore"):
            # Neither powers of large steps nor differences of them: nothing overflows or cancels.
            near, far = np.log1p((low - high) / high), np.log(low / high)
            part = -np.expm1((self.gamma + 1) * np.where(2 * low > high, near, far))
        between: FloatArray = self.share(high) * np.where(high > 0, part, 0.0)
        return between

    def as_dict(self) -> dict[str, Any]:
        told = {"kind": self.kind, "step": self.step, "gamma": self.gamma}
        if self.stairs is not None:
            told |= {"update_every": self.update_every, "one_step": self.one_step}
        return told


@lru_cache(1024)
def _width(gamma: float) -> float:
    """The sigma_rel of a gamma; the one that it is the root of, where that has few digits."""
    sigma_rel = float(gamma_to_sigma_rel(gamma))
    short = float(f"{sigma_rel:.12g}")
    if gamma <= 0 or float(f"{gamma:.12g}") == gamma or not 0 < short < MAX_SIGMA_REL:
        return sigma_rel
    return short if sigma_rel_to_gamma(short) == gamma else sigma_rel


def gamma_to_sigma_rel(gamma: Array) -> Array:
    """Relative width of the profile with exponent `gamma` (eq. 123).

    `sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`. Raises ValueError unless
    gamma > -1 and finite.
    """
    xp, gamma, scalar = _float64(gamma)
    if not bool(xp.all((gamma > -1) & xp.isfinite(gamma))):
        raise ValueError("gamma must be greater than -1 and finite")
    sigma_rel = xp.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)
    return float(sigma_rel) if scalar else sigma_rel


def sigma_rel_to_gamma(sigma_rel: Array) -> Array:
    """Exponent of the profile with relative width `sigma_rel`; inverse of eq. 123.

    The paper takes the root of a cubic in gamma (eq. 126, algorithm 2). With y = 1 / (gamma + 2)
    it reads `sigma_rel = y sqrt((1 - y) / (1 + y))`, monotonic and concave on 0 < y < 1/2, so
    Newton's steps from the left approach the root from one side and cannot leave the interval.
    Exact to 1e-12 over the whole range. Raises ValueError unless 0 < sigma_rel < 12^-0.5.
    """
    xp, sigma_rel, scalar = _float64(sigma_rel)
    if not bool(xp.all((sigma_rel > 0) & (sigma_rel < MAX_SIGMA_REL))):
        raise ValueError("sigma_rel must lie between 0 and 12^-0.5 = 0.2887, both excluded")
    y = sigma_rel  # y >= sigma_rel always, as the square root is below one
    for _ in range(8):  # quadratic convergence; six reach machine precision from the worst start
        root = xp.sqrt((1 - y) / (1 + y))
        slope = root * (1 - y / ((1 - y) * (1 + y)))
        y = y - (y * root - sigma_rel) / slope
    gamma = 1 / y - 2
    return float(gamma) if scalar else gamma


def decay(gamma: Array, step: Array, covered: Array = 1) -> Array:
    """The factor `beta` of an EMA update that ends at `step` and covers `covered` steps.

    `average = beta * average + (1 - beta) * value`, `beta = (1 - covered / step)^(1 + gamma)`
    (eq. 127). `covered == step` gives 0: the first update takes the value itself.
    """
    return (1 - covered / step) ** (1 + gamma)


def norm(step: Array, gamma: Array) -> Array:
    """L2 norm of a profile, `sqrt(integral of p^2)`: the square root of eq. 151 with itself.

    Defined for gamma > -1/2; in units of 1 / sqrt(steps).
    """
    xp = namespace(step, gamma)
    return (gamma + 1) / xp.sqrt((2 * gamma + 1) * step)


def cosine(step_a: Array, gamma_a: Array, step_b: Array, gamma_b: Array) -> Array:
    """Inner product of two profiles over the product of their norms (eq. 151, scaled).

    1 for the same profile, and never outside [0, 1]: nothing in it over- or underflows, whatever
    the steps and exponents (gamma > -1/2). Arguments broadcast.
    """
    xp = namespace(step_a, gamma_a, step_b, gamma_b)
    later_gamma = xp.where(step_a < step_b, gamma_b, gamma_a)
    ratio = xp.minimum(step_a, step_b) / xp.maximum(step_a, step_b)
    overlap = xp.sqrt((2 * gamma_a + 1) * (2 * gamma_b + 1)) / (gamma_a + gamma_b + 1)
    return overlap * ratio ** (later_gamma + 0.5)


def _float64(value: Array) -> tuple[Any, Array, bool]:
    """The namespace of `value`, `value` as a float64 array, and whether it was a plain number."""
    if isinstance(value, (int, float, list, tuple)):
        value = np.asarray(value, dtype=np.float64)
        return np, value, value.ndim == 0
    xp = namespace(value)
    return xp, xp.asarray(value, dtype=xp.float64), False
