"""Whether the lower bounds of pyproject.toml are the versions installed here: python lower_bounds.py [EXTRA...].

Without extras, of what is always needed. A bound that is not is tested by nobody, for something else asks for a higher
version: raise it.
"""

import sys
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version


def untested(extras: list[str]) -> list[str]:
    """What is said of each bound that is lower than the version installed."""
    found = []
    for one in map(Requirement, requires("latentdiff") or ()):
        asked = [one.marker.evaluate({"extra": extra}) for extra in extras] if one.marker else [not extras]
        for bound in one.specifier if any(asked) else ():
            there = version(one.name)
            if bound.operator == ">=" and Version(there) != Version(bound.version):
                found.append(f"{one.name}{bound} is not tested: {there} is what is installed")
    return found


if __name__ == "__main__":
    if problems := untested(sys.argv[1:]):
        sys.exit("\n".join(problems))
