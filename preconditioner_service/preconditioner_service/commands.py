"""``preconditioner-service token`` and ``certs``: what an operator makes before the first ``serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from preconditioner_service import tokens
from preconditioner_service.access import tokens_of
from preconditioner_service.certificates import CertificateError, make_certificates
from preconditioner_service.command import Command
from preconditioner_service.files import FileError, write_new


class Token(Command):
    """Make a token, in a file that its owner alone may read, and print its digest for a jobs file."""

    model_config = SettingsConfigDict(cli_prog_name="preconditioner-service token")

    file: CliPositionalArg[Path] = Field(description="where the token is written; must not be there yet")
    digest: bool = Field(
        False, description="write nothing: print the digests of the tokens that the file holds"
    )

    def cli_cmd(self) -> None:
        """Make it, or read it.

        Raises:
            FileError: the file is there already, or cannot be written or read.
        """
        if self.digest:
            found = tokens_of(self.file)
        else:
            found = [tokens.new_token()]
            try:
                write_new(self.file, f"{found[0]}\n".encode(), 0o600)
            except FileExistsError:
                raise FileError(
                    f"{self.file} is there already, and nothing is overwritten: give another name, or "
                    "--digest for the digest of the token that it holds"
                ) from None
            except OSError as error:
                raise FileError(f"{self.file}: {error.strerror}") from None
        sys.stdout.writelines(f"{tokens.show(tokens.digest(token))}\n" for token in found)


class Certs(Command):
    """Make a development authority, and certificates of a server and a client.

    Clients trust ca.pem (tls_ca); the server shows server.pem with server.key, and with --tls-client-ca
    ca.pem wants clients to show client.pem with client.key. ca.key signs: keep it off the machines.
    """

    model_config = SettingsConfigDict(cli_prog_name="preconditioner-service certs")

    directory: CliPositionalArg[Path] = Field(description="where they are written; nothing is overwritten")
    host: list[str] = Field(
        min_length=1, description="DNS name or IP address by which clients reach the server; may be repeated"
    )
    days: Annotated[float, Field(gt=0, le=397)] = Field(30.0, description="how long they are valid")

    def cli_cmd(self) -> None:
        """Make them.

        Raises:
            FileError: a host is none, a file is there already, or the directory cannot be written.
        """
        try:
            files = make_certificates(self.directory, self.host, self.days)
        except CertificateError as error:
            raise FileError(str(error)) from None
        sys.stdout.writelines(f"{path}\n" for path in files.all())
