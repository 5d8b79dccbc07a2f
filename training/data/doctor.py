"""The examination behind ``latentdiff doctor``, and the report of it that people read."""

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentdiff.training.data.advice import advice
from latentdiff.training.data.buckets import Size, bucket_sizes, nearest
from latentdiff.training.data.caption_checks import MANY_WORDS, shorten
from latentdiff.training.data.captioned_picture import CaptionedPicture
from latentdiff.training.data.decode import is_picture
from latentdiff.training.data.duplicates import near_groups
from latentdiff.training.data.load import hold_out, read_source
from latentdiff.training.data.masks import MASK_SUFFIX
from latentdiff.training.data.source import TRAIN, Finding, NoPicturesError, Source, Wanted, normal
from latentdiff.training.data.survey import (
    Entry,
    alike,
    leave_out,
    read_manifest,
    sort_out,
    survey,
    write_manifest,
)
from latentdiff.training.data.tables import read_rows
from latentdiff.training.settings import Condition, DoctorSettings
from latentdiff.training.settings.learning import HELD_OUT_SHARE

ENORMOUS = 25_000_000  # pixels: takes long to read each time
CUT_AWAY = 1 / 3 + 1e-6  # of a picture, by cropping
NAMED = 5  # findings of a kind, and groups of duplicates, that are named; the rest are counted
Tokens = tuple[Callable[[Sequence[str]], list[int]], int]


@dataclass
class DataReport:
    """The good pictures of a source with their entries, side by side, and what is wrong with others.

    Args:
        refused: named within the source.
        tokens: length of a caption in tokens, and the most that the text encoder reads.
        advice: what to do about those that cannot be used.
        splits: how many are trained on and measured on.
    """

    pictures: list[CaptionedPicture]
    entries: list[Entry]
    refused: list[Finding]
    warnings: list[Finding]
    resolution: int = 64
    step: int = 8
    tokens: Tokens | None = None
    advice: list[str] = field(default_factory=list)
    splits: str | None = None
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
        total = len(self.entries) + len(self.refused)
        yield f"{_many(total, 'picture')}: {len(self.entries)} can be used, {len(self.refused)} cannot."
        if self.entries and self.splits is not None:
            yield self.splits
        yield from self.advice
        for title, findings in (("Cannot be used", self.refused), ("Worth a look", self.warnings)):
            named, left = alike(findings, NAMED)
            more = [f"and {left} more"] if left else []
            yield from _section(["", f"{title} ({len(findings)}):"], [*named, *more], indent=2, most=NAMED + 1)
        if self.entries:
            yield from self._duplicates()
            yield from self._masks()
            yield from self._captions()
            yield from self._token_lengths()
            yield from self._sizes()
            yield from self._shapes()

    def _duplicates(self) -> Iterator[str]:
        for groups, what in ((self.exact, "the same, byte for byte"), (self.near, "nearly the same, by their looks")):
            names = [[_name(self.entries[i].name) for i in group] for group in groups]
            lines = [", ".join(some[:5]) + (f" and {len(some) - 5} more" if len(some) > 5 else "") for some in names]
            counts = f"{_many(len(groups), 'group')}, {sum(map(len, groups))} pictures"
            yield from _section(["", f"Pictures that are {what}: {counts}"], lines, indent=2, most=NAMED)

    def _masks(self) -> Iterator[str]:
        without = [_name(picture.name) for picture in self.pictures if picture.mask is None]
        if 0 < len(without) < len(self.pictures):
            head = f"{len(without)} of {len(self.pictures)} have no mask; training wants one for each, or none:"
            yield from _section(["", head], without, indent=2)
        elif not without:
            yield from ("", "Each has a mask, where the loss of training looks (masked_loss=false: everywhere).")

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
        captions = [(e.name, c) for p, e in zip(self.pictures, self.entries, strict=True) for c in p.captions]
        if self.tokens is None:
            unit, most, cut = "words", MANY_WORDS, f"of more than {MANY_WORDS} words; text encoders mostly cut them:"
            lengths = [len(caption.split()) for _, caption in captions]
        else:
            unit, cut = "tokens", "will be cut:"
            count, most = self.tokens
            lengths = count([caption for _, caption in captions])
            yield f"  {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):g}; {most} are read"
        long = [f"{_name(name)} ({n} {unit})" for (name, _), n in zip(captions, lengths, strict=True) if n > most]
        yield from _section([f"  {_many(len(long), 'caption')} {cut}"], long)

    def _sizes(self) -> Iterator[str]:
        sizes = sorted((entry.size for entry in self.entries), key=lambda size: size[0] * size[1])
        yield ""
        yield f"Sizes: from {_size(sizes[0])} to {_size(sizes[-1])}, median {_size(sizes[len(sizes) // 2])}"
        small = [entry for entry in self.entries if min(entry.size) < self.resolution]
        large = [entry for entry in self.entries if entry.size[0] * entry.size[1] > ENORMOUS]
        blurred = f"with a side below resolution={self.resolution} will be enlarged, and blurred"
        slow = f"of more than {ENORMOUS // 10**6} million pixels are slow to read"
        for entries, what in ((small, blurred), (large, slow)):
            lines = [f"{_name(entry.name)} ({_size(entry.size)})" for entry in entries]
            yield from _section([f"  {len(entries)} {what}:"], lines)

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


