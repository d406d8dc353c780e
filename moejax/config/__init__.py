"""The configuration of an experiment; all fields are in `schema`."""

from moejax.config.alarms import AlarmConfig
from moejax.config.schema import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)

__all__ = [
  "AlarmConfig",
  "Config",
  "DataConfig",
  "MeshConfig",
  "MoEConfig",
  "ModelConfig",
  "OptimizerConfig",
  "TrainConfig",
]
