"""The model card of a codebook: the README.md of its folder, which the Hugging Face Hub shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from codebook.errors import CodebookError, printable, quoted
from codebook.store.reading import is_folder

SHEET = "sheet.png"
"""Picture of the tokens behind the prototypes, which a card shows."""
HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w(?:[\w.-]{0,94}\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
"""Form of a repository's name on the Hugging Face Hub, with its owner, as the hub's client takes it."""
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
NO_LICENCE = "unknown"
"""What the Hugging Face Hub calls a licence that is not known."""
CELL = 300
"""Most characters of a value that a card shows."""
PAPER = "https://arxiv.org/abs/2503.20540"


def make_card(config: dict[str, Any], licence: str | None = None, figures: str = "", sheet: bool = False) -> str:
    """A codebook's card, with the YAML front matter of the Hugging Face Hub.

    Parameters
    ----------
    config
        Contents of `config.json`.
    licence
        Licence of the codebook, in the Hub's words, such as apache-2.0; default: the one that the config says.
    figures
        What was measured with it, as Markdown.
    sheet
        Whether a picture of the tokens behind the prototypes, `sheet.png`, lies beside the card.

    Raises
    ------
    CodebookError
        If the licence is no identifier.
    """
    chosen = licence or config.get("licence", NO_LICENCE)
    if not LICENCE.fullmatch(chosen):
        raise CodebookError(f"the licence {quoted(chosen)} is none that the Hub knows: write it as in apache-2.0, mit")
    model = config["model"]
    lines = ["---", "library_name: codebook", f"license: {chosen}"]
    if HUB_NAME.fullmatch(model) and not is_folder(Path(model)):
        lines.append(f"base_model: {model}")
    lines += [
        "tags:", "- visual-token-pruning", "- vision-language-model", "---",
        f"# Redundancy codebook for {_quoted_text(model)}",
        "",
        f"{config['prototypes']} prototypes of dimension {config['dimension']}: projector outputs that were redundant "
        f"in the images they come from and recur across images ({PAPER}). Visual tokens most like them are pruned "
        "first.",
        "",
        "```python",
        "from codebook import Codebook",
        "",
        "book = Codebook.from_pretrained(name)  # of this folder, or of its repository",
        "scores = book.redundancy(tokens)  # prune the highest",
        "```",
        "",
        _about_images(config),
    ]  # fmt: skip
    if "source" in config:
        lines += ["", f"Source: {_quoted_text(config['source'])}."]
    if funnel := config.get("funnel"):
        lines += ["", "Tokens left after each step of the build:", "", *_table(("step", "tokens"), funnel)]
    lines += _about_build(config)
    if settings := config.get("settings"):
        lines += ["", "Thresholds and other settings:", "", *_table(("setting", "value"), settings)]
    if figures:
        lines += ["", "## Figures", "", figures.strip()]
    if sheet:
        lines += ["", "## Where the prototypes come from", "", f"![tokens behind the prototypes]({SHEET})"]
    return "\n".join(lines) + "\n"


def _about_build(config: dict[str, Any]) -> list[str]:
    """What a build found out about itself: its thresholds by a pilot, and how the codebook settled."""
    lines = []
    if pilot := config.get("pilot"):
        taus = " and ".join(f"`{name}` {config['settings'][name]:.4g}" for name in pilot["chosen"])
        lines += [
            "",
            f"A pilot on {pilot['read']} images found {taus}: {pilot['passed']} of {pilot['probed']} probed tokens "
            "pass (`pilot.png`).",
        ]
    if stability := config.get("stability"):
        rows = (f"| {p['images']} | {p['prototypes']} | {p.get('agreement', '')} |" for p in stability["curve"])
        lines += [
            "",
            f"Agreement of the codebooks of n and 2n images on {stability['set_aside']} images set aside "
            "(`stability.png`):",
            "",
            *("| images | prototypes | agreement |", "|---|---|---|", *rows),
        ]
    return lines


def _about_images(config: dict[str, Any]) -> str:
    """What the card says of the images: how many, and that their licence is their own."""
    if "about_images" in config:
        return f"Built from {_quoted_text(config['about_images'])}."
    count = config.get("images", {}).get("used")
    return (
        f"Built from {'images' if count is None else f'{count} images'}, which are not part of it: `provenance.jsonl` "
        "names them. Their licence is not known here; ask whoever built it."
    )


def _table(head: tuple[str, str], rows: dict[str, Any]) -> list[str]:
    shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in rows.items()}
    return [
        f"| {' | '.join(head)} |",
        "|---|---|",
        *(f"| {_quoted_text(k)} | {_quoted_text(v)} |" for k, v in shown.items()),
    ]


def _quoted_text(text: str) -> str:
    """A text from a config as part of a line of Markdown: it may come from anyone."""
    return re.sub(r"([|`<>\[\]])", r"\\\1", printable(text, CELL))
