"""What a plugin may hand over: the checks of its specs."""

from __future__ import annotations

from typing import Any

from dpkd.api import LossConfig, LossSpec, MetricSpec, PairLoss, RolloutLoss, SamplerConfig, SamplerSpec, TokenLoss


class PluginError(Exception):
    """What is wrong with a plugin, as a sentence."""


def checked_loss(spec: Any) -> LossSpec:
    """The spec of a loss. Raises PluginError when it is none, or not a sound one."""
    if not isinstance(spec, LossSpec):
        raise PluginError(f"dpkd_losses must return LossSpecs, but the list holds {type(spec).__name__}")
    if not spec.name or spec.name != spec.name.lower() or not spec.name.replace("-", "").isalnum():
        raise PluginError(f"the name {spec.name!r} should be lower-case letters and digits with dashes between")
    if not (isinstance(spec.config, type) and issubclass(spec.config, LossConfig)):
        raise PluginError(f"the config of {spec.name!r} must be a subclass of dpkd.api.LossConfig")
    if not (isinstance(spec.loss, type) and issubclass(spec.loss, TokenLoss | PairLoss | RolloutLoss)):
        raise PluginError(f"the loss of {spec.name!r} must be a subclass of TokenLoss, PairLoss or RolloutLoss")
    if "name" in spec.config.model_fields:
        raise PluginError(f"the config of {spec.name!r} has a setting `name`, but that is the name of the loss itself")
    if "loss" in spec.suggests:
        raise PluginError(f"{spec.name!r} suggests `loss`: the defaults of its own settings stand in its config")
    _check_defaults(spec)
    return spec


def _check_defaults(spec: LossSpec) -> None:
    """A list of losses says what each needs of the teacher, so the default settings must be valid."""
    try:
        spec.needs(spec.config())
    except Exception as error:
        what = " ".join(str(error).split())
        raise PluginError(f"the default settings of {spec.name!r} do not work: {what}") from error


def checked_metric(spec: Any) -> MetricSpec:
    """The spec of a metric. Raises PluginError when it is none, or not a sound one."""
    if not isinstance(spec, MetricSpec):
        raise PluginError(f"dpkd_metrics must return MetricSpecs, but the list holds {type(spec).__name__}")
    if not spec.name.isidentifier() or spec.name != spec.name.lower():
        raise PluginError(f"the name {spec.name!r} should be lower-case letters and digits with underscores between")
    if sum(function is not None for function in (spec.per_row, spec.overall, spec.of_tokens)) != 1:
        raise PluginError(f"the metric {spec.name!r} needs exactly one of `per_row`, `overall` and `of_tokens`")
    if spec.better not in ("higher", "lower", ""):
        raise PluginError(f"the metric {spec.name!r} has better={spec.better!r}: expected 'higher', 'lower' or ''")
    return spec


def checked_sampler(spec: Any) -> SamplerSpec:
    """The spec of a sampler. Raises PluginError when it is none, or not a sound one."""
    if not isinstance(spec, SamplerSpec):
        raise PluginError(f"dpkd_samplers must return SamplerSpecs, but the list holds {type(spec).__name__}")
    if not spec.name or spec.name != spec.name.lower() or not spec.name.replace("-", "").isalnum():
        raise PluginError(f"the name {spec.name!r} should be lower-case letters and digits with dashes between")
    if not (isinstance(spec.config, type) and issubclass(spec.config, SamplerConfig)):
        raise PluginError(f"the config of {spec.name!r} must be a subclass of dpkd.api.SamplerConfig")
    return spec
