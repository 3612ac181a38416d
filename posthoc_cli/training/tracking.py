"""The training side: EMAs that are tracked as a network trains, and saved for `posthoc`.

    ema = PostHocEMA(model, sigma_rels=(0.05, 0.10), folder="snapshots")
    ...
        optimizer.step()
        ema.update()

Steps are whatever the caller counts: calls of `update` by default, images or tokens with
`update(step=...)`. An update that ends at step t and covers the d steps since the one before
decays by `(1 - d / t)^(1 + gamma)`: so every average has the profile asked for, whatever
`update_every` is, when it changes, and when updates are left out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import secrets
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posthoc_cli.errors import MachineError, PosthocError, SnapshotError, UsageError, printable
from posthoc_cli.snapshots.folder import read_folder, select
from posthoc_cli.snapshots.identity import MAX_GAMMA
from posthoc_cli.snapshots.names import SAME_WIDTH
from posthoc_cli.solver.methods import solve
from posthoc_cli.solver.profiles import Profile, decay, gamma_to_sigma_rel, sigma_rel_to_gamma
from posthoc_cli.storage.atomic import write_errors
from posthoc_cli.storage.dtypes import DTYPES
from posthoc_cli.storage.header import read_header
from posthoc_cli.storage.readers import Reader
from posthoc_cli.storage.shards import ENDING
from posthoc_cli.synthesis.recipe import KEY, make_recipe
from posthoc_cli.training.averaging import (
    Choice,
    EmaUpdate,
    LiveTensors,
    check_same_tensors,
    is_sharded,
    local,
    named_tensors,
    unwrap,
    wide,
)
from posthoc_cli.training.counting import check_counts, next_step, passes, resolve_gamma
from posthoc_cli.training.saving import Entry, code_of, stage, write

RUN = "run"
"""The key in a snapshot's `__metadata__` that tells one run's snapshots from another's."""

_Job = tuple[Path, dict[str, Entry], dict[str, str]]
"""A snapshot to be: its path, its tensors, its metadata."""


