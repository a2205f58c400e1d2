"""Optuna over widths under a budget in milliseconds, as its user would write it."""

from collections.abc import Callable, Mapping, Sequence

import optuna  # type: ignore[import-not-found]


def search(
    options: Mapping[str, Sequence[int]], milliseconds: Callable[[list[int]], float], budget_ms: float,
    loss: Callable[[list[int]], float], enough: Callable[[], bool], seed: int,
) -> list[int]:  # fmt: skip
    """The widths of the best trial that keeps the budget; a trial over it costs nothing."""

    def objective(trial: "optuna.Trial") -> float:
        widths = [trial.suggest_categorical(name, list(choices)) for name, choices in options.items()]
        over = milliseconds(widths) / budget_ms - 1
        trial.set_user_attr("over", over)
        if over > 0:
            return 10.0
        found = loss(widths)
        if enough():
            trial.study.stop()
        return found

    sampler = optuna.samplers.TPESampler(seed=seed, constraints_func=lambda trial: (trial.user_attrs["over"],))
    study = optuna.create_study(direction="minimize", sampler=sampler)
    study.optimize(objective, n_trials=5000)
    best = study.best_trial.params
    return [int(best[name]) for name in options]
