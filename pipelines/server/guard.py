"""What stands before the routes: who may ask, from where, and how much may be sent."""

import hmac
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from latentdiff.pipelines.server.queue import ClosedError
from latentdiff.pipelines.server.stopping import Stop, received
from latentdiff.terminal import printable

Send = Callable[[dict[str, Any]], Any]

LONGEST = 900
"""Characters of an error's message."""
READ = 4
"""Times the limit of a body, how much of one that is too large is read and forgotten."""


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    message = printable(message)
    if len(message) > LONGEST:  # of what somebody sent
        message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class TooLargeError(Exception):
    """The body of a request is beyond the limit, in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request is larger than {limit / 2**20:g} MiB, which is the most")


class Guard:
    """Refuses requests without the key, from other web pages, by other names of a local server, and bodies too large.

    A page of another site that is open in a browser on this machine could send requests to a server that only this
    machine can reach, and, with a name that it makes point here, read the answers; browsers say in ``Origin`` and
    ``Host`` who asks for whom.

    Args:
        app: an ASGI application.
        key: that every request but those for `public` paths must have as ``Authorization: Bearer KEY``; None: none.
        hosts: names by which the server may be asked; None: any.
        upload: bytes of a body at most.
        public: paths that need no key.
        stop: of the server: what is not there by then is not waited for.
    """

    def __init__(
        self, app: Any, key: str | None, hosts: tuple[str, ...] | None, upload: int, public: tuple[str, ...], stop: Stop
    ) -> None:
        self.app, self.key, self.hosts, self.upload, self.public = app, key, hosts, upload, public
        self.stop = stop

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self.refusal(scope["path"], headers)
        if refused is not None:
            await answer(send, *refused)
            return
        taken, whole = 0, False

        async def counted() -> Any:
            nonlocal taken, whole
            message = await receive() if whole else await received(receive, self.stop)
            if message is None:
                raise ClosedError
            whole = whole or not message.get("more_body")
            taken += len(message.get("body", b""))
            if taken > self.upload:
                while message.get("more_body") and taken <= READ * self.upload:  # who still sends hears no answer
                    message = await receive()
                    taken += len(message.get("body", b""))
                raise TooLargeError(self.upload)
            return message

        await self.app(scope, counted, send)

    def refusal(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]] | None:
        """Status and body for a request that is not let through."""
        host = host_of(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return 403, error_body(f"this server is not called {host!r}; ask 127.0.0.1", "permission_error")
        origin = headers.get("origin")
        if origin is not None and origin.partition("//")[2] != headers.get("host"):
            return 403, error_body(f"pages of {origin} may not ask this server", "permission_error")
        given = headers.get("authorization", "").removeprefix("Bearer ")
        wrong = self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode())
        if wrong and path not in self.public:
            said = "the key is missing or wrong; send Authorization: Bearer KEY"
            return 401, error_body(said, "authentication_error", code="invalid_api_key")
        return None


def host_of(header: str) -> str:
    """``Host`` without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def answer(send: Send, status: int, body: dict[str, Any]) -> None:
    """A response of JSON."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
