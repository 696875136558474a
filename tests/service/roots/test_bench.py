"""The commands that measure and stress the roots."""

import importlib
import json

import numpy as np
import pytest

from preconditioner_service.bench import fuzz_roots as fuzz
from preconditioner_service.cli import main
from preconditioner_service.roots import inverse_root


def test_fuzz_finds_nothing_wrong(tmp_path, capsys):
    target = tmp_path / "fuzz.json"
    main(["bench", "fuzz-roots", "--count", "4000", "--seed", "1", "--json", str(target)])
    result = json.loads(target.read_text())
    assert (result["matrices"], result["wrong"], result["unexpected"]) == (4000, 0, 0)
    assert result["roots"] > 2000
    assert result["worst_residual_over_bound"] <= 1
    assert "4000 matrices" in capsys.readouterr().out


def test_fuzz_would_find_a_wrong_root(monkeypatch):
    honest = fuzz.inverse_roots

    def spoilt(stack, **settings):
        results = honest(stack, **settings)
        for result in results:
            if isinstance(result, fuzz.Root):
                result.matrix[0, 0] *= 1.1
        return results

    monkeypatch.setattr(fuzz, "inverse_roots", spoilt)
    with pytest.raises(SystemExit, match="wrong"):
        main(["bench", "fuzz-roots", "--count", "200"])


def test_fuzz_reports_an_unexpected_exception(monkeypatch):
    def broken(stack, **settings):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(fuzz, "inverse_roots", broken)
    with pytest.raises(SystemExit, match=r"200 unexpected.*planted"):
        main(["bench", "fuzz-roots", "--count", "200"])


def test_bench_measures_and_writes(tmp_path, capsys):
    target = tmp_path / "bench.json"
    arguments = ["roots", "--sizes", "16,160", "--repeats", "1", "--seconds", "0", "--json", str(target)]
    main(["bench", *arguments])
    result = json.loads(target.read_text())
    assert [row["n"] for row in result["rows"]] == [16, 160]
    for row in result["rows"]:
        assert set(row["seconds"]) == {"ours", "bare", "torch", "schur_newton"}
        assert all(value > 0 for value in row["ours_over"].values())
    assert result["host"]["threads"] == 1
    assert "one thread" in capsys.readouterr().out


def test_bench_without_torch_says_so(monkeypatch):
    honest = importlib.import_module

    def missing(name, package=None):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return honest(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit, match="torch"):
        main(["bench", "roots", "--sizes", "16"])


def test_fuzz_check_accepts_an_honest_root():
    matrix = np.diag([1.0, 2.0, 3.0])
    settings = {"p": 4, "conditioning": fuzz.RelativeRidge(1e-6), "method": "eigh"}
    assert fuzz._fault(matrix, inverse_root(matrix, 4), settings) is None
