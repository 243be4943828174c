"""Progress where there is no terminal."""

from lcq.cli.console import progress


def test_a_log_gets_a_line_every_minute(capsys):
    times = iter([0.0, 3.0, 61.0, 62.0, 120.9, 121.5])
    with progress(8, clock=lambda: next(times)) as advance:
        for label in ("a", "b", "", "c", "d"):
            advance(label, 1)
            if label == "b":  # while the command runs, not at its end
                assert capsys.readouterr().err == "b: 2 of 8, 61 s\n"
    captured = capsys.readouterr()
    assert captured.err == "d: 5 of 8, 122 s\n" and captured.out == ""


def test_a_total_may_come_later_or_never(capsys):
    times = iter([0.0, 60.0, 120.0])
    with progress(clock=lambda: next(times)) as advance:
        advance("tracing", 0)
        advance("layer0/kernel", 1, 1200)
    assert capsys.readouterr().err == "tracing: 0, 60 s\nlayer0/kernel: 1 of 1,200, 120 s\n"


def test_what_is_quick_says_nothing(capsys):
    with progress(3) as advance:
        advance("a", 3)
    assert capsys.readouterr().err == ""
