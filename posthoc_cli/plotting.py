"""Pictures of a solve: what was wanted, what the weights give, the weights; and of a search."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import UsageError
from posthoc_cli.solver import Average, Profile
from posthoc_cli.tuning.search import SPREAD, Posterior

FloatArray = npt.NDArray[np.float64]

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which all kinds of eyes can tell apart.
_METHODS = {"algorithm3": "#009E73", "edm2": "#0072B2", "share": "#0072B2", "blup": "#D55E00"}
_WIDTHS = ("#56B4E9", "#E69F00", "#CC79A7", "#000000", "#F0E442")
_TOGETHER = 64
"""Snapshots whose curves are held at a time."""

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "posthoc",
}


def check_matplotlib() -> None:
    """Raise UsageError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "posthoc plot", "matplotlib is not installed", "pip install 'posthoc-cli[plot]'"
        )


def density(profile: Average, at: FloatArray) -> FloatArray:
    """`p(u)` of a profile at the steps `at` > 0 (eq. 121); of other kinds what a step weighs."""
    inside = at <= profile.step
    if not isinstance(profile, Profile):
        high = np.minimum(at, profile.step)
        low = np.maximum(high - 1, 0)
        return np.where(inside, profile.between(low, high) / np.maximum(high - low, 1e-9), 0.0)
    share = np.where(inside, at / profile.step, 1.0)
    value: FloatArray = np.where(
        inside, (profile.gamma + 1) / profile.step * share**profile.gamma, 0.0
    )
    return value


def draw(
    snapshots: Sequence[Average],
    targets: Sequence[Average],
    titles: Sequence[str],
    weights: Mapping[str, FloatArray],
    shown: str,
    ending: str,
) -> bytes:
    """Draw a column for each target; returns the file, PNG, SVG or PDF as its `ending` says.

    The density of raw checkpoints is a spike at each: of them the share before each step is drawn.
    `weights` maps each method to its weights [targets, snapshots]; the stems are those of the
    method `shown`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        columns = len(targets)
        figure = Figure(figsize=(max(1.2 + 2.7 * columns, 4.6), 5.4), layout="constrained")
        axes = figure.subplots(
            3, columns, sharex="col", squeeze=False, gridspec_kw={"height_ratios": [3, 1.4, 1.8]}
        )
        for at, (target, title) in enumerate(zip(targets, titles, strict=True)):
            given = {method: each[at] for method, each in weights.items()}
            _draw_profiles(axes[0, at], axes[1, at], snapshots, target, given)
            _draw_weights(axes[2, at], snapshots, given[shown])
            axes[0, at].set_title(title)
            axes[2, at].set_xlabel("training step")
        raw = any(each.raw for each in snapshots)
        axes[0, 0].set_ylabel(
            "share of the EMA before t" if raw else "profile, p(t) \N{MULTIPLICATION SIGN} T"
        )
        axes[1, 0].set_ylabel("given \N{MINUS SIGN} wanted")
        axes[2, 0].set_ylabel(f"weights ({shown})")
        axes[0, 0].legend(loc="upper left", handlelength=1.6, borderaxespad=0.2)
        if not all(each.raw for each in snapshots):
            powers = all(isinstance(each, Profile) for each in snapshots)
            symbol = r"$\sigma_{\mathrm{rel}}$" if powers else None
            axes[2, 0].legend(loc="upper left", handlelength=1.0, borderaxespad=0.2, title=symbol)
        figure.align_ylabels(axes[:, 0])
        return _file(figure, ending)


def _file(figure: Any, ending: str) -> bytes:
    """The bytes of the figure's file, the same at every call."""
    # The date would make every run's file another one.
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(ending)
    picture = io.BytesIO()
    figure.savefig(picture, format=ending[1:], dpi=200, metadata=metadata)
    return picture.getvalue()


