"""A headless Chromium as tests use it: pages opened, keys pressed, the mouse moved, and whatever the page complains of kept.

It speaks the DevTools protocol over two pipes (--remote-debugging-pipe: JSON documents that end in a zero byte, read from file
descriptor 3 and written to 4), so nothing but the browser has to be installed.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
)
PATIENCE = 60.0  # seconds for an answer
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Home": 36, "End": 35, "Escape": 27, "Enter": 13}
EVENTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Network.requestWillBeSent")


class Page:
    """One tab."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._rest, self._count = commands, answers, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a method of the protocol and return its result; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if answer.get("method") in EVENTS:
                self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], PATIENCE)[0], "the browser does not answer"
            data = os.read(self._answers, 2**20)
            assert data, "the browser has ended"
            self._rest += data
        document, _, self._rest = self._rest.partition(b"\0")
        return json.loads(document)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, promises awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.complaints()}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Load a page and wait until it has drawn itself."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")
        self.wait("document.documentElement.dataset.ready === 'yes'")

    def settle(self) -> None:
        """Until what was asked for is drawn."""
        self.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 20)))")

    def press(self, *keys: str) -> None:
        """Press and release keys, one after the other."""
        for key in keys:
            code = KEYS.get(key, ord(key.upper()[0]) if key.isalnum() else 0)
            about = {"key": key, "windowsVirtualKeyCode": code, **({"text": key} if len(key) == 1 else {})}
            self.call("Input.dispatchKeyEvent", type="keyDown", **about)
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)
            self.settle()

    def mouse(self, selector: str, click: bool = False, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Move the mouse to a place in the first element that a selector finds, given in parts of its size, and click there."""
        box = self.evaluate(
            f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        where = {"x": box[0] + at[0] * box[2], "y": box[1] + at[1] * box[3]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **where)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)
        self.settle()

    def text(self, selector: str) -> str:
        """The text of the first element that a selector finds."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window, and whether the person prefers dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.settle()

    def screenshot(self, path: Path) -> None:
        """A picture of what is in the window."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def complaints(self) -> list[str]:
        """Errors, warnings and messages of the console, and what the page wanted from a network."""
        self.settle()
        requests = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        others = [json.dumps(e["params"]) for e in self.events if e["method"] != "Network.requestWillBeSent"]
        return others + [url for url in requests[1:] if not url.startswith("data:")]


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with one tab, that keeps its things in a folder, and is gone afterwards."""
    assert CHROMIUM is not None
    ours, theirs = os.pipe(), os.pipe()  # (to read, to write): commands, answers

    def connect() -> None:
        for number, fd in ((3, os.dup(ours[0])), (4, os.dup(theirs[1]))):
            os.dup2(fd, number)

    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, close_fds=False, start_new_session=True, preexec_fn=connect, **quiet)  # type: ignore[call-overload]
    try:
        for fd in (ours[0], theirs[1]):
            os.close(fd)
        yield Page(ours[1], theirs[0])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for fd in (ours[1], theirs[0]):
            os.close(fd)
