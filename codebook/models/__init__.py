"""Stock transformers models: loading them, and the little that differs between families."""

from codebook.models.base import Family, Model, Processor
from codebook.models.encoded import Encoded
from codebook.models.fingerprint import (
    adapter_words,
    codebook_stamp,
    decoder_fingerprint,
    fingerprint,
    identities,
    identity,
    processor_digest,
    same_fingerprint,
    weights_stamp,
    whole_fingerprint,
)
from codebook.models.layout import KINDS, Grid, Image, Layout, whole_images_error
from codebook.models.loading import SHIPPED_MODELS, check_device, load
from codebook.models.registry import FAMILIES, check_model, family
from codebook.models.shape import Shape, is_recurrent, shape
from codebook.models.trial import Report
from codebook.models.wrappers import unwrap

__all__ = [
    "FAMILIES",
    "KINDS",
    "SHIPPED_MODELS",
    "Encoded",
    "Family",
    "Grid",
    "Image",
    "Layout",
    "Model",
    "Processor",
    "Report",
    "Shape",
    "adapter_words",
    "check_device",
    "check_model",
    "codebook_stamp",
    "decoder_fingerprint",
    "family",
    "fingerprint",
    "identities",
    "identity",
    "is_recurrent",
    "load",
    "processor_digest",
    "same_fingerprint",
    "shape",
    "unwrap",
    "weights_stamp",
    "whole_fingerprint",
    "whole_images_error",
]