def draw_search(
    known: Posterior, sign: float, label: str, name: Callable[[float], str], ending: str
) -> bytes:
    """Draw the samples of a search, the curve through them with its band, and the best.

    `label` is of the lengths, `name` writes one. The values are `sign` times those of `known`. With
    steps the curve is that of the best's step, and the samples of other steps are pale.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    space, (best, *step) = known.space, known.best
    lengths = np.geomspace(space.low, space.high, 400)
    mean, deviation = known.curve([(float(length), *step) for length in lengths])
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axis = figure.add_subplot()
        blue, orange = _METHODS["edm2"], _METHODS["blup"]
        band = SPREAD * deviation
        axis.fill_between(
            lengths, sign * (mean - band), sign * (mean + band), color=blue, alpha=0.15, linewidth=0
        )
        axis.plot(lengths, sign * mean, color=blue, linewidth=1.2, label="curve, 90%")
        low, high = known.interval
        axis.axvspan(low, high, color=orange, alpha=0.12, linewidth=0)
        axis.axvline(best, color=orange, linewidth=0.8, label="best, 90%")
        axis.plot([best], [sign * known.value], "D", color=orange, markersize=4)
        for here, alpha, text in ((True, 1.0, "measured"), (False, 0.3, "at other steps")):
            some = [each for each in known.observations if (list(each.point[1:]) == step) is here]
            x, y = [each.point[0] for each in some], [sign * each.value for each in some]
            if some:
                axis.plot(x, y, "o", color="0.1", alpha=alpha, markersize=3.2, label=text)
        values = np.array([sign * each.value for each in known.observations])
        if values.min() > 0 and values.max() > 10 * values.min():
            axis.set_yscale("log")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        less, more = sorted(sign * each for each in known.value_interval)
        when = f" at step {step[0]:.0f}" if step else ""
        axis.set_title(
            f"best {name(best)} ({name(low)} to {name(high)}){when}\n"
            f"metric {sign * known.value:.4g} ({less:.4g} to {more:.4g})"
        )
        axis.set_xlabel(label)
        axis.set_ylabel("metric")
        axis.legend(loc="best", handlelength=1.6)
        return _file(figure, ending)


def _draw_profiles(
    above: Any,
    below: Any,
    snapshots: Sequence[Average],
    target: Average,
    weights: Mapping[str, FloatArray],
) -> None:
    """The profile that is wanted and those that are given; their differences below."""
    steps = sorted({float(each.step) for each in snapshots if each.step <= target.step})
    # Densities jump where a snapshot ends: points on both sides of it, and many between.
    edges = np.unique([0.0, *steps, *target.breaks, float(target.step)])
    fine = max(400 // len(edges), 8)
    at = np.concatenate(
        [
            np.append(high * 1e-9 + low, np.linspace(low, high, fine + 1)[1:])
            for low, high in pairwise(edges.tolist())
        ]
    )
    raw = any(each.raw for each in snapshots)

    def curve(average: Average) -> FloatArray:
        return average.share(at) if raw else density(average, at) * float(target.step)

    wanted = curve(target)
    rows = np.stack(list(weights.values()))
    sums = np.zeros((len(rows), len(at)))
    for first in range(0, len(snapshots), _TOGETHER):
        some = snapshots[first : first + _TOGETHER]
        basis = np.stack([curve(each) for each in some])
        sums += rows[:, first : first + _TOGETHER] @ basis
    above.plot(at, wanted, color="0.1", linewidth=2.4, alpha=0.25, label="wanted")
    for method, given in zip(weights, sums, strict=True):
        colour = _METHODS.get(method, "0.5")
        # Mostly one lies over the other: the first is wider, so that it can be seen below it.
        wide = 1.5 if method == next(iter(weights)) else 0.7
        above.plot(at, given, color=colour, linewidth=wide, label=method)
        below.plot(at, given - wanted, color=colour, linewidth=wide)
    below.axhline(0, color="0.1", linewidth=0.5)
    # The beginning of a 1-sqrt is a spike that nothing reaches.
    top = min(float(np.quantile(wanted, 0.999)), 1.5 * float(sums.max())) * 1.15
    above.set_ylim(min(-0.02 * top, 0), top)
    above.set_xlim(0, target.step * 1.03)
    _short_steps(below)


def _draw_weights(axis: Any, snapshots: Sequence[Average], weights: FloatArray) -> None:
    """A stem for each snapshot, those of one profile in one colour."""
    powers = all(isinstance(each, Profile) for each in snapshots)
    named = [
        (round(getattr(each, "sigma_rel", 0.0), 6), str(each).removeprefix("sigma_rel " * powers))
        for each in snapshots
    ]
    profiles = sorted(set(named))
    steps = np.array([float(each.step) for each in snapshots])
    apart = min(float(np.diff(np.unique([0.0, *steps])).min()), 0.06 * float(steps.max()))
    for at, profile in enumerate(profiles):
        colour = _WIDTHS[at % len(_WIDTHS)]
        mine = np.array([one == profile for one in named])
        # Beside each other, not over each other.
        x = steps[mine] + apart * 0.3 * (at - (len(profiles) - 1) / 2) / max(len(profiles) - 1, 1)
        axis.vlines(x, 0, weights[mine], color=colour, linewidth=1.0)
        axis.plot(x, weights[mine], "o", color=colour, markersize=2.4, label=profile[1])
    axis.axhline(0, color="0.1", linewidth=0.5)
    axis.margins(y=0.1)


def _short_steps(axis: Any) -> None:
    """Ticks such as 20k: five-digit steps don't fit beside each other."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
