import re
import statistics

import pytest

from lightning_manifold_mixup.evaluation import mean_and_std, plus_minus, print_table

ROWS = [
    {"layer": "model.layer1.0.conv1", "error": 0.125, "mean": "1.20 ± 0.30", "seeds": 3, "nll": None},
    {"layer": "head", "error": 12.5, "mean": "nan ± nan", "seeds": 10, "nll": 0.5},
]


def cells(out):
    return [[cell[1:-1] for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_cells_and_their_alignment(capsys):
    print_table(ROWS, "results")
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "results"
    assert cells(out) == [
        ["model.layer1.0.conv1", " 0.1250", "1.20 ± 0.30", "    3", "      "],
        ["head                ", "12.5000", "  nan ± nan", "   10", "0.5000"],
    ]


def test_a_rule_between_sections(capsys):
    print_table([ROWS[0], ROWS[0], ROWS[1]], section=lambda row: row["layer"])
    starts = [line[0] for line in capsys.readouterr().out.splitlines()]
    assert starts == ["┏", "┃", "┡", "│", "│", "├", "│", "└"]


def test_no_letter_of_a_name_is_lost_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    print_table(ROWS[:1])
    out = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)  # colours and bold print
    assert max(map(len, out.splitlines())) <= 40
    names = [row[0].strip() for row in cells(out)]
    assert len(names) > 1
    assert "".join(names) == "model.layer1.0.conv1"


@pytest.mark.parametrize("values", [[1.5, 2.25, 7.0], [0.1, 0.1]])
def test_mean_and_deviation_of_the_sample(values):
    mean, deviation = mean_and_std(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert deviation == pytest.approx(statistics.stdev(values), abs=1e-12)
    assert mean_and_std(values[:1]) == (values[0], None)


@pytest.mark.parametrize(
    ("mean", "deviation", "decimals", "text"),
    [
        (12.345, 0.678, 2, "12.35 ± 0.68"),
        (-0.12345, 0.5, 3, "-0.123 ± 0.500"),
        (3.0, None, 2, "3.00"),
        (3.14159, 2.71828, 1, "3.1 ± 2.7"),
        (None, None, 2, ""),
        (float("nan"), float("nan"), 2, "nan ± nan"),
        (-10359.1234, 9999.4, 1, "-1.04e+04 ± 9999.4"),
        (float("inf"), 1e4, 3, "inf ± 1e+04"),
    ],
)
def test_plus_minus(mean, deviation, decimals, text):
    assert plus_minus(mean, deviation, decimals) == text
