"""The training side: EMAs that are tracked as a network trains, and saved for `posthoc`.

    ema = PostHocEMA(model, sigma_rels=(0.05, 0.10), folder="snapshots")
    ...
        optimizer.step()
        ema.update()
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from posthoc_cli.averaging import named_tensors, wide
from posthoc_cli.errors import MachineError
from posthoc_cli.profiles import decay, gamma_to_sigma_rel, sigma_rel_to_gamma
from posthoc_cli.tensorfile import AtomicFile, lay_out, writing_to

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
"""torch's dtypes, by the names that safetensors gives them."""


class PostHocEMA:
    """Two or more power-function EMAs of `model`, saved now and then as snapshots for `posthoc`."""

    def __init__(
        self,
        model: nn.Module,
        sigma_rels: Sequence[float] | None = None,
        *,
        gammas: Sequence[float] | None = None,
        folder: str | os.PathLike[str] = "ema-snapshots",
        checkpoint_every: int | None = 1000,
        dtype: torch.dtype | None = torch.float16,
        prefix: str = "ema",
    ) -> None:
        if gammas is None:
            sigma_rels = (0.05, 0.10) if sigma_rels is None else sigma_rels
            gammas = [sigma_rel_to_gamma(float(sigma_rel)) for sigma_rel in sigma_rels]
        if len(gammas) < 2:
            raise ValueError("fewer than two profiles: give two widths, such as (0.05, 0.10)")
        self.model = model
        self.gammas = tuple(float(gamma) for gamma in gammas)
        self.sigma_rels = tuple(float(gamma_to_sigma_rel(gamma)) for gamma in self.gammas)
        self.folder = Path(folder)
        self.checkpoint_every = checkpoint_every
        self.dtype = dtype
        self.prefix = prefix
        self.step = 0
        self._updated = 0
        self._averages: list[dict[str, Tensor]] = []
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Take the model's present weights into every average; call it after optimizer.step()."""
        previous = self.step
        self.step = previous + 1 if step is None else step
        covered = self.step - self._updated
        tensors = {
            name: tensor
            for name, tensor in named_tensors(self.model).items()
            if tensor.is_floating_point() or tensor.is_complex()
        }
        if not self._averages:
            self._averages = [
                {
                    name: tensor.to(wide(tensor.dtype, torch.float32), copy=True)
                    for name, tensor in tensors.items()
                }
                for _ in self.gammas
            ]
        for gamma, averages in zip(self.gammas, self._averages, strict=True):
            weight = 1 - decay(gamma, self.step, covered)
            for name, average in averages.items():
                average.lerp_(tensors[name].to(average.dtype), weight)
        self._updated = self.step
        every = self.checkpoint_every
        if every is not None and self.step // every > previous // every:
            self.checkpoint()

    @torch.no_grad()
    def checkpoint(self) -> list[Path]:
        """Write one snapshot of each profile, as of now; returns their paths."""
        paths = []
        for gamma, sigma_rel, averages in zip(
            self.gammas, self.sigma_rels, self._averages, strict=True
        ):
            path = self.folder / self._file_name(sigma_rel)
            tensors = {**named_tensors(self.model), **averages}
            try:
                self._write(path, tensors, gamma, sigma_rel)
                paths.append(path)
            except MachineError as error:
                warnings.warn(f"no snapshot written: {error}", RuntimeWarning, stacklevel=2)
        return paths

    def _file_name(self, sigma_rel: float) -> str:
        decimals = next(
            places
            for places in range(3, 20)
            if abs(round(sigma_rel, places) - sigma_rel) <= 1e-5 * sigma_rel
        )
        return f"{self.prefix}-step{self.step:08d}-{sigma_rel:.{decimals}f}.safetensors"

    def _write(
        self, path: Path, tensors: dict[str, Tensor], gamma: float, sigma_rel: float
    ) -> None:
        own = named_tensors(self.model)
        dtypes = {
            name: (self.dtype or own[name].dtype) if value.is_floating_point() else own[name].dtype
            for name, value in tensors.items()
        }
        metadata = {
            "format": "pt",
            "step": str(self.step),
            "gamma": repr(gamma),
            "sigma_rel": repr(sigma_rel),
        }
        header, places = lay_out(
            {name: (_DTYPES[dtypes[name]], tuple(t.shape)) for name, t in tensors.items()}, metadata
        )
        size = len(header) + max((info.end for info in places.values()), default=0)
        with AtomicFile(path, size, overwrite=True) as file:
            file.write_at(0, header)
            for name, info in places.items():
                if info.elements:
                    value = tensors[name].detach().to("cpu", dtypes[name]).contiguous()
                    data = value.reshape(-1).view(torch.uint8).numpy()
                    file.write_at(len(header) + info.start, data.data)
