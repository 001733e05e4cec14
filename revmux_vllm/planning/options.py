"""What the user may say about serving: the ``revmux`` object of ``--additional-config``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from revmux_vllm.config import RevMuxConfig
from revmux_vllm.errors import UserError, within
from revmux_vllm.planning.contract import Contract, find_contract
from revmux_vllm.planning.worth import MIN_AGREEMENT, Choice, Measured, choose_rungs
from revmux_vllm.rungs import Rung, parse_rungs

WHERE = "--additional-config revmux"
ADAPTER_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """``--additional-config '{"revmux": {...}}'``.

    Attributes:
        policy: ``load``, ``off`` (the backbone alone), ``fixed:N`` (composites as wide as N) or
            ``fixed:RUNG`` by name, such as ``fixed:merge:2``.
        rungs: of the checkpoint's, those allowed at all; none leaves the backbone alone. Default:
            all of them.
        min_agreement: ``load`` uses a rung only if at least this share of its answers was measured
            to be the backbone's, and only if no other one is as fast and better; 0 does not ask,
            and leaves out ``exit`` unless it is named in ``rungs``.
        min_width: ``load`` saves at least this much, also when nobody else waits.
        max_width: the widest composite; 1 leaves merging alone. Default: the widest.
        target_ms: horizon of ``load``.
        linger_ms: longest time that a request waits for partners at a composite's rung.
        isolate: a request without a ``cache_salt`` shares composites with nobody.
        adapter_dtype: what adapters compute in: ``float32``, ``bfloat16``, or ``auto``: on a GPU
            bfloat16 where the backbone is served in 16 bits, on a CPU at least as wide as they are
            stored.
        agreement: busy, answer by the checkpoint's accuracy contract: at least this share of the
            answers is the backbone's. Then no rung is used but those named in ``rungs``, and these
            only beyond what the contract can carry.
        shadow_rate: share of the requests under the contract that run to the end all the same: they
            are answered exactly, and say how often the contract's answer would have been the same.
        probability, per_class: the contract's further terms; see ``Contract``.
        choice: what became of the rungs and why; not an option.
        contract: of these terms, where the checkpoint was asked; not an option.
    """

    policy: str = "load"
    rungs: tuple[Rung, ...] = ()
    min_width: int = 1
    max_width: int = 1
    target_ms: float = 1000.0
    linger_ms: float = 0.0
    isolate: bool = False
    adapter_dtype: str = "auto"
    min_agreement: float = MIN_AGREEMENT
    agreement: float | None = None
    probability: float | None = None
    per_class: bool = False
    shadow_rate: float = 0.01
    choice: Choice = Choice(())  # noqa: RUF009  frozen
    contract: Contract | None = None


def read_options(
    additional_config: Any,
    config: RevMuxConfig,
    measured: Mapping[Rung, Measured] | None = None,
    contracts: Sequence[Contract] | None = None,
) -> Options:
    """The user's options over a checkpoint.

    Args:
        additional_config: vLLM's.
        config: of the checkpoint.
        measured: what is known of its rungs; None: do not ask, as for random weights.
        contracts: that it is calibrated for; None: do not ask.

    Raises:
        UserError: for an unknown key or value, with what is known, in the spelling of the JSON.
    """
    given = additional_config.get("revmux", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(given, dict):
        raise UserError(WHERE, f"expected an object, found {given!r}")
    known = sorted(set(Options.__dataclass_fields__) - {"choice", "contract"})
    if unknown := sorted(set(given) - set(known)):
        raise UserError(WHERE, f"unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    with within("", lambda key: f"{WHERE}.{key}"):
        options = _read(given, config, measured)
        if options.agreement is None or contracts is None:
            return options
        terms = options.agreement, options.probability, options.per_class
        return replace(options, contract=find_contract(contracts, *terms))


def fixed_rung(options: Options) -> Rung:
    """The rung that a policy ``fixed:N`` or ``fixed:RUNG`` names; UserError for any other."""
    kind, _, name = str(options.policy).partition(":")
    names = {str(rung): rung for rung in options.rungs}
    names |= {str(rung.mux): rung for rung in options.rungs if rung == Rung(mux=rung.mux)}
    if kind != "fixed" or name not in names:
        choices = ["load", "off", *(f"fixed:{choice}" for choice in names)]
        raise UserError("`policy`", expected=f"one of {', '.join(choices)}", found=options.policy)
    return names[name]


def _read(
    given: dict[str, Any], config: RevMuxConfig, measured: Mapping[Rung, Measured] | None
) -> Options:
    widths = sorted({1, *(rung.mux for rung in config.rungs)})
    savings = sorted({1, *(rung.shortening * rung.mux for rung in config.rungs)})
    max_width = _one_of("max_width", given.get("max_width", widths[-1]), widths)
    _one_of("min_width", given.get("min_width", 1), savings)
    for key, above in (("target_ms", ", above 0"), ("linger_ms", "")):
        value = given.get(key, 1.0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value < 0 or (above and not value):
            raise UserError(f"`{key}`", expected=f"milliseconds{above}", found=value)
    if not isinstance(given.get("isolate", False), bool):
        raise UserError("`isolate`", expected="true or false", found=given["isolate"])
    dtype = given.get("adapter_dtype", "auto")
    if dtype not in ADAPTER_DTYPES:
        raise UserError("`adapter_dtype`", expected=f"one of {ADAPTER_DTYPES}", found=dtype)
    least = given.get("min_agreement", MIN_AGREEMENT)
    if not isinstance(least, int | float) or isinstance(least, bool) or not 0 <= least <= 1:
        raise UserError("`min_agreement`", expected="a share, 0 to 1", found=least)
    _check_terms(given)
    known = measured if least else None
    default = [rung for rung in config.rungs if known is not None or not rung.exit]
    if promises := "agreement" in given:
        known, default = None, []
    rungs = tuple(r for r in _read_rungs(given, config, default) if r.mux <= max_width)
    rungs = (*rungs, Rung(sure=True)) if promises else rungs
    options = Options(**given | {"rungs": rungs, "max_width": max_width})
    if options.policy not in ("load", "off"):
        fixed_rung(options)
        return options
    choice = choose_rungs(rungs, known, least)
    return replace(options, rungs=choice.used, choice=choice)


def _check_terms(given: dict[str, Any]) -> None:
    for key, most in (("agreement", "below 1"), ("probability", "at most 1")):
        value = given.get(key, 0.5)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= 1 or (key == "agreement" and value == 1):
            raise UserError(f"`{key}`", expected=f"a share above 0, {most}", found=value)
    rate = given.get("shadow_rate", 0)
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
        raise UserError("`shadow_rate`", expected="a share, 0 to 1", found=rate)
    if not isinstance(given.get("per_class", False), bool):
        raise UserError("`per_class`", expected="true or false", found=given["per_class"])
    if "agreement" not in given and (
        more := {"probability", "per_class", "shadow_rate"} & set(given)
    ):
        problem = "a term of an accuracy contract"
        raise UserError(f"`{min(more)}`", problem, cure="give an agreement too")


def _read_rungs(
    given: dict[str, Any], config: RevMuxConfig, default: Sequence[Rung]
) -> tuple[Rung, ...]:
    names = given.get("rungs", list(map(str, default)))
    if not isinstance(names, list):
        raise UserError("`rungs`", expected="a list", found=names)
    with within("`rungs`"):
        rungs = parse_rungs(names)
    missing = [str(rung) for rung in rungs if rung not in config.rungs]
    if missing:
        own = ", ".join(map(str, config.rungs))
        raise UserError("`rungs`", f"the checkpoint has no {', '.join(missing)}; it has {own}")
    return rungs


def _one_of(key: str, value: Any, choices: list[int]) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in choices:
        raise UserError(f"`{key}`", expected=f"one of {choices}", found=value)
    return value
