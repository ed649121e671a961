"""What a run costs on machines that are not here: compiled ahead of time, from the compiler's own figures."""

from lumos_jax.planning.chips import Chip, Target, parse_target
from lumos_jax.planning.program import Program, read_program

__all__ = ["Chip", "Program", "Target", "parse_target", "read_program"]
