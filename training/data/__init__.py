"""Captioned pictures: where they come from, whether they can be used, and their pixels."""

from latentdiff.training.data.buckets import assign_buckets, bucket_sizes
from latentdiff.training.data.captioned_picture import CaptionedPicture, View, read_pixels
from latentdiff.training.data.load import from_dataset, load_pictures, prepare_pictures, prepare_splits, read_source
from latentdiff.training.data.source import Finding, NoPicturesError, Source, Wanted

__all__ = [
    "CaptionedPicture",
    "Finding",
    "NoPicturesError",
    "Source",
    "View",
    "Wanted",
    "assign_buckets",
    "bucket_sizes",
    "from_dataset",
    "load_pictures",
    "prepare_pictures",
    "prepare_splits",
    "read_pixels",
    "read_source",
]