def _name(name: str) -> str:
    return shorten(name, 300)


def _size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def _lost(size: Size, target: Size) -> float:
    """The share of a picture of `size` that is cropped away where it is to cover `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return 1 - target[0] * target[1] / (size[0] * size[1] * scale**2)


def _section(head: Iterable[str], lines: Sequence[str], indent: int = 4, most: int = NAMED) -> Iterator[str]:
    """`head`, the first `most` of `lines`, and how many more there are; nothing without lines."""
    if lines:
        yield from head
        yield from (" " * indent + line for line in lines[:most])
        if len(lines) > most:
            yield f"{' ' * indent}and {len(lines) - most} more"


def examine_source(
    settings: DoctorSettings,
    manifest: Path | None = None,
    step: int = 8,
    tokens: Tokens | None = None,
    drop_duplicates: bool = False,
) -> DataReport:
    """Examine every picture of ``settings.data``, and of its split "validation" if training uses that too.

    Args:
        manifest: file to write; one that is there is read first: what it says to leave out stays out, and pictures
            that did not change since are not looked at again.
        step: what sides of buckets are multiples of, in pixels.
        tokens: see `DataReport`.
        drop_duplicates: say in the manifest not to use a picture that is the same as an earlier one.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a table cannot be read as a whole, or `manifest` is some other file.
    """
    known: dict[str, Entry] = {}
    if manifest is not None and os.path.lexists(manifest):
        try:
            known = read_manifest(manifest)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; it is not overwritten. Name another file for the manifest") from None
    source, of_validation = _both_splits(settings)
    if settings.manifest is not None:
        leave_out(source, read_manifest(Path(settings.manifest).expanduser()))
    entries = survey(source.pictures, [source.key(picture.name) for picture in source.pictures], known)
    good, bad = sort_out(source, entries)
    refused = [Finding(source.key(finding.name), finding.reason) for finding in source.refused + bad]
    usable = [entry for entry in entries if not entry.reason]
    warnings = [Finding(source.key(f.name), f.reason) for f in source.warnings]
    warnings += [Finding(entry.name, text) for entry in usable for text in entry.warnings]
    warnings += _unlisted(source)
    report = DataReport(good, usable, refused, warnings, settings.resolution, step, tokens)
    report.advice = advice(source.refused, settings.data)
    if settings.split == TRAIN:
        report.splits = _splits(good, of_validation, settings.condition)
    if manifest is not None:
        rows = _choices(entries, known, report, drop_duplicates)
        rows += [Entry(source.key(f.name), reason=f.reason, use=False) for f in source.refused]
        write_manifest(manifest, rows, {"data": settings.data, "split": settings.split})
    return report


def _both_splits(settings: DoctorSettings) -> tuple[Source, set[str]]:
    """What training uses, and the names of pictures among it that are of the split "validation" alone."""
    source = read_source(settings.data, Wanted.of(settings, condition=settings.condition))
    if settings.split != TRAIN:
        return source, set()
    try:
        held_out = read_source(settings.data, Wanted.of(settings, "validation", condition=settings.condition))
    except NoPicturesError:
        return source, set()
    listed = {picture.name for picture in source.pictures}
    further = [picture for picture in held_out.pictures if picture.name not in listed]
    source.pictures += further
    source.refused += [finding for finding in held_out.refused if finding not in source.refused]
    source.tables = list(dict.fromkeys([*source.tables, *held_out.tables]))
    source.warnings += [finding for finding in held_out.warnings if finding not in source.warnings]
    return source, {picture.name for picture in further}


def _splits(pictures: Sequence[CaptionedPicture], of_validation: set[str], condition: Condition) -> str:
    """How many are trained on and measured on, as `load.prepare_splits` parts them."""
    rest = [picture for picture in pictures if picture.name not in of_validation]
    seen = {picture.digest for picture in rest}
    held_out = [picture for picture in pictures if picture.name in of_validation and picture.digest not in seen]
    how = "of the split 'validation'"
    if not held_out:
        rest, held_out = hold_out(rest, HELD_OUT_SHARE, condition)
        how = "chosen by their content, for none is of a split 'validation'"
    if not held_out:
        return f"Training takes all {len(rest)} and measures on none: there is no split 'validation'."
    return f"Training takes {len(rest)} and measures on {len(held_out)}, {how}."


def _unlisted(source: Source) -> list[Finding]:
    """Pictures that lie in folders with tables, but in no table."""
    listed: set[str] = set()
    for table in source.tables:
        rows = (row.values for row in read_rows(table, ["file_name"]) if isinstance(row.values, dict))
        paths = (os.path.join(table.parent, str(values.get("file_name"))) for values in rows)
        listed.update(normal(os.path.normpath(path.replace("\\", os.sep))) for path in paths)
    found: dict[str, Finding] = {}
    for table in source.tables:
        for parent, _, names in os.walk(table.parent):
            for name in sorted(names):
                path = os.path.join(parent, name)
                plain = normal(path.replace("\\", os.sep))
                seen = name.startswith(".") or name.endswith(MASK_SUFFIX) or plain in listed or path in found
                if is_picture(name) and not seen:
                    found[path] = Finding(source.key(path), f"is in the folder, but not in {table.name}")
    return list(found.values())


def _choices(entries: list[Entry], known: dict[str, Entry], report: DataReport, drop_duplicates: bool) -> list[Entry]:
    """Entries with the choices of an earlier manifest, and duplicates left out if requested."""
    names = [entry.name for entry in report.entries]
    again = {names[i]: names[group[0]] for group in report.exact for i in group[1:]} if drop_duplicates else {}
    rows = []
    for entry in entries:
        before = known.get(entry.name)
        if before is not None and not before.use and not before.reason:
            entry = replace(entry, use=False)
        if entry.name in again:
            entry = replace(entry, use=False, warnings=(*entry.warnings, f"the same as {again[entry.name]}"))
        rows.append(entry)
    return rows


def token_counter(model: str) -> Tokens:
    """How many tokens captions have for a model's text encoder, with those at both ends, and how many it reads.

    Args:
        model: as `latentdiff.text.load_text_encoder` takes it, or a single file.
    """
    from latentdiff.pipelines.storage.places import text_encoder_at
    from latentdiff.text.encode import max_tokens

    tokenizer, text_encoder = text_encoder_at(model)

    def count(captions: Sequence[str]) -> list[int]:
        found: Any = tokenizer(list(captions), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    return count, max_tokens(tokenizer, text_encoder)
