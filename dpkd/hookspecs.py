"""The kinds of plugins: the hook of each, the spec that it returns, and the check of that spec."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import pluggy

from dpkd.api import (
    Block,
    LossConfig,
    LossSpec,
    MetricSpec,
    PairLoss,
    RolloutLoss,
    SamplerConfig,
    SamplerSpec,
    SourceConfig,
    SourceSpec,
    TeacherSpec,
    TokenLoss,
)
from dpkd.errors import PluginDeprecation

HookT = TypeVar("HookT", bound=Callable[..., Any])
hookspec = pluggy.HookspecMarker("dpkd")


class Deprecated(NamedTuple):
    """A deprecated argument: since which version, in which version it is removed, and what a plugin does instead."""

    since: str
    gone_in: str
    instead: str


# Hook -> argument -> its deprecation. Until it is removed, the argument stays in the hook below and has its value.
DEPRECATED_ARGUMENTS: Mapping[str, Mapping[str, Deprecated]] = {}


def hook(
    function: HookT | None = None, *, deprecated: Mapping[str, Mapping[str, Deprecated]] = DEPRECATED_ARGUMENTS
) -> Any:
    """Marks a hook. A plugin that takes a deprecated argument of it causes a warning at its own file and line.

    Raises ValueError when the table names an argument that the hook does not have.
    """

    def marked(function: HookT) -> HookT:
        arguments = deprecated.get(function.__name__, {})
        if strange := arguments.keys() - inspect.signature(function).parameters.keys():
            raise ValueError(f"{function.__name__} has no argument {', '.join(sorted(strange))} to deprecate")
        warnings = {
            argument: PluginDeprecation(
                f"{function.__name__}: the argument `{argument}` is deprecated since dpkd {how.since} and goes in "
                f"{how.gone_in}. {how.instead}"
            )
            for argument, how in arguments.items()
        }
        return hookspec(function, warn_on_impl_args=dict[str, Warning](warnings))

    return marked if function is None else marked(function)


class DpkdHooks:
    """One method per hook."""

    @hook
    def dpkd_losses(self) -> Iterable[LossSpec]:  # type: ignore[empty-body]
        """The losses of this plugin.

        Example:

            @hookimpl
            def dpkd_losses():
                return [SPEC]
        """

    @hook
    def dpkd_metrics(self) -> Iterable[MetricSpec]:  # type: ignore[empty-body]
        """The metrics of this plugin, which `dpkd eval` computes.

        Example:

            @hookimpl
            def dpkd_metrics():
                return [MetricSpec("letters", "letters", "", "Length.", per_row=lambda a: map(len, a.predictions))]
        """

    @hook
    def dpkd_samplers(self) -> Iterable[SamplerSpec]:  # type: ignore[empty-body]
        """The generation backends of this plugin, which `text.backend` names.

        Example:

            @hookimpl
            def dpkd_samplers():
                return [SamplerSpec("echo", "Repeats the prompt.", open=Echo)]
        """

    @hook
    def dpkd_teachers(self) -> Iterable[TeacherSpec]:  # type: ignore[empty-body]
        """The kinds of teachers of this plugin.

        Example:

            @hookimpl
            def dpkd_teachers():
                return [TeacherSpec("ngram", "Counts of n-grams.", open=NgramTeacher, config=NgramSettings)]
        """

    @hook
    def dpkd_response_sources(self) -> Iterable[SourceSpec]:  # type: ignore[empty-body]
        """The response sources of this plugin, which `text.source` names.

        Example:

            @hookimpl
            def dpkd_response_sources():
                return [SourceSpec("best-of-n", "The likeliest of n.", open=BestOfN, config=BestOfNConfig)]
        """


class PluginError(Exception):
    """What is wrong with a plugin, as a sentence."""


def _check_loss(spec: LossSpec) -> None:
    _check_dashed(spec.name)
    _check_config(spec, LossConfig)
    if not (isinstance(spec.loss, type) and issubclass(spec.loss, TokenLoss | PairLoss | RolloutLoss)):
        raise PluginError(f"the loss of {spec.name!r} must be a subclass of TokenLoss, PairLoss or RolloutLoss")
    if "name" in spec.config.model_fields:
        raise PluginError(f"the config of {spec.name!r} has a setting `name`, but that is the name of the loss itself")
    if "loss" in spec.suggests:
        raise PluginError(f"{spec.name!r} suggests `loss`: the defaults of its own settings stand in its config")
    try:  # a list of losses says what each needs of the teacher, so the default settings must be valid
        spec.needs(spec.config())
    except Exception as error:
        what = " ".join(str(error).split())
        raise PluginError(f"the default settings of {spec.name!r} do not work: {what}") from error


def _check_metric(spec: MetricSpec) -> None:
    if not spec.name.isidentifier() or spec.name != spec.name.lower():
        raise PluginError(f"the name {spec.name!r} should be lower-case letters and digits with underscores between")
    if spec.better not in ("higher", "lower", ""):
        raise PluginError(f"`better` of {spec.name!r} should be higher, lower or empty, not {spec.better!r}")
    if sum(function is not None for function in (spec.per_row, spec.overall, spec.of_tokens)) != 1:
        raise PluginError(f"the metric {spec.name!r} needs exactly one of `per_row`, `overall` and `of_tokens`")


def _check_sampler(spec: SamplerSpec) -> None:
    _check_dashed(spec.name)
    _check_config(spec, SamplerConfig)


def _check_opened(spec: TeacherSpec | SourceSpec) -> None:
    _check_dashed(spec.name)
    _check_config(spec, SourceConfig if isinstance(spec, SourceSpec) else Block)
    if not callable(spec.open):
        raise PluginError(f"`open` of {spec.name!r} must be callable, but is {type(spec.open).__name__}")


def _check_dashed(name: str) -> None:
    if not name or name != name.lower() or not name.replace("-", "").isalnum():
        raise PluginError(f"the name {name!r} should be lower-case letters and digits with dashes between")


def _check_config(spec: Any, base: type[Block]) -> None:
    if not (isinstance(spec.config, type) and issubclass(spec.config, base)):
        raise PluginError(f"the config of {spec.name!r} must be a subclass of dpkd.api.{base.__name__}")


SpecT = TypeVar("SpecT", bound=LossSpec | MetricSpec | SamplerSpec | TeacherSpec | SourceSpec)


@dataclass(frozen=True)
class Kind(Generic[SpecT]):
    """A kind of plugin: its name, the hook that returns its specs, and their check, which raises PluginError.

    An entry point may begin with the last word of the name and a dot (`sampler.vllm`): it is then loaded for that kind
    alone. An entry point without such a prefix may have hooks of any kind.
    """

    name: str
    hook: str
    spec: type[SpecT]
    check: Callable[[SpecT], None]

    @property
    def plural(self) -> str:
        """For messages: `losses`, `response sources`."""
        return self.hook.removeprefix("dpkd_").replace("_", " ")

    @property
    def prefix(self) -> str:
        """What an entry point of this kind alone begins with."""
        return f"{self.name.split()[-1]}."


KINDS: tuple[Kind[Any], ...] = (
    Kind("loss", "dpkd_losses", LossSpec, _check_loss),
    Kind("metric", "dpkd_metrics", MetricSpec, _check_metric),
    Kind("sampler", "dpkd_samplers", SamplerSpec, _check_sampler),
    Kind("teacher", "dpkd_teachers", TeacherSpec, _check_opened),
    Kind("response source", "dpkd_response_sources", SourceSpec, _check_opened),
)


def kind_of(spec: type[SpecT]) -> Kind[SpecT]:
    """The kind whose specs are of a class."""
    return next(kind for kind in KINDS if kind.spec is spec)
