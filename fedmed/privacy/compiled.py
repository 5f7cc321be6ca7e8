"""The innermost loops of a private step on a CPU, compiled (numba).

The first use on a machine compiles (about 6 s); after that numba reads what it kept beside this file, or in the user's
cache. To load it takes a second: whoever needs none of this does not import it.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As `numba.njit`, other threads of Python go on beside it; compiled anew in every process where there is no place
    to keep it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:
            return numba.njit(nogil=True, **options)(function)

    return decorate


@intrinsic
def _floats(typing_context: Any, address: Any) -> Any:
    """An address as a pointer to float32."""
    del typing_context
    pointer = types.CPointer(types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return pointer(address), generate


@_compiled()
def _multiply(one: Any, other: Any, out: Any, add: int) -> None:
    if add:
        out += np.dot(one, other)
    else:
        np.dot(one, other, out)


@_compiled()
def gradient(jobs: Any, patient: int, own: Any) -> None:
    """A patient's gradient into (entries,) float32: what the jobs (`fedmed.privacy.jobs`) say."""
    for number in range(len(jobs)):
        job = jobs[number]
        out = own[job.first : job.first + max(job.rows, 1) * job.columns]
        left = _floats(job.left + 4 * patient * job.left_stride)
        if job.right == 0:
            values = numba.carray(left, out.shape)
            if job.add:
                out += values
            else:
                out[:] = values
            continue
        right = _floats(job.right + 4 * patient * job.right_stride)
        other = numba.carray(right, (job.span, job.columns))
        matrix = out.reshape(job.rows, job.columns)
        # Two types of array, so that BLAS need not copy either.
        if job.transposed:
            _multiply(numba.carray(left, (job.rows, job.span)), other, matrix, job.add)
        else:
            _multiply(numba.carray(left, (job.span, job.rows)).T, other, matrix, job.add)


@_compiled(fastmath={"reassoc", "contract"})
def _square(values: Any) -> np.float32:
    total = np.float32(0)
    for n in range(len(values)):
        total += values[n] * values[n]
    return total


@_compiled()
def norm_bound(own: Any, piece: int, lost: float, error: float) -> float:
    """As `fedmed.privacy.clipping.norm_bounds`, of (entries,) float32 of one patient."""
    squares = 0.0
    for first in range(0, len(own), piece):
        squares += _square(own[first : first + piece])
    return math.sqrt(squares + lost) * (1 + error)


@_compiled()
def add_clipped(
    jobs: Any,
    patients: int,
    own: Any,
    total: Any,
    bound: float,
    cell: float,
    slack: float,
    piece: int,
    lost: float,
    error: float,
    most: int,
) -> None:
    """Add every patient's whole cells to (entries,) int64, one patient after the other: in the cache of one core.

    A patient's gradient in the memory of a block's would be written once and read twice.

    Args:
        own: (entries,) float32: room for one patient's.
        bound: cells that no patient's norm may exceed.
        cell: a cell's side.
        slack: a cell is taken to be that much larger, for the rounding of its inverse and of products with it.
        piece: entries whose squares are added up in float32; the sums of such pieces are added in float64.
        lost, error: of a norm, what rounding may take away (`fedmed.privacy.clipping.norm_error`).
        most: patients whose cells surely add up to less than 2^24, so that float32 holds every sum.
    """
    some = np.zeros(len(own), dtype=np.float32)
    added = 0
    for patient in range(patients):
        gradient(jobs, patient, own)
        norm = norm_bound(own, piece, lost, error)
        if math.isfinite(norm):
            inverse = np.float32(1 / (max(norm / bound, cell) * slack))
            for n in range(len(own)):
                some[n] += np.trunc(own[n] * inverse)
            added += 1
        if added == most or patient == patients - 1:
            for n in range(len(own)):
                total[n] += np.int64(some[n])
            some[:] = 0
            added = 0


@_compiled()
def group_norm(values: Any, backprops: Any, mean: Any, inverse: Any, weight: Any, bias: Any) -> None:
    """Each record's gradients of GroupNorm, in one pass over what lies in memory with its channels last.

    Args:
        values, backprops: (records, positions, channels) float32: read, and the gradient of what was written.
        mean, inverse: (records, groups) float32.
        weight, bias: (records, channels) float32: where the gradients are written.
    """
    records, positions, channels = values.shape
    width = channels // mean.shape[1]
    for record in range(records):
        product, total = weight[record], bias[record]
        product[:] = 0
        total[:] = 0
        for position in range(positions):
            one, other = values[record, position], backprops[record, position]
            for channel in range(channels):
                product[channel] += one[channel] * other[channel]
                total[channel] += other[channel]
        for channel in range(channels):
            group = channel // width
            centred = product[channel] - mean[record, group] * total[channel]
            product[channel] = centred * inverse[record, group]


@_compiled()
def look_up(columns: Any, first: Any, high: Any, alias: Any, drawn: Any, ties: Any) -> int:
    """Columns, or their aliases where `first` is above the threshold, into (count,) int64.

    Args:
        columns: (count,) uint16.
        first: (count,) uint8.
        high, alias: of every column: uint8 threshold, uint16.
        ties: (count + 1,): which of `first` are on the threshold.

    Returns:
        Of these the number.
    """
    found = 0
    for n in range(len(columns)):
        column = columns[n]
        threshold = high[column]
        drawn[n] = alias[column] if first[n] > threshold else column
        ties[found] = n
        found += first[n] == threshold
    return found


@_compiled()
def settle(columns: Any, words: Any, ties: Any, middle: Any, low: Any, alias: Any, drawn: Any) -> None:
    """Aliases for those of `ties` whose further bits are not below the threshold's.

    Args:
        words: (len(ties) or more, 2) uint64: the next 64 bits, and 40 more that come first in the second.
        middle, low: of every column: those bits of its threshold, uint64.
    """
    for number in range(len(ties)):
        column = columns[ties[number]]
        high, last = words[number, 0], words[number, 1] >> np.uint64(24)
        if high > middle[column] or (high == middle[column] and last >= low[column]):
            drawn[ties[number]] = alias[column]
