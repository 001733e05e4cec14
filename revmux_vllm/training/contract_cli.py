"""``revmux calibrate``: its options. What it needs is imported when it runs."""

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from sys import stderr
from typing import Annotated

import typer

from revmux_vllm.errors import UserError, raise_all, require
from revmux_vllm.terminal import AsJson, Folder, make_console, mendable_errors
from revmux_vllm.training.cli import ROWS, AsTrained, TextColumns, quiet, split
from revmux_vllm.training.tables import contract_table


# Long because every option stands here with its help.
def calibrate(
    folder: Folder,
    data: Annotated[
        str,
        typer.Option(
            help=f"{ROWS}. Text like that which will be asked, and such that nobody was trained "
            "on; labels are not needed. Half of it fits, the other half tests."
        ),
    ],
    agreement: Annotated[
        str,
        typer.Option(
            help="Share of the answers that must be the backbone's own; several, with commas "
            "between, are several contracts."
        ),
    ] = "0.99",
    confidence: Annotated[
        float, typer.Option(help="With which it must hold for text like this.")
    ] = 0.95,
    probability: Annotated[
        float | None,
        typer.Option(
            help="Count an answer as the backbone's only if no probability is further from its: "
            "for users who put thresholds on scores. Default: the label alone counts."
        ),
    ] = None,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class",
            help="Promise it for each of the backbone's classes by itself. A model that seldom "
            "says yes would keep 99 % by never saying it.",
        ),
    ] = False,
    text_columns: TextColumns = None,
    max_tokens: AsTrained = None,
    as_json: AsJson = False,
) -> None:
    """Promise an accuracy: find after which layers a request may leave, and how sure it must be.

    Example: `revmux calibrate my-revmux --data fresh.tsv --agreement 0.98,0.99`. The promises are
    kept in the checkpoint; `revmux eval` measures them on other rows.
    """
    with mendable_errors(), redirect_stdout(stderr):
        require("accelerate", "psutil", "sklearn", extra="train")
        agreements = _read_shares(agreement)
        _check_terms(agreements, confidence, probability)
        quiet()
        from revmux_vllm.training.contract import Terms
        from revmux_vllm.training.measure import calibrate

        terms = [Terms(share, confidence, probability, per_class) for share in agreements]
        contracts = calibrate(
            folder, data, terms, text_columns=split(text_columns), max_tokens=max_tokens
        )
    if as_json:
        print(json.dumps([contract.to_dict() for contract in contracts]))
        return
    console = make_console()
    for contract in contracts:
        console.print(contract_table(contract))
    console.print(f"kept in {folder}; measure it: revmux eval {folder} --eval ROWS", soft_wrap=True)


def _read_shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError as error:
        raise UserError("`agreement`", expected="shares like 0.98,0.99", found=text) from error


def _check_terms(agreements: Sequence[float], confidence: float, probability: float | None) -> None:
    shares = [*(("agreement", share) for share in agreements), ("confidence", confidence)]
    mistakes = [
        UserError(f"`{name}`", expected="above 0 and below 1", found=value)
        for name, value in shares
        if not 0 < value < 1
    ]
    if probability is not None and not 0 < probability <= 1:
        mistakes.append(
            UserError("`probability`", expected="above 0, 1 at most", found=probability)
        )
    raise_all(mistakes)
