"""Whether two tests failed in the same way."""

import re

ADDRESS = re.compile(r"0x[0-9a-f]+|/tmp/\S+")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def alike(one: str, other: str, tolerance: float = 1e-3) -> bool:
    """The same words, and numbers that differ by no more than `tolerance`; addresses and temporary files aside.

    What pytest adds on the values within an assertion is left out.
    """
    first, second = (ADDRESS.sub("", message.split("\n +  where")[0]) for message in (one, other))
    if NUMBER.sub("#", first) != NUMBER.sub("#", second):
        return False
    numbers = zip(NUMBER.findall(first), NUMBER.findall(second), strict=True)
    return all(abs(float(a) - float(b)) <= tolerance for a, b in numbers)
