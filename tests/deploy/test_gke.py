"""JobSets: as many pods as the machine has hosts, and what Kubernetes' schemas say."""

import copy

import pytest

from moejax import errors
from moejax.deploy import gke, schemas
from moejax.deploy.job import HOPELESS, RESTARTABLE
from moejax.errors import UserError
from tests.deploy.jobs import job


def parts(jobset):
  """The replicated job, its spec, and its container."""
  [replicated] = jobset["spec"]["replicatedJobs"]
  spec = replicated["template"]["spec"]
  [container] = spec["template"]["spec"]["containers"]
  return replicated, spec, container


# Chips of a host and numbers of hosts are those of the tables of GKE's page on TPUs.
@pytest.mark.parametrize(
  ("machine", "slices", "hosts", "chips", "devices"),
  [
    ("v4:2x2x1", 1, 1, 4, 4),
    ("v5p:2x2x4", 1, 4, 4, 16),
    ("v5p:4x4x8", 2, 32, 4, 256),
    ("v5e:1x1", 1, 1, 1, 1),
    ("v5e:2x2", 1, 1, 4, 4),
    ("v5e:2x4", 1, 1, 8, 8),
    ("v5e:4x4", 1, 4, 4, 16),
    ("v6e:2x4", 1, 1, 8, 8),
    ("v6e:16x16", 1, 64, 4, 256),
    ("tpu7x:2x2x4", 1, 4, 4, 32),
  ],
)
def test_a_slice_has_a_pod_for_each_host(machine, slices, hosts, chips, devices):
  """And they ask for all of its chips, of which jax may see two devices each."""
  made = job(machine, slices)
  jobset = gke.tpu(made)
  schemas.validate(jobset)
  replicated, spec, container = parts(jobset)
  assert replicated["replicas"] == slices
  assert spec["parallelism"] == spec["completions"] == hosts
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  selector = spec["template"]["spec"]["nodeSelector"]
  assert selector["cloud.google.com/gke-tpu-topology"] == machine.split(":")[1]
  assert made.topology.num_devices == devices


def test_pods_of_gpus_know_their_places():
  """As many processes as pods, which meet at the first pod by its name in the set."""
  made = job("h100:3x8", secret="ours")
  jobset = gke.gpu(made)
  schemas.validate(jobset)
  replicated, spec, container = parts(jobset)
  env = {e["name"]: e.get("value") or e["valueFrom"] for e in container["env"]}
  first = f"first-{replicated['name']}-0-0.first"
  assert env["JAX_COORDINATOR_ADDRESS"].rpartition(":")[0] == first
  assert env["JAX_NUM_PROCESSES"] == str(spec["completions"]) == "3"
  assert spec["completionMode"] == "Indexed" and "fieldRef" in env["JAX_PROCESS_ID"]
  assert env["MOEJAX_JOB_SECRET"]["secretKeyRef"]["name"] == "ours"
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_every_volume_is_mounted_and_the_workdir_is_on_the_shared_one():
  """Of the set of GPUs, which has the most; and the command is kept word by word."""
  jobset = gke.gpu(job("h100:1x8", claim="disk", namespace="lab", spot=True))
  _, spec, container = parts(jobset)
  pod = spec["template"]["spec"]
  mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
  assert mounted["runs"] == "/runs"
  [runs] = [volume for volume in pod["volumes"] if volume["name"] == "runs"]
  assert runs["persistentVolumeClaim"]["claimName"] == "disk"
  assert jobset["metadata"]["namespace"] == "lab"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert container["command"] == list(job("h100:1x8").command)


def test_emergency_checkpoints_outlive_their_pod():
  """They are on the node's own disk, and mounted where the command has them."""
  jobset = gke.tpu(job("v5p:2x2x4", emergency_local_dir="/mnt/disks/e"))
  schemas.validate(jobset)
  _, spec, container = parts(jobset)
  [name] = [
    mount["name"]
    for mount in container["volumeMounts"]
    if mount["mountPath"] == "/mnt/disks/e"
  ]
  [volume] = [v for v in spec["template"]["spec"]["volumes"] if v["name"] == name]
  assert volume["hostPath"] == {"path": "/mnt/disks/e", "type": "DirectoryOrCreate"}


def test_a_run_in_a_bucket_needs_no_shared_disk():
  """No claim, and nothing mounted that is not there; the schemas hold."""
  for jobset in (
    gke.tpu(job("v5p:2x2x4", workdir="gs://bucket/first")),
    gke.gpu(job("h100:1x8", workdir="gs://bucket/first")),
  ):
    schemas.validate(jobset)
    _, spec, container = parts(jobset)
    names = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert names == {mount["name"] for mount in container["volumeMounts"]}
    assert "runs" not in names and "persistentVolumeClaim" not in str(jobset)


def test_only_what_another_start_cannot_mend_ends_the_set():
  """The codes are those of moejax's errors; every other failure starts all pods again."""
  _, spec, container = parts(gke.tpu(job("v5p:2x2x1")))
  [rule] = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert rule["onExitCodes"]["values"] == list(HOPELESS)
  assert errors.PEER_LOST in RESTARTABLE and not set(RESTARTABLE) & set(HOPELESS)
  assert {errors.EXIT_CODE, errors.NOT_IN_AGREEMENT} < set(HOPELESS)
  assert spec["backoffLimit"] == 0


@pytest.mark.parametrize(
  ("path", "value", "part"),
  [
    (("spec", "failurePolicy", "maxRestart"), 3, "maxRestart"),
    (("spec", "failurePolicy", "rules", 0, "name"), None, "name"),
    (("spec", "replicatedJobs", 0, "template", "spec", "paralelism"), 3, "paralelism"),
    (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "4", "integer"),
    (("metadata", "name"), 3, "3 is not of type 'string'"),
  ],
)
def test_a_violation_of_a_schema_is_named(path, value, part):
  """A misspelt, missing or mistyped field, of the set and of the jobs in it."""
  jobset = copy.deepcopy(gke.tpu(job("v5p:2x2x1")))
  place = jobset
  for key in path[:-1]:
    place = place[key]
  if value is None:
    del place[path[-1]]
  else:
    place[path[-1]] = value
  with pytest.raises(UserError, match="not valid") as caught:
    schemas.validate(jobset)
  assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("make", "machine", "fields", "part"),
  [
    (gke.tpu, "h100:2x8", {}, "--topology=h100:2x8: give one of v4"),
    (gke.gpu, "v5p:2x2x1", {}, "--topology=v5p:2x2x1: give one of h100"),
    (gke.tpu, "v5p:2x4", {}, "3 dimensions"),
    (gke.tpu, "v5p:1x1x2", {}, "2 chips are not a whole number of machines"),
    (gke.tpu, "v5p:2x2x1", {"image": ""}, "--image=IMAGE is missing"),
    (gke.tpu, "v5p:2x2x1", {"image": "I J"}, "--image='I J'"),
    (gke.tpu, "v5p:2x2x1", {"emergency_local_dir": "a"}, "--emergency_local_dir=a"),
    (gke.tpu, "v5p:2x2x1", {"emergency_local_dir": "/runs"}, "other than the mounts"),
    (gke.tpu, "v5p:2x2x1", {"workdir": "runs/a"}, "--workdir=runs/a"),
    (gke.tpu, "v5p:2x2x1", {"workdir": "/runs"}, "--workdir=/runs"),
  ],
)
def test_what_gke_does_not_have_is_refused(make, machine, fields, part):
  """One line that names the flag."""
  with pytest.raises(UserError) as caught:
    make(job(machine, **fields))
  assert part in str(caught.value) and "\n" not in str(caught.value)
