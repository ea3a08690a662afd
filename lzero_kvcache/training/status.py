"""The numbers of a run: while it goes on, and when it has ended. They come from elsewhere, and are shown elsewhere."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional


@dataclass
class Evaluation:
    """One evaluation: when it took place and its mean episode return."""
    env_step: int
    train_iter: int
    reward: float


@dataclass
class Status:
    """How far a run is. A resumed run starts at ``first_env_step``; speeds are of this run alone."""
    phase: str = 'start'
    env_step: int = 0
    train_iter: int = 0
    first_env_step: int = 0
    first_train_iter: int = 0
    seconds: float = 0.0
    hit_rate: Optional[float] = None
    evaluations: List[Evaluation] = field(default_factory=list)

    @property
    def last_reward(self) -> Optional[float]:
        return self.evaluations[-1].reward if self.evaluations else None

    @property
    def best_reward(self) -> Optional[float]:
        return max((evaluation.reward for evaluation in self.evaluations), default=None)

    @property
    def speed(self) -> Optional[float]:
        steps = self.env_step - self.first_env_step
        return steps / self.seconds if steps > 0 and self.seconds > 0 else None


@dataclass
class Result:
    """
    A run that has ended; ``summary.json`` in its folder is this. Its first fields say which run it is and whether it is
    done; each field after them has a default, for summaries of versions that did not have it.
    """
    exit_code: int
    task: str
    cache: str
    seed: int
    outcome: str = ''
    exp_name: str = ''
    config: str = ''
    entry: str = ''
    device: str = ''
    max_env_step: Optional[int] = None
    max_train_iter: Optional[int] = None
    env_step: int = 0
    train_iter: int = 0
    seconds: float = 0.0
    env_steps_per_second: Optional[float] = None
    host_memory_mb: Optional[float] = None
    device_memory_mb: Optional[float] = None
    cache_memory_mb: Optional[float] = None
    hit_rates: Dict[str, Optional[float]] = field(default_factory=dict)
    counters: Dict[str, Any] = field(default_factory=dict)
    last_reward: Optional[float] = None
    best_reward: Optional[float] = None
    evaluations: List[Evaluation] = field(default_factory=list)
    event_files: str = ''
    checkpoint: Optional[str] = None
    log_file: Optional[str] = None
    processes: int = 1
    machine: Dict[str, Any] = field(default_factory=dict)
