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
    """A run that has ended; ``summary.json`` in its folder is this."""
    outcome: str
    exit_code: int
    exp_name: str
    config: str
    entry: str
    task: str
    cache: str
    seed: int
    device: str
    max_env_step: Optional[int]
    max_train_iter: Optional[int]
    env_step: int
    train_iter: int
    seconds: float
    env_steps_per_second: Optional[float]
    host_memory_mb: Optional[float]
    device_memory_mb: Optional[float]
    cache_memory_mb: Optional[float]
    hit_rates: Dict[str, Optional[float]]
    counters: Dict[str, Any]
    last_reward: Optional[float]
    best_reward: Optional[float]
    evaluations: List[Evaluation]
    event_files: str
    checkpoint: Optional[str]
    log_file: Optional[str]
    processes: int
    machine: Dict[str, Any]
