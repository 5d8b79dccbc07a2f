"""Captions for pictures that have none, by an image-to-text model of transformers that the user names."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from latentdiff.interchange.folders import find_model, load_whole
from latentdiff.interchange.hub import asking_hub
from latentdiff.terminal import printable
from latentdiff.training.data.advice import lacking_captions
from latentdiff.training.data.caption_checks import LONGEST
from latentdiff.training.data.captioned_picture import FileReader
from latentdiff.training.data.decode import decode
from latentdiff.training.data.source import Wanted
from latentdiff.training.data.survey import log_findings

logger = logging.getLogger(__name__)

TOKENS = 60  # of a caption, at most


@dataclass(frozen=True)
class Captioner:
    """A model such as BLIP or GIT, and what prepares pictures for it and reads its answers."""

    processor: Any
    model: Any

    @classmethod
    def load(cls, source: str, device: str = "cpu") -> "Captioner":
        """A model's folder, or its ``owner/name`` on the hub; no code of its own is run.

        Raises:
            FileNotFoundError, OSError: there is no such model, or it is not in safetensors files.
            ValueError: it is damaged, or it does not caption pictures.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            folder = find_model(source)
        except FileNotFoundError as error:
            if Path(source).expanduser().is_file():
                raise
            raise FileNotFoundError(
                f"{source}: no such folder; give the folder of an image-to-text model of transformers, or an "
                "'owner/name' on the Hugging Face hub"
            ) from error
        place = source if folder is None else str(folder)
        with asking_hub(source):
            processor = AutoProcessor.from_pretrained(place, trust_remote_code=False)
            model = load_whole(AutoModelForImageTextToText, place, trust_remote_code=False)
        return cls(processor, model.eval().to(device))

    @torch.no_grad()
    def __call__(self, picture: Image.Image, prompt: str | None = None) -> str:
        """The caption of an RGB picture, without choosing at random; it goes on from `prompt`, or answers it."""
        if getattr(self.processor, "chat_template", None):
            parts = [{"type": "image", "image": picture}, {"type": "text", "text": prompt or "Describe this picture."}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
            )
            start = inputs["input_ids"].shape[1]
        else:
            given = {} if prompt is None else {"text": prompt}
            inputs, start = self.processor(images=picture, return_tensors="pt", **given), 0
        found = self.model.generate(**inputs.to(self.model.device), max_new_tokens=TOKENS, do_sample=False)
        text = self.processor.batch_decode(found[:, start:], skip_special_tokens=True)[0]
        return printable(" ".join(text.split()))[:LONGEST]


def caption_folder(folder: Path, captioner: Captioner, prompt: str | None = None) -> int:
    """Write ``1.txt`` beside each picture ``1.png`` of a folder that has no caption; files that exist stay as they are.

    Pictures that tables list, or that lie in shards or datasets, are captioned there and not here. A repeated call goes
    on where one stopped.

    Returns:
        How many were written.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
    """
    from latentdiff.training.data.load import read_source

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not a folder; captions are written beside the pictures of a folder")
    source = read_source(str(folder), Wanted())
    pictures = lacking_captions(source.refused)
    log_findings([finding for finding in source.refused if Path(finding.name) not in set(pictures)], "left out")
    written = 0
    for picture in tqdm(pictures, desc="captioning", unit="", disable=None, leave=False, dynamic_ncols=True):
        file = picture.with_suffix(".txt")
        if file.exists():
            logger.warning("%s: is there already, and stays as it is", file)
            continue
        try:
            image = decode(FileReader(str(picture))(), picture.name).image
        except (OSError, ValueError) as error:
            logger.warning("left out: %s: cannot be read as a picture (%s)", picture, error)
            continue
        text = captioner(image, prompt)
        if not text:
            logger.warning("left out: %s: the model has nothing to say of it", picture)
            continue
        write_new(file, f"{text}\n")
        written += 1
    return written


def write_new(file: Path, text: str) -> None:
    """Raises FileExistsError if `file` is there; after any other error it is not."""
    with file.open("x", encoding="utf-8") as target:
        try:
            target.write(text)
            target.flush()
        except BaseException:
            file.unlink()
            raise
