from collections.abc import Sequence
from typing import TypedDict

class Launch(TypedDict):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    read_bytes: int
    written_bytes: int

build: dict[str, str | list[str]]

def architectures() -> list[str]: ...
def compiled_for(architecture: int) -> bool: ...
def refusal(op: str, dtype: str, group_size: int, plane: Sequence[int], architecture: int) -> str: ...
def record(architecture: int, processors: int, shared_bytes: int) -> None: ...
def recorded() -> list[Launch]: ...
