"""How long searches and their steps take."""
from dataclasses import dataclass


@dataclass
class Timing:
    """How often something ran, and for how long in all."""
    count: int = 0
    seconds: float = 0.0

    def record(self, seconds: float, count: int = 1) -> None:
        """Count one run, or several that took so long together."""
        self.count += count
        self.seconds += seconds