class PostHocEMA:
    """Two or more power-function EMAs of a network, saved now and then as snapshots.

    Arguments:
        model: the network. Compiled, data-parallel and `fully_shard`ed ones are seen through: a
            snapshot's names are those of the bare network, and it loads with `strict=True`.
        sigma_rels: relative widths of the EMAs, 0.05 and 0.10 unless given. Or
        gammas: their exponents.
        folder: where the snapshots go; made if need be.
        checkpoint_every: steps between snapshots; None leaves it to `checkpoint()`.
        dtype: of the floating-point tensors in the snapshots; None keeps the network's own.
        keep: of this run's snapshots, keep those of the newest `keep` steps; None keeps all.
        update_every: steps between updates of the averages.
        background: write in a thread. The averages are copied to host memory first, in `dtype`;
            a checkpoint waits for the one before it.
        overwrite: write even where the folder holds another run's snapshots.
        device: where the averages are kept; None for wherever the network is.
        average_dtype: of the averages: torch.float32 or torch.float64. Never narrower than the
            network's, and never less than float32.
        prefix: how the snapshots' file names start.
        include: globs; only tensors with such names are averaged and saved (a LoRA within a
            frozen network: `("*lora*",)`).
        param_or_buffer_names_no_ema: names of tensors to copy rather than average.
        ignore_names, ignore_startswith_names: tensors to leave as they were at the first update.

    Raises ValueError for arguments that make no sense, TypeError for a model in FSDP's first form,
    MachineError when the folder can't be made. The first `update` raises UsageError when the folder
    holds another run's snapshots, and ValueError when a tensor can't be saved.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_rels: Sequence[float] | None = None,
        *,
        gammas: Sequence[float] | None = None,
        folder: str | os.PathLike[str] = "ema-snapshots",
        checkpoint_every: int | None = 1000,
        dtype: torch.dtype | None = torch.float16,
        keep: int | None = None,
        update_every: int = 1,
        background: bool = False,
        overwrite: bool = False,
        device: torch.device | str | None = None,
        average_dtype: torch.dtype = torch.float32,
        prefix: str = "ema",
        include: Sequence[str] = (),
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
    ) -> None:
        if sigma_rels is not None and gammas is not None:
            raise ValueError("give sigma_rels or gammas, not both")
        if gammas is None:
            sigma_rels = (0.05, 0.10) if sigma_rels is None else sigma_rels
            self.sigma_rels = tuple(float(each) for each in sigma_rels)
            self.gammas = tuple(float(sigma_rel_to_gamma(each)) for each in self.sigma_rels)
        else:
            self.gammas = tuple(float(each) for each in gammas)
            self.sigma_rels = tuple(float(gamma_to_sigma_rel(each)) for each in self.gammas)
        _check_profiles(self.gammas, self.sigma_rels)
        check_counts(update_every=update_every, checkpoint_every=checkpoint_every, keep=keep)
        if dtype is not None and (not (code_of(dtype) and dtype.is_floating_point)):
            raise ValueError(f"dtype {dtype}: snapshots are of a floating-point dtype, or None")
        if average_dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"average_dtype {average_dtype}: a decay near one is lost in fewer bits than "
                "float32 has; give torch.float32 or torch.float64"
            )
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", prefix):
            raise ValueError(f"prefix {prefix!r}: give the start of a file name, without a folder")
        unwrap(model)  # raises for what can't be tracked
        self.model = model
        self.folder = Path(folder)
        self.checkpoint_every = checkpoint_every
        self.dtype = dtype
        self.keep = keep
        self.update_every = update_every
        self.background = background
        self.overwrite = overwrite
        self.device = torch.device(device) if device is not None else None
        self.average_dtype = average_dtype
        self.prefix = prefix
        self.run = secrets.token_hex(8)
        self.step = 0
        self._include = tuple(include)
        self._how = Choice(param_or_buffer_names_no_ema, ignore_names, ignore_startswith_names)
        self._live = LiveTensors(model, self._included)
        self._updated = 0
        self._averages: list[dict[str, Tensor]] = []
        self._movers: tuple[EmaUpdate, EmaUpdate] | None = None
        self._claimed = False
        self._lent = False
        self._writer: threading.Thread | None = None
        self._troubles: list[str] = []
        self._overflowed: set[str] = set()
        if _writes():
            with write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    # Averaging

    def update(self, step: int | None = None) -> None:
        """Take the network's present weights in; call it after each `optimizer.step()`.

        `step` is how far training has come (images, tokens, ...), by default one more than at the
        call before. When it reaches or passes a multiple of `checkpoint_every`, snapshots are
        written. Should that fail, training goes on with a RuntimeWarning.

        Raises ValueError when `step` goes back or the network is another than before, UsageError
        when, at the first update, the folder holds another run's snapshots.
        """
        if self._troubles:
            self._tell()
        self._check_not_lent()
        previous, now = self.step, next_step(self.step, step)
        if now == previous:
            return
        if not self._claimed:
            self._claim()
        if passes(self.update_every, self._updated, now):
            self._average(now)
        self.step = now
        if self.checkpoint_every is not None and passes(self.checkpoint_every, previous, now):
            self._checkpoint()
            self._tell()

    @torch.no_grad()
    def _average(self, now: int) -> None:
        averaged, copied = self._bind()
        averaged([1 - decay(gamma, now, now - self._updated) for gamma in self.gammas])
        copied([1.0 for _ in self.gammas])
        self._updated = now

    def _bind(self) -> tuple[EmaUpdate, EmaUpdate]:
        """Fit averages to the network's tensors: make them, or check that they still match."""
        if not self._live.refresh() and self._movers is not None:
            return self._movers
        live = dict(zip(self._live.names, self._live.tensors, strict=True))
        if not live:
            raise ValueError(
                f"{type(unwrap(self.model)).__name__} has nothing to average"
                + (f" with a name that fits include={self._include}" if self._include else "")
            )
        if self._averages:
            check_same_tensors(live, self._averages[0])
            self._averages = [
                {name: self._place(value, live[name]) for name, value in averages.items()}
                for averages in self._averages
            ]
        else:
            self._averages = [
                {name: self._place(tensor, tensor) for name, tensor in live.items()}
                for _ in self.gammas
            ]
        self._movers = (self._mover(live, self._how.averages), self._mover(live, self._how.copies))
        return self._movers

    def _place(self, value: Tensor, live: Tensor) -> Tensor:
        """`value` as an average of `live`: where it belongs, as wide as it must be."""
        dtype, device = wide(live.dtype, self.average_dtype), self.device or live.device
        if value is not live and value.dtype == dtype and value.device == device:
            return value
        # Strides as those of the live tensor: both are then read in the order they lie in memory.
        return torch.empty_like(live, dtype=dtype, device=device, requires_grad=False).copy_(value)

    def _mover(self, live: Mapping[str, Tensor], chosen: Callable[[str], bool]) -> EmaUpdate:
        names = [name for name in live if chosen(name)]
        columns = [[averages[name] for name in names] for averages in self._averages]
        return EmaUpdate([live[name] for name in names], columns)

    def _included(self, name: str) -> bool:
        return not self._include or any(fnmatch.fnmatchcase(name, g) for g in self._include)

    # Snapshots

    def checkpoint(self) -> list[Path]:
        """Write a snapshot of each average as of now; returns their paths.

        Averages that `update_every` left behind are brought up to the present step first. With
        `background`, the files are there once `wait()` returns. What can't be written is left
        out, with a RuntimeWarning. Raises ValueError before the first update.
        """
        self._check_not_lent()
        paths = self._checkpoint()
        self._tell()
        return paths

    @torch.no_grad()
    def _checkpoint(self) -> list[Path]:
        self._join()
        if not self.step:
            raise ValueError("nothing to save yet: call update() first")
        if not self._claimed:
            self._claim()
        if self._updated < self.step:
            self._average(self.step)
        self._bind()
        own = named_tensors(self.model)
        jobs = [self._job(index, own) for index in range(len(self.gammas))]
        paths = [path for path, _, _ in jobs]
        writes, sharded = _writes(), any(is_sharded(tensor) for tensor in own.values())
        if self.background or sharded:
            jobs = [(path, stage(entries, hold=writes), about) for path, entries, about in jobs]
        if not writes:
            return paths
        if self.background:
            self._writer = threading.Thread(
                target=self._write_behind, args=(jobs,), name="posthoc snapshots"
            )
            self._writer.start()
            return paths
        return self._write_all(jobs)

    def wait(self) -> None:
        """Wait until the snapshots that a thread is writing are on disk."""
        self._join()
        self._tell()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _job(self, index: int, own: Mapping[str, Tensor]) -> _Job:
        averages, entries = self._averages[index], {}
        for name, tensor in own.items():
            if not self._included(name):
                continue
            average = averages.get(self._live.alias.get(name, ""))
            value = local(tensor) if average is None else average
            entries[name] = Entry(value, self._saved_as(name, tensor), tensor)
        width = self.sigma_rels[index]
        metadata = {
            "format": "pt",  # some libraries load nothing without it
            "step": str(self.step),
            "gamma": repr(self.gammas[index]),
            "sigma_rel": repr(width),
            RUN: self.run,
        }
        # No known convention has such a name, so that none can read something else into it.
        name = f"{self.prefix}-step{self.step:08d}-{_decimals(width)}{ENDING}"
        return self.folder / name, entries, metadata

    def _saved_as(self, name: str, tensor: Tensor) -> torch.dtype:
        dtype = self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype
        if dtype is torch.complex128:
            dtype = torch.complex64  # the one complex dtype that the format has
        if code_of(dtype) is None:
            raise ValueError(
                f"tensor {name!r} is {dtype}, which safetensors doesn't have; leave it out: "
                "include= takes the names to save"
            )
        return dtype

    def _write_behind(self, jobs: list[_Job]) -> None:
        try:
            self._write_all(jobs)
        except Exception as error:  # nobody would see it in a thread, and training goes on
            self._troubles.append(f"no snapshots of step {jobs[0][2]['step']}: {error!r}")

    def _write_all(self, jobs: list[_Job]) -> list[Path]:
        written = []
        for path, entries, metadata in jobs:
            try:
                overflowing = write(path, entries, metadata)
            except MachineError as error:
                self._troubles.append(f"no snapshot of step {metadata['step']}: {error}")
                continue
            written.append(path)
            for name in overflowing:
                if name not in self._overflowed:
                    self._overflowed.add(name)
                    self._troubles.append(
                        f"tensor {name!r} has values that are not finite in float16, first in "
                        f"{path.name}; if they are large, give dtype=torch.bfloat16"
                    )
        if self.keep is not None and len(written) == len(jobs):
            self._prune(int(jobs[0][2]["step"]), self.keep)
        return written

    def _prune(self, newest: int, keep: int) -> None:
        """Remove this run's oldest snapshots, so that `keep` steps up to `newest` are left."""
        mine = [(step, path) for path, step in self._snapshots() if step <= newest]
        steps = sorted({step for step, _ in mine})[:-keep]
        for step, path in mine:
            if step in steps:
                try:
                    path.unlink()
                except OSError as error:
                    self._troubles.append(f"{path}: an old snapshot that can't be removed: {error}")

    def _snapshots(self) -> list[tuple[Path, int]]:
        """This run's snapshots in the folder, with their steps."""
        return [
            (path, int(metadata["step"]))
            for path, metadata in _folder_metadata(self.folder)
            if metadata.get(RUN) == self.run
        ]

    def _claim(self) -> None:
        """Refuse what would only fail, or do harm, at a checkpoint hours later.

        That is a tensor that can't be saved, and a folder with another run's snapshots: together
        with ours they would make no EMA.
        """
        for name, tensor in named_tensors(self.model).items():
            if self._included(name):
                self._saved_as(name, tensor)
        others = [
            path.name
            for path, metadata in (_folder_metadata(self.folder) if _writes() else ())
            if KEY not in metadata and metadata.get(RUN) != self.run
        ]
        if others:
            problem = f"holds another run's snapshots, such as '{others[0]}'"
            if not self.overwrite:
                raise UsageError(
                    str(self.folder),
                    problem,
                    "choose another folder, load_state_dict() that run's state to go on with it, "
                    "or give overwrite=True",
                )
            warnings.warn(
                printable(f"{self.folder}: {problem}; move them away before you synthesize"),
                RuntimeWarning,
                stacklevel=3,
            )
        self._claimed = True

    def _tell(self) -> None:
        """Warn of what went wrong since the last call."""
        while self._troubles:
            warnings.warn(printable(self._troubles.pop(0)), RuntimeWarning, stacklevel=3)

    # What a resumed run needs

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had never stopped.

        Save it with the network's and the optimizer's. As with a network's, the tensors are the
        live ones. In sharded training each process has its own.
        """
        return {
            "version": 1,
            "run": self.run,
            "step": self.step,
            "updated": self._updated,
            "gammas": list(self.gammas),
            "averages": [dict(averages) for averages in self._averages],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the folder may hold that run's snapshots.

        Raises ValueError when the state is of other profiles. A network that doesn't fit it is
        noticed at the next update.
        """
        if state.get("version") != 1:
            raise ValueError("not a state of PostHocEMA")
        if tuple(state["gammas"]) != self.gammas:
            raise ValueError(
                f"the state is of gammas {tuple(state['gammas'])}, not {self.gammas}; "
                "make PostHocEMA with the profiles that the run began with"
            )
        self.wait()
        self.run, self.step, self._updated = state["run"], state["step"], state["updated"]
        self._averages = [
            {name: value.detach().clone() for name, value in averages.items()}
            for averages in state["averages"]
        ]
        self._movers = None
        self._claimed = False

    # Synthesis

    def synthesize(
        self,
        sigma_rel: float | None = None,
        *,
        gamma: float | None = None,
        step: int | None = None,
        method: str = "edm2",
    ) -> dict[str, Tensor]:
        """The EMA of another length, as a state dict in host memory, in the network's dtypes.

        `step` is the target step, by default the last snapshot's. Made from this run's snapshots
        in the folder, or, before the first update, from all that the folder holds. The folder
        takes the result for a moment: it must have room for it in float32.

        Raises ValueError unless one of `sigma_rel` and `gamma` is given; UsageError for a step
        out of range; SnapshotError or MachineError when the snapshots can't be used.
        """
        # Only here: training itself doesn't need what compiles kernels.
        from posthoc_cli.snapshots.sampling import fit_snapshots
        from posthoc_cli.synthesis.engine import execute
        from posthoc_cli.synthesis.plan import make_plan

        gamma = resolve_gamma(sigma_rel, gamma)
        self.wait()
        only = [escape(path.name) for path, _ in self._snapshots()] if self.step else []
        if self.step and not only:
            raise SnapshotError(
                str(self.folder), "holds no snapshots of this run yet", "call checkpoint() first"
            )
        chosen, target_step = select(read_folder(self.folder, only=only).usable(), step)
        target = Profile(target_step, gamma)
        profiles = [each.profile for each in chosen]
        trajectory = fit_snapshots(chosen)[1] if method == "blup" else None
        weights = solve(profiles, [target], method, trajectory=trajectory).weights
        recipe = make_recipe(method, target, [each.file for each in chosen], profiles, weights[0])
        own = {name: tensor.dtype for name, tensor in named_tensors(self.model).items()}
        exact = any(dtype in (torch.float64, torch.complex128) for dtype in own.values())
        temporary = self.folder / f".{secrets.token_hex(6)}.posthoc-tmp"
        try:
            names = chosen[-1].index.tensors
            copied = [escape(name) for name in names if not self._how.averages(name)]
            dtype = "float64" if exact else "float32"
            plan = make_plan(chosen, dtype=dtype, copy=copied)
            execute(plan, weights, [temporary], [recipe])
            return _load(temporary, own)
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lend(
        self,
        sigma_rel: float | None = None,
        *,
        gamma: float | None = None,
        step: int | None = None,
        method: str = "edm2",
        model: nn.Module | None = None,
    ) -> Iterator[nn.Module]:
        """Lend the network (or `model`) what `synthesize` makes, then give it its own weights back.

            with ema.lend(sigma_rel=0.08) as model:
                sample(model)

        Meanwhile `update` and `checkpoint` raise RuntimeError. Its own weights wait in host memory.
        """
        self._check_not_lent()
        borrower = self.model if model is None else model
        state = self.synthesize(sigma_rel, gamma=gamma, step=step, method=method)
        live = {name: each for name, each in named_tensors(borrower).items() if name in state}
        if any(is_sharded(tensor) for tensor in live.values()):
            raise TypeError(
                "a sharded model can't be lent weights; load synthesize()'s state dict with "
                "torch.distributed.checkpoint.state_dict.set_model_state_dict"
            )
        check_same_tensors(live, state)
        own: list[tuple[Tensor, Tensor]] = []
        try:
            self._lent = borrower is self.model
            for name, tensor in live.items():
                tensor = tensor.detach()
                own.append((tensor, tensor.to("cpu", copy=True)))
                tensor.copy_(state.pop(name))
            yield borrower
        finally:
            for tensor, value in reversed(own):  # tied tensors: the first one saved has the truth
                tensor.copy_(value)
            self._lent = False

    def _check_not_lent(self) -> None:
        if self._lent:
            raise RuntimeError(
                "the model has synthesized weights on loan: leave the `with ema.lend(...)` block "
                "before the next update() or checkpoint()"
            )


