"""``tvm-sepconv bench --spaces``: our design space beside MetaSchedule's own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import command_line
import pytest

from tvm_sepconv import cli, targets
from tvm_sepconv.bench import spaces
from tvm_sepconv.bench.spaces import OURS, THEIRS, Row, Spaces
from tvm_sepconv.compiler.tuning import history, tune
from tvm_sepconv.compiler.tuning.search import Progress

COUNTS = (2, 3, 6)


class Searched:
    """In the place of `tune.tune`: writes the histories that it was given.

    Parameters
    ----------
    secs
        For each space the median of each trial; None for one that failed.
    """

    def __init__(self, secs: dict[str, list[float | None]]) -> None:
        self.secs = secs
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, config: Any, target: Any, batch: int, steps: int, *, work_dir: Path, space: str,
        **more: Any,
    ) -> None:  # fmt: skip
        self.calls.append({"target": target.name, "steps": steps, "space": space, **more})
        folder = history.folder(work_dir, target.name, config.key, space)
        folder.mkdir(parents=True)
        writer = history.Writer(folder / history.NAME, {"space": space})
        for number, secs in enumerate(self.secs[space], 1):
            samples, error = (None, "no such tile") if secs is None else ([secs], None)
            writer.trial(history.Trial(number, None, samples, error, 30.0 * number))
            more["report"](Progress(of=more["trials"], trials=number))
        writer.close()


def searched(monkeypatch: pytest.MonkeyPatch, **secs: list[float | None]) -> Searched:
    one = Searched({OURS: [4e-4, 2e-4, 3e-4, 2e-4, None, 1e-4], **secs})
    one.secs.setdefault(THEIRS, [None, None, 6e-4, 6e-4, 6e-4, 3e-4])
    monkeypatch.setattr(tune, "tune", one)
    return one


def test_both_spaces_are_searched_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = searched(monkeypatch)
    file = tmp_path / "a.json"
    assert cli.main(["bench", "QN-B1,MB-1", "--spaces", "6,2,3", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert [(call["workload"], call["space"]) for call in fake.calls] == [
        ("QN-B1", OURS), ("QN-B1", THEIRS), ("MB-1", OURS), ("MB-1", THEIRS),
    ]  # fmt: skip
    for call in fake.calls:
        assert (call["target"], call["trials"], call["threads"]) == (targets.runnable()[0], 6, 1)
        assert call["record"] is False  # nor does it begin with what was recorded
    lines = [" ".join(line.split()) for line in out.splitlines()]
    # The best of 2, 3 and 6 trials of ours, of theirs, and theirs over ours.
    figures = "200.0 200.0 100.0 – 600.0 300.0 – 3.00 3.00"
    assert f"QN-B1 256→256 k33 {figures}" in lines
    assert f"MB-1 128→64 k13 {figures}" in lines
    assert "take 3.00 times as long as ours, in the geometric mean" in out
    assert "Ours: 6.0 minutes of searching, 2 trials failed" in out
    assert "MetaSchedule's own: 6.0 minutes of searching, 4 trials failed" in out
    assert "2 of 2, MB-1: MetaSchedule's own space" in err
    assert cli.main(["bench", "--from", str(file)]) == 0
    assert capsys.readouterr().out == out


def test_without_ids_there_are_six_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = searched(monkeypatch)
    assert cli.main(["bench", "--spaces"]) == 0
    named = {call["workload"] for call in fake.calls}
    assert named == set(spaces.LAYERS) == {"QN-B1", "QN-C2", "CN-21", "MB-1", "ET-enc", "CT-d128"}
    assert {call["trials"] for call in fake.calls} == {64}


def test_a_space_that_is_searched_to_its_end_has_its_best_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched(monkeypatch, **{OURS: [4e-4, 2e-4], THEIRS: [4e-4, None, None, 8e-4, None, None]})
    subjects = command_subjects("MB-1")
    (row,) = spaces.measure_spaces(subjects, targets.runnable()[0], 1, COUNTS).rows
    assert row.best_secs == {OURS: [2e-4] * 3, THEIRS: [4e-4] * 3}
    assert row.failed == {OURS: 0, THEIRS: 4}


def command_subjects(ids: str) -> list[Any]:
    from tvm_sepconv import subjects

    return subjects.of_table([ids], "channels_last")


def made_up(*theirs: float | None) -> Spaces:
    secs = {OURS: [2e-4, 1e-4], THEIRS: [4e-4, 1e-4]}
    rows = tuple(
        Row("L", "1→1 k1", {**secs, THEIRS: [4e-4, last]}, {OURS: 0, THEIRS: 0},
            {OURS: 60.0, THEIRS: 90.0})
        for last in theirs
    )  # fmt: skip
    return Spaces("bench --spaces", "here", "x86_64-avx2", 1, (8, 16), {"numpy": "2"}, rows)


def test_the_mean_is_of_the_last_ratios() -> None:
    assert made_up(1e-4, 4e-4).geometric_mean == pytest.approx(2)
    assert [row.ratios for row in made_up(4e-4).rows] == [[2, 4]]


def test_no_mean_where_a_layer_has_nothing() -> None:
    one = made_up(4e-4, None)
    assert math.isnan(one.geometric_mean)
    assert "No mean: for some layers nothing was found" in one.text()


def test_json_is_read_back() -> None:
    one = made_up(4e-4, None)
    plain = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert Spaces.from_dict(plain) == one
    with pytest.raises(ValueError, match=r"must be of format 1.*Received: 0"):
        Spaces.from_dict({**plain, "spaces_format": 0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--spaces", "16,many"), "`--spaces` must be numbers of at least 2.*: 16,many"),
        (("--spaces", "1,2"), "Received: 1,2"),
        (("--spaces", "2", "--threads", "1,2"), "one number of --threads. Received: 1,2"),
        (("--spaces", "2", "--cold"), "measures two searches .*Received also: --cold"),
        (("--spaces", "2", "--peers", "none"), "Received also: --peers"),
        (("--spaces", "2", "--metaschedule", "3"), "Received also: --metaschedule"),
        (("--spaces", "2", "--html", "a.html"), "Received also: --html"),
        (("--spaces", "2", "--sweep"), "`--sweep` has shapes .*Received also: --spaces"),
        (("--spaces", "2", "--from", "a.json"), "Received also: --spaces"),
        (("--spaces", "2", "--setup"), "Received also: --spaces"),
    ],
)
def test_what_the_user_can_put_right(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = searched(monkeypatch)
    monkeypatch.setattr("tvm_sepconv.bench.process.processors", lambda threads: [0] * threads)
    assert re.search(message, command_line.refused(capsys, "bench", *arguments))
    assert fake.calls == []


def test_a_page_of_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(made_up(4e-4).to_dict()))
    arguments = ["--from", str(file), "--html", str(tmp_path / "a.html")]
    assert cli.main(["bench", *arguments]) == 2
    assert "`--html` has no page for --spaces" in capsys.readouterr().err
