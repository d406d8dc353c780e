"""The platform that traced code will run on, which may differ from the host's."""

import jax


def target_platform() -> str:
  """Returns cpu, gpu or tpu, from the mesh in scope or else jax's default backend.

  A program for a TPU pod can be compiled on a machine without TPUs. The default backend
  there is the CPU, but the mesh has the target devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  if device is None:
    return _family(jax.default_backend())
  return _family(getattr(device, "platform", "") or device.device_kind)


def target_is_nvidia() -> bool:
  """Returns whether the traced code will run on an NVIDIA GPU."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  kind = jax.devices()[0].device_kind if device is None else device.device_kind
  return "nvidia" in kind.lower()


def _family(name: str) -> str:
  name = name.lower()
  if name.startswith("tpu"):
    return "tpu"
  return "cpu" if name == "cpu" else "gpu"
