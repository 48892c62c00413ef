"""The certificate of a service: by it clients know the router, and the router its replicas."""

from __future__ import annotations

import ssl

from pydantic import Field

from gsl_dist.config import Strict
from gsl_dist.errors import ConfigError


class Tls(Strict):
    """The certificate of a service, in files that every node has."""

    cert: str = Field(description="PEM: the certificate, and those that vouch for it")
    key: str = Field(description="PEM: its private key")
    authority: str | None = Field(default=None, description="PEM: who vouches for it; None: it vouches for itself")

    def listen(self) -> ssl.SSLContext:
        """Give what a replica listens with.

        Raises:
            ConfigError: the files are no certificate and its key.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.cert, self.key)
        except OSError as error:
            allowed = f"they must be a certificate and its key, in files that every node has ({error})"
            raise ConfigError("tls", f"{self.cert}, {self.key}", allowed) from None
        return context

    def reach(self) -> ssl.SSLContext:
        """Give what a router reaches replicas with: they must have this certificate, wherever they are."""
        context = ssl.create_default_context(cafile=self.authority or self.cert)
        context.check_hostname = False
        return context
