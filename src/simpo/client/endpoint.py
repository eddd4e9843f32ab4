"""Where chat requests go, and the key that goes with them."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx

from simpo.errors import SimpoError
from simpo.runs.redaction import is_secret

_AZURE = (".azure.com", ".azure.us", ".azure.cn", ".microsoft.com")
_COMPLETIONS = "/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible interface.

    Attributes:
        base_url: what stands before ``/chat/completions``, e.g. ``https://api.openai.com/v1``. A query, such as Azure's
            ``?api-version=...``, is kept.
        model: its name there.
        api_key_env: environment variable that holds the key; a server on this machine needs none.
        concurrency: requests at a time.
        timeout: seconds that one attempt may take, from the connection to the last byte.
        attempts: how often a request is sent at most.

    Raises:
        SimpoError: a value that cannot be used; names the field.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 6

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            # httpx is who will read it, and is stricter with names of hosts.
            usable = parts.scheme in ("http", "https") and bool(httpx.URL(self.base_url).host) and parts.port != 0
        except (ValueError, httpx.InvalidURL):
            raise SimpoError(f"base_url: {_bare(self.base_url)!r} is not a URL") from None
        if "@" in parts.netloc:
            raise SimpoError("base_url: a URL with a user or password in it; keys come from the environment")
        if any(is_secret(name) or name in ("key", "sig", "code") for name, _ in parse_qsl(parts.query)):
            raise SimpoError("base_url: a URL with a key in its query; keys come from the environment")
        if not usable or parts.fragment:
            raise SimpoError(f"base_url: {self.base_url!r} is not of the form http(s)://host[:port]/path[?query]")
        if not self.model:
            raise SimpoError("model: no name; give the name that the server knows the model by")
        # What else it may be is a key, which is not to be repeated.
        if not (self.api_key_env.isidentifier() and self.api_key_env.isupper()):
            raise SimpoError("api_key_env: give not the key but the name, in capitals, of the variable that holds it")
        for key, least in (("concurrency", 1), ("attempts", 1)):
            if getattr(self, key) < least:
                raise SimpoError(f"{key}: must be at least {least}, not {getattr(self, key)}")
        if not self.timeout > 0:
            raise SimpoError(f"timeout: must be above 0 seconds, not {self.timeout}")

    @property
    def url(self) -> str:
        """Where requests are sent."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/").removesuffix(_COMPLETIONS) + _COMPLETIONS
        return urlunsplit(parts._replace(path=path))

    def authorization(self, key: str) -> dict[str, str]:
        """The header that carries the key: ``api-key`` for Azure, which its host or the version in its URL shows."""
        parts = urlsplit(self.base_url)
        azure = (parts.hostname or "").endswith(_AZURE) or "api-version" in dict(parse_qsl(parts.query))
        return {"api-key": key} if azure else {"authorization": f"Bearer {key}"}

    @property
    def place(self) -> str:
        """Server and model, for messages."""
        return f"{self.url}: model {self.model!r}"

    @property
    def local(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.base_url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def api_key(self) -> str | None:
        """The key; None if there is none and none is needed.

        Raises:
            SimpoError: the server is elsewhere and the variable is not set, or what it holds is no key.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and not self.local:
            raise SimpoError(f"{self.url}: no key: set the environment variable {self.api_key_env}")
        if not (key.isascii() and key.isprintable()):
            raise SimpoError(f"{self.api_key_env}: the environment variable holds characters that no key has")
        return key or None


def _bare(url: str) -> str:
    """A URL without a user and password."""
    return url.rpartition("@")[2]
