"""A headless Chromium, told what to do through two pipes (--remote-debugging-pipe): no driver, no package."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60


class Browser:
    """One page. size: of its window; dark: as a system in dark mode shows it."""

    def __init__(self, url: str, size: tuple[int, int] = (1000, 700), dark: bool = False):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, theirs = os.pipe(), os.pipe()
        words = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank",
        ]  # fmt: skip

        def as_3_and_4() -> None:  # where Chromium reads and writes
            high = [fcntl.fcntl(end, fcntl.F_DUPFD, 64) for end in (ours[0], theirs[1])]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(words, pass_fds=(3, 4), preexec_fn=as_3_and_4, **quiet)
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from, self._rest, self._count = ours[1], theirs[0], b"", 0
        self._session: str | None = None
        self.console: list[str] = []
        self._open(url, size, dark)

    def _open(self, url: str, size: tuple[int, int], dark: bool) -> None:
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")
        self(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=size[0] < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=url)

    def __call__(self, method: str, **params) -> dict:
        """Call a method of the protocol and return its result."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._to, json.dumps({"id": self._count, "method": method, "params": params, **session}).encode() + b"\0"
        )
        while True:
            entry = self._next()
            if entry.get("id") == self._count:
                assert "error" not in entry, entry
                return entry["result"]
            said = entry.get("params", {}).get("entry", {}).get("level")
            if entry.get("method") == "Runtime.exceptionThrown" or said in ("warning", "error"):
                self.console.append(json.dumps(entry["params"]))

    def _next(self) -> dict:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            assert select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0], (
                "the browser is silent"
            )
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        entry, self._rest = self._rest.split(b"\0", 1)
        return json.loads(entry)

    def js(self, expression: str):
        """Return the value of an expression in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str):
        """Wait until an expression is true; one that fails is not, as before the page's script has run. Return its value."""
        expression = f"(() => {{ try {{ return {expression} }} catch {{ return false }} }})()"
        deadline = time.monotonic() + PATIENCE
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"{expression}; {self.js('document.body.innerText')}; {self.console}"
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    def press(self, key: str, **more) -> None:
        code = {"Enter": 13}[key]
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text="\r", **more)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._session = None
            self("Browser.close")
        for end in (self._to, self._from):
            os.close(end)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._profile.cleanup()
