"""Where process 0 listens, for the meeting and then for the runtime.

Given localhost or a numeric address of this machine, it listens only there. Given a name,
or an address of another machine (NAT, a load balancer), it listens on all interfaces,
since a name may resolve differently here than elsewhere: in a container or on Debian
often to 127.0.1.1.
JAX_COORDINATOR_BIND_ADDRESS, if set, overrides this.
"""

import ipaddress
import os
import socket
import time

from moejax.errors import UserError

_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"
_RETRY_SECONDS = 0.2
_BIND_SECONDS = 10.0
"""How long to retry: a killed predecessor may hold the port for a moment longer."""


def split_address(address: str, name: str = "--coordinator_address") -> tuple[str, int]:
  """Splits `host:port`; raises a UserError that calls it `name` if it is malformed."""
  host, _, port = address.rpartition(":")
  if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
    raise UserError(
      f"{name}={address}: not of the form HOST:PORT. Give the name of "
      "process 0's machine and a free port of it, the same on every process."
    )
  return host.strip("[]"), int(port)


def own_interface(address: str) -> str | None:
  """Returns the host to listen on for `address`; None for all interfaces."""
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
  """Returns `host:port` for the runtime to listen on; None leaves its default."""
  if os.environ.get(_VARIABLE):
    return None
  host, (_, port) = own_interface(address), split_address(address)
  return host and (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def listen(address: str) -> socket.socket:
  """Listens for the meeting where the runtime will listen.

  Raises:
    UserError: the address is malformed, or the port is taken.
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
          f"({error.strerror}). Choose another port, or end the process that uses it (a "
          "second one with --process_id=0?)."
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
