"""The thinkers of Qwen2.5-Omni and Qwen3-Omni, which answer in text: Qwen-VL beside whose images audio can stand.

Tokens of audio are text to pruning, and always kept.
"""

from __future__ import annotations

from codebook.models.qwen2_vl import Qwen25VL
from codebook.models.qwen3_vl import Qwen3VL


class Qwen25OmniThinker(Qwen25VL):
    name = "qwen2_5_omni_thinker"
    since = "5.23"


class Qwen3OmniMoeThinker(Qwen3VL):
    name = "qwen3_omni_moe_thinker"
    since = "5.23"
