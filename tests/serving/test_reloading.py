"""Codebooks read anew on SIGHUP, in the process that `codebook serve` is, under load."""

import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from codebook import Client
from tests.store.books import make, tokens

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")


@pytest.fixture
def process(tmp_path):
    """A service of the codebook in tmp_path/book, its client, and the lines that it says."""
    make(seed=0).save(tmp_path / "book")
    command = [sys.executable, "-m", "codebook.cli", "serve", "--codebook", f"small={tmp_path / 'book'}", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            greeting = process.stderr.readline()
            [address] = re.findall(r"http://127\.0\.0\.1:\d+", greeting)
            yield process, Client(address, timeout=30)
        finally:
            process.terminate()
    assert process.returncode == 0


def test_no_request_is_dropped_and_none_is_half_of_each(process, tmp_path):
    running, client = process
    features, asked, over = tokens(), [], threading.Event()
    expected = [make(seed=seed).redundancy(features) for seed in (0, 1)]

    def ask():
        while not over.is_set():
            asked.append(client.score("small", features, 0.5).redundancy)

    with ThreadPoolExecutor(4) as clients:
        loads = [clients.submit(ask) for _ in range(4)]
        try:
            for seed in (1, 0, 1, 0, 1):
                make(seed=seed).save(tmp_path / "book")
                running.send_signal(signal.SIGHUP)
                assert running.stderr.readline() == "codebooks read again: small\n"
                assert torch.equal(client.score("small", features).redundancy, expected[seed])
            config = tmp_path / "book" / "config.json"
            config.write_text(config.read_text().replace('"dimension": 16', '"dimension": 17'))
            running.send_signal(signal.SIGHUP)
            said = running.stderr.readline()
            assert said.startswith("the codebooks stay as they were: ") and "(50, 17)" in said
            assert torch.equal(client.score("small", features).redundancy, expected[1])
        finally:
            over.set()
    assert not [error for load in loads if (error := load.exception())]
    assert len(asked) > 20
    found = [[torch.equal(scores, one) for one in expected] for scores in asked]
    assert all(any(which) for which in found) and all(any(which) for which in zip(*found, strict=True))
