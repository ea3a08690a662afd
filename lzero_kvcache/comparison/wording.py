"""Numbers, sides and runs as text, the same on the terminal, in the page and in the picture."""
from typing import Optional

from .numbers import Spread
from .sides import Side

NONE = '-'


def value_text(value: Optional[float], kind: str, beside: Optional[float] = None) -> str:
    """
    Overview:
        A value of a measure.
    Arguments:
        - value (:obj:`Optional[float]`): The value.
        - kind (:obj:`str`): As of ``Measure``.
        - beside (:obj:`Optional[float]`): Another value, whose digits after the point it gets.
    Returns:
        - text (:obj:`str`): As '1:02:03', '1,234', '12.3' or '57.3%'; a dash for None.
    """
    if value is None:
        return NONE
    if kind == 'time':
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
    if kind == 'share':
        return f'{value:.1%}'
    digits = 2 if abs(value if beside is None else beside) < 10 else 1
    return '{:,.{}f}'.format(value, 0 if kind == 'count' else digits)


def spread_text(spread: Optional[Spread], kind: str) -> str:
    """
    Overview:
        Mean and standard deviation.
    Arguments:
        - spread (:obj:`Optional[Spread]`): Over the runs of a side.
        - kind (:obj:`str`): As of ``Measure``.
    Returns:
        - text (:obj:`str`): As '12.3 ± 0.4'; the mean alone for one run.
    """
    if spread is None:
        return NONE
    mean = value_text(spread.mean, kind)
    return mean if spread.deviation is None else f'{mean} ± {value_text(spread.deviation, kind, spread.mean)}'


def ratio_text(ratio: Optional[float]) -> str:
    """
    Overview:
        How many times the baseline's mean is another side's.
    Arguments:
        - ratio (:obj:`Optional[float]`): The ratio.
    Returns:
        - text (:obj:`str`): As '1.59'; a dash for None.
    """
    return NONE if ratio is None else f'{ratio:,.2f}'


def side_text(side: Side) -> str:
    """
    Overview:
        What a side is, in a heading.
    Arguments:
        - side (:obj:`Side`): The side.
    Returns:
        - text (:obj:`str`): As 'old, 3 runs'.
    """
    return f'{side.name}, {runs_text(len(side.runs))}'


def runs_text(count: int) -> str:
    """
    Overview:
        How many runs.
    Arguments:
        - count (:obj:`int`): The number.
    Returns:
        - text (:obj:`str`): As '1 run' or '3 runs'.
    """
    return f"{count} run{'' if count == 1 else 's'}"
