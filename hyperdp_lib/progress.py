"""Progress bars: on a terminal, for what takes longer than two seconds, gone when it is done; nothing elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

DELAY = 2.0  # seconds


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Any:
    """A tqdm bar on stderr, shown only on a terminal, only after two seconds, and wiped away at the end.

    Parameters
    ----------
    iterable
        What to go through; without it, call ``update`` on the bar.
    show
        False: show nothing anywhere.
    **options
        Of tqdm: ``total``, ``initial``, ``desc``, ``unit``, ``unit_scale``.

    Examples
    --------
    >>> sum(progress_bar([1, 2, 3], desc="adding"))
    6
    """
    return _Bar(iterable, disable=None if show else True, delay=DELAY, leave=False, **options)


class _Bar(tqdm):
    """tqdm's own delay holds back neither a new description nor a reset, and a bar shown so is not wiped away."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._due, self._shown = time.monotonic() + options["delay"], False
        super().__init__(*arguments, **options)

    def refresh(self, *arguments: Any, **options: Any) -> Any:
        if time.monotonic() < self._due:
            return None
        self._shown = True
        return super().refresh(*arguments, **options)

    def close(self) -> None:
        if self._shown:
            self.delay = 0
        super().close()
