"""What there is to say about a source of pictures before anybody trains on it."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from latentdiff.training.data.buckets import Size, bucket_sizes, nearest
from latentdiff.training.data.captions import MANY_WORDS, printable, shorten
from latentdiff.training.data.duplicates import near_groups
from latentdiff.training.data.load import NAMED
from latentdiff.training.data.manifest import Entry
from latentdiff.training.data.pictures import CaptionedPicture
from latentdiff.training.data.source import Finding

ENORMOUS = 25_000_000  # pixels: takes long to read each time
CUT_AWAY = 1 / 3 + 1e-6  # of a picture, by cropping
GROUPS = 10  # of duplicates that are named


@dataclass
class DataReport:
    """The good pictures of a source with their entries, side by side, and what is wrong with others.

    Args:
        refused: named within the source.
        tokens: length of a caption in tokens, and the most that the text encoder reads.
    """

    pictures: list[CaptionedPicture]
    entries: list[Entry]
    refused: list[Finding]
    warnings: list[Finding]
    resolution: int = 64
    step: int = 8
    tokens: tuple[Callable[[Sequence[str]], list[int]], int] | None = None
    exact: list[list[int]] = field(init=False)
    near: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        by_digest: dict[str, list[int]] = defaultdict(list)
        for index, entry in enumerate(self.entries):
            by_digest[entry.digest].append(index)
        self.exact = sorted(group for group in by_digest.values() if len(group) > 1)
        first = [group[0] for group in by_digest.values()]
        groups = near_groups([self.entries[i].fingerprint for i in first])
        self.near = [[first[i] for i in group] for group in groups]

    @property
    def bad_share(self) -> float:
        return len(self.refused) / max(1, len(self.refused) + len(self.entries))

    def lines(self) -> Iterator[str]:
        """The report, as people read it."""
        yield from self._counts()
        yield from _section("Cannot be used", self.refused)
        yield from _section("Worth a look", self.warnings)
        if self.entries:
            yield from self._duplicates()
            yield from self._captions()
            yield from self._token_lengths()
            yield from self._sizes()
            yield from self._shapes()

    def _counts(self) -> Iterator[str]:
        total = len(self.entries) + len(self.refused)
        yield f"{_many(total, 'picture')}: {len(self.entries)} can be used, {len(self.refused)} cannot."

    def _duplicates(self) -> Iterator[str]:
        for groups, what in ((self.exact, "the same, byte for byte"), (self.near, "nearly the same, by their looks")):
            if groups:
                yield ""
                yield f"Pictures that are {what}: {_many(len(groups), 'group')}, {sum(map(len, groups))} pictures"
                for group in groups[:GROUPS]:
                    names = [printable(self.entries[i].name) for i in group[:5]]
                    yield f"  {', '.join(names)}" + (f" and {len(group) - 5} more" if len(group) > 5 else "")
                yield from _rest(len(groups) - GROUPS)

    def _captions(self) -> Iterator[str]:
        captions = [caption for picture in self.pictures for caption in picture.captions]
        words = sorted(len(caption.split()) for caption in captions)
        yield ""
        yield (
            f"{_many(len(captions), 'caption')} of {_many(len(self.pictures), 'picture')}: {words[0]} to {words[-1]} "
            f"words, median {statistics.median(words):g}"
        )
        shared = Counter(caption for picture in self.pictures for caption in set(picture.captions))
        often = [(caption, count) for caption, count in shared.most_common() if count > 1]
        if often:
            named = ", ".join(f'"{shorten(caption, 40)}" ({count})' for caption, count in often[:5])
            yield f"  {_many(len(often), 'caption')} stand with more than one picture: {named}"

    def _token_lengths(self) -> Iterator[str]:
        captions = [(p, e, c) for p, e in zip(self.pictures, self.entries, strict=True) for c in p.captions]
        if self.tokens is None:
            long = [(e, len(c.split())) for _, e, c in captions if len(c.split()) > MANY_WORDS]
            if long:
                yield f"  {_many(len(long), 'caption')} of more than {MANY_WORDS} words; text encoders mostly cut them:"
                yield from _named(f"{printable(e.name)} ({n} words)" for e, n in long)
            return
        count, most = self.tokens
        lengths = count([caption for _, _, caption in captions])
        yield f"  {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):g}; {most} are read"
        cut = [(e, n) for (_, e, _), n in zip(captions, lengths, strict=True) if n > most]
        if cut:
            yield f"  {_many(len(cut), 'caption')} will be cut:"
            yield from _named(f"{printable(e.name)} ({n} tokens)" for e, n in cut)

    def _sizes(self) -> Iterator[str]:
        sizes = sorted((entry.size for entry in self.entries), key=lambda size: size[0] * size[1])
        yield ""
        yield f"Sizes: from {_size(sizes[0])} to {_size(sizes[-1])}, median {_size(sizes[len(sizes) // 2])}"
        small = [entry for entry in self.entries if min(entry.size) < self.resolution]
        if small:
            yield f"  {len(small)} with a side below resolution={self.resolution} will be enlarged, and blurred:"
            yield from _named(f"{printable(entry.name)} ({_size(entry.size)})" for entry in small)
        large = [entry for entry in self.entries if entry.size[0] * entry.size[1] > ENORMOUS]
        if large:
            yield f"  {len(large)} of more than {ENORMOUS // 10**6} million pixels are slow to read:"
            yield from _named(f"{printable(entry.name)} ({_size(entry.size)})" for entry in large)

    def _shapes(self) -> Iterator[str]:
        square = (self.resolution, self.resolution)
        buckets = bucket_sizes(self.resolution, self.step)
        nearest_of = {size: nearest(size, buckets) for size in {entry.size for entry in self.entries}}
        counts = Counter(nearest_of[entry.size] for entry in self.entries)
        cropped = sum(_lost(entry.size, square) > CUT_AWAY for entry in self.entries)
        bucketed = sum(_lost(entry.size, nearest_of[entry.size]) > CUT_AWAY for entry in self.entries)
        yield ""
        yield f"Shapes, with buckets=true at resolution={self.resolution}:"
        most = max(counts.values())
        for bucket in buckets:
            if counts[bucket]:
                bar = "#" * max(1, round(30 * counts[bucket] / most))
                yield f"  {_size(bucket):>11}  {counts[bucket]:>7}  {bar}"
        yield f"  More than a third is cropped away of {cropped} as squares, and of {bucketed} with buckets."


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _lost(size: Size, target: Size) -> float:
    """The share of a picture of `size` that is cropped away where it is to cover `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return 1 - target[0] * target[1] / (size[0] * size[1] * scale**2)


def _section(title: str, findings: Sequence[Finding]) -> Iterator[str]:
    if findings:
        yield ""
        yield f"{title} ({len(findings)}):"
        yield from _named((f"{printable(f.name)}: {printable(f.reason)}" for f in findings), indent=2)


def _named(lines: Iterator[str], indent: int = 4) -> Iterator[str]:
    """The first `NAMED` of `lines`, and how many more there are."""
    rest = 0
    for number, line in enumerate(lines):
        if number < NAMED:
            yield " " * indent + line
        else:
            rest += 1
    yield from _rest(rest, indent)


def _rest(count: int, indent: int = 2) -> Iterator[str]:
    if count > 0:
        yield f"{' ' * indent}and {count} more"
