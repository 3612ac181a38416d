"""EMAs of a network in training, saved as snapshots for `posthoc`: `PostHocEMA`.

Steps are whatever the caller counts: calls of `update` by default, images or tokens with
`update(step=...)`. An update that ends at step t and covers the d steps since the one before
decays by `(1 - d / t)^(1 + gamma)`. So every average has the profile asked for, whatever
`update_every` is, when it changes, and when updates are left out.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posthoc_cli.errors import printable
from posthoc_cli.solver import decay
from posthoc_cli.storage.places import Url, place
from posthoc_cli.storage.shared import make_home
from posthoc_cli.training.averaging import (
    TensorRoles,
    check_same_tensors,
    distributed_rank,
    is_first_process,
    is_sharded,
    local,
    named_tensors,
    swapped,
    unwrap,
)
from posthoc_cli.training.chains import Chain, check_store
from posthoc_cli.training.claim import LATER, FolderClaim
from posthoc_cli.training.counting import (
    check_counts,
    crosses_multiple,
    next_step,
    resolve_profiles,
)
from posthoc_cli.training.ranks import Ranks, agree, heard_by_all, others
from posthoc_cli.training.reading import read_averages, synthesized
from posthoc_cli.training.sharded import Parts, check_seen
from posthoc_cli.training.snapshot_files import (
    SnapshotToSave,
    TensorToSave,
    check_dtypes,
    saved_dtype,
)
from posthoc_cli.training.tracked import Averages
from posthoc_cli.training.writer import SnapshotWriter


class PostHocEMA:
    """Two or more power-function EMAs of a network, saved now and then as snapshots.

    Arguments:
        model: the network. Compiled, data-parallel and `fully_shard`ed ones are seen through: a
            snapshot's names are those of the bare network, and it loads with `strict=True`.
        sigma_rels: relative widths of the EMAs, 0.05 and 0.10 unless given. Or
        gammas: their exponents.
        folder: where the snapshots go, made if need be; or s3://, gs:// or az://.
        checkpoint_every: steps between snapshots; None leaves it to `checkpoint()`.
        raw: save the network itself too, beside its averages.
        store: "whole", each snapshot by itself; or "delta", as the difference to another: nearer
            at the same bytes.
        dtype: of the floating-point tensors in the snapshots; None keeps the network's own. Of
            differences torch.float16, bfloat16 or float8_e4m3fn.
        keyframe_every: how many steps a chain of differences has; its first is float32.
        delta_memory: hold what was last written in host memory, 8 bytes a parameter and profile and
            twice more. Otherwise each reads its chain so far, in little memory: about as many
            files as the chain has.
        keep: keep this run's newest `keep` steps, and the rest of their chains; None keeps all.
        update_every: steps between updates of the averages.
        background: write in a thread. The averages are copied to host memory first, in `dtype` (for
            differences in float32); a checkpoint waits for the one before it.
        overwrite: where the folder holds another run's snapshots, set them aside and go on.
        later: what to do, on resuming, with this run's snapshots after the state's step: "refuse",
            or "set aside".
        device: where the averages are kept; None for wherever the network is.
        average_dtype: of the averages: torch.float32 or torch.float64. Never narrower than the
            network's, and never less than float32.
        prefix: how the snapshots' file names start.
        include: globs; only tensors with such names are averaged and saved (a LoRA within a
            frozen network: `("*lora*",)`).
        param_or_buffer_names_no_ema: names of tensors to copy rather than average.
        ignore_names, ignore_startswith_names: tensors to leave as they were at the first update.

    From the first `update` on, nobody else can write snapshots into the folder: until `close`, or
    the end of the tracker or its process. What is set aside goes to `other-runs` in the folder.

    Raises ValueError for arguments that make no sense, TypeError for a model in FSDP's first form,
    MachineError when the folder can't be made. The first `update` raises UsageError when another
    training writes to the folder, or when it holds another run's or later snapshots, in all
    processes that train together; and ValueError when a tensor can't be saved.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma_rels: Sequence[float] | None = None,
        *,
        gammas: Sequence[float] | None = None,
        folder: str | os.PathLike[str] = "ema-snapshots",
        checkpoint_every: int | None = 1000,
        raw: bool = False,
        store: str = "whole",
        dtype: torch.dtype | None = torch.float16,
        keyframe_every: int = 16,
        delta_memory: bool = False,
        keep: int | None = None,
        update_every: int = 1,
        background: bool = False,
        overwrite: bool = False,
        later: str = "refuse",
        device: torch.device | str | None = None,
        average_dtype: torch.dtype = torch.float32,
        prefix: str = "ema",
        include: Sequence[str] = (),
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
    ) -> None:
        self.gammas, self.sigma_rels = resolve_profiles(sigma_rels, gammas)
        check_counts(update_every=update_every, checkpoint_every=checkpoint_every, keep=keep)
        check_store(store, dtype, keyframe_every, delta_memory)
        check_dtypes(dtype, average_dtype)
        if later not in LATER:
            raise ValueError(f"later {later!r}: give 'refuse' or 'set aside'")
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", prefix):
            raise ValueError(f"prefix {prefix!r}: give the start of a file name, without a folder")
        unwrap(model)  # raises for what can't be tracked
        self.model = model
        self.folder = place(folder)
        if store == "delta" and isinstance(self.folder, Url):
            raise ValueError("store='delta' writes to a disk; give store='whole', and pack later")
        self.checkpoint_every = checkpoint_every
        self.raw = raw
        self.dtype = dtype
        self.keep = keep
        self.update_every = update_every
        self.background = background
        self.overwrite = overwrite
        self.later = later
        self.prefix = prefix
        self.run = secrets.token_hex(8)
        self.step = 0
        roles = TensorRoles(param_or_buffer_names_no_ema, ignore_names, ignore_startswith_names)
        self._updated = 0
        self._averages = Averages(model, len(self.gammas), include, roles, device, average_dtype)
        self._lent = False
        self._met: Path | None = None
        self._claim = FolderClaim()
        chain = Chain(dtype, keyframe_every, memory=delta_memory) if store == "delta" else None
        self._writer = SnapshotWriter(self._claim, chain)
        if is_first_process():
            with heard_by_all(str(self.folder)):
                make_home(self.folder)

    # Averaging

    def update(self, step: int | None = None) -> None:
        """Take the network's present weights in; call it after each `optimizer.step()`.

        `step` is how far training has come (images, tokens, ...), by default one more than at the
        call before. When it reaches or passes a multiple of `checkpoint_every`, snapshots are
        written. Should that fail, training goes on with a RuntimeWarning.

        Raises ValueError when `step` goes back or the network is another than before, UsageError
        when, at the first update, the folder holds another run's snapshots or has another tracker.
        """
        self._check_not_lent()
        previous, now = self.step, next_step(self.step, step)
        if now == previous:
            return
        self._meet()
        self._check_can_save()
        self._warn_of_failures()
        if crosses_multiple(self.update_every, self._updated, now):
            self._average(now)
        self.step = now
        if crosses_multiple(self.checkpoint_every, previous, now):
            self._checkpoint()
            self._warn_of_failures()

    @torch.no_grad()
    def _average(self, now: int) -> None:
        self._averages.update([1 - decay(gamma, now, now - self._updated) for gamma in self.gammas])
        self._updated = now

    # Snapshots

    def checkpoint(self) -> list[Path]:
        """Write a snapshot of each average as of now; returns their paths.

        Averages that `update_every` left behind are brought up to the present step first. With
        `background`, the files are there once `wait()` returns. What can't be written is left
        out, with a RuntimeWarning. Raises ValueError before the first update.
        """
        self._check_not_lent()
        paths = self._checkpoint()
        self._warn_of_failures()
        return paths

    @torch.no_grad()
    def _checkpoint(self) -> list[Path]:
        self._writer.wait()
        if not self.step:
            raise ValueError("nothing to save yet: call update() first")
        self._meet()
        parts = self._writer.parts
        if parts is None:
            snapshots, writes = self._snapshots(), is_first_process()
            if self.background or any(
                is_sharded(each.like) for each in snapshots[0].tensors.values()
            ):
                snapshots = [snapshot.on_host(hold=writes) for snapshot in snapshots]
            if not writes:
                return [snapshot.path for snapshot in snapshots]
        else:
            with parts.ranks.raised_in_all():
                snapshots = self._snapshots()
            snapshots = parts.of(snapshots)
            if self.background:
                snapshots = [snapshot.on_host(hold=True) for snapshot in snapshots]
        if self.background:
            self._writer.start(snapshots, self.keep)
            return [snapshot.path for snapshot in snapshots]
        return self._writer.write(snapshots, self.keep)

    def _snapshots(self) -> list[SnapshotToSave]:
        """The snapshot of each average as of now, and with `raw` that of the network."""
        self._claim.look_again()
        self._check_can_save()
        if self._updated < self.step:
            self._average(self.step)
        self._averages.bind()
        own = named_tensors(self.model)
        averages = [*self._averages.tensors, *([{}] if self.raw else [])]
        return [self._snapshot(index, each, own) for index, each in enumerate(averages)]

    def wait(self) -> None:
        """Wait until the snapshots that a thread is writing are on disk."""
        self._writer.wait()
        self._warn_of_failures()

    def close(self) -> None:
        """Write out what is being written, and leave the folder to others; an update returns."""
        self._writer.wait()
        self._claim.release()
        self._warn_of_failures()

    def _snapshot(
        self, index: int, averages: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> SnapshotToSave:
        """The snapshot of an average as of now, with what else the network's state dict has."""
        tensors = {}
        for name, tensor in own.items():
            if self._averages.included(name):
                average = averages.get(self._averages.own(name))
                value = local(tensor) if average is None else average
                tensors[name] = TensorToSave(value, self._saved_dtype(name, tensor), tensor)
        profile = (*self.gammas, math.inf)[index], (*self.sigma_rels, 0.0)[index]
        return SnapshotToSave(self.folder, self.prefix, self.run, self.step, *profile, tensors)

    def _saved_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        return saved_dtype(name, tensor, self.dtype, self._writer.chain)

    def _check_can_save(self) -> None:
        """Refuse, before training begins, what would fail or do harm at a checkpoint hours later.

        That is a tensor that can't be saved, and a folder with snapshots or a tracker of another
        run: of both runs' together no EMA can be made.
        """
        if self._claim.covers(self.folder):
            return
        if self._writer.parts is None:
            self._check_dtypes()
            self._claim.sure = agree(str(self.folder), self._take_folder)
        elif is_first_process():
            self._take_folder()
        self._claim.folder = self.folder

    def _take_folder(self) -> bool:
        self._writer.failures += self._claim.take(
            self.folder, self.run, self.step, overwrite=self.overwrite, later=self.later
        )
        return self._claim.sure

    def _check_dtypes(self) -> None:
        for name, tensor in named_tensors(self.model).items():
            if self._averages.included(name):
                self._saved_dtype(name, tensor)

    def _meet(self) -> None:
        """Where the network is sharded, have all processes agree on folder and run, or raise the
        same error."""
        if self._met is self.folder:
            return
        sharded = others() and any(map(is_sharded, named_tensors(self.model).values()))
        if sharded and self._writer.parts is None:
            send = self._writer.chain is not None
            self._writer.parts = Parts(Ranks(str(self.folder)), send=send)
        if self._writer.parts is not None:
            ranks = self._writer.parts.ranks
            with ranks.raised_in_all():
                self._check_dtypes()
                self._check_can_save()
            said = ranks.from_first(lambda: (self.run, self._claim.sure, self._claim.lock_file))
            self.run, self._claim.sure, lock = said
            with ranks.raised_in_all():
                if lock is not None and not self._writer.parts.send:
                    check_seen(lock, self.folder)
        self._met = self.folder

    def _warn_of_failures(self) -> None:
        """Warn of what went wrong since the last call."""
        while self._writer.failures:
            warnings.warn(printable(self._writer.failures.pop(0)), RuntimeWarning, stacklevel=3)

    # What a resumed run needs

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had never stopped.

        Save it with the network's and the optimizer's. As with a network's, the tensors are the
        live ones, and of a sharded network sharded alike: torch.distributed.checkpoint saves it,
        and loads it for another number of processes. Snapshots that are being written are waited
        for: with the state saved, all up to its step are on disk.
        """
        self._writer.wait()
        return {
            "version": 1,
            "run": self.run,
            "rank": distributed_rank(),
            "step": self.step,
            "updated": self._updated,
            "gammas": list(self.gammas),
            "averages": self._averages.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the folder may hold that run's snapshots.

        Those after the state's step are another branch: `later` says what becomes of them.

        Raises ValueError when the state is of other profiles. A network that doesn't fit it is
        noticed at the next update.
        """
        if state.get("version") != 1:
            raise ValueError("not a state of PostHocEMA")
        if tuple(state["gammas"]) != self.gammas:
            problem = f"the state is of gammas {tuple(state['gammas'])}, not {self.gammas}"
            raise ValueError(f"{problem}; give the profiles that the run began with")
        self.wait()
        # Before the first update the averages are but places for what is loaded.
        self._averages.load(state["averages"] if state["step"] else [], state.get("rank"))
        self._go_on(state["run"], state["step"], state["updated"])

    def load_snapshots(self, step: int | None = None) -> int:
        """Go on from the snapshots in the folder, where no state was saved; returns their step.

        Those of the newest step, or of `step`, that has one of each average, rounded as they were
        saved. Of a sharded network each process reads its own part, whatever wrote them. Later
        snapshots are another branch, as with `load_state_dict`.

        Raises SnapshotError when there are none that fit, MachineError when they can't be read.
        """
        self.wait()
        wanted = self._averages.wanted()
        run, at, averages = read_averages(self.folder, self.gammas, step, wanted)
        self._averages.load(averages)
        self._go_on(run, at, at)
        return at

    def _go_on(self, run: str, step: int, updated: int) -> None:
        self.run, self.step, self._updated, self._met = run, step, updated, None
        self._claim.begin_anew()

    # Synthesis

    def synthesize(
        self,
        sigma_rel: float | None = None,
        *,
        gamma: float | None = None,
        step: int | None = None,
        method: str = "edm2",
        **target: Any,
    ) -> dict[str, Tensor]:
        """The EMA of another length, as a state dict in host memory, in the network's dtypes.

        `target` is one of another kind, `window`, `lr_decay`, `decay` or `half_life`; `target_for`
        gives some tensors their own: as `Run.solve` has them. `step` is the target step, by default
        the last snapshot's. Made of this run's snapshots in the folder, or, before the first
        update, of all that the folder holds.

        Raises ValueError unless there is one target, or for one out of bounds; UsageError for a
        step out of range; SnapshotError or MachineError when the snapshots can't be used.
        """
        self.wait()
        run = self.run if self.step else None
        named, averaged = named_tensors(self.model), self._averages.roles.averaged
        wanted = {"sigma_rel": sigma_rel, "gamma": gamma, **target}
        return synthesized(self.folder, run, named, averaged, wanted, step, method)

    @contextlib.contextmanager
    def lend(
        self,
        sigma_rel: float | None = None,
        *,
        model: nn.Module | None = None,
        **how: Any,
    ) -> Iterator[nn.Module]:
        """Lend the network (or `model`) what `synthesize` makes, then give it its own weights back.

            with ema.lend(sigma_rel=0.08) as model:
                sample(model)

        Meanwhile `update` and `checkpoint` raise RuntimeError. Its own weights wait in host memory.
        All processes that share a sharded network must call it.
        """
        self._check_not_lent()
        borrower = self.model if model is None else model
        state = self.synthesize(sigma_rel, **how)
        own = {name: each for name, each in named_tensors(borrower).items() if name in state}
        check_same_tensors(own, state)
        self._lent = borrower is self.model
        try:
            with swapped(own, state):
                yield borrower
        finally:
            self._lent = False

    def _check_not_lent(self) -> None:
        if self._lent:
            raise RuntimeError(
                "the model has synthesized weights on loan: leave the `with ema.lend(...)` block "
                "before the next update() or checkpoint()"
            )
