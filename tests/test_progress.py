"""What a run shows: in a terminal, in a file, in a notebook, and afterwards."""
import base64
import html
import io
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from matplotlib.animation import FFMpegWriter
from PIL import Image
from rich.console import Console
from rich.errors import LiveError
from runs import forked

from spatial_entropy.training.progress import Rate, RunProgress, _bars_of, _text_of, epoch_line, film, plot_metrics


class Clock:
    "Seconds, set by hand."
    now = 0.

    def __call__(self):
        return self.now


def rows(n):
    return [dict(epoch=e, train_ce=2. / e, train_loss=2. / e, train_top1=10. * e, train_entropy=.4, val_loss=2., val_top1=9. * e, val_entropy=.3,
                 val_regions=1.5, entropy_weight=.001 * e) for e in range(1, n + 1)]


def console(terminal, width=110, **options):
    return Console(file=io.StringIO(), force_terminal=terminal, force_jupyter=False, width=width, **{"_environ": {"TERM": "xterm"}, **options})


def go(console, epochs=2, updates=10, first=0, done=0, step=1., pause=0., **options):
    "A run by a clock that is set by hand."
    clock = Clock()
    with RunProgress(epochs, updates, console, clock=clock, **options) as p:
        p.history = rows(first)
        for e in range(first, epochs):
            p.epoch(e, done if e == first else 0)
            for u in range(done if e == first else 0, updates):
                clock.now += step
                p.update(32, **(dict(loss=1.5, top1=12., entropy=.25) if u % 2 else {}))
            clock.now += pause
            p.finish(rows(epochs)[e])
    return p


def lines(console):
    return console.file.getvalue().splitlines()


def shown_by(terminal_output, height=60, width=130):
    "What stays on a terminal: its rows, after carriage returns, movements up and erased lines."
    grid, y, x = [""] * height, 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", terminal_output):
        if piece == "\n":
            y, x = y + 1, 0
        elif piece == "\r":
            x = 0
        elif piece.endswith("A") and piece[0] == "\x1b":
            y -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            grid[y] = ""
        elif piece[0] != "\x1b":
            grid[y] = grid[y][:x].ljust(x) + piece + grid[y][x + len(piece):]
            x += len(piece)
    assert y < height and all(len(row) <= width for row in grid)
    return [row.rstrip() for row in grid if row.strip()]


# ---- rate and time left

def test_the_rate_is_that_of_the_last_seconds_however_fast_the_updates_are():
    for step in (.001, .1, 1., 7.):
        clock = Clock()
        rate = Rate(30, clock)
        for _ in range(int(100 / step)):
            clock.now += step
            rate.add(64)
        for _ in range(int(40 / step) + 2):
            clock.now += 2 * step                                            # half as fast from here on
            rate.add(64)
        assert rate()[0] == pytest.approx(.5 / step, rel=.05) and rate()[1] == pytest.approx(32 / step, rel=.05)
        assert len(rate.marks) < 70


def test_validation_is_in_the_time_left_but_not_in_the_rate():
    p = go(console(False), epochs=3, pause=100.)
    assert p.where.rate()[1] == pytest.approx(32)
    out = console(False)
    clock = Clock()
    with RunProgress(3, 10, out, clock=clock, log_seconds=0) as p:
        for e in range(2):
            p.epoch(e)
            for _ in range(10):
                clock.now += 1
                p.update(32)
            clock.now += 50
            p.finish(rows(2)[e])
        p.epoch(2)
        clock.now += 1
        p.update(32)
    assert lines(out)[-1].endswith("32 images/s  0:00:59 left")               # nine updates, and one more validation


def test_a_resumed_epoch_has_the_right_totals_and_its_own_rate():
    out = console(False)
    p = go(out, epochs=5, updates=100, first=3, done=98, log_seconds=0)
    said = lines(out)
    assert said[0].startswith("epoch   4/5  update 99/100") and "32 images/s  0:01:41 left" in said[0]
    assert said[1].startswith("epoch   4/5  update 100/100") and said[2] == epoch_line(rows(4)[3], 5)
    assert [r["epoch"] for r in p.history] == [1, 2, 3, 4, 5]


