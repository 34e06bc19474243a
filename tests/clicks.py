"""The explorer on a screen, clicked through: what it shows is what the library computes."""
import json

import pytest

import spatial_entropy as se
from spatial_entropy.exploring import Explorer

ROOT = "document.querySelector('.se-explorer')"
QUIET = f"{ROOT} && {ROOT}.dataset.n && !{ROOT}.hasAttribute('aria-busy')"
READ = "Object.fromEntries([...document.querySelectorAll('.se-side')[{}].querySelectorAll('dd')].map(d => [d.dataset.of, Number(d.dataset.value)]))"


def settled(page, action, *given):
    "Do something, and wait for the view that answers it."
    before = int(page.js(f"{ROOT}.dataset.n"))
    action(*given)
    page.wait(f"{QUIET} && Number({ROOT}.dataset.n) > {before}")


def same(page, explorer, **state):
    "The numbers on the screen are the library's."
    view = explorer.view(**state)
    for i, side in enumerate(view.sides):
        shown = page.js(READ.format(i))
        assert set(shown) >= {"entropy", "chance", "regions", "density"}
        for name, value in shown.items():
            assert value == pytest.approx(side[name], abs=1e-12), (name, state)
        said = page.js(f"document.querySelectorAll('.se-regions')[{i}].getAttribute('aria-label')")
        assert said.startswith(f"{len(side.shares)} regions with the masses")
        heads = page.js(f"[...document.querySelectorAll('.se-side')[{i}].querySelectorAll('.se-heads button')].map(b => Number(b.dataset.head))")
        assert heads == side.order


def click_through(page, explorer, tmp_path):
    "Picture, block, head, patch, threshold, connectivity, order; by hand and by key; a picture of one's own; numbers and code."
    same(page, explorer)
    settled(page, page.choose, ".se-explorer [name=picture]", 20)
    same(page, explorer, picture=20)
    settled(page, page.choose, ".se-explorer [name=block0]", 1)
    same(page, explorer, picture=20, block=1)
    settled(page, page.click, ".se-side .se-heads button[data-head='2']")
    same(page, explorer, picture=20, block=1, head=2)
    settled(page, page.click, ".se-side .se-picture", (4.5 / 14, 6.5 / 14))
    now = dict(picture=20, block=1, head=2, query=(6, 4))
    same(page, explorer, **now)
    for selector, value, change in (("level", 1.5, dict(times_mean=1.5)), ("connectivity", 4, dict(connectivity=4)), ("sort", "overlap", dict(sort="overlap")),
                                    ("kind", "mass", dict(times_mean=1, mass=.6)), ("level", .3, dict(mass=.3))):
        settled(page, page.choose, f".se-explorer [name={selector}]", value)
        now |= change
        same(page, explorer, **now)
    page.js("document.querySelector('.se-picture').focus()")
    settled(page, page.press, "ArrowDown")
    same(page, explorer, **now | dict(query=(7, 4)))
    settled(page, page.press, "]")
    same(page, explorer, **now | dict(query=(7, 4), block=2))
    settled(page, page.press, "Escape")
    same(page, explorer, **now | dict(query="auto", block=2))
    now |= dict(query="auto", block=2)
    page.js("window.saved = []; URL.createObjectURL = blob => { blob.text().then(t => window.saved.push(t)); return '#'; }")
    for what in ("json", "py"):
        page.click(f".se-exports [name={what}]")
        page.wait(f"window.saved.length === {dict(json=1, py=2)[what]}")
    numbers, code = page.js("window.saved")
    view = explorer.view(**now)
    assert json.loads(numbers) == json.loads(json.dumps(view.numbers())) and code == view.code
    se.shapes(3, size=150, seed=5)[2][0].save(tmp_path / "own.png")
    settled(page, page.give_file, ".se-explorer [name=file]", tmp_path / "own.png")
    own = Explorer(explorer.subjects[0].model, tmp_path / "own.png")
    same(page, own, **now | dict(picture=0))
    assert page.js("document.querySelector('.se-explorer [name=picture]').selectedOptions[0].textContent") == "own.png"
    assert page.js("document.querySelector('.se-error').hidden")
    took = float(page.js(f"{ROOT}.dataset.milliseconds"))
    print(f"the last update took {took} ms by the wall clock")
