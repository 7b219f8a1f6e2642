"""Join tokens: where to enroll, which CA to expect there, and a one-time secret."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field

from common.errors import TokenError

_PREFIX = "fp1."
_ADDRESS = re.compile(r"[A-Za-z0-9.\-\[\]:]{1,253}:[0-9]{1,5}")


@dataclass(frozen=True)
class JoinToken:
    """What `fp-server token` prints and `fp-client join` reads."""

    enroll: str
    """host:port of the enrollment service."""
    server: str
    """host:port of the main service."""
    ca: str
    """sha256 of the CA certificate's DER form, 64 hex digits."""
    secret: str = field(repr=False)
    """The one-time secret, 43 URL-safe characters."""

    def encode(self) -> str:
        """One line, safe to paste."""
        return _PREFIX + base64.urlsafe_b64encode(json.dumps(asdict(self), separators=(",", ":")).encode()).decode().rstrip("=")

    @staticmethod
    def decode(text: str) -> JoinToken:
        """Raises TokenError when the text is not a token."""
        text = text.strip()
        broken = TokenError("this is not a join token; copy the whole line that `fp-server token` printed (it begins with fp1.)")
        if not text.startswith(_PREFIX) or len(text) > 4096:
            raise broken
        body = text.removeprefix(_PREFIX)
        try:
            raw = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            token = JoinToken(**raw)
            if any(not isinstance(value, str) for value in asdict(token).values()):
                raise broken
        except (ValueError, TypeError):
            raise broken from None
        if not (_ADDRESS.fullmatch(token.enroll) and _ADDRESS.fullmatch(token.server) and re.fullmatch("[0-9a-f]{64}", token.ca)):
            raise broken
        return token


def secret_hash(secret: str) -> str:
    """How a secret is stored: sha256; the secret has 256 bits of its own, so no salt is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()
