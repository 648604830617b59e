"""A headless Chromium over the DevTools protocol: what a test needs to use a page as people do."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Where pictures for the documentation are written to: APB_PICTURES=docs/images
PICTURES = os.environ.get("APB_PICTURES")
# Key codes of keys that are no characters, and the text that they write.
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "Escape": (27, "")}
_SHIFT = 8


class Browser:
    """One tab.

    Attributes:
        asked: addresses of all requests that pages have made.
        broken: what pages have reported as errors: exceptions, and what the browser refused to do.
    """

    def __init__(self, folder: Path) -> None:
        from websockets.sync.client import connect

        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        line = next(line for line in self._process.stderr if "DevTools listening on" in line)
        self._open = ExitStack()
        self._socket = self._open.enter_context(connect(line.split()[-1], max_size=None))
        self._session: str | None = None
        self._count = 0
        self.asked: list[str] = []
        self.broken: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._open.close()
        self._process.terminate()
        self._process.wait(20)

    def send(self, method: str, **params: Any) -> Any:
        """A command's result."""
        self._count += 1
        session = {} if self._session is None else {"sessionId": self._session}
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params, **session}))
        while True:
            message = json.loads(self._socket.recv(60))
            self._take(message)
            if message.get("id") == self._count:
                assert "error" not in message, (method, message)
                return message["result"]

    def _take(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.broken.append(json.dumps(params["exceptionDetails"])[:500])
        elif message.get("method") == "Log.entryAdded" and params["entry"]["source"] in ("security", "javascript"):
            self.broken.append(params["entry"]["text"])

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, (expression, done["exceptionDetails"])
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> Any:
        """Wait until an expression is true in the page; its value."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"{expression} did not come true; the page reads:\n{self.text('body')}"
            time.sleep(0.03)
        return value

    def open(self, address: str) -> None:
        self.send("Page.navigate", url="about:blank")  # from the same page with another fragment it would not load
        self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && document.body.dataset.ready !== undefined")

    def text(self, selector: str) -> str:
        """The visible text of an element; "" if there is none."""
        return str(self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element, wherever it is scrolled to."""
        place = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Type, or paste, into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key."""
        code, text = _KEYS[key]
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": _SHIFT if shift else 0}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def give(self, selector: str, file: Path) -> None:
        """Choose a file in an input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """The window, in CSS pixels, and the pixels of the screen for each."""
        values = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **values)

    def prefers(self, scheme: str) -> None:
        """Light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def picture(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def keep(self, name: str, *schemes: str) -> None:
        """Keep a picture for the documentation in each scheme (light, dark), if pictures are asked for."""
        if PICTURES is None:
            return
        from PIL import Image

        self.send("Emulation.setScrollbarsHidden", hidden=True)
        for scheme in schemes:
            self.prefers(scheme)
            with Image.open(io.BytesIO(self.picture())) as image:
                image.convert("RGB").quantize(96).save(Path(PICTURES, f"{name}-{scheme}.png"), optimize=True)
        self.prefers("light")
