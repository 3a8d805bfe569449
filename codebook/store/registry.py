"""The registry that ships, `indexes/registry.json`: codebooks that are fetched by name.

Each file is known by its address at a full commit, its size and its SHA-256, so that what is fetched is what was
reviewed when the entry was taken. Importing this module does not import torch.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from codebook.errors import CodebookError
from codebook.store.folder import CONFIG, PROTOTYPES, PROVENANCE
from codebook.store.parsing import fault_words
from codebook.store.reading import read_whole

REGISTRY = "registry.json"
LARGEST_DOWNLOAD = 2**32
"""Bytes of all files of a codebook that are fetched."""

ADDRESS = re.compile(r"https://[a-z0-9.-]+(/[\w.~+-]+)+")
"""Form of an address: no user, no port, no query, nothing to be decoded."""

CONVERTERS: dict[str, frozenset[str]] = {
    "released": frozenset({"tensor", "images"}),
    "folder": frozenset({CONFIG, PROTOTYPES, PROVENANCE}),
}
"""Names of an entry's files, by how a codebook is made of them: from the authors' format, or as it is."""

ShortName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
ModelName = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$")]
PrintableLine = Annotated[str, StringConstraints(pattern=r"^[ -~]{1,300}$")]
"""Printable characters of ASCII, as they may stand in a model card."""


class RegistryFile(BaseModel):
    """One file of an entry."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str
    size: int = Field(ge=1, le=LARGEST_DOWNLOAD)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class RegistryEntry(BaseModel):
    """One codebook that can be fetched.

    Attributes
    ----------
    name
        What users call it.
    models
        Models on the Hugging Face Hub whose tower and projector it was built for.
    prototypes, dimension
        What is made of the files must have them.
    fingerprint
        Fingerprint of tower and projector; null if it is not known.
    source, revision
        Public page of the repository that it comes from, and its commit.
    licence
        SPDX identifier in small letters, as the Hugging Face Hub has it.
    images
        A line about the images that it was built from, and about their licence.
    converter, files
        A key of `CONVERTERS`, and the files that it needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: ShortName
    models: list[ModelName] = Field(min_length=1)
    prototypes: int = Field(ge=1)
    dimension: int = Field(ge=1)
    fingerprint: str | None = None
    source: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    licence: ShortName
    images: PrintableLine
    converter: Literal["released", "folder"]
    files: dict[str, RegistryFile]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        needed = CONVERTERS[self.converter]
        if set(self.files) != needed:
            raise ValueError(f"files must be {', '.join(sorted(needed))} for the converter {self.converter}")
        for address in (self.source, *(file.url for file in self.files.values())):
            if not ADDRESS.fullmatch(address) or {".", ".."} & set(address.split("/")):
                raise ValueError(f"{address[:100]!r} must be a plain https address")
        for file in self.files.values():
            if self.revision not in file.url.split("/"):
                raise ValueError(f"{file.url[:200]!r} must name the commit {self.revision}")
        if sum(file.size for file in self.files.values()) > LARGEST_DOWNLOAD:
            raise ValueError(f"the files have more than {LARGEST_DOWNLOAD:,} bytes")
        return self


class Registry(BaseModel):
    """Contents of `indexes/registry.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    codebooks: list[RegistryEntry]

    @model_validator(mode="after")
    def _differ(self) -> Self:
        for what, found in (
            ("name", [entry.name for entry in self.codebooks]),
            ("model", [model.lower() for entry in self.codebooks for model in entry.models]),
        ):
            if twice := {one for one in found if found.count(one) > 1}:
                raise ValueError(f"the {what} {min(twice)} has two entries")
        return self


def index_folder() -> Path:
    """Folder of what ships: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "indexes"
    return inside if inside.is_dir() else package.parent / "indexes"


@cache
def read_registry() -> tuple[RegistryEntry, ...]:
    """The entries of the registry.

    Raises
    ------
    CodebookError
        If the file is missing or an entry is not as it must be.
    """
    path = index_folder() / REGISTRY
    try:
        found = Registry.model_validate_json(read_whole(path, "install the package again"))
    except ValidationError as error:
        raise CodebookError(f"cannot read {path}: {fault_words(error)}; see CONTRIBUTING.md, A codebook") from None
    return tuple(found.codebooks)


def entry_named(name: str) -> RegistryEntry | None:
    """The entry of that name, if there is one."""
    return next((entry for entry in read_registry() if entry.name == name), None)


def entry_for(model: str) -> RegistryEntry | None:
    """The entry for a model, by its name on the Hugging Face Hub, if there is one."""
    return next((entry for entry in read_registry() if model.lower() in map(str.lower, entry.models)), None)
