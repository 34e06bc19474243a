"""A headless Chromium, driven by its DevTools protocol: real clicks and keys, and no package but a websocket's."""
import base64
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = ("--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync --disable-dev-shm-usage --remote-debugging-port=0 --remote-allow-origins=* --hide-scrollbars").split()
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
LEAVING = ("navigated or closed", "context was destroyed", "Cannot find context", "Cannot find default execution context")

# In `same` the blocks of code each of whose marks stood, in such a place, in a block before.
OTHER_COLORS = """const seen = new Set(), same = [...document.querySelectorAll('.highlight')].filter(b => {
    const place = [b, b.parentElement, b.parentElement.parentElement].map(e => e.className).join(' ');
    const marks = ['', ...[...b.querySelectorAll('[class]')].map(e => e.className)].map(mark => `${place} > ${mark}`);
    const fresh = marks.some(mark => !seen.has(mark));
    marks.forEach(mark => seen.add(mark));
    return !fresh;
})"""


def why_not():
    "Why no browser can be driven here, or None."
    if CHROMIUM is None:
        return "no Chromium here: apt-get install chromium"
    try:
        import websocket  # noqa: F401
    except ModuleNotFoundError:
        return "websocket-client is not installed"


def axe():
    "The file of axe-core that an installed package carries, or None."
    found = importlib.util.find_spec("axe_playwright_python")
    return found and Path(found.origin).with_name("axe.min.js")


class Leaving(Exception):
    "The page that was asked is just being left for another."


class Page:
    "A tab. `errors`: what went wrong in it; `requests`: the addresses that it asked for."
    def __init__(self, url):
        import websocket
        self.socket = websocket.create_connection(url, timeout=120)
        self.n, self.errors, self.requests = 0, [], []
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")
        self.send("Page.bringToFront")                                  # a tab in the background draws nothing
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def heard(self, event):
        what, about = event["method"], event["params"]
        if what == "Runtime.exceptionThrown":
            self.errors.append(about["exceptionDetails"].get("exception", {}).get("description", str(about)))
        if what == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        if what == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def send(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.n:
                if any(said in answer.get("error", {}).get("message", "") for said in LEAVING):
                    raise Leaving(answer["error"]["message"])
                assert "error" not in answer, (method, params, answer["error"])
                return answer["result"]
            if "method" in answer:
                self.heard(answer)

    def js(self, code):
        "The value of an expression; a promise is awaited."
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (code, answer["exceptionDetails"].get("exception", {}).get("description"))
        return answer["result"].get("value")

    def wait(self, code, seconds=120):
        "Until an expression is true; gives its value."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(Leaving):              # the page is just being left: the next one is asked
                if value := self.js(code):
                    return value
            time.sleep(.05)
        raise AssertionError(f"still not so after {seconds} s: {code}; {self.errors}")

    def open(self, url, ready="true"):
        self.send("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && Boolean({ready})")

    def place(self, selector, at=(.5, .5)):
        "Where an element lies, scrolled into view; `at`: shares of its width and height."
        box = self.js(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', behavior: 'instant'}}); "
                      "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()")
        return box[0] + at[0] * box[2], box[1] + at[1] * box[3]

    def click(self, selector, at=(.5, .5)):
        x, y = self.place(selector, at)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def press(self, key):
        about = dict(key=key, windowsVirtualKeyCode=KEYS.get(key, ord(key[0].upper())))
        text = {} if len(key) > 1 else dict(text=key)
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose(self, selector, value):
        "Another option of a <select>, or another value of an <input>, with the events that a hand makes."
        self.js(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(str(value))}; "
                "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()")

    def give_file(self, selector, path):
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def size(self, width, height, dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])

    def type(self, text):
        "Into what has the focus."
        self.send("Input.insertText", text=text)

    def violations(self, *rules):
        "What axe-core finds serious or critical, as texts; by all of its rules, or by these. Contrasts of code that has the colours of code above are known."
        if not self.js("Boolean(window.axe)"):
            self.js(axe().read_text(encoding="utf-8") + "; true")
        asked = [] if rules else [("document", dict(rules={"color-contrast": dict(enabled=False)}))]
        asked.append((f"(() => {{ {OTHER_COLORS}; return same.length ? {{exclude: same}} : document; }})()", dict(runOnly=[*rules] or ["color-contrast"])))
        found = []
        for where, options in asked:
            found += self.js(f"axe.run({where}, {json.dumps(dict(resultTypes=['violations'], **options))}).then(all => all.violations"
                             ".filter(v => ['serious', 'critical'].includes(v.impact)).flatMap(v => v.nodes.map(n => [v.id, n.target.join(' '), "
                             "n.html.slice(0, 120), [...n.any, ...n.all, ...n.none].map(c => c.message).join('; ')].join(' | '))))")
        return found

    def shot(self, path, whole=True):
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        Path(path).write_bytes(base64.b64decode(data))


@contextmanager
def browser():
    "A Chromium of its own, with an empty profile; gives a function that opens a tab."
    import urllib.request
    folder = Path(tempfile.mkdtemp())
    env = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    started = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=env, start_new_session=True)
    pages = []
    try:
        told, end = folder / "profile/DevToolsActivePort", time.monotonic() + 120
        while not (told.exists() and told.read_text(encoding="utf-8").strip()) and started.poll() is None and time.monotonic() < end:
            time.sleep(.1)
        port = told.read_text(encoding="utf-8").split()[0]

        def tab():
            request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
            with urllib.request.urlopen(request, timeout=60) as answer:
                pages.append(Page(json.load(answer)["webSocketDebuggerUrl"]))
            return pages[-1]
        yield tab
    finally:
        for page in pages:
            page.socket.close()
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        shutil.rmtree(folder, ignore_errors=True)
