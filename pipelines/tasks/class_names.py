"""Names of classes, and which class a name means."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Label = int | str
SHOWN = 20  # names in a message


@dataclass(frozen=True)
class ClassNames:
    """The names of `count` classes, by number; none where they are only numbered.

    A class can have several names, with commas between them, as ImageNet's have.
    """

    names: Mapping[int, str]
    count: int

    def numbers(self, labels: Label | Sequence[Label]) -> list[int]:
        """The numbers of one class or of several.

        Raises:
            ValueError: there is no such class, or several have that name, or none is given.
        """
        given = [labels] if isinstance(labels, int | str) else list(labels)
        if not given:
            raise ValueError("class_labels is empty; give one class or more")
        return [self.number(label) for label in given]

    def number(self, label: Label) -> int:
        """A whole name comes before one of several, and one that is written alike before one that is not.

        Raises:
            ValueError: there is no such class, or several have that name.
        """
        if not isinstance(label, str):
            if isinstance(label, bool) or not 0 <= int(label) < self.count:
                raise ValueError(f"there is no class {label!r}; they are numbered from 0 to {self.count - 1}")
            return int(label)
        wanted = label.strip()
        ways: list[Callable[[str], bool]] = [
            lambda names: names == wanted,
            lambda names: names.strip().lower() == wanted.lower(),
            lambda names: wanted.lower() in [name.strip().lower() for name in names.split(",")],
        ]
        for has in ways:
            found = [number for number, names in self.names.items() if has(names)]
            if len(found) > 1:
                which = ", ".join(f"{number} ({self.names[number]})" for number in found[:SHOWN])
                raise ValueError(f"{label!r} is a name of several classes: {which}; give the number")
            if found:
                return found[0]
        names = list(self.names.values())
        known = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
        raise ValueError(f"there is no class {label!r}; {f'there are {known}' if names else 'give a number'}")
