"""At which address process 0 listens, for the meeting and then for the runtime.

A numeric address of this machine, or localhost: there and nowhere else. A name, or an
address that is not this machine's (NAT, a load balancer): at all interfaces, since what a
name means here need not be what it means to the others; in a container or under Debian
it is often 127.0.1.1. JAX_COORDINATOR_BIND_ADDRESS decides where it is set.
"""

import ipaddress
import os
import socket
import time

from moejax.errors import UserError

_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"
_RETRY_SECONDS = 0.2
_BIND_SECONDS = 10.0
"""A predecessor that was killed may hold the port for a moment longer."""


def split_address(address: str, name: str = "--coordinator_address") -> tuple[str, int]:
  """Host and port of `host:port`; UserError, with the name it was given by, if none."""
  host, _, port = address.rpartition(":")
  if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
    raise UserError(
      f"{name}={address}: not of the form HOST:PORT. Give the name of "
      "process 0's machine and a free port of it, the same on every process."
    )
  return host.strip("[]"), int(port)


def own_interface(address: str) -> str | None:
  """The host to listen at, if others cannot mean another by `address`; else None."""
  host, _ = split_address(address)
  if host == "localhost":
    return "127.0.0.1"
  try:
    if ipaddress.ip_address(host).is_unspecified:
      return None
    with socket.create_server((host, 0), family=_family(host)):
      return host
  except (ValueError, OSError):
    return None


def bind_address(address: str) -> str | None:
  """`host:port` for the runtime to listen at; None leaves it to its own default."""
  if os.environ.get(_VARIABLE):
    return None
  host, (_, port) = own_interface(address), split_address(address)
  return host and (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def listen(address: str) -> socket.socket:
  """Listens for the meeting, where the runtime will, for the same reasons.

  Raises:
    UserError: the port is taken.
  """
  bound = os.environ.get(_VARIABLE, "")
  name = _VARIABLE if bound else "--coordinator_address"
  host, port = split_address(bound or address, name)
  host = host if bound else own_interface(address)
  deadline = time.monotonic() + _BIND_SECONDS
  while True:
    try:
      return _server(host, port)
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError(
          f"{name}={bound or address}: process 0 cannot listen at port {port} "
          f"({error.strerror}). Choose another port, or end the process that has it: "
          "a second one with --process_id=0?"
        ) from error
    time.sleep(_RETRY_SECONDS)


def _server(host: str | None, port: int) -> socket.socket:
  if host in (None, "", "::", "0.0.0.0"):
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(
      ("", port), family=family, backlog=1024, dualstack_ipv6=both
    )
  return socket.create_server((host, port), family=_family(host), backlog=1024)


def _family(host: str) -> socket.AddressFamily:
  return socket.AF_INET6 if ":" in host else socket.AF_INET
