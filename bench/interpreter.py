"""Triton's interpreter with a card's bfloat16: numpy has no such type, and what stands in for it is not exact.

As shipped (3.6 to 3.9) the interpreter cuts float32 off instead of rounding it to bfloat16, which doubles the error,
and multiplies the bit patterns of bfloat16 matrices as if they were numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    """Inside, float32 is rounded to the nearest bfloat16, ties to even, and products of matrices are of the values."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(data: np.ndarray, have: Any, want: Any, mode: Any) -> np.ndarray:
        if (have, want) != (tl.float32, tl.bfloat16):
            return convert(data, have, want, mode)
        bits = torch.from_numpy(np.array(data, np.float32)).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)

    def widened(builder: Any, x: Any) -> Any:
        return builder.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def of_values(builder: Any, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
        return multiply(builder, widened(builder, a), widened(builder, b), *rest, **named)

    with (
        patch.object(interpreter, "_convert_float", rounding),
        patch.object(interpreter.InterpreterBuilder, "create_dot", of_values),
    ):
        yield