def test_a_standstill_is_said():
    clock = Clock()
    with RunProgress(1, 10, console(False), clock=clock) as p:
        p.epoch(0)
        for _ in range(3):
            clock.now += 1
            p.update(8)
        assert "since" not in _text_of(_bars_of(p.where, 110), 110)
        clock.now += 75
        assert "0:01:15 since the last update" in _text_of(_bars_of(p.where, 110), 110)


def test_an_update_costs_microseconds():
    for out in (console(True), console(False), Console(quiet=True)):
        with RunProgress(1, 10**6, out) as p:
            p.epoch(0)
            start = time.perf_counter()
            for _ in range(20_000):
                p.update(256, loss=1., top1=50., entropy=.3)
            assert (time.perf_counter() - start) / 20_000 < 50e-6


# ---- terminal, file, nothing

def test_a_log_file_gets_lines_only():
    out = console(False)
    go(out, epochs=2, updates=100, log_seconds=60)
    said = lines(out)
    assert "\x1b" not in out.file.getvalue() and "\r" not in out.file.getvalue() and len(said) == 4
    assert said[0].startswith("epoch   1/2  update 60/100  loss 1.500  top-1 12.0%  entropy 0.250  32 images/s") and said[1] == epoch_line(rows(1)[0], 2)


def test_a_short_epoch_has_no_status_line():
    out = console(False)
    go(out, epochs=30, updates=10, log_seconds=60)
    assert lines(out) == [epoch_line(r, 30) for r in rows(30)]


def test_a_pipe_and_a_dumb_terminal_get_the_same(tmp_path):
    def a_run():
        with RunProgress(1, 1) as p:
            p.epoch(0)
            p.update(1)
            p.note("[red]a note[/red] :cat: " + "x" * 200)
            p.finish(dict(epoch=1, val_top1=50.))

    assert forked(a_run, FORCE_COLOR=None, TERM="xterm") == (0, f"[red]a note[/red] :cat: {'x' * 200}\nepoch   1/1  |  val top-1  50.0%\n", "")
    dumb = console(True, _environ={"TERM": "dumb"}, color_system=None)
    go(dumb, updates=3)
    assert lines(dumb) == [epoch_line(r, 2) for r in rows(2)]


def test_a_command_that_a_cell_starts_prints_lines():
    def a_run():
        with RunProgress(1, 1) as p:
            p.epoch(0)
            p.update(1)
            p.finish(dict(epoch=1))

    for parent, bars in ((None, True), ("1", False)):
        _, said, _ = forked(a_run, JPY_PARENT_PID=parent, NO_COLOR=None, TERM="xterm", FORCE_COLOR="1")
        assert ("\x1b" in said) == bars and (bars or said == "epoch   1/1\n")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_has_two_bars_and_keeps_the_lines_only(width):
    out = console(True, width=width, color_system=None)
    with RunProgress(4, 10, out) as p:
        p.history = rows(2)
        p.epoch(2, done=5)
        p.update(32, loss=1.25)
        p.note("a note")
        p.screen.live.refresh()
        bars = shown_by(out.file.getvalue())
        p.finish(rows(3)[2])
    assert bars[0] == "a note" and bars[1].startswith("epoch 3/4 ━") and "6/10" in bars[1] and bars[2].startswith("run") and "26/40" in bars[2]
    assert any("loss 1.250" in row for row in bars) and max(map(len, bars)) <= width
    assert shown_by(out.file.getvalue()) == ["a note", epoch_line(rows(3)[2], 4)]
    assert out.file.getvalue().count("\x1b[?25l") == out.file.getvalue().count("\x1b[?25h") == 1     # the cursor comes back


def test_where_other_bars_are_up_lines_are_printed():
    out = console(True, color_system=None)
    with patch("rich.live.Live.start", side_effect=LiveError("Only one live display may be active at once")):
        go(out)
    assert lines(out) == [epoch_line(r, 2) for r in rows(2)]


def test_the_terminal_is_given_back_after_an_error():
    out = console(True)
    was = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), RunProgress(1, 10, out) as p:
        p.epoch(0)
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == was and out.file.getvalue().count("\x1b[?25h") == 1
    go(out)                                                                                          # and can be used again


