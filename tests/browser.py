"""A headless Chromium, driven over its DevTools protocol: what the tests of pages, and the pictures in docs/, need of it."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START_S = 60.0
KEY_CODES = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27}


class Page:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection, self.calls, self.events = connection, 0, []

    def call(self, method: str, **parameters: Any) -> dict:
        self.calls += 1
        self.connection.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.recv(timeout=60))
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, path: Path, fragment: str = "") -> None:
        """Open a file and wait until it shows its groups."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{path.absolute().as_uri()}{fragment and '#' + fragment}")
        self.wait("performance.getEntriesByName('shown').length")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + 20
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{condition} did not come true"
            time.sleep(0.03)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {"windowsVirtualKeyCode": KEY_CODES[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def resize(self, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        phone = width < 640
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a Chromium that is ended afterwards; it can reach no network."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-dev-shm-usage",
        ]
        nowhere = ["--proxy-server=127.0.0.1:9", "--disable-background-networking"]
        process = subprocess.Popen(
            [CHROMIUM, *flags, *nowhere, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            with connect(_address(process, Path(profile)), max_size=None, proxy=None) as connection:
                page = Page(connection)
                page.call("Page.enable")
                page.call("Runtime.enable")
                page.call("Network.enable")
                yield page
        finally:
            process.terminate()
            process.wait(20)


def _address(process: subprocess.Popen, profile: Path) -> str:
    """Of the first tab, once Chromium has written its port down."""
    deadline, port_file = time.monotonic() + START_S, profile / "DevToolsActivePort"
    while not port_file.is_file() or not port_file.read_text().strip():
        assert process.poll() is None, f"Chromium ended with code {process.returncode}"
        assert time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.05)
    connection = HTTPConnection("127.0.0.1", int(port_file.read_text().split()[0]))
    connection.request("GET", "/json/list")
    tabs = json.loads(connection.getresponse().read())
    return next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