def _check_profiles(gammas: Sequence[float], sigma_rels: Sequence[float]) -> None:
    if len(gammas) < 2:
        raise ValueError(
            f"{len(gammas)} profile: other EMAs can only be made from two or more, "
            "such as sigma_rels=(0.05, 0.10)"
        )
    for gamma in gammas:
        if not 0 < gamma <= MAX_GAMMA:
            raise ValueError(f"gamma {gamma:g}: not above 0 and at most {MAX_GAMMA:g}")
    ordered = sorted(sigma_rels)
    for one, other in pairwise(ordered):
        if other - one <= SAME_WIDTH * other:
            raise ValueError(
                f"sigma_rel {one:g} and {other:g} are the same profile: give different ones, "
                "such as sigma_rels=(0.05, 0.10)"
            )


def _writes() -> bool:
    """Whether this process is the one that writes: of several that train together, the first."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def _folder_metadata(folder: Path) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """The files in a folder that could be snapshots, with what their headers say."""
    for path in sorted(folder.glob(f"*{ENDING}")):
        if path.name.startswith("."):
            continue
        try:
            yield path, read_header(path).metadata
        except PosthocError:
            yield path, {}


def _decimals(sigma_rel: float) -> str:
    """`0.050`: three decimals, or as many more as tell two profiles apart."""
    places = 3
    while abs(round(sigma_rel, places) - sigma_rel) > SAME_WIDTH / 10 * sigma_rel:
        places += 1
    return f"{sigma_rel:.{places}f}"


def _load(path: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own, converted to `dtypes`."""
    layout = read_header(path)
    tensors = {}
    with Reader(layout) as reader:
        for name, info in layout.tensors.items():
            tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype].torch())
            if info.elements:
                reader.read(info.start, tensor.view(-1).view(torch.uint8).numpy().data)
            tensors[name] = tensor.to(dtypes.get(name, tensor.dtype))
    return tensors
