"""JobSets for GKE: TPU slices, and nodes of GPUs.

A failed pod fails its job, and the set restarts all pods, which resume from the last
checkpoint. Exit codes that a restart would only repeat end the set.

Source: JobSet v1alpha2 (jobset.sigs.k8s.io) and the GKE pages on TPU and GPU workloads.
"""

import re
from typing import Any

from moejax.deploy import machines
from moejax.deploy.job import HOPELESS, Job
from moejax.errors import UserError

CACHE = "/cache"
"""The directory of a pod's prepared data, on its own disk."""

_PORT = 12345


def tpu(job: Job) -> dict[str, Any]:
  """Returns a JobSet with one job for each slice and one pod for each of its hosts.

  GKE sets the rank of each process, and that of each slice (MEGASCALE_*).
  """
  _check(job, "tpu", machines.TPUS)
  here = machines.chips_per_host(job.topology)
  hosts = job.topology.num_chips // job.topology.slices // here
  shape = "x".join(map(str, job.topology.shape))
  selector = {
    "cloud.google.com/gke-tpu-accelerator": machines.TPUS[job.topology.kind].label,
    "cloud.google.com/gke-tpu-topology": shape,
  }
  made = _jobset(
    job,
    part="slice",
    replicas=job.topology.slices,
    pods=hosts,
    selector=selector,
    limits={"google.com/tpu": here},
  )
  # Each slice has its own node pool; this puts each job on a different one.
  made["metadata"]["annotations"] = {
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
  }
  return made


def gpu(job: Job) -> dict[str, Any]:
  """Returns a JobSet with one pod per node, with one process that sees all its GPUs.

  Ranks come from variables that moejax reads, since jax's own detection in Kubernetes
  needs the package `kubernetes` and the right to read pods and jobs.
  """
  _check(job, "gpu", machines.GPU_LABELS)
  nodes, gpus = job.topology.shape
  label = machines.GPU_LABELS[job.topology.kind]
  made = _jobset(
    job,
    part="node",
    replicas=1,
    pods=nodes,
    selector={"cloud.google.com/gke-accelerator": label},
    limits={"nvidia.com/gpu": gpus},
  )
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  pod = _pod(made)
  [container] = pod["containers"]
  container["env"] = [
    # JobSet's name of the first pod: JOBSET-JOB-REPLICA-POD.JOBSET.
    _variable("JAX_COORDINATOR_ADDRESS", f"{job.name}-node-0-0.{job.name}:{_PORT}"),
    _variable("JAX_NUM_PROCESSES", str(nodes)),
    {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    *container.get("env", ()),
  ]
  # NCCL between the GPUs of a node; the default is 64 MB.
  container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
  pod["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
  return made


def _check(job: Job, family: str, known: Any) -> None:
  if job.topology.kind not in known:
    raise UserError(
      f"--target=gke-{family} --topology={job.topology}: give one of {', '.join(known)}."
    )
  if not job.image:
    raise UserError(
      f"--target=gke-{family}: --image=IMAGE is missing; docs/launching/Dockerfile "
      "builds one."
    )
  if re.search(r"\s", job.image):
    raise UserError(f"--image={job.image!r}: the name of an image cannot contain spaces.")
  local = job.emergency_local_dir
  if local and (not local.startswith("/") or local.rstrip("/") in ("", CACHE, job.mount)):
    raise UserError(
      f"--emergency_local_dir={local}: on Kubernetes, give an absolute path on the "
      "nodes' own disk, other than the mounts of the job, such as /mnt/disks/emergency."
    )
  absolute = job.workdir.startswith("/") and job.workdir.rstrip("/").count("/") > 1
  if job.needs_disk and not absolute:
    raise UserError(
      f"--workdir={job.workdir}: on Kubernetes, give an absolute path below the place "
      "where the shared disk is mounted, such as /runs/first (mounted at /runs), or "
      "gs://BUCKET/RUN."
    )


def _jobset(
  job: Job,
  *,
  part: str,
  replicas: int,
  pods: int,
  selector: dict[str, str],
  limits: dict[str, int],
) -> dict[str, Any]:
  if job.spot:
    selector = selector | {"cloud.google.com/gke-spot": "true"}
  metadata = {"name": job.name}
  if job.namespace:
    metadata["namespace"] = job.namespace
  hopeless = {
    "name": "another-start-would-fail-too",
    "action": "FailJobSet",
    "onJobFailureReasons": ["PodFailurePolicy"],
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "network": {"enableDNSHostnames": True},
      "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [hopeless]},
      "replicatedJobs": [
        {
          "name": part,
          "replicas": replicas,
          "template": {"spec": _job_spec(job, pods, selector, limits)},
        }
      ],
    },
  }


def _job_spec(
  job: Job, pods: int, selector: dict[str, str], limits: dict[str, int]
) -> dict[str, Any]:
  mounts: list[dict[str, Any]] = []
  volumes: list[dict[str, Any]] = []
  if job.needs_disk:
    mounts.append({"name": "runs", "mountPath": job.mount})
    claim = {"claimName": job.claim}
    volumes.append({"name": "runs", "persistentVolumeClaim": claim})
  if job.emergency_local_dir:
    # An emptyDir would be deleted with its pod, and every restart makes new pods.
    local = {"path": job.emergency_local_dir, "type": "DirectoryOrCreate"}
    mounts.append({"name": "local", "mountPath": job.emergency_local_dir})
    volumes.append({"name": "local", "hostPath": local})
  codes = {"containerName": "train", "operator": "In", "values": list(HOPELESS)}
  container = {
    "name": "train",
    "image": job.image,
    "command": list(job.command),
    "resources": {"limits": limits},
    "volumeMounts": [*mounts, {"name": "cache", "mountPath": CACHE}],
  }
  if job.secret:
    source = {"secretKeyRef": {"name": job.secret, "key": "secret"}}
    container["env"] = [{"name": "MOEJAX_JOB_SECRET", "valueFrom": source}]
  return {
    "parallelism": pods,
    "completions": pods,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
    "template": {
      "spec": {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [*volumes, {"name": "cache", "emptyDir": {}}],
      }
    },
  }


def _pod(jobset: dict[str, Any]) -> dict[str, Any]:
  [job] = jobset["spec"]["replicatedJobs"]
  return job["template"]["spec"]["template"]["spec"]


def _variable(name: str, value: str) -> dict[str, str]:
  return {"name": name, "value": value}
