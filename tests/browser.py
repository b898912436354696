"""A headless browser: screenshots of pages, and what does not fit their width.

    python tests/browser.py FOLDER PAGE.html ...

writes a screenshot of each page at each width into FOLDER, and exits with 1 where a page is wider
than the window. Chromium is asked by its DevTools protocol, over a pipe: nothing listens.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (400, 1280)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: What is wider than the window and not inside something that scrolls or hides by itself.
_TOO_WIDE = """(() => {
  const room = document.documentElement.clientWidth, found = [];
  const scrolls = e => {
    for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
      if (getComputedStyle(p).overflowX !== 'visible' || getComputedStyle(p).position === 'fixed')
        return true;
    return false;
  };
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > room + 1 && box.left < room && !scrolls(e)
        && getComputedStyle(e).position !== 'fixed')
      found.push(e.tagName.toLowerCase() + ' ' + Math.round(box.right) + ' ' +
                 (e.textContent || '').trim().slice(0, 60));
  }
  return JSON.stringify({room, width: document.documentElement.scrollWidth, found,
                         height: document.documentElement.scrollHeight});
})()"""


def executable() -> str | None:
    """The browser's path, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a running browser."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._answers, self._kept = to, answers, b""
        self._numbers = itertools.count(1)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session: str | None = found["sessionId"]
        self.ask("Page.enable")

    _session = None

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._kept:
                more = os.read(self._answers, 1 << 20)
                if not more:
                    raise EOFError("the browser ended")
                self._kept += more
            text, _, self._kept = self._kept.partition(b"\0")
            yield json.loads(text)

    def ask(self, method: str, *, until: str = "", **parameters: Any) -> dict[str, Any]:
        """The answer to a command, and where ``until`` names an event, after that."""
        number, session = next(self._numbers), self._session
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer: dict[str, Any] | None = None
        for got in self._messages():
            if got.get("id") == number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']['message']}")
                answer = got["result"]
            until = "" if got.get("method") == until else until
            if answer is not None and not until:
                return answer
        raise AssertionError("unreachable")

    def measure(self, page: Path, width: int, picture: Path | None = None) -> dict[str, Any]:
        """``room``, ``width`` and ``height`` in pixels of a page in a window of that width, and
        what is ``found`` to stick out; the top of the page, as a picture, where one is wanted."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
                 deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.ask("Page.navigate", url=page.resolve().as_uri(), until="Page.loadEventFired")
        value = self.ask("Runtime.evaluate", expression=_TOO_WIDE)["result"]["value"]
        found: dict[str, Any] = json.loads(value)
        if picture is not None:
            clip = {"x": 0, "y": 0, "width": max(width, found["width"]),
                    "height": min(found["height"], 6000), "scale": 1}  # fmt: skip
            data = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
            picture.write_bytes(base64.b64decode(data))
        return found


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the block.

    Raises:
        FileNotFoundError: there is none on the path.
    """
    path = executable()
    if path is None:
        raise FileNotFoundError(f"no browser: none of {', '.join(NAMES)} on the path")
    commands, to = os.pipe()
    answers, back = os.pipe()

    def connect() -> None:  # Chromium reads from 3 and writes to 4
        os.dup2(commands, 13)
        os.dup2(back, 14)
        os.dup2(13, 3)
        os.dup2(14, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={folder}"],
            preexec_fn=connect, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(back)
        try:
            yield Browser(to, answers)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(to)
            os.close(answers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", nargs="+", type=Path)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with browser() as tab:
        for page in args.pages:
            for width in WIDTHS:
                picture = args.folder / f"{page.stem}-{width}.png"
                found = tab.measure(page, width, picture)
                fits = found["width"] <= found["room"] and not found["found"]
                wrong += not fits
                print(f"{picture}: {found['width']} of {found['room']} px", *found["found"][:5],
                      sep="\n  ")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
