"""JupyterLab as people meet it: the widget by mouse, a kernel that is interrupted and started again, pages out of the menu."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import browser, why_not

ROOT = Path(__file__).resolve().parent.parent
absent = why_not() or next((f"{name} is not installed" for name in ("jupyterlab", "ipykernel", "anywidget") if find_spec(name) is None), None)
pytestmark = pytest.mark.skipif(absent is not None, reason=str(absent))
CELLS = ['import spatial_entropy as se\nse.explore(se.demo_model(), "shapes/one")',
         "import time\nfor _ in range(600): time.sleep(.1)",
         'print("still", "here")']
RUN, INTERRUPT, RESTART = (f'[data-command="notebook:{what}"]' for what in ("run-cell-and-select-next", "interrupt-kernel", "restart-kernel"))
IDLE = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"


def notebook(cells):
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
                cells=[dict(cell_type="code", id=f"cell{i}", metadata={}, source=c, outputs=[], execution_count=None) for i, c in enumerate(cells)])


@contextmanager
def lab(folder, pages):
    "JupyterLab with settings of its own, on a free port of this machine; gives its address and its token."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    env = {**os.environ, **own, "HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name in ("MPLBACKEND", "TRITON_INTERPRET"):
        env.pop(name, None)
    settings = folder / "jupyter_config_dir/lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")
    words = dict(ServerApp=dict(ip="127.0.0.1", port=port, port_retries=0, root_dir=pages, terminals_enabled=False),
                 IdentityProvider=dict(token="secret"), LabApp=dict(extension_manager="readonly"))
    flags = [f"--{kind}.{name}={value}" for kind, given in words.items() for name, value in given.items()]
    with open(folder / "said.txt", "wb") as said:
        p = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *flags], cwd=pages, env=env, stdout=said, stderr=said)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/api?token=secret", timeout=60).close()
                break
            except OSError:
                assert p.poll() is None and time.monotonic() < end, (folder / "said.txt").read_text(encoding="utf-8")[-2000:]
                time.sleep(.1)
        yield url
    finally:
        p.send_signal(signal.SIGTERM)                                    # which ends its kernels too
        try:
            p.wait(30)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    "A tab with Lab in it, and a small notebook."
    folder, pages = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("pages")
    (pages / "small.ipynb").write_text(json.dumps(notebook(CELLS)), encoding="utf-8")
    for name in ("07_try", "47_intervals"):
        shutil.copy(ROOT / f"nbs/{name}.ipynb", pages)
    with lab(folder, pages) as url, browser() as tab:
        page = tab()
        page.size(1280, 900)
        page.open(f"{url}/lab/tree/small.ipynb?token=secret", "document.querySelectorAll('.jp-CodeCell').length === 3")
        page.wait(IDLE)
        yield page


def click_until(page, so, *selectors):
    "Click, and once more where nothing came of it: a kernel or a page may not have been ready."
    for _ in range(20):
        for selector in selectors:
            page.click(selector)
        for _ in range(40):
            if page.js(so):
                return
            time.sleep(.05)
    raise AssertionError(f"no click made it so: {so}")


def run(page, cell):
    "Click into a cell, then on the button that runs it."
    page.js(f"document.querySelectorAll('.jp-CodeCell')[{cell}].id = 'cell{cell}'")
    click_until(page, f"/\\[[*\\d]/.test(document.querySelector('#cell{cell} .jp-InputPrompt').textContent)", f"#cell{cell} .cm-content", RUN)


def printed(cell):
    return f"[...document.querySelectorAll('.jp-CodeCell')[{cell}].querySelectorAll('.jp-OutputArea-output')].map(o => o.textContent).join('')"


def test_the_widget_by_mouse(opened):
    "Picture, block, head, patch, threshold: the numbers on the screen are the library's."
    from clicks import QUIET, same, settled

    from spatial_entropy.exploring import Explorer
    page, explorer, now = opened, Explorer(images="shapes/one"), dict(picture=12)
    run(page, 0)
    page.wait(QUIET)
    same(page, explorer)
    settled(page, page.choose, ".se-explorer [name=picture]", 12)
    settled(page, page.choose, ".se-explorer [name=block0]", 1)
    settled(page, page.click, ".se-side .se-heads button[data-head='2']")
    now |= dict(block=1, head=2)
    same(page, explorer, **now)
    settled(page, page.click, ".se-side .se-picture", (4.5 / 14, 6.5 / 14))
    settled(page, page.choose, ".se-explorer [name=level]", 1.5)
    same(page, explorer, **now, query=(6, 4), times_mean=1.5)


def test_an_interrupt_and_a_restart_do_no_harm(opened):
    from clicks import QUIET, same, settled

    from spatial_entropy.exploring import Explorer
    page, explorer = opened, Explorer(images="shapes/one")
    run(page, 1)                                                         # a minute long
    page.wait("document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status === 'busy'")
    click_until(page, f"{printed(1)}.includes('KeyboardInterrupt')", INTERRUPT)
    settled(page, page.choose, ".se-explorer [name=picture]", 3)         # the same widget goes on
    settled(page, page.choose, ".se-explorer [name=level]", 1)
    same(page, explorer, picture=3, block=1, head=2, query=(6, 4))
    run(page, 2)
    page.wait(f"{printed(2)}.includes('still here')")
    click_until(page, "null !== document.querySelector('.jp-Dialog .jp-mod-accept')", RESTART)
    page.click(".jp-Dialog .jp-mod-accept")
    page.wait(f"!document.querySelector('.jp-Dialog') && {IDLE}")
    run(page, 0)
    page.wait(f"{QUIET} && document.querySelectorAll('.se-explorer').length === 1")
    same(page, explorer)


@pytest.mark.parametrize("name", ["47_intervals", "07_try"])
def test_a_page_opens_from_the_menu(opened, name):
    page = opened
    page.js("[...document.querySelectorAll('.lm-MenuBar-item')].find(o => o.textContent === 'File').id = 'file'")
    click_until(page, "null !== document.querySelector('.lm-Menu-item[data-command=\"filebrowser:open-path\"]')", "#file")
    page.click('.lm-Menu-item[data-command="filebrowser:open-path"]')
    page.wait("null !== document.activeElement.closest('.jp-Dialog')")
    page.type(f"{name}.ipynb")
    page.press("Enter")
    title = "document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-MarkdownCell h1')"
    said = json.loads((ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]["source"][0].removeprefix("# ").strip()
    assert said in page.wait(f"{title} && {title}.textContent.includes({json.dumps(said)}) && {title}.textContent")
    page.wait("document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell').length > 3")
    assert page.js("document.querySelectorAll('.jp-Dialog').length") == 0
