"""Where training images come from: a folder, a list of files, tar shards, or a saved data set."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image as Picture
from pydantic import ConfigDict
from typing_extensions import TypedDict

from codebook.errors import CodebookError, install_command
from codebook.store.pictures import HEAD, LARGEST_PICTURE, is_picture, read_image
from codebook.store.reading import cannot_read, is_file, is_folder, open_regular, read_bytes, read_lines

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".pnm"}
"""Suffixes of files that are taken for pictures unseen; of others the first bytes decide."""
LEFT_OUT = {".heic", ".heif", ".svg", ".psd", ".eps", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf",
            ".rw2", ".zip", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}  # fmt: skip
"""Suffixes of pictures, and of archives that may hold some, that are not read: they are counted."""
GONE = ""
"""Digest of an image that cannot be read."""


class ListedImage(TypedDict):
    """A line of a JSONL list."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]
    image: str


@dataclass(frozen=True)
class Source:
    """Images by name, in a fixed order.

    Attributes
    ----------
    where
        The place that was opened, for messages.
    names
        The images' names, sorted. They are for people; what an image is, its contents say.
    find
        Function from an image's name to the contents of its file. Raises OSError or CodebookError.
    left_out
        How many pictures of which kind are there and are not taken.
    """

    where: str
    names: tuple[str, ...]
    find: Callable[[str], bytes]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def read(self, name: str) -> Picture.Image:
        """The image as `codebook.store.pictures.read_image` gives it."""
        return read_image(self.find(name), name)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each image's file, by its name; GONE where it cannot be read."""
        return {name: self._digest(name) for name in self.names}

    def _digest(self, name: str) -> str:
        try:
            return hashlib.sha256(self.find(name)).hexdigest()
        except (OSError, ValueError, CodebookError):
            return GONE


Images = Source | Path | str | Sequence[Path | str]
Found = dict[str, Callable[[], bytes]]
"""For each image's name, a function that reads its file."""


def open_images(images: Images, limit: int | None = None) -> Source:
    """Find out what `images` is, and list what it holds; no image is decoded yet.

    Parameters
    ----------
    images
        A folder, searched recursively, links to folders too, for pictures and `.tar` shards (WebDataset); a list of
        files; a JSONL file of paths relative to it, each line a string or an object with `image`; a `.tar` shard; a
        folder written by `save_to_disk` of Hugging Face `datasets`; or what this function returned before.
    limit
        Use at most this many images, the first by name.

    Raises
    ------
    CodebookError
        If it is none of these or holds no image.
    """
    if limit is not None and limit < 1:
        raise CodebookError(f"limit is {limit}: it must be at least 1")
    source = images if isinstance(images, Source) else _find_images(images)
    if not source.names:
        others = f"; left out: {left_out_words(source.left_out)}" if source.left_out else ""
        raise CodebookError(f"no image in {source.where}: give {', '.join(sorted(SUFFIXES))} files{others}")
    return source if limit is None else replace(source, names=source.names[:limit])


def left_out_words(left_out: Mapping[str, int]) -> str:
    """Kinds and numbers of the pictures that were left out, for a message: `3 .heic, 1 .svg`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))


def _find_images(images: Path | str | Sequence[Path | str]) -> Source:
    if not isinstance(images, (str, Path)):
        files = [Path(path).absolute() for path in images]
        if missing := [path for path in files if not is_file(path)]:
            raise CodebookError(f"no such image: {missing[0]}; check the list")
        root = Path(os.path.commonpath([path.parent for path in files]) if files else "")
        found = Found()
        for path in dict.fromkeys(files):
            found[_own_name(_relative_name(path, root), found)] = partial(_read_picture, path)
        return _source(root, found)
    root = Path(images)
    if is_folder(root):
        if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
            return _data_set(root)
        if (root / "dataset_dict.json").is_file():
            raise CodebookError(f"{root} holds several splits: give the folder of one, such as {root / 'train'}")
        return _folder(root)
    if is_file(root) and root.suffix.lower() == ".tar":
        left_out = Counter[str]()
        return _source(root, dict(_shard(root, "", left_out)), left_out)
    if is_file(root) and root.suffix in (".jsonl", ".ndjson"):
        return _listed(root)
    if is_file(root):
        raise CodebookError(f"cannot take images from {root}: give a folder, a .jsonl list or a .tar shard")
    raise CodebookError(f"no such folder: {root}; give a folder of images, a .jsonl list or a .tar shard")


def _source(root: Path, found: Found, left_out: Mapping[str, int] | None = None) -> Source:
    return Source(str(root), tuple(sorted(found)), lambda name: found[name](), dict(left_out or {}))


def _folder(root: Path) -> Source:
    """Pictures and shards in a folder and those below it; of other pictures only how many there are."""
    found, left_out = Found(), Counter[str]()
    for path in _files_below(root, left_out):
        suffix, name = path.suffix.lower(), _relative_name(path, root)
        if suffix == ".tar" and path.is_file():
            found |= _shard(path, f"{name}/", left_out)
        elif suffix in LEFT_OUT:
            left_out[suffix] += 1
        elif suffix in SUFFIXES and (path.is_file() or path.is_symlink()):  # a broken link is named when it is read
            found[_own_name(name, found)] = partial(_read_picture, path)
        elif suffix in SUFFIXES:
            left_out["that is no regular file"] += 1
        elif path.is_file() and is_picture(_head(path)):
            found[_own_name(name, found)] = partial(_read_picture, path)
    return _source(root, found, left_out)


def _files_below(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """All files in a folder and those below it. Each folder is entered once, by its own name before any link's."""

    def unreadable(error: OSError) -> None:
        left_out["folder that cannot be opened"] += 1

    entered: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        links = []
        for start in waiting:
            for folder, folders, files in os.walk(start, onerror=unreadable):
                here = os.stat(folder)
                if (here.st_dev, here.st_ino) in entered:
                    folders.clear()
                    continue
                entered.add((here.st_dev, here.st_ino))
                folders.sort()
                links += [path for name in folders if (path := Path(folder, name)).is_symlink()]
                yield from (Path(folder, name) for name in sorted(files))
        waiting = sorted(links)


