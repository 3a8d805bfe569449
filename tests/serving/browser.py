"""A headless Chromium, driven over its DevTools pipe by the standard library alone."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Path of the browser; None if there is none."""
PATIENCE = 60.0
"""Seconds to wait for an answer of the browser, and for a page to come to what is waited for."""


class Browser:
    """One tab of a browser; a context manager.

    Attributes
    ----------
    messages : list[str]
        What the console got: of scripts, of the browser's own log, and errors that no script caught.
    """

    def __init__(self, width=1280, height=900, *, dark=False, mobile=False, scale=1):
        self.messages = []
        self._numbers, self._answers, self._closing = itertools.count(1), {}, contextlib.ExitStack()
        self._arrived = threading.Condition()
        profile = self._closing.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        command = [CHROMIUM, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox",
                   "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
                   "--disable-background-networking", "--disable-component-update", "--no-proxy-server",
                   "about:blank"]  # fmt: skip

        def pipes():  # the browser reads from descriptor 3 and writes to 4
            copies = os.dup(there), os.dup(back)
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=pipes, close_fds=False, **quiet)
        os.close(there)
        os.close(back)
        threading.Thread(target=self._listen, daemon=True).start()
        self._session = None
        [target] = [one for one in self._send("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        found = self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        self._closing.close()

    def open(self, url):
        self._send("Page.navigate", url=url)

    def run(self, code):
        """The value of a JavaScript expression, promises awaited."""
        found = self._send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not within {PATIENCE} s: {condition}; console: {self.messages}"
            time.sleep(0.05)

    def key(self, key, text=None):
        """Press a key, such as `Tab`, `ArrowRight` or `Enter`."""
        codes = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}
        text = text or {"Enter": "\r", " ": " "}.get(key)
        pressed = {"key": key, "windowsVirtualKeyCode": codes[key], **({"text": text} if text else {})}
        self._send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **pressed)
        self._send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=codes[key])

    def type(self, text):
        self._send("Input.insertText", text=text)

    def picture(self):
        """A PNG of the whole page."""
        return base64.b64decode(self._send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _send(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        with self._arrived:
            assert self._arrived.wait_for(lambda: number in self._answers, PATIENCE), f"no answer to {method}"
            answer = self._answers.pop(number)
        assert "error" not in answer, answer
        return answer["result"]

    def _listen(self):
        parts = deque()
        with open(self._read, "rb", buffering=0) as pipe:
            while data := pipe.read(65536):
                *whole, rest = data.split(b"\0")
                for piece in whole:
                    self._take(json.loads(b"".join(parts) + piece))
                    parts.clear()
                parts.append(rest)

    def _take(self, message):
        params = message.get("params", {})
        if message.get("method") == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))
        elif message.get("method") == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.messages.append(params["exceptionDetails"]["text"])
        elif "id" in message:
            with self._arrived:
                self._answers[message["id"]] = message
                self._arrived.notify_all()
