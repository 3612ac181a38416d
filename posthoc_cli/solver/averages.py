"""The kinds of averages besides the power function: fixed and scheduled decays, windows.

Each is a small frozen dataclass that says its share `G(u)`, as profiles.Average has it. Discretely
step k has the weight `G(k) - G(k - 1)`, and what lies on the network's start is `G(0)`. As JSON an
average is `{"kind": ..., "step": ..., parameters}`: `as_dict` and `read_average`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from posthoc_cli.solver.arrays import FloatArray
from posthoc_cli.solver.profiles import Average, Profile


@dataclass(frozen=True, slots=True)
class Decay(Average):
    """An EMA of fixed decay: `average = beta * average + (1 - beta) * network` at each step.

    `G(u) = beta^(step - u)`: `beta^step` of it is still the network's start. A raw checkpoint,
    plain weights which nothing was averaged to, is `Decay(step, 0.0)`.
    """

    kind: ClassVar[str] = "decay"

    beta: float

    def __post_init__(self) -> None:
        _check(self.step > 0, "step", self.step)
        _check(0 <= self.beta < 1, "beta", self.beta)

    def __str__(self) -> str:
        return "raw" if self.raw else f"decay {self.beta:.12g}"

    @property
    def raw(self) -> bool:
        return self.beta == 0

    def share(self, u: FloatArray) -> FloatArray:
        share: FloatArray = np.power(self.beta, self.step - np.minimum(u, self.step))
        return share

    def between(self, low: FloatArray, high: FloatArray) -> FloatArray:
        if self.raw:
            return self.share(high) - self.share(low)
        between: FloatArray = self.share(high) * -np.expm1(np.log(self.beta) * (high - low))
        return between


@dataclass(frozen=True, slots=True)
class Window(Average):
    """The mean of the last `length` steps: `G(u) = x = (u - step + length) / length`, 0 before."""

    kind: ClassVar[str] = "window"
    recursive: ClassVar[bool] = False

    length: float

    def __post_init__(self) -> None:
        _check(self.step > 0, "step", self.step)
        _check(0 < self.length <= self.step, "length", self.length)

    @property
    def breaks(self) -> tuple[float, ...]:
        return (self.step - self.length,)

    def share(self, u: FloatArray) -> FloatArray:
        return _into(self, u)

    def between(self, low: FloatArray, high: FloatArray) -> FloatArray:
        between: FloatArray = (high - np.clip(low, self.step - self.length, high)) / self.length
        return between


def _into(average: Window | LrDecay, u: FloatArray) -> FloatArray:
    """How far into its last `length` steps, from 0 to 1; exactly 1 at its step."""
    into = np.clip((u - (average.step - average.length)) / average.length, 0.0, 1.0)
    return np.where(u >= average.step, 1.0, into)


SHAPES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "linear": lambda x: x,
    "1-sqrt": np.sqrt,
    "cosine": lambda x: np.sin(np.pi / 2 * x) ** 2,
}
"""Shapes of a learning rate's decay, by name: `1 - w(x)`, x from 0 to 1.

