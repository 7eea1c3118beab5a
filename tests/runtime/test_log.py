"""What is said while something takes long, without a terminal."""

from types import SimpleNamespace

import pytest

from hardpatch.runtime import log


@pytest.fixture
def said(monkeypatch):
    """Lines, while every item takes ten seconds."""
    lines, now = [], [0.0]

    def later():
        now[0] += 10
        return now[0]

    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=later))
    monkeypatch.setattr(log, "say", lines.append)
    monkeypatch.setattr(log.console, "_force_terminal", False)
    return lines


def test_a_line_every_half_minute_with_rate_and_time_left(said):
    assert list(log.tracked(range(10), "work", images_per_item=20)) == list(range(10))
    assert said == ["work 4/10  2 img/s  left 0:01:00", "work 8/10  2 img/s  left 0:00:20"]


def test_a_generator_says_its_length_only_where_it_is_given(said):
    assert len(list(log.tracked((i for i in range(5)), "work", total=5))) == 5
    assert len(list(log.tracked((i for i in range(5)), "work"))) == 5
    assert said == ["work 4/5  left 0:00:10", "work 4/?  left ?"]


def test_short_work_says_nothing(said):
    list(log.tracked(range(3), "work"))
    assert said == []


def test_other_processes_say_nothing(said, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    list(log.tracked(range(10), "work"))
    assert said == []
