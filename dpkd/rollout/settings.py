"""Where `SamplingSettings` was before `dpkd.rollout.base`."""

from dpkd.rollout.base import SamplingSettings as SamplingSettings
