"""The models of a server, by name; each is loaded when it is first asked for."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress

from latentdiff.pipelines.server.model import ServedModel
from latentdiff.pipelines.server.requests import RequestError

Loader = Callable[[], ServedModel]


class Shelf:
    """Models that a server has, the first of which draws what asks for none.

    Args:
        loaders: what loads each of them.
        kept: how many stay loaded at most; the one that was asked for least recently goes.
    """

    def __init__(self, loaders: Mapping[str, Loader], kept: int | None = None) -> None:
        self.loaders = dict(loaders)
        self.kept = len(self.loaders) if kept is None else kept
        self._loaded: OrderedDict[str, ServedModel] = OrderedDict()
        self._loading = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.loaders)

    def is_loaded(self, name: str) -> bool:
        return name in self._loaded

    def get(self, name: str | None = None) -> ServedModel:
        """A model, loaded; None: the first.

        Raises:
            RequestError: there is none of that name.
            Exception: it cannot be loaded.
        """
        name = self.names[0] if name is None else name
        if name not in self.loaders:
            message = f"there is no model {name!r} here; there is {' or '.join(map(repr, self.names))}"
            raise RequestError(message, "model", "model_not_found", 404)
        if name in self._loaded:  # what draws does not wait while another is loaded
            with suppress(KeyError):
                self._loaded.move_to_end(name)
                return self._loaded[name]
        with self._loading:
            if name not in self._loaded:
                while len(self._loaded) >= self.kept:
                    self._loaded.popitem(last=False)
                try:
                    self._loaded[name] = self.loaders[name]()
                except OSError as error:
                    raise RequestError(f"the model {name} cannot be loaded: {error}", "model") from error
            self._loaded.move_to_end(name)
            return self._loaded[name]
