"""What the code being traced will run on, which need not be what traces it."""

import jax


def target_platform() -> str:
  """cpu, gpu or tpu: of the mesh in scope, or else of jax's default backend.

  A pod's program is compiled on a machine without one, where the default backend is
  the host's CPU; the mesh knows better.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  if device is None:
    return _family(jax.default_backend())
  return _family(getattr(device, "platform", "") or device.device_kind)


def target_is_nvidia() -> bool:
  """Whether it runs on an NVIDIA GPU."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  kind = jax.devices()[0].device_kind if device is None else device.device_kind
  return "nvidia" in kind.lower()


def _family(name: str) -> str:
  name = name.lower()
  if name.startswith("tpu"):
    return "tpu"
  return "cpu" if name == "cpu" else "gpu"
