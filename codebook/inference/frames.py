"""Which frames of a clip a model is shown: those that its own processor would take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from codebook.models import Family
from codebook.models.base import Processor
from codebook.models.loading import load_processor
from codebook.store.clips import MOST_FRAMES, ClipInfo, FrameRule
from codebook.store.pictures import even_frames

FEWEST_FRAMES = 4
"""Fewest frames at a family's own rate, as in Qwen's processors."""


def frame_rule(family: Family, processor: Processor) -> FrameRule:
    """The rule of a model's processor, if that has one; else the family's frames per second, or 8 evenly spaced.

    Processors of LLaVA-OneVision have none, those of Qwen3-VL and SmolVLM take frames per second, InternVL's a number.
    A clip that has fewer frames than that is shown whole.
    """
    own = getattr(processor, "video_processor", None)
    if getattr(own, "num_frames", None) is not None or getattr(own, "fps", None) is not None:
        return partial(_as_processed, own)
    if (fps := family.clip_fps) is not None:
        return partial(_at_rate, fps)
    return even_frames


def frame_rule_of(name: str, **options: Any) -> FrameRule:
    """The same for a model that is not loaded yet: its processor is, once the first clip asks.

    Parameters
    ----------
    name, **options
        As `codebook.load` takes them, for the very processor that it gives.
    """
    found = cache(lambda: frame_rule(*load_processor(name, **options)))
    return lambda clip: found()(clip)


def _as_processed(own: Any, clip: ClipInfo) -> Sequence[int]:
    from transformers.video_utils import VideoMetadata

    about = VideoMetadata(clip.frames, clip.fps, clip.width, clip.height, clip.duration)
    try:
        return [int(number) for number in own.sample_frames(metadata=about)]
    except ValueError:  # it asks for more frames than there are
        return range(clip.frames)


def _at_rate(fps: float, clip: ClipInfo) -> Sequence[int]:
    """So many frames per second from the first frame on, an even number: qwen-vl-utils, and Qwen2-VL's processor."""
    wanted = min(max(int(clip.duration * fps), FEWEST_FRAMES), MOST_FRAMES, clip.frames)
    count = max(1, wanted // 2 * 2)
    return [i * clip.frames // count for i in range(count)]
