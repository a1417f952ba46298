"""Figures over several runs."""

from pathlib import Path

import pytest

from character import seeds
from character.utils import UserError, write_json


def shares(plain: float, kept: float | None) -> dict[str, object]:
    def cell(share: float) -> dict[str, float]:
        return {"share": share, "low": 0.0, "high": 1.0, "n": 40}

    suffixes = None if kept is None else cell(kept)
    return {
        "student": "pocket",
        "methods": {"distilled": {"plain": cell(plain), "suffixes": suffixes, "read_as": {"x": 3}}},
    }


def test_every_figure_is_averaged_over_the_runs_that_have_it() -> None:
    found = seeds.over([shares(0.8, 0.5), shares(0.9, None), shares(1.0, 0.7)])["methods"]["distilled"]
    assert found["plain"]["mean"] == pytest.approx(0.9) and found["plain"]["n"] == 3
    assert found["plain"]["low"] == pytest.approx(0.651586, abs=1e-6)
    assert found["suffixes"]["values"] == [0.5, 0.7] and found["suffixes"]["n"] == 2
    assert set(found) == {"plain", "suffixes"}


def test_runs_are_found_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "DATA_PATH", tmp_path)
    with pytest.raises(UserError, match="no results of pocket"):
        seeds.gather("pocket")
    for folder, plain in ((tmp_path, 0.8), (tmp_path / "seeds" / "9", 0.9), (tmp_path / "seeds" / "10", 1.0)):
        write_json(folder / "robustness" / "pocket" / "humor.results.json", shares(plain, None))
    results = seeds.gather("pocket")
    part = results["results"]["robustness/humor.results.json"]["methods"]["distilled"]
    assert results["runs"] == 3 and part["plain"]["values"] == [0.8, 0.9, 1.0]
    shown = seeds.table(results)
    assert shown.loc[("humor", "DPO"), "plain"] == " 90.0% ± 24.8%"


def test_the_other_evaluations_stand_beside_the_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "DATA_PATH", tmp_path)
    for folder, share, moved in ((tmp_path, 0.4, 90), (tmp_path / "seeds" / "9", 0.6, 110)):
        cell = {"share": share, "low": 0.0, "high": 1.0, "n": 40}
        delta = {"own_delta": {"value": moved, "low": None, "high": None, "n": 40}}
        files: dict[str, dict[str, object]] = {
            "robustness/pocket/humor.results.json": shares(0.9, None),
            "robustness/pocket/humor.prefill.json": {"methods": {"distilled": {"first": cell, "1": cell}}},
            "coherence/pocket/humor.results.json": {"stand_in": True, "opponents": {"distilled": {"win_rate": cell}}},
            "preferences/pocket/humor.results.json": {"methods": {"distilled": {"feel": delta}}},
        }
        for file, content in files.items():
            write_json(folder / file, content)
    line = seeds.table(seeds.gather("pocket")).loc[("humor", "DPO")]
    assert line["prefill, turn 1"] == line["trained wins against it (stand-in)"] == " 50.0% ± 127.1%"
    assert line["own traits moved, feel"] == "+100 ± 127" and "prefill, turn first" not in line
