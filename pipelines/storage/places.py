"""Where a model is, packaged, in a folder, in a single file or on the hub, and opening it; the same for everyone."""

from pathlib import Path
from typing import Any

from latentdiff.interchange.folders import find_model


def local_place(model: str) -> Path | None:
    """A model's folder or single file; None for the id of one on the hub.

    Raises:
        FileNotFoundError: there is none, and it cannot be a hub id.
        ValueError: it is a file, and no safetensors file.
    """
    file = Path(model).expanduser()
    if not file.is_file():
        return find_model(model)
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{model}: only .safetensors files are drawn with as they are, others can run code; see 'latentdiff "
            f"convert --help' to make a folder of a checkpoint that you trust"
        )
    return file


def find_place(model: str, variant: str | None = None, fetch: bool = True) -> Path:
    """Where a model lies, a folder or a single file; one on the hub is downloaded if it has not been.

    Args:
        fetch: False looks for it in the hub's local cache only.

    Raises:
        FileNotFoundError, ValueError: see `local_place`.
        OSError: the hub cannot be asked.
    """
    place = local_place(model)
    if place is None:
        if fetch:
            from latentdiff.interchange.hub import check_on_hub

            check_on_hub(model)  # before torch is loaded
        from latentdiff.pipelines import TextToImagePipeline

        options = {"use_safetensors": True, "variant": variant, "local_files_only": not fetch}
        place = Path(TextToImagePipeline.download(model, **options))
    return place


def open_place(pipeline_class: Any, place: str | Path, **options: Any) -> Any:
    """The pipeline of that class in a folder or single file, or that a name or a hub id stands for.

    Args:
        options: of ``from_pretrained``; a single file has but a dtype.
    """
    if Path(place).expanduser().is_file():
        return pipeline_class.from_single_file(place, **{name: options[name] for name in options if name == "dtype"})
    return pipeline_class.from_pretrained(place, **options)


def autoencoder_in(file: Path) -> Any:
    """The autoencoder of a single file, in float32; of a whole model or alone.

    Raises:
        ValueError: it is damaged, or has none.
    """
    import torch

    from latentdiff.interchange.packed import packed_content, unpacked
    from latentdiff.interchange.single_file import Checkpoint, read_autoencoder
    from latentdiff.pipelines.storage.single_file_pipelines import AUTOENCODERS

    content = packed_content(file)
    if content is None:
        return read_autoencoder(Checkpoint(file), AUTOENCODERS, torch.float32)
    part = next((name for name in ("vae", "vqvae") if name in content["weights"]), None)
    if part is None:
        raise ValueError(f"{file} has no autoencoder")
    with unpacked(file, (part,)) as folder:
        from latentdiff.pipelines.storage.converting import network_alone

        return network_alone(str(folder / part), torch.float32)


def text_encoder_at(model: str) -> tuple[Any, Any]:
    """A model's tokenizer and text encoder, in float32; what `latentdiff.text.load_text_encoder` takes, or a single
    file.

    Raises:
        FileNotFoundError, OSError, ValueError: see there.
    """
    import torch

    from latentdiff.interchange.packed import packed_content, unpacked
    from latentdiff.interchange.single_file import Checkpoint
    from latentdiff.pipelines.storage.single_file_pipelines import CheckpointParts, load_tokenizer
    from latentdiff.text import load_text_encoder

    file = Path(model).expanduser()
    if not file.is_file():
        return load_text_encoder(model)
    if packed_content(file) is not None:
        with unpacked(file, ("text_encoder", "tokenizer")) as folder:
            return load_text_encoder(folder)
    parts = CheckpointParts(Checkpoint(file), torch.float32)
    text_encoder = parts.text_encoder()
    return load_tokenizer(None, text_encoder, parts.weights), text_encoder.eval()
