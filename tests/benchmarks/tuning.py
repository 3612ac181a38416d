"""How good is the search for the best length? By simulation, against a grid and golden section."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np

from posthoc_cli.tuning.search import Observation, Space, best_point, first_points, suggest

LOW, HIGH = 0.02, 0.25
SPACE = Space(LOW, HIGH)
EVALUATIONS = 14

Curve = Callable[[np.ndarray], np.ndarray]


def bowl(at: float, left: float, right: float, power: float = 2.0) -> Curve:
    """Quadratic around the length `at`, then of the `power`; widths in log to both sides."""

    def curve(t: np.ndarray) -> np.ndarray:
        d = t - math.log(at)
        width = left + (right - left) / (1 + np.exp(-d / 0.15))
        u = d / width
        return (1 + u * u) ** (power / 2) - 1

    return curve


def two_dips(t: np.ndarray) -> np.ndarray:
    a, b = math.log(0.045), math.log(0.14)
    return (
        1
        + 0.25 * (t - a) ** 2
        - np.exp(-(((t - b) / 0.3) ** 2))
        - 0.8 * np.exp(-(((t - a) / 0.25) ** 2))
    )


CURVES: dict[str, Curve] = {
    "EDM2-S": bowl(0.13, 0.9, 0.6, 2.0),
    "EDM2-XXL": bowl(0.07, 0.7, 0.5, 1.6),
    "narrow": bowl(0.09, 0.2, 0.2, 1.0),
    "wide": bowl(0.08, 2.0, 2.0),
    "skewed": bowl(0.15, 1.2, 0.25, 1.5),
    "steep": bowl(0.06, 0.35, 1.0, 3.0),
    "flat bottom": lambda t: np.abs((t - math.log(0.08)) / 1.2) ** 4,
    "two dips": two_dips,
    "edge": bowl(0.35, 1.0, 1.0),
}
NOISES = (0.0, 0.01, 0.03, 0.10)


class Simulated:
    """A curve, moved by up to 0.15 in log, with noise of a fraction of its depth."""

    def __init__(self, curve: Curve, noise: float, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        move = self.random.uniform(-0.15, 0.15)
        self.curve = lambda t: curve(np.asarray(t) - move)
        fine = np.linspace(math.log(LOW), math.log(HIGH), 4001)
        values = self.curve(fine)
        self.depth, self.least = float(np.ptp(values)), float(values.min())
        self.best = fine[values.argmin()]
        self.noise = noise

    def __call__(self, length: float) -> float:
        return float(self.curve(math.log(length))) / self.depth + self.noise * self.random.normal()

    def regret(self, length: float) -> tuple[float, float]:
        value = float(self.curve(math.log(length)))
        return (value - self.least) / self.depth, abs(math.log(length) - self.best)


def by_grid(metric: Simulated) -> float:
    lengths = [length for (length,) in first_points(SPACE, EVALUATIONS)]
    return min(lengths, key=metric)


def by_golden_section(metric: Simulated) -> float:
    low, high = math.log(LOW), math.log(HIGH)
    ratio = (math.sqrt(5) - 1) / 2
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
    return math.exp((low + high) / 2)


def by_search(metric: Simulated) -> float:
    seen = [Observation(point, metric(point[0])) for point in first_points(SPACE)]
    while len(seen) < EVALUATIONS:
        (point,) = suggest(SPACE, seen)
        seen.append(Observation(point, metric(point[0])))
    return best_point(SPACE, seen)[0]


METHODS = {"grid": by_grid, "golden": by_golden_section, "search": by_search}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--curve", default="", help="those with this in their name")
    parser.add_argument("--noise", type=float, nargs="*", default=NOISES)
    asked = parser.parse_args()
    print(f"{'curve':12} noise", *(f"{method:>9}  mean  dist" for method in METHODS), " ratio")
    start = time.monotonic()
    for name, curve in CURVES.items():
        for noise in asked.noise if asked.curve in name else ():
            regrets = {
                method: np.array(
                    [
                        (metric := Simulated(curve, noise, seed)).regret(find(metric))
                        for seed in range(asked.seeds)
                    ]
                )
                for method, find in METHODS.items()
            }
            median = {method: np.median(each, axis=0) for method, each in regrets.items()}
            print(f"{name:12} {noise:5.0%}", end=" ")
            for method, each in regrets.items():
                regret, distance = median[method]
                print(f"{regret:9.3%} {each[:, 0].mean():5.2%} {distance:5.3f}", end=" ")
            print(f"{median['search'][0] / max(median['grid'][0], 1e-9):6.2f}", flush=True)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
