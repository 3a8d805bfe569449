from codebook.building import build as build
from codebook.errors import CodebookError as CodebookError
from codebook.inference.ask import ask as ask
from codebook.models import check_model as check_model
from codebook.models import load as load
from codebook.pruning import *  # noqa: F403
from codebook.serving.client import Client as Client
from codebook.store.codebook import Codebook as Codebook
from codebook.store.shipped import prebuilt as prebuilt

__version__: str
