"""Builds into folders, and the bytes of what they hold."""

import pathlib

import pytest

from codebook.building import build
from tests.building.tiny import settings

ROOT = pathlib.Path(__file__).parents[2]


def run(tiny, images, out, **options):
    return build(*tiny, images, out, model_id="tiny", **{"settings": settings()} | options)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt(tiny, images, out, at=2, **options):
    def stop(state):
        if state.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, images, out, progress=stop, **options)