`w` is what the rate is multiplied with: `1 - x`, `1 - sqrt(x)`, `(1 + cos(pi x)) / 2`.
"""


@dataclass(frozen=True, slots=True)
class LrDecay(Average):
    """What a decay of the learning rate over the last `length` steps would have led to.

    A step at x of it would have been taken with `w(x)` of its rate, and as much of it is in the
    average: `G(u) = 1 - w(x)`, `x = (u - step + length) / length`. `shape` is one of SHAPES.
    """

    kind: ClassVar[str] = "lr-decay"
    recursive: ClassVar[bool] = False

    shape: str
    length: float

    def __post_init__(self) -> None:
        _check(self.step > 0, "step", self.step)
        _check(self.shape in SHAPES, "shape", self.shape)
        _check(0 < self.length <= self.step, "length", self.length)

    @property
    def breaks(self) -> tuple[float, ...]:
        return (self.step - self.length,)

    def share(self, u: FloatArray) -> FloatArray:
        return SHAPES[self.shape](_into(self, u))


@dataclass(frozen=True, slots=True)
class Schedule:
    """A decay that changes with the step, as diffusers' EMAModel has it; its names and defaults.

    Up to step `update_after_step + 1` the decay is 0: the average is the network. With s the steps
    since, it is `1 - (1 + s / inv_gamma)^-power` with `use_ema_warmup`, else `(1 + s) / (10 + s)`;
    then at most `decay`, and at least `min_decay`. ema-pytorch's and timm's are the former.
    """

    decay: float = 0.9999
    inv_gamma: float = 1.0
    power: float = 2 / 3
    use_ema_warmup: bool = False
    update_after_step: int = 0
    min_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("decay", "min_decay"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name))
        for name in ("inv_gamma", "power"):
            _check(0 < getattr(self, name) < math.inf, name, getattr(self, name))
        _check(0 <= self.update_after_step < math.inf, "update_after_step", self.update_after_step)

    def at(self, s: FloatArray) -> FloatArray:
        """The decay `s` > 0 steps after the first that is averaged, before its bounds."""
        if not self.use_ema_warmup:
            return (1 + s) / (10 + s)
        decay: FloatArray = -np.expm1(-self.power * np.log1p(s / self.inv_gamma))
        return decay

    def reaches(self, decay: float) -> float:
        """The last whole s whose decay, before its bounds, is at most `decay`; 0 for none."""
        if not self.use_ema_warmup:
            s = (10 * decay - 1) / (1 - decay)
        else:
            with np.errstate(over="ignore"):
                s = self.inv_gamma * float(np.expm1(-np.log1p(-decay) / self.power))
        return float(np.floor(min(max(s, 0.0), _LONGEST)))

    def logarithm(self, s: FloatArray) -> FloatArray:
        """The sum of the decays' logarithms from 1 to `s` >= 0; smooth between whole numbers."""
        low, high, nodes, sums, slopes = _cumulated(self)
        total = np.minimum(s, low) * (math.log(self.min_decay) if low else 0.0)
        if high > low:
            within = np.clip(s, low, high)
            at = np.clip(np.searchsorted(nodes, within, side="right") - 1, 0, len(nodes) - 2)
            width = nodes[at + 1] - nodes[at]
            x = (within - nodes[at]) / width
            # Hermite's cubic: the sums at both ends, and the slopes.
            rise = sums[at + 1] - sums[at]
            first, last = slopes[at] * width - rise, rise - slopes[at + 1] * width
            total = total + sums[at] + rise * x + x * (1 - x) * (first * (1 - x) + last * x)
        last_decay = max(self.decay, self.min_decay)
        if high < _LONGEST:
            total = total + np.maximum(s - high, 0.0) * math.log(last_decay or 1e-300)
        return total


_LONGEST = 2.0**53
_EXACT = 4096
"""So many steps are summed one by one; after them by Euler and Maclaurin's formula."""

_FINENESS = 1.0005
"""The ratio of one node to the next: a cubic between them is then exact to about 1e-12."""


