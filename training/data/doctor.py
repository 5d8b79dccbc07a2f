"""The examination behind ``latentdiff doctor``."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.training.data.folder import metadata_of
from latentdiff.training.data.load import read_source
from latentdiff.training.data.manifest import Entry, read_manifest, write_manifest
from latentdiff.training.data.prepare import leave_out, sort_out, wanted_of
from latentdiff.training.data.report import DataReport
from latentdiff.training.data.rows import read_rows
from latentdiff.training.data.source import PICTURE_SUFFIXES, Finding, NoPicturesError, Source
from latentdiff.training.data.survey import survey
from latentdiff.training.settings import DoctorSettings

Tokens = tuple[Callable[[Sequence[str]], list[int]], int]


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
    known = read_manifest(manifest) if manifest is not None and manifest.exists() else {}
    source = _both_splits(settings)
    if settings.manifest is not None:
        leave_out(source, read_manifest(Path(settings.manifest).expanduser()))
    keys = [source.key(picture.name) for picture in source.pictures]
    entries = survey(source.pictures, keys, known)
    good, bad = sort_out(source, entries)
    refused = [Finding(source.key(finding.name), finding.reason) for finding in source.refused + bad]
    usable = [entry for entry in entries if not entry.reason]
    warnings = [Finding(source.key(f.name), f.reason) for f in source.warnings]
    warnings += [Finding(entry.name, text) for entry in usable for text in entry.warnings]
    report = DataReport(
        good, usable, refused, warnings + _unlisted(settings, source), settings.resolution, step, tokens
    )
    if manifest is not None:
        rows = _choices(entries, known, report, drop_duplicates)
        rows += [Entry(source.key(f.name), reason=f.reason, use=False) for f in source.refused]
        write_manifest(manifest, rows, {"data": settings.data, "split": settings.split})
    return report


def _both_splits(settings: DoctorSettings) -> Source:
    source = read_source(settings.data, wanted_of(settings, condition=settings.condition))
    if settings.split == "train":
        try:
            held_out = read_source(settings.data, wanted_of(settings, "validation", settings.condition))
        except NoPicturesError:
            return source
        listed = {picture.name for picture in source.pictures}
        source.pictures += [picture for picture in held_out.pictures if picture.name not in listed]
        source.refused += held_out.refused
        source.warnings += [finding for finding in held_out.warnings if finding not in source.warnings]
    return source


def _unlisted(settings: DoctorSettings, source: Source) -> list[Finding]:
    """Pictures that lie in the folder, but not in its table."""
    folder = Path(settings.data).expanduser()
    table = metadata_of(folder) if folder.is_dir() else None
    if table is None:
        return []
    root = str(folder.resolve())
    rows = (row.values for row in read_rows(table, ["file_name"]) if isinstance(row.values, dict))
    listed = {os.path.normpath(os.path.join(root, str(values.get("file_name")))) for values in rows}
    found = []
    for parent, _, names in os.walk(root):
        paths = (os.path.join(parent, name) for name in sorted(names) if not name.startswith("."))
        pictures = (path for path in paths if os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES)
        found += [
            Finding(source.key(p), f"is in the folder, but not in {table.name}") for p in pictures if p not in listed
        ]
    return found


def _choices(entries: list[Entry], known: dict[str, Entry], report: DataReport, drop_duplicates: bool) -> list[Entry]:
    """Entries with the choices of an earlier manifest, and duplicates left out if requested."""
    again: dict[str, str] = {}
    if drop_duplicates:
        names = [entry.name for entry in report.entries]
        again = {names[i]: names[group[0]] for group in report.exact for i in group[1:]}
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
        model: as `latentdiff.text.load_text_encoder` takes it.
    """
    from latentdiff.text.encode import max_tokens
    from latentdiff.text.load import load_text_encoder

    tokenizer, text_encoder = load_text_encoder(model)

    def count(captions: Sequence[str]) -> list[int]:
        found: Any = tokenizer(list(captions), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    return count, max_tokens(tokenizer, text_encoder)
