"""Which of the networks in a folder are used: by only=, exclude= and pattern=, else by their names.

One network a step folder is taken. Of several, the one with a well-known name is; where that leaves
a choice, it is the user's, and the problem lists what there is to choose from.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from posthoc_cli.errors import SnapshotError, UsageError, quoted
from posthoc_cli.formats import index_of_shard, preferred, without_ending
from posthoc_cli.snapshots.listing import Listing, Network, counts, title
from posthoc_cli.snapshots.names import Pattern
from posthoc_cli.storage import ENDING
from posthoc_cli.storage.shards import stem_of_shard

_INDEX = ".index.json"

Fits = Callable[[str], bool]


@dataclass(slots=True)
class Choice:
    """The names of the snapshots to open, what is left out, and what is to be decided first."""

    names: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def choose(
    listing: Listing,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    pattern: Pattern | None = None,
    given: Sequence[str] | None = None,
) -> Choice:
    """What of a folder's listing is used; `given` are paths that alone count.

    Raises UsageError for a glob that fits nothing, for globs that leave nothing, and for a pattern
    that fits none of what is left.
    """
    networks = [each for each in listing.networks if given is None or _covered(each.path, given)]
    others = [each for each in listing.others if given is None or each.path in given]
    if given is not None:
        networks += others
    left_out = [each for each in listing.left_out if given is None or _covered(each[0], given)]
    paths = [each.path for each in networks]
    described = _described(paths)
    beside = [each.path for each in others]
    everything = [*paths, *beside, *(name for name, _ in left_out)]
    wanted = [_glob("only=", glob, everything, described) for glob in only]
    for fits in wanted:  # what isn't taken by itself, such as an average beside the network
        if not any(map(fits, paths)):
            networks += [each for each in others if fits(each.path) and each not in networks]
    asked = {each.path for each in networks} - {*paths}
    left_out = [each for each in left_out if each[0] not in asked]
    unwanted = [_glob("exclude=", glob, everything, described) for glob in exclude]

    def stays(path: str) -> bool:
        chosen = not wanted or any(fits(path) for fits in wanted)
        return chosen and not any(fits(path) for fits in unwanted)

    kept = [each for each in networks if stays(each.path)]
    choice = Choice(left_out=[each for each in left_out if stays(each[0])])
    if not kept and not (only or exclude) and not choice.left_out:
        raise SnapshotError(
            given[0] if given else "", "no snapshot, nor a folder with any", "give others"
        )
    if not kept and (only or exclude) and (paths or not choice.left_out):
        option, glob = ("exclude=", exclude[-1]) if exclude else ("only=", only[-1])
        leaves = "leaves" if exclude else "fits"
        such = f", such as '{paths[0]}'" if paths else ""
        raise UsageError(option, f"'{glob}' {leaves} none of {described}{such}", _REMEDY)
    homes: dict[str, list[Network]] = defaultdict(list)
    for each in kept:
        homes[each.home].append(each)
    _note_empty(choice, networks, homes, only)
    open_choices: dict[tuple[str, ...], list[str]] = defaultdict(list)
    loose: list[str] = []
    for home, inside in homes.items():
        if not home:
            choice.names += [each.name for each in inside]
            continue
        taken = _decided(choice, inside, only, pattern, given)
        if taken is not None:
            choice.names += taken
        elif counts(home.rpartition("/")[2]):
            open_choices[tuple(dict.fromkeys(each.inside for each in inside))].append(home)
        else:
            files = _described([each.path for each in inside if each.path.count("/") == 1])
            reason = f"a folder with {files} and not one index"
            choice.left_out.append((home, reason))
            loose.append(home)
    for keys, folders in open_choices.items():
        several = _which(keys, len(folders))
        if len(keys) == 1:
            several = f"holds several files in '{keys[0]}'; choose with only='{folders[0]}/*'"
        choice.problems.append((folders[0], several))
    _one_kind(choice, homes)
    if not (only or given or pattern):
        _one_run(choice, homes)
    if loose and not choice.names and not choice.problems:  # else it is beside what is read
        choice.left_out = [each for each in choice.left_out if each[0] not in loose]
        choice.problems += [(home, _loose(home, homes[home])) for home in loose]
    _check_pattern(choice.names, pattern)
    return choice


def _described(paths: Sequence[str]) -> str:
    kind = "" if any(without_ending(path) for path in paths) else f"{ENDING} "
    return f"{len(paths)} {kind}file{'' if len(paths) == 1 else 's'}"


# Globs

_REMEDY = "give names, or paths below the folder such as 'checkpoint-*/unet'"


def _glob(argument: str, glob: str, paths: Sequence[str], described: str) -> Fits:
    """Whether a path fits `glob`. Raises UsageError where none of `paths` does.

    A glob that is a file's path fits that alone; one whose brackets fit nothing else fits brackets.
    """
    if glob in paths:
        return glob.__eq__
    plain = glob.replace("[", "[[]")
    readings: Iterable[tuple[Callable[[str, str], bool], str]] = (
        (str.__eq__, glob),
        (fnmatch.fnmatch, glob),
        (fnmatch.fnmatch, plain),
    )
    for test, text in readings:
        fits = _reading(test, text)
        if any(map(fits, paths)):
            return fits
    such = f", such as '{paths[0]}'" if paths else ""
    raise UsageError(argument, f"'{glob}' fits none of {described}{such}", _REMEDY)


def _reading(test: Callable[[str, str], bool], glob: str) -> Fits:
    """Whether a path, or its beginning, fits a glob with `/`; or a part of it one without.

    `./` stands before what lies in the folder itself.
    """
    anchored = "/" in glob.rstrip("/")
    globs = glob.removeprefix("./").rstrip("/").split("/")

    def fits(path: str) -> bool:
        parts = path.split("/")
        shorter = path.removesuffix(_INDEX).split("/")
        if not anchored:
            return any(test(part, globs[0]) for part in {*parts, shorter[-1]})
        return _begins(parts, globs, test) or _begins(shorter, globs, test)

    return fits


def _begins(parts: list[str], globs: list[str], test: Callable[[str, str], bool]) -> bool:
    if not globs:
        return True
    if globs[0] == "**":
        return any(_begins(parts[at:], globs[1:], test) for at in range(len(parts) + 1))
    return bool(parts) and test(parts[0], globs[0]) and _begins(parts[1:], globs[1:], test)


def _covered(path: str, given: Sequence[str]) -> bool:
    """Whether `path` is among those given, or in a folder that is, or the index of such a shard."""
    # The index of shards stands for each of them.
    own = {path, path.removesuffix(_INDEX)}
    return any(
        each in own
        or path.startswith(each + "/")
        or stem_of_shard(each) + ENDING in own
        or index_of_shard(each) in own
        for each in given
    )


# A step folder


def _decided(
    choice: Choice,
    inside: Sequence[Network],
    only: Sequence[str],
    pattern: Pattern | None,
    given: Sequence[str] | None,
) -> list[str] | None:
    """The names of the networks to take of those of one folder; None where that is open."""
    if pattern is not None and "/" in pattern.text:
        fitting = [
            name
            for each in inside
            for name in (each.path, each.name)
            if pattern.greedy.fullmatch(title(name, pattern))
        ]
        if fitting:
            return list(dict.fromkeys(fitting))
    pool: list[Network] = []
    for folder in dict.fromkeys(each.path.rpartition("/")[0] for each in inside):
        there = [each for each in inside if each.path.rpartition("/")[0] == folder]
        files = preferred([each.path.rpartition("/")[2] for each in there])
        if len(files) == 1 < len(there):
            choice.left_out += [
                (each.path, f"not '{files[0]}', which is the network by its name")
                for each in there
                if each.path.rpartition("/")[2] != files[0]
            ]
            there = [each for each in there if each.path.rpartition("/")[2] == files[0]]
        pool += there
    home = inside[0].home
    stepped = counts(home.rpartition("/")[2])
    if len(pool) == 1 and (stepped or pool[0].path.count("/") == 1 or only or given):
        return [pool[0].name]
    return [each.name for each in pool] if _explicit(pool, stepped, only, given) else None


def _explicit(
    pool: Sequence[Network], stepped: bool, only: Sequence[str], given: Sequence[str] | None
) -> bool:
    """Whether the user has named these files one by one: then each is a snapshot of its own."""
    if given is not None and all(each.path in given for each in pool):
        return True
    if not stepped and (given is not None or only):
        return True
    names = [each.path.rpartition("/")[2] for each in pool]
    here = len({each.path.rpartition("/")[0] for each in pool}) == 1
    known = preferred([*names, ""]) != [*names, ""]
    home = pool[0].home
    return (
        bool(only)
        and here
        and not known
        and not any(_reading(fnmatch.fnmatch, glob)(home) for glob in only)
    )


def _which(keys: tuple[str, ...], folders: int) -> str:
    """The problem of folders with several networks each, and what chooses which."""
    others = f", as {folders - 1} more do" if folders > 2 else ", as one more does"
    choices = " or ".join(f"only='*/{key.removesuffix('.index.json')}'" for key in keys[:4])
    return (
        f"holds {len(keys)} networks ({quoted(keys, 4)}){others if folders > 1 else ''}; "
        f"choose one of them with {choices}"
    )


def _one_run(choice: Choice, homes: dict[str, list[Network]]) -> None:
    """A problem where step folders lie in several folders: they may be of as many runs."""
    taken = set(choice.names)
    places: dict[str, str] = {}
    for home, inside in homes.items():
        if home and any({each.name, each.path} & taken for each in inside):
            places.setdefault(home.rpartition("/")[0], home)
    if len(places) > 1:
        shown = ", ".join(f"'{place or '.'}'" for place in list(places)[:4])
        one = next(filter(None, places))
        problem = f"step folders lie in {len(places)} folders ({shown}), of as many runs perhaps; "
        choice.problems.append((places[one], f"{problem}choose with only='{one}/*'"))


def _loose(home: str, inside: Sequence[Network]) -> str:
    return (
        f"a folder with {_described([each.path for each in inside])}, and the one above it holds "
        "none; "
        f"give this folder, or choose its files with only='{home}/*'"
    )


def _one_kind(choice: Choice, homes: dict[str, list[Network]]) -> None:
    """A problem where the networks of some steps lie in another folder than those of the others."""
    chosen = set(choice.names)
    places: dict[str, list[Network]] = defaultdict(list)
    for home, inside in homes.items():
        for each in inside:
            if counts(home.rpartition("/")[2]) and {each.name, each.path} & chosen:
                places[each.inside if each.path.count("/") > home.count("/") + 1 else ""].append(
                    each
                )
    if len(places) < 2:
        return
    most = max(places, key=lambda place: len(places[place]))
    for place, networks in places.items():
        if place != most:
            where, there = (f"'{each}/'" if each else "the folder itself" for each in (place, most))
            choice.problems.append(
                (
                    networks[0].name,
                    f"its network lies in {where}, those of other steps in {there}; leave it out "
                    f"with exclude='{networks[0].home}', or choose with only=",
                )
            )


def _note_empty(
    choice: Choice,
    networks: Sequence[Network],
    homes: dict[str, list[Network]],
    only: Sequence[str],
) -> None:
    """Name the step folders that a glob leads into without fitting anything there."""
    for home in dict.fromkeys(each.home for each in networks):
        into = [glob for glob in only if "/" in glob and home.count("/") < glob.count("/")]
        first = ["/".join(glob.split("/")[: home.count("/") + 1]) for glob in into]
        if home and home not in homes and any(fnmatch.fnmatch(home, glob) for glob in first):
            choice.left_out.append((home, f"nothing in it fits only='{into[0]}'"))


def _check_pattern(names: Sequence[str], pattern: Pattern | None) -> None:
    if pattern and names:
        if any(pattern.greedy.fullmatch(title(name, pattern)) for name in names):
            return
        raise UsageError(
            "pattern=",
            f"'{pattern.text}' fits none of {_described(names)}, such as '{names[0]}'",
            "write it for the whole path below the folder, its ending included",
        )
