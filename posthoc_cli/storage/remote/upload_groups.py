"""Objects of a bucket that appear together: files, shards with their index, folders."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from posthoc_cli.errors import LEFT_BEHIND, PosthocError
from posthoc_cli.storage import stores
from posthoc_cli.storage.folders import copy_file
from posthoc_cli.storage.outputs import Group, Output
from posthoc_cli.storage.places import File
from posthoc_cli.storage.remote.uploads import AT_ONCE, ObjectFile, remove_object


class ObjectFolder:
    """Objects that appear together below `path`, a Url, with copies of files and texts.

    The last of the `texts` is what says that posthoc made it; it appears last.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Output],
        copied: Mapping[str, File],
        texts: Mapping[str, bytes],
    ) -> None:
        self._copied = [
            (ObjectFile(path / name, file.size), file)
            for name, file in copied.items()
            if name not in texts
        ]
        self._texts = [(ObjectFile(path / name, len(text)), text) for name, text in texts.items()]
        self.members: list[Output] = [file for file, _ in self._copied]
        self.members += [*files, *(file for file, _ in self._texts)]
        self.size = sum(file.size for file in self.members)

    def copy(self, progress: Callable[[int], None]) -> None:
        """Copy what is to be copied; `progress` is told the bytes of each piece.

        Raises SnapshotError for a file that isn't as it was found, MachineError when that fails.
        """
        for target, source in self._copied:
            copy_file(source, target, progress)
        for target, text in self._texts:
            target.write_at(0, text)


@contextlib.contextmanager
def upload_together(groups: Sequence[Group]) -> Iterator[None]:
    """Open the objects of all groups for a `with` block, at the end of which all appear, or none.

    They appear one after the other, each group's last at its end. After an error those that did
    are removed again, except where they took another's place: that, and what a store doesn't take
    back, is told with the error.

    Raises UsageError when an object must not be replaced, MachineError when a store fails.
    """
    files = [file for group in groups for file in _objects(group)]
    try:
        connected: dict[tuple[str, ...], ObjectFile] = {}
        for file in files:  # once to each bucket
            file.bucket = connected.setdefault(file.path.parts[:2], file).bucket
        for group in groups:
            _replaced(group)
        for file in files:
            file.outputs = len(groups)
            file.open()
        yield
        for file in files:
            file.finish()
        stores.forget()  # what is there now is asked
        for group, old in [(group, _replaced(group)) for group in groups]:
            for file in _objects(group):
                file.place(overwrite=file.overwrite or file.path in old)
            for path in sorted(old.difference(file.path for file in group.files)):
                remove_object(path)
    except BaseException as error:
        for file in reversed(files):
            file.rollback()
        for file in files:
            file.discard()
        _tell_what_is_left(error, files)
        raise
    finally:
        for file in files:
            file.discard()
        stores.forget()


def _objects(group: Group) -> list[ObjectFile]:
    return [file for file in group.files if isinstance(file, ObjectFile)]


def _replaced(group: Group) -> set[Path]:
    """The objects that go; raises UsageError when one must not."""
    old = set(group.old()) if group.old else set()
    others = [file for file in _objects(group) if file.path not in old]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(ObjectFile.check_absent, others))
    return old


def _tell_what_is_left(error: BaseException, files: Sequence[ObjectFile]) -> None:
    """Add to `error` what couldn't be undone."""
    told = [
        (("parts of {} may be left", "its bucket's rules or tools remove them"), "left"),
        (("{} couldn't be removed again", "remove it"), "remains"),
        (("{} was replaced already", "make it anew"), "replaced"),
    ]
    for (problem, remedy), name in told:
        found = [str(file.path) for file in files if getattr(file, name)]
        if not found:
            continue
        more = f" and of {len(found) - 1} more" if len(found) > 1 else ""
        text = problem.format(found[0]) + more
        if isinstance(error, PosthocError):
            error.problem, error.remedy = f"{error.problem}; {text}", f"{error.remedy}; {remedy}"
        else:
            LEFT_BEHIND.append(f"{text}; {remedy}")
