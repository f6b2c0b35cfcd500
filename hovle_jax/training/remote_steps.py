"""The checkpoints of a run at a URL, where several hosts write one together and nothing can be renamed.

URL/RUN/checkpoints/STEP/default/      what Orbax wrote, each host its part
URL/RUN/checkpoints/STEP/files.json    written last: without it STEP is no checkpoint

Nothing is read to be compared where the service keeps an md5 of every file, as Google Cloud Storage does: the list is
compared with what the service says. Elsewhere the first host reads all of it.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.remote import Entry, Remote
from hovle_jax.training.saved_steps import DAMAGED, Keep, check_any_whole, free_name, not_removed, passed_over

Folders = dict[str, dict[str, Entry]]  # STEP or STEP.damaged -> {path below it: file}


class RemoteSteps:
    """`saved_steps.Steps` at a URL.

    Args:
      remote: the folder of the run's checkpoints.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def path(self, step: int) -> str:
        return f"{self._remote.path_for_arrays()}/{step}"

    def newest_whole(self, say: Callable[[str], object]) -> int | None:
        folders = self._folders()
        for step in sorted(map(int, filter(str.isdecimal, folders)), reverse=True):
            files = folders[str(step)]
            if file_lists.FILE_NAME not in files:  # a killed process was writing or removing it
                self.abandon(step)
                continue
            found = self._damage(step, files)
            if not found:
                return step
            say(passed_over(step, found, self._moved(step, folders)))
        check_any_whole(self._remote.url, [name for name in folders if DAMAGED in name])
        return None

    def check_space(self, needed: int) -> None:
        """A service has room."""

    def unfinished(self, step: int) -> str:
        return self.path(step)

    def begin(self, step: int) -> None:
        self.abandon(step)

    def abandon(self, step: int) -> None:
        self._remote.below(str(step)).remove_all(first=file_lists.FILE_NAME)

    def commit(self, step: int, note: Mapping[str, Any]) -> None:
        folder = self._remote.below(str(step))
        files = {name: self._listed(step, name, entry) for name, entry in sorted(folder.entries().items())}
        folder.write(file_lists.FILE_NAME, file_lists.text_of(files, note).encode())

    def note(self, step: int) -> dict[str, Any]:
        try:
            return self._list(step)[1]
        except UserError:
            return {}

    def add_note(self, step: int, note: Mapping[str, Any]) -> None:
        files, before = self._list(step)
        text = file_lists.text_of(files, {**before, **note})
        self._remote.below(str(step)).write(file_lists.FILE_NAME, text.encode())

    def set_aside(self, step: int) -> str:
        return self._moved(step, self._folders())

    def prune(self, keep: Keep, say: Callable[[str], object]) -> None:
        folders = {int(name): files for name, files in self._folders().items() if name.isdecimal()}
        whole = [step for step, files in folders.items() if file_lists.FILE_NAME in files]
        stay = keep.stay({step: self.note(step).get("held_out") or {} for step in whole})
        for step in sorted(set(whole) - stay):
            try:
                self.abandon(step)
            except UserError as error:
                say(not_removed(self.path(step), error))

    def _folders(self) -> Folders:
        found: Folders = collections.defaultdict(dict)
        for name, entry in self._remote.entries().items():
            folder, _, rest = name.partition("/")
            found[folder][rest] = entry
        return found

    def _damage(self, step: int, files: Mapping[str, Entry]) -> list[str]:
        """What is wrong with a checkpoint, a line for each."""
        try:
            listed, _ = self._list(step)
        except UserError as error:
            return [str(error).partition("; ")[0]]
        lines = []
        for name, expected in listed.items():
            if name not in files:
                lines.append(f"{name} is missing")
            elif files[name].size != expected["bytes"]:
                lines.append(f"{name} has {files[name].size:,} bytes, not {expected['bytes']:,}")
            elif self._listed(step, name, files[name]) != expected:
                lines.append(f"{name} is not what was written (its content differs)")
        return lines

    def _listed(self, step: int, name: str, entry: Entry) -> dict[str, Any]:
        if entry.md5:
            return {"bytes": entry.size, "md5": entry.md5}
        return {"bytes": entry.size, "sha256": self._remote.below(str(step)).sha256(name)}

    def _list(self, step: int) -> tuple[file_lists.Files, dict[str, Any]]:
        folder = self._remote.below(str(step))
        return file_lists.parsed(folder.read(file_lists.FILE_NAME), f"{folder.url}/{file_lists.FILE_NAME}")

    def _moved(self, step: int, folders: Folders) -> str:
        """Copies a damaged checkpoint to another name, then removes it -> that name."""
        aside = free_name(step, set(folders))
        for name in folders[str(step)]:
            self._remote.copy(f"{step}/{name}", f"{aside}/{name}")
        self.abandon(step)
        folders[aside] = folders.pop(str(step))
        return f"{self._remote.url}/{aside}"
