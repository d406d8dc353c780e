"""Checks manifests against their schemas, without a cluster.

The few fields of a JobSet itself are listed here. The jobs inside it are checked by the
schemas that Kubernetes publishes, which the package kubernetes-validate contains.

Source: the resource definition of JobSet v1alpha2 (jobset.sigs.k8s.io), the fields that
`gke` uses; the schemas of Kubernetes.
"""

import importlib.util
from typing import Any

from moejax.errors import UserError

KUBERNETES = "1.31"
"""Version of the schemas; the fields of Job that are used here have been stable since
1.31, and on by default (beta) since 1.26."""

_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
  return {
    "type": "object",
    "properties": properties,
    "required": list(required),
    "additionalProperties": False,
  }


_RULE = _object(
  ("name", "action"),
  name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:-]*[A-Za-z0-9_])?$"},
  action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
  onJobFailureReasons={"type": "array", "items": _TEXT},
  targetReplicatedJobs={"type": "array", "items": _TEXT},
)
_JOB = _object(
  ("name", "template"),
  name=_TEXT,
  replicas={"type": "integer"},
  template=_object(metadata={"type": "object"}, spec={"type": "object"}),
)
JOBSET = _object(
  ("apiVersion", "kind", "metadata", "spec"),
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=_object(
    ("name",), name=_TEXT, namespace=_TEXT, annotations=_TEXTS, labels=_TEXTS
  ),
  spec=_object(
    ("replicatedJobs",),
    network=_object(
      enableDNSHostnames={"type": "boolean"},
      publishNotReadyAddresses={"type": "boolean"},
      subdomain=_TEXT,
    ),
    failurePolicy=_object(
      maxRestarts={"type": "integer"}, rules={"type": "array", "items": _RULE}
    ),
    replicatedJobs={"type": "array", "items": _JOB, "minItems": 1},
  ),
)


def available() -> bool:
  """Returns whether the package with the schemas is installed."""
  return importlib.util.find_spec("kubernetes_validate") is not None


def validate(jobset: dict[str, Any]) -> None:
  """Checks a JobSet; needs the extra `kubernetes`.

  Raises:
    UserError: it violates a schema; the message names the field.
  """
  import jsonschema
  import kubernetes_validate

  try:
    jsonschema.validate(jobset, JOBSET)
    for part in jobset["spec"]["replicatedJobs"]:
      job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": part["name"]}}
      kubernetes_validate.validate(job | part["template"], KUBERNETES, strict=True)
  except jsonschema.ValidationError as error:
    where = ".".join(map(str, error.absolute_path)) or "the whole"
    raise UserError(f"The manifest is not valid: {where}: {error.message}") from error
