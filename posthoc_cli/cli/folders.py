"""What --json and people are told of outputs that are folders."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posthoc_cli.cli.console import counted
from posthoc_cli.errors import either, in_bytes, printable

if TYPE_CHECKING:
    from posthoc_cli.synthesis.output_files import Output

_SHOWN = 6


def describe_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What --json says of a folder's contents; docs/json.md has its schema."""
    return {key: manifest[key] for key in ("weights", "from", "copied", "left_out", "missing")}


def missing(outputs: Sequence[Output]) -> Iterator[str]:
    """What loaders will ask for and not find in these outputs."""
    found = [one for one in outputs if one.manifest and one.manifest["missing"]]
    for one in found[:1]:
        names = list(map(printable, (one.manifest or {})["missing"]))
        more = f" and {counted(len(found) - 1, 'more folder')}" if found[1:] else ""
        yield (
            f"{printable(str(one.path))}{more}: no {either(names) if names[1:] else names[0]} lay "
            "beside the snapshots; add it, or load the weights alone"
        )


def wrapped(outputs: Sequence[Output], names: Collection[str]) -> Iterator[str]:
    """That loaders will find none of these tensors in folders: their names are of what wrapped the
    network in training, and `from_pretrained` would make a new one."""
    from posthoc_cli.snapshots import describe_wrappers

    folders = [one for one in outputs if one.manifest]
    around = [name for name in names if describe_wrappers([name])]
    if folders and 2 * len(around) > len(names):
        yield (
            f"{printable(str(folders[0].path))}: its tensors are named as they were wrapped in "
            f"training ({describe_wrappers(around)}), and from_pretrained knows them without that; "
            "rename them before it loads the folder"
        )


def draw_manifests(manifests: Sequence[Mapping[str, Any]]) -> None:
    """Print what the folders hold besides the weights: all the same, of the same snapshots."""
    for manifest in manifests[:1]:
        for line in lines(manifest):
            print(line)


def lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The weights' place in a folder, what was copied into it, and what was left out."""
    copied, left_out = manifest["copied"], manifest["left_out"]
    yield f"weights   {printable(manifest['weights'])}"
    if not copied:
        yield "copied    nothing"
    for place in dict.fromkeys(each["from"] for each in copied):
        files = [each for each in copied if each["from"] == place]
        size = in_bytes(sum(each["bytes"] for each in files))
        names = _listed([each["file"] for each in files])
        yield f"copied    {names}: {size} from {printable(place)}"
    for reason in dict.fromkeys(each["reason"] for each in left_out):
        names = _listed([each["file"] for each in left_out if each["reason"] == reason])
        yield f"left out  {names}: {printable(reason)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more