@lru_cache(64)
def _cumulated(schedule: Schedule) -> tuple[float, float, FloatArray, FloatArray, FloatArray]:
    """From where to where a schedule's decay rises, and there the sums of logarithms at nodes.

    Up to `low` it is `min_decay`, after `high` it is at its highest. The sums [nodes] are those
    after `low`, the slopes [nodes] their derivatives.
    """
    if 0 < schedule.min_decay >= schedule.decay:
        return _LONGEST, _LONGEST, *(np.zeros(0),) * 3
    low = schedule.reaches(schedule.min_decay) if schedule.min_decay else 0.0
    high = schedule.reaches(schedule.decay)
    if high <= low:
        return low, low, *(np.zeros(0),) * 3
    count = math.ceil(math.log(_LONGEST / _EXACT) / math.log(_FINENESS))
    far = np.rint(np.geomspace(_EXACT, _LONGEST, count))
    nodes = np.unique(np.clip(np.concatenate([np.arange(_EXACT), far]), low, high))
    half = np.diff(nodes) / 2
    points, weights = np.polynomial.legendre.leggauss(6)
    middle = nodes[:-1] + half + 0.5  # sums over whole steps reach half a step to either side
    values = np.log(schedule.at(middle[:, None] + half[:, None] * points))
    around = np.log(
        schedule.at(np.maximum(nodes, 1)[:, None] + np.array([-0.5, 0.0, 0.5, 1.0, 1.5]))
    )
    panels = half * (values @ weights) - np.diff(around[:, 3] - around[:, 1]) / 24
    single = half == 0.5
    panels[single] = np.log(schedule.at(nodes[1:][single]))
    sums = np.concatenate([[0.0], np.cumsum(panels)])
    slopes = around[:, 2] - (around[:, 4] - 2 * around[:, 2] + around[:, 0]) / 24
    slopes[nodes == 0] = np.log(schedule.at(np.array(0.5)))
    return low, high, nodes, sums, slopes


@dataclass(frozen=True, slots=True)
class Scheduled(Average):
    """An EMA whose decay follows a schedule: `G(k)` is the product of the decays after step k."""

    kind: ClassVar[str] = "scheduled"

    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        _check(self.step > 0, "step", self.step)

    def __str__(self) -> str:
        return f"decay up to {max(self.schedule.decay, self.schedule.min_decay):.12g}"

    @property
    def breaks(self) -> tuple[float, ...]:
        first = self.schedule.update_after_step + 1
        low, high, *_ = _cumulated(self.schedule)
        return tuple(at for at in (first - 1, first, first + low, first + high) if at < self.step)

    def share(self, u: FloatArray) -> FloatArray:
        u = np.asarray(u, np.float64)
        first = self.schedule.update_after_step + 1
        whole = self.schedule.logarithm(np.maximum(self.step - first, 0.0))
        after = whole - self.schedule.logarithm(np.clip(u - first, 0.0, None))
        share = np.where(u < first, 0.0, np.exp(np.minimum(after, 0.0)))
        return np.where(u >= self.step, 1.0, share)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, **asdict(self.schedule)}


KINDS: dict[str, type[Average]] = {
    each.kind: each for each in (Profile, Decay, Window, LrDecay, Scheduled)
}
"""All kinds of averages, by the word that JSON has for them."""


def read_average(document: Mapping[str, Any]) -> Average:
    """The average that `as_dict` told; raises ValueError where the document makes no sense."""
    kind = KINDS.get(document["kind"]) if isinstance(document.get("kind"), str) else None
    if kind is None:
        raise ValueError(f"{document.get('kind')!r} is no kind of average: {', '.join(KINDS)}")
    step = _value(document, "step", "float")
    if kind is Scheduled:
        told = {each.name: each for each in fields(Schedule) if each.name in document}
        values = {name: _value(document, name, each.type) for name, each in told.items()}
        return Scheduled(step, Schedule(**values))
    own = [each for each in fields(kind) if each.name != "step"]
    own = [each for each in own if each.name in document or each.default is MISSING]
    return kind(step, **{each.name: _value(document, each.name, each.type) for each in own})


def _value(document: Mapping[str, Any], name: str, type_: Any) -> Any:
    value: Any = document.get(name)
    wanted: Any = {"float": (int, float), "int": int, "bool": bool, "str": str}[type_]
    if not isinstance(value, wanted) or isinstance(value, bool) != (type_ == "bool"):
        raise ValueError(f"its {name} is no {'word' if type_ == 'str' else 'number'}")
    if type_ == "float":
        _check(abs(value) < 1e300, name, value)
        return float(value)
    return value


def _check(good: bool, name: str, value: object) -> None:
    if not good:
        raise ValueError(f"{name} {value} is out of bounds")
