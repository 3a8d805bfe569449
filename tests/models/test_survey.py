"""Every class of the installed transformers that takes images and writes text: described, to be tested, or refused."""

import re
from pathlib import Path

import pytest
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from codebook.errors import CodebookError
from codebook.models.generic import Untested
from codebook.models.registry import family_of_config
from tests.models.families import FAMILIES
from tests.models.newcomers import NEWCOMERS

TYPES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
DOCS = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", TYPES)
def test_the_documentation_says_what_becomes_of_it(name):
    """By its default config, whose variant may be one that its family refuses."""
    try:
        family = family_of_config(hf.AutoConfig.for_model(name))
    except CodebookError as error:
        assert re.fullmatch(rf"(?!.*\n).*{name}.*[;:] .*\buse .*", str(error))
    else:
        assert family.name == name and (isinstance(family, Untested) or name in FAMILIES)
    assert f"`{name}`" in DOCS


def test_those_that_pass_the_test_are_known_by_no_file():
    assert not NEWCOMERS.keys() & FAMILIES.keys()
    assert all(isinstance(family_of_config(tiny.config()), Untested) for tiny in NEWCOMERS.values())
