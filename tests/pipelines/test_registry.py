"""The list of kinds of pipeline: every class is in it, and it agrees with the classes."""

from pathlib import Path
from typing import Any

import pytest

from latentdiff import pipelines
from latentdiff.pipelines import LatentPipeline, TextToImagePipeline, registry
from latentdiff.pipelines.commands.generate import pipeline_kind
from latentdiff.pipelines.registry import KINDS, Kind, find_kind, kind_saved_as, kind_taking, kinds_of_unet
from latentdiff.pipelines.storage.single_file_pipelines import SingleFilePipeline


def test_the_list_agrees_with_the_classes() -> None:
    for kind in KINDS:
        found = kind.load()
        assert issubclass(found, LatentPipeline)
        assert getattr(pipelines, kind.name) is found
        assert kind.single_file == issubclass(found, SingleFilePipeline)
        written = found.saved_class_name
        assert isinstance(written, property) or written == kind.saved_as[0]
    exported = {name for name in pipelines.__all__ if name.endswith("Pipeline")} - {"LatentPipeline"}
    assert exported == {kind.name for kind in KINDS}


def test_folders_unets_and_pictures_name_their_kind(tmp_path: Path) -> None:
    assert kind_saved_as("LDMPipeline") is find_kind("UnconditionalPipeline")
    assert kind_saved_as("FluxPipeline") is None
    assert [kind_taking(pictures).name for pictures in ((), ("image",), ("image", "mask_image"))] == [
        "TextToImagePipeline",
        "ImageToImagePipeline",
        "InpaintPipeline",
    ]
    assert [kind.name for kind in kinds_of_unet(4, 4)] == [
        "TextToImagePipeline",
        "ImageToImagePipeline",
        "InpaintPipeline",
    ]
    assert [kind.name for kind in kinds_of_unet(9, 4)] == ["InpaintPipeline"]
    assert [kind.name for kind in kinds_of_unet(7, 4)] == ["SuperResolutionPipeline"]
    assert kinds_of_unet(5, 4) == []
    assert kind_taking(("image", "mask_image"), "TokenPipeline").name == "TokenInpaintPipeline"
    with pytest.raises(ValueError, match="TokenPipeline draws with no picture or with image and mask_image, and image"):
        kind_taking(["image"], "TokenPipeline")
    (tmp_path / "model_index.json").write_text('{"_class_name": "TokenPipeline"}')
    with pytest.raises(
        ValueError, match=r"no picture or with --image and --mask, and --image was given; give --mask too$"
    ):
        pipeline_kind(tmp_path, "plain.png", None)
    with pytest.raises(ValueError, match="there is no pipeline 'Magic'; there are TextToImagePipeline, "):
        find_kind("Magic")


class Postcard(TextToImagePipeline):
    saved_class_name = "Postcard"


def test_a_kind_from_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch, pipeline: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(registry, "KINDS", [*KINDS])
    registry.register(Kind("Postcard", Postcard.__module__, ("Postcard",), "text", converted=True))
    kind = kind_saved_as("Postcard")
    assert kind is not None
    monkeypatch.setattr(Kind, "load", lambda self: Postcard)  # this module has no name that can be imported
    Postcard(**pipeline.components).save_pretrained(tmp_path)
    from latentdiff.pipelines.storage.converting import folder_pipeline

    assert type(folder_pipeline(str(tmp_path))) is Postcard
