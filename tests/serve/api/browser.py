"""A Chromium without a window, told what to do over a pipe in the words of its DevTools."""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time

# The browser reads from 3 and writes to 4; only a process of its own can have these free for certain.
START = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execvp(sys.argv[3], sys.argv[3:])"
FLAGS = """--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run
--disable-background-networking --disable-component-update --disable-sync --mute-audio"""
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), " ": (32, " ")}


class Browser:
    """A context, with pages in it one after the other. No sandbox: it shows only what the tests serve."""

    def __init__(self, command, folder):
        self.command = [command, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"]
        self.number, self.kept, self.listeners = 0, b"", {}

    def __enter__(self):
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        start = [sys.executable, "-c", START, *map(str, high), *self.command]
        self.process = subprocess.Popen(start, pass_fds=high, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.input, self.output = ours_in, ours_out
        return self

    def __exit__(self, *_):
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        os.close(self.output)
        os.close(self.input)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def call(self, method, session=None, **given):
        self.number += 1
        message = {"id": self.number, "method": method, "params": given} | ({"sessionId": session} if session else {})
        os.write(self.output, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            told = self.read(end)
            if told.get("id") == self.number:
                assert "error" not in told, (method, told["error"])
                return told["result"]
            if (listener := self.listeners.get(told.get("sessionId"))) and "method" in told:
                listener(told["method"], told["params"])
        raise TimeoutError(method)

    def read(self, end):
        while b"\0" not in self.kept:
            if not select.select([self.input], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            if not (more := os.read(self.input, 1 << 16)):
                raise RuntimeError("the browser has ended")
            self.kept += more
        first, _, self.kept = self.kept.partition(b"\0")
        return json.loads(first)

    @contextlib.contextmanager
    def page(self, url):
        """A tab with a storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        self.listeners[session] = page.hear
        try:
            for domain in ("Runtime", "Log", "Network", "Page"):
                page.call(f"{domain}.enable")
            page.size(1000, 800)
            page.call("Page.navigate", url=url)
            yield page
        finally:
            del self.listeners[session]
            self.call("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """complaints: errors and warnings that the browser had of it. requests: where it asked for something."""

    def __init__(self, browser, session):
        self.browser, self.session, self.complaints, self.requests = browser, session, [], []

    def hear(self, method, told):
        match method:
            case "Runtime.exceptionThrown":
                self.complaints.append(told["exceptionDetails"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.complaints.append(told["args"])
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(told["entry"])
            case "Network.requestWillBeSent" if not told["request"]["url"].startswith("data:"):
                self.requests.append(told["request"]["url"])

    def call(self, method, **given):
        return self.browser.call(method, self.session, **given)

    def run(self, script):
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, script, seconds=30.0):
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.complaints)
            time.sleep(0.05)

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def type(self, words):
        self.call("Input.insertText", text=words)

    def press(self, key):
        code, text = KEYS[key]
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def click(self, name):
        """The first button with this text."""
        self.run(f"[...document.querySelectorAll('button')].find(b => b.textContent === {json.dumps(name)}).click()")

    def size(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def reload(self):
        self.run("window.old = true")
        self.call("Page.reload")
        self.until("!window.old && document.readyState === 'complete'")
