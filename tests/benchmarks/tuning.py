"""How good the search for the best length is, by simulation: against a grid and golden section.

    python tests/benchmarks/tuning.py [--seeds 200] [--curve NAME] [--noise 0.03 ...] [--scikit]

Each simulated metric is a curve over sigma_rel from 0.02 to 0.25, moved at random by up to 0.15 in
log, so that no method's lengths are lucky, with normal noise of a part of its depth: the difference
between its most and its least in the range. Each method has 14 evaluations and names one length.
The regret is by how much the curve there is above its least, in parts of its depth; the distance is
in log from the true best. `in` says how often the search's interval of 90 % holds the true best.

--scikit also runs what one would write with scikit-learn (pip install scikit-learn): a Matern
kernel with noise, its parameters those that are most likely, and expected improvement. It takes ten
times longer.

Exits with 1 where the search's median regret isn't below half of the grid's; without noise, where
it is above the grid's.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import numpy.typing as npt

from posthoc_cli.tuning.search import Observation, Space, first_points, posterior, suggest

FloatArray = npt.NDArray[np.float64]
Curve = Callable[[FloatArray], FloatArray]

SPACE = Space(0.02, 0.25)
LOW, HIGH = math.log(SPACE.low), math.log(SPACE.high)
EVALUATIONS = 14
NOISES = (0.0, 0.01, 0.03, 0.10)
NOTHING = 1e-6
"""A regret that is none: on the edge of the range only by rounding."""


def bowl(at: float, left: float, right: float, power: float = 2.0) -> Curve:
    """Least at `at`; a square near it, the `power` far from it; widths in log to both sides."""

    def curve(t: FloatArray) -> FloatArray:
        away = t - math.log(at)
        width = left + (right - left) / (1 + np.exp(-away / 0.15))
        return (1 + (away / width) ** 2) ** (power / 2) - 1

    return curve


def two_dips(t: FloatArray) -> FloatArray:
    """The dip at 0.14 is deeper than that at 0.045."""
    first = 0.8 * np.exp(-(((t - math.log(0.045)) / 0.25) ** 2))
    second = np.exp(-(((t - math.log(0.14)) / 0.3) ** 2))
    return 1 + 0.25 * (t - math.log(0.045)) ** 2 - first - second


def flat_bottom(t: FloatArray) -> FloatArray:
    return ((t - math.log(0.08)) / 1.2) ** 4


CURVES: dict[str, Curve] = {
    # FID of EDM2's networks over the EMA length falls to about 0.13 for the smallest and 0.07 for
    # the largest, and rises faster behind than before (arXiv 2312.02696, figures 5 and 6).
    "EDM2-S": bowl(0.13, 0.9, 0.6, 2.0),
    "EDM2-XXL": bowl(0.07, 0.7, 0.5, 1.6),
    "narrow": bowl(0.09, 0.2, 0.2, 1.0),
    "wide": bowl(0.08, 2.0, 2.0),
    "skewed": bowl(0.15, 1.2, 0.25, 1.5),
    # Far too short an average makes noise of the images: all of the depth is there.
    "steep": bowl(0.06, 0.35, 1.0, 3.0),
    "flat bottom": flat_bottom,
    "two dips": two_dips,
    "edge": bowl(0.35, 1.0, 1.0),
}


class Metric:
    """A simulated metric, of a curve whose depth is 1."""

    def __init__(self, curve: Curve, noise: float, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        move = self.random.uniform(-0.15, 0.15)
        fine = np.linspace(LOW, HIGH, 4001)
        values = curve(fine - move)
        self.curve = lambda t: (float(curve(np.array(t - move))) - values.min()) / np.ptp(values)
        self.best, self.noise = float(fine[values.argmin()]), noise

    def __call__(self, length: float) -> float:
        return float(self.curve(math.log(length)) + self.noise * self.random.normal())

    def regret(self, length: float) -> tuple[float, float]:
        return self.curve(math.log(length)), abs(math.log(length) - self.best)


Found = tuple[float, float, float]
"""The length that a method names, and the ends of an interval; NaN for those that have none."""


def by_grid(metric: Metric) -> Found:
    lengths = [length for (length,) in first_points(SPACE, EVALUATIONS)]
    return min(lengths, key=metric), math.nan, math.nan


def by_golden_section(metric: Metric) -> Found:
    ratio = (math.sqrt(5) - 1) / 2
    low, high = LOW, HIGH
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = metric(math.exp(a)), metric(math.exp(b))
    for _ in range(EVALUATIONS - 2):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = metric(math.exp(a))
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = metric(math.exp(b))
    return math.exp((low + high) / 2), math.nan, math.nan


def by_search(metric: Metric) -> Found:
    seen = [Observation(point, metric(point[0])) for point in first_points(SPACE)]
    while len(seen) < EVALUATIONS:
        (point,) = suggest(SPACE, seen)
        seen.append(Observation(point, metric(point[0])))
    known = posterior(SPACE, seen)
    return known.best[0], *known.interval


def by_scikit(metric: Metric) -> Found:
    from scipy.stats import norm
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel() * Matern(0.5, (0.05, 5.0), nu=2.5) + WhiteKernel(0.01, (1e-8, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2)
    grid = np.linspace(0.0, 1.0, 65)
    lengths = SPACE.low * (SPACE.high / SPACE.low) ** grid
    x = list(np.linspace(0.0, 1.0, 7))
    y = [metric(length) for (length,) in first_points(SPACE)]
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            process.fit(np.array(x)[:, None], y)
        mean, deviation = process.predict(grid[:, None], return_std=True)
        if len(x) == EVALUATIONS:
            return float(lengths[mean.argmin()]), math.nan, math.nan
        z = (mean.min() - mean) / np.maximum(deviation, 1e-12)
        at = int((deviation * (z * norm.cdf(z) + norm.pdf(z))).argmax())
        x.append(grid[at])
        y.append(metric(float(lengths[at])))


METHODS = {"grid": by_grid, "golden": by_golden_section, "search": by_search, "scikit": by_scikit}


def measure(method: str, name: str, noise: float, seeds: range) -> FloatArray:
    """Regret, distance and whether the interval holds the best, of each seed: [seeds, 3]."""
    rows = []
    for seed in seeds:
        metric = Metric(CURVES[name], noise, seed)
        length, low, high = METHODS[method](metric)
        holds = math.log(low) - 1e-3 <= metric.best <= math.log(high) + 1e-3
        rows.append((*metric.regret(length), holds))
    return np.array(rows, dtype=np.float64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--curve", default="", help="those with this in their name")
    parser.add_argument("--noise", type=float, nargs="*", default=NOISES)
    parser.add_argument("--scikit", action="store_true")
    asked = parser.parse_args()
    methods = [method for method in METHODS if asked.scikit or method != "scikit"]
    print("median regret and, in brackets, the median distance in log")
    print(f"{'curve':12} noise", *(f"{method:>16}" for method in methods), "search/grid   in")
    start, good = time.monotonic(), True
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        cases = [(name, noise) for name in CURVES if asked.curve in name for noise in asked.noise]
        chunks = [range(at, min(at + 20, asked.seeds)) for at in range(0, asked.seeds, 20)]
        running = {
            (case, method): [
                pool.submit(functools.partial(measure, method, *case, chunk)) for chunk in chunks
            ]
            for case in cases
            for method in methods
        }
        for case in cases:
            name, noise = case
            print(f"{name:12} {noise:5.0%}", end=" ")
            medians, inside = {}, {}
            for method in methods:
                rows = np.concatenate([each.result() for each in running[case, method]])
                medians[method], distance, _ = np.median(rows, axis=0)
                print(f"{medians[method]:8.3%} ({distance:5.3f})", end=" ")
                inside[method] = rows[:, 2].mean()
            few = medians["grid"] * (0.5 if noise else 1.0) + NOTHING
            fine = medians["search"] <= few
            ratio = medians["search"] / max(medians["grid"], NOTHING)
            print(f"{ratio:11.2f} {inside['search']:4.0%}{'' if fine else '  short'}", flush=True)
            good &= bool(fine)
    print(f"{time.monotonic() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
