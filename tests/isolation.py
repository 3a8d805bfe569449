"""Importing this keeps tests from the Hugging Face Hub, and from what their developer has fetched from there.

The hub's client reads its environment when it is imported; processes that tests start inherit it. At the address that
it is given nobody listens but the server of `tests.hub`, while a test needs it.
"""

import os
import socket
import tempfile

RESERVED = socket.socket()
RESERVED.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
RESERVED.bind(("127.0.0.1", 0))
HOME = tempfile.TemporaryDirectory()

for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{RESERVED.getsockname()[1]}"
os.environ["HF_HOME"] = HOME.name
os.environ["HF_HUB_DISABLE_XET"] = "1"
