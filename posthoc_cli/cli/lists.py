"""LIST: what an option that may be given several values takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from posthoc_cli.errors import UsageError

MAX_VALUES = 10_000
"""Values that one option may list; more is a slip of the keyboard."""


@dataclass(frozen=True, slots=True)
class Item:
    """A number of a list, and what stands around it: a `shape`, or a `unit`, "%"."""

    number: Decimal
    shape: str = ""
    unit: str = ""

    def __str__(self) -> str:
        return (f"{self.shape}:" if self.shape else "") + shortest(self.number) + self.unit


NUMBERS, LENGTHS, SHAPED = "0.05,0.10", "5%,10% or 480", "1-sqrt:5%,10%"
"""How lists of numbers are written, of lengths, and of lengths with shapes."""


def read_list(option: str, texts: Sequence[str]) -> list[Decimal]:
    """The numbers of a LIST option, given once or more.

    A list is numbers with commas between them. Dots continue the spacing of the two numbers before
    them, up or down, and have to arrive at the number after them: `0.010,0.015,...,0.250`. The
    numbers are decimal, so that they are those that a person would type.

    Raises UsageError.
    """
    return [item.number for item in _read(option, texts, NUMBERS)]


def read_numbers(option: str, texts: Sequence[str] | None) -> list[float]:
    """The same as `read_list`, as floats; empty where the option wasn't given."""
    return [float(value) for value in read_list(option, texts or ())]


def read_lengths(option: str, texts: Sequence[str] | None, shapes: bool = False) -> list[str]:
    """The lengths of a LIST option, one text each: `480`, `5%`; and with `shapes`, `1-sqrt:5%`.

    A shape holds for the lengths after it: `1-sqrt:5%,10%`. Dots lead from lengths to one of the
    same unit and shape.
    """
    return [str(item) for item in _read(option, texts or (), SHAPED if shapes else LENGTHS)]


def _read(option: str, texts: Sequence[str], such: str) -> list[Item]:
    values: list[Item] = []
    for whole in texts:
        text = whole if len(whole) <= 60 else whole[:57] + "..."  # as messages show it
        items = [item.strip() for item in whole.replace("…", "...").split(",")]
        found: list[Item] = []
        dots, shape = False, ""
        for at, item in enumerate(items):
            if item == "...":
                before = [one for one in items[max(at - 2, 0) : at] if one != "..."]
                if len(before) < 2 or at == len(items) - 1 or items[at + 1] == "...":
                    raise UsageError(
                        option,
                        f"'{text}': the dots need two numbers before them and one after",
                        "write it as in 0.010,0.015,...,0.250",
                    )
                dots = True
                continue
            number = item
            if such == SHAPED:
                shape, number = _shape(item, shape)
            unit = "%" if such != NUMBERS and number.endswith("%") and number[-2:] != " %" else ""
            value = _number(option, number.removesuffix(unit), item, text, such)
            one = Item(value, shape, unit)
            found += _continued(option, found[-2], found[-1], one, text) if dots else [one]
            dots = False
        values += found
        if len(values) > MAX_VALUES:
            raise _too_many(option, text)
    return values


def _shape(item: str, before: str) -> tuple[str, str]:
    """The shape of an item, by default that of the one before, and its length."""
    from posthoc_cli.solver.averages import SHAPES
    from posthoc_cli.solver.targets import make_target

    shape, colon, length = item.rpartition(":")
    if not colon and (not before or item in SHAPES):
        make_target("lr_decay", item)  # which tells what is missing
    return (shape if colon else before), length


def _number(option: str, number: str, item: str, text: str, such: str) -> Decimal:
    try:
        value = Decimal(number)
    except InvalidOperation:
        value = Decimal("nan")
    # Far exponents would make sums of decimals fail, and mean nothing here.
    if not value.is_finite() or abs(value.adjusted()) > 30 or len(value.as_tuple().digits) > 25:
        what = f"'{item}' in '{text}'" if item != text else f"'{item}'"
        noun = "a number" if such == NUMBERS else "a length"
        raise UsageError(
            option,
            f"{what} is not {noun}" if number else f"{noun} is missing in '{text}'",
            f"give {noun[2:]}s with commas between them, such as {such}",
        )
    return value


def _continued(option: str, one: Item, other: Item, to: Item, text: str) -> list[Item]:
    """The values after `other`, at the spacing of the two, to the one that the dots lead `to`."""
    if len({(each.shape, each.unit) for each in (one, other, to)}) > 1:
        raise UsageError(
            option,
            f"'{text}': the dots lead from {one} and {other} to {to}, another kind of length",
            "write it as in 5%,10%,...,50%",
        )
    second, last = other.number, to.number
    spacing = second - one.number
    rest = last - second
    if spacing == 0 or rest * spacing <= 0:
        raise UsageError(
            option,
            f"'{text}': from {one} and {other} the dots don't lead to {to}",
            "write it as in 0.010,0.015,...,0.250",
        )
    if rest / spacing > MAX_VALUES:
        raise _too_many(option, text)
    count, left_over = divmod(rest, spacing)
    if left_over:
        below = second + count * spacing
        raise UsageError(
            option,
            f"'{text}': steps of {abs(spacing)} from {other} miss {to}",
            f"end the list at {shortest(below)} or {shortest(below + spacing)}",
        )
    return [Item(second + spacing * k, to.shape, to.unit) for k in range(1, int(count) + 1)]


def _too_many(option: str, text: str) -> UsageError:
    return UsageError(option, f"'{text}': more than {MAX_VALUES} values", "give a wider spacing")


def shortest(number: Decimal) -> str:
    """`number` without an exponent or zeros that say nothing: 0.050 -> 0.05."""
    plain = f"{number.normalize():f}"
    return "0" if plain == "-0" else plain


def read_target_for(texts: Sequence[str] | None) -> list[tuple[str, str]]:
    """Each glob of tensors and its target; the last `=` is what parts them. Raises UsageError."""
    rules = []
    for text in texts or ():
        glob, equals, target = text.rpartition("=")
        if not (glob and equals and target):
            missing = "target" if glob or not equals else "glob"
            raise UsageError(
                "--target-for", f"'{text}' has no {missing}", "write it as in '*.attn.*=0.15'"
            )
        rules.append((glob.strip(), target.strip()))
    return rules