def _read_picture(path: Path) -> bytes:
    """The contents of a picture's file; what a refusal says does not name this machine's folders."""
    try:
        return read_bytes(path, LARGEST_PICTURE)
    except CodebookError as error:
        raise CodebookError(str(error).replace(str(path), "it")) from None


def _head(path: Path) -> bytes:
    """The first bytes of a file, none if it cannot be read."""
    with contextlib.suppress(OSError, CodebookError), open(open_regular(path, LARGEST_PICTURE), "rb") as file:
        return file.read(HEAD)
    return b""


def _listed(path: Path) -> Source:
    remedy = 'write {"image": "file.png"} or "file.png"'
    records = [record for _, record in read_lines(path, remedy, ListedImage | str)]
    names = [record if isinstance(record, str) else record["image"] for record in records]
    return _source(path, {name: partial(_read_picture, path.parent / name) for name in names})


def _shard(shard: Path, before: str, left_out: Counter[str]) -> Found:
    """The pictures of an uncompressed tar file. A shard that breaks off yields what stands before the break."""
    found = Found()
    places: dict[str, tuple[int, int]] = {}
    links: list[tuple[str, str]] = []

    def add(name: str, offset: int, size: int) -> None:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in LEFT_OUT:
            left_out[suffix] += 1
        elif suffix in SUFFIXES or is_picture(_slice(shard, offset, min(size, HEAD))):
            found[_own_name(before + name, found)] = partial(_slice, shard, offset, size)

    try:
        with tarfile.open(shard, "r:") as tar, contextlib.suppress(tarfile.ReadError):
            for member in tar:
                name = _printable(member.name)
                if member.issparse():
                    left_out["sparse member of a tar file"] += 1
                elif member.isreg():
                    places[member.name] = (member.offset_data, member.size)
                    add(name, member.offset_data, member.size)
                elif member.islnk():
                    links.append((member.name, member.linkname))
                elif member.issym():
                    target = os.path.normpath(PurePosixPath(member.name).parent / member.linkname)
                    links.append((member.name, target))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise cannot_read(shard, error, "give uncompressed .tar shards") from None
    for name, target in links:
        if target in places:
            add(_printable(name), *places[target])
        elif PurePosixPath(name).suffix.lower() in SUFFIXES:
            left_out["link to nothing in a tar file"] += 1
    return found


def _slice(shard: Path, offset: int, size: int) -> bytes:
    if size > LARGEST_PICTURE:
        raise CodebookError(f"it has {size:,} bytes: at most {LARGEST_PICTURE:,} are read")
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _data_set(root: Path) -> Source:
    try:
        import datasets
    except ImportError:
        raise CodebookError(f"{root} is a data set of Hugging Face datasets: `{install_command('datasets')}`") from None
    rows: Any = datasets.load_from_disk(str(root))
    column = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise CodebookError(f"{root} has no column of images: cast one to datasets.Image")
    rows = rows.cast_column(column, datasets.Image(decode=False))

    def find(name: str) -> bytes:
        cell = rows[int(name)][column]
        if cell is None:
            raise CodebookError("the row has no image")
        return _read_picture(Path(cell["path"])) if cell["bytes"] is None else cell["bytes"]

    return Source(str(root), tuple(f"{i:08d}" for i in range(len(rows))), find)


def _relative_name(path: Path, root: Path) -> str:
    return _printable(path.relative_to(root).as_posix())


def _own_name(name: str, found: Found) -> str:
    """A picture's name, with a number behind it if another one has it: only contents say what is the same picture.

    A name may stand in a tar file twice, and two files' names may be printed alike.
    """
    number = 1
    while (own := name if number == 1 else f"{name}#{number}") in found:
        number += 1
    return own


def _printable(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 are written as `\\xff`, so that any file can hold it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
