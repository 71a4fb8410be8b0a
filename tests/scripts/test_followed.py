"""The laboratory follows printed commands: to their rest, or out of a circle, on tables with and without a header."""

from pathlib import Path
from typing import Any

import followed
import pytest
from benchmarks import matrix
from benchmarks.networks import Course

from downslope.verdict import Evidence, Suggestion, Verdict


def test_commands_are_followed_as_printed_and_a_circle_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    typed: list[tuple[str, ...]] = []

    def train(folder: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
        typed.append(arguments)
        found = {"learning_rate": 0.1, "verdict": "too_slow", "evidence": {"try": "lr=2" if rests > len(typed) else ""}}
        return "look      make dashboard        again   python train.py 'a b=1' lr=2\n", [found]

    monkeypatch.setattr(followed, "train", train)
    rests = 2
    assert len(followed.follow(tmp_path, ["lr=1"])) == 2
    assert typed == [("lr=1",), ("a b=1", "lr=2", "~callbacks.pictures")]
    rests = 100
    assert len(followed.follow(tmp_path, ["lr=1"])) == followed.MOST_FOLLOWED + 1


def test_suggestions_that_go_in_a_circle_are_left_after_some(monkeypatch: pytest.MonkeyPatch) -> None:
    class ToAndFro:
        def course(self, name: str, method: str, rate: float) -> Course:
            return Course([1.0], [Evidence(1, rate)])

    def judge(seen: Evidence) -> Verdict:
        return Verdict("too_slow", "", Suggestion(0.3 - seen.learning_rate, ""))

    monkeypatch.setattr(matrix, "judge", judge)
    run = matrix.Run("", "sgd", 0.1, Course([1.0], [Evidence(1, 0.1)]), "too slow", 0.5, 1)
    rates = [rate for rate, _ in matrix._followed(ToAndFro(), run)]  # type: ignore[arg-type]
    assert rates == pytest.approx([0.1, 0.2] * 3 + [0.1])


@pytest.mark.parametrize(
    ("text", "target"), [("a,b,c\n1,2,x\n3,4,y\n", "b"), ("150,2,red,blue\n1,2\n3,4\n", "x1"), ("a;b\n1;2\n", "b")]
)
def test_the_last_column_of_numbers_is_the_target(tmp_path: Path, text: str, target: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    file, found = followed.with_header(tmp_path / "table.csv", tmp_path)
    assert found == target
    assert file.read_text().splitlines()[1:] == text.splitlines()[1:]