def test_bars_are_redrawn_at_most_four_times_a_second():
    out = console(True)
    with RunProgress(1, 10**7, out) as p:
        p.epoch(0)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            p.update(1, loss=1.)
    assert 2 <= out.file.getvalue().count("run ") <= 4 * 1.5 + 4


def test_no_color_is_left_to_rich():
    def colours(**env):
        out = console(True, _environ={"TERM": "xterm-256color", **env})
        go(out)
        return re.findall(r"\x1b\[[0-9;]*m", out.file.getvalue())
    assert colours() and not colours(NO_COLOR="1")


def test_a_quiet_console_shows_nothing():
    out = Console(quiet=True, file=io.StringIO(), force_terminal=True)
    go(out, plot=True)
    assert out.file.getvalue() == ""


def test_missing_columns_are_left_out():
    assert epoch_line(dict(epoch=2, train_ce=1., val_top1=None), 5) == "epoch   2/5  train loss 1.000"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_loading_process_prints_past_the_bars():
    def a_run():
        console = Console(force_terminal=True, width=100)
        with RunProgress(1, 10, console) as p:
            p.epoch(0)
            with console._lock, p.screen.live._lock:                     # as if the thread were just drawing
                child = os.fork()
                if not child:
                    print("a warning", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    code, _, complaints = forked(a_run, TERM="xterm")
    assert code == 0 and complaints == "a warning\n", complaints


# ---- a notebook

class Shown(list):
    "Outputs of a cell, as IPython's display keeps them."
    def __call__(self, thing, display_id=None, raw=False):
        assert display_id is True
        self.append([(thing, raw)])
        return SimpleNamespace(update=lambda thing, raw=False, of=self[-1]: of.append((thing, raw)))


@pytest.fixture
def kernel(monkeypatch):
    import IPython
    shell = SimpleNamespace(kernel=SimpleNamespace(session=SimpleNamespace(pid=os.getpid())))
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    shown = Shown()
    with patch("IPython.display.display", shown):
        yield SimpleNamespace(shell=shell, shown=shown)


def jupyter():
    return Console(file=io.StringIO(), force_jupyter=True, width=110)


def test_a_cell_has_one_text_and_one_plot(kernel):
    p = go(jupyter(), epochs=30, updates=10)
    assert len(p.history) == 30 and len(kernel.shown) == 2
    text, plots = kernel.shown
    assert all(raw for _, raw in text) and text[-1][0]["text/plain"] == "\n".join(epoch_line(r, 30) for r in rows(30))
    assert all(html.unescape(re.sub("<.*?>", "", t["text/html"])) == t["text/plain"] for t, _ in text)
    assert [type(thing).__name__ for thing, _ in plots] == ["Drawing"] * 30 and not any(raw for _, raw in plots)
    during = text[-2][0]["text/plain"].splitlines()                          # the last twenty lines, and the bars
    assert during[0] == "… 10 earlier lines" and len(during) == 1 + 20 + 2 and during[-1].startswith("run") and "300/300" in during[-1]


def test_a_note_is_no_markup_in_html_either(kernel):
    with RunProgress(1, 1, jupyter()) as p:
        p.note("<b>1 < 2</b> [red]")
    last = kernel.shown[0][-1][0]
    assert last["text/plain"] == "<b>1 < 2</b> [red]" and "&lt;b&gt;1 &lt; 2&lt;/b&gt; [red]</pre>" in last["text/html"]


def test_messages_are_few(kernel):
    go(jupyter(), epochs=1, updates=10_000, step=.1, plot=False)             # a thousand seconds
    assert len(kernel.shown) == 1 and 500 < len(kernel.shown[0]) < 1000
    kernel.shown.clear()
    go(jupyter(), epochs=1, updates=4000, step=2.5, plot=False)              # ten thousand: every second update, in the end
    assert 1900 < len(kernel.shown[0]) < 2700


def test_drawing_takes_a_tenth_of_the_time_at_most(kernel):
    clock = Clock()

    def slow(rows):
        clock.now += 1
        return f"{len(rows)} rows"

    with patch("spatial_entropy.training.progress.plot_metrics", slow), RunProgress(100, 1, jupyter(), clock=clock) as p:
        for e in range(100):
            p.epoch(e)
            clock.now += 1
            p.update(1)
            p.finish(dict(epoch=e + 1))
    drawn = [thing for thing, _ in kernel.shown[1]]
    assert drawn[0] == "1 rows" and drawn[-1] == "100 rows" and 9 <= len(drawn) <= 12


@pytest.mark.parametrize("plot,n", [(None, 2), (True, 2), (False, 1)])
def test_the_plot_can_be_left_out(kernel, plot, n):
    go(jupyter(), plot=plot)
    assert len(kernel.shown) == n


def test_without_a_kernel_nobody_draws():
    with patch("spatial_entropy.training.progress.plot_metrics", side_effect=AssertionError):
        go(console(False), plot=True)


def test_a_quiet_console_in_a_kernel_shows_nothing(kernel):
    go(Console(quiet=True, force_jupyter=True), plot=True)
    assert kernel.shown == []


def test_a_fork_of_a_kernel_prints_lines(kernel):
    kernel.shell.kernel.session.pid += 1
    out = jupyter()
    go(out)
    assert kernel.shown == [] and out.file.getvalue().splitlines() == [epoch_line(r, 2) for r in rows(2)]


def test_a_console_that_writes_to_a_file_gets_the_lines_and_the_cell_the_plot(kernel):
    out = console(False)
    go(out)
    assert lines(out) == [epoch_line(r, 2) for r in rows(2)] and len(kernel.shown) == 1


PLOTTED = """if True:
        import gc, os, warnings
        from matplotlib.figure import Figure
        from spatial_entropy.training.progress import RunProgress
        with RunProgress(4, 50) as p:
            for e in range(4):
                p.epoch(e)
                for u in range(50): p.update(32, loss=2 - u/50, top1=50., entropy=.1)
                p.finish(dict(epoch=e + 1, train_loss=1/(e + 1), val_loss=1., val_top1=20.*e, entropy_weight=.01))
            p.note("saved")
        del p; gc.collect()
        assert not [o for o in gc.get_objects() if issubclass(type(o), Figure)], "figures stay behind"
        """
FORKED = """if True:
        import multiprocessing
        from spatial_entropy.training.progress import RunProgress
        def work():
            print("first")                                               # after this, messages of a fork seem to work
            with RunProgress(3, 2) as p:
                for e in range(3): p.epoch(e); p.update(1); p.update(1); p.finish(dict(epoch=e + 1))
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start(); child.join(); print("exit code", child.exitcode)
        """


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    "Outputs of each cell of two real kernels: one as it comes, and one without the inline backend."
    sys.modules.setdefault("rfc3987_syntax", None)       # grammars of web addresses, for seconds, which jsonschema does without
    import nbformat
    from nbclient import NotebookClient
    notebooks = [nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
                 for cells in ((FORKED, PLOTTED), ("import os; os.environ['MPLBACKEND'] = 'agg'", PLOTTED))]
    with patch.dict(os.environ, IPYTHONDIR=str(tmp_path_factory.mktemp("ipython"))):
        for nb in notebooks:
            NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    return [[cell.outputs for cell in nb.cells] for nb in notebooks]


def test_a_real_kernel_keeps_one_text_and_one_plot(kernels):
    for _, (text, plot) in kernels:
        assert [o.output_type for o in (text, plot)] == ["display_data"] * 2 and text.data.keys() == {"text/plain", "text/html"}
        said = text.data["text/plain"].splitlines()
        assert len(said) == 5 and said[0] == "epoch   1/4  |  val top-1   0.0%" and said[-1] == "saved"
        assert base64.b64decode(plot.data["image/png"])[:4] == b"\x89PNG"


def test_a_fork_of_a_real_kernel_prints_lines(kernels):
    outputs = kernels[0][0]
    assert {o.output_type for o in outputs} == {"stream"}
    assert sorted("".join(o.text for o in outputs).splitlines()) == ["epoch   1/3", "epoch   2/3", "epoch   3/3", "exit code 0", "first"]


# ---- afterwards

def test_plot_metrics_of_whatever_there_is(tmp_path):
    for some in ([], rows(1), rows(30), [dict(epoch=1, lr=.1)], [dict(train_loss=1.), dict(train_loss=float("nan"), val_loss=None)],
                 [{k: str(v) for k, v in r.items()} | dict(val_loss="") for r in rows(3)]):
        plot_metrics(some).savefig(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    sometimes = [r if r["epoch"] % 2 else {k: v for k, v in r.items() if not k.startswith("val")} for r in rows(7)]
    loss = plot_metrics(sometimes).axes[0]
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7]]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["train", "val"]
    assert plot_metrics(rows(3)).axes[3].get_ylabel() == "its weight λ" and len(plot_metrics(sometimes[:0]).axes) == 3


