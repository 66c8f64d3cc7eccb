"""How often to save with each engine, and what that loses: the formula of `ettr` with what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..ettr import GPUS, RESTART, Advice, advise, mtbf_of
from .figures import Figures


@dataclass(frozen=True)
class Assumptions:
    """What no measurement tells. `mtbf`: seconds between crashes, from `gpus` at Llama 3's rate unless it is given;
    `restart`: seconds before the checkpoint is loaded; `interval`: of the user's own saves; `overhead`: the share of the
    time that saving may cost;
    `price`: US dollars per GPU and hour."""

    gpus: int = GPUS
    given_mtbf: float | None = None
    restart: float = RESTART
    interval: float = 1800.0
    overhead: float | None = None
    price: float | None = None

    @property
    def mtbf(self) -> float:
        return mtbf_of(self.gpus) if self.given_mtbf is None else self.given_mtbf

    @property
    def source(self) -> str:
        """Where the time between crashes comes from."""
        if self.given_mtbf is not None:
            return "--mtbf"
        return (
            f"{self.gpus:,} GPU{'s' * (self.gpus != 1)} at the rate of Llama 3's training; --gpus or --mtbf for yours"
        )


def lost_per_save(figures: Figures) -> float | None:
    """Seconds of training that one save costs in all, no less than what it blocks; None if that was not measured."""
    lost, blocked = figures.median("lost"), figures.median("blocked")
    return None if lost is None or blocked is None else max(lost, blocked)


def advice_for(figures: Figures, given: Assumptions) -> Advice | None:
    """None if what a save costs was not measured."""
    lost = lost_per_save(figures)
    durable = figures.median("beside") or figures.median("durable")  # the former where it was measured: beside training
    if lost is None or durable is None:
        return None
    return advise(
        lost=lost,
        durable=durable,
        mtbf=given.mtbf,
        restart=given.restart,
        load=figures.median("loaded") or 0.0,
        now=given.interval,
    )
