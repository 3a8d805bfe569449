"""Journals of a build: what they say of every image, and what a whole one comes to."""

from __future__ import annotations

import json
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from codebook.building.pool import STEPS, SurvivorPool
from codebook.building.sources import GONE
from codebook.errors import CodebookError
from codebook.store.folder import Count, TokenRecord
from codebook.store.journal import Journal

IMAGES_JOURNAL, PILOT_JOURNAL = "journal.sqlite", "pilot.sqlite"
PILOT_CHOSEN = "chosen"
"""Record of a pilot's journal with the digests of its images, once all are probed; the others' names are digests."""

Funnel = TypedDict("Funnel", dict.fromkeys(STEPS[:-1], Count))  # type: ignore[misc]


class ProbedToken(TokenRecord):
    """What every probe said of a token, and the size of its cluster in its image."""

    cluster_size: Count


class ProbedRecord(TypedDict):
    """What the journal of a build says of an image."""

    tokens: list[TokenRecord]
    funnel: Funnel
    spread: float
    probes: NotRequired[list[ProbedToken]]


class PilotImage(TypedDict):
    """What the journal of a pilot says of an image."""

    funnel: Funnel
    probes: list[ProbedToken]


class PilotChosen(TypedDict):
    """The digests of a pilot's images: its choice stands, whatever images there are when the build goes on."""

    digests: list[str]


PROBED, PILOT = TypeAdapter(ProbedRecord), TypeAdapter(PilotImage | PilotChosen)
"""Records of the two journals."""


def pooled(journal: Journal, stamps: dict[str, str], probed: dict[str, str], errors: dict[str, str]) -> SurvivorPool:
    """What all images of the source yielded; of those that were not probed, only that they are known."""
    images: dict[str, dict[str, Any]] = {
        name: {"stamp": stamp, "duplicate": ""} for name, stamp in stamps.items() if stamp != GONE
    }
    owners = []
    for name, stamp in probed.items():
        if name in errors:
            images[name] = {"stamp": stamp, "error": errors[name]}
        else:
            images[name] = {"stamp": stamp, **{k: journal[stamp][k] for k in ("funnel", "spread")}}
            owners += [name] if journal[stamp]["tokens"] else []
    rows = [{"image": name, **token} for name in owners for token in journal[stamps[name]]["tokens"]]
    features, start = torch.empty(0), 0
    for name in owners:  # into one tensor: all parts and their concatenation would be twice the memory
        part = journal.tensor(stamps[name])
        if not start:
            features = torch.empty(len(rows), part.shape[-1])
        if part.shape != (len(journal[stamps[name]]["tokens"]), features.shape[1]):
            raise CodebookError(f"{journal.file} is damaged: delete it and run again")
        features[start : start + len(part)] = part
        start += len(part)
    return SurvivorPool(images, features, rows)


def probe_lines(journal: Journal, probed: dict[str, str]) -> bytes:
    """What an exhaustive run said of every token, as JSON lines."""
    found = [(name, journal[stamp]) for name, stamp in probed.items() if stamp in journal]
    lines = [{"image": name, **row} for name, record in found for row in record.get("probes", ())]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()
