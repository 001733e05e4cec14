"""Accuracy contracts: the statistics, on rows whose truth is known, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Train, revmux, write_rows
from hypothesis import given
from hypothesis import strategies as st

from revmux_vllm import checkpoint
from revmux_vllm.adapters.trust import margins
from revmux_vllm.errors import UserError
from revmux_vllm.planning.contract import Contract, find_contract
from revmux_vllm.rungs import parse_rungs
from revmux_vllm.training.contract import Seen, Terms, calibrate, walk

STOPS = parse_rungs(["exit@4", "exit@8"])
COSTS = [0.4, 0.7, 1.02]


def drawn(count: int, seed: int, rare: float = 0.5) -> Seen:
    """Rows that are more or less difficult: the backbone's logits with noise, less of it later."""
    rng = np.random.default_rng(seed)
    own = rng.normal(0, 3, count) + np.log(rare / (1 - rare))
    stops = [own + rng.normal(0, noise, count) for noise in (1.6, 0.8)]
    two = (np.stack([np.zeros(count), one], -1) for one in (*stops, own))
    first, second, last = (torch.tensor(one, dtype=torch.float32) for one in two)
    return Seen(torch.stack([first, second], dim=1), last)


POPULATION = drawn(30_000, 1)


def agreement(contract: Contract, seen: Seen) -> float:
    return float((walk(contract, seen).answers.argmax(-1) == seen.own.argmax(-1)).float().mean())


def test_a_margin_is_the_lead_of_the_last_answer_at_every_stop() -> None:
    answers = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]])
    assert margins(answers).tolist() == [[-2.0, 2.0]]


def test_the_promise_is_kept_and_pays() -> None:
    contract = calibrate(drawn(4000, 0), STOPS, COSTS, Terms(0.98))
    assert agreement(contract, POPULATION) >= 0.98
    assert contract.measured >= 0.98
    assert contract.speedup > 1.3
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


@pytest.mark.parametrize("terms", [Terms(0.97, 0.9), Terms(0.97, 0.9, per_class=True)])
def test_it_is_kept_as_often_as_it_is_confident(terms: Terms) -> None:
    """Calibrations on other rows each; the slow test below makes a thousand."""
    assert kept(50, terms) >= 0.9 - 2 * (0.09 / 50) ** 0.5


@pytest.mark.slow
def test_a_thousand_calibrations() -> None:
    assert kept(1000, Terms(0.97, 0.9)) >= 0.9 - 2 * (0.09 / 1000) ** 0.5


def kept(draws: int, terms: Terms) -> float:
    """Share of calibrations whose promise holds for the whole population."""
    classes = POPULATION.own.argmax(-1)
    hits = 0
    for seed in range(draws):
        contract = calibrate(drawn(1500, 100 + seed), STOPS, COSTS, terms)
        right = walk(contract, POPULATION).answers.argmax(-1) == classes
        groups = [classes == c for c in range(2)] if terms.per_class else [classes >= 0]
        hits += all(right[rows].float().mean() >= terms.agreement for rows in groups)
    return hits / draws


def test_a_promise_about_probabilities_is_harder() -> None:
    seen = drawn(4000, 0)
    loose, strict = (calibrate(seen, STOPS, COSTS, Terms(0.98, probability=p)) for p in (None, 0.1))
    assert strict.speedup < loose.speedup
    left = walk(strict, POPULATION).answers.softmax(-1) - POPULATION.own.softmax(-1)
    assert (left.abs().amax(-1) <= 0.1).float().mean() >= 0.98


def test_a_rare_class_is_not_given_up() -> None:
    """Of 3 in 100 rows the backbone says yes; 97 % would be kept without ever saying it."""
    seen, population = drawn(8000, 0, rare=0.001), drawn(60_000, 1, rare=0.001)
    positives = population.own.argmax(-1) == 1
    whole = calibrate(seen, STOPS, COSTS, Terms(0.97))
    each = calibrate(seen, STOPS, COSTS, Terms(0.9, per_class=True))
    found = [
        float((walk(c, population).answers.argmax(-1)[positives] == 1).float().mean())
        for c in (whole, each)
    ]
    assert found[1] >= 0.9 > found[0]


@pytest.mark.parametrize(
    ("terms", "count", "needed"),
    [(Terms(0.99), 200, 299), (Terms(0.999), 2000, 2995), (Terms(0.99, per_class=True), 400, 368)],
)
def test_too_few_rows_are_refused_with_the_number(terms: Terms, count: int, needed: int) -> None:
    with pytest.raises(UserError, match=f"at least {needed} .*give {2 * needed} rows or more"):
        calibrate(drawn(count, 0), STOPS, COSTS, terms)


CONTRACT = calibrate(drawn(3000, 7), STOPS, COSTS, Terms(0.95))


@given(st.integers(0, 10_000))
def test_a_row_leaves_once_with_the_answer_of_its_stop(seed: int) -> None:
    seen = drawn(50, seed)
    left = walk(CONTRACT, seen)
    every = torch.cat([seen.stops, seen.own[:, None]], dim=1)
    assert (left.answers == every[torch.arange(50), left.place]).all()


def test_a_contract_that_is_not_there_is_named_with_the_command() -> None:
    assert find_contract([CONTRACT], 0.95, None, False) == CONTRACT
    command = "revmux calibrate FOLDER --data TEXTS --agreement 0.99 --probability 0.05 --per-class"
    with pytest.raises(UserError, match=f"but for 95 %: found 0.99; calibrate it: {command}"):
        find_contract([CONTRACT], 0.99, 0.05, True)


def test_the_command(train: Train, tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "dev.tsv", 64, 1)
    rows = write_rows(tmp_path / "fresh.tsv", 400, 5)
    assert train("--rungs exit,exit@2,exit@3,merge:2").exit_code == 0
    out = tmp_path / "out"
    few = revmux(f"calibrate {out} --data {dev}")
    assert "--data: 32 rows test the promise" in " ".join(few.output.split())
    result = revmux(f"calibrate {out} --data {rows} --agreement 0.6,0.7 --json")
    assert result.exit_code == 0, result.output
    loose, contract = checkpoint.read_contracts(out)
    assert (loose.agreement, contract.agreement) == (0.6, 0.7)
    both = [loose.to_dict(), contract.to_dict()]
    assert json.loads(result.stdout) == json.loads(json.dumps(both))
    assert [str(stop) for stop in contract.stops] == ["exit", "exit@2", "exit@3"]
    shown = revmux(f"calibrate {out} --data {rows} --agreement 0.7").stdout
    assert "leave there" in shown
    report = json.loads(revmux(f"eval {out} --eval {dev} --json").stdout)
    _, row = report["contracts"]
    assert (row["name"], row["agreement_promised"]) == ("70 %", 0.7)
    assert sum(row["shares"].values()) == pytest.approx(1)
    odd = revmux(f"calibrate {out} --data {rows} --agreement most")
    assert "--agreement most: expected shares like 0.98,0.99" in " ".join(odd.output.split())
    bad = revmux(f"calibrate {out} --data {rows} --agreement 1.5")
    assert "--agreement 1.5: expected above 0 and below 1" in bad.output
    assert train("--rungs exit,merge:2").exit_code == 0
    assert checkpoint.read_contracts(out) == [], "of other adapters"
    assert train("--rungs merge:2").exit_code == 0
    none = revmux(f"calibrate {out} --data {rows} --agreement 0.7")
    assert "no `exit@L` to stop at" in none.output
