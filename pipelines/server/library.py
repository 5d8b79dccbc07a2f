"""What a page may draw with: the models that the server has, and models and LoRAs in the folders named to it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from latentdiff.pipelines.commands.models import INDEX, is_model, model_places
from latentdiff.pipelines.server.folders import Folders
from latentdiff.pipelines.server.requests import RequestError
from latentdiff.pipelines.server.shelf import Loader, Shelf

LORAS = 200
"""That are listed, at most."""


class Library:
    """Finds models and LoRAs.

    Args:
        shelf: of the server; models that are found are put there too.
        places: where those lie that are on it already.
        folders: where others may lie.
        loader: what loads a model, by its place and name. It raises ValueError for one that is not served.
    """

    def __init__(
        self, shelf: Shelf, places: Mapping[str, Path], folders: Folders, loader: Callable[[Path, str], Loader]
    ) -> None:
        self.shelf, self.folders, self.loader = shelf, folders, loader
        self.places = dict(places)

    def look(self) -> None:
        """Put models on the shelf that are in the folders now."""
        for root in self.folders.roots.values():
            for place in model_places(root):
                if place not in self.places.values() and self.folders.hold(place):
                    try:
                        self.put(place, self.folders.label(place))
                    except (OSError, ValueError):  # damaged, or one that does not draw from words
                        continue

    def add(self, typed: str) -> str:
        """The name of a model that is on the shelf, or that lies where is typed.

        Raises:
            RequestError: there is none within the folders.
            OSError, ValueError: it is damaged, or not served.
        """
        if typed in self.shelf.loaders:
            return typed
        place = self.folders.find(typed, "model")
        if not (is_model(place) if place.is_file() else (place / INDEX).is_file()):
            raise RequestError(f"model: {typed} is no model that draws; a folder of one has a {INDEX}", "model")
        known = [name for name, one in self.places.items() if one == place]
        return known[0] if known else self.put(place, self.folders.label(place))

    def put(self, place: Path, name: str) -> str:
        """Put a model on the shelf. Raises OSError or ValueError if it is damaged, or not served."""
        self.shelf.loaders[name] = self.loader(place, name)
        self.places[name] = place
        return name

    def place_of(self, name: str | None) -> Path:
        """Where a model lies; None: the first."""
        return self.places[self.add(self.shelf.names[0] if name is None else name)]

    def loras(self) -> list[str]:
        """LoRAs in the folders, as `lora` takes them."""
        found = [
            self.folders.label(file)
            for root in self.folders.roots.values()
            for file in sorted(root.glob("**/*.safetensors"))[: 10 * LORAS]
            if self.folders.hold(file) and is_lora(file)
        ]
        return found[:LORAS]

    def lora(self, typed: str) -> Path:
        """The file of a LoRA. Raises RequestError if it is not within the folders, or none."""
        place = self.folders.find(typed, "lora")
        if place.is_file() and not is_lora(place):
            raise RequestError(f"lora: {typed} is no LoRA in a .safetensors file", "lora")
        return place


def is_lora(file: Path) -> bool:
    """By the names of its tensors; no weights are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as stream:
            names = list(stream.keys())
    except (OSError, SafetensorError):
        return False
    if any(name.startswith("denoiser.") for name in names):
        return False  # of a training, to go on from
    return any("lora" in name.lower() or ".hada_" in name or ".lokr_" in name for name in names)
