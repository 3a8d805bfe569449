"""Where training images come from: a folder, a list of files, tar shards, or a saved data set."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps

from codebook.errors import CodebookError
from codebook.store.files import read_lines

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class Source:
    """Images by name, in a fixed order.

    Attributes
    ----------
    where
        The place that was opened, for messages.
    stamps
        For each image's name, in sorted order, what distinguishes it from another image of the same name: its size in
        bytes, -1 if there is no such file, or its data set's fingerprint.
    find
        Function from an image's name to its file, or to its bytes.
    """

    where: str
    stamps: dict[str, Any]
    find: Callable[[str], Path | BinaryIO]

    def read(self, name: str) -> Image.Image:
        """The image as RGB, upright; damaged files make PIL's decoders raise nearly anything."""
        with Image.open(self.find(name)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")


Images = Source | Path | str | Sequence[Path | str]


def open_images(images: Images, limit: int | None = None) -> Source:
    """Find out what `images` is, and list what it holds; no image is read yet.

    Parameters
    ----------
    images
        A folder, searched recursively; a list of files; a JSONL file of paths relative to it, each line a string or
        an object with `image`; a `.tar` shard, or a folder of shards (WebDataset); a folder written by `save_to_disk`
        of Hugging Face `datasets`; or what this function returned before.
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
    if not source.stamps:
        raise CodebookError(f"no image in {source.where}: give {', '.join(sorted(SUFFIXES))} files")
    ordered = sorted(source.stamps.items())
    return Source(source.where, dict(islice(ordered, limit)), source.find)


def _find_images(images: Path | str | Sequence[Path | str]) -> Source:
    if not isinstance(images, (str, Path)):
        files = [Path(path).absolute() for path in images]
        if missing := [path for path in files if not path.is_file()]:
            raise CodebookError(f"no such image: {missing[0]}; check the list")
        return _files(_common([path.parent for path in files]), files)
    root = Path(images)
    if root.is_dir():
        if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
            return _data_set(root)
        if (root / "dataset_dict.json").is_file():
            raise CodebookError(f"{root} holds several splits: give the folder of one, such as {root / 'train'}")
        files = [path for path in root.rglob("*") if path.is_file()]
        pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
        shards = sorted(path for path in files if path.suffix == ".tar")
        return _shards(root, shards) if shards and not pictures else _files(root, pictures)
    if root.is_file() and root.suffix == ".tar":
        return _shards(root, [root])
    if root.is_file() and root.suffix in (".jsonl", ".ndjson"):
        return _listed(root)
    if root.is_file():
        raise CodebookError(f"cannot take images from {root}: give a folder, a .jsonl list or a .tar shard")
    raise CodebookError(f"no such folder: {root}; give a folder of images, a .jsonl list or a .tar shard")


def _files(root: Path, files: Sequence[Path]) -> Source:
    stamps = {path.relative_to(root).as_posix(): _size(path) for path in files}
    return Source(str(root), stamps, lambda name: root / name)


def _listed(path: Path) -> Source:
    stamps = {}
    for number, record in read_lines(path, "give a JSONL file"):
        name = record.get("image") if isinstance(record, dict) else record
        if not isinstance(name, str):
            raise CodebookError(f'{path}, line {number}: write {{"image": "file.png"}} or "file.png"')
        stamps[name] = _size(path.parent / name)
    return Source(str(path), stamps, lambda name: path.parent / name)


def _shards(root: Path, shards: list[Path]) -> Source:
    """Uncompressed tar files. A shard that breaks off yields what stands before the break."""
    places: dict[str, tuple[Path, int, int]] = {}
    for shard in shards:
        before = "" if shard == root else f"{shard.relative_to(root).as_posix()}/"
        try:
            with tarfile.open(shard, "r:") as tar:
                try:
                    for member in tar:
                        if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                            places[before + member.name] = (shard, member.offset_data, member.size)
                except tarfile.ReadError:
                    pass
        except (tarfile.ReadError, OSError) as error:
            raise CodebookError(f"cannot read {shard}: {error}; give uncompressed .tar shards") from None

    def find(name: str) -> BinaryIO:
        shard, offset, size = places[name]
        with shard.open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    return Source(str(root), {name: size for name, (_, _, size) in places.items()}, find)


def _data_set(root: Path) -> Source:
    try:
        import datasets
    except ImportError:
        raise CodebookError(
            f"{root} is a data set of Hugging Face datasets: `pip install codebook[datasets]`"
        ) from None
    rows: Any = datasets.load_from_disk(str(root))
    column = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise CodebookError(f"{root} has no column of images: cast one to datasets.Image")
    rows = rows.cast_column(column, datasets.Image(decode=False))

    def find(name: str) -> Path | BinaryIO:
        cell = rows[int(name)][column]
        return Path(cell["path"]) if cell["bytes"] is None else io.BytesIO(cell["bytes"])

    return Source(str(root), {f"{i:08d}": rows._fingerprint for i in range(len(rows))}, find)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # reading it will tell


def _common(folders: list[Path]) -> Path:
    common = folders[0] if folders else Path()
    while not all(folder.is_relative_to(common) for folder in folders):
        common = common.parent
    return common
