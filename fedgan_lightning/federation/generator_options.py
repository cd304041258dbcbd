"""Options of a module that have no effect where the server trains its generator."""

from __future__ import annotations

from typing import Any

from fedgan_lightning.errors import refuse_first


def check_options(model: Any, *, who: str) -> None:
    """Refuse options of a module that nobody follows where the server trains the generator.

    Args:
        model: The global module; options that it does not have are none.
        who: The algorithm.

    Raises:
        ConfigurationError: If there are such.
    """
    augment, scheduler = getattr(model, "augment", None), getattr(model, "generator_scheduler", None)
    steps, updates = getattr(model, "g_steps", 1), getattr(model, "updates", "alternating")
    wrong = [
        (
            augment is not None,
            "judge samples as they are",
            f"augment={type(augment).__name__}",
            "set model.augment to null",
        ),
        (
            steps > 1,
            "take one step of the generator after a round of clients",
            f"g_steps={steps}",
            "set model.g_steps to 1, and raise federation.rounds, or ServedGenerator's generator_steps",
        ),
        (
            scheduler is not None,
            "leave the generator's learning rate to the server",
            "a generator_scheduler, which clients would follow",
            "set model.generator_scheduler to null",
        ),
        (
            updates == "simultaneous",
            "step the discriminators first",
            "updates=simultaneous",
            "set model.updates to alternating",
        ),
    ]
    refuse_first(wrong, prefix=f"{who} must ")