def test_plot_metrics_leaves_nothing_open():
    from matplotlib import pyplot
    before = pyplot.get_fignums()
    plot_metrics(rows(3))
    assert pyplot.get_fignums() == before


def frames(folder, *sizes):
    folder.mkdir(exist_ok=True)
    for k, (size, colour) in enumerate(sizes):
        Image.new("RGB", size, colour).save(folder / f"{k}.png")
    return sorted(folder.glob("*.png"))


def test_a_gif_of_frames_of_several_sizes(tmp_path):
    paths = frames(tmp_path / "f", ((60, 40), "red"), ((40, 61), "lime"), ((20, 20), "blue"))
    film(paths, tmp_path / "a.gif", .25)
    gif, centre, corner = Image.open(tmp_path / "a.gif"), [], []
    for k in range(gif.n_frames):
        gif.seek(k)
        assert gif.info["duration"] == 250
        centre.append(gif.convert("RGB").getpixel((30, 31)))
        corner.append(gif.convert("RGB").getpixel((0, 0)))
    assert gif.n_frames == 3 and gif.size == (60, 62) and gif.info["loop"] == 0
    assert centre == [(255, 0, 0), (0, 255, 0), (0, 0, 255)] and corner == [(255, 255, 255)] * 3


def test_a_transparent_frame_lies_on_white(tmp_path):
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    film([str(tmp_path / "clear.png")], str(tmp_path / "a.gif"))
    assert Image.open(tmp_path / "a.gif").convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_film_errors(tmp_path):
    paths = frames(tmp_path / "f", ((8, 8), "red"))
    with pytest.raises(ValueError, match="frames: got none, expected one picture file or more"):
        film([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="path: got a.avi, expected a name that ends in .gif or .mp4"):
        film(paths, tmp_path / "a.avi")
    for seconds in (0, -1, float("nan"), 1e9):
        with pytest.raises(ValueError, match="seconds_a_frame: got .*, expected from 0.02 to 600"):
            film(paths, tmp_path / "a.gif", seconds)
    (tmp_path / "half.png").write_bytes(paths[0].read_bytes()[:20])
    with pytest.raises(OSError, match="half.png"):
        film([tmp_path / "half.png"], tmp_path / "a.gif")
    with pytest.raises(FileNotFoundError, match="none.png"):
        film([tmp_path / "none.png"], tmp_path / "a.gif")
    with patch.object(FFMpegWriter, "isAvailable", lambda: False), pytest.raises(OSError, match="an MP4 needs ffmpeg, which is not installed; write a .gif"):
        film(paths, tmp_path / "a.mp4")
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.skipif(not FFMpegWriter.isAvailable(), reason="ffmpeg is not installed")
def test_a_video(tmp_path):
    paths = frames(tmp_path / "f", ((61, 41), "red"), ((40, 60), "lime"), ((20, 20), "blue"))
    film(paths, tmp_path / "a.mp4", .5)
    said = subprocess.run([FFMpegWriter.bin_path(), "-i", tmp_path / "a.mp4", "-f", "null", "-"], capture_output=True, text=True).stderr
    assert "62x60" in said and re.findall(r"frame= *(\d+)", said)[-1] == "3" and "Duration: 00:00:01.50" in said
