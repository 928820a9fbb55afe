"""The settings of a run: data, model, neuron and training, every key checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from spikeloom.errors import UsageError

Json = dict[str, Any]


def _as_text(value: Any) -> Any:
    """A value with paths as strings, which settings on disk are."""
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_tuple(value: Any) -> Any:
    """A list as a tuple, for which TOML and JSON have no word."""
    return tuple(as_tuple(each) for each in value) if isinstance(value, list) else value


def _without_none(fields: Mapping[str, Any], value: Any) -> Any:
    """Settings without those that "none" switches off, for which TOML has no word: of `fields` that may be None."""
    if not isinstance(value, Mapping):
        return value
    off = [key for key, each in value.items() if each == "none" and key in fields and fields[key].default is None]
    return {key: each for key, each in value.items() if key not in off}


class Strict(BaseModel):
    """Settings with known keys alone, of the types that are written."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_switches_off(cls, value: Any) -> Any:
        return _without_none(cls.model_fields, value)


class Named(BaseModel):
    """Something from a registry with its options: `"LIF"` or `{name = "LIF", tau = 2.0}`."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: _as_text(each) for key, each in _without_none(cls.model_fields, value).items()}
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> Json:
        """All keys but the name; the string "none" stands for None, which TOML cannot say."""
        return _with_none(self.model_extra or {})


def _with_none(values: Json) -> Json:
    return {
        key: None if value == "none" else _with_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }


class DataSettings(Named):
    """A data set, with the options of its builder."""

    root: str | None = Field(None, description="folder of the files; SPIKELOOM_DATA without it")
    test_subset: int | None = Field(None, ge=1, description="images of the test part to use; all without it")
    validation: float = Field(
        0.0, ge=0, lt=1, description="share of the training part held out; its best epoch gives the run's weights"
    )


class PenaltySettings(Named):
    """A penalty on environments, with its options."""

    weight: float = Field(gt=0, description="lambda = weight x epoch / epochs, epochs counted from 0")


class RatePenaltySettings(Strict):
    """A penalty on the firing rates of all neuron layers."""

    weight: float = Field(gt=0, description="of the penalty in the loss")
    target: float | None = Field(
        None, ge=0, description="spikes per neuron and step that every layer is drawn to; to silence without it"
    )


class MixSettings(Strict):
    """Two images of a batch become one, with both labels (timm's Mixup, one draw a batch)."""

    mixup: float = Field(0.0, ge=0, description="alpha; 0 for none")
    cutmix: float = Field(0.0, ge=0, description="alpha; 0 for none")
    p: float = Field(1.0, ge=0, le=1, description="probability that a batch is mixed")
    switch: float = Field(0.5, ge=0, le=1, description="probability of cutmix, where both are on")
    until: int | None = Field(None, ge=0, description="epochs after which batches stay as they are")

    @model_validator(mode="after")
    def _mixes(self) -> MixSettings:
        if self.mixup == self.cutmix == 0:
            raise ValueError("train.mix: mixup or cutmix must be above 0, such as train.mix.mixup=0.8")
        return self


class _Grown(Strict):
    """Settings whose later keys are written where they are set, so that recorded results still equal their recipes."""

    later: ClassVar[tuple[str, ...]]

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> Json:
        fields = type(self).model_fields
        return {k: v for k, v in dump(self).items() if k not in self.later or v != fields[k].default}


class StepStage(_Grown):
    """Some epochs in which a static image is shown for T steps, and other neurons may stand in for the network's."""

    later = ("neuron",)

    T: int = Field(ge=1)
    epochs: int = Field(ge=1)
    neuron: Named | None = Field(None, description="in the place of the network's neurons, such as MLF at T = 1")


_APART = (
    ("shard", "ema", "averaged weights are not shared out"),
    ("shard", "whiten", "filters are set whole"),
    ("start_from", "whiten", "it has filters"),
    ("start_from", "initial_rate", "it has rates"),
)


class TrainSettings(_Grown):
    """How to train. Times are in epochs, so that they do not depend on the batch size."""

    later = ("norm_bias_lr_scale", "whiten")

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="images per process and micro-batch")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimiser step")
    total_batch: int | None = Field(
        None, ge=1, description="images per optimiser step of all processes together; accumulate follows from it"
    )
    method: Named = Named(name="bptt")
    loss: Named = Named(name="sdt")
    penalty: PenaltySettings | None = Field(None, description="added to the loss, of data with environments")
    class_weights: Literal["balanced"] | list[float] | None = Field(
        None, description="of each class in the loss of training; balanced makes all classes weigh the same"
    )
    rate_penalty: RatePenaltySettings | None = Field(None, description="added to the loss, of any network")
    optimizer: Literal["sgd", "adam", "adamw", "adamax"] = "sgd"
    lr: float = Field(gt=0)
    norm_bias_lr_scale: float | None = Field(
        None, gt=0, description="the norms' biases learn at this multiple of lr, such as 16"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: float = Field(0.0, ge=0)
    decay_all: bool = Field(True, description="weight decay also of biases and norms; false as in timm")
    schedule: Literal["constant", "cosine", "linear", "one_cycle", "step"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0, description="linear, from warmup_lr; of one_cycle the way up")
    warmup_lr: float | None = Field(None, gt=0, description="lr / 100 without it; of one_cycle lr / 25")
    min_lr: float = Field(0.0, ge=0, description="where the schedule ends: cosine, linear, one_cycle")
    cooldown_epochs: float = Field(0.0, ge=0, description="last epochs, at min_lr, of the cosine and linear schedules")
    milestones: list[float] = Field([], description="epochs after which the step schedule multiplies by gamma")
    gamma: float = Field(0.1, gt=0, le=1)
    augment: list[Named] = []
    mix: MixSettings | None = None
    workers: int | None = Field(
        None, ge=0, description="processes that prepare batches; without it 1 where preparing is slow, else 0"
    )
    steps: list[StepStage] = Field([], description="T and neurons of the first epochs, by stages; then the model's own")
    initial_rate: float | None = Field(
        None, gt=0, lt=1, description="firing rate at which every neuron layer starts, set on the first batch"
    )
    whiten: bool = Field(
        False, description="the first convolution's filters are principal components of its images, and stay"
    )
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient of all weights together")
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation accuracy that end the run; needs data.validation"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights, which become the run's")
    start_from: Annotated[str | None, BeforeValidator(_as_text)] = Field(
        None, description="folder of a finished run whose weights this one starts from"
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = True
    sync_norm: bool = Field(False, description="batch statistics of all processes, not of each by itself")
    shard: bool = Field(False, description="parameters and optimiser shared out among processes, not copied (FSDP2)")
    tracker: Literal[
        "tensorboard", "mlflow", "wandb", "trackio", "aim", "comet_ml", "clearml", "dvclive", "swanlab"
    ] = Field("tensorboard", description="where curves go beside metrics.jsonl")
    checkpoint_minutes: float = Field(2.0, ge=0, description="between checkpoints; also one after every epoch")

    @field_validator("method", "loss", mode="before")
    @classmethod
    def _of_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        """Options without a name are those of the default."""
        default: Named = cls.model_fields[str(info.field_name)].default
        return {"name": default.name, **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _together(self) -> TrainSettings:
        for one, other, reason in _APART:
            if all(getattr(self, key) != type(self).model_fields[key].default for key in (one, other)):
                raise ValueError(f"train.{one} and train.{other} cannot both be given, {reason}: leave one out")
        return self

    @model_validator(mode="after")
    def _total(self) -> TrainSettings:
        if self.total_batch is None:
            return self
        if self.accumulate != 1:
            raise ValueError(
                "train.total_batch and train.accumulate cannot both be given: leave out accumulate, which follows"
            )
        if self.total_batch % self.batch_size:
            raise ValueError(
                f"train.total_batch must be a multiple of train.batch_size, {self.batch_size}, got {self.total_batch}"
            )
        return self

    def micro_batches(self, processes: int) -> int:
        """Micro-batches of each process per optimiser step.

        Raises:
            UsageError: `total_batch` does not divide among the processes.
        """
        if self.total_batch is None:
            return self.accumulate
        count, rest = divmod(self.total_batch, self.batch_size * processes)
        if rest:
            raise UsageError(
                f"train.total_batch={self.total_batch} is no multiple of {self.batch_size * processes}, the images of "
                f"{processes} processes with train.batch_size={self.batch_size} each: lower train.batch_size"
            )
        return count

    @property
    def takes_whole_sequences(self) -> bool:
        """Whether the method gives the loss all steps at once."""
        return self.method.name == "bptt" or self.method.options.get("mode") == "multi_step_detached"


class Settings(Strict):
    """All that decides a run's weights."""

    seed: int = Field(1, ge=0, lt=2**31)
    data: DataSettings
    model: Named
    neuron: Named | None = None
    train: TrainSettings

    @model_validator(mode="after")
    def _has_what_ends_it(self) -> Settings:
        if self.train.patience is not None and not self.data.validation:
            raise ValueError("train.patience needs a validation part to watch: give data.validation, such as 0.1")
        return self


class MeasureSettings(Strict):
    """What a recipe measures instead of training: a function of `analyse.MEASUREMENTS` with its options."""

    seed: int = Field(1, ge=0, lt=2**31)
    measure: Named
