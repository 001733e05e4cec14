"""What the user can mend, in the words of every front; and what is a bug keeps its traceback."""

import pickle
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner

from revmux_vllm.errors import UserError, UserErrors, raise_all, require, within
from revmux_vllm.terminal import as_flag, mendable_errors

EPOCHS = UserError("`epochs`", expected="more than 0", found=0.0, cure="see `learning_rate`")


def test_each_front_spells_options_in_its_own_way() -> None:
    assert str(EPOCHS) == "epochs: expected more than 0, found 0.0; see learning_rate"
    assert EPOCHS.words(as_flag, typed=True) == (
        "--epochs 0: expected more than 0; see --learning-rate"
    )
    in_json = EPOCHS.words(lambda name: f"revmux.{name}")
    assert in_json == "revmux.epochs: expected more than 0, found 0.0; see revmux.learning_rate"


@pytest.mark.parametrize(
    ("found", "typed"),
    [(["a", "b"], "--it a,b"), (1e-4, "--it 0.0001"), ("", "--it"), (True, "--it True")],
)
def test_a_value_stands_behind_its_flag_as_it_was_typed(found: object, typed: str) -> None:
    error = UserError("`it`", expected="something else", found=found)
    assert error.words(as_flag, typed=True) == f"{typed}: expected something else"


def test_only_names_of_options_are_spelled() -> None:
    error = UserError("rows.tsv: row 3", "no column `text`", cure="`revmux train --help` says more")
    assert error.words(as_flag) == (
        "rows.tsv: row 3: no column --text; `revmux train --help` says more"
    )
    found = UserError("rows.tsv", expected="text", found="`as_it_is`").words(as_flag, typed=True)
    assert "found '--as-it-is'" not in found


def test_all_mistakes_at_once() -> None:
    raise_all([])
    with pytest.raises(UserError) as one:
        raise_all([EPOCHS])
    assert one.value is EPOCHS
    with pytest.raises(UserError) as both:
        raise_all([EPOCHS, UserError("`seed`", "missing")])
    assert both.value.words(as_flag, typed=True).splitlines() == [
        "--epochs 0: expected more than 0; see --learning-rate",
        "--seed: missing",
    ]


def test_a_place_may_fix_the_spelling() -> None:
    with pytest.raises(UserError) as caught, within("config.json", lambda name: f"revmux.{name}"):
        raise EPOCHS
    assert caught.value.words(as_flag, typed=True).startswith("config.json: revmux.epochs: ")
    with pytest.raises(UserError) as caught, within("rows.tsv"):
        raise EPOCHS
    assert caught.value.words(as_flag) == (
        "rows.tsv: --epochs: expected more than 0, found 0.0; see --learning-rate"
    )
    assert str(caught.value).endswith("see learning_rate")


def test_what_is_wrong_may_stand_beside_what_was_found() -> None:
    error = UserError("`port`", "taken by another server", found=8000, cure="choose another")
    assert str(error) == "port: taken by another server: found 8000; choose another"
    assert error.words(as_flag, typed=True) == (
        "--port 8000: taken by another server; choose another"
    )


@pytest.mark.parametrize(
    "error", [EPOCHS, UserError("rows.tsv", "no rows"), UserErrors([EPOCHS, EPOCHS])]
)
def test_it_travels_between_processes(error: UserError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert back.words(as_flag, typed=True) == error.words(as_flag, typed=True)
    assert str(back) == str(error)


def test_what_is_not_installed_is_named_with_what_installs_it() -> None:
    require("json", extra="train")
    with pytest.raises(UserError, match=r"nowhere is not installed; .*pip install -e '.\[ray\]'"):
        require("json", "nowhere", extra="ray")


def command(work: Callable[[], None]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def run() -> None:
        with mendable_errors(lambda: "--resume continues it"):
            work()

    return app


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EPOCHS, "error: --epochs 0: expected more than 0; see --learning-rate\n"),
        (PermissionError(13, "Permission denied", "out"), "'out'. --resume continues it\n"),
        (KeyboardInterrupt(), "interrupted. --resume continues it\n"),
    ],
)
def test_what_the_user_can_mend_ends_a_command_with_one_message(
    error: BaseException, said: str
) -> None:
    done = CliRunner().invoke(command(failing(error)))
    assert done.exit_code == 2
    assert done.stderr.endswith(said)


@pytest.mark.parametrize(
    "error", [ValueError("ours"), ImportError("ours"), OSError("ours"), KeyError("ours")]
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    done = CliRunner().invoke(command(failing(error)))
    assert done.exception is error
    assert done.exit_code == 1
