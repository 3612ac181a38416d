"""What can't be averaged, from names and dtypes as the tools write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from posthoc_cli.snapshots.folder import FolderContents, read_folder
from tests.support import write_layout, write_tensors

Layout = dict[str, tuple[str, tuple[int, ...]]]


def folder_of(folder: Path, layout: Layout, files: int = 2) -> Path:
    """Snapshots of zeros with these tensors."""
    for at in range(1, files + 1):
        path = folder / f"s{at}.safetensors"
        write_layout(path, layout, metadata={"step": str(at), "gamma": "6.94"})
    return folder


def problem(contents: FolderContents) -> str:
    ((_, message),) = contents.problems
    return message


def linear(name: str, dtype: str = "F16", rows: int = 8, columns: int = 64) -> Layout:
    return {f"{name}.weight": (dtype, (rows, columns)), f"{name}.bias": ("F16", (rows,))}


# Placeholders

EMPTY = ("BF16", (0,))


@pytest.mark.parametrize(
    "layout",
    [
        {"a.weight": EMPTY, "a.bias": EMPTY},
        {"a.weight": EMPTY, "a.bias": ("BF16", (4,))},
        # Most tensors are below stage3_param_persistence_threshold, and whole.
        {f"{at}.weight": EMPTY for at in range(4)}
        | {f"{at}.{name}": ("BF16", (4,)) for at in range(4) for name in ("bias", "ln.w", "ln.b")},
    ],
)
def test_placeholders_of_zero_3(tmp_path: Path, layout: Layout) -> None:
    message = problem(read_folder(folder_of(tmp_path, layout)))
    assert "without elements (and 1 files like it): DeepSpeed's ZeRO-3" in message
    assert "; consolidate the checkpoint by its zero_to_fp32.py, or save with stage3" in message


@pytest.mark.parametrize(
    "layout",
    [
        linear("a") | {"empty": ("F16", (0,))},
        linear("a") | {"empty": ("F16", (0, 4)), "none": ("F16", (4, 0)), "no": ("F16", (0, 0))},
    ],
)
def test_some_tensors_have_no_elements(tmp_path: Path, layout: Layout) -> None:
    assert len(read_folder(folder_of(tmp_path, layout)).usable()) == 2


# Quantized

QUANTIZED: dict[str, Layout] = {
    "bitsandbytes nf4": {
        "q.weight": ("U8", (256, 1)),
        "q.weight.absmax": ("F32", (8,)),
        "q.weight.quant_map": ("F32", (16,)),
        "q.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    },
    "bitsandbytes nf4, twice": {
        "q.weight": ("U8", (256, 1)),
        "q.weight.absmax": ("U8", (8,)),
        "q.weight.nested_absmax": ("F32", (1,)),
        "q.weight.nested_quant_map": ("F32", (256,)),
        "q.weight.quant_map": ("F32", (16,)),
        "q.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    },
    "bitsandbytes int8": linear("q", "I8")
    | {"q.SCB": ("F32", (8,)), "q.weight_format": ("U8", ())},
    "GPTQ": {
        "q.qweight": ("I32", (8, 64)),
        "q.qzeros": ("I32", (1, 8)),
        "q.scales": ("F16", (1, 64)),
        "q.g_idx": ("I32", (64,)),
    },
    "AWQ": {
        "q.qweight": ("I32", (64, 8)),
        "q.qzeros": ("I32", (1, 8)),
        "q.scales": ("F16", (1, 64)),
    },
    "HQQ": {"q.W_q": ("U8", (32, 64)), "q.scale": ("F16", (64, 1)), "q.zero": ("F16", (64, 1))},
    "ComfyUI scaled fp8": linear("q", "F8_E4M3")
    | {"q.scale_weight": ("F32", ()), "scaled_fp8": ("F8_E4M3", (2,))},
    "ComfyUI mixed": linear("q", "F8_E4M3")
    | {"q.weight_scale": ("F32", ()), "q.comfy_quant": ("U8", (30,))},
    "DeepSeek": linear("q", "F8_E4M3") | {"q.weight_scale_inv": ("F32", (1, 1))},
    "compressed-tensors fp8": linear("q", "F8_E4M3")
    | {"q.weight_scale": ("BF16", (8, 1)), "q.input_scale": ("BF16", (1,))},
    "compressed-tensors int4": {
        "q.weight_packed": ("I32", (8, 8)),
        "q.weight_scale": ("BF16", (8, 1)),
        "q.weight_shape": ("I64", (2,)),
    },
    "ModelOpt nvfp4": linear("q", "U8")
    | {"q.weight_scale": ("F8_E4M3", (8, 4)), "q.weight_scale_2": ("F32", ())},
    "torchao": {"q._weight_qdata": ("F8_E4M3", (8, 64)), "q._weight_scale": ("F32", (8, 1))},
    "torchao, before": {"q.weight:qdata": ("I8", (8, 64)), "q.weight:scale": ("F32", (8, 1))},
    "quanto int8": {"q.weight._data": ("I8", (8, 64)), "q.weight._scale": ("F16", (8, 1))},
    "quanto int4": {
        "q.weight._data._data": ("U8", (4, 64)),
        "q.weight._scale": ("F16", (8, 1)),
        "q.weight._shift": ("F16", (8, 1)),
    },
    "gpt-oss mxfp4": {
        "experts.gate_up_proj_blocks": ("U8", (2, 8, 4, 16)),
        "experts.gate_up_proj_scales": ("U8", (2, 8, 4)),
    },
    "fp8 experts": {
        "experts.gate_up_proj": ("F8_E4M3", (2, 8, 64)),
        "experts.gate_up_proj_scale": ("BF16", (2, 1, 64)),
    },
    "EETQ": linear("q", "I8") | {"q.weight_scales": ("F16", (8,))},
    "AQLM": {
        "q.codes": ("I8", (8, 8, 1)),
        "q.codebooks": ("F16", (1, 256, 1, 8)),
        "q.scales": ("F16", (8, 1, 1, 1)),
    },
}


@pytest.mark.parametrize("tool", QUANTIZED)
def test_quantized_weights(tmp_path: Path, tool: str) -> None:
    layout = QUANTIZED[tool] | linear("other", "BF16")
    contents = read_folder(folder_of(tmp_path, layout, files=3))
    file, message = contents.problems[0]
    assert file == "s1.safetensors"
    assert "is quantized, with 'q." in message or "is quantized, with 'experts." in message, message
    assert "(and 2 files like it)" in message
    assert "; dequantize the checkpoints first, or average those that were quantized" in message
    assert not read_folder(tmp_path, drop=["q.*", "experts.*"]).problems
    assert not read_folder(tmp_path, copy=["q.*", "experts.*"]).problems


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            linear("q", "F8_E4M3") | {"key_norm.scale": ("F8_E4M3", (8,))}, id="Flux in float8"
        ),
        pytest.param(
            linear("q", "F8_E4M3")
            | {"logit_scale": ("F32", ()), "text_projection": ("F8_E4M3", (8, 8))},
            id="CLIP in float8",
        ),
        pytest.param(
            {"n.weight": ("F8_E5M2", (8,)), "n.scale": ("F8_E5M2", (8,))}, id="all float8"
        ),
        pytest.param(
            linear("attn") | {"attn.logit_scale": ("F32", (4, 1, 1)), "attn.index": ("I32", (9,))},
            id="Swin",
        ),
        pytest.param(
            linear("q", "F32")
            | {
                "q.weight_fake_quant.scale": ("F32", (1,)),
                "q.weight_fake_quant.zero": ("I32", (1,)),
            },
            id="quantization-aware training",
        ),
        pytest.param(linear("q") | {"q.scale": ("F32", (8,))}, id="a scale of its own"),
        pytest.param(linear("q") | {"position_ids": ("I64", (1, 77))}, id="position_ids"),
    ],
)
def test_what_is_not_quantized(tmp_path: Path, layout: Layout) -> None:
    assert len(read_folder(folder_of(tmp_path, layout)).usable()) == 2


def test_weights_that_are_quantized_in_some_snapshots_only(tmp_path: Path) -> None:
    folder_of(tmp_path, QUANTIZED["EETQ"], files=1)
    write_layout(tmp_path / "s2.safetensors", linear("q"), metadata={"step": "2", "gamma": "6.94"})
    (file, message), *_ = read_folder(tmp_path).problems
    assert file == "s1.safetensors"
    assert message.startswith("tensor 'q.weight' (I8) is quantized, with 'q.weight_scales' beside ")


# Integers


def integers(folder: Path, size: int, change: int, dtype: type = np.int32, files: int = 6) -> Path:
    """Snapshots of 1000 floats and `size` integers, of which the last is other by `change`."""
    for at in range(1, files + 1):
        table = np.arange(size).astype(dtype)
        table[-1] = change * at
        tensors = {"table": table, "w": np.full(1000, at, np.float32)}
        tensors |= {"num_batches_tracked": np.array(at)}
        metadata = {"step": str(at), "gamma": "6.94"}
        write_tensors(folder / f"s{at}.safetensors", tensors, metadata)
    return folder


def test_integers_that_differ(tmp_path: Path) -> None:
    integers(tmp_path, 9000, 1, np.uint8)
    message = problem(read_folder(tmp_path))
    assert message.startswith(
        "tensor 'table' (U8) is not what it is in the newest snapshot, 's6.safetensors', and 69"
    )
    assert "copy=" in message
    assert "drop=" in message
    assert not read_folder(tmp_path, copy=["table"]).problems
    assert not read_folder(tmp_path, drop=["t*"]).problems


def test_masks_that_differ(tmp_path: Path) -> None:
    for at in (1, 2):
        mask = np.arange(1000) % (at + 1) == 0
        tensors = {"mask": mask, "w": np.ones(1000, np.float32)}
        metadata = {"step": str(at), "gamma": "6.94"}
        write_tensors(tmp_path / f"s{at}.safetensors", tensors, metadata)
    assert "tensor 'mask' (BOOL)" in problem(read_folder(tmp_path))


@pytest.mark.parametrize(("size", "change"), [(40, 1), (3000, 0), (8, 1)])
def test_integers_that_do_not_matter(tmp_path: Path, size: int, change: int) -> None:
    """Few ones, such as indices, and the same ones, such as a table of positions."""
    assert len(read_folder(integers(tmp_path, size, change)).usable()) == 6


def test_integers_are_only_read_where_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("posthoc_cli.snapshots.meaning.Reader", read)
    assert len(read_folder(integers(tmp_path, 40, 1)).usable()) == 6


# Running statistics


def test_batch_normalization_is_a_warning(tmp_path: Path) -> None:
    layout = linear("a") | {
        f"bn{at}.{name}": ("F32", (4,))
        for at in range(3)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    layout |= {f"bn{at}.num_batches_tracked": ("I64", ()) for at in range(3)}
    contents = read_folder(folder_of(tmp_path, layout, files=5))
    assert len(contents.usable()) == 5
    ((file, warning),) = contents.warnings
    assert file == ""
    assert warning.startswith("'bn0.running_mean' and 5 more: running statistics of batch norm")
    assert "update_bn" in warning
    assert not read_folder(tmp_path, drop=["*.running_*"]).warnings
