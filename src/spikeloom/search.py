"""Optuna's search over the settings of a recipe: `spikeloom sweep --search`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikeloom.errors import UsageError
from spikeloom.sweep import Trial, overrides, parse_grid, place_of, planned, run_stream, score
from spikeloom.train.recipe import Budget, Recipe

_RANGE = re.compile(r"([-+.\deE]+?)\.\.([-+.\deE]+)")
_TRIES = 20  # proposals for each trial; a small space has no more than its combinations
_DECADE = 10  # ranges of positive numbers at least so wide are searched by their logarithm


def parse_space(words: Iterable[str], optuna: Any) -> tuple[list[str], dict[str, Any]]:
    """Settings with one value, and Optuna's distributions of the others.

    `1e-3..1e-1` are numbers between, by their logarithm if the last is at least ten times the first; `1..8` whole
    numbers; `a,b,c` one of these.

    Raises:
        UsageError: nothing to search, a range that is none, or a seed, which is no setting to be chosen.
    """
    fixed: list[str] = []
    space: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        found = _RANGE.fullmatch(text)
        if found is None and "," not in text:
            fixed.append(word)
        elif found is None:
            chosen, axes = parse_grid([word])
            fixed += chosen
            space |= {
                name: optuna.distributions.CategoricalDistribution(tuple(values)) for name, values in axes.items()
            }
        else:
            space[key] = _between(word, found[1], found[2], optuna.distributions)
    if "seed" in space or "budget" in space:
        raise UsageError("a search does not choose seed or budget: give each one value")
    if not space:
        raise UsageError("name what to search, such as train.lr=1e-3..1e-1 or model.T=2..6")
    return fixed, space


def _between(word: str, first: str, last: str, distributions: Any) -> Any:
    try:
        whole = re.fullmatch(r"[-+]?\d+", first) is not None and re.fullmatch(r"[-+]?\d+", last) is not None
        low, high = (int(first), int(last)) if whole else (float(first), float(last))
    except ValueError:
        raise UsageError(f"{word}: a range is two numbers, such as 1e-3..1e-1") from None
    if not low < high or not math.isfinite(high - low):
        raise UsageError(f"{word}: the first number must be below the last")
    wide = low > 0 and high >= _DECADE * low
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(low, high, log=wide)


def import_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "--search needs Optuna: pip install 'spikeloom[sweep]'; without --search values and 1..3 are a grid"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass
class Search:
    """A search whose record lies in `search.log` beside its runs, so that the same command goes on with it.

    Args:
        recipe, row, budget: what is trained.
        fixed: settings of all trials.
        space: Optuna's distributions of the others.
        runs: as of a sweep.
        count: trials in all, those of earlier calls among them.

    Attributes:
        trials: those that were asked for.
    """

    recipe: Recipe
    row: str
    budget: Budget
    fixed: list[str]
    space: dict[str, Any]
    runs: Path
    count: int
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._optuna = import_optuna()
        self._place = place_of(self.recipe, self.row, self.runs)
        # What a mistake in the settings is, is said before anything starts.
        seed = self._settings({key: self._first(each) for key, each in self.space.items()}).seed
        self._place.mkdir(parents=True, exist_ok=True)
        journal = self._optuna.storages.journal
        storage = self._optuna.storages.JournalStorage(journal.JournalFileBackend(str(self._place / "search.log")))
        name = " ".join([f"{self.row} {self.budget}", *self.fixed, *sorted(map(repr, self.space.items()))])
        before = [each.study_name for each in self._optuna.get_all_study_summaries(storage)]
        done = len(self._optuna.load_study(study_name=name, storage=storage).trials) if name in before else 0
        # The sampler begins anew in each call: of another seed, or it would propose what it proposed first.
        sampler = self._optuna.samplers.TPESampler(seed=seed + 1000 * done, constant_liar=True)
        self._study: Any = self._optuna.create_study(
            storage=storage, sampler=sampler, study_name=name, direction="maximize", load_if_exists=True
        )
        self._asked: dict[Path, int] = {}

    @staticmethod
    def _first(distribution: Any) -> str:
        choices = getattr(distribution, "choices", None)
        return str(distribution.low if choices is None else choices[0])

    def _settings(self, varied: dict[str, str]) -> Any:
        return self.recipe.resolve(self.row, self.budget, overrides(self.fixed, varied))

    def run(
        self,
        target: str,
        words: list[str],
        jobs: int,
        threads: int,
        tell: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> bool:
        """Trains what is missing; arguments and result as of `sweep.run_trials`."""
        states = self._optuna.trial.TrialState
        for each in self._study.get_trials(states=(states.COMPLETE, states.FAIL)):
            self._new(self._trial(each))
        tell(f"{self.count} runs, {len(self.trials)} of them finished; {jobs} at a time, {threads} threads each")
        return run_stream(self._waiting(), self._ended, target, words, jobs, threads, tell, stop)

    def _new(self, trial: Trial) -> bool:
        """Takes up a trial, unless one with its settings is there."""
        new = all(other.folder != trial.folder for other in self.trials)
        if new:
            self.trials.append(trial)
        return new

    def _waiting(self) -> Iterator[Trial]:
        """Trials that were begun and not ended, then new ones; what was proposed before is not run again."""
        if len(self.trials) >= self.count:
            return
        begun = self._study.get_trials(states=(self._optuna.trial.TrialState.RUNNING,))
        asked = (self._study.ask(self.space) for _ in range(_TRIES * self.count))
        for each in itertools.chain(begun, asked):
            trial = self._trial(each)
            if not self._new(trial):
                self._study.tell(each.number, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._asked[trial.folder] = each.number
                if trial.summary is None:
                    yield trial
                else:  # it ended when nobody looked
                    self._ended(trial)
            if len(self.trials) >= self.count:
                return

    def _trial(self, each: Any) -> Trial:
        varied = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in each.params.items()}
        return planned(varied, self._place, self._settings(varied))

    def _ended(self, trial: Trial) -> None:
        number = self._asked.pop(trial.folder)
        if trial.summary is None:
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(number, score(trial.summary))
