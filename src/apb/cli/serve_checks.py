"""What ``apb serve`` is given beside the model: its address, keys, certificate, and where documents may stay."""

from __future__ import annotations

import shutil
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..serving.kept import Places
    from .checks import Place


def certificate_of(certfile: Path | None, keyfile: Path | None) -> dict[str, Path | None]:
    """uvicorn's options for HTTPS, none without a certificate; InputError if it cannot be used."""
    if certfile is None and keyfile is None:
        return {}
    if certfile is None:
        raise InputError("A key for HTTPS was given without its certificate; name that with --ssl-certfile.")
    try:
        # A key that asks for a password is none that a server can start with.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except OSError as error:  # of which those of ssl are
        raise InputError(
            f"The certificate {str(certfile)!r} cannot be used: {error.strerror or error}; give a certificate with "
            "--ssl-certfile and its key, without a password, with --ssl-keyfile."
        ) from error
    return {"ssl_certfile": certfile, "ssl_keyfile": keyfile}


def places_of(place: Place, documents: Path | None, host_gib: float | None, disk_gib: float | None) -> Places:
    """Where documents may stay beside the device, in how many bytes; InputError if the folder cannot be had."""
    import psutil

    from ..serving.kept import Places

    for name, given in (("--host-gib", host_gib), ("--disk-gib", disk_gib)):
        if given is not None and not 0 <= given < 1 << 20:
            raise InputError(f"{name} is a number of GiB from 0 to a million, not {given}.")
    if disk_gib is not None and documents is None:
        raise InputError("--disk-gib is for the folder of --documents, which is not given; give one.")
    # On the CPU the device is host memory.
    free = 0.3 * psutil.virtual_memory().available / place.processes if place.device.type == "cuda" else 0.0
    host = free if host_gib is None else host_gib * 2**30 / place.processes
    if documents is None:
        return Places(int(host))
    try:
        documents.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in documents.rglob("*.safetensors"))
        half = (shutil.disk_usage(documents).free + there) / 2
    except OSError as error:
        raise InputError(
            f"The folder {str(documents)!r} cannot be used for documents: {error.strerror}; choose another."
        ) from error
    return Places(int(host), str(documents), int(half if disk_gib is None else disk_gib * 2**30))


def keys_of(file: Path) -> tuple[str, ...]:
    """The keys in a file; InputError if there are none."""
    try:
        keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The file of API keys {str(file)!r} cannot be read; give one with a key on each line."
        ) from error
    if not keys:
        raise InputError(f"The file of API keys {str(file)!r} has none; write one on each line.")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; InputError if the address cannot be used."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"A port is a number from 0 to 65535, not {port}.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"Nothing can listen at {host}, port {port}: {error.strerror}; choose others with --host and --port."
        ) from error
