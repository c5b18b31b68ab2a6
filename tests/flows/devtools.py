"""A headless Chromium, spoken to by the DevTools protocol: pages, keys, colours and what the console said."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

from websockets.sync.client import ClientConnection, connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PATIENCE = 60.0  # seconds


def found_browser() -> str | None:
    """The browser's command: DELTAWORKS_BROWSER, or the first that is installed under a usual name."""
    named = os.environ.get("DELTAWORKS_BROWSER")
    return named or next((path for name in _NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. `errors`: what its console said was wrong."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._socket.recv(timeout=_PATIENCE))
            if told.get("id") == number:
                assert "error" not in told, (method, told)
                return told["result"]
            self._note(told)

    def open(self, address: str) -> None:
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def ask(self, expression: str, context: int | None = None) -> Any:
        """The value of a JavaScript expression."""
        where = {} if context is None else {"contextId": context}
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, **where)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, expression: str, context: int | None = None) -> Any:
        """Until an expression is true; its value."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            value = self.ask(expression, context)
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"{expression} was not true in time:\n{self.ask('document.body.innerText')[:3000]}")

    def wait_text(self, *texts: str) -> str:
        for text in texts:
            self.wait(f"document.body && document.body.innerText.includes({json.dumps(text)})")
        return str(self.ask("document.body.innerText"))

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def prefer(self, scheme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def frame(self, holding: str) -> int:
        """The context of the frame inside the page whose text holds something."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            for child in self.call("Page.getFrameTree")["frameTree"].get("childFrames", []):
                made = self.call("Page.createIsolatedWorld", frameId=child["frame"]["id"])["executionContextId"]
                if holding in str(self.ask("document.body ? document.body.innerText : ''", made)):
                    return int(made)
            time.sleep(0.2)
        raise AssertionError(f"no frame of the page holds {holding!r}")

    def tabs(self) -> int:
        """Pages that are open in the browser."""
        return sum(one["type"] == "page" for one in self.call("Target.getTargets")["targetInfos"])

    def shot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _note(self, told: dict[str, Any]) -> None:
        about = told.get("params", {})
        if told["method"] == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"].get("exception", about["exceptionDetails"])))
        elif told["method"] == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(str(about["args"]))
        elif told["method"] == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif told["method"] == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])


@contextmanager
def browser(command: str) -> Iterator[Page]:
    """A browser with one tab, which ends with the block."""
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        # frames that are sandboxed stay in the process of their page, where the protocol reaches them
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-features=IsolateSandboxedIframes", "--remote-debugging-port=0"]
        child = subprocess.Popen(
            [command, *options, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = _port(Path(folder) / "DevToolsActivePort", child)
            with urlopen(Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT"), timeout=30) as answer:
                address = json.load(answer)["webSocketDebuggerUrl"]
            with connect(address, max_size=None) as socket:
                yield Page(socket)
        finally:
            child.terminate()
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _port(file: Path, child: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        assert child.poll() is None, f"the browser ended at once with {child.returncode}"
        if file.exists() and (text := file.read_text().split()):
            return int(text[0])
        time.sleep(0.1)
    raise AssertionError("the browser did not say on which port it listens")
