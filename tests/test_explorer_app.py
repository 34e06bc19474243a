"""The explorer on a screen: the command as it is typed, and a Chromium that clicks through the app."""
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

import spatial_entropy as se
from spatial_entropy.commands import main
from spatial_entropy.exploring import Explorer
from spatial_entropy.training.files import to_install

for name in ("anywidget", "starlette", "uvicorn"):
    pytest.importorskip(name, reason="needs spatial_entropy[explore]")
from browser import axe, browser, why_not  # noqa: E402
from clicks import QUIET, click_through, same, settled  # noqa: E402

COMMAND = Path(sys.executable).with_name("spatial-entropy")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
driven = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@contextmanager
def started(*words, cwd=None):
    "The command, and the address that it printed."
    p = subprocess.Popen([str(COMMAND), "explore", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=cwd, env=ENV)
    try:
        line = p.stdout.readline()
        assert line.startswith("explorer: http://"), (line, p.poll(), p.stderr.read() if p.poll() is not None else "")
        yield p, line.removeprefix("explorer: ").strip()
    finally:
        if p.poll() is None:
            p.kill()
        p.communicate()


@contextmanager
def forked(*words, cwd=None):
    "The same in a fork of this process, which is spared the imports."
    read, write = os.pipe()

    def child():
        torch.set_num_threads(1)
        os.dup2(write, 1)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        os.chdir(cwd or ".")
        code = main(["explore", *map(str, words)])
        sys.stdout.flush()
        os._exit(code)

    p = multiprocessing.get_context("fork").Process(target=child)
    p.start()
    os.close(write)
    try:
        with open(read, encoding="utf-8") as said:
            line = said.readline()
            assert line.startswith("explorer: http://"), line
            yield p, line.removeprefix("explorer: ").strip()
    finally:
        p.kill()
        p.join()


def status(url, data=None, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code


def test_the_app_as_it_is_typed(tmp_path):
    "No argument is needed; it listens on this machine alone, asks for a token, and ends on Ctrl-C."
    with started(cwd=tmp_path) as (p, url):
        address, token = re.fullmatch(r"(http://127\.0\.0\.1:\d+/)\?token=([\w-]{20,})", url).groups()
        assert {c.laddr.ip for c in psutil.Process(p.pid).net_connections("inet") if c.status == "LISTEN"} == {"127.0.0.1"}
        question, asks = json.dumps(dict(kind="view", state=dict(head=1))).encode(), {"Content-Type": "application/json"}
        for path in ("", "explorer.js", "app.js", "explorer.css", "say", "nowhere"):
            assert status(address + path) == status(address + path + "?token=wrong") == 403, path
        assert status(address + "say", question, **asks) == 403
        assert status(address + "say", question, **asks, Authorization=f"token {token}") == 200
        assert status(address + "say", b"{", **asks, Authorization=f"token {token}") == 400
        assert status(address + "say?token=" + token, question, **{"Content-Type": "text/plain"}) == 415
        assert status(url) == 200 and status(address + "nowhere?token=" + token) == 404
        assert status(url, **{"Host": "elsewhere.org"}) == 400          # a name that was bent to this address
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert "default-src 'self'" in answer.headers["content-security-policy"] and answer.headers["referrer-policy"] == "no-referrer"
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=60)
        assert p.returncode == 0 and out.endswith("closed\n") and not err, (p.returncode, out, err)
    assert not list(tmp_path.iterdir())


def test_without_a_token_if_one_says_so(tmp_path):
    with forked("demo", "shapes/one", "--no-token", "--port", 0) as (p, url):
        assert "token" not in url and status(url) == 200
        assert status(url + "say", b"{}", **{"Content-Type": "text/plain"}) == 415      # no other site's page can ask


@pytest.mark.parametrize("line,said", [
    ("explore nothing", "explore: model: got 'nothing', which timm"),
    ("explore resnet18 --no-pretrained", "a convolutional network: no attention"),
    ("explore demo empty", "empty: no picture in it"),
    ("explore demo nowhere", "nowhere: no such folder or picture"),
    ("explore runs/fisrt", "runs/fisrt: no such run folder"),
    ("explore demo --checkpoint a.pth", "checkpoint: got a.pth, but demo has a size and weights"),
    ("explore demo empty/notes.txt", "is not a picture that Pillow knows"),
    ("explore empty", "empty: not a run folder"),
    ("explore --against nothing", "got 'nothing', which timm"),
    ("explore --port 99999", "port: nothing can listen on 127.0.0.1, port 99999"),
    ("explore --port TAKEN", "choose another --port, or none"),
    ("explore --host 203.0.113.1", "port: nothing can listen on 203.0.113.1"),
])
def test_a_mistake_is_one_sentence(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("x", encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(line.replace("TAKEN", str(taken.getsockname()[1])).split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_without_the_extra_it_says_what_brings_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "spatial_entropy.serving", raising=False)
    assert main(["explore"]) == 2
    assert to_install("explore") in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "spatial_entropy.widgets", raising=False)
    vars(se).pop("explore", None)
    with pytest.raises(ImportError, match=re.escape(f"needs anywidget, which is not installed; {to_install('explore')}")):
        _ = se.explore


# --- in a browser

@driven
def test_clicking_through_the_app(tmp_path):
    with forked(cwd=tmp_path) as (p, url), browser() as tab:
        page = tab()
        page.size(1280, 900)
        page.open(url, QUIET)
        click_through(page, Explorer(), tmp_path)
        for width in (1280, 390):
            for dark in (False, True):
                page.size(width, 800, dark)
                assert page.js("document.documentElement.scrollWidth <= innerWidth"), width
        if axe() is not None:
            page.size(1280, 900)
            assert page.violations() == []
            page.size(1280, 900, dark=True)
            assert page.violations("color-contrast") == []
        assert not page.errors
        assert {r.partition("?")[0] for r in page.requests if not r.startswith(("data:", "blob:"))} == {
            url.partition("?")[0] + path for path in ("", "app.js", "explorer.js", "explorer.css", "say")}
        os.kill(p.pid, signal.SIGINT)                                    # with a page open
        p.join(60)
        assert p.exitcode == 0
        page.choose(".se-explorer [name=connectivity]", 8)
        assert "the explorer was closed" in page.wait("!document.querySelector('.se-error').hidden && document.querySelector('.se-error').textContent")


@driven
def test_two_models_side_by_side_in_the_app(tmp_path):
    import torch
    torch.manual_seed(0)
    with forked("demo", "shapes/one", "--against", "demo", cwd=tmp_path) as (_, url), browser() as tab:
        page, explorer = tab(), Explorer(["demo", "demo"], "shapes/one")
        page.size(1280, 900)
        page.open(url, QUIET)
        settled(page, page.choose, ".se-explorer [name=block1]", 0)
        settled(page, page.click, ".se-side:nth-child(2) .se-heads button[data-head='2']")
        same(page, explorer, block=(3, 0), head=(0, 2))
        assert not page.errors
