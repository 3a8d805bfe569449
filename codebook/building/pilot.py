"""A pilot: thresholds for a model that none are published for, from every probe on a few of its images."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from codebook.building.cascade import divergence
from codebook.building.presets import Settings
from codebook.errors import CodebookError, counted

QUANTILES = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Shares of the isolated tokens below the values that a pilot reports."""
QUANTILES_SAID = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
"""Those of them that fit into one line."""
DIGITS = 4
"""Significant digits of a threshold."""
LEAST_TAU = 1e-12
"""The threshold above a divergence of zero."""


@dataclass(frozen=True)
class Pilot:
    """What a pilot is to do.

    Attributes
    ----------
    images
        How many images it probes, on every candidate token.
    select
        The share of the probed tokens that is to pass isolation and both thresholds. Default: the published funnel of
        LLaVA-1.5-7B, where 1 383 of 48 000 do.
    """

    images: int = 32
    select: float = 0.03

    def __post_init__(self) -> None:
        if self.images < 1:
            raise CodebookError(f"pilot is {self.images}: it must be at least 1 image")
        if not 0 < self.select <= 1:
            raise CodebookError(f"select is {self.select}: a share above 0 and at most 1 is needed")


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Names in an order that depends on them and the seed alone.

    The first names of a folder are often alike, such as one class of pictures: any start of this order is a sample.
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())


def choose_thresholds(
    settings: Settings, pilot: Pilot, images: Sequence[Sequence[dict[str, Any]]]
) -> tuple[Settings, dict[str, Any]]:
    """The settings with the thresholds that were left open, and the report of how they were found.

    An open threshold is the same quantile of its value among isolated tokens as the other one: the lowest quantile at
    which the share `select` of all probed tokens is isolated and below both. It is rounded up to four digits, so tokens
    with the same values pass or fail together.

    Parameters
    ----------
    images
        For each image of the pilot the records of its probed tokens, with `cluster_size`.

    Returns
    -------
    settings
        Without open thresholds.
    report
        The entry `pilot` of `config.json`; see `docs/format.md`.

    Raises
    ------
    CodebookError
        If no thresholds let a token pass; it says what to change.
    """
    tokens = [token for image in images for token in image]
    isolated = [token for token in tokens if token["cluster_size"] <= settings.max_cluster_size]
    if not isolated:
        raise CodebookError(
            f"pilot: none of {counted(len(tokens), 'token')} is isolated in its image: raise max_cluster_size (now "
            f"{settings.max_cluster_size}) or clusters_per_image (now {settings.clusters_per_image})"
        )
    values = {
        "tau_p": [token["p1"] for token in isolated],
        "tau_j": [divergence(token, settings.global_weight) for token in isolated],
    }
    free, given = settings.free, {name: tau for name in values if (tau := getattr(settings, name)) is not None}
    order = {name: sorted(column) for name, column in values.items()}
    possible = [
        i for i in range(len(isolated))
        if values["tau_p"][i] < 1 and all(values[name][i] < tau for name, tau in given.items())
    ]  # fmt: skip
    if not possible:
        raise CodebookError(_none_possible(values, given))
    # the quantile that both open thresholds need for a token to pass
    needed = sorted(max(bisect_right(order[name], values[name][i]) for name in free) for i in possible)
    rank = needed[min(max(round(pilot.select * len(tokens)), 1), len(needed)) - 1]
    taus: dict[str, Any] = {name: _above(order[name][rank - 1]) for name in free}
    taus = {name: min(tau, 1.0) if name == "tau_p" else tau for name, tau in taus.items()}
    chosen = replace(settings, **taus)
    passed = sum(
        p1 < chosen.tau_p and jsd < chosen.tau_j for p1, jsd in zip(values["tau_p"], values["tau_j"], strict=True)
    )
    return chosen, {
        "images": pilot.images, "select": pilot.select, "chosen": free, "read": len(images), "probed": len(tokens),
        "isolated": len(isolated), "passed": passed, "quantile": round(rank / len(isolated), 4),
        "p1": quantiles(order["tau_p"]), "jsd": quantiles(order["tau_j"]),
    }  # fmt: skip


def quantiles(order: Sequence[float]) -> list[list[float]]:
    """For each of `QUANTILES` the share and the lowest of the sorted values that is not below it."""
    return [[share, float(f"{order[max(math.ceil(share * len(order)), 1) - 1]:.{DIGITS}g}")] for share in QUANTILES]


def words(settings: Settings, report: dict[str, Any]) -> str:
    """A pilot's result in one line."""
    share, wanted = report["passed"] / report["probed"], max(1, round(report["select"] * report["probed"]))
    taus = " and ".join(f"{name} {getattr(settings, name):.{DIGITS}g}" for name in report["chosen"])
    line = (
        f"pilot: {taus}: {report['passed']} of {report['probed']} tokens of {report['read']} images pass "
        f"({share:.1%}), {report['isolated']} are isolated"
    )
    if report["passed"] > 2 * wanted:
        line += f"; that is more than {report['select']:.1%}, because many tokens have the same values"
    if report["passed"] < wanted / 2:
        line += f"; no thresholds let {report['select']:.1%} pass"
    return line


def quantile_words(report: dict[str, Any]) -> str:
    """The distribution that a pilot saw, in one line."""
    parts = []
    for name, title in (("p1", "P1"), ("jsd", "JSD")):
        found = ", ".join(f"{share:.0%} {value:.3g}" for share, value in report[name] if share in QUANTILES_SAID)
        parts.append(f"{title} {found}")
    return f"pilot: quantiles of isolated tokens: {'; '.join(parts)}"


def _above(value: float) -> float:
    """The lowest number of four significant digits above a value of at least 0."""
    if value <= 0:
        return LEAST_TAU
    unit = 10.0 ** (math.floor(math.log10(value)) - DIGITS + 1)
    up = float(f"{(math.floor(value / unit) + 1) * unit:.{DIGITS}g}")
    return up if up > value else float(f"{(math.floor(value / unit) + 2) * unit:.{DIGITS}g}")


def _none_possible(values: dict[str, list[float]], given: dict[str, float]) -> str:
    for name, tau in given.items():
        if all(value >= tau for value in values[name]):
            return f"pilot: no isolated token is below {name} {tau:g}, the lowest is {min(values[name]):.3g}: raise it"
    if min(values["tau_p"]) >= 1:
        return (
            "pilot: alone, every token gets the same answer with certainty (P1 is 1), so none is redundant: give "
            "another prompt"
        )
    return "pilot: no isolated token is below the given threshold and has a P1 below 1: raise it"
